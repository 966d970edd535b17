"""Effects of interventions: planted differences come out, and where there is none, none is claimed."""

import json
import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
import zarr
from test_inspection import run_cli

from lerobot_attn import figures
from lerobot_attn.analysis import effects as fx
from lerobot_attn.analysis.behaviour import approached, chunk_difference, given_instruction, named_objects
from lerobot_attn.analysis.intervals import paired_interval
from lerobot_attn.errors import SelectionError
from lerobot_attn.figures import effects_figure
from lerobot_attn.report import find_effects, write_effects
from lerobot_attn.store.reader import open_episode, open_run
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

# Tables


def table(**outcomes):
    """A tidy table of condition → (success, path) an episode; `blocked` has `random` as its control."""
    rows = [
        {
            "experiment": "test",
            "condition": condition,
            "control_of": "blocked" if condition == "random" else None,
            "task_group": "libero_object",
            "task_id": index // 50,
            "episode_index": index % 50,
            "seed": 1000 + index,
            "success": float(success),
            "path_length": path,
        }
        for condition, episodes in outcomes.items()
        for index, (success, path) in enumerate(episodes)
    ]
    return pd.DataFrame(rows)


def by_name(effects):
    return {(effect.condition, effect.control, effect.metric): effect for effect in effects}


def test_planted_differences_come_out():
    """Blocking costs 12 of 20 successes and 0.25 m of path; the control changes nothing."""
    paths = np.random.default_rng(0).uniform(1, 2, 20)
    frame = table(
        baseline=[(True, path) for path in paths],
        blocked=[(index >= 12, path - 0.25) for index, path in enumerate(paths)],
        random=[(True, path) for path in paths],
    )
    found = by_name(fx.paired_effects(frame, n_resamples=2000))
    assert set(found) == set(
        product([("blocked", "random"), ("blocked", "baseline"), ("random", "baseline")], ["_"])
    ) or set(found) == {
        (*sides, metric)
        for sides in (("blocked", "random"), ("blocked", "baseline"), ("random", "baseline"))
        for metric in ("success", "path_length")
    }
    success = found["blocked", "random", "success"]
    assert (success.difference, success.n, success.a, success.b) == (-0.6, 20, 0.4, 1.0)
    assert (success.n_only_condition, success.n_only_control) == (0, 12)
    assert success.p == pytest.approx(2 / 2**12)
    assert -0.9 < success.low < -0.6 < success.high < -0.3
    assert success.is_shown
    path = found["blocked", "random", "path_length"]
    assert (path.difference, path.low, path.high) == pytest.approx((-0.25, -0.25, -0.25))
    assert path.p < 1e-3
    nothing = found["random", "baseline", "success"]
    assert (nothing.difference, nothing.low, nothing.high, nothing.p) == (0, 0, 0, 1)
    assert not nothing.is_shown
    written = fx.effects_table(list(found.values()))
    assert tuple(written.columns) == (
        *("experiment", "condition", "control", "metric", "difference", "low", "high", "n", "p"),
    )
    assert len(written) == 6


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1),
        (1, 0, 1),
        (5, 0, 0.0625),
        (0, 6, 0.03125),
        (10, 2, 0.0385742),
        (7, 7, 1),
        (25, 9, 0.0090412),
    ],
)
def test_mcnemar_has_the_binomials_values(only_a, only_b, p):
    assert fx.mcnemar(only_a, only_b) == pytest.approx(p, abs=1e-6)
    if only_a + only_b:
        from scipy.stats import binomtest

        assert fx.mcnemar(only_a, only_b) == pytest.approx(binomtest(only_a, only_a + only_b).pvalue)


