"""An episode as a Rerun recording: pictures with heatmaps over them, shares, words, state and actions.

    export_rerun(open_episode("….zarr"), "episode.rrd")   # then: rerun episode.rrd

Timelines are `frame` (its number) and `time` (seconds since the first frame). Needs the extra `rerun`. Knows
one episode: which ones are recorded, and where a viewer is, is known to `overlay.live`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from PIL import Image

from lerobot_attn import analysis
from lerobot_attn.analysis.select import action_queries
from lerobot_attn.analysis.spatial import by_camera
from lerobot_attn.analysis.tokens import TASK, TEXT, by_modality, by_token, token_groups
from lerobot_attn.errors import RANDOM_WEIGHTS, ConfigError, SetupError, StoreError, first_line
from lerobot_attn.figures.canvas import store_name
from lerobot_attn.figures.fonts import one_line
from lerobot_attn.figures.scale import ColourScale
from lerobot_attn.overlay.about import about
from lerobot_attn.overlay.files import WrittenOverlay, refuse_inputs, replacing
from lerobot_attn.overlay.maps import range_of, read_attention, where_of
from lerobot_attn.overlay.settings import RerunSettings
from lerobot_attn.sizes import Progress
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.video import read_frames

APPLICATION = "lerobot-attn"
_DEFAULT_FPS = 20.0
_FLUSH_S = 600.0
_PICTURES = 64  # frames that are sent at once
_NOT_MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_{}[]<>()#+-.!|~"})


def rerun_sdk() -> Any:
    """Return the module `rerun`.

    Raises:
        SetupError: it is not installed.
    """
    try:
        import rerun
    except ImportError as error:
        raise SetupError(
            "Rerun is not installed; expected rerun-sdk 0.24 to 0.33: "
            "pip install 'lerobot_policy_attn[rerun]'"
        ) from error
    return rerun


def export_rerun(
    episode: Episode,
    path: str | Path,
    settings: RerunSettings | None = None,
    progress: Progress | None = None,
) -> WrittenOverlay:
    """Write an episode as a Rerun recording, with its blueprint.

    Maps are held as patches (1 kB a frame for 16 × 16), pictures stream.

    Args:
        episode: from `open_episode`.
        path: ….rrd; folders are made. It appears when the file is whole.
        settings: which maps to show, and how.
        progress: called as `progress(done, total)` with inferences read and frames written.

    Returns:
        What was written; its notes name cameras whose pictures are not there.

    Raises:
        SetupError: Rerun is not installed.
        ConfigError: another suffix, the file is one of the episode's own, or it cannot be written.
        SelectionError: a layer, head, camera … that the episode does not hold.
        StoreError: the episode is empty or damaged.
    """
    rr, path = rerun_sdk(), Path(path)
    if path.suffix.lower() != ".rrd":
        raise ConfigError(f"{path}: cannot write {path.suffix or 'no suffix'!r}, expected .rrd")
    refuse_inputs(episode, path)
    if episode.n_frames == 0:
        raise StoreError(f"{episode.path}: holds no frames yet; expected one at least")
    with replacing(path, "the recording") as temporary:
        stream = new_stream(rr, episode)
        track = EpisodeTrack(stream, episode, settings or RerunSettings())
        try:
            stream.save(temporary)
            notes = track.finish(episode, progress)
            flush(stream, _FLUSH_S)
        except RuntimeError as error:  # Rerun's writer, whose thread ends where it cannot write
            raise ConfigError(
                f"{path}: cannot write the recording: {first_line(error)}; is the disk full?"
            ) from error
        finally:
            stream.disconnect()
    return WrittenOverlay(path, episode.n_frames, track.fps, notes)


def flush(stream: Any, timeout_s: float) -> None:
    """Wait until all of a stream is where it goes, so many seconds at most.

    Raises:
        RuntimeError: it could not be written or sent.
    """
    try:
        stream.flush(timeout_sec=timeout_s)
    except TypeError:  # an older Rerun, which tells no error either, but prints it
        stream.flush()


def new_stream(rr: Any, episode: Episode) -> Any:
    """Return a Rerun stream for one episode, called as the episode is; nothing is sent anywhere yet."""
    name = store_name(episode.path)
    created = episode.attributes.get("created", "")
    stream = rr.RecordingStream(APPLICATION, recording_id=f"{name} {created}".strip())
    stream.send_recording_name(name)
    return stream


class EpisodeTrack:
    """Writes an episode to a Rerun stream: once, or piece by piece while it is recorded.

    Args:
        stream: a `rerun.RecordingStream`.
        episode: from `open_episode`, with a frame at least.
        settings: which maps to show, and how.
        root: names of the entity below which everything goes.
        cameras_of: entities whose picture lies below a camera's heatmap while its video is not whole yet:
            this and the camera's short name; none by default.

    Attributes:
        fps: frames per second of the timeline `time` where the store does not say when a frame was.

    Raises:
        SelectionError: a camera that the episode does not have.
    """

    def __init__(
        self,
        stream: Any,
        episode: Episode,
        settings: RerunSettings,
        root: Sequence[str] = (),
        cameras_of: str | None = None,
    ):
        self._rr, self._stream, self._settings = rerun_sdk(), stream, settings
        self._root, self._cameras_of = tuple(root), cameras_of
        data, short = episode.arrays, episode.layout.short_names
        self._cameras = analysis.camera_names(data)
        if settings.camera not in (None, "all"):
            self._cameras = [analysis.camera_geometry(data, settings.camera)[0]]
        self._short = {name: one_line(short[name]) for name in short}
        videos = episode.attributes.get("videos", {})
        said = [video.get("fps") for video in videos.values() if isinstance(video, dict)]
        self.fps = float(settings.fps or next((fps for fps in said if fps), _DEFAULT_FPS))
        self._n_shown = 0
        self._heat: dict[str, list[NDArray[np.float32]]] = {name: [] for name in self._cameras}
        self._vmax = 0.0
        self._ends: set[float] = set()  # of the colour ranges that heatmaps were sent in
        self._inference = -1  # of the last frame that was written
        self._said: dict[str, Any] = {}

    # Door

    def add(self, episode: Episode, progress: Progress | None = None) -> None:
        """Write the frames that the episode has by now and had not before, without the cameras' pictures.

        Args:
            episode: the same episode, opened again.
            progress: called as `progress(done, total)`.

        Raises:
            SelectionError, StoreError: as `export_rerun`.
        """
        frames = np.arange(self._n_shown, episode.n_frames)
        if not len(frames):
            return
        data = episode.arrays
        where = where_of(episode, self._settings)
        pieces = []
        n_inferences = len(np.unique(data["frame_inference"].values[frames]))
        for piece in read_attention(episode, where, frames):
            pieces.append(piece)
            if progress is not None:
                progress(len(pieces), n_inferences + len(frames))
        array = xr.concat(pieces, "frame", combine_attrs="override").sel(frame=frames)
        maps = by_camera(data, array, self._cameras, normalisation=self._settings.normalisation)
        for name, heatmap in maps.items():
            self._heat[name].append(heatmap.values)
        self._vmax = self._range()
        if not self._said:
            self._lay_out(episode)
        self._about(episode, array.attrs)
        shares = by_modality(data, array)
        words = by_token(data, array) if token_groups(data)[0] else None
        names = [self._short.get(str(name), str(name)) for name in shares["modality"].values]
        rows = _Rows(self._seconds(episode))
        for name, heatmap in maps.items():
            rows.add(self._camera(name, "patches"), frames, [*heatmap.values], "tensor")
        self._heatmaps(episode, frames, rows)
        self._series(rows, "shares", names, frames, shares.values)
        if words is not None:
            self._words(rows, frames, words)
        self._actions(rows, episode, frames)
        self._send(rows)
        if progress is not None:
            progress(n_inferences + len(frames), n_inferences + len(frames))
        self._n_shown = episode.n_frames

    def finish(self, episode: Episode, progress: Progress | None = None) -> tuple[str, ...]:
        """Write what is left, the cameras' pictures among it, and colour all heatmaps by their one range.

        Returns:
            Why pictures are missing, a line for each camera.
        """
        self.add(episode, progress)
        if self._ends != {self._vmax}:
            rows = _Rows(self._seconds(episode))
            self._heatmaps(episode, np.arange(self._n_shown), rows)
            self._send(rows)
        notes = tuple(filter(None, (self._pictures(episode, name) for name in self._cameras)))
        self._about(episode, self._said["attrs"], notes)
        return notes

    # Pictures

    def _heatmaps(self, episode: Episode, frames: NDArray[Any], rows: _Rows) -> None:
        self._ends.add(self._vmax)
        scale = ColourScale(self._vmax, self._settings.colormap, self._settings.alpha)
        for name, pieces in self._heat.items():
            pieces[:] = [np.concatenate(pieces)]
            _, geometry, _ = analysis.camera_geometry(episode.arrays, name)
            pictures = []
            for heat in pieces[0][frames]:
                pixels = analysis.on_camera_pixels(heat, geometry, interpolation=self._settings.interpolation)
                pictures.append(_encoded(scale.rgba(pixels), "PNG", compress_level=1))
            rows.add(self._camera(name, "heatmap"), frames, pictures, "image/png")

    def _pictures(self, episode: Episode, name: str) -> str:
        """Write a camera's pictures; return why some of them are missing, or ""."""
        n_read, held = 0, _Rows(self._seconds(episode))
        path, short = self._camera(name, "image"), self._short[name]
        try:
            images = read_frames(
                episode.video(name), size_px=episode.image_size_px(name), numbers=range(self._n_shown)
            )
            for frame, image in enumerate(images):
                picture = _encoded(image, "JPEG", quality=int(self._settings.quality))
                held.add(path, [frame], [picture], "image/jpeg")
                n_read = frame + 1
                if n_read % _PICTURES == 0:
                    self._send(held)
        except StoreError as error:
            if n_read == 0:
                return f"{short}: no pictures: {first_line(error).removeprefix(f'{episode.path}: ')}"
            return f"{short}: its video has {n_read} of {self._n_shown} frames"
        finally:
            self._send(held)
        return ""

    def _range(self) -> float:
        return range_of(map(np.concatenate, self._heat.values()), self._settings)[1] if self._heat else 0.0

    # Numbers and words

    def _words(self, rows: _Rows, frames: NDArray[Any], shares: xr.DataArray) -> None:
        """Write the share of each word: as series, and as a table for each frame."""
        shares = shares.isel(token=np.isin(shares["kind"].values, (TASK, TEXT)))
        labels = [one_line(str(label)) for label in shares["label"].values]
        if not labels:
            return
        # A word may stand twice in a task.
        self._series(rows, "words", [f"{i} {label}" for i, label in enumerate(labels)], frames, shares.values)
        words = [label.translate(_NOT_MARKDOWN) for label in labels]
        tables = []
        for values in shares.values:
            largest = np.nanmax(np.nan_to_num(values))
            lines = ["| word | share of all attention |", "|---|---|"]
            for word, value in zip(words, values.tolist(), strict=True):
                share = "missing" if np.isnan(value) else f"{100 * value:.2f} %"
                lines.append(f"| **{word}** | **{share}** |" if value == largest else f"| {word} | {share} |")
            tables.append("\n".join(lines))
        rows.add(self._path("words", "table"), frames, tables, "text")

    def _actions(self, rows: _Rows, episode: Episode, frames: NDArray[Any]) -> None:
        """Write the robot's state, the action sent, and what the policy had predicted for it."""
        data = episode.arrays
        for name in ("state", "action"):
            if name in data:
                names = _dimension_names(data, f"{name}_dim")
                self._series(rows, name, names, frames, data[name].values[frames])
        inferences, queries = (data[name].values[frames] for name in ("frame_inference", "frame_query"))
        chunks = data["action_chunk"].values
        begins = np.flatnonzero(np.diff(inferences, prepend=self._inference))
        self._inference = int(inferences[-1])
        of_actions = [chunks[inference][action_queries(data)] for inference in inferences[begins]]
        rows.add(self._path("chunk"), frames[begins], of_actions, "tensor")
        is_token = queries >= 0
        predicted = chunks[inferences[is_token], queries[is_token]]
        self._series(rows, "predicted", _dimension_names(data, "action_dim"), frames[is_token], predicted)

    def _series(
        self, rows: _Rows, name: str, names: Sequence[str], frames: NDArray[Any], values: NDArray[Any]
    ) -> None:
        """Write lines over the frames, (frame, line), and what each is called."""
        if self._said.get(name) != names:
            self._said[name] = names
            self._stream.log(
                self._path(name), self._rr.SeriesLines(names=list(names)), static=True, strict=True
            )
        rows.add(self._path(name), frames, [*np.asarray(values, np.float64)], "numbers")

    def _seconds(self, episode: Episode) -> NDArray[np.float64]:
        """Return (frame,): when each frame was, seconds since the first."""
        seconds = np.arange(episode.n_frames) / self.fps
        if "frame_time" in episode.arrays:
            told = episode.arrays["frame_time"].values
            seconds = np.where(np.isfinite(told), told, seconds)
        return seconds

    # What the viewer shows

    def _about(self, episode: Episode, attrs: dict[str, Any], notes: Sequence[str] = ()) -> None:
        """Write what a reader of the maps has to know; again when there is more to know."""
        self._said["attrs"] = attrs
        facts = [*about(episode, attrs, self._settings, self._vmax, bool(self._cameras)), *notes]
        text = "\n\n".join(line.translate(_NOT_MARKDOWN) for line in facts)
        warning = f"# {RANDOM_WEIGHTS}\n\n" if episode.has_random_weights else ""
        self._stream.log(self._path("about"), self._document(warning + text), static=True, strict=True)

    def _lay_out(self, episode: Episode) -> None:
        """Send the blueprint."""
        import rerun.blueprint as rrb

        rr, random = self._rr, f" ({RANDOM_WEIGHTS})" if episode.has_random_weights else ""
        views = []
        for name in self._cameras:
            short = self._short[name]
            contents = ["$origin/image", "$origin/heatmap"]
            if self._cameras_of is not None:
                contents.insert(0, f"/{rr.escape_entity_path_part(self._cameras_of + short)}")
            origin = self._path("cameras", short)
            views.append(rrb.Spatial2DView(origin=origin, contents=contents, name=short + random))
        lines = {"action": "action sent", "predicted": "its row of the predicted chunk", "state": "state"}
        words = [
            rrb.TextDocumentView(origin=self._path("words", "table"), name="words"),
            rrb.TimeSeriesView(
                origin=self._path("words"), contents="$origin", name="words: share of all attention"
            ),
        ]
        right = [
            rrb.TimeSeriesView(origin=self._path("shares"), name="share of all attention"),
            *([rrb.Tabs(*words)] if token_groups(episode.arrays)[0] else []),
            rrb.Tabs(
                *(rrb.TimeSeriesView(origin=self._path(part), name=lines[part]) for part in lines),
                rrb.TensorView(origin=self._path("chunk"), name="predicted chunk (normalised)"),
            ),
        ]
        left = [*views, rrb.TextDocumentView(origin=self._path("about"), name="about")]
        panels = rrb.Horizontal(rrb.Vertical(*left), rrb.Vertical(*right))
        self._stream.send_blueprint(rrb.Blueprint(panels, auto_views=False))

    # Rerun

    def _path(self, *parts: str) -> str:
        path: str = self._rr.new_entity_path([*self._root, *parts])
        return f"/{path.removeprefix('/')}"

    def _camera(self, name: str, part: str) -> str:
        return self._path("cameras", self._short[name], part)

    def _document(self, text: str) -> Any:
        return self._rr.TextDocument(text, media_type="text/markdown")

    def _send(self, rows: _Rows) -> None:
        """Send what was gathered, and empty it. Not by `log`, which adds when it was called as timelines."""
        rr = self._rr

        def send(path: str, frames: Sequence[int], columns: Any) -> None:
            indexes = [
                rr.TimeColumn("frame", sequence=frames),
                rr.TimeColumn("time", duration=rows.seconds[list(frames)]),
            ]
            self._stream.send_columns(path, indexes=indexes, columns=columns, strict=True)

        for path, (kind, frames, values) in rows.of.items():
            if kind == "tensor":  # Rerun takes one at a time
                for frame, value in zip(frames, values, strict=True):
                    send(path, [frame], rr.Tensor.columns(data=rr.datatypes.TensorData(array=value)))
            elif kind == "numbers":
                columns = rr.Scalars.columns(scalars=np.concatenate(values))
                send(path, frames, columns.partition([len(row) for row in values]))
            elif kind == "text":
                types = ["text/markdown"] * len(values)
                send(path, frames, rr.TextDocument.columns(text=values, media_type=types))
            else:
                # Heatmaps lie over pictures.
                order = [1.0 if kind == "image/png" else -1.0] * len(values)
                types = [kind] * len(values)
                columns = rr.EncodedImage.columns(blob=values, media_type=types, draw_order=order)
                send(path, frames, columns)
        rows.of.clear()


class _Rows:
    """What is to be sent: entity → what its values are, frames, and a value for each of them."""

    def __init__(self, seconds: NDArray[np.float64]):
        self.seconds = seconds  # (frame,) of the episode
        self.of: dict[str, tuple[str, list[int], list[Any]]] = {}

    def add(self, path: str, frames: Iterable[Any], values: Sequence[Any], kind: str) -> None:
        _, held_frames, held_values = self.of.setdefault(path, (kind, [], []))
        held_frames += map(int, frames)
        held_values += values
        if not held_frames:
            del self.of[path]


def _dimension_names(data: xr.Dataset, dimension: str) -> list[str]:
    if dimension in data.coords:
        return [one_line(str(name)) for name in data[dimension].values]
    return [f"{dimension.removesuffix('_dim')} {i}" for i in range(data.sizes[dimension])]


def _encoded(image: NDArray[np.uint8], kind: str, **options: Any) -> bytes:
    """Return an image (height, width, 3 or 4) uint8 as a file's bytes."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()
