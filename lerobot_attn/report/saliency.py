"""What saliency found, as files: figures, a table, the maps, and a page of text in one folder.

    write_saliency(found, "report")   # Python side of `lerobot-attn saliency … -o report`

The numbers are those of `analysis.saliency` and `analysis.saliency_tables`. Asks no policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lerobot_attn.analysis.intervals import interval_of_mean
from lerobot_attn.analysis.saliency import FrameSaliency, Patches, Saliency
from lerobot_attn.analysis.saliency_tables import (
    CORRELATION,
    FEW_FRAMES,
    LEARNED,
    MEAN,
    Resampling,
    saliency_table,
)
from lerobot_attn.analysis.spatial import on_camera_pixels
from lerobot_attn.errors import RANDOM_WEIGHTS, ConfigError
from lerobot_attn.figures.canvas import Caption, save_figure
from lerobot_attn.figures.saliency import (
    Curve,
    Levels,
    Picture,
    correlation_figure,
    curves_figure,
    maps_figure,
)
from lerobot_attn.layout import short_names
from lerobot_attn.report.page import Page

_MOST_CURVES = 4  # columns of the figure of curves
_MOST_LAYERS = 25  # rows of the page's table of layers


def write_saliency(found: Saliency, folder: str | Path, resampling: Resampling | None = None) -> list[Path]:
    """Write `report.md`, `report.html`, `saliency.csv`, `saliency.npz`, and three figures.

    `saliency.npz` holds `episode` and `frame` (frame,), of each camera `importance CAMERA` (frame, grid_y,
    grid_x) float32 and `attention CAMERA` (frame, layer, head, grid_y, grid_x) float16, both NaN on padding,
    `layer`, `head`, and the curves: `share`, of each ranking `curves RANKING` (frame, draw, 2, share), and
    `shuffled curves RANKING` (copy, frame, draw, 2, share) if copies with shuffled weights were asked.

    Args:
        found: of `measure_saliency`.
        folder: where to; it is made.
        resampling: of the intervals over frames.

    Returns:
        The files.

    Raises:
        ConfigError: the folder cannot be written.
    """
    folder = Path(folder)
    resampling = resampling or Resampling()
    table = saliency_table(found, resampling)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / "saliency.csv", index=False)
        arrays: dict[str, Any] = _arrays(found)
        np.savez_compressed(folder / "saliency.npz", **arrays)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write the report: {error.strerror or error}") from error
    figures = {
        "maps.png": (_maps(found), "importance beside attention over the cameras' pictures"),
        "correlation.png": (_correlation(found, table), "rank correlation by layer and head"),
        "curves.png": (_curves(found, resampling), "deletion and insertion curves"),
    }
    for name, (figure, _) in figures.items():
        save_figure(figure, folder / name)
    page = _page(found, table)
    for name, (_, text) in figures.items():
        page.picture(folder / name, text)
    page.heading("How to read this")
    page.points(_READING)
    return [
        folder / "saliency.csv",
        folder / "saliency.npz",
        *(folder / n for n in figures),
        *page.write(folder),
    ]


_READING = (
    "Importance: how much more the action changes with a patch hidden than with it shown, over random masks "
    "(RISE, Petsiuk et al. 2018); the change is the root mean square over the executed actions, in the "
    "policy's normalised units, and all questions about a frame start from the same noise.",
    "Rank correlation: Spearman's, over the patches of a camera that show a part of its image. Its chance "
    "level is the importance moved by random circular shifts, alike in all frames of an episode: shuffled "
    "patches would make any smooth map significant. p is corrected for the number of maps of the camera.",
    "Split half: the importance from one half of the masks against the other. Near 0 the masks are too few, "
    "and no map can agree with the importance; take more.",
    "Curves: patches of all cameras are hidden (deletion) or shown (insertion) in a ranking's order. A gain "
    "is the area between a ranking's curve and that of random patches of the same cameras, or of the same "
    "map moved elsewhere (shifted, the stricter one), in units of the change with everything hidden; above 0 "
    "the ranking finds what matters sooner. The importance's own ranking is what a good map could reach, if "
    "the masks are enough to know it.",
    "Attention decides how much of a patch enters, so its order beats a random one with random weights, too: "
    "four random pi05_tiny gained 0.17 to 0.23 in deletion. Hold a gain to that of shuffled weights (option "
    "--shuffled) before it is read as something that was learned.",
    "Intervals are over frames. Frames of one episode resemble each other, so they say how these frames "
    "vary, and are too narrow for other episodes.",
    "A picture with parts hidden is none that the policy was trained on. What is large here changes the "
    "action; it is no proof that the policy needs it to succeed.",
)


def _page(found: Saliency, table: pd.DataFrame) -> Page:
    facts = found.facts
    page = Page("Saliency: does attention predict what matters?")
    short = short_names(found.patches.cameras)
    page.points(_said(found))
    means = table[table["frame"] == MEAN]
    page.text(_verdict(found, means))
    page.heading("Curves")
    is_learned, is_gain = means["metric"].str.endswith(LEARNED), means["metric"].str.contains("_gain")
    rows = means[is_gain & ~is_learned]
    page.table(
        ["ranked by", "curve", "better than", "area between, of the whole change", "95 % interval"],
        [
            [
                *_compared(row),
                _number(row["value"]),
                _interval(row),
            ]
            for row in rows.to_dict("records")
        ],
    )
    if found.shuffled:
        page.heading("Beside shuffled weights")
        page.text(_learned(means[is_learned]))
        columns = ["ranked by", "curve", "better than", "this policy", "shuffled weights, mean"]
        page.table(
            [*columns, "one more copy would gain (95 %)"],
            [
                [
                    *_compared(row),
                    _number(row["value"]),
                    _number(row["chance"]),
                    f"{_number(row['chance_low'])} to {_number(row['chance_high'])}",
                ]
                for row in means[is_learned & is_gain].to_dict("records")
            ],
        )
        columns = ["camera", "map", "rank correlation, this policy", "shuffled weights, mean"]
        page.table(
            [*columns, "one more copy would have (95 %)"],
            [
                [
                    short[row["camera"]],
                    _ranking(row["layer"]),
                    _number(row["value"]),
                    _number(row["chance"]),
                    f"{_number(row['chance_low'])} to {_number(row['chance_high'])}",
                ]
                for row in means[means["metric"] == f"{CORRELATION}{LEARNED}"].to_dict("records")
            ],
        )
    page.heading("Rank correlation with importance")
    rows = means[(means["metric"] == CORRELATION)].sort_values("value", ascending=False)
    page.table(
        ["camera", "layer", "head", "correlation", "interval over frames", "by chance, 95 %", "p"],
        [
            [
                short[row["camera"]],
                row["layer"],
                row["head"],
                _number(row["value"]),
                _interval(row),
                f"{_number(row['chance_low'])} to {_number(row['chance_high'])}",
                _number(row["p"], 3),
            ]
            for row in rows.head(_MOST_LAYERS).to_dict("records")
        ],
    )
    if len(rows) > _MOST_LAYERS:
        page.text(f"The {_MOST_LAYERS} highest of {len(rows)}; all are in saliency.csv.")
    halves = means[means["metric"] == "split_half"]
    page.points(
        f"split half, {short[row['camera']]}: {_number(row['value'])} ({facts['n_masks'] // 2} masks each)"
        for row in halves.to_dict("records")
    )
    return page


def _said(found: Saliency) -> list[str]:
    """Return what was asked, and what a reader has to know of it."""
    facts, n = found.facts, len(found.frames)
    episodes = len({frame.episode for frame in found.frames})
    said = [
        f"{n} frame{'s' * (n > 1)} of {episodes} episode{'s' * (episodes > 1)}: {_frames(found)}",
        f"policy: {facts['policy_type']}; layers {', '.join(map(str, found.layers))}; attention is the mean "
        f"over the {facts['executed_actions']} executed actions and the denoise steps",
        f"{facts['n_masks']} masks a frame, each hiding {facts['hidden_share']:.0%} of the patches by "
        f"{'the mean colour' if facts['fill'] == 'mean' else 'a blur'}; {facts['n_draws']} random and "
        f"{facts['n_draws']} shifted rankings; seed {facts['seed']}",
    ]
    floor = max(frame.floor for frame in found.frames)
    whole = float(np.mean([frame.all_hidden for frame in found.frames]))
    said.append(f"change of the action: {whole:.3g} with every patch hidden, {floor:.1g} with none")
    if "videos" in facts["footage"]:
        said.append("the pictures are frames of MP4s, which lose detail: not the pixels that were recorded")
    if n < FEW_FRAMES:
        said.append(f"{n} frames are few: the intervals are too narrow")
    if facts["random_weights"]:
        said.append(RANDOM_WEIGHTS)
    if facts["remark"]:
        said.append(str(facts["remark"]))
    return said


def _frames(found: Saliency) -> str:
    parts = []
    for episode in dict.fromkeys(frame.episode for frame in found.frames):
        numbers = [str(frame.frame) for frame in found.frames if frame.episode == episode]
        parts.append(f"episode {episode}: {', '.join(numbers)}")
    text = "; ".join(parts)
    return text if len(text) < 300 else f"{text[:300]} …"


def _verdict(found: Saliency, means: pd.DataFrame) -> str:
    """Say in a sentence whether the map predicts what matters."""
    layer = found.curve_layers[0]
    what = "the mean of the layers" if layer == MEAN else f"layer {layer}"
    own = means[means["layer"] == layer].set_index("metric")
    gains = [own.loc[f"deletion_gain{suffix}"] for suffix in ("", "_shifted")]
    if not all(np.isfinite(row["low"]) for row in gains):
        return "Of one frame there is no interval; take more frames to judge the map."
    told = (
        f"Hidden in the order of attention ({what}), patches change the action more than in random order, by "
        f"{_number(gains[0]['value'])} of the whole change ({_interval(gains[0])}), and more than in that of "
        f"the same map moved elsewhere, by {_number(gains[1]['value'])} ({_interval(gains[1])})"
    )
    if all(row["low"] > 0 for row in gains):
        return f"{told}: on these frames the map predicts what matters."
    if all(row["high"] < 0 for row in gains):
        return f"{told}: on these frames what is attended to matters less than other places."
    return f"{told}: on these frames it is not shown that the map predicts what matters."


def _learned(rows: pd.DataFrame) -> str:
    """Say in a sentence whether shuffled weights would gain as much."""
    row = rows[rows["metric"] == f"deletion_gain_shifted{LEARNED}"].to_dict("records")[0]
    told = (
        f"Against the map moved elsewhere, this policy gains {_number(row['value'])} in deletion; with "
        f"shuffled weights, which have learned nothing, it is {_number(row['chance'])} on average, and one "
        f"more such copy would gain {_number(row['chance_low'])} to {_number(row['chance_high'])}"
    )
    if row["value"] > row["chance_high"]:
        return f"{told}: what was learned makes the map predict better."
    if row["value"] < row["chance_low"]:
        return f"{told}: what was learned makes the map predict worse."
    return f"{told}: that the map predicts so well need not have been learned."


def _compared(row: Any) -> list[str]:
    """Return what ranked, along which curve, and what it is compared with."""
    curve, _, other = str(row["metric"]).removesuffix(LEARNED).partition("_")
    than = "the map moved elsewhere" if other.endswith("shifted") else "random"
    return [_ranking(row["layer"]), curve, than]


def _ranking(layer: str) -> str:
    if layer == "importance":
        return "importance (ceiling)"
    return "attention, mean of the layers" if layer == MEAN else f"attention, layer {layer}"


def _number(value: float, digits: int = 2) -> str:
    return "" if not np.isfinite(value) else f"{value:.{digits}f}"


def _interval(row: Any) -> str:
    return "" if not np.isfinite(row["low"]) else f"{row['low']:.2f} to {row['high']:.2f}"


def _arrays(found: Saliency) -> dict[str, NDArray[Any]]:
    frames = found.frames
    arrays: dict[str, NDArray[Any]] = {
        "episode": np.array([frame.episode for frame in frames]),
        "frame": np.array([frame.frame for frame in frames]),
        "layer": np.array(found.layers),
        "head": np.array(found.heads),
        "share": np.array(found.shares),
    }
    for camera in found.patches.cameras:
        importance = np.stack([frame.importance for frame in frames])
        arrays[f"importance {camera}"] = found.patches.on_grid(importance, camera).astype(np.float32)
        attention = np.stack([frame.attention for frame in frames])
        arrays[f"attention {camera}"] = found.patches.on_grid(attention, camera).astype(np.float16)
    for name in frames[0].curves:
        arrays[f"curves {name}"] = _stacked_curves(found, name)
        if found.shuffled:
            copies = [_stacked_curves(copy, name) for copy in found.shuffled]
            arrays[f"shuffled curves {name}"] = np.stack(copies)
    return arrays


def _stacked_curves(found: Saliency, name: str) -> NDArray[np.float32]:
    return np.stack([frame.curves[name] for frame in found.frames]).astype(np.float32)


def _caption(found: Saliency, *facts: str) -> Caption:
    about = found.facts
    warning = RANDOM_WEIGHTS if about["random_weights"] else ""
    notes = [str(about["remark"])] if about["remark"] and not warning else []
    said = [
        f"{about['policy_type']}, {len(found.frames)} frames",
        *facts,
        f"{about['n_masks']} masks a frame, {about['hidden_share']:.0%} hidden, fill {about['fill']}",
    ]
    return Caption(said, warning, notes)


def _maps(found: Saliency) -> Any:
    short = short_names(found.patches.cameras)
    rows = []
    for frame in found.frames:
        if frame.pictures:
            label = f"episode {frame.episode}\nframe {frame.frame}"
            maps = _relative(frame.importance), _relative(found.attention(frame, MEAN))
            rows.append(
                (
                    label,
                    [
                        Picture(short[camera], image, *_on_picture(maps, image, camera, found.patches))
                        for camera, image in frame.pictures.items()
                    ],
                )
            )
    facts = ("attention: mean of the layers, heads, executed actions and denoise steps", "below 0 as 0")
    return maps_figure(rows, _caption(found, *facts))


def _relative(values: NDArray[Any]) -> NDArray[np.float32]:
    most = float(np.nanmax(values, initial=0))
    return np.asarray(np.clip(values, 0, None) / (most or 1), np.float32)


def _on_picture(
    maps: tuple[NDArray[np.float32], NDArray[np.float32]],
    image: NDArray[np.uint8],
    camera: str,
    patches: Patches,
) -> list[NDArray[np.float32]]:
    height, width, _ = image.shape
    return [
        on_camera_pixels(grid, patches.geometries[camera], size_px=(height, width))
        for grid in (patches.on_grid(one, camera, 0.0) for one in maps)
    ]


def _correlation(found: Saliency, table: pd.DataFrame) -> Any:
    layers, heads = ([*map(str, some), MEAN] for some in (found.layers, found.heads))
    short = short_names(found.patches.cameras)
    means = table[table["frame"] == MEAN]
    levels = []
    for camera in found.patches.cameras:
        rows = means[(means["camera"] == camera) & (means["metric"] == "rank_correlation")]
        # In the order of `map_names`: heads within layers.
        grids = {
            name: rows[name].to_numpy(float).reshape(len(layers), len(heads))
            for name in ("value", "p", "low", "high", "chance_low", "chance_high")
        }
        half = means[(means["camera"] == camera) & (means["metric"] == "split_half")]["value"].iloc[0]
        of_mean = {name: grids[name][:, -1] for name in ("low", "high", "chance_low", "chance_high")}
        levels.append(
            Levels(short[camera], value=grids["value"], p=grids["p"], split_half=float(half), **of_mean)
        )
    facts = ("rank correlation (Spearman) over patches", "* p < 0.05, corrected for the number of maps")
    return correlation_figure(levels, layers, heads, _caption(found, *facts))


def _curves(found: Saliency, resampling: Resampling) -> Any:
    panels = []
    for layer in found.curve_layers[:_MOST_CURVES]:
        rankings = {
            "importance": "importance",
            "attention": f"attention {layer}",
            "shifted": f"shifted {layer}",
            "random": f"random {layer}",
        }
        title = "attention: mean of the layers" if layer == MEAN else f"attention: layer {layer}"
        panels.append((title, {name: _of(found, key, resampling) for name, key in rankings.items()}))
    facts = ["change of the action in units of that with every patch hidden", "bands: 95 % over frames"]
    if len(found.curve_layers) > _MOST_CURVES:
        facts.append(f"the first {_MOST_CURVES} of {len(found.curve_layers)} layers")
    return curves_figure(panels, [0.0, *found.shares, 1.0], _caption(found, *facts))


def _of(found: Saliency, key: str, resampling: Resampling) -> tuple[Curve, Curve]:
    """Return a ranking's deletion and insertion curves with their ends."""
    whole = np.array([_relative_curves(frame, key) for frame in found.frames])
    low, high = interval_of_mean(whole, *resampling)
    mean = whole.mean(axis=0)
    return Curve(mean[0], low[0], high[0]), Curve(mean[1], low[1], high[1])


def _relative_curves(frame: FrameSaliency, key: str) -> NDArray[np.float64]:
    curves = frame.curves[key].mean(axis=0) / (frame.all_hidden or np.nan)
    ends = np.array([[0.0], [1.0]])
    return np.concatenate([ends, curves, ends[::-1]], axis=1)