@pytest.mark.parametrize(("discordance", "pairs"), [(0, 77), (0.1, 77), (0.2, 155), (0.5, 391), (1, 783)])
def test_needed_pairs_find_the_difference_as_often_as_they_say(discordance, pairs):
    n = fx.episodes_needed(discordance)
    assert n == pytest.approx(pairs, abs=2)
    if discordance <= 0.1:  # every unlike pair is for one side: the formula is on the safe side
        return
    rng = np.random.default_rng(0)
    share = (discordance + 0.1) / 2  # of pairs in which only one side succeeds
    drawn = rng.multinomial(n, [share, discordance - share, 1 - discordance], 400)
    found = np.mean([(a - b) ** 2 / max(1, a + b) > 1.959964**2 for a, b, _ in drawn])
    assert 0.74 < found < 0.87


def test_where_nothing_differs_intervals_hold_zero_as_often_as_they_say():
    rng = np.random.default_rng(0)
    for draw in (
        lambda: rng.normal(0, 1, 40),
        lambda: rng.exponential(1, 40) - rng.exponential(1, 40),
        lambda: rng.choice([-1.0, 0, 1], 40, p=[0.2, 0.6, 0.2]),
    ):
        holds = [
            low <= 0 <= high
            for low, high in (paired_interval(draw(), n_resamples=800, seed=s) for s in range(1000))
        ]
        assert 0.93 < np.mean(holds) < 0.97


def test_where_nothing_differs_rarely_a_difference_is_said_to_be_shown():
    rng = np.random.default_rng(1)
    shown = 0
    for _ in range(60):
        sides = {
            name: list(zip(rng.random(30) < 0.6, rng.normal(2, 0.3, 30), strict=True))
            for name in ("baseline", "blocked")
        }
        found = fx.paired_effects(table(**sides), n_resamples=300)
        shown += sum(effect.is_shown for effect in found)
        for effect in found:
            assert ("no difference shown" in fx.sentence(effect)) is not effect.is_shown
    assert shown <= 12  # of 120; 5 % would be 6


def test_sign_flips_agree_with_an_exact_count():
    frame = table(
        baseline=[(True, 0.0)] * 8,
        blocked=[(True, value) for value in (0.3, 0.5, 0.1, -0.2, 0.4, 0.6, 0.2, 0.7)],
    )
    (effect,) = [e for e in fx.paired_effects(frame, n_resamples=200) if e.metric == "path_length"]
    values = (0.3, 0.5, 0.1, -0.2, 0.4, 0.6, 0.2, 0.7)
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((1, -1), repeat=8)
    ]
    assert effect.p == pytest.approx(np.mean([s >= sum(values) - 1e-9 for s in sums]))


def test_what_has_no_partner_is_left_out_and_said():
    frame = table(baseline=[(True, 1.0)] * 6, blocked=[(False, 2.0)] * 8)
    frame.loc[(frame.condition == "blocked") & (frame.episode_index == 2), "seed"] = 7
    starts = [[0.0, 0.1]] * len(frame)
    starts[8] = [0.0, 0.2]  # blocked, episode 2: the seed says so already
    starts[9] = [0.0, 0.2]
    frame["start"] = starts
    pairing = fx.pairs(frame, "blocked", "baseline")
    assert pairing.condition.index.get_level_values("episode_index").tolist() == [0, 1, 4, 5]
    assert pairing.left_out == (
        "blocked: libero_object_0 episode 6, libero_object_0 episode 7 without a partner in baseline",
        "blocked and baseline: libero_object_0 episode 2 with another seed",
        "blocked and baseline: libero_object_0 episode 3 with another first scene",
    )
    assert {effect.n for effect in fx.paired_effects(frame, n_resamples=200)} == {4}


def test_metrics_are_compared_where_both_sides_have_them():
    frame = table(baseline=[(True, 1.0)] * 4, blocked=[(True, 1.5)] * 4)
    frame.loc[0, "path_length"] = np.nan
    found = by_name(fx.paired_effects(frame, n_resamples=200))
    assert found["blocked", "baseline", "path_length"].n == 3
    assert found["blocked", "baseline", "success"].n == 4


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (table(baseline=[(True, 1.0)]), "one condition alone"),
        (pd.concat([table(baseline=[(1, 1.0)], b=[(1, 1.0)])] * 2), "b: two episodes 0 of libero_object_0"),
    ],
)
def test_tables_that_cannot_be_compared_are_one_line(frame, message):
    with pytest.raises(SelectionError, match=message):
        fx.paired_effects(frame)


