"""Linear probes: what can be read from a layer's neurons or residuals, beside what shuffled labels give.

    found = probe(episodes, values)      # values: per episode (inference,) numbers or words
    found.table                     # kind, stream, layer, group, …, score, low, high, shuffled, p_corrected

A probe is trained on some episodes and scored on others. Its control has the same activations and the values
of another episode, as a whole series, so that their likeness from moment to moment is the same. Needs
scikit-learn. Draws nothing and opens no file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.intervals import expanded_tail
from lerobot_attn.analysis.neurons import Block, Choice, activations, blocks_of
from lerobot_attn.analysis.quantities import quantity
from lerobot_attn.analysis.sources import Source, path_of
from lerobot_attn.errors import SelectionError, SetupError
from lerobot_attn.sizes import Progress

Task = Literal["regression", "classification"]
FEWEST = 4  # episodes
METRICS = {"regression": "R²", "classification": "balanced accuracy"}
_ALPHAS = np.logspace(-4, 3, 15)  # penalties of the ridge, in features
_TIME = "time"
_PORTION_BYTES = 500_000_000  # of activations that are held at a time

_Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How a probe is trained and tested.

    Attributes:
        n_folds: parts of the episodes, each of which is scored by a probe trained on the others.
        n_shuffles: shuffled controls; 19 are the fewest that can give a p of 0.05.
        n_resamples: of the intervals.
        confidence: of the intervals.
        seed: of all.
    """

    n_folds: int = 5
    n_shuffles: int = 20
    n_resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Probes:
    """What `probe` found.

    Attributes:
        task: "regression" or "classification".
        table: one row a place: kind ("neurons", "residual"; "time" for a probe that knows nothing but the
            fraction of the episode, its square and its cube), stream, layer, group, reduction, denoise_step,
            n_features, metric, score, low, high, chance, shuffled (mean of the controls), shuffled_high (the
            highest), p_corrected (share of shuffles in which the best of all places reaches the score),
            n_episodes, n_inferences.
        chance: of the score: R² of the training episodes' mean, 0; balanced accuracy of guessing, 1 /
        classes. classes: what is told apart; none of a regression.
        n_shuffles: how many controls there are.
        notes: what was left out, and why.
    """

    task: Task
    table: pd.DataFrame
    chance: float
    classes: tuple[str, ...]
    n_shuffles: int
    notes: tuple[str, ...]

    @property
    def places(self) -> pd.DataFrame:
        """The rows of neurons and residuals, the best first."""
        return self.table[self.table["kind"] != _TIME].sort_values("score", ascending=False)

    @property
    def time_score(self) -> float:
        """What the fraction of the episode alone gives."""
        return float(self.table.loc[self.table["kind"] == _TIME, "score"].iloc[0])


class _Series(NamedTuple):
    """The labelled inferences of all episodes, one after another.

    Attributes:
        targets: (row, 1 + shuffle) numbers; of classes, their indices. The first column is the real one.
        groups: (row,) which episode.
        known: of each episode (inference,) whether it has a value.
    """

    targets: _Doubles
    groups: NDArray[np.intp]
    known: list[NDArray[np.bool_]]


