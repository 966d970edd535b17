"""The main job on the real simulation: stock lerobot-eval, real LIBERO tasks, the bundled demo policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import browser
import numpy as np
import pytest
import xarray as xr
from forked import STOCK, Forked, run_lerobot_eval

from lerobot_attn.analysis.behaviour import approached, given_instruction
from lerobot_attn.errors import RANDOM_WEIGHTS, SelectionError
from lerobot_attn.layout import Kind
from lerobot_attn.masks import patch_coverage
from lerobot_attn.overlay import OverlaySettings, write_overlay
from lerobot_attn.plot import KINDS, plot
from lerobot_attn.plugin import experiment
from lerobot_attn.plugin.experiment import ExperimentPlan, run_experiment
from lerobot_attn.report import find_effects, write_report
from lerobot_attn.store.reader import open_run
from lerobot_attn.store.video import count_frames, read_frames
from lerobot_attn.verify import contact_sheet, verify_episode

pytestmark = pytest.mark.libero

N_STEPS = 11  # three inferences, of the last a single action
PATIENCE_S = 300  # of an evaluation, on a busy machine


def command(name):
    return str(Path(sys.executable).parent / name)


def eval_arguments(checkpoint, folder, *arguments):
    return [
        f"--policy.path={checkpoint}",
        "--policy.device=cpu",
        "--policy.n_action_steps=5",
        "--env.type=libero",
        f"--env.episode_length={N_STEPS}",
        f"--output_dir={folder}",
        *arguments,
    ]


def lerobot_eval(checkpoint, folder, *arguments):
    """Be the stock command, in a process that has imported LeRobot already; return its log."""
    arguments = eval_arguments(checkpoint, folder / "out", *arguments)
    with Forked(run_lerobot_eval, folder, STOCK, argv=arguments) as process:
        assert process.wait(PATIENCE_S) == 0, process.log[-4000:]
    return process.log


BLOCK_TARGET = Path(__file__).parent.parent / "configs" / "intervention" / "block_target.yaml"
SYNCHRONOUS = ["--env.task=libero_object", "--env.task_ids=[0]", "--eval.n_episodes=2", "--eval.batch_size=1"]
ASYNCHRONOUS = ["--env.task=libero_goal", "--env.task_ids=[1]", "--eval.batch_size=2"]


@pytest.fixture(scope="module")
def synchronous(libero_ready, demo_checkpoint, tmp_path_factory):
    """By the very command."""
    folder = tmp_path_factory.mktemp("synchronous")
    recorded = ("--eval.save_attention_maps=true", "--eval.attention.segmentation=true")
    arguments = eval_arguments(demo_checkpoint, folder, *SYNCHRONOUS, *recorded)
    result = subprocess.run(
        [command("lerobot-eval"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "SLURM_JOB_ID": "0"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder, result.stderr


@pytest.fixture(scope="module")
def asynchronous(libero_ready, demo_checkpoint, tmp_path_factory):
    """LeRobot's default kind of environments, a batch that does not divide the episodes, and every option."""
    folder = tmp_path_factory.mktemp("asynchronous")
    settings = folder / "capture.yaml"
    settings.write_text(
        "layers: all\nprefix_layers: [-1]\nvision_layers: [-1]\ndenoise_steps: [0, -1]\nkeep_bits: 8\n"
        "segmentation: true\nroles: {plate_1: destination}\n"
    )
    log = lerobot_eval(
        demo_checkpoint,
        folder,
        *ASYNCHRONOUS,
        "--eval.n_episodes=3",
        "--eval.save_attention_maps=true",
        f"--eval.attention={settings}",
        # A condition without interventions: what follows is what it is without one.
        "--eval.interventions={name: baseline}",
    )
    return folder / "out", log


