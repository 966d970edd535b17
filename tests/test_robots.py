"""`lerobot-rollout` on a robot that follows a script: each strategy, synchronous or real-time chunking."""

from __future__ import annotations

import contextlib
import functools
import gc
import re
import shlex
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from lerobot.datasets import LeRobotDataset  # noqa: E402
from lerobot.policies.pi05 import PI05Policy  # noqa: E402
from lerobot.rollout.inference import rtc  # noqa: E402
from lerobot.rollout.strategies import dagger, episodic, highlight, sentry  # noqa: E402
from lerobot.scripts import lerobot_rollout  # noqa: E402
from robots import CAMERAS, JOINTS, MOVED, Scripted, brightness_of  # noqa: E402

from lerobot_attn import open_run, plugin  # noqa: E402
from lerobot_attn.recording.robot import RobotRecording  # noqa: E402
from lerobot_attn.store.video import count_frames, read_frames  # noqa: E402
from lerobot_attn.verify import verify_episode  # noqa: E402

RECIPES = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
FPS = 32  # a power of two: times of frames are exact


class Clock:
    """Stands in for `time` in LeRobot's inference engine: a tick of the robot is 1/32 s, whatever it took."""

    def __init__(self, robot):
        self.robot = robot

    def perf_counter(self):
        return self.robot().n_looks / FPS

    def sleep(self, seconds):
        time.sleep(0.001)


class Conductor:
    """Makes real-time chunking repeatable: an inference begins as soon as it may, and lasts so many ticks.

    Attributes:
        spans: the looks at the robot at which each inference began and ended.
        shown: the number that the first joint told each inference.
    """

    def __init__(self, monkeypatch, delay):
        self.delay, self.spans, self.shown = delay, [], []
        self.begun, self.may_end, self.merged = (threading.Event() for _ in range(3))
        self.queue = None
        monkeypatch.setattr(rtc, "time", Clock(lambda: Scripted.made[-1]))
        for owner, name in ((PI05Policy, "predict_action_chunk"), (rtc.ActionQueue, "merge")):
            monkeypatch.setattr(owner, name, self._told(getattr(owner, name), getattr(self, f"_{name}")))
        prepare = rtc.prepare_observation_for_inference

        def prepared(observation, *rest):
            self.shown.append(round(float(observation["observation.state"][0]) * 1000))
            return prepare(observation, *rest)

        monkeypatch.setattr(rtc, "prepare_observation_for_inference", prepared)
        monkeypatch.setattr(Scripted, "before_look", lambda robot: self.before_look(robot))

    def _told(self, original, instead):
        @functools.wraps(original)
        def method(*args, **kwargs):
            return instead(original, *args, **kwargs)

        return method

    def _predict_action_chunk(self, original, *args, **kwargs):
        self.spans.append([Scripted.made[-1].n_looks, None])
        self.begun.set()
        assert self.may_end.wait(60)
        return original(*args, **kwargs)

    def _merge(self, original, queue, *args, **kwargs):
        self.spans[-1][1] = Scripted.made[-1].n_looks
        original(queue, *args, **kwargs)
        self.queue = queue
        self.may_end.clear()
        self.begun.clear()
        self.merged.set()

    def before_look(self, robot):
        """Called when the robot is about to be looked at, on the control loop's thread."""
        if robot.n_looks == robot.config.breaks_at:
            self.may_end.set()  # LeRobot waits for a policy that still thinks
        if robot.n_looks < 2 or self.may_end.is_set():  # the first look is at the robot's rest
            return
        if self.begun.is_set():
            if robot.n_looks >= self.spans[-1][0] + self.delay:
                self._end()
        elif self.queue is None or self.queue.qsize() <= 30:
            assert self.begun.wait(60)
            if not self.delay:
                self._end()

    def _end(self):
        self.merged.clear()
        self.may_end.set()
        assert self.merged.wait(60)


