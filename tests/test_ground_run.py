"""Grounding of a run: the map that was planted on the target is found, and random maps are at chance."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from test_inspection import run_cli

from lerobot_attn import analysis, open_run
from lerobot_attn.analysis.grounding import METRICS
from lerobot_attn.analysis.grounding_runs import Candidate, ground_episodes
from lerobot_attn.analysis.grounding_tables import grounding_table, held_out, ranking
from lerobot_attn.errors import RANDOM_WEIGHTS, ConfigError, SelectionError
from lerobot_attn.report import GroundSettings, ground_run, write_grounding
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode, write_softmax_episode

IMAGE, WRIST = "observation.images.image", "observation.images.wrist"
PLAN = SyntheticPlan(
    n_frames=4,
    n_executed=1,
    n_denoise_steps=2,
    n_layers=3,
    layers=(),
    grid=(8, 8),
    n_text=40,
    image_px={IMAGE: (24, 24), WRIST: (14, 32)},
    videos=False,
    objects={"block": "target", "bowl": "destination", "can": "distractor", "arm": "robot"},
    on_first_object=(2, 1),
)
COLUMNS = "camera,layer,head,denoise_step,role,metric,value,chance,low,high,n_episodes,n_inferences"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven episodes, of which two failed; at one inference of one the target is out of sight."""
    folder = tmp_path_factory.mktemp("run")
    for index in range(7):
        plan = dataclasses.replace(
            PLAN, episode_index=index, n_frames=3 + index % 2, success=index not in (3, 6)
        )
        plan = dataclasses.replace(plan, out_of_sight=(1,) if index == 4 else ())
        write_planted_episode(folder, plan)
    return folder


@pytest.fixture(scope="module")
def grounded(folder):
    calls = []
    found = ground_run(open_run(folder), progress=lambda done, total: calls.append((done, total)))
    return found, calls


def test_numbers_are_means_over_inferences_then_episodes(folder, grounded):
    table = grounded[0].table
    assert ",".join(table.columns) == COLUMNS
    episodes = [e.arrays for e in open_run(folder)]
    for camera, layer, head, step, role in [(WRIST, 2, "1", 1, "target"), (IMAGE, 0, "mean", 0, "robot")]:
        where = {"layer": layer, "denoise_step": step, "head": "mean" if head == "mean" else int(head)}
        each = [analysis.grounding(d, cameras=[camera], roles=[role], **where) for d in episodes]
        for metric in METRICS:
            values, chances = (
                [e[kind].sel(metric=metric).values.ravel() for e in each] for kind in ("value", "uniform")
            )
            expected = np.mean([np.nanmean(v) for v in values])
            row = table[
                (table.camera == camera)
                & (table.layer == layer)
                & (table["head"] == head)
                & (table.denoise_step == step)
                & (table.role == role)
                & (table.metric == metric)
            ]
            assert len(row) == 1
            assert row.value.item() == pytest.approx(expected, rel=1e-4)
            if metric == "mass":
                assert row.chance.item() == pytest.approx(np.mean([np.nanmean(c) for c in chances]), rel=1e-5)
            assert row.n_episodes.item() == 7
            assert row.n_inferences.item() == sum(np.isfinite(v).sum() for v in values)
    n_rows = 2 * 3 * 3 * 2 * 5 * 5
    assert len(table) == n_rows
    assert ((table.low <= table.value + 1e-6) & (table.value <= table.high + 1e-6)).all()


def test_each_episode_is_held_against_the_other_episodes(folder):
    episodes = [e.arrays for e in open_run(folder)][:3]
    run = ground_episodes(episodes)
    for index in range(3):
        others = analysis.mean_maps([e for i, e in enumerate(episodes) if i != index], head=1, layer=2)
        expected = analysis.grounding(episodes[index], head=1, layer=2, fixed=others)
        got = run.levels(Candidate(WRIST, 2, "1"), 1, "robot", "mass")["fixed"][index]
        assert got == pytest.approx(
            float(expected.fixed.sel(camera=WRIST, role="robot", metric="mass").mean())
        )
    alone = ground_episodes(episodes[:1])
    assert np.isnan(alone.fixed).all()