def check_stores(folder, task, n_episodes):
    run = open_run(folder)
    assert [episode.path for episode in run] == [
        folder / "attention" / task / f"episode_{index:05d}.zarr" for index in range(n_episodes)
    ]
    for index, episode in enumerate(run):
        video = folder / "videos" / task / f"eval_episode_{index}.mp4"
        assert episode.is_complete
        assert episode.attributes["input_checks"] == []
        assert episode.has_random_weights
        assert episode.eval_video == video
        assert episode.n_frames == count_frames(video) == N_STEPS
        assert episode.n_inferences == 3
        data = xr.open_zarr(episode.path).load()
        np.testing.assert_array_equal(data.frame_inference, np.arange(N_STEPS) // 5)
        np.testing.assert_array_equal(data.frame_query, np.arange(N_STEPS) % 5)
        assert data.state.shape == (N_STEPS, 8)
        assert data.state_dim.values[:3].tolist() == ["eef_x", "eef_y", "eef_z"]
        assert set(episode.videos) == {"observation.images.image", "observation.images.image2"}
        words = [
            "".join(data.token_text[0].values[(data.text_word[0] == word).values]).strip()
            for word in range(int(data.text_word[0].max()) + 1)
        ]
        assert " ".join(words) == episode.task
        assert int(data.text_state_dim.max()) == 7
        maps = data.suffix_attention.astype(np.float32)
        assert float(abs(maps.sum("key") - 1).max()) <= episode.row_sum_tolerance()
        padding = data.key_kind == Kind.PADDING
        assert float(maps.where(padding, 0).max()) == 0
    return run


def frame_difference(a, b):
    return np.abs(a.astype(float) - b).mean()


def check_views(run, cameras=("image", "image2")):
    """The first camera is what LeRobot filmed; a frame's best match is the frame of its own number."""
    for episode in run:
        view, wrist = (list(read_frames(episode.videos[f"observation.images.{name}"])) for name in cameras)
        filmed = list(read_frames(episode.eval_video))
        assert len(view) == len(wrist) == len(filmed) == N_STEPS
        same = np.mean([frame_difference(a, b) for a, b in zip(view, filmed, strict=True)])
        assert same < 3.0  # of 255: what the codec loses
        for shift in (1, 2, 3):
            shifted = np.mean(
                [frame_difference(a, b) for a, b in zip(view[shift:], filmed[:-shift], strict=True)]
            )
            assert same < shifted, "the frames are not the MP4's frames of the same number"
        turned = np.mean([frame_difference(a[::-1, ::-1], b) for a, b in zip(view, filmed, strict=True)])
        other = np.mean([frame_difference(a, b) for a, b in zip(wrist, filmed, strict=True)])
        assert min(turned, other) > 4 * same


def test_synchronous_episodes(synchronous):
    folder, log = synchronous
    run = check_stores(folder, "libero_object_0", 2)
    check_views(run)
    assert [episode.attributes["seed"] for episode in run] == [1000, 1001]
    assert "Attention goes to" in log
    assert RANDOM_WEIGHTS in log
    assert "Attention of libero_object_0: 2 of 2 episodes saved, 6 inferences" in log
    assert run[0].task == "pick up the alphabet soup and place it in the basket"


def test_asynchronous_batches(asynchronous):
    folder, log = asynchronous
    run = check_stores(folder, "libero_goal_1", 3)
    check_views(run)
    assert "Attention of libero_goal_1: 3 of 3 episodes saved" in log
    data = run[2].dataset
    assert data.sizes["layer"] == data.sizes["all_layer"]
    assert data.denoise_step.values.tolist() == [0, 9]
    assert data.prefix_attention.shape[1:] == (1, 8, 968, 968)
    assert data.vision_attention.shape[1:] == (2, 1, 4, 256, 256)
    # Two environments of a batch and two batches see different things.
    states = [episode.dataset.state.values for episode in run]
    assert all(np.abs(states[i] - states[j]).max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(("family", "first", "grid"), [("pi0", 1, (16, 16)), ("smolvla", 0, (8, 8))])
def test_other_families_in_asynchronous_batches(libero_ready, request, tmp_path, family, first, grid):
    """Pi0's suffix opens with the state, so that its first action is query 1. The target is not looked at."""
    arguments = [
        "--env.task=libero_object",
        "--env.task_ids=[0]",
        "--eval.n_episodes=2",
        "--eval.batch_size=2",
    ]
    lerobot_eval(
        request.getfixturevalue(f"{family}_checkpoint"),
        tmp_path,
        *arguments,
        "--eval.save_attention_maps=true",
        "--eval.attention.prefix_layers=[-1]",
        "--eval.attention.segmentation=true",
        f"--eval.interventions={BLOCK_TARGET}",
    )
    run = open_run(tmp_path / "out")
    check_views(run)
    assert len(run) == 2
    for episode in run:
        data = episode.dataset
        np.testing.assert_array_equal(data.frame_inference, np.arange(N_STEPS) // 5)
        np.testing.assert_array_equal(data.frame_query, first + np.arange(N_STEPS) % 5)
        assert (int(data.key_row.max()) + 1, int(data.key_column.max()) + 1) == grid
        assert (data.key_kind[0] == Kind.STATE).sum() == 1
        report = verify_episode(episode, thorough=True)
        assert report.passed, report.to_dict()
        assert episode.condition.name == "block_target"
        target = data.instance_role.values.tolist().index("target")
        for number, camera in enumerate(episode.layout.cameras[:2]):
            assert data.mask_camera.values[number] == camera.name
            for inference in range(episode.n_inferences):
                mask = data.segmentation[inference, number].values == target
                covered = patch_coverage(mask, camera.geometry).ravel()
                keys = data.suffix_attention[inference, ..., data.key_camera.values == number].values
                assert (keys[..., covered > 0.2] == 0).all()
                assert (keys[..., covered == 0].max(axis=(0, 1, 2, 3)) > 0).all()


@pytest.fixture
def act_checkpoint(tmp_path):
    """A small ACT with random weights, whose preprocessor normalises images as LeRobot's does."""
    torch = pytest.importorskip("torch")
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.factory import make_pre_post_processors
    from test_act import make_policy

    cameras = ("observation.images.top", "observation.images.wrist")
    visual = {name: PolicyFeature(FeatureType.VISUAL, (3, 256, 256)) for name in cameras}
    state = {"observation.state": PolicyFeature(FeatureType.STATE, (8,))}
    policy = make_policy(
        input_features=visual | state, output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))}
    )
    rgb = {"mean": torch.tensor([0.485, 0.456, 0.406]), "std": torch.tensor([0.229, 0.224, 0.225])}
    stats = {name: {key: value.reshape(3, 1, 1) for key, value in rgb.items()} for name in cameras}
    for name, size in (("observation.state", 8), ("action", 7)):
        stats[name] = {"mean": torch.zeros(size), "std": torch.ones(size)}
    folder = tmp_path / "checkpoint"
    policy.save_pretrained(folder)
    for pipeline in make_pre_post_processors(policy.config, dataset_stats=stats):
        pipeline.save_pretrained(folder)
    return folder


