"""Whether an episode's maps, frames and videos belong together: the checks that a sceptic wants.

    report = verify_episode(open_episode("….zarr"))
    report.passed, report.to_dict()
    contact_sheet(open_episode("….zarr"))  # a figure, to check with one's own eyes

Reads nothing but the store and the videos beside it; what is missing is skipped, what is damaged fails.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lerobot_attn import analysis
from lerobot_attn.analysis.select import MEANS, RAW, Where, executed_queries
from lerobot_attn.errors import ConfigError, LerobotAttnError, StoreError, first_line
from lerobot_attn.figures.canvas import RANDOM_WEIGHTS, Caption, colorbar, new_figure, styled
from lerobot_attn.figures.scale import colormap as check_colormap
from lerobot_attn.inspection import sampled_inferences
from lerobot_attn.layout import Kind
from lerobot_attn.overlay import ColourScale, resized
from lerobot_attn.settings import check_one_map, check_ranges, parse_choice
from lerobot_attn.sizes import Progress
from lerobot_attn.store.chunks import stored_arrays
from lerobot_attn.store.damage import (
    Damage,
    find_damage,
    is_missing,
    missing_chunks,
    was_cut,
)
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.video import Frame, count_frames, read_frames

_SHIFTS = (-2, -1, 0, 1, 2)
# Two encodings of one image differ by 1 to 3 of 255; another camera, or a turned one, by 20 to 80.
_SAME_IMAGE = 8.0
# A shift must fit worse than none by this much, of 255 and of the difference itself, to be told from noise.
_CLEARLY = (0.01, 0.005)
_STRIDE = 2  # every other row and column of pixels is compared


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed (None: skipped), and what was found, in one line."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_episode` found.

    Attributes:
        path: the store.
        checks: in the order in which they were made.
        random_weights: whether the policy was a demo whose maps mean nothing.
        damaged: everything that cannot be read as it was written, which the check "chunks" sums up.
    """

    path: Path
    checks: tuple[Check, ...]
    random_weights: bool
    damaged: tuple[Damage, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "path": str(self.path),
            "passed": self.passed,
            "random_weights": self.random_weights,
            "checks": [asdict(check) for check in self.checks],
            "damaged": [damage.to_dict() for damage in self.damaged],
        }

    def render(self, console: Console) -> None:
        """Print the checks as a table, and the verdict."""
        words = {True: "[green]passed[/green]", False: "[bold red]FAILED[/bold red]", None: "skipped"}
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("check", no_wrap=True)
        table.add_column("result", no_wrap=True)
        table.add_column("found", overflow="fold")
        for check in self.checks:
            table.add_row(check.name, words[check.passed], escape(check.detail))
        console.print(table)
        for damage in self.damaged:
            console.print(Text(f"damaged: {damage}", style="red"))
        counts = [sum(check.passed is value for check in self.checks) for value in (True, False, None)]
        text = f"{self.path}: {counts[0]} checks passed, {counts[1]} failed, {counts[2]} skipped"
        console.print(Text(text, style="green" if self.passed else "bold red"))
        if self.random_weights:
            console.print(Text(RANDOM_WEIGHTS, style="yellow"))


@dataclass(frozen=True)
class VerifySettings:
    """Settings of `lerobot-attn verify`."""

    # Check the rows of every inference; of the first, the middle and the last one otherwise.
    thorough: bool = False
    # Of the contact sheet: the layer, a number (negative from the last) or 'mean'.
    layer: int | Literal["mean"] = -1
    # The denoise step, likewise; the last one yields the action.
    denoise_step: int | Literal["mean"] = -1
    # A matplotlib colour map.
    colormap: str = "inferno"
    # Opacity of the largest value, 0 to 1.
    alpha: float = 0.6
    # Width, inches.
    width: float = 7.0
    # Dots per inch of PNG files.
    dpi: int = 150

    def __post_init__(self) -> None:
        """Read choices given as text, and check what can be checked without an episode.

        Raises:
            ConfigError: a value is out of range or of the wrong type.
        """
        for name in ("layer", "denoise_step"):
            value = parse_choice(getattr(self, name))
            object.__setattr__(self, name, value)
            check_one_map(name, value, ("mean",))
        if not isinstance(self.thorough, bool):
            raise ConfigError(f"thorough: got {self.thorough!r}, expected true or false")
        check_ranges(self, {"alpha": (0, 1), "width": (2, 30), "dpi": (30, 1200)})
        check_colormap(self.colormap)


