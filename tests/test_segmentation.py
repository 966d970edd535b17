"""Masks of a rollout's environments: of the inferences that are recorded, turned as the policy sees them."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

import scripted  # noqa: E402
from test_record_episodes import N_FRAMES, batch_of, observation_of  # noqa: E402
from test_recording import evaluate, make_policy, scripted_adapter  # noqa: E402, F401

from lerobot_attn import AttentionConfig, open_episode, open_run, record_episodes  # noqa: E402
from lerobot_attn.errors import CaptureError, ConfigError  # noqa: E402
from lerobot_attn.masks import Instance, SceneMasks, scaled  # noqa: E402
from lerobot_attn.plugin.segmentation import SceneSource, check_masks, scenes_of_rollout  # noqa: E402

INSTANCES = (Instance("background", "background"), Instance("soup_1", "target"), Instance("arm", "robot"))


def mask_at(env, t):
    """What a camera shows, as the environment has it: the soup moves down, the arm stays in a corner."""
    mask = np.zeros((8, 8), np.int16)
    mask[t % 8, env : env + 3] = 1
    mask[0, 7] = 2
    return mask


def scene_at(env, t):
    return SceneMasks(INSTANCES, {"image": mask_at(env, t)}, np.full((3, 3), t, np.float32))


class MaskedEnv(scripted.ScriptedEnv):
    """Knows what its picture shows, and says how often it was asked."""

    def __init__(self, number, length, shows=True):
        super().__init__(length, False, 1000)
        self.number, self.shows, self.asked = number, shows, []

    def _observation(self):
        observation = super()._observation()
        if self.shows:  # brighter from corner to corner, so that it tells how it is turned
            observation["pixels"]["image"] += np.add.outer(range(8), range(0, 80, 10)).astype(np.uint8)[
                ..., None
            ]
        return observation

    def lerobot_attn_masks(self, environments=None, cameras=None):
        if environments is not None and self.number not in environments:
            return None
        assert cameras[0] == "image"
        self.asked.append(self._t)
        return scene_at(self.number, self._t)


def make_envs(lengths, **options):
    return gym.vector.SyncVectorEnv(
        [lambda i=i, n=n: MaskedEnv(i, n, **options) for i, n in enumerate(lengths)],
        autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP,
    )


def turning(observation):
    image = observation.get(scripted.CAMERA)
    return observation if image is None else {**observation, scripted.CAMERA: image.flip(2, 3)}


def masked(folder, envs, *, env_preprocessor=turning, **options):
    """Evaluate with masks, in environments whose pictures LeRobot turns."""
    return evaluate(folder, {3: envs}, env_preprocessor=env_preprocessor, segmentation=True, **options)


@pytest.mark.parametrize("turns", [True, False])
def test_each_inference_has_the_masks_of_its_own_frame(tmp_path, turns):
    lengths = (7, 23)
    envs = make_envs(lengths)
    preprocess = turning if turns else lambda value: value
    _, run = evaluate(
        tmp_path,
        {3: envs},
        policy=make_policy(n_action_steps=5),
        segmentation=True,
        env_preprocessor=preprocess,
    )
    assert not run.failures
    for env, (episode, length) in enumerate(zip(open_run(tmp_path), lengths, strict=True)):
        data = episode.dataset.load()
        assert data.instance.values.tolist() == ["background", "soup_1", "arm"]
        assert data.instance_role.values.tolist() == ["background", "target", "robot"]
        assert data.mask_camera.values.tolist() == [scripted.CAMERA]
        frames = range(0, length, 5)
        assert data.inference_frame.values.tolist() == [*frames]
        for inference, frame in enumerate(frames):
            expected = mask_at(env, frame)[::-1, ::-1] if turns else mask_at(env, frame)
            np.testing.assert_array_equal(data.segmentation[inference, 0], expected)
            assert (data.instance_position[inference] == frame).all()
        # Drawn at its own inferences alone: not at every step, and not once its episode is over.
        assert envs.envs[env].asked == [*frames]


def test_actions_are_what_they_are_without_masks(tmp_path):
    for name, settings in (("plain", {}), ("masked", {"segmentation": True})):
        torch.manual_seed(0)
        evaluate(tmp_path / name, {3: make_envs((7, 23))}, env_preprocessor=turning, **settings)
    for plain, masked in zip(open_run(tmp_path / "plain"), open_run(tmp_path / "masked"), strict=True):
        np.testing.assert_array_equal(plain.arrays.action, masked.arrays.action)
        assert "segmentation" not in plain.arrays
        for camera, video in plain.videos.items():
            assert video.read_bytes() == masked.videos[camera].read_bytes()


def test_roles_may_be_given(tmp_path):
    evaluate(
        tmp_path,
        {3: make_envs((7,))},
        segmentation=True,
        env_preprocessor=turning,
        roles={"soup_1": "distractor"},
    )
    (episode,) = open_run(tmp_path)
    assert episode.arrays.instance_role.values.tolist() == ["background", "distractor", "robot"]


@pytest.mark.parametrize(
    ("envs", "settings", "message"),
    [
        (
            lambda: make_envs((7,)),
            {"roles": {"milk_1": "target"}},
            "roles: got a role of 'milk_1', expected one of background, soup_1, arm",
        ),
        (
            lambda: scripted.make_envs((7,)),
            {},
            "masks: what is evaluated has none .*, expected an environment that simulates with MuJoCo",
        ),
    ],
    ids=["no such instance", "no masks"],
)
def test_what_cannot_be_drawn_is_one_line_before_the_first_action(tmp_path, envs, settings, message):
    with pytest.raises(ConfigError, match=message):
        masked(tmp_path, envs(), **settings)


def test_a_picture_that_is_changed_has_no_mask(tmp_path):
    def blurred(observation):
        return {**observation, scripted.CAMERA: observation[scripted.CAMERA] / 2}

    with pytest.raises(
        ConfigError, match=r"observation\.images\.image: the environment's preprocessor changes"
    ):
        evaluate(tmp_path, {3: make_envs((7,))}, segmentation=True, env_preprocessor=blurred)


def test_pictures_that_do_not_tell_how_they_are_turned_fail_the_recording_alone(tmp_path):
    _, run = evaluate(
        tmp_path, {3: make_envs((7,), shows=False)}, segmentation=True, env_preprocessor=turning
    )
    assert "how its pictures are turned cannot be told" in run.failures[0]


@pytest.mark.parametrize(
    ("env_type", "roles", "message"),
    [
        ("pusht", {}, "masks: env.type=pusht is simulated by pymunk, expected an environment that simulates"),
        ("libero", {"milk_1": "goal"}, "roles, milk_1: got role 'goal', expected one of target"),
    ],
)
def test_what_is_wrong_from_the_start(env_type, roles, message):
    check_masks("libero", {"milk_1": "target"})
    check_masks("somebody's own", {})
    with pytest.raises(ConfigError, match=message):
        check_masks(env_type, roles)


def test_masks_are_drawn_once_a_step_for_whoever_asks():
    envs = make_envs((7, 7))
    envs.reset(seed=[0, 1])
    top = "observation.images.top"
    source = SceneSource(envs, [top, "observation.images.absent"], renamed={scripted.CAMERA: top})
    picture = torch.arange(64.0).reshape(1, 1, 8, 8)
    source.shown({scripted.CAMERA: picture}, {scripted.CAMERA: picture.flip(2)})
    assert list(source.of([1])) == [1]
    assert [list(scene.masks) for scene in source.current()] == [[top], [top]]
    np.testing.assert_array_equal(source.current()[1].masks[top], mask_at(1, 0)[::-1])
    assert [env.asked for env in envs.envs] == [[0], [0]]
    source.forget()
    source.current()
    assert [env.asked for env in envs.envs] == [[0, 0], [0, 0]]


# Own loops


def record(folder, masks, n_frames=N_FRAMES, policy=None):
    policy = policy or make_policy(n_action_steps=5)
    with (
        record_episodes(policy, folder, AttentionConfig(layers="all"), fps=20) as recording,
        recording.episode(task="do as told") as episode,
    ):
        policy.reset()
        for frame in range(n_frames):
            action = policy.select_action(batch_of(frame))
            episode.step(observation_of(frame), action, masks=masks(frame))
    return open_episode(recording.results[0].path)


def named(frame):
    return SceneMasks(INSTANCES, {scripted.CAMERA: mask_at(0, frame)})


@pytest.mark.parametrize("lazy", [True, False])
def test_own_loops_give_masks_to_step(tmp_path, lazy):
    drawn = []

    def masks(frame):
        def draw():
            drawn.append(frame)
            return named(frame)

        return draw if lazy else named(frame)

    data = record(tmp_path, masks).arrays
    assert "instance_position" not in data
    assert data.attrs["segmentation"] == '{"source": "loop"}'
    frames = range(0, N_FRAMES, 5)
    for inference, frame in enumerate(frames):
        np.testing.assert_array_equal(data.segmentation[inference, 0], mask_at(0, frame))
    assert drawn == ([*frames] if lazy else [])


def test_masks_that_are_missing_later_are_unknown(tmp_path):
    data = record(tmp_path, lambda frame: named(frame) if frame < 5 else None).arrays
    assert (data.segmentation[0] >= 0).all()
    assert (data.segmentation[1:] == -1).all()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (lambda frame: named(frame) if frame else None, "masks at frame 5, but not at the first inference"),
        (
            lambda frame: SceneMasks(INSTANCES[: 3 - frame // 5], {scripted.CAMERA: mask_at(0, frame) % 2}),
            "other instances or roles than at the first inference, .* differ in arm",
        ),
        (
            lambda frame: SceneMasks(INSTANCES, {scripted.CAMERA: mask_at(0, frame) + 1}),
            "observation.images.image has numbers 1 to 3, expected -1 .unknown. to 2",
        ),
        (
            lambda frame: SceneMasks(INSTANCES, {scripted.CAMERA: mask_at(0, frame) / 2}),
            "of float64, expected .height, width. of whole numbers",
        ),
    ],
    ids=["not from the start", "another instance", "a number too many", "no whole numbers"],
)
def test_masks_that_do_not_fit_end_the_episode(tmp_path, masks, message):
    with pytest.raises(CaptureError, match=message):
        record(tmp_path, masks)


def test_masks_are_not_asked_for_where_nobody_draws_them(tmp_path):
    config = AttentionConfig(segmentation=True)
    with (
        pytest.raises(ConfigError, match="segmentation: got true in a loop of your own, expected false"),
        record_episodes(make_policy(), tmp_path, config, fps=20),
    ):
        pass
    with pytest.raises(ConfigError, match="on a robot"):
        config.without_simulator("on a robot")


def test_a_mask_of_another_size_shows_what_lies_at_each_pixels_centre():
    mask = np.arange(12, dtype=np.int16).reshape(3, 4)
    np.testing.assert_array_equal(scaled(mask, (6, 8)), mask.repeat(2, axis=0).repeat(2, axis=1))
    np.testing.assert_array_equal(scaled(mask.repeat(3, axis=0).repeat(5, axis=1), (3, 4)), mask)


def test_two_who_follow_one_rollout_share_its_masks(tmp_path):
    """Who acts on what a mask shows, and who records it."""
    envs = make_envs((7,))
    envs.reset(seed=[0])
    plain = envs.step
    call = {"env": envs, "policy": make_policy(), "env_preprocessor": turning}
    with scenes_of_rollout(call) as outer:
        with scenes_of_rollout(call) as inner:
            assert inner is outer
        picture = torch.arange(64.0).reshape(1, 1, 8, 8)
        call["env_preprocessor"]({scripted.CAMERA: picture})
        inner.current()
        assert envs.envs[0].asked == [0]
        envs.step(np.zeros((1, 4), np.float32))
        outer.current()
        assert envs.envs[0].asked == [0, 1]
    assert envs.step == plain
    with scenes_of_rollout(call) as later:
        assert later is not outer