def test_act_is_filmed_as_its_cameras_saw_it(libero_ready, act_checkpoint, tmp_path):
    """Its images are normalised on their way to the policy, and the cameras have other names there."""
    names = {"image": "top", "image2": "wrist"}
    renamed = {f"observation.images.{old}": f"observation.images.{new}" for old, new in names.items()}
    log = lerobot_eval(
        act_checkpoint,
        tmp_path,
        *("--env.task=libero_object", "--env.task_ids=[0]", "--eval.n_episodes=2", "--eval.batch_size=2"),
        f"--rename_map={json.dumps(renamed)}",
        "--eval.save_attention_maps=true",
        "--eval.attention.prefix_layers=[-1]",
    )
    assert "2 of 2 episodes saved" in log
    run = open_run(tmp_path / "out")
    check_views(run, cameras=("top", "wrist"))
    for episode in run:
        np.testing.assert_array_equal(episode.dataset.frame_query, np.arange(N_STEPS) % 5)
        report = verify_episode(episode, thorough=True)
        assert [check.name for check in report.checks if check.passed is not True] in (
            [],
            ["evaluation's timing"],
        ), report.to_dict()
        written = write_overlay(
            episode, tmp_path / f"{episode.path.stem}.mp4", OverlaySettings(camera="all", layer=-1)
        )
        assert count_frames(written.path) == N_STEPS


def test_eval_info_lists_the_stores(synchronous, asynchronous):
    for (folder, _), n in ((synchronous, 2), (asynchronous, 3)):
        info = json.loads((folder / "eval_info.json").read_text())
        paths = [str(episode.path) for episode in open_run(folder)]
        assert info["overall"]["attention_paths"] == paths
        assert info["per_task"][0]["metrics"]["attention"]["n_saved"] == n
        assert len(info["overall"]["video_paths"]) >= n