def verify_episode(
    episode: Episode, *, thorough: bool = False, progress: Progress | None = None
) -> VerifyReport:
    """Check that an episode's maps, tables, layout and videos belong together.

    Args:
        episode: from `open_episode`.
        thorough: check the rows of every inference; of the first, the middle and the last one otherwise.
        progress: called as `progress(done, total)` with chunks read, inferences checked and video frames
            compared.

    Returns:
        A report; whatever is damaged is a failed check in it rather than an exception.
    """
    inferences = list(range(episode.n_inferences)) if thorough else (sampled_inferences(episode.n_inferences))
    damaged: list[Damage] = []
    ticks = _Ticks(_n_chunks(episode) + len(inferences) + episode.n_frames, progress)
    steps: list[tuple[str, Callable[[], list[Check]]]] = [
        ("complete", lambda: [_complete(episode)]),
        ("chunks", lambda: [_chunks(episode, damaged, ticks)]),
        ("frame counts", lambda: _frame_counts(episode)),
        ("frame table", lambda: [_frame_table(episode)]),
        ("layout", lambda: [_layout(episode)]),
        ("row sums, masked keys", lambda: _rows(episode, inferences, ticks)),
        ("evaluation's view, timing", lambda: _against_eval_video(episode, ticks)),
    ]
    checks: list[Check] = []
    for name, step in steps:
        try:
            checks += step()
        except Exception as error:  # damaged arrays raise whatever their codec raises
            checks.append(Check(name, False, f"cannot be checked: {first_line(error)}"))
    ticks.finish()
    return VerifyReport(episode.path, tuple(checks), episode.has_random_weights, tuple(damaged))


@styled
def contact_sheet(episode: Episode, settings: VerifySettings | None = None) -> Figure:
    """Draw the first, the middle and the last inference, a row for each camera.

    From left to right: what the policy was shown, the evaluation MP4's frame of the same number, and the
    policy's view with the heatmap of the action executed at that frame, relative to its largest patch. Where
    a video is missing or too short, or the map is missing, the panel says so.

    Args:
        episode: from `open_episode`.
        settings: whose maps, and how to draw them.

    Raises:
        StoreError: the episode is empty or damaged.
        SelectionError: no such layer or step.
    """
    if episode.n_frames == 0:
        raise StoreError(f"{episode.path}: holds no frames yet; expected one at least")
    settings = settings or VerifySettings()
    width_in, colormap = settings.width, settings.colormap
    data = episode.arrays
    inferences = sampled_inferences(episode.n_inferences)
    frames = [min(int(data["inference_frame"].values[i]), episode.n_frames - 1) for i in inferences]
    where: Where = {"frame": frames, "layer": settings.layer, "denoise_step": settings.denoise_step}
    cameras = analysis.camera_names(data)
    try:
        array = analysis.attention(data, **where).load()
        # Where it lies is the question here, not how much.
        heats = [*analysis.by_camera(data, array, cameras, normalisation="frame").values()]
    except LerobotAttnError:
        raise
    except Exception as error:
        raise StoreError(
            f"{episode.path}: the attention of inferences {inferences} cannot be read: {first_line(error)}"
        ) from error
    views = {
        camera: _some_frames(episode.videos.get(camera), frames, episode.image_size_px(camera))
        for camera in cameras
    }
    filmed = _some_frames(episode.eval_video, frames)
    scale = ColourScale(1.0, colormap, settings.alpha)
    geometries = [analysis.camera_geometry(data, camera)[1] for camera in cameras]
    panel_in = (width_in - 0.7) / 3
    heights = [panel_in * g.height_px / g.width_px + 0.2 for _ in frames for g in geometries]
    attrs, short = heats[0].attrs, episode.layout.short_names
    facts = [
        f"{episode.path.parent.name}/{episode.path.stem}{'' if episode.is_complete else ', incomplete'}",
        *(attrs[name] for name in ("layer", "denoise_step", "head", "query")),
        attrs["units"],
        "from stored means" if attrs["source"] == MEANS else "",
    ]
    caption = Caption(facts, RANDOM_WEIGHTS if episode.has_random_weights else "")
    figure = new_figure(width_in, sum(heights) + 0.05, caption)
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    all_axes = []
    for row, (number, index) in enumerate(np.ndindex(len(frames), len(cameras))):
        camera, frame = cameras[index], frames[number]
        view, film = views[camera][number], filmed[number]
        over, without = None, "no camera video"
        heat = heats[index][number]
        if heat.isnull().all():  # a repair dropped it; the bare image would look like no attention at all
            without = "the map is missing"
        elif view is not None:
            height, width, _ = view.shape
            over = scale.over(
                view, analysis.on_camera_pixels(heat, geometries[index], size_px=(height, width))
            )
        panels = (
            (f"inference {inferences[number]}, frame {frame}: {short[camera]}", view, "no camera video"),
            (f"evaluation's MP4, frame {frame}", film, "no evaluation MP4"),
            (f"{short[camera]} with attention, frame {frame}", over, without),
        )
        for column, (title, image, missing) in enumerate(panels):
            axes = figure.add_subplot(grid[row, column])
            axes.set_title(title, pad=2)
            axes.set_xticks([])
            axes.set_yticks([])
            if image is None:
                axes.set_facecolor("#EEEEEE")
                axes.text(0.5, 0.5, f"{missing}\nof this frame", ha="center", va="center")
                axes.set_box_aspect(geometries[index].height_px / geometries[index].width_px)
            else:
                axes.imshow(image, interpolation="nearest")
            all_axes.append(axes)
    colorbar(figure, all_axes, colormap, 0, 1, attrs["units"], aspect=40, shrink=min(1, 3 / sum(heights)))
    return figure


