"""Contrasts: planted neurons are found and survive the correction, and nothing is found in noise."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from activations import GROUPS, N_UNITS, SIZES, episode, noise

from lerobot_attn.analysis.areas import Areas, share_reached
from lerobot_attn.analysis.intervals import paired_interval
from lerobot_attn.analysis.neuron_contrast import ContrastDraws, contrast
from lerobot_attn.analysis.neurons import Choice, activations, blocks_of, units_of
from lerobot_attn.analysis.permutation import all_signs, largest, ranks, relabellings
from lerobot_attn.analysis.quantities import Rule, label, quantity
from lerobot_attn.errors import ConfigError, SelectionError

FEW = ContrastDraws(n_permutations=400, n_splits=2, n_held_out_permutations=19, n_resamples=100, top=5)


def between(n=20, n_first=10, n_inferences=6):
    """Labels of episodes, the first ones of the first group."""
    return [np.full(n_inferences, float(index < n_first)) for index in range(n)]


def top(found):
    return found.table.iloc[0]


# What is there


def test_activations_are_the_stored_ones_block_by_block():
    rng = np.random.default_rng(0)
    values = noise(rng, 5)
    steps = rng.standard_normal((5, 3, 1, 2, 1, 4))
    values[2, 1] = np.nan  # an inference without words
    values[3, 0, 0, 0, 0] = np.inf  # more than float16 holds
    data = episode(values, expert=steps)
    choice = Choice(groups=["image", "actions"], denoise_step="mean", reductions=("max",))
    with pytest.raises(SelectionError, match="actions"):
        blocks_of(data, Choice(stream="vlm", groups=["actions"]))
    found = list(activations(data, Choice(reductions=("mean", "max"), denoise_step="all")))
    assert [part.block for part in found] == blocks_of(
        data, Choice(reductions=("mean", "max"), denoise_step="all")
    )
    assert len(found) == 2 * 2 * 2 + 2 * 3
    by_place = {part.block[1:6]: part.values for part in found}
    for (g, group), (r, name), (k, layer) in itertools.product(
        enumerate(GROUPS), enumerate(("mean", "max")), enumerate((1, 3))
    ):
        expected = np.clip(values[:, g, r, k].astype(np.float16), -65504, 65504)
        np.testing.assert_array_equal(by_place["vlm", layer, group, name, None], expected)
    for s, step in enumerate((0, 4, 9)):
        expected = steps[:, s, 0, 1, 0].astype(np.float16)
        np.testing.assert_array_equal(by_place["expert", 2, "actions", "max", step], expected)
    mean = list(activations(data, Choice(stream="expert")))
    expected = steps.astype(np.float16).astype(np.float32)[:, :, 0, 0, 0].mean(axis=1)
    np.testing.assert_allclose(mean[0].values, expected, atol=1e-6)
    last = next(activations(data, Choice(stream="expert", denoise_step=-1)))
    assert last.block.denoise_step == 9
    assert choice.kind == "neurons"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(kind="residual"), "--eval.attention.residuals="),
        (Choice(stream="expert"), "none of the expert stream; record with --eval.attention.neurons="),
        (Choice(layers=[2]), "layer 2 was not recorded; recorded are 1, 3"),
        (Choice(groups=["state"]), "token group 'state' was not recorded"),
        (Choice(reductions=("median",)), "recorded are mean, max"),
        (Choice(stream="vision"), "expected vlm or expert"),
    ],
)
def test_what_was_not_recorded_is_said(choice, message):
    with pytest.raises(SelectionError, match=message.replace("(", r"\(")):
        blocks_of(episode(noise(np.random.default_rng(0), 3)), choice)


# Between episodes


def test_a_planted_neuron_is_found_between_episodes():
    rng = np.random.default_rng(1)
    values = [noise(rng, 6) for _ in range(20)]
    for planted in values[:10]:
        planted[:, 1, 0, 1, 7] += 3
    found = contrast([episode(v) for v in values], between(), how=ContrastDraws(n_permutations=1000))
    best = top(found)
    assert (best.stream, best.layer, best.unit, best.group, best.reduction) == ("vlm", 3, 7, "task", "mean")
    assert (best.auc, best.n_episodes) == (1, 20)
    assert best.p_corrected <= 0.01
    assert found.found() == 1
    assert found.table.p_corrected.iloc[1] > 0.05
    assert (found.kind, found.n_tried, found.n_first, found.n_second) == ("between", 4 * N_UNITS, 10, 10)
    # One of the ten that are chosen has an area of 1, the others of 0.5 in the mean.
    assert 0.51 < found.held_out.auc < 0.62
    assert found.table.auc_held_out.notna().sum() == 10
    assert found.held_out.null.mean() == pytest.approx(0.5, abs=0.02)
    assert list(found.table.columns[:11]) == [
        *("stream", "layer", "unit", "group", "reduction", "auc", "low", "high", "p_corrected"),
        *("auc_held_out", "n_episodes"),
    ]
    inner = found.table[found.table.auc < 1]
    assert ((inner.low < inner.auc) & (inner.auc < inner.high)).all()
    # The other way round, the unit fires less.
    other = contrast([episode(v) for v in values], [1 - own for own in between()], how=FEW)
    assert top(other).auc == 0


def test_the_area_is_that_of_all_pairs_of_episodes_within_their_tasks():
    rng = np.random.default_rng(2)
    values = [noise(rng, 1) for _ in range(12)]
    labels = [np.array([float(index % 2)]) for index in range(12)]
    tasks = ["a"] * 8 + ["b"] * 4
    for index, value in enumerate(values):
        value += 100 * (tasks[index] == "b")  # what a task adds says nothing of the label
    found = contrast([episode(v) for v in values], labels, strata=tasks, how=FEW)
    row = top(found)
    place = GROUPS.index(row.group), 0, (1, 3).index(row.layer), row.unit
    own = np.array([value[0][place] for value in values]).astype(np.float16)
    pairs = [
        (own[i] > own[j]) + 0.5 * (own[i] == own[j])
        for i in range(1, 12, 2)
        for j in range(0, 12, 2)
        if tasks[i] == tasks[j]
    ]
    assert len(pairs) == 4 * 4 + 2 * 2
    assert row.auc == pytest.approx(np.mean(pairs), abs=1e-6)


def test_a_task_that_one_group_alone_has_is_left_out_and_tasks_that_no_group_shares_are_said():
    rng = np.random.default_rng(3)
    data = [episode(noise(rng, 2)) for _ in range(10)]
    labels = between(10, 5, 2)
    found = contrast(data, labels, strata=["a"] * 9 + ["c"], how=FEW)
    assert (found.n_first, found.n_second) == (5, 4)
    assert any("one group alone" in note for note in found.notes)
    found = contrast(data, labels, strata=["a"] * 5 + ["b"] * 5, how=FEW)
    assert any("share no task" in note for note in found.notes)


# Within episodes


def late(rng, n_episodes, n_inferences=16):
    """Labels of moments, each episode's second part, which begins anywhere in its middle."""
    return [
        (np.arange(n_inferences) >= rng.integers(n_inferences // 3, 2 * n_inferences // 3)).astype(float)
        for _ in range(n_episodes)
    ]


def test_a_planted_neuron_is_found_within_episodes_and_told_from_the_course_of_time():
    """Unit 7 follows the label; unit 2 rises through every episode, as the label does, too."""
    rng = np.random.default_rng(4)
    values, labels = [noise(rng) for _ in range(12)], late(rng, 12)
    for planted, own in zip(values, labels, strict=True):
        planted[:, 1, 0, 1, 7] += 4 * own
        planted[:, 0, 0, 0, 2] += np.linspace(0, 8, 16)
    found = contrast([episode(v) for v in values], labels, how=ContrastDraws(n_chosen=2))
    rows = found.table.set_index(["layer", "unit", "group"])
    follows, rises = rows.loc[(3, 7, "task")], rows.loc[(1, 2, GROUPS[0])]
    assert found.kind == "within"
    assert found.found() == 2
    for row in (follows, rises):
        assert row.auc > 0.95
        assert row.p_corrected <= 0.01
    assert follows.p_beyond_time <= 0.01
    assert follows.auc_time < 0.9
    assert rises.p_beyond_time > 0.05
    assert rises.auc_time > 0.95
    assert found.held_out.auc > 0.95


def test_the_area_within_is_the_mean_of_the_episodes_own():
    rng = np.random.default_rng(5)
    values, labels = [noise(rng, 9) for _ in range(6)], late(rng, 6, 9)
    labels[0][:2] = np.nan
    labels[5][:] = 1  # one label alone: no part of it
    for value in values:
        value += 50 * rng.standard_normal()  # an episode's own level says nothing
    found = contrast([episode(v) for v in values], labels, how=FEW)
    row = top(found)
    place = GROUPS.index(row.group), 0, (1, 3).index(row.layer), row.unit
    areas = []
    for value, own in list(zip(values, labels, strict=True))[:5]:
        series = value.astype(np.float16)[(slice(None), *place)]
        more, less = series[own == 1], series[own == 0]
        areas.append(np.mean((more[:, None] > less) + 0.5 * (more[:, None] == less)))
    assert row.auc == pytest.approx(np.mean(areas), abs=1e-6)
    assert (row.low, row.high) == pytest.approx(np.clip(paired_interval(np.array(areas)), 0, 1), abs=0.04)
    assert row.n_episodes == 5
    assert any("1 episode with one of the two labels alone" in note for note in found.notes)


def naive_p(values, labels, rng, n=200):
    """What shuffling moments, as if they were independent, makes of the same episodes: the corrected p."""
    stacks = [ranks(v.reshape(len(v), -1)) for v in values]

    def best(labels):
        total = np.zeros(stacks[0].shape[1])
        for ranked, own in zip(stacks, labels, strict=True):
            n_more = own.sum()
            total += (own @ ranked - n_more * (n_more + 1) / 2) / (n_more * (len(own) - n_more)) - 0.5
        return np.abs(total).max()

    found = best(labels)
    return np.mean([best([rng.permutation(own) for own in labels]) >= found for _ in range(n)])


@pytest.mark.parametrize("kind", ["within", "between"])
def test_nothing_is_found_in_noise_that_resembles_itself_over_time(kind):
    """Random walks: in 40 runs hardly any is found, and held-out areas are 0.5; naive shuffling fails."""
    p, held, naive = [], [], []
    for seed in range(40):
        rng = np.random.default_rng([seed, 7])
        n = 12 if kind == "within" else 20
        values = [noise(rng, walks=True) for _ in range(n)]
        labels = late(rng, n) if kind == "within" else between(n, n // 2, 16)
        found = contrast([episode(v) for v in values], labels, how=FEW)
        p.append(top(found).p_corrected)
        held.append(found.held_out.auc)
        if kind == "within" and seed < 10:
            naive.append(naive_p([v[:, :, 0] for v in values], labels, rng))
    assert np.mean(np.array(p) <= 0.05) <= 0.05
    assert 0.35 < np.mean(p) < 0.75
    assert np.mean(held) == pytest.approx(0.5, abs=0.02)
    if naive:
        assert np.mean(np.array(naive) <= 0.05) >= 0.9


def test_interval_and_correction_are_of_episodes_not_of_moments():
    """Ten times as many inferences that are copies of each other say nothing more."""
    rng = np.random.default_rng(8)
    values, labels = [noise(rng, 4) for _ in range(8)], [np.array([0.0, 0, 1, 1])] * 8
    once = contrast([episode(v) for v in values], labels, how=FEW).table
    often = contrast(
        [episode(np.repeat(v, 10, axis=0)) for v in values],
        [np.repeat(own, 10) for own in labels],
        how=FEW,
    ).table
    pd.testing.assert_frame_equal(once, often, atol=1e-5)


# Permutations


def test_signs_and_relabellings_are_all_that_there_are_or_random_ones():
    rng = np.random.default_rng(0)
    signs, is_exact = all_signs(4, 16, rng)
    assert is_exact
    assert {tuple(row) for row in signs} == set(itertools.product([1, -1], repeat=4))
    assert all_signs(5, 16, rng)[1] is False
    first, strata = np.array([1, 1, 0, 0, 1, 0], bool), np.array([0, 0, 0, 0, 1, 1])
    labels, is_exact = relabellings(first, strata, 100, rng)
    assert is_exact
    assert len({tuple(row) for row in labels}) == len(labels) == 6 * 2
    drawn, is_exact = relabellings(first, strata, 11, rng)
    assert not is_exact
    for some in (labels, drawn):
        assert (some[:, :4].sum(axis=1) == 2).all()
        assert (some[:, 4:].sum(axis=1) == 1).all()


def test_the_largest_is_over_all_candidates():
    rng = np.random.default_rng(0)
    weights, values = rng.standard_normal((7, 5)), rng.standard_normal((5, 11))
    weights, values = weights.astype(np.float32), values.astype(np.float32)
    told = []
    found = largest(weights, values, offset=0.3, scale=2, progress=lambda *done: told.append(done))
    np.testing.assert_allclose(found, np.abs(2 * (weights @ values - 0.3)).max(axis=1), rtol=1e-4)
    assert told[-1] == (11, 11)


def test_the_smallest_p_is_what_so_few_episodes_can_give():
    rng = np.random.default_rng(0)
    values = [noise(rng, 4) for _ in range(5)]
    for value in values:
        value[2:, 0, 0, 0, 0] += 50
    found = contrast([episode(v) for v in values], [np.array([0.0, 0, 1, 1])] * 5, how=FEW)
    assert top(found).auc == 1
    assert top(found).p_corrected == found.smallest_p == 2 / 2**5
    areas = Areas(True, np.full((5, 1), 0.5, np.float32), np.zeros(5), np.ones(5, bool))
    draws, smallest = areas.draws(400, rng)
    assert share_reached(areas.largest(draws), np.array([0.5], np.float32), is_exact=True)[0] == smallest.p


# Labels


def test_labels_of_moments_and_of_episodes():
    heights = [np.array([0.0, 1, 2, 3]), np.array([2.0, 3, 4, np.nan])]
    found = label(Rule.parse("eef_z>median"), heights)  # of all seven: 2
    np.testing.assert_array_equal(found.labels[0], [0, 0, 0, 1])
    np.testing.assert_array_equal(found.labels[1], [0, 1, 1, np.nan])
    assert found.text == "eef_z > its median 2"
    own = label(Rule.parse("eef_z <= episode_median"), heights).labels
    np.testing.assert_array_equal(own[1], [1, 1, 0, np.nan])
    tasks = label(Rule.parse("eef_z>task_median"), [*heights, np.array([9.0, 10])], ["a", "a", "b"]).labels
    np.testing.assert_array_equal(tasks[1], [0, 1, 1, np.nan])  # above the 2 of the first task
    np.testing.assert_array_equal(tasks[2], [0, 1])  # above the 9.5 of the other
    # Of numbers of whole episodes each counts once, however long it was: the median is 2, not 1.
    once = label(Rule.parse("lift_height>task_median"), [np.ones(9), np.full(2, 2.0), np.full(2, 3.0)]).labels
    assert [own[0] for own in once] == [0, 0, 1]
    np.testing.assert_array_equal(label(Rule.parse("eef_z>=1.5"), heights).labels[0], [0, 0, 1, 1])
    words = [np.array(["grasp", "carry", None], object)]
    np.testing.assert_array_equal(label(Rule.parse("phase=carry"), words).labels[0], [0, 1, np.nan])
    np.testing.assert_array_equal(label(Rule.parse("phase!=carry"), words).labels[0], [1, 0, np.nan])
    np.testing.assert_array_equal(label(Rule.parse("success=false"), [np.zeros(2)]).labels[0], [1, 1])
    np.testing.assert_array_equal(label(Rule.parse("success"), [np.zeros(2)]).labels[0], [0, 0])


@pytest.mark.parametrize(
    ("text", "values", "message"),
    [
        ("eef_z", np.array([0.1, 0.9]), "is not 0 or 1; expected a comparison"),
        ("phase", np.array(["carry"], object), "expected one of its values, as phase=carry"),
        ("phase=fly", np.array(["carry"], object), "there are carry"),
        ("phase>carry", np.array(["carry"], object), "is a word"),
        ("eef_z>high", np.array([0.1, 0.9]), "expected a number, median, task_median or"),
        ("eef_z>", np.array([0.1]), "expected a quantity and what it is compared with"),
    ],
)
def test_a_rule_that_says_nothing_is_refused(text, values, message):
    with pytest.raises(SelectionError, match=message):
        label(Rule.parse(text), [values])


def test_quantities_of_an_episode():
    rng = np.random.default_rng(0)
    height = np.array([0.5, 0.6, np.nan, 0.9])
    data = episode(noise(rng, 4), height=height, attrs={"success": 1, "episode_index": 3})
    np.testing.assert_allclose(quantity(data, "eef_z"), height)
    np.testing.assert_allclose(quantity(data, "mean(eef_z)"), np.full(4, 2 / 3))
    np.testing.assert_allclose(quantity(data, "max( eef_z )"), np.full(4, 0.9))
    np.testing.assert_allclose(quantity(data, "time"), np.array([0, 3, 6, 9]) / 11)
    np.testing.assert_array_equal(quantity(data, "success"), np.ones(4))
    assert set(quantity(data, "condition")) == {"baseline"}
    assert set(quantity(data, "task")) == {"lift it"}
    quarters = [f"{which} quarter" for which in ("first", "second", "third", "last")]
    assert quantity(data, "phase").tolist() == quarters
    moving = data.drop_vars(["state", "state_dim"]).assign(
        state=(("frame", "state_dim"), np.arange(36.0).reshape(12, 3) / 35),
        state_dim=["eef_x", "eef_y", "eef_z"],
    )
    np.testing.assert_allclose(quantity(moving, "path_length"), np.full(4, 11 * 3 / 35 * np.sqrt(3)))
    table = pd.DataFrame({"episode": [3, 3, 4], "frame": [0, 9, 0], "force": [1.0, 2.0, 5.0]})
    np.testing.assert_array_equal(quantity(data, "force", table=table), [1, np.nan, np.nan, 2])
    whole = pd.DataFrame({"episode": [3, 4], "task_id": [0, 0], "grip": ["firm", "loose"]})
    data.attrs["task_id"] = 0
    assert quantity(data, "grip", table=whole).tolist() == ["firm"] * 4
    with pytest.raises(SelectionError, match="2 rows"):
        quantity(data, "force", table=table.drop(columns="frame"))
    with pytest.raises(SelectionError, match="weight is missing"):
        quantity(data, "weight", table=table)
    for name, message in {
        "eef_q": "it has eef_x, eef_z, time",
        "mean(task)": "expected a number",
        "position:cup.q": "expected position:INSTANCE.x",
        "distance:cup": "--eval.attention.segmentation=true",
    }.items():
        with pytest.raises(SelectionError, match=message):
            quantity(data, name)


# Bad input


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (between(10, 10), "one group is empty: the label holds of 10 episodes and not of 0"),
        (between(10, 3), "holds of 3 episodes and not of 7; expected 4 or more of each"),
        ([np.array([0.0, 1, 1, 0, 0, 0])] * 3, "3 episodes have moments of both groups; expected 4 or more"),
        ([np.full(6, np.nan)] * 10, "one group is empty"),
    ],
)
def test_too_few_episodes_are_refused(labels, message):
    rng = np.random.default_rng(0)
    with pytest.raises(SelectionError, match=message):
        contrast([episode(noise(rng, 6)) for _ in labels], labels)


def test_episodes_of_other_layers_are_refused_and_groups_without_tokens_are_not_tried():
    rng = np.random.default_rng(0)
    data = [episode(noise(rng, 2)) for _ in range(10)]
    other = data[4].assign_coords(vlm_neuron_layer=[1, 2])
    with pytest.raises(SelectionError, match="holds other units than the first episode"):
        contrast([*data[:4], other, *data[5:]], between(10, 5, 2), how=FEW)
    values = noise(rng, 2)
    values[:, 1] = np.nan
    found = contrast([*data[:4], episode(values), *data[5:]], between(10, 5, 2), how=FEW)
    assert found.n_tried == 2 * N_UNITS
    assert set(found.table.group) == {GROUPS[0]}
    assert "not tried, because some episodes have no such tokens: vlm task" in found.notes


# Found sets


def test_units_of_reads_a_found_set(tmp_path):
    file = tmp_path / "found.csv"
    pd.DataFrame(
        [
            ("expert", 3, 9, "high", 0.9),
            ("vlm", 1, 4, "high", 0.1),
            ("expert", 3, 9, "up", 0.9),
            ("expert", 3, 2, "up", 0.8),
        ],
        columns=["stream", "layer", "unit", "word", "auc"],
    ).to_csv(file, index=False)
    assert units_of(file) == {"expert": {3: [9, 2]}, "vlm": {1: [4]}}
    assert units_of(file, top=2) == {"expert": {3: [9]}, "vlm": {1: [4]}}
    assert units_of(file, word="up") == {"expert": {3: [9, 2]}}
    assert units_of(file, side="less") == {"vlm": {1: [4]}}
    assert units_of(file, side="more", top=1) == {"expert": {3: [9]}}
    assert json.loads(json.dumps(units_of(file)["vlm"])) == {"1": [4]}  # plain numbers
    for options, message in (
        ({"word": "down"}, "holds no unit of word down"),
        ({"colour": "red"}, "colour is missing"),
        ({"top": 0}, "expected 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            units_of(file, **options)
    file.write_text("stream,layer,unit\nvlm,1,x\n")
    with pytest.raises(ConfigError, match="unit x; expected vlm or expert and whole numbers"):
        units_of(file)
    with pytest.raises(ConfigError, match="expected a CSV table"):
        units_of(tmp_path / "none.csv")
    assert SIZES == (2, 2, 2, N_UNITS)