@pytest.fixture(scope="module")
def postprocess(demo_policy):
    """The policy's postprocessor."""
    return demo_policy()[2]


@pytest.fixture
def rollout(demo_checkpoint, tmp_path, monkeypatch):
    """Run `lerobot-rollout` in this process: options → the robot."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(lerobot_rollout.ProcessSignalHandler, "_register_handlers", lambda self: None)
    # As the plugin does when LeRobot's loader imports it; in one process that is only once.
    monkeypatch.setattr(lerobot_rollout, "rollout", lerobot_rollout.rollout)
    plugin.install_rollout(vars(lerobot_rollout))

    def run(*options, recorded=True, strategy="base", fps=FPS, raises=None):
        Scripted.made.clear()
        dataset = (
            []
            if strategy == "base"
            else [
                "--dataset.repo_id=me/rollout_scripted",
                f"--dataset.root={tmp_path / f'dataset_{recorded}'}",
                "--dataset.push_to_hub=false",
                "--dataset.video=false",
                "--dataset.single_task=pick up the soup",
                f"--dataset.fps={fps}",
            ]
        )
        attention = ["--save_attention_maps=true", f"--attention.dir={tmp_path / 'attention'}"]
        argv = [
            "lerobot-rollout",
            "--robot.type=scripted",
            f"--policy.path={demo_checkpoint}",
            "--policy.num_inference_steps=2",
            "--task=pick up the soup",
            f"--fps={fps}",
            "--play_sounds=false",
            "--return_to_initial_position=false",
            f"--strategy.type={strategy}",
            *dataset,
            *(attention if recorded else []),
            *(option for option in options if recorded or "attention" not in option),
        ]
        monkeypatch.setattr(sys, "argv", argv)
        torch.manual_seed(0)
        with pytest.raises(raises) if raises else contextlib.nullcontext():
            lerobot_rollout.main()
        return Scripted.made[-1]

    run.stores = tmp_path / "attention"
    run.checkpoint = demo_checkpoint
    run.dataset = tmp_path / "dataset_True"
    return run


def passes(episode):
    report = verify_episode(episode)
    assert report.passed, [check for check in report.checks if check.passed is False]
    return {check.name: check.detail for check in report.checks}


def sent_rows(robot):
    return np.array([[action[name] for name in MOVED] for action in robot.sent], np.float32)


def test_a_synchronous_rollout_moves_the_robot_as_without_us_and_every_frame_is_its_action(rollout):
    bare = rollout("--robot.breaks_at=34", recorded=False, raises=ConnectionError)
    robot = rollout("--robot.breaks_at=34", raises=ConnectionError)
    assert robot.sent == bare.sent
    assert len(robot.sent) == 33  # after each look but the first, which is at the robot at rest
    assert not robot.is_connected
    (episode,) = open_run(rollout.stores)
    assert not episode.is_complete
    assert "cable came loose" in episode.attributes["interrupted_by"]
    data = episode.dataset.load()
    np.testing.assert_array_equal(data.frame_inference, np.arange(33) // 10)
    np.testing.assert_array_equal(data.frame_query, np.arange(33) % 10)
    np.testing.assert_array_equal(data.inference_frame, [0, 10, 20, 30])
    np.testing.assert_array_equal(data.observed_before, 0)
    np.testing.assert_array_equal(data.inference_delay, 0)
    np.testing.assert_array_equal(data.action, sent_rows(robot))
    np.testing.assert_array_equal(np.round(data.state.values[:, 0] * 1000), np.arange(2, 35))
    assert data.state_dim.values.tolist() == list(JOINTS)
    assert data.action_dim.values.tolist() == list(MOVED)
    assert (np.diff(data.frame_time) > 0).all()
    assert (data.inference_end > data.inference_start).all()
    # Its joints are not where LIBERO's arm is, and its cameras show shades.
    assert input_checks(episode) == {"state range": "failed", "pictures": "warning"}


def input_checks(episode):
    return {check["name"]: check["status"] for check in episode.attributes["input_checks"]}


def expected_rows(spans, last_look):
    """What LeRobot's queue must hand out at each look, from when inferences began and ended alone."""
    queue, rows = [], []
    for number in range(2, last_look + 1):
        for inference, (began, ended) in enumerate(spans):
            if ended == number - 1:  # the new chunk replaces what is left, without what it is too late for
                queue = [(inference, row) for row in range(ended - began, 50)]
        if queue:
            rows.append((number, *queue.pop(0)))
    return np.array(rows)