class _Ticks:
    """Counts what is done of everything, for the progress callback."""

    def __init__(self, total: int, progress: Progress | None):
        self._total, self._progress, self._done = total, progress, 0

    def tick(self, n: int = 1) -> None:
        self._done += n
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)

    def finish(self) -> None:
        if self._progress is not None:
            self._progress(self._total, self._total)


def _complete(episode: Episode) -> Check:
    found = f"{episode.n_frames} frames, {episode.n_inferences} inferences"
    if episode.is_complete:
        return Check("complete", True, found)
    cause = (
        episode.attributes.get("error")
        or episode.attributes.get("interrupted_by")
        or ("cut by a repair" if was_cut(episode) else "the recording did not come to its end")
    )
    return Check("complete", False, f"incomplete ({cause}): it holds {found}")


def _chunks(episode: Episode, damaged: list[Damage], ticks: _Ticks) -> Check:
    """Read every chunk of every array; what is damaged is put on the list."""
    done = 0

    def progress(n_read: int, _: int) -> None:
        nonlocal done
        ticks.tick(n_read - done)
        done = n_read

    report = find_damage(episode.path, progress)
    # Rows that contradict one another are the frame table's.
    damaged += [*report.damaged, *(damage for damage in report.inconsistent if damage.kind != "rows")]
    notes = []
    if report.n_missing:
        notes.append(f"{report.n_missing} are missing since a repair")
    if report.leftovers:
        notes.append(f"{len(report.leftovers)} files of a killed recording or repair are left over")
    if report.without_checksums:
        notes.append(
            f"without checksums, so a changed byte may go unnoticed: {_some(report.without_checksums)}"
        )
    if damaged:
        notes.insert(0, f"damaged: {_some([str(damage) for damage in damaged], 1)}; see verify --repair")
    else:
        notes.insert(0, f"{report.n_chunks - report.n_missing} of {report.n_chunks} can be read")
    return Check("chunks", not damaged, "; ".join(notes))


def _n_chunks(episode: Episode) -> int:
    try:
        return sum(array.n_chunks for array in stored_arrays(episode).values())
    except StoreError:
        return 0


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _frame_counts(episode: Episode) -> list[Check]:
    cameras = [camera.name for camera in episode.layout.cameras if not camera.is_empty]
    checks = []
    for camera in cameras:
        name = f"frames of {episode.layout.short_names[camera]}"
        if camera in episode.videos:
            checks.append(_frame_count(name, episode.videos[camera], episode))
        elif camera in episode.attributes.get("videos", {}):
            checks.append(Check(name, None, "its video is not beside the store"))
        else:
            checks.append(Check(name, None, "no video of it was recorded"))
    name = "frames of evaluation"
    if episode.eval_video is not None:
        checks.append(_frame_count(name, episode.eval_video, episode))
    else:
        checks.append(Check(name, None, _no_eval_video(episode)))
    return checks


