"""What saliency says, as one long table: rank correlations, areas of curves, each beside its chance level.

Reads no file and draws nothing. See `lerobot_attn.analysis.saliency` for what the numbers are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lerobot_attn.analysis.intervals import interval_of_mean, mean_of, prediction_interval
from lerobot_attn.analysis.saliency import (
    Correlation,
    Floats,
    Saliency,
    against_shifts,
    curve_areas,
    gain,
    shifted_correlations,
)

COLUMNS = (
    *("episode", "frame", "camera", "layer", "head", "metric", "value", "chance", "low", "high"),
    *("chance_low", "chance_high", "p", "n_frames"),
)
MEAN, ALL = "mean", "all"
WAYS = ("deletion", "insertion")
FEW_FRAMES = 10
CORRELATION = "rank_correlation"
LEARNED = "_learned"  # ends the name of what stands beside the same of shuffled weights


class Resampling(NamedTuple):
    """How intervals over frames are drawn."""

    confidence: float = 0.95
    n_resamples: int = 1000
    seed: int = 0


def correlations(found: Saliency, seed: int = 0) -> dict[str, tuple[Floats, Correlation]]:
    """Return of each camera each frame's rank correlations, (frame, map), and their mean against chance.

    The maps are in the order of `Saliency.map_names`.
    """
    result, episodes = {}, [frame.episode for frame in found.frames]
    for camera in found.patches.cameras:
        shifted = [
            shifted_correlations(
                found.patches.rectangle(frame.importance, camera),
                found.patches.rectangle(found.maps(frame), camera),
            )
            for frame in found.frames
        ]
        each = np.stack([of_frame[0] for of_frame in shifted])
        result[camera] = each, against_shifts(shifted, episodes, seed=seed)
    return result


def split_halves(found: Saliency) -> dict[str, Floats]:
    """Return of each camera how well two importances from half of the masks each agree, (frame,).

    Their rank correlation: near 0, the masks are too few to say which patches matter, and no map can then
    agree with the importance.
    """
    halves = {}
    for camera in found.patches.cameras:
        parts = [found.patches.rectangle(frame.halves, camera) for frame in found.frames]
        halves[camera] = np.array([shifted_correlations(one, other[None])[0, 0] for one, other in parts])
    return halves


def areas(found: Saliency) -> dict[str, Floats]:
    """Return the areas under each ranking's curves, (frame, 2) deletion and insertion, mean over draws."""
    return {
        name: np.stack(
            [
                curve_areas(frame.curves[name], frame.all_hidden, found.shares).mean(axis=0)
                for frame in found.frames
            ]
        )
        for name in found.frames[0].curves
    }


def saliency_table(found: Saliency, resampling: Resampling | None = None) -> pd.DataFrame:
    """Return all numbers of `Saliency` as a long table, a row each for every frame and for their mean.

    Columns: `frame` is "mean" in the rows of the mean over frames, which alone have `low` and `high` (the
    bootstrap interval over frames), `p` and `n_frames`. `camera` is "all" where patches of all cameras are
    ranked together. `layer` and `head` are numbers or "mean"; `layer` "importance" is the ceiling, the
    importance's own ranking, beside the random rankings of the first layer. `metric` is one of

    - `rank_correlation`: Spearman's, of a map with the importance; chance is circular shifts, with the
      central 95 % of them in `chance_low` and `chance_high`; `p` is corrected for the number of maps;
    - `split_half`: of the importance from one half of the masks with that from the other;
    - `deletion_area`, `insertion_area`: under the curves; chance is that of random rankings;
    - `deletion_gain`, `insertion_gain`: how much better than random rankings; chance is 0;
    - `deletion_gain_shifted`, `insertion_gain_shifted`: than the same map moved elsewhere; chance is 0;
    - these four followed by `_learned`, and `rank_correlation_learned` of the maps that rank, if there are
      copies with shuffled weights: the same value; chance is the mean of the copies, and one more copy would
      lie between `chance_low` and `chance_high` (95 %, if copies are normal);
    - `all_hidden`: change of the action with every patch hidden, in the policy's units;
    - `asked_again`: the same with nothing hidden: what is no effect.

    Args:
        found: of `measure_saliency`.
        resampling: of the intervals.
    """
    resampling = resampling or Resampling()
    rows: list[dict[str, Any]] = []
    for camera, (each, against) in correlations(found, resampling.seed).items():
        for number, (layer, head) in enumerate(found.map_names):
            names = {"camera": camera, "layer": layer, "head": head, "metric": CORRELATION}
            more = {name: getattr(against, name)[number] for name in ("chance", *_OF_CHANCE)}
            rows += _rows(found, names, each[:, number], resampling, chance=more.pop("chance"), **more)
    for camera, halves in split_halves(found).items():
        names = {"camera": camera, "layer": "importance", "head": "", "metric": "split_half"}
        rows += _rows(found, names, halves, resampling, chance=0.0)
    for names, values, chance in _of_curves(found):
        rows += _rows(found, names, values, resampling, chance=chance)
    for names, values, copies in _of_shuffled(found):
        low, high = prediction_interval(np.array([mean_of(copy) for copy in copies]))
        more = {"chance_low": low, "chance_high": high}
        rows += _rows(found, names, values, resampling, chance=copies.mean(axis=0), **more)
    for metric, attribute in (("all_hidden", "all_hidden"), ("asked_again", "floor")):
        values = np.array([getattr(frame, attribute) for frame in found.frames])
        names = {"camera": ALL, "layer": "", "head": "", "metric": metric}
        rows += _rows(found, names, values, resampling, chance=np.nan)
    return pd.DataFrame(rows, columns=list(COLUMNS))


