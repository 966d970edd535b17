"""The checks of an episode's maps and tables, and all checks in order. Draws nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.analysis.decoded import is_read
from lerobot_attn.analysis.select import MEANS, RAW, action_queries, executed_queries
from lerobot_attn.errors import Check, StoreError, first_line
from lerobot_attn.inspection import sampled_inferences
from lerobot_attn.layout import Kind
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
from lerobot_attn.store.schema import coordinates_of
from lerobot_attn.verify.activations import activations
from lerobot_attn.verify.findings import VerifyReport
from lerobot_attn.verify.masks import masks
from lerobot_attn.verify.ticks import Ticks
from lerobot_attn.verify.videos import against_eval_video, frame_counts
from lerobot_attn.verify.vision import vision_maps


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
    ticks = Ticks(_n_chunks(episode) + len(inferences) + episode.n_frames, progress)
    steps: list[tuple[str, Callable[[], list[Check]]]] = [
        ("complete", lambda: [_complete(episode)]),
        ("chunks", lambda: [_chunks(episode, damaged, ticks)]),
        ("frame counts", lambda: frame_counts(episode)),
        ("frame table", lambda: [_frame_table(episode)]),
        ("layout", lambda: [_layout(episode)]),
        ("row sums, masked keys", lambda: _rows(episode, inferences, ticks)),
        ("vision maps", lambda: vision_maps(episode, inferences)),
        ("activations", lambda: activations(episode, inferences)),
        ("masks", lambda: masks(episode, inferences)),
        ("evaluation's view, timing", lambda: against_eval_video(episode, ticks)),
    ]
    checks: list[Check] = []
    for name, step in steps:
        try:
            checks += step()
        except Exception as error:  # damaged arrays raise whatever their codec raises
            checks.append(Check.of(name, False, f"cannot be checked: {first_line(error)}"))
    ticks.finish()
    return VerifyReport(
        episode.path,
        tuple(checks),
        episode.has_random_weights,
        tuple(damaged),
        episode.policy_remark,
        episode.condition.text,
    )


def _complete(episode: Episode) -> Check:
    found = f"{episode.n_frames} frames, {episode.n_inferences} inferences"
    if episode.is_complete:
        return Check.of("complete", True, found)
    cause = (
        episode.attributes.get("error")
        or episode.attributes.get("interrupted_by")
        or ("cut by a repair" if was_cut(episode) else "the recording did not come to its end")
    )
    return Check.of("complete", False, f"incomplete ({cause}): it holds {found}")


def _chunks(episode: Episode, damaged: list[Damage], ticks: Ticks) -> Check:
    """Read every chunk of every array; what is damaged is put on the list."""
    done = 0

    def progress(n_read: int, _: int) -> None:
        nonlocal done
        ticks.tick(n_read - done)
        done = n_read

    report = find_damage(episode.path, progress)
    damaged += report.damaged
    notes = []
    if report.n_missing:
        notes.append(f"{report.n_missing} are missing since a repair")
    if report.without_checksums:
        notes.append(
            f"without checksums, so a changed byte may go unnoticed: {_some(report.without_checksums)}"
        )
    if damaged:
        notes.insert(0, f"damaged: {_some([str(damage) for damage in damaged], 1)}; see verify --repair")
    else:
        notes.insert(0, f"{report.n_chunks - report.n_missing} of {report.n_chunks} can be read")
    return Check.of("chunks", not damaged, "; ".join(notes))


def _n_chunks(episode: Episode) -> int:
    try:
        return sum(array.n_chunks for array in stored_arrays(episode).values())
    except StoreError:
        return 0


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _frame_table(episode: Episode) -> Check:
    # As they are stored: the dataset refuses numbers that mean nothing, which are what is looked for here.
    name, tables = "frame table", stored_arrays(episode)
    inference, query, starts = (
        np.asarray(tables[table].array[...])
        for table in ("frame_inference", "frame_query", "inference_frame")
    )
    n, executed = episode.n_inferences, executed_queries(episode.arrays)
    if len(inference) == 0:
        return Check.of(name, None, "the store holds no frames")

    def broken(wrong: NDArray[np.bool_], rule: str) -> Check | None:
        if not wrong.any():
            return None
        frame = int(np.flatnonzero(wrong)[0])
        return Check.of(
            name,
            False,
            f"frame {frame}: inference {inference[frame]}, action token {query[frame]}, but {rule}; "
            f"so {int(wrong.sum())} of {len(wrong)} frames",
        )

    # -1 says that the frame's action is no token of a chunk, so there is no place to check.
    has_token = query != -1
    step = np.diff(inference, prepend=0)
    before = np.asarray(tables["observed_before"].array[...]) if "observed_before" in tables else 0
    asked = (starts - before)[np.clip(inference, 0, max(n - 1, 0))]
    # How many frames later or earlier than its place in the chunk an action was executed.
    shift = np.arange(len(inference)) - (asked + query - executed.start)
    waits = "inference_delay" not in tables
    # A robot that moves on while the policy thinks may be sent any action of the chunk; a replay's frames may
    # be predicted by any.
    if not waits or "replay" in episode.attributes:
        executed = action_queries(episode.arrays)
    rules = [
        ((inference < 0) | (inference >= n), f"the store has inferences 0 to {n - 1}"),
        ((step < 0) | (waits & (step > 1)), "inferences must follow one another, beginning with 0"),
        (
            has_token & ((query < executed.start) | (query >= executed.stop)),
            f"executed are tokens {executed.start} to {executed.stop - 1}",
        ),
        (waits & has_token & (shift != 0), "it is not as many frames after its inference as its token says"),
    ]
    for wrong, rule in rules:
        check = broken(wrong, rule)
        if check is not None:
            return check
    without = int((~has_token).sum())
    note = f"; the action of {without} of them is no token of a chunk" if without else ""
    late = int((has_token & (shift != 0)).sum())
    if late:
        most = int(np.abs(shift[has_token]).max())
        note += f"; {late} actions were sent up to {most} frames off their place in the chunk"
    return Check.of(name, True, f"{len(inference)} frames follow from {n} inferences{note}")


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
        # Cells of a convolution are centred on its strides: half a cell may lie beyond the last one. But a
        # resized image that does not begin half a cell in was cut into patches: it ends with its input.
        is_resized = geometry.resized_height_px != geometry.height_px
        half = geometry.input_height_px / geometry.grid_rows / 2
        if is_resized and min(geometry.pad_top_px, geometry.pad_left_px) < int(half):
            half = 0
        axes = (
            (geometry.pad_top_px, geometry.resized_height_px, geometry.input_height_px),
            (geometry.pad_left_px, geometry.resized_width_px, geometry.input_width_px),
        )
        # What lies before the input was cut off, and then may lie behind it too.
        if any(pad >= 0 and pad + resized > whole + half for pad, resized, whole in axes):
            wrong.append(f"{short[camera.name]}'s image reaches beyond the policy's input")
        video = episode.attributes.get("videos", {}).get(camera.name)
        if isinstance(video, dict):
            size = (video.get("height_px"), video.get("width_px"))
            if size != (geometry.height_px, geometry.width_px):
                image = (geometry.height_px, geometry.width_px)
                wrong.append(f"{short[camera.name]}'s video is {size}, its image {image}")
    for name, expected in coordinates_of(layout).items():
        if not np.array_equal(data[name].values, expected):
            wrong.append(f"{name} does not match the layout")
    for name in (RAW, MEANS):
        if name in data and data.sizes["key"] != layout.n_keys:
            wrong.append(f"{name} has {data.sizes['key']} keys, the layout {layout.n_keys}")
    executed = executed_queries(data)
    if not layout.first_action_query <= executed.start < executed.stop <= layout.n_queries:
        wrong.append(f"executed tokens {executed.start} to {executed.stop - 1} of {layout.n_queries}")
    if wrong:
        return Check.of("layout", False, "; ".join(dict.fromkeys(wrong)))
    cameras = ", ".join(
        f"{short[c.name]} {c.geometry.grid_rows} x {c.geometry.grid_columns}"
        for c in layout.cameras
        if c.geometry is not None
    )
    return Check.of("layout", True, f"{layout.n_keys} keys; patches of {cameras or 'no camera'}")


def _rows(episode: Episode, inferences: Sequence[int], ticks: Ticks) -> list[Check]:
    """Check that rows sum to 1 and masked keys have nothing, one map at a time."""
    data = episode.arrays
    names = [name for name in (RAW, MEANS) if name in data]
    if not names or not inferences:
        reason = f"the store holds no {'suffix attention' if inferences else 'inference'}"
        return [Check.of("row sums", None, reason), Check.of("masked keys", None, reason)]
    tolerance = episode.row_sum_tolerance()
    missing = missing_chunks(episode)
    worst, worst_at = -1.0, ""
    leak, leak_at = 0.0, ""
    n_rows = n_damaged = n_missing = 0
    for inference in inferences:
        masked = data["key_kind"].values[inference] == Kind.PADDING
        read = is_read(data, inference)
        for found in _maps(episode, names, inference, missing):
            n_damaged += found.state == "damaged"
            n_missing += found.state == "missing"
            if found.values is None:
                continue
            values = found.values
            if values.ndim == 3 and not np.isnan(values[:, ~read]).all():
                worst, worst_at = np.inf, f"{found.place}: a token that was not read has a row"
            # Tokens that an autoregressive policy did not read have none, nor their mean if it read no token.
            values = values[:, read] if values.ndim == 3 else values[: None if read.any() else 0]
            sums = values.sum(axis=-1, dtype=np.float64)
            n_rows += sums.size
            # A row of NaN is as far from 1 as can be.
            deviation = float(np.nan_to_num(np.abs(sums - 1), nan=np.inf).max(initial=0))
            if deviation > worst:
                worst, worst_at = deviation, found.place
            on_masked = values[..., masked[: values.shape[-1]]]
            most = float(np.nan_to_num(np.abs(on_masked), nan=np.inf).max(initial=0))
            if most > leak:
                leak, leak_at = most, found.place
        ticks.tick()
    left_out = [f"{n} {state}" for n, state in ((n_damaged, "damaged"), (n_missing, "missing")) if n]
    note = f"; maps left out: {', '.join(left_out)}" if left_out else ""
    if n_rows == 0:
        return [Check.of(name, None, f"no row was read{note}") for name in ("row sums", "masked keys")]
    which = "every inference" if len(inferences) == episode.n_inferences else f"inferences {list(inferences)}"
    sums_found = (
        f"largest deviation from 1 of {n_rows} rows of {which} is {worst:.1e}, allowed {tolerance:.1e}"
    )
    sums_fine = worst <= tolerance
    leak_found = "exactly 0" if leak == 0 else f"up to {leak:.1e} instead of 0: {leak_at}"
    return [
        Check.of("row sums", sums_fine, (sums_found if sums_fine else f"{sums_found}: {worst_at}") + note),
        Check.of("masked keys", leak == 0, leak_found + note),
    ]


class _Map(NamedTuple):
    """A map, or why there is none.

    Attributes:
        place: array and coordinates in words.
        state: "missing": a repair dropped it; "damaged": it cannot be read.
        values: (head, query, key), or (head, key) of means, of the keys that the layer can see; float32.
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
        seen = f"{array.dims[2]}_sees_suffix"
        sees_suffix = data[seen].values if seen in data.coords else np.ones(len(layers), bool)
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
                if not sees_suffix[layer]:
                    # These keys do not exist for the layer. Where they hold numbers, no row can be believed.
                    values, beyond = np.split(values, [episode.layout.prefix_len], axis=-1)
                    if not np.isnan(beyond).all():
                        values = np.full_like(values, np.nan)
                yield _Map(place, "read", values)
