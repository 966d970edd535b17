"""Comparison of two episodes or two groups, as figure, tables and video in one folder.

    write_report([failed], [solved], "report")   # Python side of `lerobot-attn compare A B -o report`

The numbers are those of `analysis.compare`; the drawing is in `figures`, the video in `overlay`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lerobot_attn import analysis, figures
from lerobot_attn.analysis.cluster import Scheduler
from lerobot_attn.analysis.compare import Align, Aspect, compare_each, overall_table, patches_of
from lerobot_attn.analysis.renamed import warn_renamed
from lerobot_attn.analysis.select import Where, seen_frame
from lerobot_attn.analysis.sinks import keys_to_exclude
from lerobot_attn.analysis.spatial import NORMALISATIONS, ColourRange, Normalisation, colour_range
from lerobot_attn.errors import ConfigError, SelectionError
from lerobot_attn.figures.canvas import RANDOM_WEIGHTS, Caption, store_name
from lerobot_attn.figures.look import OneMapSettings
from lerobot_attn.layout import short_names
from lerobot_attn.overlay import OverlaySettings, overlay_frames
from lerobot_attn.plot import camera_pictures, on_image
from lerobot_attn.sizes import Progress
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.video import Frame, VideoWriter, count_frames

_STRIP = 5  # phases of an episode that are shown as images


@dataclass(frozen=True, kw_only=True)
class CompareSettings(OneMapSettings):
    """Settings of `lerobot-attn compare`; labels as `analysis.Where` takes them, or as text."""

    normalisation: Normalisation = "image"
    # phase (fraction of the episode) or frame: what is put side by side.
    align: Align = "phase"
    # Parts of an episode, with align=phase.
    n_phases: int = 20
    # Confidence of the intervals over episodes.
    confidence: float = 0.95
    # Width of the figure, inches.
    width: float = 7.0
    # Dots per inch of the figure.
    dpi: int = 200
    # Write the video of two episodes side by side.
    video: bool = True

    _ranges: ClassVar[dict[str, tuple[float, float]]] = {"width": (2, 30), "dpi": (30, 1200)}
    _words: ClassVar[dict[str, tuple[str, ...]]] = {"align": ("phase", "frame")}


class Comparison(NamedTuple):
    """What `analysis` found of two sides."""

    shares: xr.Dataset
    effective_patches: xr.Dataset  # (phase or frame, camera): how many patches the attention is spread over
    overall: pd.DataFrame  # modalities, then tokens: kind, name, a, b, difference, low, high, n_a, n_b
    heatmap: xr.Dataset | None  # (grid_y, grid_x) of the camera: a, b, difference, …; None: see `notes`
    notes: tuple[str, ...] = ()  # what could not be compared, and why

    @property
    def sharpness(self) -> xr.Dataset:
        """The former name of `effective_patches`; deprecated."""
        warn_renamed("sharpness", "effective_patches")
        return self.effective_patches


def compare_groups(
    a: Sequence[Episode],
    b: Sequence[Episode],
    settings: CompareSettings | None = None,
    progress: Progress | None = None,
    scheduler: Scheduler = None,
) -> Comparison:
    """Compare shares, effective patches and words of two groups of episodes; of one each, without intervals.

    Args:
        a: an episode or more.
        b: likewise.
        settings: what to look at.
        progress: called as `progress(done, total)`, episodes read.
        scheduler: what reads the episodes, as for `analysis.compare`.

    Raises:
        SelectionError: an empty side, or a layer, camera, … that an episode does not hold.
    """
    settings = _without_sinks(a, b, settings or CompareSettings())
    axis, n_phases = settings.align, settings.n_phases
    aspects = {
        "shares": Aspect("modality_share", axis, n_phases),
        "entropy": Aspect("entropy", axis, n_phases),
        "overall shares": Aspect("modality_share", "whole"),
        "overall tokens": Aspect("token_attention", "whole"),
    }
    unlike = _unlike_cameras(a, b, settings)
    if not unlike:
        aspects["heatmap"] = Aspect("image_heatmap", "whole", camera=settings.camera)
    found = compare_each(
        a,
        b,
        aspects,
        confidence=settings.confidence,
        scheduler=scheduler,
        progress=progress,
        **settings.where,
    )
    effective_patches = found["entropy"].sel(quantity="effective_number")
    tables = [overall_table(found[name]) for name in ("overall shares", "overall tokens")]
    tables[0] = tables[0][tables[0]["name"] != "padding"].assign(kind=lambda t: t["name"])
    tables[0]["name"] = tables[0]["name"].map(short_names(tables[0]["name"]))
    overall = pd.concat(tables, ignore_index=True)
    overall.attrs["interval"] = tables[1].attrs["interval"]
    notes = (*unlike, *_lacking_videos(a, b, settings), *_short_videos(a, b))
    return Comparison(found["shares"], effective_patches, overall, found.get("heatmap"), notes)


def _unlike_cameras(a: Sequence[Episode], b: Sequence[Episode], settings: CompareSettings) -> tuple[str, ...]:
    """Say why patches of the camera cannot be compared, if so: they show other parts of its image."""
    episodes = [*a, *b]
    if analysis.same_geometry(episodes, settings.camera):
        return ()
    shown = patches_of(episodes, settings.camera)
    other = next(index for index, patches in enumerate(shown) if patches != shown[0])
    words = [f"{shown[i].camera} of {shown[i]} ({store_name(episodes[i].path)})" for i in (0, other)]
    return (f"patches are not compared, because the cameras differ: {' and '.join(words)}",)


def comparison_figure(
    a: Sequence[Episode],
    b: Sequence[Episode],
    settings: CompareSettings | None = None,
    progress: Progress | None = None,
    *,
    found: Comparison | None = None,
) -> Figure:
    """Draw two sides: images at five phases (of two episodes), shares, effective patches, and differences.

    Args:
        a: an episode or more.
        b: likewise.
        settings: what to look at, and how to draw it.
        progress: called as `progress(done, total)`, episodes read.
        found: of `compare_groups`, where it was computed already.

    Raises:
        SelectionError, StoreError: as `compare_groups`; an episode has no video of the camera.
    """
    settings = _without_sinks(a, b, settings or CompareSettings())
    found = found or compare_groups(a, b, settings, progress)
    strips, shown = [], ColourRange(1.0, False)
    if len(a) == len(b) == 1:
        sides = [_strip(name, episode, settings) for name, episode in (("A", a[0]), ("B", b[0]))]
        strips = [group for group, _ in sides]
        shown = colour_range(
            [heat for _, heat in sides],
            settings.normalisation,
            clip=settings.clip,
            episode_ends=[heat.attrs["vmax"] for _, heat in sides],
        )
    means: list[NDArray[np.float32]] = []
    unit = NORMALISATIONS[settings.normalisation]
    if not strips and found.heatmap is not None:
        _, geometry, _ = analysis.camera_geometry(a[0].arrays, settings.camera)
        kept = [found.heatmap[name].transpose("grid_y", "grid_x") for name in ("a", "b", "difference")]
        means = [analysis.on_camera_pixels(part, geometry) for part in kept]
        unit = NORMALISATIONS["share"]
    return figures.comparison_figure(
        found.shares,
        found.effective_patches,
        found.overall,
        ("A", "B"),
        _caption(a, b, settings, found),
        strips=strips,
        means=means,
        vmax=shown.vmax,
        unit=unit,
        clipped=shown.clipped,
        cmap=settings.colormap,
        alpha=settings.alpha,
        width_in=settings.width,
    )


def side_by_side(a: Episode, b: Episode, settings: CompareSettings | None = None) -> Iterator[Frame]:
    """Yield the overlays of two episodes side by side, (height, width, 3) uint8, each of its own range.

    By phase there are as many frames as the longer episode has, and the shorter one holds its frames; by
    frame the shorter one stays at its last. Where a camera's video is shorter than its store, its last frame
    is held.

    Raises:
        SelectionError, StoreError: as `overlay_frames`.
    """
    settings = _without_sinks([a], [b], settings or CompareSettings())
    n = max(a.n_frames, b.n_frames)
    views = []
    for episode in (a, b):
        wanted: NDArray[np.intp] = np.arange(n)
        if settings.align == "phase" and n > 1:
            wanted = np.round(wanted * (episode.n_frames - 1) / (n - 1)).astype(int)
        views.append(
            _held(overlay_frames(episode, _overlay(settings)), np.minimum(wanted, episode.n_frames - 1))
        )
    for left, right in zip(*views, strict=True):
        height = max(left.shape[0], right.shape[0])
        yield np.concatenate([_to_height(left, height), _to_height(right, height)], axis=1)


def write_report(
    a: Sequence[Episode],
    b: Sequence[Episode],
    folder: str | Path,
    settings: CompareSettings | None = None,
    progress: Progress | None = None,
    scheduler: Scheduler = None,
) -> list[Path]:
    """Write a comparison: `comparison.png`, tables, `report.md`, and for two episodes `comparison.mp4`.

    Args:
        a: an episode or more.
        b: likewise.
        folder: where to; it is made.
        settings: what to look at, and how to draw it.
        progress: called as `progress(done, total)`.
        scheduler: what reads the episodes for the numbers, as for `analysis.compare`.

    Returns:
        The files.

    Raises:
        SelectionError, StoreError: as `comparison_figure`.
        ConfigError: the folder cannot be written.
    """
    folder = Path(folder)
    if not a or not b:
        raise SelectionError(
            f"nothing to compare: A has {len(a)} episodes, B has {len(b)}; expected one at least"
        )
    settings = _without_sinks(a, b, settings or CompareSettings())
    video = settings.video and len(a) == len(b) == 1 and not _lacking_videos(a, b, settings)
    n_video = max(a[0].n_frames, b[0].n_frames) if video else 0
    n_read = len(a) + len(b)

    def reading(done: int, _: int) -> None:
        if progress is not None:
            progress(done, n_read + n_video)

    found = compare_groups(a, b, settings, reading, scheduler)
    figure = comparison_figure(a, b, settings, found=found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [figures.save_figure(figure, folder / "comparison.png", dpi=settings.dpi)]
        files.append(folder / "overall.csv")
        found.overall.to_csv(files[-1], index=False)
        files.append(folder / "shares.csv")
        found.shares.to_dataframe().reset_index().to_csv(files[-1], index=False)
        files.append(folder / "effective_patches.csv")
        found.effective_patches.to_dataframe().reset_index().to_csv(files[-1], index=False)
        if video:
            files.append(folder / "comparison.mp4")
            _write_video(a[0], b[0], files[-1], settings, progress, n_read)
        files.append(folder / "report.md")
        files[-1].write_text(_markdown(a, b, settings, found, video=video), encoding="utf-8")
    except OSError as error:
        if error.strerror is None:
            raise
        raise ConfigError(f"{folder}: cannot write the report: {error.strerror}") from error
    return files


def _without_sinks(a: Sequence[Episode], b: Sequence[Episode], settings: CompareSettings) -> CompareSettings:
    """Find the sinks that are to be left out, over both sides."""
    return replace(settings, exclude=keys_to_exclude(settings.exclude, (*a, *b)))


def _strip_frames(episode: Episode) -> list[int]:
    """Return frames at five phases: those that the policy saw, unless its inferences are too few for that."""
    frames = sorted({round(phase * (episode.n_frames - 1)) for phase in np.linspace(0, 1, _STRIP)})
    seen = sorted({seen_frame(episode.arrays, frame) for frame in frames})
    return seen if len(seen) == len(frames) else frames


def _strip(name: str, episode: Episode, settings: CompareSettings) -> tuple[figures.Group, xr.DataArray]:
    """Return one side's heatmaps over its images at five phases, and the same on the patches."""
    data = episode.arrays
    camera, geometry, _ = analysis.camera_geometry(data, settings.camera)
    where: Where = {**settings.where, "frame": (frames := _strip_frames(episode))}
    heat = analysis.image_heatmap(
        data, camera, normalisation=settings.normalisation, clip=settings.clip, **where
    )
    panels = []
    images = camera_pictures(episode, camera, frames).images
    for index, (frame, image) in enumerate(zip(frames, images, strict=True)):
        pixels = on_image(heat[index], geometry, image, settings)
        panels.append(figures.Panel(pixels, f"{name}, frame {frame}", image))
    label = f"{name}: {episode.layout.short_names[camera]}"
    assert panels[0].image is not None
    return figures.Group(label, panels[0].image, panels), heat


