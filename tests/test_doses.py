"""Doses and random draws: a planted dose–response is recovered, a planted inert set is not."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import zarr
from test_inspection import run_cli

from lerobot_attn import figures
from lerobot_attn.analysis.dose_words import verdicts
from lerobot_attn.analysis.doses import DOSE_COLUMNS, dose_effects, dose_slopes, dose_table, holm, sides
from lerobot_attn.figures import dose_figure
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

DOSES, N_DRAWS, N_STATES = (1.0, 2.0, 4.0), 5, 12
FAST = {"n_resamples": 400}


def table(fired, *, random=lambda dose, draw: 0.0, prompt=0.0, n=N_STATES, expectation=None, seed=0):
    """Episodes of a plan `high`: a lift of 0.3 m, and what is added to it; every state has its own height."""
    rng = np.random.default_rng(seed)
    states = 0.3 + rng.normal(0, 0.03, n)
    rows = []

    def add(condition, by, base=None, dose=math.nan, draw=math.nan, control_of=None):
        for index, height in enumerate(states):
            rows.append(
                {
                    "experiment": "steer",
                    "condition": condition,
                    "control_of": control_of,
                    "base": base or condition,
                    "dose": dose,
                    "draw": draw,
                    "outcome": "lift_height",
                    "expectation": expectation,
                    "task_group": "libero_object",
                    "task_id": 0,
                    "episode_index": index,
                    "seed": index,
                    "success": 1.0,
                    "lift_height": height + by + rng.normal(0, 0.004),
                }
            )

    add("baseline", 0.0)
    for dose in DOSES:
        add(f"high_dose{dose:g}", fired(dose), "high", dose)
        for draw in range(N_DRAWS):
            name = f"random_dose{dose:g}_draw{draw}"
            add(name, random(dose, draw), "random", dose, draw, f"high_dose{dose:g}")
    add("prompt", prompt, control_of="high")
    return pd.DataFrame(rows)


def of_outcome(effects):
    return {(e.side.name, e.control.name): e for e in effects if e.metric == "lift_height"}


def test_a_planted_dose_response_is_recovered():
    episodes = table(lambda dose: 0.01 * dose, expectation="Higher.")
    effects = dose_effects(episodes, **FAST)
    found = of_outcome(effects)
    for dose in DOSES:
        effect = found[f"high_dose{dose:g}", f"random_dose{dose:g}"]
        assert effect.difference == pytest.approx(0.01 * dose, abs=0.004)
        assert (effect.n, effect.n_beyond, len(effect.control.members)) == (N_STATES, N_DRAWS, N_DRAWS)
        assert effect.is_shown
        assert effect.low < 0.01 * dose < effect.high
    assert {("high_dose1", "prompt"), ("high_dose1", "baseline"), ("random_dose1", "baseline")} < set(found)
    (slope,) = dose_slopes(episodes, "lift_height", **FAST)
    assert slope.slope == pytest.approx(0.01, abs=0.002)
    assert slope.low > 0.008
    assert (slope.n_draws, slope.n_beyond) == (N_DRAWS, N_DRAWS)
    said = verdicts(episodes, effects, [slope])
    assert said[:2] == [
        "Asked before the run: mean height of the lift.",
        "Expected before the run: Higher.",
    ]
    assert "high: an effect of these units, up at dose 1, 2, 4 of 3 doses." in said
    assert sum("no effect of these units shown" in line for line in said) == 0
    assert any(line.startswith("high: +1.1 cm a unit of dose") and "it grows" in line for line in said)
    assert any(line.startswith("prompt, the control without firing: ") for line in said)


def test_what_random_units_do_as_well_is_no_effect_of_these_units():
    """Firing anything lifts the hand by 2 cm a dose: against the baseline alone it would look like a find."""
    episodes = table(lambda dose: 0.02 * dose, random=lambda dose, draw: 0.02 * dose, seed=1)
    effects = dose_effects(episodes, **FAST)
    found = of_outcome(effects)
    assert found["high_dose4", "baseline"].low > 0.05
    assert not any(found[f"high_dose{dose:g}", f"random_dose{dose:g}"].is_shown for dose in DOSES)
    said = verdicts(episodes, effects, dose_slopes(episodes, "lift_height", **FAST))
    assert "high: no effect of these units shown in 3 doses." in said
    (line,) = [line for line in said if line.startswith("high_dose4: ")]
    assert line.startswith("high_dose4: +8.")
    assert re.search(r"its 5 random draws \+[78]\.", line)
    assert line.endswith("no effect of these units shown.")
    assert any("no growth with the dose shown" in line for line in said)


def test_an_inert_set_is_seldom_called_an_effect():
    shown = [
        effect.is_shown
        for seed in range(8)
        for effect in of_outcome(dose_effects(table(lambda dose: 0.0, seed=seed), n_resamples=200)).values()
        if effect.control.is_random and effect.side.base == "high"
    ]
    assert len(shown) == 8 * len(DOSES)
    assert sum(shown) <= 2


def test_a_set_that_one_draw_outdoes_is_no_effect_of_these_units():
    """The mean of the draws is far below, but one of five random sets lifts as high."""
    episodes = table(lambda dose: 0.03, random=lambda dose, draw: 0.05 if draw == 3 else 0.0)
    effect = of_outcome(dose_effects(episodes, **FAST))["high_dose1", "random_dose1"]
    assert effect.low > 0
    assert (effect.n_beyond, effect.is_shown) == (4, False)


def test_draws_are_pooled_state_by_state():
    episodes = table(lambda dose: 0.01)
    alone = (episodes.condition == "random_dose1_draw0") & (episodes.episode_index < 3)
    episodes.loc[alone, "lift_height"] = np.nan  # the other draws stand for it
    gone = episodes.condition.str.startswith("random_dose1") & (episodes.episode_index == 5)
    episodes.loc[gone, "lift_height"] = np.nan  # no draw has this one
    effect = of_outcome(dose_effects(episodes, **FAST))["high_dose1", "random_dose1"]
    wide = episodes.pivot(index="episode_index", columns="condition", values="lift_height")
    draws = wide[[f"random_dose1_draw{draw}" for draw in range(N_DRAWS)]].mean(axis=1)
    expected = (wide["high_dose1"] - draws).dropna()
    assert effect.n == len(expected) == N_STATES - 1
    assert effect.difference == pytest.approx(expected.mean())
    written = dose_table([effect])
    assert tuple(written.columns) == DOSE_COLUMNS
    assert written.loc[0, ["condition", "dose", "control", "draws"]].tolist() == [
        *("high_dose1", 1.0, "random_dose1", 5),
    ]


def test_holm_has_its_values():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_is_over_the_doses():
    found = of_outcome(dose_effects(table(lambda dose: 0.001 * dose), **FAST))
    own = [found[f"high_dose{dose:g}", f"random_dose{dose:g}"] for dose in DOSES]
    assert [one.p_holm for one in own] == pytest.approx(holm([one.p for one in own]))


def test_without_random_draws_nothing_is_said_of_the_units():
    episodes = table(lambda dose: 0.01 * dose)
    bare = episodes[~episodes.condition.str.startswith("random")]
    said = verdicts(bare, dose_effects(bare, **FAST))
    assert (
        "high: nothing is known of random draws as its control, so nothing can be said of its units." in said
    )
    one = episodes[episodes.episode_index == 0]
    assert (
        sum("nothing can be said from 1 initial states" in s for s in verdicts(one, dose_effects(one))) == 3
    )


def test_where_nothing_was_lifted_that_is_said():
    episodes = table(lambda dose: 0.02 * dose)
    episodes.loc[episodes.condition == "high_dose4", "lift_height"] = np.nan
    few = (episodes.condition == "high_dose2") & (episodes.episode_index < 5)
    episodes.loc[few, "lift_height"] = np.nan
    said = verdicts(episodes, dose_effects(episodes, **FAST))
    assert (
        "high_dose4: the mean height of the lift is known in 0 of 12 episodes, so nothing can be said of it."
    ) in said
    (line,) = [line for line in said if line.startswith("high_dose2: ")]
    assert "; the mean height of the lift is known in 7 of 12 episodes" in line
    assert any(line.startswith("high: ") and "of 2 doses" in line for line in said)


def test_sides_put_the_draws_together():
    found = sides(table(lambda dose: 0.0))
    assert [side.name for side in found[:3]] == ["baseline", "high_dose1", "random_dose1"]
    assert len(found) == 2 + 2 * len(DOSES)


# Stores


def record(folder, condition, index, rises, **said):
    """Write an episode whose hand closes its gripper and rises."""
    names = ["eef_x", "eef_y", "eef_z", "gripper_left", "gripper_right"]
    n_frames = 12
    plan = SyntheticPlan(
        **{"n_frames": n_frames, "layers": (), "n_layers": 1, "n_heads": 1, "n_denoise_steps": 1},
        **{"grid": (2, 2), "image_px": {"observation.images.image": (8, 8)}, "n_empty_cameras": 0},
        **{"task_group": "libero_object", "episode_index": index, "seed": index, "videos": False},
        n_state=len(names),
    )
    path = write_planted_episode(folder / condition, plan)
    group = zarr.open_group(path, mode="r+")
    group["state_dim"][:] = np.array(names, dtype=object)
    opening = np.where(np.arange(n_frames) < 3, 0.08, 0.04)
    height = 0.1 + np.clip((np.arange(n_frames) - 3) / 8, 0, 1) * (rises + 0.01 * index)
    group["state"][:] = np.stack([0 * height, 0 * height, height, opening / 2, -opening / 2], axis=1)
    file = path / "zarr.json"
    document = json.loads(file.read_text())
    document["attributes"]["experiment"] = {
        "name": "steer",
        "condition": condition,
        "control_of": None,
        **said,
    }
    file.write_text(json.dumps(document))


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """Dose 2 lifts twice as much higher as dose 1; two draws do nothing."""
    out, asked = tmp_path_factory.mktemp("steered"), {"outcome": "lift_height", "expectation": "Up"}
    for index in range(2):
        record(out, "baseline", index, 0.2, **asked)
        for dose in (1, 2):
            told = {**asked, "dose": dose}
            record(out, f"high_dose{dose}", index, 0.2 + 0.1 * dose, base="high", **told)
            for draw in range(2):
                name, of = f"random_dose{dose}_draw{draw}", f"high_dose{dose}"
                record(out, name, index, 0.2, base="random", draw=draw, control_of=of, **told)
        record(out, "prompt", index, 0.21, control_of="high", **asked)
    return out


def test_the_command_writes_doses(steered, tmp_path, monkeypatch, capsys):
    drawn, captions = [], []

    def noting(columns, caption, **options):
        drawn.extend(columns)
        captions.append(caption)
        return dose_figure(columns, caption, **options)

    monkeypatch.setattr(figures, "dose_figure", noting)
    status, out, error = run_cli(monkeypatch, capsys, "effects", steered, "-o", tmp_path)
    assert status == 0, error
    lines = out.splitlines()
    assert lines[:2] == [
        "Asked before the run: mean height of the lift.",
        "Expected before the run: Up.",
    ]
    # Of two states no sign-flip test can be small: nothing is claimed.
    assert "high: no effect of these units shown in 2 doses." in lines
    assert {f"Wrote {tmp_path / name}" for name in ("doses.csv", "doses.png")} <= set(lines)
    written = pd.read_csv(tmp_path / "doses.csv")
    row = written[(written.condition == "high_dose2") & (written.control == "random_dose2")]
    row = row[row.metric == "lift_height_max"].iloc[0]
    assert (row.difference, row.draws, row.n) == (pytest.approx(0.2), 2, 2)
    report = (tmp_path / "report.md").read_text()
    assert "## Doses and random draws" in report
    assert "doses.png" in report
    assert "| high_dose2 | random_dose2_draw1 | " in report  # each draw by itself, in the outcome
    assert "against random_dose2_draw1" not in report
    assert captions[0].facts[-1].endswith(", 2 pairs")
    ((name, label, heights, points),) = drawn
    assert (name, label.endswith(", cm")) == ("high", True)
    lines = {line.name: line for line in heights}
    assert list(lines) == ["baseline", "high_dose1", "high_dose2", "prompt", "random_dose2 (2 draws)"]
    assert {line.n for line in heights} == {2}  # initial states, of draws too
    assert lines["high_dose2"].height[-1] == pytest.approx(0.1 + 0.4 + 0.005)
    assert {point.name: len(point.draws) for point in points} == {"high": 0, "random": 2, "prompt": 0}
    assert max(point.difference for point in points) == pytest.approx(9.0, abs=1.5)  # cm
    alone = pd.read_csv(tmp_path / "effects.csv")
    assert {"random_dose2_draw0", "random_dose2_draw1", "prompt"} <= set(alone.control)