@pytest.mark.parametrize("kind", ["synchronous", "asynchronous"])
def test_evaluation_is_the_same_without_capture(request, kind, demo_checkpoint, tmp_path):
    """Policy, simulation and videos: bit for bit what they are without us, and without masks."""
    folder, _ = request.getfixturevalue(kind)
    # Of the asynchronous episodes the first batch.
    arguments = SYNCHRONOUS if kind == "synchronous" else [*ASYNCHRONOUS, "--eval.n_episodes=2"]
    lerobot_eval(demo_checkpoint, tmp_path, *arguments)
    plain = tmp_path / "out"
    assert not (plain / "attention").exists()
    videos = sorted((plain / "videos").rglob("*.mp4"))
    assert len(videos) == 2
    for video in videos:
        recorded = folder / video.relative_to(plain)
        if video.read_bytes() != recorded.read_bytes():
            unlike = [
                (frame, int(np.abs(one.astype(int) - other).max()))
                for frame, (one, other) in enumerate(
                    zip(read_frames(video), read_frames(recorded), strict=True)
                )
                if not np.array_equal(one, other)
            ]
            # From the first frame on: the renderer. Later: the policy or the simulation.
            pytest.fail(f"{video.name}: frames that differ, and by how much of 255: {unlike}")
    with_capture, without = (json.loads((f / "eval_info.json").read_text()) for f in (folder, plain))
    metrics = without["per_task"][0]["metrics"]
    assert "attention" not in metrics
    for key in ("sum_rewards", "max_rewards", "successes"):
        assert with_capture["per_task"][0]["metrics"][key][:2] == metrics[key]


def test_pictures_that_nobody_looks_at_are_not_needed(synchronous, demo_checkpoint, tmp_path):
    """What is recorded is bit for bit what it is with pictures at every frame; there are no videos."""
    arguments = [*SYNCHRONOUS[:2], "--eval.n_episodes=1", "--eval.batch_size=1"]
    arguments += ["--eval.save_attention_maps=true", "--eval.attention.segmentation=true"]
    fewer = ("--eval.render=inferences", "--eval.attention.cameras=false")
    lerobot_eval(demo_checkpoint, tmp_path, *arguments, *fewer)
    out, (folder, _) = tmp_path / "out", synchronous
    assert not list(out.rglob("*.mp4"))
    always, (rarely,) = next(iter(open_run(folder))), open_run(out)
    assert "render" not in always.attributes
    assert (rarely.attributes["render"], rarely.videos, rarely.eval_video) == ("inferences", {}, None)
    assert {"action", "reward", "success", "segmentation", "instance_position"} <= set(rarely.arrays)
    for name in rarely.arrays:
        np.testing.assert_array_equal(always.arrays[name], rarely.arrays[name], err_msg=str(name))
    before, after = (json.loads((f / "eval_info.json").read_text()) for f in (folder, out))
    for key in ("sum_rewards", "max_rewards", "successes"):
        assert before["per_task"][0]["metrics"][key][:1] == after["per_task"][0]["metrics"][key]


def pixels_of(episode, camera):
    """Pictures at the inferences' frames: (inference, height, width, 3)."""
    frames = list(read_frames(episode.videos[camera]))
    return np.stack([frames[frame] for frame in episode.arrays.inference_frame.values]).astype(float)


def edges(values):
    """(…, height, width) bool: pixels that differ from their neighbour below or to the right."""
    below = np.diff(values, axis=1, append=values[:, -1:])
    right = np.diff(values, axis=2, append=values[:, :, -1:])
    return (below != 0) | (right != 0)