def _frame_count(name: str, video: Path, episode: Episode) -> Check:
    try:
        found = count_frames(video)
    except StoreError as error:
        return Check(name, False, str(error))
    if found == episode.n_frames:
        return Check(name, True, f"{found}, as the store")
    if found > episode.n_frames and was_cut(episode):
        return Check(name, True, f"{found}, of which a repair left the store {episode.n_frames}")
    return Check(name, False, f"{video.name} has {found} frames, the store {episode.n_frames}")


def _frame_table(episode: Episode) -> Check:
    name, data = "frame table", episode.arrays
    inference, query = data["frame_inference"].values, data["frame_query"].values
    starts = data["inference_frame"].values
    n, executed = episode.n_inferences, executed_queries(data)
    if len(inference) == 0:
        return Check(name, None, "the store holds no frames")

    def broken(wrong: NDArray[np.bool_], rule: str) -> Check | None:
        if not wrong.any():
            return None
        frame = int(np.flatnonzero(wrong)[0])
        return Check(
            name,
            False,
            f"frame {frame}: inference {inference[frame]}, action token {query[frame]}, but {rule}; "
            f"so {int(wrong.sum())} of {len(wrong)} frames",
        )

    step = np.diff(inference, prepend=0)
    shift = starts[np.clip(inference, 0, max(n - 1, 0))] + query - executed.start - np.arange(len(inference))
    rules = [
        ((inference < 0) | (inference >= n), f"the store has inferences 0 to {n - 1}"),
        ((step < 0) | (step > 1), "inferences must follow one another, beginning with 0"),
        (
            (query < executed.start) | (query >= executed.stop),
            f"executed are tokens {executed.start} to {executed.stop - 1}",
        ),
        (shift != 0, "it is not as many frames after its inference as its token says"),
    ]
    for wrong, rule in rules:
        check = broken(wrong, rule)
        if check is not None:
            return check
    return Check(name, True, f"{len(inference)} frames follow from {n} inferences")


def _layout(episode: Episode) -> Check:
    data, layout, short = episode.arrays, episode.layout, episode.layout.short_names
    wrong = []
    images = [segment for segment in layout.segments if segment.kind == "image"]
    if len(images) != len(layout.cameras):
        wrong.append(f"{len(images)} image segments, {len(layout.cameras)} cameras")
    for camera, segment in zip(layout.cameras, images, strict=False):
        geometry = camera.geometry
        if geometry is None:
            continue
        if len(segment) != geometry.grid_rows * geometry.grid_columns:
            wrong.append(
                f"{short[camera.name]} has {len(segment)} keys, its grid "
                f"{geometry.grid_rows} x {geometry.grid_columns}"
            )
        if (
            geometry.pad_top_px + geometry.resized_height_px > geometry.input_height_px
            or geometry.pad_left_px + geometry.resized_width_px > geometry.input_width_px
        ):
            wrong.append(f"{short[camera.name]}'s image reaches beyond the policy's input")
        video = episode.attributes.get("videos", {}).get(camera.name)
        if isinstance(video, dict):
            size = (video.get("height_px"), video.get("width_px"))
            if size != (geometry.height_px, geometry.width_px):
                image = (geometry.height_px, geometry.width_px)
                wrong.append(f"{short[camera.name]}'s video is {size}, its image {image}")
    rows, columns = layout.key_patch()
    for name, expected in (
        ("key_camera", layout.key_camera()),
        ("key_row", rows),
        ("key_column", columns),
    ):
        if not np.array_equal(data[name].values, expected):
            wrong.append(f"{name} does not match the cameras' grids")
    for name in (RAW, MEANS):
        if name in data and data.sizes["key"] != layout.n_keys:
            wrong.append(f"{name} has {data.sizes['key']} keys, the layout {layout.n_keys}")
    executed = executed_queries(data)
    if not layout.first_action_query <= executed.start < executed.stop <= layout.n_queries:
        wrong.append(f"executed tokens {executed.start} to {executed.stop - 1} of {layout.n_queries}")
    if wrong:
        return Check("layout", False, "; ".join(dict.fromkeys(wrong)))
    cameras = ", ".join(
        f"{short[c.name]} {c.geometry.grid_rows} x {c.geometry.grid_columns}"
        for c in layout.cameras
        if c.geometry is not None
    )
    return Check("layout", True, f"{layout.n_keys} keys; patches of {cameras or 'no camera'}")