def probe(
    episodes: Sequence[Source],
    values: Sequence[NDArray[Any]],
    choices: Sequence[Choice] = (Choice(),),
    *,
    task: Task | None = None,
    draws: Draws | None = None,
    progress: Progress | None = None,
) -> Probes:
    """Train and score a linear probe at each layer, token group and step.

    Activations are standardised over the training episodes. Numbers are read by ridge regression, whose
    penalty is chosen on the training episodes (leave-one-out); classes by logistic regression with balanced
    classes. Folds are of whole episodes. R² is against the mean of the training episodes. Intervals are
    bootstrapped over episodes. A shuffle puts the episodes' values in another order, each a whole series,
    stretched to the length of the episode that gets it; what such a probe reads is what all episodes have in
    common over time.

    Args:
        episodes: with neurons or residuals; of large ones some layers are read at a time.
        values: of each episode (inference,): numbers, or words; NaN or None where not known.
        choices: which activations.
        task: None: classification of words and of values that are all 0 or 1, else regression.
        draws: how many.
        progress: called as `progress(done, total)`.

    Raises:
        SelectionError: nothing was recorded, fewer than four episodes with values, or values that do not
        vary. SetupError: scikit-learn is not installed.
    """
    scikit_learn()
    draws = draws or Draws()
    numbers, task, classes = _numbers(values, task)
    has_value = [bool(np.isfinite(own).any()) for own in numbers]
    kept = [i for i, known in enumerate(has_value) if known]
    if len(kept) < FEWEST:
        raise SelectionError(f"probe: {len(kept)} episodes have values; expected {FEWEST} or more")
    chosen, own = [episodes[i] for i in kept], [numbers[i] for i in kept]
    if np.ptp(np.concatenate([one[np.isfinite(one)] for one in own])) == 0:
        raise SelectionError("probe: the value is the same at every inference; expected one that varies")
    notes = [f"left out: {len(episodes) - len(kept)} episodes without values"] * (len(kept) < len(episodes))
    series = _series(own, draws)
    n_rows = sum(map(len, own))
    portions = [p for choice in choices for p in _portions(_arrays(chosen[0]), choice, n_rows)]
    total = len(chosen) * len(portions) + sum(len(blocks) for _, blocks in portions) + 1
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    time = np.concatenate(
        [quantity(_arrays(s), "time")[k] for s, k in zip(chosen, series.known, strict=True)]
    )
    features = np.stack([time, time**2, time**3], axis=1).astype(np.float32)
    rows = [_row(_scores(features, series, task, len(classes), draws), features.shape[1])]
    labels: list[tuple[Any, ...]] = [(_TIME, "", None, "", "", None)]
    tell()
    for choice, blocks in portions:
        read = []
        for source in chosen:
            read.append(_read(source, choice, blocks))
            tell()
        for parts in zip(*read, strict=True):
            block = parts[0][0]
            found = np.concatenate([v[k] for (_, v), k in zip(parts, series.known, strict=True)])
            is_there = np.isfinite(found).all(axis=1)
            if is_there.all():
                rows.append(_row(_scores(found, series, task, len(classes), draws), block.n_units))
                labels.append(tuple(block[:6]))
            else:
                notes.append(f"not probed, because some inferences have no such tokens: {block.text}")
            tell()
    if len(rows) == 1:
        raise SelectionError("probe: no token group has a value at every inference; choose other groups")
    table = pd.DataFrame(labels, columns=["kind", "stream", "layer", "group", "reduction", "denoise_step"])
    table = table.astype({"layer": "Int64", "denoise_step": "Int64"})
    table["n_features"] = [row.n_features for row in rows]
    table["metric"], table["chance"] = METRICS[task], 0.0 if task == "regression" else 1 / len(classes)
    for name in ("score", "low", "high"):
        table[name] = [getattr(row, name) for row in rows]
    shuffled = np.array([row.shuffled for row in rows])  # (place, shuffle)
    table["shuffled"], table["shuffled_high"] = shuffled.mean(axis=1), shuffled.max(axis=1)
    best = shuffled[1:].max(axis=0)
    table["p_corrected"] = [
        np.nan if kind == _TIME else (1 + int((best >= score - 1e-12).sum())) / (1 + len(best))
        for kind, score in zip(table["kind"], table["score"], strict=True)
    ]
    table["n_episodes"], table["n_inferences"] = len(kept), len(series.groups)
    order = ["kind", "stream", "layer", "group", "reduction", "denoise_step", "n_features", "metric", "score"]
    order += ["low", "high", "chance", "shuffled", "shuffled_high", "p_corrected"]
    return Probes(
        task=task,
        table=table[[*order, "n_episodes", "n_inferences"]],
        chance=float(table["chance"].iloc[0]),
        classes=classes,
        n_shuffles=draws.n_shuffles,
        notes=tuple(dict.fromkeys(notes)),
    )


def scikit_learn() -> Any:
    """Return the module `sklearn`.

    Raises:
        SetupError: it is not installed.
    """
    try:
        import sklearn
    except ImportError as error:
        raise SetupError(
            "scikit-learn is not installed; expected 1.6 or newer: pip install 'lerobot_policy_attn[neurons]'"
        ) from error
    return sklearn