@pytest.mark.parametrize(
    ("kind", "roles"),
    [
        (
            "synchronous",
            {
                "alphabet_soup_1": "target",
                "basket_1": "destination",
                "milk_1": "distractor",
                "PandaGripper0": "robot",
            },
        ),
        (
            "asynchronous",
            {
                "akita_black_bowl_1": "target",
                "flat_stove_1": "destination",
                "plate_1": "destination",  # as it was told
                "wine_bottle_1": "distractor",
                "wooden_cabinet_1": "background",
                "RethinkMount0": "robot",
            },
        ),
    ],
)
def test_masks_lie_on_what_the_cameras_showed(request, kind, roles):
    folder, _ = request.getfixturevalue(kind)
    for episode in open_run(folder):
        data = episode.arrays
        assert episode.attributes["segmentation"] == {"source": "mujoco"}
        found = dict(zip(data.instance.values, data.instance_role.values, strict=True))
        assert found["background"] == "background"
        assert found | roles == found
        assert data.segmentation.shape == (3, 2, 360, 360)
        cameras = data.mask_camera.values.tolist()
        assert cameras == ["observation.images.image", "observation.images.image2"]
        for number, camera in enumerate(cameras):
            masks, pictures = data.segmentation.values[:, number], pixels_of(episode, camera)
            steps = np.abs(np.diff(pictures, axis=1, append=pictures[:, -1:])).sum(axis=-1)
            steps += np.abs(np.diff(pictures, axis=2, append=pictures[:, :, -1:])).sum(axis=-1)
            on_edges = steps[edges(masks)].mean()
            assert on_edges > 3 * steps.mean()
            for turn in (np.s_[:, ::-1], np.s_[:, :, ::-1], np.s_[:, ::-1, ::-1]):
                assert steps[edges(masks[turn])].mean() < 0.6 * on_edges, "the masks are turned"
        # The target is in sight of the first camera, where things are.
        first = data.segmentation.values[:, 0]
        (target,) = (n for n, name in enumerate(found) if found[name] == "target")
        assert (first == target).any(axis=(1, 2)).all()
        positions = data.instance_position.values
        assert np.isnan(positions[:, 0]).all()
        assert np.isfinite(positions[:, 1:]).all()
        gripper = list(found).index("PandaGripper0")
        np.testing.assert_allclose(
            positions[:, gripper], data.state.values[data.inference_frame.values, :3], atol=0.15
        )  # the state has the point between the fingers, the body is the hand


def test_inspect_tells_what_is_there(synchronous):
    folder, _ = synchronous

    def inspect(path, *options):
        result = subprocess.run(
            [command("lerobot-attn"), "inspect", str(path), *options],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "COLUMNS": "140"},
        )
        return result.stdout

    run = json.loads(inspect(folder, "--json"))
    assert (run["n_episodes"], run["n_complete"]) == (2, 2)
    assert "2 episodes, 2 complete, 0 successful" in inspect(folder)
    store = folder / "attention" / "libero_object_0" / "episode_00000.zarr"
    facts = json.loads(inspect(store, "--json"))
    assert facts["rows_sum_to_one"] is True
    assert abs(sum(facts["attention_mass"].values()) - 1) < 1e-3
    assert facts["attention_mass"]["padding"] == 0
    text = inspect(store)
    assert "sanity: rows sum to 1" in text
    assert RANDOM_WEIGHTS in text


def test_real_episodes_verify_and_every_picture_is_drawn(synchronous, asynchronous, tmp_path):
    """What a person does after recording, on two suites: verify, plot, overlay, compare."""
    first, second = (open_run(folder)[0] for folder in (synchronous[0], asynchronous[0]))
    for episode in (first, second):
        report = verify_episode(episode, thorough=True)
        assert report.passed, report.to_dict()
        assert [check.name for check in report.checks if check.passed is None] in (
            [],
            ["evaluation's timing"],
        )
        assert len(contact_sheet(episode).axes) == 3 * 3 * 2 + 1
        written = write_overlay(
            episode, tmp_path / f"{episode.path.parent.name}.mp4", OverlaySettings(camera="all")
        )
        assert count_frames(written.path) == N_STEPS
    for kind in KINDS:
        if kind in ("cross-modal", "vision"):
            with pytest.raises(SelectionError, match=r"(prefix|vision) attention was not captured"):
                plot(first, kind)
        else:
            assert plot(first, kind).axes
        assert plot(second, kind).axes
    files = {file.name for file in write_report([first], [second], tmp_path / "report")}
    assert {"comparison.png", "comparison.mp4", "report.md"} <= files
    assert count_frames(tmp_path / "report" / "comparison.mp4") == N_STEPS