_OF_CHANCE = ("chance_low", "chance_high", "p")


def _of_curves(found: Saliency) -> Iterator[tuple[dict[str, str], Floats, Floats]]:
    """Yield what is compared along the curves: names, values of the frames, and their chance levels."""
    of = areas(found)
    zero = np.zeros(len(found.frames))
    rankings = [("importance", "importance", "", found.curve_layers[0])]
    rankings += [(layer, f"attention {layer}", MEAN, layer) for layer in found.curve_layers]
    for layer, ranking, head, chances in rankings:
        names = {"camera": ALL, "layer": layer, "head": head}
        random = f"random {chances}"
        for number, way in enumerate(WAYS):
            named = {**names, "metric": f"{way}_area"}
            yield named, of[ranking][:, number], of[random][:, number]
        more = [("_shifted", f"shifted {chances}")] if ranking != "importance" else []
        for suffix, chance in (("", random), *more):
            better = gain(of[ranking], of[chance])
            for number, way in enumerate(WAYS):
                yield {**names, "metric": f"{way}_gain{suffix}"}, better[:, number], zero


def _of_shuffled(found: Saliency) -> Iterator[tuple[dict[str, str], Floats, Floats]]:
    """Yield gains and correlations of attention beside those of copies: names, (frame,), (copy, frame)."""
    if not found.shuffled:
        return
    for own, *copies in zip(_of_curves(found), *map(_of_curves, found.shuffled), strict=True):
        names, values, _ = own
        if "_gain" in names["metric"] and names["layer"] != "importance":
            named = {**names, "metric": f"{names['metric']}{LEARNED}"}
            yield named, values, np.stack([copy[1] for copy in copies])
    for camera in found.patches.cameras:
        ours, *theirs = (_correlations_of_rankings(one, camera) for one in (found, *found.shuffled))
        for number, layer in enumerate(found.curve_layers):
            named = {"camera": camera, "layer": layer, "head": MEAN, "metric": f"{CORRELATION}{LEARNED}"}
            yield named, ours[:, number], np.stack([copy[:, number] for copy in theirs])


def _correlations_of_rankings(found: Saliency, camera: str) -> Floats:
    """Return the rank correlations of the maps that rank patches for the curves, (frame, curve layer)."""
    pairs = [
        (frame.importance, np.stack([found.attention(frame, layer) for layer in found.curve_layers]))
        for frame in found.frames
    ]
    one = found.patches.rectangle
    return np.stack([shifted_correlations(one(ours, camera), one(maps, camera))[0] for ours, maps in pairs])


def _rows(
    found: Saliency,
    names: dict[str, str],
    values: Floats,
    resampling: Resampling,
    *,
    chance: float | Floats,
    **more: float,
) -> Iterator[dict[str, Any]]:
    """Yield the row of each frame, and that of the mean."""
    each = np.broadcast_to(np.asarray(chance, float), values.shape)
    for frame, value, by_chance in zip(found.frames, values.tolist(), each.tolist(), strict=True):
        place = {"episode": frame.episode, "frame": frame.frame}
        yield {**place, **names, "value": value, "chance": by_chance, "n_frames": 1}
    low, high = interval_of_mean(values, *resampling)
    yield {
        "episode": ALL,
        "frame": MEAN,
        **names,
        "value": float(mean_of(values)),
        "chance": float(mean_of(each)),
        "low": float(low),
        "high": float(high),
        "n_frames": int(np.isfinite(values).sum()),
        **more,
    }
