"""Episodes of one's own loop: what the loop has is stored, what it lacks is absent, what fails is said."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

import scripted  # noqa: E402
from test_recording import make_policy, scripted_adapter  # noqa: E402, F401

from lerobot_attn import AttentionConfig, open_episode, open_run, record_episodes  # noqa: E402
from lerobot_attn.errors import CaptureError, ConfigError, StoreError  # noqa: E402
from lerobot_attn.recording.episode import EpisodeJob  # noqa: E402
from lerobot_attn.store.video import VideoWriter, read_frames  # noqa: E402
from lerobot_attn.store.writer import EpisodeWriter  # noqa: E402

N_FRAMES = 23


def picture(frame):
    return np.full((8, 8, 3), 4 * frame, np.uint8)


def batch_of(frame):
    pixels = torch.from_numpy(picture(frame)).permute(2, 0, 1)[None] / 255
    return {scripted.CAMERA: pixels}


def observation_of(frame):
    return {"observation.state": torch.tensor([[frame, -frame]]), scripted.CAMERA: picture(frame)}


def run_loop(policy, episode, n_frames=N_FRAMES, change=lambda action: action, **said):
    """A loop as people write it: select, act, tell."""
    policy.reset()
    for frame in range(n_frames):
        action = change(policy.select_action(batch_of(frame)))
        more = {name: value(frame) for name, value in said.items()}
        episode.step(observation_of(frame), action, **more)


def record_one(folder, policy=None, config=None, **arguments):
    policy = policy or make_policy()
    with (
        record_episodes(policy, folder, config or AttentionConfig(layers="all"), fps=20) as recording,
        recording.episode(task="do as told") as episode,
    ):
        run_loop(policy, episode, **arguments)
    (result,) = recording.results
    return open_episode(result.path), result


def test_an_episode_is_what_the_loop_did(tmp_path):
    episode, result = record_one(tmp_path, reward=lambda frame: 0.5 * frame, success=lambda frame: frame > 20)
    assert result.reason is None
    assert result.path == tmp_path / "attention" / "loop_0" / "episode_00000.zarr"
    assert [e.path for e in open_run(tmp_path)] == [result.path]
    assert episode.is_complete
    assert (episode.task, episode.success) == ("do as told", True)
    data = episode.dataset.load()
    frames = np.arange(N_FRAMES)
    np.testing.assert_array_equal(data.frame_inference, frames // 10)
    np.testing.assert_array_equal(data.frame_query, frames % 10 + 1)  # the suffix opens with a state token
    np.testing.assert_array_equal(data.inference_frame, [0, 10, 20])
    np.testing.assert_array_equal(data.reward, 0.5 * frames)
    np.testing.assert_array_equal(data.success, frames > 20)
    np.testing.assert_array_equal(data.state, np.stack([frames, -frames], axis=1))
    np.testing.assert_array_equal(data.action[:, 2], frames % 10)
    for inference, layer in ((0, 0), (2, 3)):
        true = scripted.attention_of(inference, 1, layer, 1)[0].numpy()
        stored = data.suffix_attention[inference, 1, layer, ..., : true.shape[-1]]
        np.testing.assert_array_equal(stored, true.astype(np.float16))
    assert data.layer_sees_suffix.values.tolist() == [True, False, True, False]
    assert episode.attributes["attention_dtype"] == "float32"
    assert episode.attributes["versions"]["lerobot_attn"]
    shown = [frame.mean() for frame in read_frames(episode.videos[scripted.CAMERA])]
    np.testing.assert_allclose(shown, 4 * frames, atol=4)


def test_what_a_loop_lacks_is_absent(tmp_path):
    policy = make_policy()
    with (
        record_episodes(policy, tmp_path, fps=20) as recording,
        recording.episode() as episode,
    ):
        policy.reset()
        for frame in range(5):
            episode.step(None, policy.select_action(batch_of(frame)))
    (found,) = open_run(tmp_path)
    assert found.is_complete
    assert not {"reward", "success", "state", "state_dim"} & set(found.dataset.variables)
    assert found.success is None
    assert len(list(read_frames(found.videos[scripted.CAMERA]))) == 5  # shown by the policy's own batch


def test_only_the_layers_that_are_asked_for_are_there(tmp_path):
    episode, _ = record_one(tmp_path, config=AttentionConfig(layers=[-1]))
    assert episode.dataset.layer.values.tolist() == [3]
    assert episode.dataset.all_layer.values.tolist() == [3]


@pytest.mark.parametrize("value", [True, False, None])
def test_success_can_be_said_at_the_end(tmp_path, value):
    policy = make_policy()
    with record_episodes(policy, tmp_path, fps=20) as recording, recording.episode() as episode:
        run_loop(policy, episode)
        episode.success = value
    (found,) = open_run(tmp_path)
    assert found.success is value
    assert "success" not in found.dataset


@pytest.mark.parametrize(("keep", "kept"), [("success", [1, 2]), ("failure", [0, 2])])
def test_keep_knows_success_only_where_it_is_said(tmp_path, keep, kept):
    policy = make_policy()
    with record_episodes(policy, tmp_path, AttentionConfig(keep=keep), fps=20) as recording:
        for success in (False, True, None):
            with recording.episode() as episode:
                run_loop(policy, episode, 3)
                episode.success = success
    assert [e.attributes["episode_index"] for e in open_run(tmp_path)] == kept


def test_an_exception_closes_the_episode_as_incomplete_and_goes_on(tmp_path):
    policy = make_policy()
    with record_episodes(policy, tmp_path, fps=20) as recording:
        with pytest.raises(RuntimeError, match="the robot broke"), recording.episode() as episode:  # noqa: PT012
            run_loop(policy, episode, 13)
            policy.select_action(batch_of(13))
            raise RuntimeError("the robot broke")
        with recording.episode() as episode:
            run_loop(policy, episode, 5)
    first, second = open_run(tmp_path)
    assert (first.is_complete, first.n_frames, first.n_inferences) == (False, 13, 2)
    assert first.attributes["interrupted_by"] == "RuntimeError: the robot broke"
    assert second.is_complete
    assert not vars(policy).keys() & {"select_action", "predict_action_chunk"}


def test_a_policy_that_made_no_inference_is_said(tmp_path, caplog):
    policy = make_policy()
    with (
        pytest.raises(CaptureError, match="made no inference"),
        record_episodes(policy, tmp_path, fps=20) as recording,
        recording.episode(),
    ):
        pass
    assert "made no inference" in caplog.text


def test_actions_left_from_before_the_episode_are_said(tmp_path):
    policy = make_policy()
    with (  # noqa: PT012
        pytest.raises(CaptureError, match=r"no captured inference before it.*policy\.reset"),
        record_episodes(policy, tmp_path, fps=20) as recording,
    ):
        policy.select_action(batch_of(0))
        with recording.episode() as episode:
            for frame in range(30):
                episode.step(None, policy.select_action(batch_of(frame)))


class Ensembling(scripted.ScriptedPolicy):
    """Every other action is a mixture of two tokens."""

    n_selected = 0

    def select_action(self, batch, **kwargs):
        action = super().select_action(batch, **kwargs)
        self.n_selected += 1
        return action if self.n_selected % 2 else action + 0.25


def test_actions_that_are_no_tokens_have_no_query(tmp_path):
    episode, result = record_one(tmp_path, policy=Ensembling(scripted.make_config()))
    assert result.reason is None
    frames = np.arange(N_FRAMES)
    np.testing.assert_array_equal(episode.dataset.frame_query, np.where(frames % 2 == 0, frames % 10 + 1, -1))
    np.testing.assert_array_equal(episode.dataset.frame_inference, frames // 10)


def test_actions_that_the_loop_changes_beyond_postprocessing_have_no_query(tmp_path):
    policy = make_policy()
    with record_episodes(policy, tmp_path, fps=20) as recording, recording.episode() as episode:
        run_loop(
            policy, episode, 12, change=lambda action: 3 * action - 1, from_chunk=lambda frame: frame % 3 > 0
        )
    (found,) = open_run(tmp_path)
    frames = np.arange(12)
    # A postprocessor's scaling leaves the token what it is: the policy says which one it served.
    np.testing.assert_array_equal(found.dataset.frame_query, np.where(frames % 3, frames % 10 + 1, -1))
    np.testing.assert_array_equal(found.dataset.action[:, 2], 3 * (frames % 10) - 1)


@pytest.mark.parametrize("say", [True, False])
def test_a_loop_that_takes_actions_from_its_own_chunk(tmp_path, say):
    """As with RTC: an inference runs ahead, and its first tokens are never executed."""
    policy = make_policy()
    with record_episodes(policy, tmp_path, fps=20) as recording, recording.episode() as episode:
        for frame in range(12):
            if frame % 6 == 0:
                with ThreadPoolExecutor() as inference:
                    chunk = inference.submit(policy.predict_action_chunk, batch_of(frame)).result()[0]
            token = chunk[3 + frame % 6]
            executed = 2 * token if say else token
            episode.step(observation_of(frame), executed, **({"policy_action": token} if say else {}))
    (found,) = open_run(tmp_path)
    frames = np.arange(12)
    assert found.is_complete
    np.testing.assert_array_equal(found.dataset.frame_query, 3 + frames % 6 + 1)
    np.testing.assert_array_equal(found.dataset.inference_frame, [0, 6])
    # No batch of each frame: the observations have the pictures.
    shown = [frame.mean() for frame in read_frames(found.videos[scripted.CAMERA])]
    np.testing.assert_allclose(shown, 4 * frames, atol=4)


def test_a_robot_speaks_in_names(tmp_path):
    policy = make_policy()
    with record_episodes(policy, tmp_path, fps=20) as recording, recording.episode() as episode:
        policy.reset()
        for frame in range(3):
            action = policy.select_action(batch_of(frame))[0]
            sent = dict(zip(("pan.pos", "lift.pos", "roll.pos", "grip.pos"), action.tolist(), strict=True))
            episode.step({"pan.pos": 1.5, "lift.pos": -2.0, "front": picture(frame)}, sent)
    (found,) = open_run(tmp_path)
    assert found.dataset.state_dim.values.tolist() == ["pan.pos", "lift.pos"]
    assert found.dataset.action_dim.values.tolist() == ["pan.pos", "lift.pos", "roll.pos", "grip.pos"]
    assert found.dataset.state.values.tolist() == [[1.5, -2.0]] * 3


def break_jobs(monkeypatch, where):
    if where == "writing":
        monkeypatch.setattr(
            EpisodeWriter, "append_inference", lambda *a: (_ for _ in ()).throw(OSError(5, "I/O error"))
        )
    elif where == "the last job":
        close = EpisodeJob.close

        def broken(self, *arguments):
            raise RuntimeError("I/O error")

        monkeypatch.setattr(EpisodeJob, "close", broken)
        assert close is not broken
    else:
        from lerobot_attn.capture import InferenceRecord

        monkeypatch.setattr(
            InferenceRecord, "wait", lambda self: (_ for _ in ()).throw(RuntimeError("I/O error"))
        )


@pytest.mark.parametrize("on_error", ["continue", "abort"])
@pytest.mark.parametrize("where", ["writing", "reading a record", "the last job"])
def test_what_breaks_on_the_writers_thread_is_reported(tmp_path, monkeypatch, caplog, where, on_error):
    break_jobs(monkeypatch, where)
    policy = make_policy()
    with (
        pytest.raises(CaptureError, match="I/O error"),
        record_episodes(policy, tmp_path, AttentionConfig(on_error=on_error), fps=20) as recording,
        recording.episode() as episode,
    ):
        run_loop(policy, episode, 5)
    (result,) = recording.results
    assert result.failed
    assert "I/O error" in result.reason
    assert "I/O error" in caplog.text


def test_a_capture_that_fails_is_reported_and_the_loop_goes_on(tmp_path, caplog, monkeypatch):
    policy = make_policy()
    append = EpisodeWriter.append_inference
    # A slow disk: what was captured before the failure is still in the queue then.
    monkeypatch.setattr(EpisodeWriter, "append_inference", lambda *a: (time.sleep(0.3), append(*a)))
    with (  # noqa: PT012
        pytest.raises(CaptureError, match="denoise steps"),
        record_episodes(policy, tmp_path, fps=20) as recording,
    ):
        with recording.episode() as episode:
            run_loop(policy, episode, 5)
            policy.config.num_inference_steps = 2
            run_loop(policy, episode, 5)
            policy.config.num_inference_steps = scripted.STEPS
        with recording.episode() as episode:
            run_loop(policy, episode, 5)
    assert "no longer recorded" in caplog.text
    assert [episode.is_complete for episode in open_run(tmp_path)] == [False, True]


def batch_of_both(frame):
    """Two environments, of which the second's picture is brighter."""
    return {
        scripted.CAMERA: torch.cat([batch_of(frame)[scripted.CAMERA], batch_of(frame + 20)[scripted.CAMERA]])
    }


