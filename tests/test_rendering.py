"""Pictures that nobody looks at are not drawn: the policy sees what it sees otherwise, nothing is stale."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

import scripted  # noqa: E402
from evaluation import evaluate_all  # noqa: E402
from test_plugin import ENV, error_of, run_main  # noqa: E402, F401
from test_recording import scripted_adapter  # noqa: E402, F401

from lerobot_attn import AttentionConfig, open_run  # noqa: E402
from lerobot_attn.errors import CaptureError, ConfigError  # noqa: E402
from lerobot_attn.plugin.rendering import drawing_at_inferences  # noqa: E402
from lerobot_attn.recording.run import RunRecorder  # noqa: E402


class SparingEnv(scripted.ScriptedEnv):
    """Draws when it is told to; says at which frames it did."""

    def __init__(self, length):
        super().__init__(length, True, 1000)
        self.draws, self.drawn, self.newest = True, [], None

    def _observation(self):
        if self.draws or self.newest is None:
            self.drawn.append(self._t)
            self.newest = super()._observation()["pixels"]
        return {**super()._observation(), "pixels": self.newest}

    def reset(self, **options):
        self.draws = True
        return super().reset(**options)

    def lerobot_attn_draw(self, draws):
        self.draws = draws


def make_envs(lengths):
    return gym.vector.SyncVectorEnv(
        [lambda n=n: SparingEnv(n) for n in lengths], autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP
    )


class SeeingPolicy(scripted.ScriptedPolicy):
    """Its actions hold how bright the picture is that it looks at, and can look once more at a frame."""

    looks_at = None
    seen = 0

    def predict_action_chunk(self, batch, **kwargs):
        actions = super().predict_action_chunk(batch)
        actions[..., 3] = batch[scripted.CAMERA].mean(dim=(1, 2, 3))[:, None]
        return actions

    def select_action(self, batch, **kwargs):
        if self.seen == self.looks_at:
            self._queue.clear()
        self.seen += 1
        return super().select_action(batch, **kwargs)


def evaluate(folder, envs, *, sparing, policy=None):
    """Evaluate two batches as the plugin does, with LeRobot's own videos."""
    config = AttentionConfig(layers="none", mean_layers="all", cameras=False)
    evaluate_all(
        {0: envs},
        policy or SeeingPolicy(scripted.make_config(n_action_steps=5)),
        RunRecorder(config, folder / "attention", {"policy": {}}),
        wraps=[drawing_at_inferences] if sparing else [],
        n_episodes=2 * envs.num_envs,
        max_episodes_rendered=10,
        videos_dir=folder / "videos",
    )
    return open_run(folder)


def test_the_policy_sees_the_same_and_little_is_drawn(tmp_path):
    lengths = (7, 23)
    torch.manual_seed(0)
    always = evaluate(tmp_path / "always", make_envs(lengths), sparing=False)
    torch.manual_seed(0)
    envs = make_envs(lengths)
    rarely = evaluate(tmp_path / "rarely", envs, sparing=True)
    for one, other in zip(always, rarely, strict=True):
        assert one.n_frames == other.n_frames
        for name in ("action", "reward", "success", "state", "action_chunk"):
            np.testing.assert_array_equal(one.arrays[name], other.arrays[name])
        assert other.eval_video is None
    assert len(list((tmp_path / "always").rglob("*.mp4"))) == 4
    assert not list((tmp_path / "rarely").rglob("*.mp4"))
    # Twice: a reset, and then every fifth frame.
    assert envs.envs[1].drawn == 2 * [0, 5, 10, 15, 20]


def test_a_policy_that_looks_at_a_frame_without_pictures_is_stopped(tmp_path):
    policy = SeeingPolicy(scripted.make_config(n_action_steps=5))
    policy.looks_at = 8
    with pytest.raises(CaptureError, match=r"the policy looked at frame 8, .* expected every 5 frames"):
        evaluate(tmp_path, make_envs((23,)), sparing=True, policy=policy)


def test_environments_that_always_draw_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot leave pictures out .* expected LeRobot's LIBERO"):
        evaluate(tmp_path, scripted.make_envs((7,)), sparing=True)


RARELY = "--eval.render=inferences"
RECORDED = "--eval.save_attention_maps=true"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ENV, "--eval.render=never"], "error: --eval.render: got 'never', expected"),
        (
            ["--env.type=pusht", RARELY],
            "error: --eval.render=inferences: got env.type=pusht, expected libero",
        ),
        ([*ENV, RARELY, RECORDED], "error: --eval.attention.cameras: got True with --eval.render="),
        (
            [*ENV, RARELY, RECORDED, "--eval.attention.cameras=false", "--eval.attention.view=true"],
            "error: --eval.attention.view: got True",
        ),
        ([*ENV, RARELY, "--eval.recording=true"], "error: --eval.recording: got true"),
        ([*ENV, RARELY, "--env.max_parallel_tasks=2"], "error: env.max_parallel_tasks: got 2"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_any_environment(
    run_main,  # noqa: F811
    capsys,
    tmp_path,
    arguments,
    message,
):
    out = tmp_path / "out"
    said = error_of(run_main, capsys, *arguments, f"--output_dir={out}")
    assert said.startswith(message), said
    assert not out.exists()


def test_lerobot_still_sees_its_own_config(run_main, tmp_path):  # noqa: F811
    arguments = [*ENV, f"--output_dir={tmp_path / 'out'}"]
    assert run_main(*arguments, RARELY) == run_main(*arguments, install=False)


def test_a_shutter_takes_the_newest_picture_and_says_what_it_missed():
    pytest.importorskip("libero")
    from lerobot_attn.plugin.libero_env import Shutter

    taken = iter(range(100))
    sim = Simulation(lambda **_: next(taken))
    shutter = Shutter()
    shutter.watch(sim)
    shutter.watch(sim)  # once is enough
    assert [sim.render(camera_name="a"), sim.render(camera_name="b")] == [0, 1]
    shutter.is_open = False
    assert [sim.render(camera_name="a"), sim.render(camera_name="c")] == [0, 2]
    assert sim.render(camera_name="a", segmentation=True) == 3  # not what a policy looks at
    shutter.check()
    shutter.is_open = True
    with pytest.raises(CaptureError, match="a took no picture in a step"):
        shutter.check()
    assert sim.render(camera_name="a") == 4
    shutter.check()


class Simulation:
    def __init__(self, render):
        self.render = render
