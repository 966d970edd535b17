"""Gains of attention beside those of copies of the policy whose weights are shuffled: a control."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

import scripted  # noqa: E402
from test_recording import scripted_adapter  # noqa: E402, F401
from test_saliency_asking import (  # noqa: E402, F401
    CAMERA,
    CHUNK,
    EXECUTED,
    FEW,
    GRID,
    OnePatchPolicy,
    command,
    mean_row,
    planted_maps,
    policy,
    table_top,
)

from lerobot_attn.analysis.intervals import prediction_interval  # noqa: E402
from lerobot_attn.analysis.saliency_tables import saliency_table  # noqa: E402
from lerobot_attn.errors import ConfigError  # noqa: E402
from lerobot_attn.plugin.saliency import measure_saliency  # noqa: E402
from lerobot_attn.policies.shuffling import shuffled_weights  # noqa: E402

GAINS = ("deletion_gain", "insertion_gain", "deletion_gain_shifted", "insertion_gain_shifted")


class LearnedPatchesPolicy(OnePatchPolicy):
    """Which 16 of 64 patches its action hangs on are weights; planted attention is on those it has learned.

    Of so many, shuffled, about as many are attended to in each copy. What counts of a patch is its contrast,
    which is lost where it is hidden, so that what patches change adds up.
    """

    scale = 100.0

    def __init__(self, config):
        super().__init__(config)
        where = torch.zeros(GRID * GRID)
        where[np.argsort(-planted_maps(0)[0, 0])[:16].copy()] = 1 / 16
        self.where = torch.nn.Parameter(where)

    def predict_action_chunk(self, batch, noise=None, **kwargs):
        image = batch[CAMERA].mean(dim=1)
        patches = image.unflatten(2, (GRID, -1)).unflatten(1, (GRID, -1)).std(dim=(2, 4))
        actions = noise[:, :CHUNK].clone()
        actions[:, :EXECUTED] += self.scale * (patches.flatten(1) * self.where).sum(dim=1)[:, None, None]
        return actions.detach()


@pytest.fixture
def learned(policy):  # noqa: F811
    found = LearnedPatchesPolicy(scripted.make_config(chunk_size=CHUNK))
    found.config.input_features = policy.config.input_features
    return found


def break_down(weight, of_another_seed):
    assert not torch.equal(weight, of_another_seed)
    raise RuntimeError("it broke")


def test_weights_are_shuffled_along_every_axis_and_come_back_bit_for_bit():
    def fresh():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 2), torch.nn.Linear(8, 16).bfloat16())

    policy, before, first = fresh(), fresh().state_dict(), {}  # noqa: F811
    storage = [weight.data_ptr() for weight in policy.parameters()]
    with shuffled_weights(policy, 1):
        for name, weight in policy.state_dict().items():
            assert not torch.equal(weight, before[name])
            assert torch.equal(weight.flatten().sort().values, before[name].flatten().sort().values)
            first[name] = weight.clone()
        for axis in (0, 1):  # rows and columns, each in another order
            sums = [one["1.weight"].float().sum(axis) for one in (first, before)]
            assert not torch.allclose(*sums)
            assert torch.allclose(*(one.sort().values for one in sums), atol=1e-6)
    assert [weight.data_ptr() for weight in policy.parameters()] == storage
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
    with shuffled_weights(policy, 1):
        assert all(torch.equal(weight, first[name]) for name, weight in policy.state_dict().items())
    with pytest.raises(RuntimeError, match="it broke"), shuffled_weights(policy, 2):
        break_down(policy[1].weight, first["1.weight"])
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
    with pytest.raises(ConfigError, match="has none of floating point"), shuffled_weights(torch.nn.ReLU(), 0):
        pass


def test_one_more_value_lies_in_the_interval_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3, 2, (2000, 5))
    bounds = np.array([prediction_interval(row[:4]) for row in draws])
    share = np.mean((bounds[:, 0] <= draws[:, 4]) & (draws[:, 4] <= bounds[:, 1]))
    assert share == pytest.approx(0.95, abs=0.015)
    assert np.isnan(prediction_interval(draws[0, :1])).all()


def test_what_was_learned_gains_more_than_shuffled_weights(learned, table_top):  # noqa: F811
    settings = {**FEW, "n_masks": 16, "frames": [0, 1, 2], "curve_layers": [0, 1]}
    alone = measure_saliency(learned, table_top, **settings)
    where, done = learned.where.detach().clone(), []
    found = measure_saliency(
        learned, table_top, **settings, n_shuffled=4, progress=lambda n, total: done.append((n, total))
    )
    assert torch.equal(learned.where, where)
    assert done[-1][0] == done[-1][1]
    assert done == sorted(done)
    assert len(found.shuffled) == 4
    table = saliency_table(found)
    own = table[~table["metric"].str.endswith("_learned")].reset_index(drop=True)
    pd.testing.assert_frame_equal(own, saliency_table(alone))  # the policy itself is asked as ever
    for metric in GAINS:
        plain, row = (mean_row(table, f"{metric}{end}", "0") for end in ("", "_learned"))
        assert (row["value"], row["low"], row["high"]) == (plain["value"], plain["low"], plain["high"])
        assert row["chance_low"] < row["chance"] < row["chance_high"] < row["value"], metric
        assert row["chance"] == pytest.approx(
            np.mean([mean_row(saliency_table(copy), metric, "0")["value"] for copy in found.shuffled])
        )
        off = mean_row(table, f"{metric}_learned", "1")  # of this layer's map nothing was learned
        assert abs(off["value"] - off["chance"]) < 0.15 < row["value"] - row["chance"], metric

    names = {"layer": "0", "camera": CAMERA}
    row = mean_row(table, "rank_correlation_learned", **names)
    plain = mean_row(table, "rank_correlation", head="mean", **names)
    assert row["value"] == pytest.approx(plain["value"])
    assert row["chance_low"] < row["chance"] < row["chance_high"] < row["value"]
    off = mean_row(table, "rank_correlation_learned", "1")
    assert off["chance_low"] < off["value"] < off["chance_high"]


def test_random_weights_are_held_by_the_interval_of_shuffled_ones(learned, table_top):  # noqa: F811
    """Weights drawn at random are one more shuffled copy, so they lie in the interval as often as it says."""
    settings = {
        **FEW,
        "n_masks": 16,
        "frames": [0],
        "episodes": [0],
        "curve_layers": [0],
        "shares": (0.1, 0.3),
    }
    inside: dict[str, list[bool]] = {}
    for seed in range(8):
        order = torch.randperm(GRID * GRID, generator=torch.Generator().manual_seed(seed))
        learned.where.data = learned.where.data[order]
        table = saliency_table(measure_saliency(learned, table_top, **settings, n_shuffled=4))
        for metric in (*GAINS, "rank_correlation"):
            row = mean_row(table, f"{metric}_learned", "0")
            assert row["chance_low"] < row["chance_high"]
            inside.setdefault(metric, []).append(row["chance_low"] < row["value"] < row["chance_high"])
    assert min(sum(found) for found in inside.values()) >= 7, inside


def test_the_command_has_it_in_its_report(learned, table_top, tmp_path, monkeypatch, capsys):  # noqa: F811
    options = ("--n-masks=8", "--hidden-share=0.5", "--n-draws=3", "--frames=2", "--curve-layers=0")
    asked = (table_top, "-o", tmp_path / "report", "--policy.path=p", *options)
    assert command(monkeypatch, learned, *asked, "--shuffled=1") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: n_shuffled: got 1, expected 0, or at least 2")
    assert command(monkeypatch, learned, *asked, "--shuffled=6") == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## Beside shuffled weights" in text
    assert "what was learned makes the map predict better" in text
    assert "| rank correlation, this policy | shuffled weights, mean |" in text
    arrays = np.load(tmp_path / "report" / "saliency.npz")
    curves = arrays["curves attention 0"]
    assert arrays["shuffled curves attention 0"].shape == (6, *curves.shape)


def test_copies_whose_actions_are_not_finite_are_left_out_and_said(learned, table_top, caplog):  # noqa: F811
    learned.scale = float("nan")
    settings = {**FEW, "n_masks": 8, "n_draws": 1, "frames": [0], "episodes": [0]}
    found = measure_saliency(learned, table_top, **settings, n_shuffled=2)
    assert found.shuffled == ()
    assert "2 of 2 copies with shuffled weights gave actions that are not finite" in caplog.text
