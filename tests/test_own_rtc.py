"""Real-time chunking in one's own loop: LeRobot's queue and guidance, and a robot that does not wait."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from lerobot.policies.rtc.action_queue import ActionQueue  # noqa: E402
from lerobot.policies.rtc.configuration_rtc import RTCConfig  # noqa: E402
from test_own_loop import observation  # noqa: E402

from lerobot_attn import AttentionConfig, open_run, record_episodes  # noqa: E402

EVERY, DELAY, N_FRAMES = 8, 3, 24
BLENDED = 13


@pytest.fixture
def rtc(demo_policy):
    """The demo policy with real-time chunking, its processors, and which inferences were guided."""
    policy, preprocess, postprocess = demo_policy(num_inference_steps=2)
    policy.config.rtc_config = RTCConfig(execution_horizon=10)
    policy.init_rtc_processor()
    return policy, preprocess, postprocess


def run_loop(policy, preprocess, postprocess, told, *, ends):
    """Ask at every 8th frame; the answer is merged 3 frames later, and meanwhile the old chunk is executed.

    Args:
        policy: with real-time chunking.
        preprocess: its preprocessor.
        postprocess: its postprocessor.
        told: called with observation, executed action and the policy's own for each frame.
        ends: whether the inference ends "early", before the frames that it overlaps take place, or "late".

    Returns:
        The executed actions, (frame, action_dim), as the policy gave them.
    """
    queue = ActionQueue(policy.config.rtc_config)
    guided_step = policy.rtc_processor.denoise_step
    begun, may_end = threading.Event(), threading.Event()
    sent = []

    def gated_step(*arguments, **more):
        begun.set()
        assert may_end.wait(60)
        return guided_step(*arguments, **more)

    def infer(seen, left_over):
        # The noise of each inference is another.
        return policy.predict_action_chunk(
            preprocess(seen), inference_delay=DELAY, prev_chunk_left_over=left_over
        )[0].detach()

    policy.rtc_processor.denoise_step = gated_step
    with ThreadPoolExecutor(1) as thread:
        for frame in range(N_FRAMES):
            seen = observation(frame)
            if frame % EVERY == 0:
                begun.clear()
                may_end.clear()
                running = thread.submit(infer, seen, queue.get_left_over())
                assert begun.wait(60)
                if ends == "early" or frame == 0:
                    may_end.set()
                    running.result()
            if frame == 0 or (frame % EVERY == DELAY and frame > EVERY):
                may_end.set()
                chunk = running.result()
                queue.merge(chunk, chunk, DELAY if frame else 0)
            token = queue.get()
            if frame == BLENDED:  # of two tokens: none of a chunk
                token = (token + queue.get_left_over()[0]) / 2
            told(seen, postprocess(token[None])[0], token)
            sent.append(token.numpy())
    return np.stack(sent)


@pytest.mark.parametrize("ends", ["early", "late"])
def test_sent_actions_are_found_in_the_chunk_that_gave_them(rtc, tmp_path, ends):
    policy, preprocess, postprocess = rtc
    torch.manual_seed(0)
    expected = run_loop(policy, preprocess, postprocess, lambda *_: None, ends=ends)
    policy.init_rtc_processor()
    torch.manual_seed(0)
    config = AttentionConfig(layers="all", prefix_layers=[0])
    with (
        record_episodes(policy, tmp_path, config, fps=20, preprocessor=preprocess) as recording,
        recording.episode(task="pick up the soup") as episode,
    ):

        def tell(seen, executed, token):
            episode.step(seen, executed, policy_action=token)

        sent = run_loop(policy, preprocess, postprocess, tell, ends=ends)
    np.testing.assert_array_equal(sent, expected)  # the recording changed nothing
    (found,) = open_run(tmp_path)
    assert found.is_complete
    data = found.dataset.load()
    frames = np.arange(N_FRAMES)
    asked = np.arange(0, N_FRAMES, EVERY)
    owner = np.where(frames < EVERY + DELAY, 0, (frames - DELAY) // EVERY)
    token = frames - EVERY * owner
    blended = frames == BLENDED
    np.testing.assert_array_equal(data.inference_frame, asked)  # when it was asked, not when it answered
    np.testing.assert_array_equal(data.frame_query, np.where(blended, -1, token))
    np.testing.assert_array_equal(data.frame_inference[~blended], owner[~blended])
    given = data.action_chunk.values[owner, token]
    np.testing.assert_array_equal(given[~blended], sent[~blended])
    np.testing.assert_allclose(data.action, np.stack([postprocess(torch.tensor(a)[None])[0] for a in sent]))
    # Guidance holds the new chunk's beginning to what was still to be executed of the last one.
    chunks = data.action_chunk.values
    for last, new in itertools.pairwise(chunks):
        left_over = last[EVERY : EVERY + DELAY]
        apart = np.abs(new[:DELAY] - left_over).mean()
        assert apart < np.abs(new[20 : 20 + DELAY] - last[20 : 20 + DELAY]).mean()
    for name in ("suffix_attention", "prefix_attention", "suffix_attention_mean"):
        assert np.isfinite(data[name].values).all()
    np.testing.assert_allclose(data.suffix_attention.astype(np.float32).sum("key"), 1, atol=2e-3)
    assert len(found.videos) == 2


def test_without_saying_so_only_what_the_policy_gave_is_a_token(rtc, tmp_path):
    """`policy_action` was forgotten: postprocessed numbers are no token's, and none is guessed."""
    policy, preprocess, postprocess = rtc
    with (
        record_episodes(policy, tmp_path, AttentionConfig(layers=[-1]), fps=20) as recording,
        recording.episode() as episode,
    ):
        run_loop(policy, preprocess, postprocess, lambda seen, sent, _: episode.step(seen, sent), ends="late")
    (found,) = open_run(tmp_path)
    assert found.is_complete
    assert (found.dataset.frame_query == -1).all()
