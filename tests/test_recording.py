"""Recording through LeRobot's own evaluation functions, where policy and environment have a known truth.

The scripted policy's action of token k in inference i of environment e is (e, i, k, noise): an episode's
stored actions therefore say themselves which inference and token they came from.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import tempfile
import threading
import time
import weakref
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

import scripted  # noqa: E402
from evaluation import evaluate_all  # noqa: E402

from lerobot_attn import plugin  # noqa: E402
from lerobot_attn.capture import HostCopies  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.errors import CaptureError, StoreError  # noqa: E402
from lerobot_attn.policies import ADAPTERS  # noqa: E402
from lerobot_attn.recording.background import BackgroundWriter  # noqa: E402
from lerobot_attn.recording.episode import EpisodeJob  # noqa: E402
from lerobot_attn.recording.run import RunRecorder  # noqa: E402
from lerobot_attn.store.reader import open_episode, open_run  # noqa: E402
from lerobot_attn.store.video import VideoWriter, read_frames  # noqa: E402
from lerobot_attn.store.writer import EpisodeWriter  # noqa: E402


@pytest.fixture(autouse=True)
def scripted_adapter(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "0")  # LeRobot's own way to leave its progress bars out
    monkeypatch.setitem(ADAPTERS, "scripted", scripted.ADAPTER)


@pytest.fixture
def eval_namespace():
    return dict(vars(importlib.import_module(plugin.EVAL_MODULE)))


def evaluate(
    folder,
    envs,
    *,
    policy=None,
    n_episodes=None,
    videos=10,
    record=True,
    recording=None,
    env_preprocessor=lambda value: value,
    preprocessor=lambda value: value,
    group="group",
    **settings,
):
    """Run LeRobot's `eval_policy_all` over `{task_id: vector environment}`; return its info and the run."""
    run = None
    if record:
        run = RunRecorder(AttentionConfig(**settings), folder / "attention", {"policy": {"dtype": "float32"}})
    how = recording or {"max_episodes_rendered": videos, "videos_dir": folder / "videos"}
    if n_episodes is not None:
        how = {**how, "n_episodes": n_episodes}
    processors = {"env_preprocessor": env_preprocessor, "preprocessor": preprocessor}
    return evaluate_all(envs, policy or make_policy(), run, group=group, **processors, **how), run


def make_policy(**settings):
    return scripted.ScriptedPolicy(scripted.make_config(**settings))


