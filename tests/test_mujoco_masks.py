"""Masks of any MuJoCo environment: of its very pictures, turned as these are, and they change nothing."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")
mujoco = pytest.importorskip("mujoco")

import mujoco_env  # noqa: E402
from conftest import REQUIRE_LIBERO  # noqa: E402
from mujoco_env import HEIGHT, NAMES, WIDTH, MujocoEnv, box_px  # noqa: E402
from test_recording import evaluate, make_policy, scripted_adapter  # noqa: E402, F401

from lerobot_attn import open_run  # noqa: E402
from lerobot_attn.errors import ConfigError  # noqa: E402
from lerobot_attn.masks import SceneMasks  # noqa: E402
from lerobot_attn.plugin.masked_env import EnvWithMasks, NoMasks  # noqa: E402
from lerobot_attn.plugin.mujoco_bodies import BodyScene  # noqa: E402
from lerobot_attn.plugin.scene_roles import goal_sites, roles_in  # noqa: E402
from lerobot_attn.plugin.segmentation import check_masks, environments_with_masks  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def rendering():
    from lerobot_attn.machine.doctor import check_rendering

    check = check_rendering()
    if check.status == "failed":
        (pytest.fail if os.environ.get(REQUIRE_LIBERO) == "1" else pytest.skip)(check.detail)


def middle_of(mask):
    return np.argwhere(mask).mean(0)


def masks_of(env):
    found = env.lerobot_attn_masks()
    assert isinstance(found, SceneMasks), found
    return found


@pytest.fixture
def asked():
    """Makes environments that can be asked, and closes them."""
    made = []

    def make(*arguments, **options):
        made.append(EnvWithMasks(MujocoEnv(*arguments, **options)))
        made[-1].reset(seed=3)
        return made[-1]

    yield make
    for env in made:
        env.close()


@pytest.mark.parametrize(
    ("turn", "holds"),
    [((), "model"), ((0, 1), "physics"), ((0,), "below"), ((1,), "model")],
)
def test_a_box_is_where_it_is_on_the_picture(asked, turn, holds):
    env = asked(turn=turn, holds=holds)
    for _ in range(3):
        found = masks_of(env)
        mask = np.flip(found.masks["image"], turn)
        assert mask.shape == (HEIGHT, WIDTH)
        np.testing.assert_allclose(middle_of(mask == 1), box_px(env.unwrapped.box_y_m), atol=0.6)
        np.testing.assert_allclose(found.positions[1], [0.3, env.unwrapped.box_y_m, 0.05], atol=1e-6)
        env.step(np.array([0, 0, 0, 0.5]))
    assert [one.name for one in found.instances] == NAMES
    assert [one.role for one in found.instances] == ["background", "background", "robot", "background"]
    seen = set(np.unique(found.masks["image"]))
    assert seen == {0, 1, 2, 3}
    assert np.isnan(found.positions[0]).all()


def test_the_camera_is_the_one_that_took_the_picture(asked):
    named, other = asked(), asked(camera="aside")
    picture = other.reset(seed=3)[0]["pixels"]["image"].astype(int)
    found = masks_of(other).masks["image"]
    red = (picture[..., 0] > 2 * picture[..., 2]) & (picture[..., 0] > 2 * picture[..., 1])
    assert (found == 1)[red].mean() > 0.9
    assert (found != masks_of(named).masks["image"]).mean() > 0.05
    # As MetaWorld's "pixels", which is one picture: LeRobot calls it observation.image.
    assert list(masks_of(asked(key=None)).masks) == ["observation.image"]


@pytest.mark.parametrize(
    ("options", "reason", "for_good"),
    [
        ({"holds": "nothing"}, "MujocoEnv shows no MuJoCo simulation", True),
        ({"plain": True}, "none of the simulation's cameras .top, aside. shows picture 'image'", True),
        ({"late": 3}, "camera top does not show what picture 'image' shows .* at another moment", False),
    ],
)
def test_what_has_no_masks_says_why(asked, options, reason, for_good):
    env = asked(**options)
    env.lerobot_attn_masks()
    env.step(np.zeros(4))
    found = env.lerobot_attn_masks()
    assert isinstance(found, NoMasks)
    assert found.for_good is for_good
    assert re.search(reason, found.reason), found.reason


def test_a_picture_that_looks_the_same_turned_is_told_later(asked, monkeypatch):
    env = asked()
    picture = env._pictures["image"]
    monkeypatch.setattr(BodyScene, "picture", lambda *_: np.full_like(picture, 7))
    env._pictures["image"] = np.full_like(picture, 7)
    found = env.lerobot_attn_masks()
    assert isinstance(found, NoMasks)
    assert not found.for_good
    assert "cannot be told" in found.reason
    monkeypatch.undo()
    env._pictures["image"] = picture
    assert (masks_of(env).masks["image"] == 1).any()


def batch(kind, lengths, **options):
    builders = [functools.partial(MujocoEnv, length, **options) for length in lengths]
    options = {"context": "forkserver"} if kind is gym.vector.AsyncVectorEnv else {}
    return kind(builders, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP, **options)


def recorded(folder, kind, lengths, *, segmentation=True, **options):
    """Evaluate as the plugin does; return the run, and the next random numbers of torch and NumPy."""
    torch.manual_seed(0)
    np.random.seed(0)
    with environments_with_masks("somebody's own") if segmentation else contextlib.nullcontext():
        envs = batch(kind, lengths, **options)
        try:
            _, run = evaluate(
                folder, {3: envs}, policy=make_policy(n_action_steps=5), segmentation=segmentation
            )
        finally:
            envs.close()
    assert not run.failures
    return open_run(folder), (torch.rand(1).item(), np.random.rand())


@pytest.mark.parametrize("kind", [gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv])
def test_a_rollout_is_what_it_is_without_masks(tmp_path, kind):
    lengths = (7, 12)
    masked, after = recorded(tmp_path / "masked", kind, lengths, turn=(0, 1))
    plain, after_plain = recorded(tmp_path / "plain", kind, lengths, turn=(0, 1), segmentation=False)
    assert after == after_plain
    for one, other, length in zip(masked, plain, lengths, strict=True):
        data = one.dataset.load()
        assert "segmentation" not in other.arrays
        for name in ("action", "state", "reward", "action_chunk"):
            np.testing.assert_array_equal(data[name], other.arrays[name])
        for camera, video in one.videos.items():
            assert video.read_bytes() == other.videos[camera].read_bytes()
        assert data.instance.values.tolist() == NAMES
        assert data.inference_frame.values.tolist() == [*range(0, length, 5)]
        for inference, frame in enumerate(range(0, length, 5)):
            slid = data.state.values[frame, 0]  # the box's joint
            mask = data.segmentation.values[inference, 0][::-1, ::-1]
            np.testing.assert_allclose(middle_of(mask == 1), box_px(0.2 - slid), atol=0.6)
            np.testing.assert_allclose(data.instance_position[inference, 1, 1], 0.2 - slid, atol=0.02)


def test_masks_are_drawn_at_inferences_alone(tmp_path, monkeypatch):
    drawn = []
    masks = BodyScene.masks
    monkeypatch.setattr(
        BodyScene,
        "masks",
        lambda self, *rest: drawn.append(round(self.data.time / 0.05)) or masks(self, *rest),
    )
    recorded(tmp_path, gym.vector.SyncVectorEnv, (12,))
    assert drawn == [0, 5, 10]


def test_vector_environments_are_built_as_before_afterwards():
    before = gym.vector.SyncVectorEnv.__init__
    with environments_with_masks("somebody's own"):
        assert gym.vector.SyncVectorEnv.__init__ is not before
    assert gym.vector.SyncVectorEnv.__init__ is before


@pytest.mark.parametrize("kind", [gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv])
def test_no_mujoco_is_one_line_before_the_first_action(tmp_path, kind):
    with pytest.raises(
        ConfigError, match=r"^masks: MujocoEnv shows no MuJoCo simulation, .* expected an environment that"
    ):
        recorded(tmp_path, kind, (7,), holds="nothing")
    for env_type in ("aloha", "metaworld", "robocasa"):
        check_masks(env_type, {})


def test_pictures_that_were_taken_earlier_fail_the_recording_alone(tmp_path):
    with environments_with_masks("somebody's own"):
        envs = batch(gym.vector.SyncVectorEnv, (12,), late=3)
    _, run = evaluate(tmp_path, {3: envs}, policy=make_policy(n_action_steps=5), segmentation=True)
    envs.close()
    assert "at another moment" in run.failures[0]


def test_an_episode_that_has_ended_is_not_compared(asked):
    env = asked(2)
    env.step(np.zeros(4))
    masks_of(env)
    env.step(np.zeros(4))
    env.unwrapped.reset(seed=4)  # as MetaWorld's does in the step that ends an episode
    masks_of(env)


@pytest.mark.libero
def test_any_robosuite_environment_is_drawn_as_libero_is():
    from lerobot.envs.libero import _get_suite

    from lerobot_attn.plugin.libero_env import LiberoEnvWithMasks

    suite = _get_suite("libero_object")
    libero = LiberoEnvWithMasks(
        suite, 0, "libero_object", observation_width=64, observation_height=64, num_steps_wait=0
    )
    env = EnvWithMasks(libero)
    env.reset(seed=0)
    for _ in range(3):
        expected, found = libero.lerobot_attn_masks(), masks_of(env)
        assert list(found.masks) == list(expected.masks) == ["image", "image2"]
        for name, mask in expected.masks.items():
            np.testing.assert_array_equal(found.masks[name], mask)
        np.testing.assert_array_equal(found.positions, expected.positions)
        env.step(np.array([1, 0, -1, 0, 0, 0, 1], np.float32))
    names = [one.name for one in expected.instances]
    assert [one.name for one in found.instances] == names
    robots = [one.name for one in expected.instances if one.role == "robot"]
    assert [one.name for one in found.instances if one.role == "robot"] == robots
    assert {view.differs for view in env._views.values()} == {0}
    env.close()


# Roles


@pytest.fixture
def simulation():
    model = mujoco.MjModel.from_xml_string(mujoco_env.SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def class_of(package, name):
    return type(name, (SimpleNamespace,), {"__module__": f"{package}.envs.there"})


def metaworld(name, observed, sites):
    return class_of("metaworld", name)(
        _get_pos_objects=lambda: np.array(observed, float),
        _target_pos=np.array([1.0, 2, 3]),
        _target_site_config=[(site, np.array(place)) for site, place in sites],
    )


GOALS = [("goal", [1.0, 2, 3]), ("ghost", [10.0, 10, 10])]


@pytest.mark.parametrize(
    ("name", "observed", "sites", "expected"),
    [
        ("SawyerPushEnvV3", [0.3, 0.2, 0.06], GOALS, {"box": "target", "goal": "destination"}),
        ("SawyerReachEnvV3", [0.3, 0.2, 0.06], GOALS, {"box": "distractor", "goal": "destination"}),
        ("SawyerHammerEnvV3", [0.3, 0.2, 0, 0, -0.5, 0], [], {"box": "target", "post": "destination"}),
        ("SawyerPegEnvV3", [0, -0.5, 0.1], [("lid", [1.0, 2, 3])], {"box": "destination", "post": "target"}),
        ("SawyerDoorEnvV3", [-0.2, -0.3, 0.1], [], {"post": "target", "box": "distractor"}),  # no robot
    ],
)
def test_metaworld_says_what_is_moved_and_where(simulation, name, observed, sites, expected):
    env = metaworld(name, observed, sites)
    scene = BodyScene(*simulation, goal_sites([env]))
    roles = roles_in([env], scene)
    assert roles == {**dict.fromkeys(scene.names, "background"), "body_2": "robot"} | expected
    scene.close()


def test_a_goal_that_is_drawn_has_its_own_mask(simulation):
    scene = BodyScene(*simulation, ("goal", "lid", "absent"))
    assert scene.names == (*NAMES, "goal")
    mask = np.flipud(scene.masks({"image": "top"}, (HEIGHT, WIDTH))["image"])
    column = WIDTH / 2 + mujoco_env.FOCAL_PX * -0.4 / 1.95 - 0.5
    row = HEIGHT / 2 - mujoco_env.FOCAL_PX * 0.3 / 1.95 - 0.5
    np.testing.assert_allclose(middle_of(mask == 4), (row, column), atol=0.6)
    np.testing.assert_allclose(scene.positions()[4], (-0.4, 0.3, 0.05), atol=1e-6)
    scene.close()


def test_aloha_and_robocasa_have_their_roles(simulation):
    scene = BodyScene(*simulation)
    aloha = class_of("gym_aloha", "AlohaEnv")()
    assert roles_in([aloha], scene)["box"] == "target"
    kitchen = class_of("robocasa", "Kitchen")(objects={"obj": None, "distr_counter": None})
    scene = SimpleNamespace(names=("background", "obj", "distr_counter", "stove", "arm"), robots=("arm",))
    assert list(roles_in([kitchen], scene).values()) == [
        "background",
        "target",
        "distractor",
        "background",
        "robot",
    ]


def test_a_robot_is_what_is_driven():
    model = mujoco.MjModel.from_xml_string(
        """<mujoco><worldbody>
          <body name="hand"><freejoint/><geom size=".1"/></body>
          <body name="handle" mocap="true"><geom size=".1"/></body>
          <body name="rope"><joint name="pull"/><geom size=".1"/></body>
          <body name="thruster"><freejoint/><geom size=".1"/><site name="nozzle"/></body>
          <body name="cube"><freejoint/><geom size=".1"/></body>
          <body name="empty"/>
        </worldbody>
        <equality><weld body1="handle" body2="hand"/></equality>
        <tendon><fixed name="cord"><joint joint="pull" coef="1"/></fixed></tendon>
        <actuator><motor tendon="cord"/><motor site="nozzle"/></actuator></mujoco>"""
    )
    scene = BodyScene(model, mujoco.MjData(model))
    assert scene.names == ("background", "hand", "handle", "rope", "thruster", "cube")
    assert scene.robots == ("hand", "rope", "thruster")
    assert scene.movable == ("hand", "rope", "thruster", "cube")