def _overlay(settings: CompareSettings) -> OverlaySettings:
    names = (
        *("camera", "layer", "denoise_step", "head", "query", "exclude", "clip", "colormap", "alpha"),
        *("interpolation", "normalisation"),
    )
    return OverlaySettings(**{name: getattr(settings, name) for name in names})


def _held(frames: Iterator[Frame], wanted: NDArray[np.intp]) -> Iterator[Frame]:
    """Yield frames by ascending number, each as often as wanted; the last one stands for those after."""
    position, shown = -1, None
    for number in wanted.tolist():
        while position < number:
            shown = next(frames, shown)
            position += 1
        if shown is not None:
            yield shown


def _to_height(frame: Frame, height: int) -> Frame:
    return np.pad(frame, ((0, height - frame.shape[0]), (0, 0), (0, 0)))


def _write_video(
    a: Episode, b: Episode, path: Path, settings: CompareSettings, progress: Progress | None, done: int
) -> None:
    video: dict[str, Any] = next(iter(a.attributes.get("videos", {}).values()), {})
    fps = settings.fps or float(video.get("fps", 20))
    total = done + max(a.n_frames, b.n_frames)
    temporary = path.with_name(f".{path.stem}.new.mp4")
    writer: VideoWriter | None = None
    try:
        for frame in side_by_side(a, b, settings):
            height, width, _ = frame.shape
            writer = writer or VideoWriter(temporary, fps=fps, size_px=(height, width))
            writer.write(frame)
            done += 1
            if progress is not None:
                progress(done, total)
        if writer is not None:
            writer.close()
            temporary.replace(path)
    finally:
        if writer is not None:
            writer.close()
        temporary.unlink(missing_ok=True)