class _Scores(NamedTuple):
    """(1 + shuffle,) scores, the real one first, and the interval of that."""

    scores: _Doubles
    low: float
    high: float


class _Row(NamedTuple):
    score: float
    low: float
    high: float
    shuffled: _Doubles
    n_features: int


def _row(found: _Scores, n_features: int) -> _Row:
    return _Row(float(found.scores[0]), found.low, found.high, found.scores[1:], n_features)


def _numbers(
    values: Sequence[NDArray[Any]], task: Task | None
) -> tuple[list[_Doubles], Task, tuple[str, ...]]:
    """Return values as numbers (of classes, their indices), the task, and the classes."""
    if task not in (None, "regression", "classification"):
        raise SelectionError(f"task {task!r}: expected regression or classification")
    are_words = any(value.dtype == object for value in values)
    known = np.concatenate([np.asarray(v if are_words else v.astype(float), object) for v in values])
    is_known = [value is not None and value == value for value in known.tolist()]  # a NaN is not itself
    levels = sorted({value for value, there in zip(known.tolist(), is_known, strict=True) if there})
    if task is None:
        task = "classification" if are_words or set(levels) <= {0, 1} else "regression"
    if task == "regression":
        if are_words:
            raise SelectionError("probe: the value is a word; expected task classification")
        return [np.asarray(value, float) for value in values], task, ()
    if len(levels) > 20:
        raise SelectionError(f"probe: {len(levels)} classes; expected 20 at most, or task regression")
    place = {level: float(index) for index, level in enumerate(levels)}
    found = [np.array([place.get(v, np.nan) for v in value.tolist()], float) for value in values]
    return found, task, tuple(f"{level:g}" if isinstance(level, float) else str(level) for level in levels)


def _series(values: Sequence[_Doubles], draws: Draws) -> _Series:
    known = [np.isfinite(own) for own in values]
    own = [value[k] for value, k in zip(values, known, strict=True)]
    rng = np.random.default_rng(draws.seed)
    columns = [np.concatenate(own)]
    for _ in range(draws.n_shuffles):
        order = _other_order(len(own), rng)
        columns.append(np.concatenate([_stretched(own[j], len(own[i])) for i, j in enumerate(order)]))
    groups = np.repeat(np.arange(len(own)), [len(one) for one in own])
    return _Series(np.stack(columns, axis=1), groups, known)


def _other_order(n: int, rng: np.random.Generator) -> list[int]:
    """Return a random order that is not the given one."""
    while True:
        order = rng.permutation(n)
        if (order != np.arange(n)).any():
            return [int(i) for i in order]


def _stretched(series: _Doubles, n: int) -> _Doubles:
    """Return a series at n moments, each the one at the same fraction of it."""
    places = np.rint(np.arange(n) * (len(series) - 1) / max(1, n - 1)).astype(int)
    return np.asarray(series[places])


def _scores(
    features: NDArray[np.float32], series: _Series, task: Task, n_classes: int, draws: Draws
) -> _Scores:
    """Score the real values and every shuffle on episodes that the probe was not trained on."""
    targets, groups = series.targets, series.groups
    n_episodes = int(groups.max()) + 1
    predicted, means = np.full_like(targets, np.nan), np.full_like(targets, np.nan)
    for train, test in _folds(groups, draws):
        rotated = _rotation(features[train])
        seen, unseen = rotated.transform(features[train]), rotated.transform(features[test])
        means[test] = targets[train].mean(axis=0)
        if task == "regression":
            predicted[test] = (
                _ridge(seen, targets[train], features.shape[1]).predict(unseen).reshape(len(test), -1)
            )
        else:
            for column in range(targets.shape[1]):
                predicted[test, column] = _classified(seen, targets[train, column], unseen)
    of = groups[:, None] == np.arange(n_episodes)  # (row, episode)
    if task == "regression":
        wrong = of.T.astype(float) @ (targets - predicted) ** 2  # (episode, column)
        every = of.T.astype(float) @ (targets - means) ** 2
        return _with_interval(wrong[:, :, None], every[:, :, None], True, draws)
    is_class = targets[:, :, None] == np.arange(n_classes)  # (row, column, class)
    right = is_class & (predicted == targets)[:, :, None]
    counts = [np.einsum("re,rck->eck", of, part.astype(float)) for part in (right, is_class)]
    return _with_interval(counts[0], counts[1], False, draws)