def test_an_experiment_begins_each_condition_alike(libero_ready, demo_checkpoint, tmp_path, monkeypatch):
    """Another object is named: the scene and the noise are the same, the words and the actions are not."""
    plan = ExperimentPlan(
        name="swap",
        policy={"path": str(demo_checkpoint), "device": "cpu", "n_action_steps": 5},
        env={"type": "libero", "task": "libero_object", "task_ids": [0], "episode_length": N_STEPS},
        n_episodes=1,
        capture={"layers": "none", "mean_layers": "all", "segmentation": True},
        conditions=[
            {"name": "milk", "interventions": [{"kind": "task", "replace": {"alphabet soup": "milk"}}]},
            {"name": "twin"},  # nothing is done, as in the baseline
        ],
        no_control=True,
        render="inferences",  # nobody looks at the pictures in between
    )

    def in_a_fork(arguments):
        with Forked(run_lerobot_eval, tmp_path / "logs", STOCK, argv=arguments) as process:
            status = process.wait(PATIENCE_S)
        assert status == 0, process.log[-4000:]
        return status

    monkeypatch.setattr(experiment, "launch_eval", in_a_fork)
    assert run_experiment(plan, tmp_path / "out") == 0
    baseline, swapped, twin = open_run(tmp_path / "out")
    assert [e.condition.name for e in (baseline, swapped, twin)] == ["baseline", "milk", "twin"]
    for name in ("action_chunk", "state"):  # where nothing is done, nothing differs between processes
        np.testing.assert_array_equal(baseline.arrays[name], twin.arrays[name])
    assert swapped.attributes["experiment"] == {
        "name": "swap",
        "condition": "milk",
        "control_of": None,
    }
    assert given_instruction(baseline.arrays) == "pick up the alphabet soup and place it in the basket"
    assert given_instruction(swapped.arrays) == "pick up the milk and place it in the basket"
    for name in ("state", "instance_position"):
        np.testing.assert_array_equal(baseline.arrays[name][0], swapped.arrays[name][0])
    for episode in (baseline, swapped, twin):
        assert {"kind": "fixed_noise", "seed": 1000} in [dict(one) for one in episode.condition.interventions]
    chunks = [episode.arrays["action_chunk"].values for episode in (baseline, swapped)]
    assert np.abs(chunks[0][0] - chunks[1][0]).max() > 0
    went = approached(baseline.arrays)
    assert went.targets == ("alphabet_soup_1",)
    assert {"milk_1", "alphabet_soup_1"} < set(went.objects)
    assert "basket_1" not in went.objects
    assert 0.05 < min(went.nearest_m.values()) < 1  # the same frame of reference
    found = find_effects(open_run(tmp_path / "out"))
    effects = {effect.metric: effect for effect in found.effects if effect.condition == "milk"}
    assert found.notes == ()
    assert effects["action_difference"].a > 0
    assert effects["path_length"].n == 1


@pytest.mark.browser
def test_the_explorer_shows_what_was_recorded(asynchronous, pages):
    """In the browser: the run's table, each camera's exact frames and exactly the stored maps, the prompt."""
    folder, _ = asynchronous
    episode = open_run(folder)[1]
    data = episode.arrays
    with pages.serving(folder) as address:
        page = pages.open(address, wait=False)
        page.locator(".episodes img").nth(2).wait_for()
        browser.until(
            page,
            lambda: page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)"),
            "the thumbnails are there",
        )
        page.get_by_text("Random weights: these maps mean nothing").wait_for()
        page.get_by_role("link", name="episode 1").click()
        browser.drawn(page, frame=0)
        frames = {
            camera: list(read_frames(video, size_px=episode.image_size_px(camera)))
            for camera, video in episode.videos.items()
        }
        page.get_by_role("slider", name="Opacity").fill("0")
        for frame in (0, N_STEPS - 1, 5):
            page.get_by_role("slider", name="Frame").fill(str(frame))
            browser.drawn(page, frame=frame)
            for camera, shown in frames.items():
                browser.assert_frames(page, shown, camera.rpartition(".")[2], frame)
            where = {"frame": frame, "query": "executed"}
            end = browser.colour_end([data], "share", **where)
            browser.assert_shows(page, data, end, "share", **where)
        page.evaluate("document.activeElement.blur()")  # the slider has the arrows until then
        page.keyboard.press("ArrowDown")
        page.keyboard.press("h")
        last = int(data.all_layer[-1])
        browser.drawn(page, frame=5, layer=last - 1, head="max")
        where = {"frame": 5, "query": "executed", "layer": last - 1, "head": "max"}
        browser.assert_shows(page, data, browser.colour_end([data], "share", **where), "share", **where)
        labels = page.locator("#words .bar-label").all_inner_texts()
        assert labels[: len(episode.task.split())] == episode.task.split()
        page.locator("#words button.token", has_text=labels[0]).first.hover()
        page.get_by_text(f"what “{labels[0]}” looks at").wait_for()
