"""Probes: a planted quantity is read, on episodes that were not trained on; shuffled values are not."""

import sys

import numpy as np
import pytest
from activations import episode, noise

from lerobot_attn.analysis.neurons import Choice
from lerobot_attn.analysis.probes import Draws, probe
from lerobot_attn.errors import SelectionError, SetupError

try:
    import sklearn
except ImportError:
    sklearn = None

needs_sklearn = pytest.mark.skipif(
    sklearn is None, reason="scikit-learn is not installed: lerobot_policy_attn[dev]"
)


def walk(rng, n=16):
    """A quantity that resembles itself over time, each episode's its own."""
    return np.cumsum(rng.standard_normal(n)) / 4 + rng.standard_normal()


@needs_sklearn
def test_a_planted_quantity_is_read_where_it_is_and_shuffled_values_are_not():
    rng = np.random.default_rng(0)
    values, heights = [noise(rng) for _ in range(12)], [walk(rng) for _ in range(12)]
    direction = rng.standard_normal(10)
    for value, height in zip(values, heights, strict=True):
        value[:, 1, 0, 1] += height[:, None] * direction
    told = []
    found = probe(
        [episode(v) for v in values], heights, progress=lambda done, total: told.append((done, total))
    )
    assert found.task == "regression"
    assert told[-1][0] == told[-1][1]
    best = found.places.iloc[0]
    assert (best.kind, best.stream, best.layer, best.group) == ("neurons", "vlm", 3, "task")
    assert best.score > 0.9
    assert best.low < best.score < best.high
    assert best.p_corrected == pytest.approx(1 / 21)
    assert best.shuffled < 0.2
    rest = found.places.iloc[1:]
    assert (rest.score < 0.15).all()
    assert (rest.p_corrected > 0.05).all()
    assert found.time_score < 0.2
    # Classes of the same.
    words = [np.where(height > 0, "high", "low").astype(object) for height in heights]
    words[0][:3] = None
    found = probe([episode(v) for v in values], words)
    best = found.places.iloc[0]
    assert (found.task, found.classes, found.chance) == ("classification", ("high", "low"), 0.5)
    assert (best.layer, best.group) == (3, "task")
    assert best.score > 0.85
    assert best.p_corrected == pytest.approx(1 / 21)
    assert best.n_inferences == 12 * 16 - 3
    assert found.places.shuffled.mean() == pytest.approx(0.5, abs=0.08)


@needs_sklearn
def test_nothing_is_read_from_walks_that_have_nothing_to_do_with_the_quantity():
    """Both resemble themselves over time, so moments of an episode on both sides of a split would be read."""
    p, score = [], []
    for seed in range(12):
        rng = np.random.default_rng([seed, 3])
        data = [episode(noise(rng, walks=True)) for _ in range(10)]
        found = probe(data, [walk(rng) for _ in data], draws=Draws(n_resamples=50))
        p.append(found.places.p_corrected.min())
        score.append(found.places.score.mean())
    assert np.mean(np.array(p) <= 0.05) <= 0.1
    assert np.mean(score) < 0.1


@needs_sklearn
def test_what_all_episodes_share_over_time_is_read_of_shuffled_values_too():
    """Every episode has the same course: a probe reads it, and so it does of the other episodes' values."""
    rng = np.random.default_rng(0)
    values, course = [noise(rng) for _ in range(10)], np.linspace(0, 1, 16) ** 2
    for value in values:
        value[:, 0, 0, 0, 3] += 20 * course
    found = probe([episode(v) for v in values], [course.copy() for _ in values])
    best = found.places.iloc[0]
    assert best.score > 0.9
    assert best.shuffled == pytest.approx(best.score)
    assert best.p_corrected == 1
    assert found.time_score > 0.99


@needs_sklearn
def test_residuals_denoise_steps_and_groups_without_tokens():
    rng = np.random.default_rng(0)
    heights = [walk(rng, 8) for _ in range(8)]
    data = []
    for height in heights:
        expert, residual = rng.standard_normal((8, 3, 1, 2, 1, 4)), rng.standard_normal((8, 2, 2, 2, 6))
        expert[:, 2, 0, 0, 0, 1] += 5 * height  # at the last step
        residual[:, 0, 0, 0, 2] += 5 * height
        data.append(episode(noise(rng, 8), expert=expert, residual=residual))
    data[3]["vlm_residual"][4, 1] = np.nan
    choices = [Choice(denoise_step="all"), Choice(kind="residual")]
    found = probe(data, heights, choices)
    read = found.table[found.table.p_corrected <= 0.05]
    assert set(zip(read.kind, read.stream, read.layer, read.group, strict=True)) == {
        ("neurons", "expert", 2, "actions"),
        ("residual", "vlm", 1, "observation.images.image"),
    }
    assert read.denoise_step.dropna().tolist() == [9]
    assert any("residual" not in note and "tokens task" in note for note in found.notes)


@needs_sklearn
@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([np.arange(4.0)] * 3, {}, "3 episodes have values; expected 4 or more"),
        ([np.ones(4)] * 6, {}, "the same at every inference"),
        (
            [np.array(["a", "b", "a", "b"], object)] * 6,
            {"task": "regression"},
            "expected task classification",
        ),
        ([np.arange(4.0) + i for i in range(30)], {"task": "classification"}, "classes; expected 20 at most"),
        ([np.arange(4.0)] * 6, {"task": "guess"}, "expected regression or classification"),
    ],
)
def test_values_that_nothing_can_be_learnt_from_are_refused(values, options, message):
    rng = np.random.default_rng(0)
    with pytest.raises(SelectionError, match=message):
        probe([episode(noise(rng, 4)) for _ in values], values, **options)


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as if it were not installed
    rng = np.random.default_rng(0)
    data = [episode(noise(rng, 4)) for _ in range(4)]
    with pytest.raises(SetupError, match=r"lerobot_policy_attn\[neurons\]"):
        probe(data, [np.arange(4.0)] * 4)