@pytest.mark.parametrize("n_action_steps", [1, 10, 50])
@pytest.mark.parametrize("lengths", [(23,), (7, 23, 55)])
def test_frames_inferences_and_tokens_match_the_truth(tmp_path, n_action_steps, lengths):
    envs = {3: scripted.make_envs(lengths)}
    policy = make_policy(n_action_steps=n_action_steps)
    info, run = evaluate(tmp_path, envs, policy=policy, layers="all")
    assert not run.failures
    for env, length in enumerate(lengths):
        path = tmp_path / "attention" / "group_3" / f"episode_{env:05d}.zarr"
        episode = open_episode(path)
        data = episode.dataset.load()
        assert episode.is_complete
        assert episode.n_frames == length
        assert episode.n_inferences == math.ceil(length / n_action_steps)
        frames = np.arange(length)
        np.testing.assert_array_equal(data.inference_frame, np.arange(0, length, n_action_steps))
        np.testing.assert_array_equal(data.frame_inference, frames // n_action_steps)
        # The suffix opens with a state token: action k is query k + 1.
        np.testing.assert_array_equal(data.frame_query, frames % n_action_steps + 1)
        # What was executed says itself where it came from.
        np.testing.assert_array_equal(data.action[:, 0], env)
        np.testing.assert_array_equal(data.action[:, 1], data.frame_inference)
        np.testing.assert_array_equal(data.action[:, 2], data.frame_query - 1)
        chunk = data.action_chunk.values[data.frame_inference.values, data.frame_query.values]
        np.testing.assert_array_equal(data.action, chunk)
        assert np.isnan(data.action_chunk[:, 0]).all()
        np.testing.assert_array_equal(data.reward, frames)
        np.testing.assert_array_equal(data.state, np.stack([frames, -frames], axis=1))
        for inference in range(episode.n_inferences):
            for step, layer in ((0, 0), (2, 3)):
                true = scripted.attention_of(inference, step, layer, len(lengths))[env].numpy()
                stored = data.suffix_attention[inference, step, layer, ..., : true.shape[-1]]
                np.testing.assert_array_equal(stored, true.astype(np.float16))
        # Frame t of every video shows the observation that action t answers.
        for video in (*episode.videos.values(), episode.eval_video):
            shown = [frame.mean() for frame in read_frames(video)]
            np.testing.assert_allclose(shown, np.minimum(4 * frames, 255), atol=4)
    paths = [str(tmp_path / "attention" / "group_3" / f"episode_{i:05d}.zarr") for i in range(len(lengths))]
    assert info["per_task"][0]["metrics"]["attention_paths"] == paths
    assert info["overall"]["attention_paths"] == paths
    assert info["per_group"]["group"]["attention_paths"] == paths


def test_the_step_limit_ends_an_episode(tmp_path):
    evaluate(tmp_path, {0: scripted.make_envs((99, 5), max_steps=12)})
    first, second = open_run(tmp_path)
    assert (first.n_frames, second.n_frames) == (12, 5)
    assert (first.n_inferences, second.n_inferences) == (2, 1)
    assert first.attributes["ended_by"] == "the step limit"
    assert second.attributes["ended_by"] == "terminated or truncated by the environment"


def test_success_is_what_the_evaluation_says(tmp_path):
    info, _ = evaluate(tmp_path, {0: scripted.make_envs((5, 9), successes=[True, False])})
    run = open_run(tmp_path)
    assert (
        [episode.success for episode in run] == info["per_task"][0]["metrics"]["successes"] == [True, False]
    )
    assert run[0].dataset.success.values.tolist() == [False] * 4 + [True]
    assert not run[1].dataset.success.values.any()


def test_discarded_rollouts_leave_no_store(tmp_path):
    """3 episodes of batches of 2: the fourth rollout is run and thrown away."""
    info, run = evaluate(tmp_path, {0: scripted.make_envs((5, 8))}, n_episodes=3)
    assert [episode.path.name for episode in open_run(tmp_path)] == [
        f"episode_0000{i}.zarr" for i in range(3)
    ]
    assert info["per_task"][0]["metrics"]["attention"]["n_not_saved"] == 0
    assert not list((tmp_path / "attention").rglob("episode_00003*"))
    assert [episode.attributes["seed"] for episode in open_run(tmp_path)] == [1000, 1001, 1002]
    assert not run.failures


@pytest.mark.parametrize(("keep", "kept"), [("all", [0, 1, 2]), ("success", [1]), ("failure", [0, 2])])
def test_keep(tmp_path, keep, kept):
    envs = {0: scripted.make_envs((5, 6, 7), successes=[False, True, False])}
    info, run = evaluate(tmp_path, envs, keep=keep)
    assert [episode.attributes["episode_index"] for episode in open_run(tmp_path)] == kept
    attention = info["per_task"][0]["metrics"]["attention"]
    assert attention["n_saved"] == len(kept)
    dropped = [entry["episode"] for entry in attention["not_saved"]]
    assert dropped == [i for i in range(3) if i not in kept]
    assert all(f"keep={keep}" in entry["reason"] for entry in attention["not_saved"])
    left = sorted({path.name.split(".")[0] for path in (tmp_path / "attention" / "group_0").glob("[!.]*")})
    assert left == [f"episode_{i:05d}" for i in kept]
    assert not run.failures


def test_only_chosen_episodes_are_recorded(tmp_path):
    policy = make_policy()
    info, run = evaluate(
        tmp_path, {0: scripted.make_envs((5,))}, n_episodes=4, policy=policy, episodes=[1, 3]
    )
    assert [episode.attributes["episode_index"] for episode in open_run(tmp_path)] == [1, 3]
    # The maps are those of the chosen episodes' own inferences.
    for episode, inference in zip(open_run(tmp_path), (1, 3), strict=True):
        true = scripted.attention_of(inference, 2, 2, 1)[0].numpy().astype(np.float16)
        np.testing.assert_array_equal(episode.dataset.suffix_attention.sel(denoise_step=2, layer=2)[0], true)
    reasons = [entry["reason"] for entry in info["per_task"][0]["metrics"]["attention"]["not_saved"]]
    assert reasons == ["not among episodes=[1, 3]"] * 2
    assert not run.failures


def test_tasks_have_their_own_folders(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        info, _ = evaluate(tmp_path, {0: scripted.make_envs((5,)), 7: scripted.make_envs((6,))})
    run = open_run(tmp_path)
    assert [(e.path.parent.name, e.n_frames) for e in run] == [("group_0", 5), ("group_7", 6)]
    assert len(info["overall"]["attention_paths"]) == 2
    lines = [record.message for record in caplog.records if record.message.startswith("Attention")]
    assert len(lines) == 3
    assert lines[0].startswith(f"Attention goes to {tmp_path / 'attention'}: ")
    assert lines[1].startswith("Attention of group_0: 1 of 1 episodes saved, 1 inferences, ")
    assert "waited" in lines[2]


def test_evaluation_is_the_same_with_and_without_recording(tmp_path):
    results = []
    for name, record in (("with", True), ("without", False)):
        torch.manual_seed(0)
        # Whole macroblocks: what an encoder puts around smaller pictures need not be the same each time.
        envs = {
            0: scripted.make_envs((5, 9), successes=[True, False], size=64),
            1: scripted.make_envs((3, 4), size=64),
        }
        info, _ = evaluate(tmp_path / name, envs, n_episodes=3, record=record)
        results.append(info)
        for video in sorted((tmp_path / name / "videos").rglob("*.mp4")):
            results.append(video.read_bytes())
    half = len(results) // 2
    with_capture, without = results[0], results[half]
    assert results[1:half] == results[half + 1 :]
    for task, other in zip(with_capture["per_task"], without["per_task"], strict=True):
        for key in ("sum_rewards", "max_rewards", "successes"):
            assert task["metrics"][key] == other["metrics"][key]


def test_nothing_is_left_on_environment_and_policy(tmp_path):
    envs, policy = {0: scripted.make_envs((5,))}, make_policy()
    before = set(vars(envs[0])), set(vars(policy))
    evaluate(tmp_path, envs, policy=policy)
    assert (set(vars(envs[0])) - {"closed"}, set(vars(policy))) == (before[0] - {"closed"}, before[1])


def test_with_lerobots_own_recording(tmp_path):
    """--eval.recording=true turns the videos off and writes a LeRobot dataset: both can be had at once."""
    from lerobot.configs import FeatureType, PolicyFeature

    size = 64  # the smallest that LeRobot's encoder takes
    features = {
        "action": PolicyFeature(FeatureType.ACTION, (4,)),
        "observation.images.image": PolicyFeature(FeatureType.VISUAL, (size, size, 3)),
    }
    recording = {"recording_dir": tmp_path / "recordings", "env_features": features}
    info, run = evaluate(tmp_path, {0: scripted.make_envs((5,), size=size)}, recording=recording)
    assert not run.failures
    (episode,) = open_run(tmp_path)
    assert episode.is_complete
    assert episode.eval_video is None
    assert list(episode.videos) == [scripted.CAMERA]
    assert info["per_task"][0]["metrics"]["attention_paths"]
    assert (tmp_path / "recordings" / "group_0" / "meta" / "info.json").is_file()


def test_policy_that_raises_leaves_an_incomplete_store(tmp_path):
    policy = make_policy()
    policy.fail_at = (2, 1, 1)
    with pytest.raises(RuntimeError, match="the policy broke"):
        evaluate(tmp_path, {0: scripted.make_envs((25, 45))}, policy=policy)
    for episode in open_run(tmp_path):
        assert not episode.is_complete
        assert episode.success is None
        assert (episode.n_inferences, episode.n_frames) == (2, 20)
        assert episode.attributes["interrupted_by"] == "RuntimeError: the policy broke"
        assert len(list(read_frames(next(iter(episode.videos.values()))))) == 20
    assert "predict_action_chunk" not in vars(policy)


def test_environment_that_raises_leaves_ended_episodes_complete(tmp_path):
    envs = {0: scripted.make_envs((5, 45), fail_at=17)}
    with pytest.raises(RuntimeError, match="the environment broke"):
        evaluate(tmp_path, envs)
    ended, cut = open_run(tmp_path)
    assert ended.is_complete
    assert ended.n_frames == 5
    assert not cut.is_complete
    # Frame 17 was shown and its action sent, but what came of it is unknown.
    assert (cut.n_frames, cut.n_inferences) == (17, 2)


def test_keyboard_interrupt_goes_through(tmp_path, monkeypatch):
    envs = scripted.make_envs((30,))
    step = envs.step

    def interrupted(action):
        if envs.envs[0].unwrapped._t == 13:
            raise KeyboardInterrupt
        return step(action)

    envs.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, {0: envs})
    (episode,) = open_run(tmp_path)
    assert not episode.is_complete
    assert episode.n_frames == 13
    assert episode.attributes["interrupted_by"] == "KeyboardInterrupt"


def test_a_second_interrupt_closes_the_store_without_what_was_queued(tmp_path, monkeypatch, caplog):
    envs = scripted.make_envs((30,))
    append, flush, step = EpisodeJob.append, BackgroundWriter.flush, envs.step
    n_interrupts = 0

    def interrupted(original, when):
        def call(*args):
            nonlocal n_interrupts
            if when():
                n_interrupts += 1
                raise KeyboardInterrupt
            return original(*args)

        return call

    has_begun = threading.Event()
    envs.step = interrupted(step, lambda: envs.envs[0].unwrapped._t == 20 and has_begun.wait(60))
    monkeypatch.setattr(BackgroundWriter, "flush", interrupted(flush, lambda: n_interrupts == 1))
    monkeypatch.setattr(EpisodeJob, "append", lambda *args: (append(*args), has_begun.set(), time.sleep(0.2)))
    monkeypatch.setattr("lerobot_attn.recording.handle._GRACE_S", 60)
    with pytest.raises(KeyboardInterrupt) as raised:
        evaluate(tmp_path, {0: envs}, policy=make_policy(n_action_steps=1))
    assert raised.value.__context__ is None
    (episode,) = open_run(tmp_path)
    assert not episode.is_complete
    assert episode.attributes["interrupted_by"] == "KeyboardInterrupt"
    assert episode.attributes["error"] == "what was queued was dropped by Ctrl-C"
    assert f"Dropped {21 - episode.n_inferences} inferences that were queued" in caplog.text
    assert 0 < episode.n_inferences < 21


def break_writing(monkeypatch, after):
    """Fail the writer as a full disk does, once `after` inferences are written."""
    original = EpisodeWriter.append_inference

    def append(self, rows):
        if self.n_inferences >= after:
            raise OSError(28, "No space left on device")
        original(self, rows)

    monkeypatch.setattr(EpisodeWriter, "append_inference", append)


def test_a_failing_writer_does_not_stop_the_evaluation(tmp_path, monkeypatch, caplog):
    break_writing(monkeypatch, after=2)
    info, run = evaluate(tmp_path, {0: scripted.make_envs((45, 15))}, n_episodes=4)
    metrics = info["per_task"][0]["metrics"]
    assert len(metrics["successes"]) == 4
    assert len(run.failures) == 2
    assert "No space left on device" in run.failures[0]
    store = tmp_path / "attention" / "group_0" / "episode_00000.zarr"
    assert f"episode 0: incomplete: {store}: the disk is full (No space left on device)" in caplog.text
    episodes = {e.attributes["episode_index"]: e for e in open_run(tmp_path)}
    assert [episodes[i].is_complete for i in range(4)] == [False, True, False, True]
    # What was committed before is there and true.
    broken = episodes[0]
    assert broken.n_inferences == 2
    assert "No space left" in broken.attributes["error"]
    true = scripted.attention_of(1, 2, 2, 2)[0].numpy().astype(np.float16)
    np.testing.assert_array_equal(broken.dataset.suffix_attention.sel(denoise_step=2, layer=2)[1], true)
    assert metrics["attention"]["n_saved"] == 2
    assert [entry["episode"] for entry in metrics["attention"]["not_saved"]] == [0, 2]


def test_on_error_abort_stops_at_once(tmp_path, monkeypatch):
    break_writing(monkeypatch, after=1)
    policy = make_policy()
    infer = policy.predict_action_chunk

    def slowly(*args, **kwargs):  # a policy takes its time; the writer's thread must get some too
        time.sleep(0.02)
        return infer(*args, **kwargs)

    monkeypatch.setattr(policy, "predict_action_chunk", slowly)
    with pytest.raises(CaptureError, match="stopped because of on_error=abort"):
        evaluate(tmp_path, {0: scripted.make_envs((900,))}, policy=policy, on_error="abort")
    assert policy.n_inferences < 90
    (episode,) = open_run(tmp_path)
    assert not episode.is_complete


def test_on_error_abort_stops_after_a_late_failure_too(tmp_path, monkeypatch):
    """The rollout may be over before its writer fails: the next task must not start."""
    break_writing(monkeypatch, after=0)
    envs = {0: scripted.make_envs((2,)), 1: scripted.make_envs((2,))}
    policy = make_policy()
    with pytest.raises(CaptureError, match="on_error=abort"):
        evaluate(tmp_path, envs, policy=policy, on_error="abort")
    assert policy.n_inferences == 1


class CaptureBreaks(scripted.ScriptedAdapter):
    def observe(self, probe, sites, **settings):
        deliver = probe.at
        probe.at = lambda site, value: deliver(
            site, value[..., :3, :] if self.policy.n_inferences == 1 else value
        )
        return super().observe(probe, sites, **settings)


def test_a_failing_capture_does_not_stop_the_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(scripted, "ScriptedAdapter", CaptureBreaks)
    info, run = evaluate(tmp_path, {0: scripted.make_envs((25,))}, n_episodes=2)
    assert len(info["per_task"][0]["metrics"]["successes"]) == 2
    first, second = open_run(tmp_path)
    # Without the second inference nobody could say what the later frames looked at: none is stored.
    assert (first.is_complete, first.n_inferences) == (False, 1)
    assert "shape" in first.attributes["error"]
    assert second.is_complete
    assert len(run.failures) == 1


def test_abort_on_a_failing_capture(tmp_path, monkeypatch):
    monkeypatch.setattr(scripted, "ScriptedAdapter", CaptureBreaks)
    with pytest.raises(CaptureError, match="on_error=abort"):
        evaluate(tmp_path, {0: scripted.make_envs((25,))}, on_error="abort")


class NothingSeen(scripted.ScriptedAdapter):
    def observe(self, probe, sites, **settings):
        import contextlib

        return contextlib.nullcontext()


def test_nothing_captured_is_an_error_and_no_store(tmp_path, monkeypatch):
    monkeypatch.setattr(scripted, "ScriptedAdapter", NothingSeen)
    info, run = evaluate(tmp_path, {0: scripted.make_envs((25,))})
    assert info["per_task"][0]["metrics"]["attention_paths"] == []
    assert len(run.failures) == 1
    assert "no captured inference" in run.failures[0]
    assert not list((tmp_path / "attention").rglob("episode_*"))


class OutOfOrder(scripted.ScriptedPolicy):
    """Serves its chunk from the second action on: a frame's action is not the token that a table names."""

    def select_action(self, batch, **kwargs):
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch)[:, 1:11].transpose(0, 1))
        return self._queue.popleft()