def _rows(episode: Episode, inferences: Sequence[int], ticks: _Ticks) -> list[Check]:
    """Check that rows sum to 1 and masked keys have nothing, one map at a time."""
    data = episode.arrays
    names = [name for name in (RAW, MEANS) if name in data]
    if not names or not inferences:
        reason = f"the store holds no {'suffix attention' if inferences else 'inference'}"
        return [Check("row sums", None, reason), Check("masked keys", None, reason)]
    tolerance = episode.row_sum_tolerance()
    missing = missing_chunks(episode)
    worst, worst_at = -1.0, ""
    leak, leak_at = 0.0, ""
    n_rows = n_damaged = n_missing = 0
    for inference in inferences:
        masked = data["key_kind"].values[inference] == Kind.PADDING
        for found in _maps(episode, names, inference, missing):
            n_damaged += found.state == "damaged"
            n_missing += found.state == "missing"
            if found.values is None:
                continue
            sums = found.values.sum(axis=-1, dtype=np.float64)
            n_rows += sums.size
            # A row of NaN is as far from 1 as can be.
            deviation = float(np.nan_to_num(np.abs(sums - 1), nan=np.inf).max())
            if deviation > worst:
                worst, worst_at = deviation, found.place
            most = float(np.nan_to_num(np.abs(found.values[..., masked]), nan=np.inf).max(initial=0))
            if most > leak:
                leak, leak_at = most, found.place
        ticks.tick()
    left_out = [f"{n} {state}" for n, state in ((n_damaged, "damaged"), (n_missing, "missing")) if n]
    note = f"; maps left out: {', '.join(left_out)}" if left_out else ""
    if n_rows == 0:
        return [Check(name, None, f"no row was read{note}") for name in ("row sums", "masked keys")]
    which = "every inference" if len(inferences) == episode.n_inferences else f"inferences {list(inferences)}"
    sums_found = (
        f"largest deviation from 1 of {n_rows} rows of {which} is {worst:.1e}, allowed {tolerance:.1e}"
    )
    sums_fine = worst <= tolerance
    leak_found = "exactly 0" if leak == 0 else f"up to {leak:.1e} instead of 0: {leak_at}"
    return [
        Check("row sums", sums_fine, (sums_found if sums_fine else f"{sums_found}: {worst_at}") + note),
        Check("masked keys", leak == 0, leak_found + note),
    ]


class _Map(NamedTuple):
    """A map, or why there is none.

    Attributes:
        place: array and coordinates in words.
        state: "missing": a repair dropped it; "damaged": it cannot be read.
        values: (head, query, key), or (head, key) of means; float32.
    """

    place: str
    state: Literal["read", "missing", "damaged"]
    values: NDArray[np.float32] | None


def _maps(
    episode: Episode, names: Sequence[str], inference: int, missing: frozenset[tuple[str, tuple[int, ...]]]
) -> Iterator[_Map]:
    """Yield an inference's maps, one layer of one denoise step at a time."""
    data = episode.arrays
    for name in names:
        array = data[name].variable
        layers, steps = data[array.dims[2]].values, data["denoise_step"].values
        for step, layer in np.ndindex(len(steps), len(layers)):
            place = f"{name}, inference {inference}, denoise step {steps[step]}, layer {layers[layer]}"
            if is_missing(missing, name, (inference, step, layer)):
                yield _Map(place, "missing", None)
                continue
            try:
                values = array[inference, step, layer].values.astype(np.float32)
            except Exception:  # a damaged chunk, which the check of all chunks names
                yield _Map(place, "damaged", None)
            else:
                yield _Map(place, "read", values)


@dataclass
class _Match:
    """How a camera's frames fit the evaluation's: mean absolute differences of 255, by shift."""

    camera: str
    by_shift: dict[int, float]
    turned: float

    @property
    def best(self) -> float:
        return min(self.by_shift.values())