def _caption(
    a: Sequence[Episode], b: Sequence[Episode], settings: CompareSettings, found: Comparison
) -> Caption:
    chosen = found.shares.attrs
    facts = [f"A: {_side(a)}", f"B: {_side(b)}"]
    facts += [str(chosen.get(name, "")) for name in ("layer", "denoise_step", "head", "query", "left_out")]
    camera, *_ = analysis.camera_geometry(a[0].arrays, settings.camera)
    facts += [f"camera {a[0].layout.short_names[camera]}"]
    facts += [f"aligned by {settings.align}", f"intervals: {found.overall.attrs['interval']}"]
    facts += [_only(found.overall, "a", "A"), _only(found.overall, "b", "B"), *found.notes]
    return Caption(
        facts, RANDOM_WEIGHTS if any(e.has_random_weights for e in (*a, *b)) else "", _remarks(a, b)
    )


def _remarks(a: Sequence[Episode], b: Sequence[Episode]) -> list[str]:
    """Return what is to be said of the policies, each remark once."""
    return list(dict.fromkeys(e.policy_remark for e in (*a, *b) if e.policy_remark))


def _only(overall: pd.DataFrame, side: str, name: str) -> str:
    """Say which words only one side has."""
    other = {"a": "b", "b": "a"}[side]
    missing = overall[np.isfinite(overall[side]) & ~np.isfinite(overall[other])]
    return f"only in {name}: {', '.join(missing['name'])}" if len(missing) else ""