def test_the_encoder_is_found_before_anything_runs(tmp_path, monkeypatch):
    """Later, Ctrl-C would end the process in which imageio-ffmpeg tries it out."""
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE", raising=False)
    monkeypatch.setattr(imageio_ffmpeg._utils, "_get_ffmpeg_exe", lambda: None)
    policy = make_policy()
    with pytest.raises(StoreError, match=r"no video encoder: .* IMAGEIO_FFMPEG_EXE"):
        evaluate(tmp_path, {0: scripted.make_envs((5,))}, policy=policy)
    assert policy.n_inferences == 0


class Blind(scripted.ScriptedAdapter):
    def camera_views(self, batch):
        return {}


@pytest.mark.parametrize("what", ["cameras=false", "a policy without cameras"])
def test_without_cameras_no_encoder_is_needed(tmp_path, monkeypatch, what):
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE", raising=False)
    monkeypatch.setattr(imageio_ffmpeg._utils, "_get_ffmpeg_exe", lambda: None)
    config = scripted.make_config()
    if what != "cameras=false":
        config.input_features = {}
        monkeypatch.setattr(scripted, "ScriptedAdapter", Blind)
    policy = scripted.ScriptedPolicy(config)
    settings = {"cameras": False} if what == "cameras=false" else {}
    _, run = evaluate(tmp_path, {0: scripted.make_envs((5,))}, policy=policy, videos=0, **settings)
    assert not run.failures
    (episode,) = open_run(tmp_path)
    assert episode.is_complete
    assert not episode.videos
    assert "video_errors" not in episode.attributes