def _with_interval(part: _Doubles, whole: _Doubles, is_error: bool, draws: Draws) -> _Scores:
    """Return scores out of sums over episodes, (episode, column, class), and the first column's interval."""

    def score(weights: _Doubles, a: _Doubles, b: _Doubles) -> _Doubles:
        above, below = np.tensordot(weights, a, 1), np.tensordot(weights, b, 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = above / below
        with np.errstate(all="ignore"):
            known = np.isfinite(share)
            mean = np.where(known, share, 0).sum(axis=-1) / np.maximum(known.sum(axis=-1), 1)
        return np.asarray(1 - mean if is_error else mean, float)

    n = len(part)
    rng = np.random.default_rng(draws.seed)
    drawn = rng.integers(0, n, (draws.n_resamples, n))
    weights = np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(float)
    again = score(weights, part[:, 0], whole[:, 0])
    tail = 100 * expanded_tail(n, draws.confidence)
    low, high = np.percentile(again, [tail, 100 - tail])
    return _Scores(score(np.ones(n), part, whole), float(low), float(high))


def _folds(groups: NDArray[np.intp], draws: Draws) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    from sklearn.model_selection import GroupKFold

    n_folds = min(draws.n_folds, int(groups.max()) + 1)
    folds = GroupKFold(n_folds, shuffle=True, random_state=draws.seed)
    yield from folds.split(groups, groups=groups)


def _rotation(features: NDArray[np.float32]) -> Any:
    """Return a fitted pipeline: standardised, then turned into the space that the rows span.

    A linear model with a quadratic penalty is the same in that space, which has no more axes than rows.
    """
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), PCA(svd_solver="full")).fit(features.astype(np.float64))


def _ridge(features: _Doubles, targets: _Doubles, n_features: int) -> Any:
    from sklearn.linear_model import RidgeCV

    return RidgeCV(alphas=n_features * _ALPHAS, alpha_per_target=True).fit(features, targets)


def _classified(features: _Doubles, targets: _Doubles, unseen: _Doubles) -> _Doubles:
    from sklearn.linear_model import LogisticRegression

    if (targets == targets[0]).all():  # a fold of one class
        return np.full(len(unseen), targets[0])
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    return np.asarray(model.fit(features, targets).predict(unseen), float)


def _arrays(source: Source) -> xr.Dataset:
    return source if isinstance(source, xr.Dataset) else copy.copy(source).arrays


def _portions(dataset: xr.Dataset, choice: Choice, n_rows: int) -> Iterator[tuple[Choice, list[Block]]]:
    """Yield a choice in portions of as many layers as can be held, with the blocks of each."""
    blocks = blocks_of(dataset, choice)
    for stream in dict.fromkeys(block.stream for block in blocks):
        of_stream = [block for block in blocks if block.stream == stream]
        layers = list(dict.fromkeys(block.layer for block in of_stream))
        a_layer = 4 * n_rows * sum(block.n_units for block in of_stream) // len(layers)
        some = max(1, _PORTION_BYTES // max(1, a_layer))
        for start in range(0, len(layers), some):
            part = layers[start : start + some]
            yield (
                replace(choice, stream=stream, layers=part),
                [block for block in of_stream if block.layer in part],
            )


def _read(source: Source, choice: Choice, blocks: Sequence[Block]) -> list[tuple[Block, NDArray[np.float32]]]:
    dataset = _arrays(source)
    if blocks_of(dataset, choice) != list(blocks):
        raise SelectionError(
            f"{path_of(source) or 'an episode'}: holds other units than the first episode; probe runs of one "
            "policy and one choice of layers"
        )
    return [(found.block, found.values) for found in activations(dataset, choice)]
