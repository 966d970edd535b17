"""Recorded data sets are replayed: what the policy was shown, where its chunk stands, what is refused."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

import recorded  # noqa: E402
import scripted  # noqa: E402
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402
from recorded import write_dataset  # noqa: E402
from test_recording import make_policy, scripted_adapter  # noqa: E402, F401

from lerobot_attn import AttentionConfig, open_run, record_dataset, record_episodes  # noqa: E402
from lerobot_attn.errors import CaptureError, ConfigError, StoreError  # noqa: E402
from lerobot_attn.interventions.noise import fixed_noise  # noqa: E402
from lerobot_attn.recording import VideoFrames  # noqa: E402
from lerobot_attn.store.video import VideoWriter, read_frames  # noqa: E402

LENGTHS = (13, 7, 22)
SOUP, MILK = "pick up the soup", "pick up the milk"
LAST = AttentionConfig(layers=[-1], mean_layers="none")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A data set for the scripted policy: one camera of 8 px, 4 numbers in an action."""
    root = tmp_path_factory.mktemp("data") / "small"
    return write_dataset(root, LENGTHS, cameras=(scripted.CAMERA,), tasks=(SOUP, MILK), dims=(3, 4), size=8)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """A data set for the demo policies: two cameras."""
    root = tmp_path_factory.mktemp("data") / "kitchen"
    return write_dataset(root, LENGTHS, tasks=(SOUP, MILK))


class Seen:
    """A preprocessor that keeps what it is given."""

    steps = ()

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append(batch)
        return batch


def in_order(folder):
    return sorted(open_run(folder), key=lambda episode: episode.attributes["episode_index"])


# Where the chunk stands