class CutPolicy(scripted.ScriptedPolicy):
    """Its preprocessor puts something else in the pictures' place."""

    def select_action(self, batch, **kwargs):
        assert scripted.CAMERA not in batch
        return super().select_action({**batch, scripted.CAMERA: batch["patches"]})


class CutAdapter(scripted.ScriptedAdapter):
    def camera_views(self, batch):
        return super().camera_views(batch) if scripted.CAMERA in batch else {}


def test_where_the_preprocessor_leaves_no_picture_the_observations_are_filmed(tmp_path, monkeypatch):
    monkeypatch.setattr(scripted, "ScriptedAdapter", CutAdapter)

    def cut(batch):
        return {"patches" if name == scripted.CAMERA else name: value for name, value in batch.items()}

    policy = CutPolicy(scripted.make_config())
    _, run = evaluate(tmp_path, {0: scripted.make_envs((5, 9))}, policy=policy, preprocessor=cut, videos=0)
    assert not run.failures
    for episode, length in zip(open_run(tmp_path), (5, 9), strict=True):
        assert list(episode.videos) == [scripted.CAMERA]
        shown = [frame.mean() for frame in read_frames(episode.videos[scripted.CAMERA])]
        np.testing.assert_allclose(shown, 4 * np.arange(length), atol=3)