def test_sentences_claim_no_more_than_was_found():
    paths = np.linspace(1, 2, 40)
    frame = table(
        baseline=[(True, path) for path in paths],
        blocked=[(index < 10, path) for index, path in enumerate(paths)],
        random=[(index > 0, path) for index, path in enumerate(paths)],
    )
    found = by_name(fx.paired_effects(frame, n_resamples=1000))
    shown = fx.sentence(found["blocked", "random", "success"])
    assert shown.startswith(
        "blocked against random, success: 25 % against 98 % in 40 pairs, -72 points (95% interval -8"
    )
    assert "no difference" not in shown
    not_shown = fx.sentence(found["random", "baseline", "success"])
    assert "; no difference shown (one of 10 points would need about 77 pairs)" in not_shown
    alike = fx.sentence(found["random", "baseline", "path_length"])
    assert "no difference shown" in alike
    few = fx.paired_effects(frame[frame.episode_index < 3], n_resamples=200)
    assert all(fx.sentence(effect).endswith("an interval of so few pairs is rough.") for effect in few)
    one = fx.paired_effects(frame[frame.episode_index < 1], n_resamples=200)
    assert all("nothing can be said from so few" in fx.sentence(effect) for effect in one)
    assert not any(effect.is_shown for effect in one)
    same = fx.paired_effects(table(baseline=[(True, 1.0)] * 20, blocked=[(True, 1.0)] * 20), n_resamples=200)
    assert "every pair alike, which also happens in 5% of such runs where 14 % of all pairs are unlike" in (
        fx.sentence(same[0])
    )


# Episodes

OBJECTS = {"soup_1": "target", "milk_1": "distractor", "sauce_2": "distractor", "basket_1": "destination"}
PLACES = {"soup_1": (0.5, 0.0), "milk_1": (0.0, 0.5), "sauce_2": (-0.5, 0.0), "basket_1": (0.0, 0.0)}
N_FRAMES = 12