def test_planted_map_is_found_held_out_and_significant(grounded):
    found, calls = grounded
    best = found.best
    assert (best.candidate.layer, best.candidate.head) == (2, "1")
    assert not {*best.chosen_on} & {*best.reported_on}
    assert sorted([*best.chosen_on, *best.reported_on]) == list(range(7))
    assert best.p == 1 / 2**3, "the smallest that three episodes can give"
    first = found.ranking.iloc[:2]
    assert set(zip(first.layer, first["head"], strict=True)) == {(2, "1")}
    assert (first.p < 0.05).all()
    assert (found.ranking.p[found.ranking.layer < 2] > 0.05).all()
    numbers = found.overall["mass"]
    assert numbers["value"] > 2 * max(numbers[name] for name in ("uniform", "fixed", "centre"))
    target, other = found.by_phase["target"], found.by_phase["distractor"]
    assert (target.value > 5).all()
    assert (other.value < 1).all()
    assert "background" not in found.by_phase
    np.testing.assert_allclose(found.ahead["distractor"].value, target.value - other.value)
    assert (found.ahead["distractor"].low > 0).all()
    assert len(found.by_step.value) == 2
    assert found.outcomes.keys() == {"success", "failure"}
    assert [done for done, _ in calls] == list(range(1, calls[-1][1] + 1))


def test_what_is_chosen_knows_nothing_of_what_is_reported(folder):
    """Maps that are best on the other half alone are not chosen."""
    run = ground_episodes([e.arrays for e in open_run(folder)][:4])
    layer, head = run.layers.index(0), run.heads.index("0")
    run.value[1::2, :, layer, head] = 1.0
    assert (held_out(run, role="target", metric="mass").candidate.layer) == 2
    run.value[0::2, :, layer, head] = 1.0
    assert held_out(run, role="target", metric="mass").candidate[1:] == (0, "0")


def test_random_maps_are_at_chance(tmp_path):
    plan = dataclasses.replace(PLAN, on_first_object=None, n_frames=2, n_layers=4)
    for seed in range(10):
        write_softmax_episode(tmp_path, dataclasses.replace(plan, seed=seed, episode_index=seed))
    run = ground_episodes([e.arrays for e in open_run(tmp_path)])
    for metric in METRICS:
        assert ranking(run, metric=metric).p.min() > 0.05, metric
    table = grounding_table(run)
    table = table[(table.denoise_step == 1) & (table["head"] != "mean")]
    holds = {}
    for (metric, role), rows in table.groupby(["metric", "role"]):
        # A peaked map's centre is farther from the middle than a uniform one's; a ratio of what is left over
        # by a mask of nearly the whole image has no steady mean.
        if metric == "centre_distance" or role == "background":
            continue
        holds[metric, role] = ((rows.low <= rows.chance) & (rows.chance <= rows.high)).mean()
    assert min(holds.values()) >= 0.5, holds
    assert np.mean([*holds.values()]) > 0.8, holds


def test_report_says_it_all(folder, tmp_path):
    _, files = write_grounding(open_run(folder), tmp_path / "out", GroundSettings(dpi=50))
    names = {file.name for file in files}
    figures = {"ranking", "layers_heads", "phases", "noise_to_action", "robot", "outcomes"}
    assert names == {"grounding.csv", "ranking.csv", "report.md", "report.html"} | {
        f"{f}.png" for f in figures
    }
    assert all(file.is_file() for file in files)
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    for words in ("layer 2, head 1", "reported on 3 other episodes", "synthetic", RANDOM_WEIGHTS, "0.0078"):
        assert words in text
    assert (tmp_path / "out" / "grounding.csv").read_text(encoding="utf-8").splitlines()[0] == COLUMNS
    assert len(pd.read_csv(tmp_path / "out" / "ranking.csv")) == 2 * 3 * 3