def test_a_video_that_fails_does_not_cost_an_evaluations_maps(tmp_path, monkeypatch):
    def broken(self, picture):
        raise StoreError("the encoder stopped")

    monkeypatch.setattr(VideoWriter, "write", broken)
    info, run = evaluate(tmp_path, {0: scripted.make_envs((5, 25))})
    assert not run.failures
    assert info["per_task"][0]["metrics"]["attention"]["n_saved"] == 2
    for episode in open_run(tmp_path):
        assert episode.is_complete
        assert episode.attributes["video_errors"] == {scripted.CAMERA: "the encoder stopped"}


@pytest.mark.parametrize("name", ["h#1", "a?b", "x::y", "two words", "Töpfe", "[1]", "run:a"])
def test_an_evaluation_under_any_legal_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    # LeRobot's own video of the evaluation cannot be written under a relative path with a colon.
    videos = 0 if ":" in name else 1
    _, run = evaluate(Path(name), {0: scripted.make_envs((5,))}, videos=videos, layers="all")
    assert not run.failures
    (episode,) = open_run(name)
    assert episode.is_complete
    true = scripted.attention_of(0, 2, 2, 1)[0].numpy().astype(np.float16)
    np.testing.assert_array_equal(episode.dataset.suffix_attention.sel(denoise_step=2, layer=2)[0], true)
    assert len(list(read_frames(episode.videos[scripted.CAMERA]))) == 5