def record(
    folder,
    condition,
    index,
    *,
    to="soup_1",
    lift=True,
    success=True,
    complete=True,
    control_of=None,
    task="soup",
):
    """Write an episode whose hand goes straight to an object, and perhaps lifts it."""
    plan = SyntheticPlan(
        n_frames=N_FRAMES,
        layers=(),
        n_layers=1,
        n_heads=1,
        n_denoise_steps=1,
        grid=(4, 4),
        image_px={"observation.images.image": (16, 16)},
        n_empty_cameras=0,
        objects=OBJECTS,
        task=f"pick up the {task} and place it in the basket",
        task_group="libero_object",
        episode_index=index,
        success=success,
        complete=complete,
        seed=1000 + index,
        videos=False,
    )
    path = write_planted_episode(folder / condition, plan)
    group = zarr.open_group(path, mode="r+")
    group["state_dim"][:] = np.array(["eef_x", "eef_y", "eef_z"], dtype=object)
    goal = np.array([*(PLACES[to] if to else (0.0, 0.0)), 0.0 if to else 1.0])
    start = np.array([0.0, 0.0, 1.0])
    group["state"][:] = start + np.linspace(0, 1, N_FRAMES)[:, None] * (goal - start)
    where = np.zeros((4, 5, 3), np.float32)
    where[:, 1:, :2] = [PLACES[name] for name in OBJECTS]
    where[:, 0] = np.nan
    if lift and to:
        where[-1, 1 + list(OBJECTS).index(to), 2] = 0.05
    group["instance_position"][:] = where
    chunk = np.ones((4, plan.n_queries, plan.n_actions), np.float32)
    chunk[0] += {"baseline": 0.0, "blocked": 0.5, "random": 0.1}.get(condition, 0.0)
    group["action_chunk"][:] = chunk
    file = path / "zarr.json"
    document = json.loads(file.read_text())
    said = {"name": "test", "condition": condition, "control_of": control_of}
    document["attributes"] |= {
        "experiment": said,
        "condition": {"name": condition, "text": f"{condition}: as planted", "interventions": []},
        "task": "pick up the soup and place it in the basket",  # the environment's
    }
    file.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Blocking sends half of the episodes to the milk, and costs their success; the control does nothing."""
    out = tmp_path_factory.mktemp("experiment")
    for index in range(6):
        goes_wrong = index % 2 == 1
        record(out, "baseline", index)
        record(out, "blocked", index, to="milk_1" if goes_wrong else "soup_1", success=not goes_wrong)
        record(out, "random", index, control_of="blocked")
    record(out, "blocked", 6, complete=False)
    record(out, "random", 7, control_of="blocked")
    return out


def test_an_episode_says_which_object_it_went_for(tmp_path):
    def went(**planted):
        return approached(
            open_episode(record(tmp_path, "x", len([*tmp_path.rglob("*.zarr")]), **planted)).arrays
        )

    lifted = went(to="milk_1")
    assert (lifted.name, lifted.how) == ("milk_1", "lifted")
    assert lifted.objects == ("soup_1", "milk_1", "sauce_2")  # the basket is no object to fetch
    assert lifted.targets == ("soup_1",)
    near = went(to="sauce_2", lift=False)
    assert (near.name, near.how) == ("sauce_2", "near")
    assert near.nearest_m["sauce_2"] == pytest.approx(0, abs=1e-6)
    assert near.nearest_m["soup_1"] > 0.1
    nowhere = went(to=None)
    assert (nowhere.name, nowhere.how) == ("", "")


def test_what_an_instruction_names():
    objects = ("alphabet_soup_1", "milk_1", "cream_cheese_2")
    assert named_objects("pick up the alphabet soup, please", objects) == ("alphabet_soup_1",)
    assert named_objects("Pick up the Milk and the milky way", objects) == ("milk_1",)
    assert named_objects("", objects) == ()


def test_chunks_differ_by_their_rms():
    a, b = np.zeros((3, 2), np.float32), np.full((3, 2), 0.5, np.float32)
    b[0] = np.nan  # a state token
    assert chunk_difference(a, b) == pytest.approx(0.5)
    with pytest.raises(SelectionError, match="got shapes"):
        chunk_difference(a, b[:2])


def test_an_experiments_stores_give_its_effects(experiment):
    found = find_effects(open_run(experiment))
    effects = by_name(found.effects)
    success = effects["blocked", "random", "success"]
    assert (success.difference, success.n, success.p) == (-0.5, 6, 0.25)
    assert effects["blocked", "baseline", "approached_target"].difference == -0.5
    assert effects["blocked", "random", "approached_named"].difference == -0.5
    # The hand goes down 1 m and 0.5 m aside.
    assert effects["blocked", "baseline", "path_length"].a == pytest.approx(math.hypot(1, 0.5), rel=1e-4)
    assert effects["blocked", "random", "action_difference"].difference == pytest.approx(0.4)
    assert effects["blocked", "baseline", "action_difference"].a == pytest.approx(0.5)
    assert math.isnan(effects["blocked", "baseline", "action_difference"].p)
    steps = effects["blocked", "random", "steps_to_success"]
    assert (steps.n, steps.a) == (3, N_FRAMES)  # pairs in which both succeeded
    assert "1 incomplete episode is left out" in found.notes
    assert "random: libero_object_0 episode 7 without a partner in baseline" in found.notes
    row = found.episodes.table.iloc[0]
    assert (row["approached"], row["n_objects"]) == ("soup_1", 3)


def test_the_words_are_those_that_the_policy_got(tmp_path):
    """The store's own tokens tell, whatever the environment's task says."""
    episode = open_episode(record(tmp_path, "swapped", 0, to="milk_1", task="milk"))
    assert given_instruction(episode.arrays) == "pick up the milk and place it in the basket"
    record(tmp_path, "baseline", 0)
    effects = by_name(find_effects(open_run(tmp_path)).effects)
    assert effects["swapped", "baseline", "approached_named"].a == 1
    assert effects["swapped", "baseline", "approached_target"].a == 0


def test_a_figure_of_single_pairs_promises_no_intervals(tmp_path, monkeypatch):
    for condition in ("baseline", "blocked"):
        record(tmp_path, condition, 0)
    captions = []

    def noting(table, labels, caption, **options):
        captions.append(" ".join(caption.facts))
        return effects_figure(table, labels, caption, **options)

    monkeypatch.setattr(figures, "effects_figure", noting)
    write_effects(open_run(tmp_path), tmp_path / "report")
    assert "no intervals: one pair each" in captions[0]
    assert "bootstrap" not in captions[0]


def test_the_command_writes_a_report(experiment, tmp_path, monkeypatch, capsys):
    status, out, error = run_cli(monkeypatch, capsys, "effects", experiment, "-o", tmp_path)
    assert status == 0, error
    assert "1 incomplete episode is left out" in error
    assert "blocked against random, success: 50 % against 100 % in 6 pairs, -50 points" in out
    names = ("effects.csv", "episodes.csv", "effects.png", "report.md", "report.html")
    assert [line for line in out.splitlines() if line.startswith("Wrote")] == [
        f"Wrote {tmp_path / name}" for name in names
    ]
    written = pd.read_csv(tmp_path / "effects.csv")
    assert list(written.columns) == list(fx.COLUMNS)
    assert set(written["control"]) == {"random", "baseline"}
    text = (tmp_path / "report.md").read_text()
    assert "random weights" in text
    assert "| blocked | as planted |  | 6 | 50 % |" in text
    assert "| blocked | 3 | 3 | 33 % |" in text  # of six, which object was approached; chance
    assert "blocked against random" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "effects.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_said(tmp_path):
    for condition in ("baseline", "blocked"):
        plan = SyntheticPlan(n_frames=3, layers=(), grid=(4, 4), videos=False, n_layers=1)
        file = write_planted_episode(tmp_path / condition, plan) / "zarr.json"
        document = json.loads(file.read_text())
        document["attributes"]["experiment"] = {"name": "test", "condition": condition, "control_of": None}
        file.write_text(json.dumps(document))
    found = find_effects(open_run(tmp_path))
    assert {effect.metric for effect in found.effects} == {"success", "action_difference", "steps_to_success"}
    assert found.notes == (
        "not measured in 2 episodes: end effector: the state has joint_0, joint_1, joint_2; expected eef_x, "
        "eef_y, eef_z",
    )
    bare = open_episode(record(tmp_path, "bare", 0)).arrays.drop_vars("instance_position")
    with pytest.raises(SelectionError, match=r"no instance_position; expected .* segmentation=true"):
        approached(bare)


def test_without_an_experiment_it_says_what_is_missing(tmp_path, monkeypatch, capsys):
    plan = SyntheticPlan(n_frames=3, layers=(), grid=(4, 4), videos=False, n_layers=1)
    write_planted_episode(tmp_path / "baseline", plan)
    status, _, error = run_cli(monkeypatch, capsys, "effects", tmp_path)
    assert status == 1
    assert error.splitlines()[-1] == "error: one condition alone (baseline), expected two or more to compare"


def test_thresholds_are_checked(experiment, monkeypatch, capsys):
    status, _, error = run_cli(monkeypatch, capsys, "effects", experiment, "--near", "-1")
    assert (status, error.splitlines()[-1]) == (
        1,
        "error: near: got -1.0, expected a number from 0.001 to 10",
    )