@pytest.mark.parametrize("delay", [0, 3, 11])
def test_with_real_time_chunking_each_frame_has_the_row_that_was_sent(rollout, postprocess, delay):
    last_look = 80
    robots = []
    for recorded in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            conductor = Conductor(patch, delay)
            options = [f"--robot.breaks_at={last_look}", "--inference.type=rtc"]
            robots.append(rollout(*options, recorded=recorded, raises=ConnectionError))
    bare, robot = robots
    assert robot.sent == bare.sent
    (episode,) = open_run(rollout.stores)
    data = episode.dataset.load()
    spans = [span for span in conductor.spans if span[1] is not None]
    assert len(spans) >= 4
    looks, inference, row = expected_rows(spans, last_look).T
    assert looks.tolist() == robot.sent_after
    np.testing.assert_array_equal(data.frame_inference, inference)
    np.testing.assert_array_equal(data.frame_query, row)
    sent = sent_rows(robot)
    np.testing.assert_array_equal(data.action, sent)
    chunk_rows = torch.from_numpy(data.action_chunk.values[inference, row])
    np.testing.assert_allclose(postprocess(chunk_rows), sent, atol=1e-6)
    np.testing.assert_array_equal(np.round(data.state.values[:, 0] * 1000), looks)
    # Each inference saw the look at which it began, not the one at which its first action was sent.
    began = np.array(spans)[:, 0]
    np.testing.assert_array_equal(began, conductor.shown[: len(spans)])
    np.testing.assert_array_equal(data.inference_frame, np.maximum(began - looks[0], 0))
    np.testing.assert_array_equal(data.observed_before, np.maximum(looks[0] - began, 0))
    np.testing.assert_array_equal(data.inference_delay, delay)
    shows_the_looks(episode, looks)
    assert input_checks(episode)["state range"] == "failed"


# Strategies: the store's frames are the data set's


class Keys:
    """Presses keys when the robot has been looked at so often."""

    def __init__(self, monkeypatch, at):
        """`at`: number of a look → what to do just before the next one."""
        before = Scripted.before_look

        def before_look(robot):
            if robot.n_looks in at:
                at.pop(robot.n_looks)()
            before(robot)

        monkeypatch.setattr(Scripted, "before_look", before_look)


def same_frames(run):
    """Check that each episode's store has the data set's frames and passes; return their arrays."""
    found = []
    for episode in run:
        assert episode.is_complete
        passes(episode)
        data = episode.dataset.load()
        number = episode.attributes["episode_index"]
        rows = LeRobotDataset("me/rollout_scripted", root=episode.attributes["dataset"]["root"])
        rows = rows.hf_dataset.with_format("numpy")
        theirs = rows.filter(lambda row, number=number: row["episode_index"] == number)
        np.testing.assert_array_equal(data.state, np.stack(theirs["observation.state"]))
        np.testing.assert_array_equal(data.action, np.stack(theirs["action"]))
        assert episode.attributes["dataset"]["repo_id"].startswith("me/rollout_scripted")
        if "n_repeated_pictures" not in episode.attributes:  # the writer fell behind
            shows_the_looks(episode, looks_of(data))
        found.append(data)
    return found