def test_actions_that_are_not_their_tokens_are_refused(tmp_path):
    policy = OutOfOrder(scripted.make_config())
    _, run = evaluate(tmp_path, {0: scripted.make_envs((25,))}, policy=policy)
    assert len(run.failures) == 1
    assert "executed an action that is not token 0 of its inference's chunk" in run.failures[0]
    assert not any(episode.is_complete for episode in open_run(tmp_path))


def test_a_slow_writer_makes_the_policy_wait(tmp_path, monkeypatch):
    import time

    original = EpisodeWriter.append_inference

    def slow(self, rows):
        time.sleep(0.05)
        original(self, rows)

    monkeypatch.setattr(EpisodeWriter, "append_inference", slow)
    monkeypatch.setattr("lerobot_attn.recording.run.BackgroundWriter", lambda n: BackgroundWriter(200_000))
    info, _ = evaluate(
        tmp_path, {0: scripted.make_envs((20,))}, policy=make_policy(n_action_steps=1), layers="all"
    )
    assert info["per_task"][0]["metrics"]["attention"]["waited_for_writer_s"] > 0.1
    (episode,) = open_run(tmp_path)
    assert episode.is_complete
    assert episode.n_inferences == 20


def commits_of_a_slow_writer(tmp_path, monkeypatch, **settings):
    """Record 30 inferences, of which each takes 20 ms to be written; return what each commit made exist."""
    import time

    append, commit, commits = EpisodeWriter.append_inference, EpisodeWriter.commit, []

    def slow(self, rows):
        time.sleep(0.02)
        append(self, rows)

    def counted(self):
        commit(self)
        commits.append(self.n_inferences)

    monkeypatch.setattr(EpisodeWriter, "append_inference", slow)
    monkeypatch.setattr(EpisodeWriter, "commit", counted)
    monkeypatch.setattr("lerobot_attn.recording.run.viewers_beside", lambda *_: contextlib.nullcontext())
    envs = {0: scripted.make_envs((30,))}
    evaluate(tmp_path, envs, policy=make_policy(n_action_steps=1), layers="all", **settings)
    (episode,) = open_run(tmp_path)
    assert episode.is_complete
    assert (episode.n_inferences, episode.n_frames) == (30, 30)
    data = episode.dataset.load()
    np.testing.assert_array_equal(data.inference_frame, np.arange(30))
    np.testing.assert_array_equal(data.frame_inference, np.arange(30))
    true = scripted.attention_of(29, 2, 2, 1)[0].numpy().astype(np.float16)
    np.testing.assert_array_equal(data.suffix_attention.sel(denoise_step=2, layer=2)[29], true)
    return commits


