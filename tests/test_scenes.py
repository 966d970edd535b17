"""What simulations say of their objects: roles by the task's goal, masks of the picture's moment."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("lerobot")


pytestmark = pytest.mark.libero
NAMES = ("background", "bowl_1", "bowl_10", "cabinet_1", "stove_1", "plate_1", "Panda0")
OTHERS = {"background": "background", "Panda0": "robot"}
FIXTURES = {"cabinet_1", "stove_1", "table"}


@pytest.mark.parametrize(
    ("goal", "of_interest", "expected"),
    [
        ([["on", "bowl_1", "plate_1"]], [], {"bowl_1": "target", "plate_1": "destination"}),
        # A region belongs to the instance with the longest name that it begins with.
        ([["in", "bowl_10", "cabinet_1_top_region"]], [], {"bowl_10": "target", "cabinet_1": "destination"}),
        ([["open", "cabinet_1_middle_region"]], [], {"cabinet_1": "target"}),
        ([["turnon", "stove_1"]], [], {"stove_1": "target"}),
        # What is only opened or closed on the way is where something goes.
        (
            [["close", "cabinet_1_region"], ["in", "bowl_1", "cabinet_1_region"]],
            [],
            {"bowl_1": "target", "cabinet_1": "destination"},
        ),
        # The table's regions are no instance.
        ([["on", "plate_1", "table_stove_front_region"]], [], {"plate_1": "target"}),
        # A stack: what is moved is a target, also where something comes on top.
        (
            [["on", "bowl_1", "plate_1"], ["on", "plate_1", "stove_1_cook_region"]],
            [],
            {"bowl_1": "target", "plate_1": "target", "stove_1": "destination"},
        ),
        ([], ["bowl_1", "plate_1"], {"bowl_1": "target", "plate_1": "destination"}),
        ([], ["bowl_1"], {"bowl_1": "target"}),
        ([], [], {}),
    ],
)
def test_roles_follow_the_goal(libero_ready, goal, of_interest, expected):
    from lerobot_attn.plugin.libero_env import roles_of

    roles = roles_of(NAMES, {"Panda0"}, FIXTURES, goal, of_interest)
    others = {name: "background" if name in FIXTURES else "distractor" for name in NAMES}
    assert roles == others | OTHERS | expected


def test_every_task_of_libero_has_a_target(libero_ready):
    from pathlib import Path

    from libero.libero import get_libero_path
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    from lerobot_attn.plugin.libero_env import roles_of

    files = sorted(Path(get_libero_path("bddl_files")).rglob("libero_[sogl1]*/*.bddl"))
    assert len(files) >= 40
    for file in files:
        problem = robosuite_parse_problem(str(file))
        fixtures = {name for group in problem["fixtures"].values() for name in group}
        objects = {name for group in problem["objects"].values() for name in group}
        names = ["background", *sorted(objects | fixtures)]
        roles = roles_of(names, (), fixtures, problem["goal_state"], problem["obj_of_interest"])
        named = {name for name, role in roles.items() if role in ("target", "destination")}
        assert "target" in roles.values(), file.name
        # Of the objects of interest all have a part, and hardly anything else has.
        of_interest = {
            name
            for name in names
            for place in problem["obj_of_interest"]
            if f"{place}_".startswith(f"{name}_")
        }
        assert of_interest <= named, file.name


def test_masks_of_a_robosuite_environment_are_of_the_pictures_moment(libero_ready):
    """Not LIBERO: any environment of robosuite's. Projecting positions tells where a mask must lie."""
    import mujoco
    import robosuite

    from lerobot_attn.plugin.mujoco_scene import RobosuiteScene

    env = robosuite.make(
        "Lift",
        robots="Panda",
        has_renderer=False,
        has_offscreen_renderer=True,
        use_camera_obs=True,
        camera_names=["frontview", "robot0_eye_in_hand"],
        camera_heights=96,
        camera_widths=128,
    )
    try:
        env.reset()
        scene = RobosuiteScene(env)
        state = np.random.get_state()[1].copy()
        rng = np.random.default_rng(0)
        for _ in range(3):
            scene.watch()
            before = env.sim.render
            scene.watch()
            assert env.sim.render is before  # once is enough
            observation, *_ = env.step(rng.uniform(-1, 1, env.action_dim))
        simulated = env.sim.get_state().flatten()
        env.sim.forward()  # as LIBERO's check of success does: now the arm is where the step ended
        cameras = {"front": "frontview", "wrist": "robot0_eye_in_hand"}
        masks, positions = scene.masks(cameras, (96, 128)), scene.positions("frontview")
        np.testing.assert_array_equal(env.sim.get_state().flatten(), simulated)
        np.testing.assert_array_equal(np.random.get_state()[1], state)
        names = scene.names
        assert names[:2] == ("background", "cube")
        assert {"PandaGripper0"} < set(scene.robots) < set(names)
        assert masks["front"].dtype == np.int16
        assert set(np.unique(masks["front"])) >= {0, names.index("cube"), names.index("PandaGripper0")}
        # The scene that is drawn is that of the picture; the simulation has moved on since.
        picture = scene._pictures["frontview"]
        kept, now = (_rgb(env, mujoco, s) for s in (picture.scene, None))
        np.testing.assert_array_equal(kept, observation["frontview_image"])
        assert not np.array_equal(now, kept)
        # The cube's place, projected by the camera's pose: rows count from the bottom.
        model, data = env.sim.model._model, env.sim.data._data
        camera = model.camera("frontview").id
        focal = 96 / 2 / np.tan(np.deg2rad(model.cam_fovy[camera]) / 2)
        x, y, z = data.cam_xmat[camera].reshape(3, 3).T @ (positions[1] - data.cam_xpos[camera])
        row, column = int(48 + focal * y / -z), int(64 + focal * x / -z)
        assert masks["front"][row, column] == 1
        rows, columns = np.nonzero(masks["front"] == 1)
        assert (rows.mean(), columns.mean()) == pytest.approx((row, column), abs=2)
        # Markers that no picture shows are in no mask: they are the same without any.
        groups = env.sim._render_context_offscreen.vopt.sitegroup
        both = []
        for shown in (groups.copy(), 0):
            groups[:] = shown
            for camera in cameras.values():
                env.sim.render(camera_name=camera, height=96, width=128)
            both.append(scene.masks(cameras, (96, 128)))
        for name in cameras:
            np.testing.assert_array_equal(both[0][name], both[1][name])
        # A reset brings a new simulation, whose masks need no picture yet.
        env.reset()
        assert (scene.masks(cameras, (96, 128))["front"] == 1).any()
    finally:
        env.close()


def _rgb(env, mujoco, scene):
    """Draw a scene in colours; None: the present one."""
    if scene is None:
        return env.sim.render(camera_name="frontview", height=96, width=128)
    for flag in (mujoco.mjtRndFlag.mjRND_SEGMENT, mujoco.mjtRndFlag.mjRND_IDCOLOR):
        scene.flags[flag] = 0
    viewport, context = mujoco.MjrRect(0, 0, 128, 96), env.sim._render_context_offscreen.con
    mujoco.mjr_render(viewport, scene, context)
    pixels = np.empty((96, 128, 3), np.uint8)
    mujoco.mjr_readPixels(pixels, None, viewport, context)
    return pixels