def test_one_episode_has_no_interval_and_says_so(folder, tmp_path, monkeypatch, capsys):
    one = open_run(folder).stores[0]
    status, out, err = run_cli(
        monkeypatch, capsys, "ground", one, "-o", tmp_path / "out", "--camera", "wrist"
    )
    assert status == 0
    told = ["one episode alone: no interval, and no other episode to choose the best map on", RANDOM_WEIGHTS]
    assert err.strip().splitlines() == told
    assert "chosen and reported on the same episode" in out
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "one episode alone: no interval" in text
    table = pd.read_csv(tmp_path / "out" / "grounding.csv")
    assert table.low.isna().all()
    assert set(table.camera) == {WRIST}
    assert "Wrote" in out


def test_bad_input_is_one_line(folder, tmp_path, monkeypatch, capsys):
    bare = tmp_path / "bare"
    plan = dataclasses.replace(PLAN, objects={}, on_first_object=None)
    write_planted_episode(bare, plan)
    no_target = tmp_path / "no_target"
    write_planted_episode(no_target, dataclasses.replace(PLAN, objects={"arm": "robot"}))
    for arguments, words in [
        ((bare,), ("none of 1 episodes", "--eval.attention.segmentation=true", "lerobot-attn masks")),
        ((no_target,), ("role 'target'", "robot, background")),
        ((folder, "--role", "cup"), ("role", "'cup'", "target, destination")),
        ((folder, "--metric", "iuo"), ("metric", "iou")),
        ((folder, "--layer", "7"), ("layer 7",)),
        ((folder, "--denoise-step", "9"), ("denoise step 9", "0, 1")),
        ((folder, "--query", "3"), ("none as full maps",)),
        ((folder, "--camera", "front"), ("'front'", WRIST)),
        ((tmp_path / "nowhere",), ("no such folder",)),
    ]:
        status, _, err = run_cli(monkeypatch, capsys, "ground", *arguments, "-o", tmp_path / "out")
        assert status == 1
        err = err.strip()  # the progress bar's own line
        assert err.startswith("error: ")
        assert "\n" not in err
        assert all(word in err for word in words), err
    with pytest.raises(ConfigError, match="confidence"):
        GroundSettings(confidence=2)
    with pytest.raises(SelectionError, match="no episodes"):
        ground_run([])


def test_episodes_of_several_conditions_are_told(tmp_path):
    write_planted_episode(tmp_path, PLAN)
    condition = {"name": "block", "text": "target blocked", "interventions": [{"kind": "occlude"}]}
    write_planted_episode(tmp_path, dataclasses.replace(PLAN, episode_index=1), condition=condition)
    notes = ground_run(open_run(tmp_path)).notes
    assert any("no intervention; target blocked" in note for note in notes)


def test_masks_are_read_block_by_block(folder):
    episode = open_run(folder)[0]
    seen = []

    def of_masks(view, array):
        seen.append(view["segmentation"].chunks)
        return array.sum("key")

    analysis.summarise(episode.dataset, [analysis.Measure("masks", of_masks, of_attention=True)])
    assert seen
    assert None not in seen, "the masks of the whole episode were read at once"


def test_episodes_without_masks_or_of_another_policy_are_told(folder, tmp_path):
    mixed = tmp_path / "mixed"
    write_planted_episode(mixed, PLAN)
    write_planted_episode(mixed, dataclasses.replace(PLAN, objects={}, on_first_object=None, episode_index=1))
    found = ground_run(open_run(mixed))
    assert any("1 of 2 episodes, which hold no masks" in note for note in found.notes)
    write_planted_episode(mixed, dataclasses.replace(PLAN, n_layers=4, episode_index=2))
    with pytest.raises(SelectionError, match=r"layer of .+ is .+ expected"):
        ground_run(open_run(mixed))