def test_inferences_that_are_queued_are_committed_together_but_not_late(tmp_path, monkeypatch):
    commits = commits_of_a_slow_writer(tmp_path, monkeypatch)
    together = np.diff(sorted(set(commits)))
    assert together.max() > 2
    # 0.25 s, of which each inference takes 0.02 s: a watcher from outside waits no longer.
    assert together.max() <= 13
    assert len(commits) < 20


def test_who_watches_gets_each_inference_by_itself(tmp_path, monkeypatch):
    commits = commits_of_a_slow_writer(tmp_path, monkeypatch, view=True)
    assert sorted(set(commits)) == list(range(31))
    # An inference is seen by its first frame: the two have one commit, where the writer is behind.
    assert len(commits) < 50


def test_who_watches_gets_an_inferences_first_frame_at_once_and_the_others_together(tmp_path, monkeypatch):
    commit, n_frames = EpisodeWriter.commit, set()

    def noted(self):
        commit(self)
        n_frames.add(self.n_frames)

    monkeypatch.setattr(EpisodeWriter, "commit", noted)
    monkeypatch.setattr("lerobot_attn.recording.run.viewers_beside", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr("lerobot_attn.recording.handle._SHOW_EVERY_S", 1000)
    envs = {0: scripted.make_envs((30,))}
    evaluate(tmp_path, envs, policy=make_policy(n_action_steps=10), view=True)
    # The others come with the next inference, which may wait for its own first frame.
    assert {1, 11, 21, 30} <= n_frames <= {0, 1, 10, 11, 20, 21, 30}


@pytest.mark.parametrize(
    ("lengths", "n_action_steps", "size"),
    [((3, 3, 3, 40), 1, 8), ((5, 25, 45, 60), 50, 96)],
    ids=["maps of environments that have ended", "pictures of a long chunk"],
)
def test_what_waits_to_be_written_never_exceeds_the_queue(
    tmp_path, monkeypatch, lengths, n_action_steps, size
):
    """All environments share a record and a picture: they are in memory until the last one has written."""
    living, peak_bytes = [], 0

    class Watched(HostCopies):
        def allocate(self, *args):
            nonlocal peak_bytes
            tensor = super().allocate(*args)
            living.append(weakref.ref(tensor))
            found = [reference() for reference in living]
            peak_bytes = max(peak_bytes, sum(t.numel() * t.element_size() for t in found if t is not None))
            return tensor

    append, show = EpisodeJob.append, EpisodeJob.show
    monkeypatch.setattr("lerobot_attn.capture.collector.HostCopies", Watched)
    monkeypatch.setattr("lerobot_attn.recording.rollout.HostCopies", Watched)
    monkeypatch.setattr(EpisodeJob, "append", lambda *args: (time.sleep(0.01), append(*args)))
    monkeypatch.setattr(EpisodeJob, "show", lambda *args: (time.sleep(0.005), show(*args)))
    envs = {0: scripted.make_envs(lengths, size=size)}
    evaluate(
        tmp_path, envs, policy=make_policy(n_action_steps=n_action_steps), layers="all", videos=0, queue_mb=1
    )
    record_bytes = (
        1_000_000  # what the policy has in its hands: one inference of four environments, its frame
    )
    assert 1_000_000 < peak_bytes <= 1_000_000 + record_bytes


@pytest.mark.parametrize("what", ["existing", "file", "unwritable"])
def test_folders_that_cannot_be_used(tmp_path, what, monkeypatch):
    folder = tmp_path / "attention"
    if what == "existing":
        evaluate(tmp_path, {0: scripted.make_envs((5,))})
        message = "already holds episodes"
    elif what == "file":
        folder.write_text("")
        message = "is a file, expected a folder"
    else:

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        message = r"cannot be written \(Permission denied\)"
    with pytest.raises(StoreError, match=message) as error:
        RunRecorder(AttentionConfig(), folder, {})
    assert "\n" not in str(error.value)


def test_a_disk_that_is_too_small_is_warned_of(tmp_path, monkeypatch, caplog):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    evaluate(tmp_path, {0: scripted.make_envs((5,))})
    assert "may need" in caplog.text
    assert "has 1.0 kB free; save fewer layers" in caplog.text


def test_stores_say_where_they_come_from(tmp_path):
    evaluate(tmp_path, {4: scripted.make_envs((5,))}, layers=[-1], keep_bits=7)
    (episode,) = open_run(tmp_path)
    attributes = episode.attributes
    assert json.loads(json.dumps(attributes)) == attributes
    assert attributes["task"] == "do as told"
    assert (attributes["task_group"], attributes["task_id"], attributes["seed"]) == ("group", 4, 1000)
    assert attributes["policy"]["type"] == "scripted"
    assert attributes["capture"]["layers"] == [-1]
    assert attributes["capture"]["keep_bits"] == 7
    assert attributes["executed_queries"] == [1, 11]
    assert attributes["videos"][scripted.CAMERA] == {
        "path": "episode_00000.image.mp4",
        "fps": 25.0,
        "n_frames": 5,
        "height_px": 8,
        "width_px": 8,
    }
    assert attributes["eval_video"] == {"path": "../../videos/group_4/eval_episode_0.mp4", "fps": 25.0}
