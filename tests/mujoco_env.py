"""A small MuJoCo scene as a gymnasium environment: where its box is on each picture can be computed by hand.

A motor turns an arm that touches nothing; the box slides along a rail. Two cameras look straight down from
2 m; the second one sees the world turned by a quarter.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np

HEIGHT, WIDTH = 48, 64
CAMERA_M, FOVY = 2.0, 45.0
BOX_TOP_M = 0.1
FOCAL_PX = HEIGHT / 2 / np.tan(np.radians(FOVY / 2))
SCENE = f"""
<mujoco>
  <option timestep="0.01"/>
  <visual><global offwidth="{WIDTH}" offheight="{HEIGHT}"/></visual>
  <worldbody>
    <light pos="0 0 3"/>
    <geom name="floor" type="plane" size="3 3 .1" rgba=".2 .3 .2 1"/>
    <geom name="line" type="box" pos=".6 .5 0" size=".4 .05 .01" rgba="1 1 1 1"/>
    <site name="goal" pos="-.4 .3 .05" size=".06" rgba="0 1 0 1"/>
    <site name="ghost" pos="-.4 -.3 .05" size=".06" rgba="0 0 1 .2"/>
    <camera name="top" pos="0 0 {CAMERA_M}" fovy="{FOVY}"/>
    <camera name="aside" pos="0 0 {CAMERA_M}" fovy="{FOVY}" euler="0 0 90"/>
    <body name="box" pos=".3 .2 .05">
      <joint name="rail" type="slide" axis="0 -1 0" damping="1"/>
      <geom type="box" size=".1 .1 .05" rgba="1 0 0 1"/>
      <site name="lid" pos="0 0 .05" size=".02" rgba="1 1 0 1"/>
    </body>
    <body pos="-.5 -.3 .1">
      <joint name="shoulder" type="hinge" axis="0 0 1" damping="1"/>
      <geom type="capsule" fromto="0 0 0 .3 0 0" size=".04" rgba=".1 .1 .9 1"/>
      <body pos=".3 0 0"><geom type="sphere" size=".06" rgba=".9 .5 .1 1"/></body>
    </body>
    <body name="post" pos="0 -.5 .1"><geom type="box" size=".05 .05 .1" rgba=".6 .6 .6 1"/></body>
  </worldbody>
  <actuator><motor joint="shoulder" gear="1"/></actuator>
</mujoco>
"""
NAMES = ["background", "box", "body_2", "post"]  # the arm has no name


def box_px(y_m, x_m=0.3):
    """Return (row, column) of the box's middle on the picture of the camera "top"."""
    distance = CAMERA_M - BOX_TOP_M
    row = HEIGHT / 2 - FOCAL_PX * y_m / distance - 0.5
    return row, WIDTH / 2 + FOCAL_PX * x_m / distance - 0.5


class Physics:
    """Hands out its model, data and OpenGL context as dm_control does."""

    def __init__(self, model, data):
        self.model, self.data = SimpleNamespace(ptr=model), SimpleNamespace(ptr=data)
        self._contexts = None

    @property
    def contexts(self):
        if self._contexts is None:
            self._gl = mujoco.GLContext(WIDTH, HEIGHT)
            self._gl.make_current()
            context = mujoco.MjrContext(self.model.ptr, mujoco.mjtFontScale.mjFONTSCALE_150)
            self._contexts = SimpleNamespace(gl=self, mujoco=SimpleNamespace(ptr=context))
        return self._contexts

    @contextlib.contextmanager
    def make_current(self):
        self._gl.make_current()
        yield SimpleNamespace(call=lambda function, *arguments: function(*arguments))


class MujocoEnv(gym.Env):
    """Pulls the box along; ends after `length` steps.

    Args:
        turn: axes of (row, column) along which it flips its pictures.
        camera: the one whose pictures it shows, under the name `key`; None as the name: as "pixels" itself.
        holds: what its simulation hangs on: "model" (its own model and data), "physics" (as dm_control's), or
            "below" (an environment inside).
        late: physics steps that follow after its picture was taken.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012  as gymnasium declares it
    task = task_description = "do as told"
    _max_episode_steps = 1000

    def __init__(self, length=7, *, turn=(), camera="top", key="image", holds="model", late=0, plain=False):
        model = mujoco.MjModel.from_xml_string(SCENE)
        data = mujoco.MjData(model)
        self._simulation = model, data
        if holds == "model":
            self.model, self.data = model, data
        elif holds == "physics":
            self.physics = Physics(model, data)
        elif holds == "below":
            self._env = SimpleNamespace(env=SimpleNamespace(model=model, data=data))
        self._length, self._turn, self._camera, self._key = length, turn, camera, key
        self._late, self._plain = late, plain
        self._renderer = None  # made where pictures are taken: in a worker, if there is one
        box = gym.spaces.Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": box if key is None else gym.spaces.Dict({key: box}),
                "agent_pos": gym.spaces.Box(-np.inf, np.inf, (4,), np.float64),
            }
        )
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)

    @property
    def box_y_m(self):
        return float(self._simulation[1].body("box").xpos[1])

    def _observation(self):
        model, data = self._simulation
        if self._renderer is None:
            self._renderer = mujoco.Renderer(model, HEIGHT, WIDTH)
        self._renderer.update_scene(data, self._camera)
        picture = np.flip(self._renderer.render(), self._turn).copy()
        if self._plain:
            picture[:] = 7
        state = np.concatenate([data.qpos, data.qvel])
        return {"pixels": picture if self._key is None else {self._key: picture}, "agent_pos": state}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        model, data = self._simulation
        self._t = 0
        mujoco.mj_resetData(model, data)
        data.joint("rail").qpos[:] = self.np_random.uniform(0, 0.1)
        data.joint("rail").qvel[:] = 1
        mujoco.mj_forward(model, data)
        return self._observation(), {"is_success": False}

    def step(self, action):
        model, data = self._simulation
        data.ctrl[:] = action[-1]
        mujoco.mj_step(model, data, 5)
        observation = self._observation()
        if self._late:
            mujoco.mj_step(model, data, self._late)
        self._t += 1
        return observation, 0.0, self._t >= self._length, False, {"is_success": False}

    def render(self):
        return self._observation()["pixels"][self._key]

    def close(self):
        if self._renderer is not None:
            self._renderer.close()