def shows_the_looks(episode, looks):
    """Check that each frame of each camera's video is that camera's picture at the frame's look."""
    assert len(episode.videos) == 2
    for camera, path in enumerate(episode.videos.values()):
        frames = np.stack(list(read_frames(path))).mean(axis=(1, 2, 3))
        expected = [brightness_of(number)[camera] for number in looks]
        np.testing.assert_allclose(frames, expected, atol=1.4)  # looks are three greys apart


def looks_of(data):
    return np.round(data.state.values[:, 0] * 1000).astype(int)


def token_of(data, policy_actions):
    """The frames' actions, from the chunks that the store says gave them."""
    rows = data.action_chunk.values[data.frame_inference.values, data.frame_query.values]
    return np.asarray(policy_actions(torch.from_numpy(rows)))


def test_episodic_episodes_end_within_a_chunk_are_recorded_again_and_reset(rollout, monkeypatch, postprocess):
    events = {"exit_early": False, "rerecord_episode": False, "stop_recording": False}
    monkeypatch.setattr(episodic, "init_keyboard_listener", lambda: (None, events))
    ends = functools.partial(events.update, exit_early=True)
    again = functools.partial(events.update, exit_early=True, rerecord_episode=True)
    Keys(monkeypatch, {14: ends, 18: ends, 30: again, 33: ends, 47: ends})
    robot = rollout(
        "--dataset.num_episodes=2", "--dataset.episode_time_s=60", "--dataset.reset_time_s=60",
        "--strategy.reset_to_initial_position=false", strategy="episodic",
    )  # fmt: skip
    first, second = same_frames(open_run(rollout.stores))
    # Key 14 ends the first; looks 16 to 18 are the reset; what begins then is discarded by key 30.
    assert looks_of(first).tolist() == list(range(2, 16))
    np.testing.assert_array_equal(first.frame_query, np.arange(14) % 10)
    assert looks_of(second)[-1] == 48
    np.testing.assert_array_equal(second.frame_query, np.arange(len(looks_of(second))) % 10)
    np.testing.assert_array_equal(second.observed_before, 0)
    for data in (first, second):
        np.testing.assert_allclose(token_of(data, postprocess), data.action, atol=1e-6)
    assert not robot.is_connected


def episodes_of_looks(monkeypatch, module, n_looks):
    """Let a strategy's episodes last so many looks at the robot, whatever the machine is doing."""
    monkeypatch.setattr(module, "estimate_max_episode_seconds", lambda *args, **kwargs: n_looks)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: Scripted.made[-1].n_looks))


