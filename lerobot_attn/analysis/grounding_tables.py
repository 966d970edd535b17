"""What a run's grounding says: the table of all numbers, the ranking of maps, and the best one held out.

Reads no episode: `ground_episodes` has done so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from lerobot_attn.analysis.grounding import METRICS
from lerobot_attn.analysis.grounding_runs import Candidate, RunGrounding
from lerobot_attn.analysis.intervals import interval_of_mean, mean_of
from lerobot_attn.analysis.permutation import sign_flips
from lerobot_attn.errors import SelectionError

TABLE = (
    *("camera", "layer", "head", "denoise_step", "role", "metric"),
    *("value", "chance", "low", "high", "n_episodes", "n_inferences"),
)


@dataclass(frozen=True)
class Resampling:
    """How sure a number is, and how that is found out."""

    confidence: float = 0.95
    n_resamples: int = 1000
    n_flips: int = 10_000
    seed: int = 0


def grounding_table(run: RunGrounding, how: Resampling | None = None) -> pd.DataFrame:
    """Return every number as a tidy table, `TABLE` naming its columns.

    `value` is the mean over an episode's inferences, then over episodes; `chance` is that of a uniform map,
    which of mass is the mask's share of the area; `low` and `high` are the bootstrap interval of `value` over
    episodes, NaN of a single one. Of `centre_distance` less is better.
    """
    how = how or Resampling()
    labels = pd.MultiIndex.from_product(
        [run.layers, run.heads, run.denoise_steps], names=["layer", "head", "denoise_step"]
    )
    pieces = []
    for c, camera in enumerate(run.cameras):
        for r, role in enumerate(run.roles):
            for m, metric in enumerate(METRICS):
                values = np.asarray(run.value[:, c, :, :, :, r, m], float).reshape(run.n_episodes, -1)
                low, high = interval_of_mean(values, how.confidence, how.n_resamples, how.seed)
                n_episodes = np.isfinite(values).sum(axis=0)
                chance = mean_of(run.uniform[:, c, r, m])
                found = {"value": mean_of(values), "chance": chance, "low": low, "high": high}
                piece = labels.to_frame(index=False).assign(
                    camera=camera,
                    role=role,
                    metric=metric,
                    **found,
                    n_episodes=n_episodes,
                    n_inferences=run.n_inferences[c, :, :, :, r, m].ravel(),
                )
                pieces.append(piece[piece["n_episodes"] > 0])
    return pd.concat(pieces, ignore_index=True)[list(TABLE)]


def ranking(
    run: RunGrounding,
    *,
    role: str = "target",
    metric: str = "mass",
    step: int = -1,
    how: Resampling | None = None,
) -> pd.DataFrame:
    """Rank every camera, layer and head by how much more it lies on a role than chance would.

    Args:
        run: of `ground_episodes`.
        role: of the run's roles.
        metric: of `METRICS`.
        step: position among the run's denoise steps.
        how: of intervals and of the test.

    Returns:
        The best first: camera, layer, head, value with low and high, uniform, fixed, centre, `above` (value
        minus the better chance level of each episode), and p by `sign_flips`,
        corrected for all rows. Its attribute `smallest_p` is the smallest p that so few episodes can give.

    Raises:
        SelectionError: the run has no such role or metric.
    """
    how = how or Resampling()
    check_role_and_metric(run, role, metric)
    above = run.above_chance(step, role, metric)
    flips = sign_flips(above, n_flips=how.n_flips, seed=how.seed)
    rows = []
    for index, candidate in enumerate(run.candidates):
        levels = run.levels(candidate, step, role, metric)
        low, high = interval_of_mean(levels["value"][:, None], how.confidence, how.n_resamples, how.seed)
        means = {name: float(mean_of(values)) for name, values in levels.items()}
        ends = {"low": float(low[0]), "high": float(high[0])}
        rows.append({**candidate._asdict(), **means, **ends, "p": flips.p_corrected[index]})
    table = pd.DataFrame(rows).assign(above=mean_of(above))
    table = table.sort_values("above", ascending=False, kind="stable", na_position="last", ignore_index=True)
    table.attrs["smallest_p"] = flips.smallest
    return table


class HeldOut(NamedTuple):
    """The map that did best on one half of the episodes, measured on the other half.

    Attributes:
        candidate: the map.
        chosen_on: the episodes' positions that it was chosen on.
        reported_on: those that it is reported on; the same where there is one episode alone.
        p: one-sided p-value of one sign-flip test on these; None where it was not held out.
    """

    candidate: Candidate
    chosen_on: list[int]
    reported_on: list[int]
    p: float | None

    @property
    def is_held_out(self) -> bool:
        """Whether it is reported on other episodes than it was chosen on."""
        return self.p is not None


def held_out(
    run: RunGrounding, *, role: str, metric: str, step: int = -1, how: Resampling | None = None
) -> HeldOut:
    """Choose the best map on every second episode, and test it on the others.

    Raises:
        SelectionError: the run has no such role or metric, or the role is never visible.
    """
    how = how or Resampling()
    check_role_and_metric(run, role, metric)
    above = run.above_chance(step, role, metric)
    known = np.flatnonzero(np.isfinite(above).any(axis=1)).tolist()
    if not known:
        raise SelectionError(f"role {role!r} is never visible: no camera's mask shows it")
    chosen, reported = known[::2], known[1::2] or known[::2]
    means = np.nan_to_num(mean_of(above[chosen]), nan=-np.inf)
    best = int(means.argmax())
    p = float(sign_flips(above[reported][:, [best]], n_flips=how.n_flips, seed=how.seed).p[0])
    return HeldOut(run.candidates[best], chosen, reported, p if len(known) > 1 else None)


def check_role_and_metric(run: RunGrounding, role: str, metric: str) -> None:
    """Check that a run has a role, and that there is a metric.

    Raises:
        SelectionError: it does not.
    """
    if role not in run.roles:
        raise SelectionError(f"role {role!r}: the run's scenes have {', '.join(run.roles) or 'none'}")
    if metric not in METRICS:
        raise SelectionError(f"metric {metric!r}: expected one of {', '.join(METRICS)}")