def test_frames_are_the_data_sets_and_chunks_stand_where_the_policy_was_asked(small, tmp_path):
    seen = Seen()
    config = AttentionConfig(layers="all")
    results = record_dataset(
        make_policy(),
        small,
        tmp_path,
        config,
        preprocessor=seen,
        postprocessor=lambda action: 2 * action,
        every=5,
        batch_size=4,
    )
    assert [(r.index, r.reason, r.n_frames, r.n_inferences) for r in results] == [
        (0, None, 13, 3),
        (1, None, 7, 2),
        (2, None, 22, 5),
    ]
    # Batches hold one task each: those of the soup, of the milk, of the soup again.
    asked = [[(0, 0), (0, 5), (0, 10)], [(1, 0), (1, 5)], [(2, 0), (2, 5), (2, 10), (2, 15)], [(2, 20)]]
    assert [batch["task"] for batch in seen.batches] == [[SOUP] * 3, [MILK] * 2, [SOUP] * 4, [SOUP]]
    for batch, questions in zip(seen.batches, asked, strict=True):
        shown = np.stack([recorded.picture(*question, size=8) for question in questions])
        np.testing.assert_array_equal(batch[scripted.CAMERA], shown.transpose(0, 3, 1, 2) / np.float32(255))
        state = np.stack([recorded.state(*question, 3) for question in questions])
        np.testing.assert_array_equal(batch["observation.state"], state)
    for episode, length in zip(in_order(tmp_path), LENGTHS, strict=True):
        index = episode.attributes["episode_index"]
        data = episode.dataset.load()
        frames = np.arange(length)
        assert episode.is_complete
        assert episode.task == (SOUP, MILK)[index % 2]
        assert episode.path.parent.name == f"small_{index % 2}"
        np.testing.assert_array_equal(data.frame_inference, frames // 5)
        np.testing.assert_array_equal(data.frame_query, frames % 5 + 1)  # the suffix opens with a state token
        np.testing.assert_array_equal(data.inference_frame, frames[::5])
        np.testing.assert_array_equal(data.action, [recorded.action(index, t, 4) for t in frames])
        np.testing.assert_array_equal(data.state, [recorded.state(index, t, 3) for t in frames])
        np.testing.assert_array_equal(data.frame_index, frames)
        np.testing.assert_allclose(data.timestamp, frames / recorded.FPS, atol=1e-6)
        np.testing.assert_array_equal(data.episode_index, np.full(length, index))
        np.testing.assert_array_equal(data.task_index, np.full(length, index % 2))
        assert set(data.coords) >= {"frame_index", "timestamp", "episode_index", "task_index"}
        assert data.action_dim.values.tolist() == ["action_a", "action_b", "action_c", "action_d"]
        for inference, frame in enumerate(range(0, length, 5)):
            (call,) = (i for i, questions in enumerate(asked) if (index, frame) in questions)
            row = asked[call].index((index, frame))
            for step, layer in ((0, 0), (2, 2)):
                true = scripted.attention_of(call, step, layer, len(asked[call]))[row].numpy()
                stored = data.suffix_attention.values[inference, step, layer]
                np.testing.assert_array_equal(stored, true.astype(np.float16))
            # The scripted action says which row of which call it is, and which token.
            here = data.predicted_action.values[frame : frame + 5]
            np.testing.assert_array_equal(here[:, 0], np.full(len(here), 2 * row))
            np.testing.assert_array_equal(here[:, 1], np.full(len(here), 2 * call))
            np.testing.assert_array_equal(here[:, 2], 2 * np.arange(len(here)))
        error = np.abs(data.predicted_action - data.action).mean("action_dim")
        np.testing.assert_allclose(data.action_error, error, rtol=1e-5)
        shown = [frame.mean() for frame in read_frames(episode.videos[scripted.CAMERA])]
        np.testing.assert_allclose(
            shown, [recorded.picture(index, t, size=8).mean() for t in frames], atol=2.5
        )


def test_unless_told_the_policy_is_asked_where_it_would_run_anew(small, tmp_path):
    policy = make_policy()
    for folder, every in (("default", None), ("chunk", "chunk")):
        record_dataset(policy, small, tmp_path / folder, LAST, episodes=[2], every=every)
        (episode,) = open_run(tmp_path / folder)
        assert episode.dataset.inference_frame.values.tolist() == [0, 10, 20]
        assert "predicted_action" not in episode.dataset  # nobody said what it means in the robot's units


def test_beyond_the_chunks_end_nothing_is_predicted(tmp_path):
    root = write_dataset(tmp_path / "long", [60], cameras=(scripted.CAMERA,), dims=(3, 4), size=8)
    record_dataset(make_policy(), root, tmp_path / "out", LAST, postprocessor=lambda action: action, every=55)
    (episode,) = open_run(tmp_path / "out")
    data = episode.dataset.load()
    assert data.frame_query.values.tolist() == [*range(1, 51), *[-1] * 5, *range(1, 6)]
    assert np.isnan(data.action_error).values.nonzero()[0].tolist() == [50, 51, 52, 53, 54]
    assert np.isnan(data.predicted_action).all("action_dim").sum() == 5
    assert not np.isnan(data.action).any()


def test_the_explorer_is_started_beside_if_wanted(small, tmp_path, monkeypatch):
    from contextlib import contextmanager

    from lerobot_attn.recording import replay

    started = []

    @contextmanager
    def beside(folder, config):
        started.append((folder, config.view))
        yield

    monkeypatch.setattr(replay, "viewers_beside", beside)
    record_dataset(make_policy(), small, tmp_path, AttentionConfig(view=True), episodes=[1])
    assert started == [(tmp_path / "attention", True)]


# The policy's own numbers


def loop(policy, preprocessor, root, folder, every, rename=None):
    """What a person's own loop over a data set records, with a replay's noise."""
    shape = (policy.config.chunk_size, policy.config.max_action_dim)
    dataset = LeRobotDataset("tests/kitchen", root=root)
    config = AttentionConfig(layers="all", mean_layers="none")
    with record_episodes(policy, folder, config, fps=20, preprocessor=preprocessor) as recording:
        start = 0
        for index, length in enumerate(LENGTHS):
            with recording.episode() as episode:
                for frame in range(length):
                    item = dataset[start + frame]
                    if frame % every == 0:
                        observation = {k: v[None] for k, v in item.items() if k.startswith("observation.")}
                        batch = preprocessor({**observation, "task": [item["task"]]})
                        noise = fixed_noise(shape, 3, index, frame)[None]
                        chunk = policy.predict_action_chunk(batch, noise=noise)[0]
                    episode.step(item, item["action"], policy_action=chunk[frame % every])
            start += length


@pytest.mark.parametrize("family", ["demo_policy", "pi0_policy", "smolvla_policy"])
def test_a_replay_gives_the_maps_and_chunks_of_the_recording(family, kitchen, tmp_path, request):
    load = request.getfixturevalue(family)
    steps = "num_steps" if family == "smolvla_policy" else "num_inference_steps"
    policy, preprocessor, postprocessor = load(**{steps: 2})
    with torch.inference_mode():
        loop(policy, preprocessor, kitchen, tmp_path / "loop", every=11)
    config = AttentionConfig(layers="all", mean_layers="none", cameras=False)
    arguments = {"preprocessor": preprocessor, "postprocessor": postprocessor, "every": 11, "seed": 3}
    record_dataset(policy, kitchen, tmp_path / "one", config, batch_size=1, **arguments)
    record_dataset(policy, kitchen, tmp_path / "four", config, batch_size=4, **arguments)
    record_dataset(policy, kitchen, tmp_path / "last", config, batch_size=3, episodes=[2], **arguments)
    theirs, one, four = (in_order(tmp_path / name) for name in ("loop", "one", "four"))
    (last,) = open_run(tmp_path / "last")
    assert last.attributes["episode_index"] == 2
    tables = ("frame_inference", "frame_query", "inference_frame", "token_id", "key_kind", "action", "state")
    for index in range(3):
        a, b, c = (run[index].dataset.load() for run in (theirs, one, four))
        others = [b, c, *([last.dataset.load()] if index == 2 else [])]
        for other in others:
            for name in tables:
                np.testing.assert_array_equal(a[name], other[name], err_msg=name)
        np.testing.assert_array_equal(a.suffix_attention, b.suffix_attention)
        np.testing.assert_array_equal(a.action_chunk, b.action_chunk)
        for other in others[1:]:
            np.testing.assert_allclose(other.suffix_attention, b.suffix_attention, atol=1e-3)
            np.testing.assert_allclose(other.action_chunk, b.action_chunk, atol=1e-4)
            np.testing.assert_allclose(other.predicted_action, b.predicted_action, atol=1e-4)
        for frame in range(0, LENGTHS[index], 11):
            chunk = torch.from_numpy(b.action_chunk.values[frame // 11, : 11 + b.sizes["query"] - 50])
            first = int(b.frame_query[frame])
            said = postprocessor(chunk[first : first + 1])[0]
            np.testing.assert_allclose(b.predicted_action[frame], said, atol=1e-6)
    # Another seed is other noise.
    record_dataset(policy, kitchen, tmp_path / "other", config, episodes=[1], **arguments | {"seed": 4})
    (other,) = open_run(tmp_path / "other")
    assert not np.allclose(other.dataset.action_chunk, one[1].dataset.action_chunk, atol=1e-2, equal_nan=True)


def test_a_policy_without_words_noise_or_denoise_steps(tmp_path):
    from test_act import SIZE, TOP, WRIST
    from test_act import make_policy as make_act

    assert SIZE == (96, 128)
    policy = make_act(cameras=(TOP, WRIST))
    n_actions = policy.config.action_feature.shape[0]
    root = write_dataset(tmp_path / "act", [9], cameras=(TOP, WRIST), dims=(6, n_actions), size=64)
    for size in (1, 3):
        record_dataset(policy, root, tmp_path / str(size), AttentionConfig(), every=4, batch_size=size)
    (one,), (three,) = open_run(tmp_path / "1"), open_run(tmp_path / "3")
    assert one.attributes["seed"] is one.attributes["replay"]["noise_seed"] is None
    assert one.dataset.inference_frame.values.tolist() == [0, 4, 8]
    np.testing.assert_allclose(one.dataset.action_chunk, three.dataset.action_chunk, atol=1e-5)
    # It takes no frame without one of its cameras.
    film = write_video(tmp_path / "film.mp4", 2)
    with pytest.raises(ConfigError, match=r"images\.wrist, which is not there"):
        record_dataset(policy, VideoFrames({"top": film}, task=""), tmp_path / "out", AttentionConfig())


def test_actions_that_decoded_tokens_spell_together_have_no_token(fast_policy, tmp_path):
    import fast_policy as fast

    policy = fast_policy()
    dims = (fast.STATE_DIM, fast.ACTION_DIM)
    root = write_dataset(tmp_path / "fast", [5], cameras=(fast.IMAGE, fast.WRIST), dims=dims, size=64)
    coded = fast.make_batch(1)

    def preprocessor(batch):
        words = ("observation.language.tokens", "observation.language.attention_mask")
        return {**batch, **{name: coded[name].expand(len(batch["task"]), -1) for name in words}}

    arguments = {"preprocessor": preprocessor, "postprocessor": lambda action: action, "every": 3}
    record_dataset(policy, root, tmp_path / "out", LAST, batch_size=2, **arguments)
    (episode,) = open_run(tmp_path / "out")
    assert episode.is_complete
    data = episode.dataset.load()
    assert data.inference_frame.values.tolist() == [0, 3]
    assert set(data.frame_query.values.tolist()) == {-1}
    assert not np.isnan(data.predicted_action[0]).any()
    assert "noise_seed" in episode.attributes["replay"]
    assert episode.attributes["seed"] is None


def test_pictures_are_read_ahead_within_bounds(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from lerobot_attn.recording import replay_views
    from lerobot_attn.recording.replay_ask import Question

    monkeypatch.setattr(replay_views, "_AHEAD_BYTES", 100)
    asked = []
    with ThreadPoolExecutor(1) as reader:
        questions = [Question(None, frame, frame + 4) for frame in (0, 4, 8, 12)]
        first = [{"frame": frame} for frame in (0, 4, 8, 12)]

        def read(question, seen):
            asked.append((question.frame, None if seen is None else seen["frame"]))
            return [None]

        views = replay_views.ViewsAhead(reader, read, questions, first, 10)
        reader.submit(lambda: None).result()
        assert asked == [(0, 0), (4, 4)]  # 80 of 100 bytes
        views.take()
        reader.submit(lambda: None).result()
        assert asked[2:] == [(8, None)], "a picture was kept in memory beyond the bound"
        for _ in range(3):
            views.take()
        assert asked[3:] == [(12, None)]
        # One that is too large alone comes all the same.
        assert replay_views.ViewsAhead(reader, read, questions[:1], first[:1], 1000).take() == [None]


def test_each_frame_is_read_once(small, tmp_path, monkeypatch):
    from lerobot_attn.recording.dataset import DatasetFrames

    read, observation = [], DatasetFrames.observation

    def counted(footage, index, frame):
        read.append((index, frame))
        return observation(footage, index, frame)

    monkeypatch.setattr(DatasetFrames, "observation", counted)
    record_dataset(make_policy(), small, tmp_path, every=5, episodes=[0])
    assert sorted(read) == [(0, frame) for frame in range(13)]


def test_its_threads_leave_the_policy_its_cores_and_its_turns(small, tmp_path, monkeypatch):
    from lerobot_attn.recording.dataset import DatasetFrames
    from lerobot_attn.recording.episode import EpisodeJob

    observation, append, found = DatasetFrames.observation, EpisodeJob.append, {}

    def read(*asked):
        found["reader"] = torch.get_num_threads()
        return observation(*asked)

    def written(*asked):
        found.setdefault("writer", os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        append(*asked)

    def seen(batch):
        found["policy"] = torch.get_num_threads()
        found["turn_s"] = sys.getswitchinterval()
        return batch

    monkeypatch.setattr(DatasetFrames, "observation", read)
    monkeypatch.setattr(EpisodeJob, "append", written)
    before, turn_s = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(2)
    try:
        record_dataset(make_policy(), small, tmp_path, preprocessor=seen, every=5, episodes=[2], batch_size=1)
        assert (found["reader"], found["policy"], torch.get_num_threads()) == (1, 2, 2)
    finally:
        torch.set_num_threads(before)
    assert found["turn_s"] < turn_s == sys.getswitchinterval()
    if sys.platform == "linux":
        assert found["writer"] > os.getpriority(os.PRIO_PROCESS, 0)


def test_a_data_set_that_was_just_written(tmp_path):
    features = {
        scripted.CAMERA: {"dtype": "image", "shape": (8, 8, 3), "names": ["height", "width", "channels"]},
        "action": {"dtype": "float32", "shape": (4,), "names": None},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }
    dataset = LeRobotDataset.create("tests/new", 20, features, tmp_path / "new", use_videos=False)
    for frame in range(5):
        row = {scripted.CAMERA: recorded.picture(0, frame, size=8), "action": recorded.action(0, frame, 4)}
        outcome = {"next.reward": np.float32([frame]), "next.success": np.array([frame == 4])}
        dataset.add_frame({**row, **outcome, "task": SOUP})
    dataset.save_episode()
    with pytest.raises(ConfigError, match=r"finalize\(\)"):
        record_dataset(make_policy(), dataset, tmp_path / "early", LAST)
    dataset.finalize()
    record_dataset(make_policy(), dataset, tmp_path / "out", LAST)
    (episode,) = open_run(tmp_path / "out")
    assert episode.success is True
    assert episode.dataset.reward.values.tolist() == [0, 1, 2, 3, 4]
    assert "state" not in episode.dataset


def test_a_policy_that_draws_its_own_noise_is_asked_about_one_frame_at_a_time(small, tmp_path, caplog):
    chunks = []
    for name, episodes in (("all", None), ("last", [2])):
        policy = make_policy()
        policy.noise_shape = None
        before, seen = torch.random.get_rng_state(), Seen()
        with caplog.at_level(logging.INFO, "lerobot_attn"):
            record_dataset(policy, small, tmp_path / name, LAST, preprocessor=seen, episodes=episodes)
        assert {len(batch["task"]) for batch in seen.batches} == {1}
        assert torch.equal(torch.random.get_rng_state(), before)
        last = in_order(tmp_path / name)[-1]
        assert last.attributes["seed"] == 0
        chunks.append(last.dataset.action_chunk.values)
    assert "one frame at a time" in caplog.text
    # The last number holds noise and what was attended to, which follows the number of the inference.
    attended = [
        sum(
            scripted.attention_of(i, step, layer, 1)[..., 0].mean()
            for step in range(scripted.STEPS)
            for layer in range(scripted.LAYERS)
        )
        for i in range(6)
    ]
    of_all, of_last = (chunk[:, 1:, 3] for chunk in chunks)
    for inference in range(3):
        shift = float(attended[3 + inference] - attended[inference])
        np.testing.assert_allclose(of_all[inference], of_last[inference] + shift, atol=1e-5)


def test_every_question_has_noise_of_its_own():
    drawn = [fixed_noise((3, 2), *key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == 4
    before = torch.random.get_rng_state()
    assert torch.equal(fixed_noise((3, 2), 0, 1, 0), drawn[2])
    assert torch.equal(torch.random.get_rng_state(), before)


# Data sets as they come


def test_several_episodes_in_one_video_file(tmp_path):
    root = write_dataset(
        tmp_path / "films", (9, 6, 8), cameras=(scripted.CAMERA,), dims=(3, 4), size=64, videos=True
    )
    assert len(list(root.rglob("*.mp4"))) == 1
    dataset = LeRobotDataset("tests/films", root=root, episodes=[1, 2])
    seen = Seen()
    record_dataset(make_policy(), dataset, tmp_path / "out", LAST, preprocessor=seen, every=4, episodes=[2])
    (episode,) = open_run(tmp_path / "out")
    whole = LeRobotDataset("tests/films", root=root)
    shown = torch.cat([batch[scripted.CAMERA] for batch in seen.batches])
    assert torch.equal(shown, torch.stack([whole[15][scripted.CAMERA], whole[19][scripted.CAMERA]]))
    means = [frame.mean() for frame in read_frames(episode.videos[scripted.CAMERA])]
    np.testing.assert_allclose(means, [recorded.picture(2, t, size=64).mean() for t in range(8)], atol=2.5)
    with pytest.raises(ConfigError, match="got 0"):
        record_dataset(make_policy(), dataset, tmp_path / "more", LAST, episodes=[0])
    # Whole numbers make policies act wrongly, and say nothing.
    bytes_ = LeRobotDataset("tests/films", root=root, return_uint8=True)
    with pytest.raises(CaptureError, match="uint8"):
        record_dataset(make_policy(), bytes_, tmp_path / "bytes", LAST)


def test_cameras_are_renamed_and_others_left_out(tmp_path, caplog):
    names = ("observation.images.top", "observation.images.front")
    root = write_dataset(tmp_path / "renamed", [6], cameras=names, dims=(3, 4), size=8)
    seen = Seen()
    with caplog.at_level(logging.INFO, "lerobot_attn"):
        record_dataset(
            make_policy(),
            root,
            tmp_path / "out",
            LAST,
            preprocessor=seen,
            rename={"observation.images.front": scripted.CAMERA},
            task="open the drawer",
        )
    assert set(seen.batches[0]) == {scripted.CAMERA, "observation.state", "task"}
    assert seen.batches[0]["task"] == ["open the drawer"]
    shown = recorded.picture(0, 0, camera=1, size=8).transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_array_equal(seen.batches[0][scripted.CAMERA][0], shown)
    assert "does not look at observation.images.top" in caplog.text
    (episode,) = open_run(tmp_path / "out")
    assert episode.task == "open the drawer"
    assert list(episode.videos) == [scripted.CAMERA]


def test_a_preprocessor_that_renames_by_itself_needs_no_other(tmp_path):
    from lerobot.processor import RenameObservationsProcessorStep

    root = write_dataset(tmp_path / "front", [4], cameras=("observation.images.front",), dims=(3, 4), size=8)
    step = RenameObservationsProcessorStep({"observation.images.front": scripted.CAMERA})
    seen = Seen()
    seen.steps = [step]
    call = seen.__call__

    class Renaming:
        steps = (step,)

        def __call__(self, batch):
            return call(step.observation(batch))

    record_dataset(make_policy(), root, tmp_path / "out", LAST, preprocessor=Renaming())
    assert scripted.CAMERA in seen.batches[0]


def test_a_stand_in_for_a_camera_may_be_shown_something(tmp_path, demo_policy):
    """LeRobot's `empty_camera_0` is not asked for, but not left out of what it is shown either."""
    policy, preprocessor, _ = demo_policy(num_inference_steps=1)
    stand_in = "observation.images.empty_camera_0"
    assert stand_in in policy.config.image_features
    root = write_dataset(tmp_path / "three", [2], cameras=(*recorded.CAMERAS, "observation.images.top"))
    arguments = {"preprocessor": preprocessor, "every": 2}
    record_dataset(policy, root, tmp_path / "two", LAST, **arguments)
    record_dataset(
        policy, root, tmp_path / "out", LAST, rename={"observation.images.top": stand_in}, **arguments
    )
    (two,), (three,) = open_run(tmp_path / "two"), open_run(tmp_path / "out")
    assert (len(two.videos), len(three.videos)) == (2, 3)
    assert not np.array_equal(two.dataset.action_chunk, three.dataset.action_chunk)


# Going on, and what goes wrong


class StopError(Exception):
    pass


@pytest.mark.parametrize("kind", [KeyboardInterrupt, StopError])
def test_what_was_interrupted_is_closed_and_goes_on(small, tmp_path, kind):
    def progress(done, total):
        assert total == sum(LENGTHS)
        if done >= 18:
            raise kind

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    record_dataset(make_policy(), small, whole, LAST, every=5, batch_size=2)
    with pytest.raises(kind):
        record_dataset(make_policy(), small, parts, LAST, every=5, batch_size=2, progress=progress)
    stores = in_order(parts)
    assert [store.is_complete for store in stores][:2] == [True, False]
    assert stores[1].attributes["interrupted_by"].startswith(kind.__name__)
    with pytest.raises(StoreError, match="already holds"):
        record_dataset(make_policy(), small, parts, LAST, every=5)
    skip = AttentionConfig(layers=[-1], mean_layers="none", existing="skip")
    for said, arguments in (("every", {"every": 4}), ("task", {"every": 5, "task": "other"})):
        with pytest.raises(StoreError, match=f"replay {said}"):
            record_dataset(make_policy(), small, parts, skip, **arguments)
    results = record_dataset(make_policy(), small, parts, skip, every=5, batch_size=2)
    assert sorted((r.index, r.kept, r.reason) for r in results) == [
        (0, True, None),
        (1, False, None),
        (2, False, None),
    ]
    for one, other in zip(in_order(whole), in_order(parts), strict=True):
        assert other.is_complete
        np.testing.assert_array_equal(one.dataset.frame_query, other.dataset.frame_query)


def test_a_capture_that_fails_costs_its_batch_alone(small, tmp_path, caplog):
    policy = make_policy()
    calls = []

    def preprocessor(batch):  # the first call is of another number of denoise steps
        policy.config.num_inference_steps = scripted.STEPS if calls else 2
        calls.append(batch)
        return batch

    with pytest.raises(CaptureError, match=r"1 of 3 episodes.*denoise steps"):
        record_dataset(policy, small, tmp_path, LAST, preprocessor=preprocessor, every=7, batch_size=2)
    assert "the replay goes on" in caplog.text
    assert [(e.attributes["episode_index"], e.is_complete) for e in in_order(tmp_path)] == [
        (1, True),
        (2, True),
    ]


def test_a_picture_that_cannot_be_read_is_said(small, tmp_path, monkeypatch):
    from lerobot_attn.recording.dataset import DatasetFrames

    read = DatasetFrames.observation

    def broken(self, index, frame):
        if (index, frame) == (1, 0):
            raise RuntimeError("no such packet\nand more")
        return read(self, index, frame)

    monkeypatch.setattr(DatasetFrames, "observation", broken)
    with pytest.raises(CaptureError, match="frame 0 of episode 1 cannot be read: no such packet; mend"):
        record_dataset(make_policy(), small, tmp_path, LAST, every=20, batch_size=1)


def test_what_does_not_fit_is_refused_in_one_line(small, kitchen, demo_policy, tmp_path):
    policy = make_policy()
    front = write_dataset(tmp_path / "front", [3], cameras=("observation.images.front",), dims=(3, 4), size=8)
    blind = write_dataset(tmp_path / "blind", [3], cameras=(), dims=(3, 4), size=8)
    empty = tmp_path / "empty"
    LeRobotDataset.create(
        "tests/empty", 20, {"action": {"dtype": "float32", "shape": (4,), "names": None}}, empty
    )
    (tmp_path / "folder").mkdir()
    slow = write_dataset(tmp_path / "slow", [4], cameras=(scripted.CAMERA,), dims=(3, 4), size=8)
    info = json.loads((slow / "meta" / "info.json").read_text())
    (slow / "meta" / "info.json").write_text(json.dumps(info | {"fps": 10}))
    wide = write_dataset(tmp_path / "wide", [3], dims=(8, 6))
    strange = write_dataset(tmp_path / "strange", [3], dims=(5, 7))
    deltas = LeRobotDataset("tests/small", root=small, delta_timestamps={"action": [0, 0.05]})
    demo, *_ = demo_policy(num_inference_steps=2)
    hint = '--rename \'{"observation.images.front": "observation.images.image"}\''
    cases = [
        (policy, front, {}, (hint, "observation.images.front")),
        (policy, blind, {}, ("no camera", "trained on")),
        (demo, small, {}, ("observation.images.image2", "trained on")),
        (policy, kitchen, {}, ("action: got shape (7,), the policy expects (4,)",)),
        (demo, wide, {}, ("action: got shape (6,), the policy expects (7,)",)),
        (demo, strange, {}, ("observation.state: got shape (5,), the policy expects (8,)",)),
        (policy, empty, {}, ("holds no frames",)),
        (policy, tmp_path / "folder", {}, ("meta/info.json",)),
        (policy, tmp_path / "nowhere", {}, ("no such folder",)),
        (policy, "tests/nobody-has-this", {}, ("neither in LeRobot's cache nor on the Hub",)),
        (policy, slow, {}, ("frame 3 of episode 0 is at 0.15 s, expected 0.3 s", "10 frames per second")),
        (policy, deltas, {}, ("delta_timestamps",)),
        (policy, small, {"episodes": [1, 3]}, ("episodes: got 3", "0 to 2")),
        (policy, small, {"episodes": []}, ("episodes: got none",)),
        (policy, small, {"every": 0}, ("every: got 0",)),
        (policy, small, {"every": "often"}, ("every: got 'often'", "'chunk'")),
        (policy, small, {"batch_size": 0}, ("batch_size: got 0",)),
        (policy, small, {"seed": -1}, ("seed: got -1",)),
        (policy, small, {"rename": {"observation.images.none": "x"}}, ("rename: got", scripted.CAMERA)),
    ]
    for asked, dataset, arguments, words in cases:
        with pytest.raises(ConfigError) as refused:
            record_dataset(asked, dataset, tmp_path / "out", LAST, **arguments)
        said = str(refused.value)
        assert "\n" not in said
        for word in words:
            assert word in said, (dataset, arguments, said)
    assert not list((tmp_path / "out").rglob("*.zarr"))
    assert not (tmp_path / "nowhere").exists()


# Videos


def write_video(path, n_frames, fps=10.0, first=0):
    writer = VideoWriter(path, fps=fps, size_px=(8, 8))
    for frame in range(n_frames):
        writer.write(recorded.picture(first, frame, size=8))
    writer.close()
    return path


def test_a_video_alone_is_enough(demo_policy, tmp_path):
    policy, preprocessor, postprocessor = demo_policy(num_inference_steps=2)
    film = write_video(tmp_path / "film.mp4", 12)
    footage = VideoFrames({"image": film}, task=SOUP)
    record_dataset(
        policy,
        footage,
        tmp_path / "out",
        LAST,
        preprocessor=preprocessor,
        postprocessor=postprocessor,
        every=5,
    )
    (episode,) = open_run(tmp_path / "out")
    assert (episode.is_complete, episode.n_frames, episode.n_inferences) == (True, 12, 3)
    assert episode.attributes["replay"]["not_given"] == [
        "observation.images.image2: absent",
        "observation.state: zeros",
        "action: absent",
    ]
    data = episode.dataset.load()
    assert not {"state", "action_error"} & set(data)
    assert np.isnan(data.action).all()
    assert not np.isnan(data.predicted_action).any()
    np.testing.assert_allclose(data.timestamp, np.arange(12) / 10, atol=1e-6)
    np.testing.assert_array_equal(data.frame_query, np.arange(12) % 5)
    text = "".join(data.token_text.values[0])
    assert "soup" in text.replace(" ", "")
    assert len(list(read_frames(episode.videos["observation.images.image"]))) == 12


def test_single_frames_of_videos_with_their_state(tmp_path):
    film = write_video(tmp_path / "film.mp4", 30)
    states = np.stack([recorded.state(0, frame, 3) for frame in range(30)])
    np.save(tmp_path / "state.npy", states)
    seen = Seen()
    footage = VideoFrames(
        {scripted.CAMERA: film}, task=SOUP, state=tmp_path / "state.npy", frames=[20, 3, 10]
    )
    record_dataset(make_policy(), footage, tmp_path / "out", LAST, preprocessor=seen, batch_size=2)
    (episode,) = open_run(tmp_path / "out")
    data = episode.dataset.load()
    assert data.frame_index.values.tolist() == [3, 10, 20]
    assert data.inference_frame.values.tolist() == [0, 1, 2]
    assert data.frame_query.values.tolist() == [1, 1, 1]
    np.testing.assert_allclose(data.timestamp, [0.3, 1.0, 2.0], atol=1e-6)
    np.testing.assert_array_equal(data.state, states[[3, 10, 20]])
    given = torch.cat([batch["observation.state"] for batch in seen.batches])
    np.testing.assert_array_equal(given, states[[3, 10, 20]])
    record_dataset(make_policy(), footage, tmp_path / "again", LAST, preprocessor=(again := Seen()))
    assert torch.equal(again.batches[0][scripted.CAMERA][0], seen.batches[0][scripted.CAMERA][0])
    other = VideoFrames({scripted.CAMERA: film}, task=SOUP, state=states, frames=[3, 10])
    with pytest.raises(StoreError, match="replay frames"):
        record_dataset(make_policy(), other, tmp_path / "out", AttentionConfig(existing="skip"))
    frames = list(read_frames(film))
    shown = torch.cat([batch[scripted.CAMERA] for batch in seen.batches])
    for picture, number in zip(shown, (3, 10, 20), strict=True):
        np.testing.assert_array_equal((picture * 255).round().byte().permute(1, 2, 0), frames[number])


def test_videos_that_do_not_fit_are_refused(tmp_path):
    film = write_video(tmp_path / "film.mp4", 6)
    short = write_video(tmp_path / "short.mp4", 5)
    quick = write_video(tmp_path / "quick.mp4", 6, fps=20)
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.npy").write_text("no numbers")
    cases = [
        ({}, {}, "got none"),
        ({"image": tmp_path / "none.mp4"}, {}, "no such video"),
        ({"image": tmp_path / "text.mp4"}, {}, "not a readable video"),
        ({"image": film, "image2": short}, {}, "5 frames"),
        ({"image": film, "image2": quick}, {}, "20 frames per second"),
        ({"image": film}, {"frames": [6]}, "got 6"),
        ({"image": film}, {"frames": []}, "got none"),
        ({"image": film}, {"state": tmp_path / "text.npy"}, "cannot be read"),
        ({"image": film}, {"state": np.zeros((5, 3))}, "5 rows"),
        ({"image": film}, {"state": np.array(["a"])}, "expected numbers"),
    ]
    for videos, arguments, words in cases:
        with pytest.raises(ConfigError) as refused:
            VideoFrames(videos, task=SOUP, **arguments)
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)
    policy = make_policy()  # its config has no empty_cameras: it takes no frame without its camera
    with pytest.raises(ConfigError, match=r"image, which is not there: got observation\.images\.wrist"):
        record_dataset(policy, VideoFrames({"wrist": film}, task=""), tmp_path / "out", LAST)


# The command, and what opens its stores


@pytest.fixture
def command(capsys, monkeypatch):
    """Run `lerobot-attn` with these words: (exit status, stdout and stderr)."""
    from lerobot_attn import cli

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lerobot-attn", *map(str, words)])
        status = 0
        try:
            cli.main()
        except SystemExit as ended:
            status = ended.code or 0
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def test_the_command_replays_a_data_set(command, demo_checkpoint, kitchen, tmp_path):
    words = ["replay", f"--policy.path={demo_checkpoint}", f"--dataset={kitchen}", "-o", tmp_path / "out"]
    options = ["--policy.num_inference_steps=2", "--attention.layers=[-1]", "--attention.heads", "[0,1]"]
    status, said = command(*words, *options, "--episodes=0,2", "--every", "8", "--batch-size=3")
    assert status == 0, said
    assert "inferences: about" in said
    assert "2 of 2 episodes saved" in said
    first, last = in_order(tmp_path / "out")
    assert (first.attributes["episode_index"], last.attributes["episode_index"]) == (0, 2)
    assert first.dataset.inference_frame.values.tolist() == [0, 8]
    assert first.dataset["head"].values.tolist() == [0, 1]
    assert "action_error" in first.dataset
    # An interrupted one goes on; the folder is not overwritten unasked.
    status, said = command(*words, *options, "--every=8")
    assert (status, said.splitlines()[-1].startswith("error: ")) == (1, True)
    status, said = command(*words, *options, "--every=8", "--attention.existing=skip")
    assert status == 0, said
    assert "3 of 3 episodes saved (2 of them before)" in said
    # What reads stores reads these.
    for words in (
        ("inspect", tmp_path / "out"),
        ("inspect", first.path),
        ("verify", first.path, "-o", tmp_path / "sheet.png"),
        ("plot", first.path, "--kind", "image", "-o", tmp_path / "plot.png"),
        ("overlay", last.path, "-o", tmp_path / "overlay.mp4"),
    ):
        status, said = command(*words)
        assert status == 0, said
    said = " ".join(command("inspect", first.path)[1].split())
    assert "data set kitchen, episode 0" in said
    assert "replay asked every 8 frames; the actions are the recorded ones" in said
    assert {row.dataset for row in open_run(tmp_path / "out").table.itertuples()} == {"kitchen"}


def test_what_was_not_executed_is_not_called_so(small, tmp_path):
    from lerobot_attn import analysis
    from lerobot_attn.verify import verify_episode

    # The scripted policy executes 10 of its 50 actions; here a chunk stands beside 20 frames.
    config = AttentionConfig(layers="all")
    record_dataset(make_policy(), small, tmp_path, config, every=20, postprocessor=lambda action: action)
    (episode,) = (e for e in open_run(tmp_path) if e.n_frames == 22)
    checks = {check.name: check for check in verify_episode(episode).checks}
    assert checks["frame table"].status == "ok"
    assert not [check for check in checks.values() if check.status == "failed"]
    data = episode.dataset
    assert analysis.attention(data, frame=15).attrs["query"] == "action 15, predicted for the frame"
    share = analysis.modality_share(data, frame=[21, 3], layer="mean", head="mean")
    assert share.attrs["query"] == "the action predicted for the frame"
    # Results by frame carry what they are joined by.
    assert share.frame_index.values.tolist() == [21, 3]
    np.testing.assert_allclose(share.timestamp, [1.05, 0.15], atol=1e-6)
    assert share.episode_index.values.tolist() == [2, 2]
    assert share.task_index.values.tolist() == [0, 0]
    joined = share.isel(modality=0).to_dataframe(name="share").join(data.action_error.to_series())
    assert joined.action_error.notna().all()


def test_the_recipe_runs(command, demo_policy, demo_checkpoint, kitchen, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = page.split("## My dataset")[1].split("\n## ")[0]
    film = write_video(tmp_path / "film.mp4", 6)
    monkeypatch.chdir(tmp_path)
    places = {"CHECKPOINT": demo_checkpoint, "DATASET": kitchen, "FILM": film}
    folders = []
    for line in re.findall(r"^lerobot-attn (.*)$", section, re.MULTILINE):
        for name, place in places.items():
            line = line.replace(name, str(place))
        words = shlex.split(line)
        status, said = command(*words, "--policy.num_inference_steps=1")
        assert status == 0, said
        folders.append(words[-1])
    assert [len(open_run(folder)) for folder in folders] == [3, 2, 1]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    policy, preprocessor, postprocessor = demo_policy(num_inference_steps=1)
    names = {"policy": policy, "preprocessor": preprocessor, "postprocessor": postprocessor}
    exec(compile(block, "recipes.md", "exec"), {**names, "dataset": str(kitchen)})
    assert len(open_run("demonstrations")) == 3


def test_the_explorer_serves_a_replay_without_actions(tmp_path, demo_policy):
    from test_explorer import client_of

    policy, preprocessor, _ = demo_policy(num_inference_steps=1)
    footage = VideoFrames({"image": write_video(tmp_path / "film.mp4", 4)}, task=SOUP)
    record_dataset(policy, footage, tmp_path / "out", LAST, preprocessor=preprocessor, every=2)
    with client_of(tmp_path / "out") as client:
        (row,) = client.get("/api/run").json()["episodes"]
        facts = client.get(f"/api/episodes/{row['id']}").json()
        table = client.get(f"/api/episodes/{row['id']}/{facts['version']}/timeline").json()
    assert table["frame_action"] == [0, 1, 0, 1]
    assert table["action"] == [[None] * 7] * 4


def test_the_command_asks_about_videos(command, demo_checkpoint, tmp_path):
    film = write_video(tmp_path / "film.mp4", 12)
    words = [f"--policy.path={demo_checkpoint}", "--policy.num_inference_steps=2", "-o", tmp_path / "out"]
    status, said = command(
        "replay",
        *words,
        f"--video=image={film}",
        f"--task={SOUP}",
        "--frames=0,4,11",
        "--attention.layers=-1",
    )
    assert status == 0, said
    (episode,) = open_run(tmp_path / "out")
    assert episode.dataset.frame_index.values.tolist() == [0, 4, 11]
    status, said = command("inspect", episode.path)
    assert status == 0
    said = " ".join(said.split())
    assert "replay of film.mp4, asked every 1 frames" in said
    assert "not given observation.images.image2: absent; observation.state: zeros" in said


def test_the_command_refuses_in_one_line(command, demo_checkpoint, kitchen, tmp_path):
    front = write_dataset(tmp_path / "front", [3], cameras=("observation.images.front",))
    film = write_video(tmp_path / "film.mp4", 3)
    known = [f"--policy.path={demo_checkpoint}", "-o", tmp_path / "out"]
    data = f"--dataset={kitchen}"
    cases = [
        ((*known, data, "--attention.layer=[1]"), "layer"),
        ((*known, data, "--attention.layers=[99]"), "99"),
        ((*known, data, "--nonsense=1"), "--nonsense"),
        ((*known, data, "--attention.layers"), "no value"),
        ((*known, data, "--policy.nonsense=1"), "--policy"),
        ((*known, data, "--rename={"), "--rename"),
        ((*known, data, "--every=often"), "--every"),
        ((*known, data, "--episodes=some"), "--episodes"),
        ((*known, data, "--frames=1"), "--frames"),
        ((*known, data, "--episodes=7"), "got 7"),
        (known, "--dataset"),
        ((*known, data, f"--video=image={film}"), "--dataset"),
        ((*known, f"--video=image={film}"), "--task"),
        ((*known, "--video=film.mp4", "--task="), "CAMERA=FILE"),
        ((*known, f"--dataset={front}"), '--rename \'{"observation.images.front": '),
        ((f"--policy.path={tmp_path}", "-o", tmp_path / "out", data), "--policy.path"),
    ]
    for words, expected in cases:
        status, said = command("replay", *words)
        last = said.splitlines()[-1]
        assert status == 1, said
        assert last.startswith("error: "), said
        assert expected in last, last
    assert not list((tmp_path / "out").rglob("*.zarr"))