def test_sentry_episodes_begin_with_the_chunk_that_is_still_executed(rollout, monkeypatch, postprocess):
    episodes_of_looks(monkeypatch, sentry, 13)
    rollout("--robot.breaks_at=35", strategy="sentry", raises=ConnectionError)
    found = same_frames(open_run(rollout.stores))
    assert [looks_of(data).tolist() for data in found] == [
        list(range(2, 15)), list(range(15, 28)), list(range(28, 36)),
    ]  # fmt: skip
    for data in found:
        tick = looks_of(data) - 2
        np.testing.assert_array_equal(data.frame_query, tick % 10)
        np.testing.assert_array_equal(data.frame_inference, tick // 10 - tick[0] // 10)
        np.testing.assert_allclose(token_of(data, postprocess), data.action, atol=1e-6)
    np.testing.assert_array_equal(found[1].inference_frame, [0, 7])
    np.testing.assert_array_equal(found[1].observed_before, [3, 0])  # asked three frames before this episode
    # What the policy attended to is the same, whichever episode it is told in.
    np.testing.assert_array_equal(found[0].suffix_attention[-1], found[1].suffix_attention[0])


@pytest.mark.parametrize("memory_mb", [512, 1])
def test_a_highlight_has_the_frames_before_the_key(rollout, monkeypatch, postprocess, memory_mb):
    pressed = {}
    monkeypatch.setattr(
        highlight, "create_key_listener", lambda dispatch, **kwargs: pressed.setdefault("key", dispatch)
    )
    monkeypatch.setattr(
        highlight.HighlightStrategy, "teardown", lambda self, ctx: self._teardown_hardware(ctx.hardware)
    )
    save = lambda: pressed["key"]("s")  # noqa: E731
    Keys(monkeypatch, {27: save, 40: save, 52: save, 55: save, 60: lambda: pressed["key"]("esc")})
    rollout(
        "--strategy.ring_buffer_seconds=0.5", f"--attention.queue_mb={memory_mb}", strategy="highlight"
    )  # fmt: skip
    first, second = same_frames(open_run(rollout.stores))
    assert looks_of(first).tolist() == list(range(12, 42))  # 16 frames of half a second, and what came then
    assert looks_of(second).tolist() == list(range(42, 57))
    for data in (first, second):
        is_token = data.frame_query.values >= 0
        tick = looks_of(data) - 2
        if memory_mb == 512:
            assert is_token.all()
        elif data is first:  # the oldest maps of the buffer had to go
            assert not is_token[0]
            assert is_token.any()
        np.testing.assert_array_equal(data.frame_query[is_token], tick[is_token] % 10)
        given = token_of(data, postprocess)[is_token]
        np.testing.assert_allclose(given, data.action[is_token], atol=1e-6)


@pytest.mark.parametrize("autonomous", [True, False])
def test_what_a_person_does_is_no_token_of_the_policy(rollout, monkeypatch, postprocess, autonomous):
    told = {}
    monkeypatch.setattr(dagger, "_init_dagger_keyboard", lambda events, keys: told.update(events=events))
    episodes_of_looks(monkeypatch, dagger, 1000)
    keys = {15: "pause_resume", 18: "correction", 24: "correction", 27: "pause_resume"}
    at = {look: functools.partial(lambda name: told["events"].request_transition(name), name)
          for look, name in keys.items()}  # fmt: skip
    Keys(monkeypatch, {**at, 40: lambda: told["events"].stop_recording.set()})
    rollout(
        "--teleop.type=scripted_hand", "--strategy.smooth_handover=false", "--strategy.num_episodes=3",
        f"--strategy.record_autonomous={str(autonomous).lower()}", strategy="dagger",
    )  # fmt: skip
    (data,) = same_frames(open_run(rollout.stores))
    is_persons = (data.action == 0.5).all("action_dim").values
    np.testing.assert_array_equal(data.frame_query.values == -1, is_persons)
    assert is_persons.sum() == 6
    if autonomous:
        np.testing.assert_allclose(
            token_of(data, postprocess)[~is_persons], data.action[~is_persons], atol=1e-6
        )
        first_after = int(np.flatnonzero(is_persons)[-1]) + 1
        assert data.frame_query[first_after] == 0  # the policy was reset, and asked anew
    else:
        assert is_persons.all()
        # What it looked at when the person took over: asked before the episode began.
        assert data.sizes["inference"] == 1
        assert data.observed_before > 0


def test_between_two_actions_there_is_no_token(rollout, postprocess):
    robot = rollout("--robot.breaks_at=24", "--interpolation_multiplier=3", raises=ConnectionError)
    (episode,) = open_run(rollout.stores)
    data = episode.dataset.load()
    assert episode.attributes["videos"]["observation.images.image"]["fps"] == 3 * FPS
    assert len(robot.sent) == data.sizes["frame"] == 23
    # The first action has none before it; then every third is one of the policy.
    expected = np.full(23, -1)
    expected[[0, *range(3, 23, 3)]] = np.arange(8)
    np.testing.assert_array_equal(data.frame_query, expected)
    is_token = expected >= 0
    np.testing.assert_allclose(token_of(data, postprocess)[is_token], data.action[is_token], atol=1e-6)


# What goes wrong


def test_a_writer_that_falls_behind_costs_inferences_and_never_the_robots_time(rollout, monkeypatch):
    from lerobot_attn.store.writer import EpisodeWriter

    may_write = threading.Event()
    append = EpisodeWriter.append_inference

    def slow(writer, rows):
        assert may_write.wait(60)
        append(writer, rows)

    monkeypatch.setattr(EpisodeWriter, "append_inference", slow)
    Keys(monkeypatch, {43: may_write.set})  # the disk stood still for four inferences
    robot = rollout("--robot.breaks_at=44", "--attention.queue_mb=8", raises=ConnectionError)
    assert len(robot.sent) == 43
    (episode,) = open_run(rollout.stores)
    data = episode.dataset.load()
    dropped = episode.attributes["dropped_inferences"]
    assert dropped
    assert set(dropped) < {10, 20, 30, 40}
    assert sorted([*data.inference_frame.values.tolist(), *dropped]) == [0, 10, 20, 30, 40]
    frames = np.arange(43)
    lost = np.isin(frames // 10 * 10, dropped)
    np.testing.assert_array_equal(data.frame_query, np.where(lost, -1, frames % 10))
    assert episode.attributes["n_repeated_pictures"] > 0
    for path in episode.videos.values():
        assert count_frames(path) == 43
    from lerobot_attn.inspection import describe_episode, render_episode

    text = rendered(render_episode(describe_episode(episode)))
    assert f"{len(dropped)} inferences are missing" in text
    assert "frames show the pictures of the frame before" in text
    assert "robot" in text


def rendered(what):
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    console.print(what)
    return console.file.getvalue()


def test_a_policy_may_wait_for_the_writer_if_that_is_asked_for(rollout, monkeypatch):
    rollout(
        "--robot.breaks_at=44", "--attention.queue_mb=1", "--attention.when_behind=wait",
        raises=ConnectionError,
    )  # fmt: skip
    (episode,) = open_run(rollout.stores)
    assert "dropped_inferences" not in episode.attributes
    np.testing.assert_array_equal(episode.dataset.frame_query, np.arange(43) % 10)


def test_a_full_disk_does_not_stop_the_robot(rollout, monkeypatch):
    import errno

    from lerobot_attn.store.writer import EpisodeWriter

    append, calls = EpisodeWriter.append_inference, []

    def full(writer, rows):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(writer, rows)

    monkeypatch.setattr(EpisodeWriter, "append_inference", full)
    monkeypatch.setattr(EpisodeWriter, "append_frames", EpisodeWriter.append_frames)
    robot = rollout("--robot.breaks_at=60", raises=ConnectionError)
    assert len(robot.sent) == 59
    (episode,) = open_run(rollout.stores)
    assert not episode.is_complete
    assert episode.n_inferences == 2
    assert "the disk is full" in episode.attributes["error"]


def test_a_policy_that_raises_ends_the_episode_where_it_was(rollout, monkeypatch):
    predict, calls = PI05Policy.predict_action_chunk, []

    @functools.wraps(predict)
    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("the policy broke")
        return predict(*args, **kwargs)

    monkeypatch.setattr(PI05Policy, "predict_action_chunk", breaks)
    robot = rollout(raises=ZeroDivisionError)
    assert not robot.is_connected
    (episode,) = open_run(rollout.stores)
    assert "the policy broke" in episode.attributes["interrupted_by"]
    assert episode.dataset.sizes["frame"] == 20
    assert episode.attributes["policy_errors"] == ["the policy broke"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attention.layers=[9]"], "layer 9 does not exist"),
        (["--attention.keep=success"], "expected 'all' on a robot"),
        (["--attention.when_behind=never"], "when_behind: got 'never'"),
        (["--attention=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_cannot_be_recorded_is_refused_and_the_robot_let_go(rollout, capsys, options, message):
    with pytest.raises(SystemExit) as refused:
        rollout(*options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not any(robot.is_connected for robot in Scripted.made)


def test_stores_of_an_earlier_rollout_are_not_mixed_in(rollout):
    rollout("--robot.breaks_at=6", raises=ConnectionError)
    with pytest.raises(SystemExit, match="already holds episodes"):
        rollout("--robot.breaks_at=6")
    assert not Scripted.made[-1].is_connected
    with pytest.raises(SystemExit, match=r"attention\.existing=skip"):
        rollout("--robot.breaks_at=6")
    rollout("--robot.breaks_at=6", "--attention.existing=overwrite", raises=ConnectionError)


def test_ctrl_c_ends_the_rollout_lets_the_robot_go_and_closes_the_store(demo_checkpoint, tmp_path):
    import os
    import signal
    import subprocess

    script = tmp_path / "rollout.py"
    script.write_text(
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import robots\n"
        "was = robots.Scripted.disconnect\n"
        "robots.Scripted.disconnect = lambda self: (was(self), print('let go', flush=True))\n"
        "from lerobot.scripts.lerobot_rollout import main\n"
        "main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [
            sys.executable, str(script), "--robot.type=scripted", f"--policy.path={demo_checkpoint}",
            "--policy.num_inference_steps=2", "--task=pick up the soup", "--fps=30", "--inference.type=rtc",
            "--return_to_initial_position=false", "--save_attention_maps=true",
            f"--attention.dir={tmp_path / 'attention'}",
        ],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    stores = tmp_path / "attention"
    for _ in range(600):
        found = [*stores.glob("*/episode_*.zarr/zarr.json")]
        if found and '"complete": false' in found[0].read_text() and len([*stores.glob("*/*/*/c/*")]) > 1:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "let go" in output
    (episode,) = open_run(stores)
    assert episode.is_complete, output
    assert episode.attributes["ended_by"] == "the rollout's end"
    passes(episode)


COMMANDS = re.findall(r"^lerobot-rollout .*?[^\\]$", RECIPES, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_docs_are_understood(command, rollout, monkeypatch):
    """They are parsed; the arm that they name is not at hand."""
    command = command.replace("\\\n", "").replace("CHECKPOINT", str(rollout.checkpoint))
    seen = []

    def build(cfg, event):
        seen.append(cfg)
        raise NotImplementedError("no arm here")

    monkeypatch.setattr(sys, "argv", shlex.split(command))
    monkeypatch.setattr(lerobot_rollout, "build_rollout_context", build)
    with pytest.raises(NotImplementedError):
        lerobot_rollout.main()
    (cfg,) = seen
    assert cfg.save_attention_maps
    assert cfg.robot.port == "/dev/ttyACM0"


def test_a_robot_may_fill_the_same_pictures_again_and_again(rollout, monkeypatch):
    original, shown = Scripted.get_observation, {}

    def get_observation(robot):
        fresh = original(robot)
        for camera in CAMERAS:
            shown.setdefault(camera, np.empty_like(fresh[camera]))[:] = fresh[camera]
        return {**fresh, **shown}

    monkeypatch.setattr(Scripted, "get_observation", get_observation)
    rollout("--robot.breaks_at=24", raises=ConnectionError)
    (episode,) = open_run(rollout.stores)
    shows_the_looks(episode, np.arange(2, 25))


def test_threads_take_their_usual_turns_again_afterwards(rollout):
    before = sys.getswitchinterval()
    rollout("--robot.breaks_at=4", raises=ConnectionError)
    assert sys.getswitchinterval() == before


def test_the_maps_of_past_inferences_are_not_kept_in_memory(rollout, monkeypatch):
    made, alive = [], []
    original = RobotRecording.on_chunk

    def on_chunk(recording, delay=0):
        inference = original(recording, delay)
        made.append(weakref.ref(inference))
        return inference

    def count():
        gc.collect()
        alive.append(sum(found() is not None for found in made))

    monkeypatch.setattr(RobotRecording, "on_chunk", on_chunk)
    Keys(monkeypatch, {58: count})
    rollout("--robot.breaks_at=60", raises=ConnectionError)
    assert len(made) == 6
    assert alive[0] <= 2