def _against_eval_video(episode: Episode, ticks: _Ticks) -> list[Check]:
    names = ("evaluation's view", "evaluation's timing")
    if episode.eval_video is None:
        return [Check(name, None, _no_eval_video(episode)) for name in names]
    if not episode.videos:
        return [Check(name, None, "no camera video to compare with") for name in names]
    matches = _matches(episode, ticks)
    if not matches:
        return [Check(name, None, "the videos hold no frames to compare") for name in names]
    best = min(matches, key=lambda match: match.best)
    turned = min(matches, key=lambda match: match.turned)
    short = episode.layout.short_names
    found = f"{short[best.camera]} differs by {best.best:.2f} of 255 a pixel"
    if best.best > _SAME_IMAGE:
        hint = "; an environment may film another view than the policy's"
        if turned.turned <= _SAME_IMAGE:
            hint = f"; {short[turned.camera]} turned by 180° differs by {turned.turned:.2f}"
        view = Check(names[0], False, f"no camera's view: {found}, expected at most {_SAME_IMAGE:g}{hint}")
        return [view, Check(names[1], None, "no camera shows what the evaluation filmed")]
    return [Check(names[0], True, found), _timing(names[1], best)]


def _timing(name: str, match: _Match) -> Check:
    same = match.by_shift.get(0)
    others = {shift: value for shift, value in match.by_shift.items() if shift}
    if same is None or not others:
        return Check(name, None, "too few frames to tell")
    shift = min(others, key=lambda key: others[key])
    margin = max(_CLEARLY[0], _CLEARLY[1] * same)
    found = ", ".join(f"{value:+d}: {match.by_shift[value]:.2f}" for value in sorted(match.by_shift))
    if same + margin < others[shift]:
        return Check(name, True, f"each frame fits its own number best ({found})")
    if others[shift] + margin < same:
        return Check(name, False, f"frame t fits the evaluation's frame t{shift:+d} better ({found})")
    return Check(name, None, f"the scene moves too little to tell ({found})")


def _matches(episode: Episode, ticks: _Ticks) -> list[_Match]:
    """Compare each camera's frames t with the evaluation's frames t-2 … t+2, for the same t all of them."""
    assert episode.eval_video is not None
    n_film = count_frames(episode.eval_video)
    matches = []
    for index, (camera, video) in enumerate(episode.videos.items()):
        n = min(count_frames(video), n_film)
        if n == 0:
            continue
        reach = min(2, (n - 1) // 2)
        shifts = [shift for shift in _SHIFTS if abs(shift) <= reach]
        totals, turned = dict.fromkeys(shifts, 0.0), 0.0
        # Frames t-2 … t+2 of the evaluation are held, and no more.
        window: deque[NDArray[np.int16]] = deque(maxlen=2 * reach + 1)
        views: deque[NDArray[np.int16]] = deque(maxlen=reach + 1)  # its first is of the window's middle
        pairs = zip(
            read_frames(video, size_px=episode.image_size_px(camera)),
            read_frames(episode.eval_video),
            strict=False,
        )
        for number, (view, film) in enumerate(pairs):
            if number >= n:
                break
            window.append(_fitted(film, view.shape[:2])[::_STRIDE, ::_STRIDE].astype(np.int16))
            views.append(view[::_STRIDE, ::_STRIDE].astype(np.int16))
            if index == 0:
                ticks.tick()
            if len(window) < 2 * reach + 1:
                continue
            middle = views[0]
            for shift in shifts:
                totals[shift] += float(np.abs(window[reach + shift] - middle).mean())
            turned += float(np.abs(window[reach][::-1, ::-1] - middle).mean())
        compared = n - 2 * reach
        means = {shift: total / compared for shift, total in totals.items()}
        matches.append(_Match(camera, means, turned / compared))
    return matches


def _fitted(film: Frame, size_px: tuple[int, ...]) -> Frame:
    height, width = size_px
    # Odd sizes are padded by one in the file; a frame of another size altogether is scaled.
    if 0 <= film.shape[0] - height <= 1 and 0 <= film.shape[1] - width <= 1:
        return film[:height, :width]
    return resized(film, (height, width))


def _some_frames(
    video: Path | None, frames: Sequence[int], size_px: tuple[int, int] | None = None
) -> list[Frame | None]:
    """Return frames of a video, None where it is missing, damaged or too short."""
    if video is None:
        return [None] * len(frames)
    found: dict[int, Frame] = {}
    numbers = sorted(set(frames))
    try:
        for number, image in zip(numbers, read_frames(video, size_px=size_px, numbers=numbers), strict=False):
            found[number] = image
    except StoreError:
        pass
    return [found.get(frame) for frame in frames]


def _no_eval_video(episode: Episode) -> str:
    if isinstance(episode.attributes.get("eval_video"), dict):
        return "the evaluation's MP4 is not in the run's folder; LeRobot renders 10 episodes a task"
    return "the evaluation wrote no MP4 of this episode"
