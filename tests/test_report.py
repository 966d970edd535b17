"""Comparison reports: planted differences come out as numbers, figure, tables and video."""

import dataclasses
import itertools
import json

import numpy as np
import pandas as pd
import pytest
from test_inspection import run_cli

from lerobot_attn import analysis
from lerobot_attn.errors import ConfigError, SelectionError
from lerobot_attn.figures.canvas import RANDOM_WEIGHTS
from lerobot_attn.overlay import overlay_frames
from lerobot_attn.report import (
    CompareSettings,
    compare_groups,
    comparison,
    comparison_figure,
    side_by_side,
    write_report,
)
from lerobot_attn.store.reader import open_episode, open_run
from lerobot_attn.store.video import VideoWriter, count_frames, read_frames
from lerobot_attn.synthetic import SyntheticPlan, planted_patch, planted_shares, write_planted_episode

FIRST = "observation.images.image"
PLAN = SyntheticPlan(n_frames=20, n_executed=4)
OTHER = dataclasses.replace(PLAN, task="open the drawer", task_id=1, n_frames=10, success=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks: three successes of 20 frames, three failures of 10."""
    folder = tmp_path_factory.mktemp("runs")
    for plan in (PLAN, OTHER):
        for index in range(3):
            write_planted_episode(folder, dataclasses.replace(plan, episode_index=index))
    return folder


@pytest.fixture(scope="module")
def sides(folder):
    run = list(open_run(folder))
    return run[:3], run[3:]


def rows(table):
    return {(row["kind"], row["name"]): row for row in table.to_dict("records")}


def test_numbers_are_the_planted_ones(sides):
    a, b = sides
    found = compare_groups(a[:1], b[:1])
    overall = rows(found.overall)
    for plan, side in ((PLAN, "a"), (OTHER, "b")):
        expected = np.mean([planted_shares(plan, frame)["task"] for frame in range(plan.n_frames)])
        assert overall["task", "task"][side] == pytest.approx(expected, abs=1e-3)
    assert overall["task", "pick"]["a"] > 0
    assert np.isnan(overall["task", "pick"]["b"])
    assert found.shares.sizes["phase"] == 20
    by_phase = found.shares["a"].sel(modality=FIRST).values
    expected = [planted_shares(PLAN, frame)[FIRST] for frame in range(20)]
    np.testing.assert_allclose(by_phase, expected, atol=1e-3)
    assert np.isnan(overall["task", "task"]["low"]), "one episode a side has no interval"


def test_progress_counts_to_its_end(sides):
    calls = []
    compare_groups(*sides, progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == list(range(1, calls[-1][1] + 1))


def test_figure_of_two_episodes_shows_images_and_differences(sides):
    a, b = sides
    figure = comparison_figure(a[:1], b[:1], CompareSettings(layer=3, head=0))
    strips = [axes for axes in figure.axes if len(axes.images) == 2]
    # A was asked at every fourth frame; B too rarely for five frames that it saw.
    titles = [axes.get_title() for axes in strips]
    assert titles == [f"A, frame {t}" for t in (0, 4, 8, 12, 16)] + [f"B, frame {t}" for t in (0, 2, 4, 7, 9)]
    geometry = analysis.camera_geometry(a[0].arrays, FIRST)[1]
    expected = analysis.on_camera_pixels(
        analysis.image_heatmap(a[0].arrays, FIRST, frame=4, layer=3, head=0, normalisation="image"), geometry
    )
    np.testing.assert_array_equal(strips[1].images[1].get_array(), expected)
    (lines,) = (axes for axes in figure.axes if axes.get_title() == "task, %")
    assert lines.lines[0].get_ydata()[0] == pytest.approx(15, abs=0.1)
    text = " ".join(t.get_text() for t in figure.texts)
    assert "A: synthetic_0/episode_00000 (success): pick up the red block" in text
    assert "only in B: open, drawer" in text
    assert RANDOM_WEIGHTS in text


def test_colours_of_the_images_are_those_that_the_bar_says(sides):
    a, b = (side[0] for side in sides)
    shown = {}
    for normalisation in ("share", "image", "frame", "episode"):
        settings = CompareSettings(normalisation=normalisation, clip=99.7, head=0)
        figure = comparison_figure([a], [b], settings)
        ranges = {axes.images[1].get_clim() for axes in figure.axes if len(axes.images) == 2}
        assert len(ranges) == 1, "the images have several ranges"
        (shown[normalisation],) = ranges
    assert shown["frame"] == (0, 1)
    # One range for both episodes, of all their frames, not of the five that are shown.
    choice = {"frame": "all", "head": 0, "query": "frame"}
    ends = [np.percentile(analysis.image_heatmap(e.arrays, FIRST, **choice), 99.7) for e in (a, b)]
    assert shown["episode"] == (0, pytest.approx(max(ends), rel=1e-6))
    five = [
        analysis.image_heatmap(e.arrays, FIRST, **{**choice, "frame": frames}).values.ravel()
        for e, frames in ((a, [0, 4, 8, 12, 16]), (b, [0, 2, 4, 7, 9]))
    ]
    assert shown["share"] == (0, pytest.approx(np.percentile(np.concatenate(five), 99.7), rel=1e-6))
    assert shown["share"] != shown["episode"]


def test_figure_of_groups_shows_mean_heatmaps_and_intervals(sides):
    figure = comparison_figure(*sides)
    means = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if len(axes.images) == 1}
    np.testing.assert_allclose(means["B minus A"], means["B, mean"] - means["A, mean"], atol=1e-6)
    (lines,) = (axes for axes in figure.axes if axes.get_title() == "task, %")
    assert len(lines.collections) == 1, "no interval is drawn"


def test_report_of_two_episodes(tmp_path, sides):
    a, b = sides
    files = write_report(a[:1], b[:1], tmp_path / "new" / "report")
    names = {"comparison.png", "comparison.mp4", "overall.csv", "shares.csv", "report.md"}
    names.add("effective_patches.csv")
    with pytest.warns(DeprecationWarning, match="it is called effective_patches now"):
        assert compare_groups(a[:1], b[:1]).sharpness is not None
    assert {file.name for file in files} == names == {file.name for file in files[0].parent.iterdir()}
    assert count_frames(tmp_path / "new" / "report" / "comparison.mp4") == 20
    table = pd.read_csv(tmp_path / "new" / "report" / "overall.csv")
    pd.testing.assert_frame_equal(
        table[["name", "a", "b"]], compare_groups(a[:1], b[:1]).overall[["name", "a", "b"]], check_dtype=False
    )
    text = (tmp_path / "new" / "report" / "report.md").read_text()
    assert RANDOM_WEIGHTS in text
    assert "| task | 27.50 | 27.50 | " in text
    assert "| task: pick | 2.25 |  |  |  | 1, 0 |" in text or "| task: pick |" in text


def test_report_of_groups_has_no_video(tmp_path, sides):
    files = write_report(*sides, tmp_path)
    assert "comparison.mp4" not in {file.name for file in files}
    text = (tmp_path / "report.md").read_text()
    assert "3 episodes (3 of 3 solved): pick up the red block" in text
    assert "bootstrap over episodes" in text


@pytest.mark.parametrize("align", ["phase", "frame"])
def test_video_aligns_the_shorter_episode(sides, align):
    a, b = (side[0] for side in sides)
    frames = list(side_by_side(a, b, CompareSettings(align=align)))
    assert len(frames) == 20
    right = [frame[:, frame.shape[1] // 2 :] for frame in frames]
    moved = [not np.array_equal(x, y) for x, y in itertools.pairwise(right)]
    # By phase ten frames are spread over twenty; by frame they play and then hold the last.
    assert sum(moved) == 9
    assert all(moved[:9]) == (align == "frame")


def test_sinks_of_both_sides_are_left_out_and_said(sides):
    a, b = sides
    found = compare_groups(a[:1], b[:1], CompareSettings(exclude="sinks"))
    overall = rows(found.overall)
    # Only begin-of-sequence takes its share whatever is shown; the other template gets nothing anyway.
    assert overall["template", "template"]["a"] == 0
    assert found.shares.attrs["left_out"] == "1 key token left out"


def test_damaged_stores_are_named(folder, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "run" / "attention" / "a_0" / "episode_00000.zarr"
    broken.mkdir(parents=True)
    (broken / "zarr.json").write_text("{")
    write_planted_episode(tmp_path / "run", PLAN)
    status, _, error = run_cli(
        monkeypatch, capsys, "compare", tmp_path / "run", folder, "-o", tmp_path / "out", "--no-video"
    )
    assert status == 0
    assert "left out: " in error
    assert "zarr.json is damaged" in error


def test_same_episode_twice_differs_nowhere(sides):
    a, _ = sides
    overall = compare_groups(a[:1], a[:1]).overall
    np.testing.assert_array_equal(overall["difference"], 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "0,1"}, r"layer: got \[0, 1\], expected one number or 'mean'"),
        ({"head": "all"}, r"head: got 'all', expected one number, 'mean' or 'max'"),
        ({"normalisation": "max"}, r"normalisation: got 'max'"),
        ({"colormap": "none"}, r"colormap 'none': unknown"),
        ({"align": "time"}, r"align: got 'time', expected one of phase, frame"),
        ({"fps": 0}, r"fps: got 0, expected a number from 0.1 to 240"),
        ({"dpi": 3}, r"dpi: got 3, expected a number from 30 to 1200"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        CompareSettings(**settings)


def test_nothing_to_compare(tmp_path, sides):
    with pytest.raises(SelectionError, match=r"nothing to compare: A has 0 episodes, B has 3"):
        write_report([], sides[1], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_command_compares_episodes_tasks_and_successes(folder, tmp_path, monkeypatch, capsys):
    first, second = (open_run(folder)[index].path for index in (0, 3))
    status, out, _ = run_cli(
        monkeypatch, capsys, "compare", first, second, "-o", tmp_path / "a", "--no-video"
    )
    assert status == 0
    assert f"Wrote {tmp_path / 'a' / 'report.md'}" in out
    assert not (tmp_path / "a" / "comparison.mp4").exists()
    status, *_ = run_cli(monkeypatch, capsys, "compare", folder, "--by", "success", "-o", tmp_path / "b")
    assert status == 0
    text = (tmp_path / "b" / "report.md").read_text()
    assert "A: 3 episodes (0 of 3 solved)" in text
    assert "B: 3 episodes (3 of 3 solved)" in text
    settings = tmp_path / "compare.yaml"
    settings.write_text("layer: 2\nn_phases: 5\n")
    status, *_ = run_cli(
        monkeypatch,
        capsys,
        "compare",
        first.parent,
        second.parent,
        "-o",
        tmp_path / "c",
        "--settings",
        settings,
    )
    assert status == 0
    line = next(x for x in (tmp_path / "c" / "report.md").read_text().splitlines() if "settings" in x)
    chosen = json.loads(line.split("`")[1])
    assert (chosen["layer"], chosen["n_phases"]) == (2, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: compare: expected two sides A and B, or one with --by success"),
        (["--by", "colour"], "error: --by: got 'colour', expected success"),
        (["none.zarr"], "error: none.zarr: no such folder"),
    ],
)
def test_command_errors(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, error = run_cli(monkeypatch, capsys, "compare", folder, *arguments)
    assert status == 1
    assert error.startswith(message)
    assert not (tmp_path / "report").exists()


def test_episode_of_one_frame(tmp_path):
    plan = dataclasses.replace(PLAN, n_frames=1)
    one = open_episode(write_planted_episode(tmp_path, plan))
    assert len(list(side_by_side(one, one))) == 1
    assert comparison_figure([one], [one]).axes


_OTHER_SIZE = {"observation.images.image": (64, 128), "observation.images.wrist": (96, 128)}
UNLIKE_POLICIES = {
    "denoise steps": {"n_denoise_steps": 10},
    "depth": {"n_layers": 6, "layers": (4, 5)},
    "heads": {"n_heads": 3},
    "camera's size": {"image_px": _OTHER_SIZE},
    "grid": {"grid": (8, 8)},
    "padding": {"padding": "left_top", "image_px": _OTHER_SIZE},
    "no reward": {"has_reward": False, "has_success": False},
    "state token": {"n_suffix_state": 1, "n_queries": 6},
    "no video": {"videos": False},
}


@pytest.mark.parametrize("changes", UNLIKE_POLICIES.values(), ids=UNLIKE_POLICIES)
def test_episodes_of_unlike_policies(tmp_path, changes):
    """Two episodes and two groups: what both have is compared, and what cannot be is said in one line."""
    episodes = []
    for index, (group, plan_changes) in enumerate((("a", {}), ("a", {}), ("b", changes), ("b", changes))):
        plan = SyntheticPlan(task_group=group, episode_index=index, seed=index, **plan_changes)
        episodes.append(open_episode(write_planted_episode(tmp_path / "run", plan)))
    a, b = episodes[:2], episodes[2:]
    for sides in ((a[:1], b[:1]), (a, b)):
        folder = tmp_path / f"report-{len(sides[0])}"
        write_report(*sides, folder, CompareSettings(video=len(sides[0]) == 1))
        text = (folder / "report.md").read_text()
        table = pd.read_csv(folder / "overall.csv")
        shares = table[table["measure"] == "modality_share"].set_index("kind")
        assert {"task", "state", "actions"} <= set(shares.index)
        assert shares.loc["task", ["a", "b", "difference"]].notna().all()
        unlike = {"image_px", "grid", "padding"} & set(changes)
        assert ("patches are not compared, because the cameras differ" in text) == bool(unlike)
        assert (folder / "comparison.png").stat().st_size > 10_000


def test_episodes_of_other_cameras_are_refused_in_one_line(tmp_path):
    cameras = {f"observation.images.{name}": (96, 96) for name in ("image", "side")}
    plans = [SyntheticPlan(task_group="a"), SyntheticPlan(task_group="b", image_px=cameras)]
    a, b = (open_episode(write_planted_episode(tmp_path, plan)) for plan in plans)
    with pytest.raises(SelectionError, match=r"cameras differ: .*wrist.*side.*; compare episodes of"):
        write_report([a], [b], tmp_path / "report")


def test_each_episode_is_drawn_through_its_own_letterbox(tmp_path):
    """The planted patch of a wide image lies elsewhere than that of a square one."""
    plans = [
        SyntheticPlan(task_group="a", image_px={"observation.images.image": (96, 96)}),
        SyntheticPlan(task_group="b", image_px={"observation.images.image": (60, 160)}, padding="left_top"),
    ]
    for plan in plans:
        episode = open_episode(write_planted_episode(tmp_path, plan))
        group, _ = comparison._strip("A", episode, CompareSettings(interpolation="nearest"))
        height, width = plan.image_px["observation.images.image"]
        for panel in group.panels:
            assert panel.heat.shape == (height, width)
            frame = int(panel.title.rpartition(" ")[2])
            y, x = np.unravel_index(np.nanargmax(panel.heat), panel.heat.shape)
            found = plan.layout.cameras[0].geometry.patch_at(y + 0.5, x + 0.5)
            step, layer = plan.n_denoise_steps - 1, plan.n_layers - 1
            planted = {
                planted_patch(plan, 0, frame=frame, layer=layer, head=head, denoise_step=step)
                for head in range(plan.n_heads)
            }
            assert found in planted


@pytest.mark.parametrize("n_shown", [1, 7, 11])
def test_a_video_shorter_than_its_store_is_held(tmp_path, n_shown):
    a = open_episode(write_planted_episode(tmp_path, SyntheticPlan(task_group="a")))
    b = open_episode(write_planted_episode(tmp_path, SyntheticPlan(task_group="b", seed=1)))
    for video in b.videos.values():
        frames = list(read_frames(video))[:n_shown]
        writer = VideoWriter(video, fps=20, size_px=frames[0].shape[:2])
        for frame in frames:
            writer.write(frame)
        writer.close()
    for align in ("phase", "frame"):
        found = list(side_by_side(a, b, CompareSettings(align=align)))
        assert len(found) == 12
        np.testing.assert_array_equal(found[-1][:, -200:], found[n_shown - 1][:, -200:])
    write_report([a], [b], tmp_path / "report")
    assert (
        f"its video has {n_shown} of the store's 12 frames; its last one is held"
        in (tmp_path / "report" / "report.md").read_text()
    )


@pytest.mark.parametrize("normalisation", ["share", "image", "frame", "episode"])
def test_the_video_has_the_reports_normalisation(tmp_path, monkeypatch, normalisation):
    asked = []

    def noting(episode, settings, progress=None):
        asked.append(settings.normalisation)
        return overlay_frames(episode, settings, progress)

    monkeypatch.setattr(comparison, "overlay_frames", noting)
    a = open_episode(write_planted_episode(tmp_path, SyntheticPlan(task_group="a", n_frames=4)))
    frames = list(side_by_side(a, a, CompareSettings(normalisation=normalisation)))
    assert len(frames) == 4
    assert asked == [normalisation] * 2
