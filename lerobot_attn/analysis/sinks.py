"""Attention sinks: tokens that take attention whatever the policy is shown.

    sinks = attention_sinks(episode.dataset for episode in open_run("out"))
    attention(data, frame=12, exclude=sinks["key"].tolist())

Draws nothing; opens no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.reduce import mean_over
from lerobot_attn.analysis.select import (
    Choice,
    HeadChoice,
    QueryChoice,
    attention,
    layout_of,
    prefix_only_layers,
)
from lerobot_attn.analysis.tokens import kind_of
from lerobot_attn.errors import SelectionError
from lerobot_attn.layout import Kind, TokenLayout

_CHANGES = "(changes)"


class HasDataset(Protocol):
    """An episode, as `open_episode` gives it."""

    @property
    def dataset(self) -> xr.Dataset:
        """All its arrays."""


def attention_sinks(
    datasets: xr.Dataset | Iterable[xr.Dataset],
    *,
    minimum: float = 0.01,
    times_uniform: float = 10.0,
    quantile: float = 0.1,
    layer: Choice = "all",
    denoise_step: Choice = "all",
    head: HeadChoice = "mean",
    query: QueryChoice = "executed",
) -> pd.DataFrame:
    """Find the tokens whose share of attention stays high in every inference and whose kind stays the same.

    That first tokens of a text collect attention whatever they say is the attention sink of Xiao et al. 2023
    (arXiv:2309.17453, StreamingLLM); that vision transformers do the like with patches of the background is
    shown by Darcet et al. 2023 (arXiv:2309.16588). Both look into the model to say so; here tokens are found
    by how much attention they get, nothing else. So a sink is not told from what always deserves attention:
    in one episode a thing that does not move looks like a sink, and so does the view of the robot itself.
    Give episodes of several tasks and scenes, and look at what is found before leaving it out. Action tokens
    are found too, where actions attend to themselves. Keys that none of the chosen layers can see are not.

    No more than the chosen maps of one inference are read at a time, and each dataset is gone through once: a
    generator may open them in turn. An inference of which a chosen map is missing is passed over.

    Args:
        datasets: an episode's, or several of the same token layout.
        minimum: share of all attention that a sink gets at least.
        times_uniform: how many times what it would get if every unmasked token got the same. The larger of
            the two counts; both 0 lists every token of steady kind.
        quantile: part of the inferences in which it may be less; 0 asks for every single one.
        layer: labels, or "all": the share is the mean over those chosen.
        denoise_step: likewise.
        head: likewise; "mean" and "all" are the same.
        query: as in `attention`, but for "frame".

    Returns:
        One row per sink, by falling mean_share. `key`; `kind` ("image", "task", "state", "template", "text",
        "action"); `camera`, "" for other tokens; `row` and `column` of the patch, -1 for others; `label`, the
        token's text where it is the same in every inference, else "(changes)"; `mean_share` and `low_share`,
        the mean and the quantile of its share over all inferences; and `times_uniform`, the mean of the share
        over what each unmasked token would get. `attrs` holds the numbers of inferences and episodes.

    Raises:
        SelectionError: fewer than two inferences, differing layouts, a threshold out of range, or no such
            layer, …
    """
    ranges = {"minimum": (minimum, 1), "quantile": (quantile, 1), "times_uniform": (times_uniform, np.inf)}
    for name, (value, most) in ranges.items():
        if not 0 <= value <= most:
            expected = f"0 to {most}" if most == 1 else "0 or more"
            raise SelectionError(f"{name}: got {value!r}, expected {expected}")
    if isinstance(head, str) and head == "max":
        raise SelectionError("head='max': sinks are found by shares of all attention; choose 'mean' or heads")
    shares: list[NDArray[np.float32]] = []
    tokens: _Tokens | None = None
    n_unmasked: list[int] = []
    n_episodes = 0
    for dataset in [datasets] if isinstance(datasets, xr.Dataset) else datasets:
        n_episodes += 1
        tokens = tokens or _Tokens(layout_of(dataset))
        tokens.add(dataset)
        unmasked = dataset["key_kind"].values != Kind.PADDING
        lacks_keys = bool(prefix_only_layers(dataset))
        for inference in range(dataset.sizes["inference"]):
            array = attention(
                dataset, inference=inference, layer=layer, denoise_step=denoise_step, head=head, query=query
            )
            others = [str(dim) for dim in array.dims if dim != "key"]
            share = mean_over(array, others, may_lack_keys=lacks_keys).values
            is_there = np.isfinite(share)
            if is_there.any():
                shares.append(share)
                n_unmasked.append(int((unmasked[inference] & is_there).sum()))
    if tokens is None or len(shares) < 2:
        raise SelectionError(
            f"got {len(shares)} inferences of {n_episodes} episodes, expected two at least: "
            "what takes attention regardless of the input shows only where the input changes"
        )
    table = tokens.table()
    by_inference, uniform = np.stack(shares), 1 / np.array(n_unmasked)[:, None]
    # Keys that none of the chosen layers can see are no sinks.
    can_be_seen = np.isfinite(by_inference).all(axis=0)
    by_inference = np.where(can_be_seen, by_inference, np.float32(0))
    least = np.maximum(minimum, times_uniform * uniform)
    # Compared before the quantile is taken: prompts differ in length, and so does an even share.
    stays_high = np.quantile(by_inference - least, quantile, axis=0, method="lower") >= 0
    table["mean_share"] = by_inference.mean(axis=0, dtype=np.float64)
    table["low_share"] = np.quantile(by_inference, quantile, axis=0, method="lower")
    table["times_uniform"] = (by_inference / uniform).mean(axis=0)
    result = table[stays_high & tokens.is_steady & can_be_seen].sort_values(
        ["mean_share", "key"], ascending=[False, True], ignore_index=True
    )
    result.attrs = {"n_inferences": len(shares), "n_episodes": n_episodes}
    return result


def keys_to_exclude(choice: Sequence[int] | Literal["sinks"], episodes: Iterable[HasDataset]) -> list[int]:
    """Return the keys that a picture's setting `exclude` means: those given, or the sinks found.

    Of the sinks the action tokens stay in: that actions attend to themselves is no sink.

    Args:
        choice: keys, or "sinks".
        episodes: where to look for sinks, see `attention_sinks`; their datasets are opened for "sinks" only.
    """
    if not isinstance(choice, str):
        return list(choice)
    found = attention_sinks(episode.dataset for episode in episodes)
    keys: list[int] = found.loc[found["kind"] != Kind.ACTION.name.lower(), "key"].tolist()
    return keys


class _Tokens:
    """What each key token is, through all inferences of all episodes."""

    def __init__(self, layout: TokenLayout):
        self._layout = layout
        self._kinds: NDArray[np.int8] | None = None
        self._texts: NDArray[np.object_] | None = None
        self._changes = np.zeros(layout.n_keys, bool)
        self._text_changes = np.zeros(len(layout.language), bool)

    def add(self, dataset: xr.Dataset) -> None:
        """Take in an episode's tokens.

        Raises:
            SelectionError: its layout is another.
        """
        if layout_of(dataset) != self._layout:
            raise SelectionError(
                "the episodes' token layouts differ (cameras, image sizes, text length or chunk); "
                "look for sinks in episodes of one policy and one set of cameras"
            )
        kinds, texts = dataset["key_kind"].values, dataset["token_text"].values
        if not len(kinds):
            return
        if self._kinds is None or self._texts is None:
            self._kinds, self._texts = kinds[0], texts[0]
        self._changes |= (kinds != self._kinds).any(axis=0)
        self._text_changes |= (texts != self._texts).any(axis=0)

    @property
    def is_steady(self) -> NDArray[np.bool_]:
        """Whether a key is of the same kind in every inference, and no padding; (key,) bool."""
        assert self._kinds is not None
        steady: NDArray[np.bool_] = ~self._changes & (self._kinds != Kind.PADDING)
        return steady

    def table(self) -> pd.DataFrame:
        """Return a row for each key: key, kind, camera, row, column, label."""
        assert self._kinds is not None
        layout = self._layout
        cameras, (rows, columns) = layout.key_camera(), layout.key_patch()
        names = [layout.cameras[i].name if i >= 0 else "" for i in cameras.tolist()]
        return pd.DataFrame(
            {
                "key": np.arange(layout.n_keys),
                "kind": [kind_of(kind).name.lower() for kind in self._kinds.tolist()],
                "camera": names,
                "row": rows,
                "column": columns,
                "label": [self._label(key, names[key], rows[key], columns[key]) for key in range(len(names))],
            }
        )

    def _label(self, key: int, camera: str, row: int, column: int) -> str:
        language, actions = self._layout.language, self._layout.actions
        if camera:
            return f"{camera.rpartition('.')[2]} row {row}, column {column}"
        if actions.start <= key < actions.stop:
            return f"action {key - actions.start}"
        if language.start <= key < language.stop:
            assert self._texts is not None
            slot = key - language.start
            text = str(self._texts[slot])
            return _CHANGES if self._text_changes[slot] else text.strip() or repr(text)
        return next(s.name for s in self._layout.segments if s.start <= key < s.stop)