def _side(episodes: Sequence[Episode]) -> str:
    """Say which episodes these are."""
    conditions = sorted({episode.condition.text or "none" for episode in episodes})
    done = "" if conditions == ["none"] else f"; condition: {' | '.join(conditions)}"
    outcomes = [episode.success for episode in episodes]
    solved = f"{outcomes.count(True)} of {len(episodes)} solved"
    if len(episodes) == 1:
        solved = {True: "success", False: "failure", None: "outcome not recorded"}[outcomes[0]]
        return f"{store_name(episodes[0].path)} ({solved}): {episodes[0].task}{done}"
    tasks = sorted({episode.task for episode in episodes})
    task = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
    return f"{len(episodes)} episodes ({solved}): {task}{done}"


def _markdown(
    a: Sequence[Episode], b: Sequence[Episode], settings: CompareSettings, found: Comparison, *, video: bool
) -> str:
    """Write the report's text."""
    lines = ["# Attention compared", "", f"- A: {_side(a)}", f"- B: {_side(b)}"]
    lines += [
        f"- settings: `{json.dumps(asdict(settings))}`",
        f"- intervals: {found.overall.attrs['interval']}",
        *(f"- {note}" for note in found.notes),
    ]
    if any(episode.has_random_weights for episode in (*a, *b)):
        lines.append(f"- **{RANDOM_WEIGHTS}**")
    lines += [f"- {remark}" for remark in _remarks(a, b)]
    lines += ["", "![comparison](comparison.png)", ""]
    if video:
        lines += ["Side by side: [comparison.mp4](comparison.mp4)", ""]
    lines += ["| what | A, % | B, % | B - A | interval | episodes |", "|---|---|---|---|---|---|"]
    for row in found.overall.to_dict("records"):
        interval = "" if np.isnan(row["low"]) else f"{100 * row['low']:.2f} to {100 * row['high']:.2f}"
        cells = [_percent(row[name]) for name in ("a", "b", "difference")]
        what = row["name"] if row["measure"] == "modality_share" else f"{row['kind']}: {row['name']}"
        lines.append(f"| {what} | {' | '.join(cells)} | {interval} | {row['n_a']}, {row['n_b']} |")
    lines += ["", "Shares of all attention, means over whole episodes. More in the CSV files.", ""]
    return "\n".join(lines)


def _lacking_videos(a: Sequence[Episode], b: Sequence[Episode], settings: CompareSettings) -> list[str]:
    """Say which of two episodes has no video of the camera, and why; of groups no video is shown."""
    lacking = []
    for episode in (*a, *b) if len(a) == len(b) == 1 else ():
        camera, *_ = analysis.camera_geometry(episode.arrays, settings.camera)
        if camera not in episode.videos:
            lacking.append(f"{store_name(episode.path)}: {episode.why_no_video(camera)}")
    return lacking


def _short_videos(a: Sequence[Episode], b: Sequence[Episode]) -> Iterator[str]:
    """Say which of two episodes' videos end before their stores do."""
    for episode in (*a, *b) if len(a) == len(b) == 1 else ():
        n_shown = min((count_frames(path) for path in episode.videos.values()), default=episode.n_frames)
        if n_shown < episode.n_frames:
            yield (
                f"{store_name(episode.path)}: its video has {n_shown} of the store's {episode.n_frames} "
                "frames; its last one is held"
            )


def _percent(value: float) -> str:
    return "" if np.isnan(value) else f"{100 * value:.2f}"