def test_environments_of_a_batch_get_an_episode_each(tmp_path):
    policy, lengths = make_policy(), (23, 13)
    with record_episodes(
        policy, tmp_path, AttentionConfig(layers="all", prefix_layers=[1]), fps=20
    ) as recording:
        with recording.episodes(["do as told", "do not"], seeds=[7, 8]) as episodes:
            policy.reset()
            for frame in range(max(lengths)):
                actions = policy.select_action(batch_of_both(frame))
                for env, episode in enumerate(episodes):
                    if frame < lengths[env]:
                        state = {"state": np.array([frame, env])}
                        episode.step(state, actions[env], reward=frame + env)
                    elif frame == lengths[env]:
                        episode.success = True
                        episode.finish()
        with recording.episode() as episode:
            run_loop(policy, episode, 3)
    assert [result.reason for result in recording.results] == [None] * 3
    *both, alone = open_run(tmp_path)
    for env, episode in enumerate(both):
        assert episode.is_complete
        assert (episode.task, episode.success) == (("do as told", "do not")[env], (None, True)[env])
        assert (episode.attributes["episode_index"], episode.attributes["seed"]) == (env, 7 + env)
        data = episode.dataset.load()
        frames = np.arange(lengths[env])
        np.testing.assert_array_equal(data.frame_query, frames % 10 + 1)
        np.testing.assert_array_equal(data.frame_inference, frames // 10)
        np.testing.assert_array_equal(data.inference_frame, np.arange(0, lengths[env], 10))
        np.testing.assert_array_equal(data.action[:, 0], np.full(lengths[env], env))
        np.testing.assert_array_equal(data.action_chunk[:, 1:, 0], env)
        np.testing.assert_array_equal(data.state[:, 1], np.full(lengths[env], env))
        np.testing.assert_array_equal(data.reward, frames + env)
        true = scripted.attention_of(1, 2, 0, 2)[env].numpy()
        np.testing.assert_array_equal(data.suffix_attention[1, 2, 0], true.astype(np.float16))
        shown = [frame.mean() for frame in read_frames(episode.videos[scripted.CAMERA])]
        np.testing.assert_allclose(shown, 4 * (frames + 20 * env), atol=4)
    assert (alone.attributes["episode_index"], alone.n_frames) == (2, 3)


def test_an_exception_ends_every_episode_of_the_batch(tmp_path):
    policy = make_policy()
    with (  # noqa: PT012
        record_episodes(policy, tmp_path, fps=20) as recording,
        pytest.raises(RuntimeError),
        recording.episodes(["a", "b"]) as episodes,
    ):
        for frame in range(4):
            actions = policy.select_action(batch_of_both(frame))
            for episode, action in zip(episodes, actions, strict=True):
                episode.step(None, action)
        episodes[0].finish()
        raise RuntimeError("the robot broke")
    assert [result.interrupted for result in recording.results] == [False, True]
    assert [episode.is_complete for episode in open_run(tmp_path)] == [True, False]


@pytest.mark.parametrize("n_episodes", [1, 3])
def test_a_batch_of_another_size_is_refused(tmp_path, n_episodes):
    policy = make_policy()
    with (  # noqa: PT012
        pytest.raises(CaptureError, match=rf"got a batch of 2, expected {n_episodes}.*recording\.episodes"),
        record_episodes(policy, tmp_path, fps=20) as recording,
        recording.episodes(["x"] * n_episodes) as episodes,
    ):
        action = policy.select_action(batch_of_both(0))
        episodes[0].step(None, action[0])


def test_mistakes_in_calling_are_told_at_once(tmp_path):
    policy = make_policy()
    with pytest.raises(ConfigError, match="fps: got 0"), record_episodes(policy, tmp_path, fps=0):
        pass
    with record_episodes(policy, tmp_path, fps=20) as recording:
        with (
            pytest.raises(ConfigError, match="each number once"),
            recording.episodes(["a", "b"], indices=[4, 4]),
        ):
            pass
        for wrong in ({"tasks": []}, {"tasks": "pick"}, {"tasks": ["a", "b"], "seeds": [1]}):
            with (
                pytest.raises(ConfigError, match="expected a list with one for each"),
                recording.episodes(**wrong),
            ):
                pass
        with recording.episode() as episode:
            with pytest.raises(ConfigError, match="another one is open"), recording.episode():
                pass
            action = policy.select_action(batch_of(0))
            with pytest.raises(CaptureError, match=r"action: got shape \(2, 2\), expected \(action_dim,\)"):
                episode.step(None, np.zeros((2, 2)))
            episode.step(None, action, reward=1.0)
            with pytest.raises(CaptureError, match="reward is not given at frame 1"):
                episode.step(None, policy.select_action(batch_of(1)))
        with pytest.raises(CaptureError, match="the episode is over"):
            episode.step(None, action)
        with pytest.raises(ConfigError, match="index: got 0"), recording.episode(index=0):
            pass


def test_a_folder_with_episodes(tmp_path, caplog):
    record_one(tmp_path)
    with (
        pytest.raises(StoreError, match=r"already holds episodes.*choose another folder"),
        record_episodes(make_policy(), tmp_path, fps=20),
    ):
        pass
    policy = make_policy()
    before = (tmp_path / "attention/loop_0/episode_00000.zarr/zarr.json").stat().st_mtime_ns
    config = AttentionConfig(layers=[0, 1, -2, -1], existing="skip")  # "all", in other words
    with record_episodes(policy, tmp_path, config, fps=20) as recording:
        recorded = []
        for _ in range(2):
            with recording.episode() as episode:
                recorded.append(episode.is_recorded)
                run_loop(policy, episode, 4)
    assert recorded == [False, True]
    assert [result.kept for result in recording.results] == [True, False]
    assert (tmp_path / "attention/loop_0/episode_00000.zarr/zarr.json").stat().st_mtime_ns == before
    assert [e.n_frames for e in open_run(tmp_path)] == [N_FRAMES, 4]
    record_one(tmp_path, config=AttentionConfig(existing="overwrite"), n_frames=2)
    assert [e.n_frames for e in open_run(tmp_path)] == [2]


@pytest.mark.parametrize("when", ["at once", "in between", "at the end"])
def test_a_video_that_cannot_be_written_does_not_cost_the_maps(tmp_path, monkeypatch, caplog, when):
    write, close = VideoWriter.write, VideoWriter.close

    def broken(self, *picture):
        if when == "at once" or self.n_frames > 4:
            raise StoreError("the encoder stopped")
        write(self, *picture)

    if when == "at the end":
        monkeypatch.setattr(VideoWriter, "close", lambda self: (close(self), self.path.unlink()))
    else:
        monkeypatch.setattr(VideoWriter, "write", broken)
    episode, result = record_one(tmp_path)
    assert result.reason is None
    assert episode.is_complete
    assert episode.n_frames == N_FRAMES
    assert list(episode.attributes["video_errors"]) == [scripted.CAMERA]
    assert episode.attributes["videos"] == {}
    assert not list(result.path.parent.glob("*.mp4"))
    assert "failed" in caplog.text


def test_a_frame_without_a_picture_fails_its_video_alone(tmp_path):
    policy = make_policy()
    with record_episodes(policy, tmp_path, fps=20) as recording, recording.episode() as episode:
        chunk = policy.predict_action_chunk(batch_of(0))[0]
        for frame in range(6):
            observation = observation_of(frame)
            if frame == 3:
                del observation[scripted.CAMERA]
            episode.step(observation, chunk[frame])
    (found,) = open_run(tmp_path)
    assert found.is_complete
    assert "5 pictures, expected one for each of the 6 frames" in str(found.attributes["video_errors"])


NAMES = ["h#1", "a?b", "x::y", "two words", "Töpfe", "[1]", "run:a", "100%25", "file:x", "-o", "a&b;c"]


@pytest.mark.parametrize("name", NAMES)
def test_any_legal_path_is_a_legal_path(tmp_path, monkeypatch, name):
    """Also a relative one, which has no slash before what could be taken for a protocol."""
    monkeypatch.chdir(tmp_path)
    episode, result = record_one(name, n_frames=3)
    assert result.reason is None
    true = scripted.attention_of(0, 0, 0, 1)[0].numpy().astype(np.float16)
    data = episode.dataset.load()
    np.testing.assert_array_equal(data.suffix_attention[0, 0, 0], true)
    assert len(list(read_frames(episode.videos[scripted.CAMERA]))) == 3
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with (
        pytest.raises(StoreError, match="already holds episodes"),
        record_episodes(make_policy(), name, fps=9),
    ):
        pass
    record_one(name, config=AttentionConfig(existing="overwrite"), n_frames=2)
    (found,) = open_run(name)
    assert found.n_frames == 2


def test_size_is_told_of_the_first_inference(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        record_one(tmp_path, n_frames=2)
    assert "Attention goes to" in caplog.text
    assert "an inference before compression" in caplog.text


def test_the_example_records_what_view_opens(tmp_path):
    """As a person runs it; the explorer's library lists both episodes, with words and videos."""
    example = Path(__file__).parent.parent / "examples" / "own_loop.py"
    done = subprocess.run(
        [sys.executable, str(example), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    run = open_run(tmp_path)
    assert done.stdout.splitlines()[-2:] == [str(episode.path) for episode in run]  # LeRobot prints, too
    assert [episode.success for episode in run] == [True, False]
    for episode in run:
        assert episode.is_complete
        assert episode.n_frames == 30
        assert len(episode.videos) == 2
        assert episode.task.startswith("pick up the alphabet soup")
        words = episode.dataset.text_word.values[0]
        assert words.max() >= 9  # the tokenizer told the words apart
        assert (episode.dataset.text_state_dim.values[0] >= 0).any()
        np.testing.assert_array_equal(episode.dataset.frame_query, np.arange(30) % 10)
        assert "reward" not in episode.dataset
