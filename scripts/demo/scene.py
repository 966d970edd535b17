"""One scene of LIBERO's libero_object suite as the demo policy's training needs it: poses, pictures, labels.

The simulator is LIBERO's own, at its own speed and with its own controller. Differences from LeRobot's
environment: objects can be put anywhere, cameras are rendered only when asked for, and the segmentation of
each camera is at hand. Knows nothing of policies or of how to act.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.errors import SetupError

SUITE = "libero_object"
CAMERAS = ("agentview", "robot0_eye_in_hand")  # in the order in which LeRobot hands them to the policy
STILL = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # LeRobot's own waiting action: fingers open
N_STEPS_STILL = 10  # steps of it that LeRobot waits after a reset

# Everything that a patch can show. An object's number here is its number in all of the training data.
OBJECTS = (
    "alphabet_soup",
    "cream_cheese",
    "salad_dressing",
    "bbq_sauce",
    "ketchup",
    "tomato_sauce",
    "butter",
    "milk",
    "chocolate_pudding",
    "orange_juice",
)
BASKET = "basket"
CLASSES = ("background", *OBJECTS, BASKET, "robot")
PATCHES = 16  # patches of a camera, along each side

# Where objects may stand: the floor in front of the robot that both cameras see, metres.
FLOOR_X, FLOOR_Y = (-0.24, 0.19), (-0.29, 0.10)
BASKET_X, BASKET_Y = (-0.015, 0.02), (0.245, 0.275)
BESIDE_BASKET = (-0.11, 0.055)  # beyond both, the hand over an object would hit the basket
ROBOT, REACH = (-0.66, 0.0), 0.815  # where the arm stands; farther away it is stretched and cannot lift
APART = 0.10  # least distance between two objects' centres

Array = NDArray[Any]


def instruction(name: str) -> str:
    """Return the suite's instruction for an object, e.g. for "alphabet_soup"."""
    return f"pick up the {name.replace('_', ' ')} and place it in the basket"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep what LIBERO and robosuite print on every construction off the standard output."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class Scene:
    """The scene of one task: six objects and the basket, the robot's arm, two cameras.

    Attributes:
        task: the task's number in the suite.
        names: its objects, names of `OBJECTS`; the first is the one that the task names.
        rest: name → height of its centre when it stands on the floor, metres.
        observation: LIBERO's last observation, without pictures.
    """

    def __init__(self, task: int, *, image_px: int = 224):
        """Build the simulation; some seconds.

        Args:
            task: number of the task, 0 to 9.
            image_px: side of the cameras' pictures, pixels.

        Raises:
            SetupError: LIBERO or its assets are missing.
        """
        os.environ.setdefault("MUJOCO_GL", "egl")
        try:
            with silence():
                import torch
                from libero.libero import benchmark, get_libero_path
                from libero.libero.envs import OffScreenRenderEnv

                suite = benchmark.get_benchmark_dict()[SUITE]()
                definition = suite.get_task(task)
                folder = Path(get_libero_path("bddl_files")) / definition.problem_folder
                states = Path(get_libero_path("init_states")) / definition.problem_folder
                self._official = torch.load(states / definition.init_states_file, weights_only=False)
                self._env = OffScreenRenderEnv(
                    bddl_file_name=str(folder / definition.bddl_file),
                    camera_heights=image_px,
                    camera_widths=image_px,
                    hard_reset=False,
                    horizon=1_000_000,
                )
        except (ImportError, OSError, EOFError, ValueError) as error:
            raise SetupError(
                f"cannot build LIBERO's scene of {SUITE} task {task}: got "
                f"{str(error).splitlines()[0]!r}, expected LIBERO with its assets; run "
                "LIBERO_ASSETS=… bash scripts/setup.sh eval"
            ) from error
        self.task, self.image_px = task, image_px
        self._robosuite = self._env.env
        self.sim = self._env.sim
        for observable in self._robosuite._observables.values():
            if observable.modality == "image":  # rendered by `images` alone
                observable.set_enabled(False)
                observable.set_active(False)
        objects = self._robosuite.objects_dict
        named = definition.language.removeprefix("pick up the ").removesuffix(" and place it in the basket")
        first = named.replace(" ", "_")
        others = sorted(name.removesuffix("_1") for name in objects if not name.startswith((BASKET, first)))
        self.names = (first, *others)
        self._joints = {name: objects[f"{name}_1"].joints[0] for name in (*self.names, BASKET)}
        self._class_of_geom = self._classes()
        self.observation: dict[str, Array] = {}
        self.reset()
        self.rest = {name: float(self.position(name)[2]) for name in self.names}
        self._upright = {name: self._pose(name)[2:].copy() for name in self.names}

    def reset(self, official: int = 0, places: Mapping[str, Array] | None = None) -> None:
        """Begin anew from one of LIBERO's initial states, then wait as LeRobot does.

        Args:
            official: number of the initial state.
            places: name or "basket" → (x, y), metres: where these stand instead.
        """
        with silence():
            self._env.reset()
        self.sim.set_state_from_flattened(self._official[official % len(self._official)])
        self.put(places or {})
        for _ in range(N_STEPS_STILL):
            self.step(np.array(STILL))

    def put(self, places: Mapping[str, Array], *, arm: Array | None = None, upright: bool = False) -> None:
        """Put objects at places, and the arm into a pose, without simulating anything.

        Args:
            places: name or "basket" → (x, y), metres.
            arm: the nine joint positions of arm and fingers.
            upright: whether the objects also stand up at rest, whatever they did before.
        """
        if arm is not None:
            self.sim.data.qpos[:9] = arm
            self.sim.data.qvel[:] = 0.0
        for name, place in places.items():
            pose = self._pose(name)
            pose[:2] = place
            if upright and name != BASKET:
                pose[2:] = self._upright[name]
            self.sim.data.set_joint_qpos(self._joints[name], pose)
        self.look()

    def look(self) -> None:
        """Compute what follows from positions that were set by hand, and observe anew."""
        self.sim.forward()
        self._robosuite._post_process()
        self._robosuite._update_observables(force=True)
        self.observation = self._robosuite._get_observations()

    def step(self, action: Array) -> None:
        """Do one action of shape (7,): six of the end effector, and the fingers (-1 open, 1 close)."""
        self.observation, _, _, _ = self._env.step(np.asarray(action, dtype=np.float64))

    def position(self, name: str) -> Array:
        """Return the centre of an object or of the basket, shape (3,), metres."""
        return np.array(self.observation[f"{name}_1_pos"])

    @property
    def hand(self) -> Array:
        """Position of the end effector, between the fingertips, shape (3,), metres."""
        return np.array(self.observation["robot0_eef_pos"])

    @property
    def opening(self) -> float:
        """Distance between the fingers, metres: 0 closed, 0.08 open."""
        left, right = self.observation["robot0_gripper_qpos"]
        return float(left - right)

    @property
    def arm(self) -> Array:
        """The nine joint positions of arm and fingers."""
        return np.array(self.sim.data.qpos[:9])

    def state(self) -> Array:
        """Return the state that LeRobot gives the policy, (8,) float32: position, axis-angle, two fingers."""
        import torch
        from lerobot.processor.env_processor import LiberoProcessorStep

        turn = torch.as_tensor(self.observation["robot0_eef_quat"], dtype=torch.float32)[None]
        axis_angle = LiberoProcessorStep()._quat2axisangle(turn)[0].numpy()
        parts = (self.hand, axis_angle, self.observation["robot0_gripper_qpos"])
        return np.concatenate(parts).astype(np.float32)

    def in_basket(self, name: str) -> bool:
        """Return whether an object is in the basket, by LIBERO's own condition for the task's object."""
        site = self._robosuite.object_sites_dict[f"{BASKET}_1_contain_region"]
        place = self.sim.data.get_site_xpos(site.name)
        turn = self.sim.data.get_site_xmat(site.name)
        return bool(site.in_box(place, turn, self.position(name)))

    def images(self, px: int | None = None) -> Array:
        """Return what the policy sees, (2, px, px, 3) uint8: agent view and wrist, upright as in LeRobot."""
        px = px or self.image_px
        return np.stack(
            [self.sim.render(width=px, height=px, camera_name=name)[::-1, ::-1] for name in CAMERAS]
        )

    def patches(self, px: int = 112) -> Array:
        """Return how much of each patch shows what, uint8 of shape (2, 16, 16, len(CLASSES)); 255 is all.

        Args:
            px: side of the rendered segmentation, a multiple of 16.
        """
        shares = np.empty((len(CAMERAS), PATCHES, PATCHES, len(CLASSES)), np.uint8)
        side = px // PATCHES
        for camera, name in enumerate(CAMERAS):
            seen = self._class_of_geom[self._geoms(name, px)[::-1, ::-1] + 1]
            cells = (
                seen.reshape(PATCHES, side, PATCHES, side).transpose(0, 2, 1, 3).reshape(PATCHES, PATCHES, -1)
            )
            shares[camera] = np.stack(
                [(cells == number).mean(-1) * 255 for number in range(len(CLASSES))], -1
            )
        return shares

    def touching(self) -> bool:
        """Return whether the robot's body lies inside an object or the basket."""
        robot = CLASSES.index("robot")
        data = self.sim.data
        for contact in data.contact[: data.ncon]:
            low, high = sorted(self._class_of_geom[[contact.geom1 + 1, contact.geom2 + 1]])
            if high == robot and 0 < low < robot and contact.dist < -0.001:
                return True
        return False

    def close(self) -> None:
        """Free the simulation and its rendering context."""
        self._env.close()

    def _pose(self, name: str) -> Array:
        """Return (x, y, z, and the quaternion) of an object, shape (7,)."""
        return np.array(self.sim.data.get_joint_qpos(self._joints[name]))

    def _classes(self) -> Array:
        """Return number of a geom + 1 → number of its class; 0, no geom, is background."""
        model = self._robosuite.model
        classes = np.zeros(self.sim.model.ngeom + 1, np.uint8)
        for geom, owner in model.geom_ids_to_instances.items():
            name = owner.removesuffix("_1")
            classes[geom + 1] = CLASSES.index(name if name in CLASSES else "robot")
        return classes

    def _geoms(self, camera: str, px: int) -> Array:
        """Return which geom each pixel shows, (px, px), -1 for none, upside down as rendered.

        robosuite 1.4's own reading of segmentations overflows under NumPy 2 (it multiplies bytes by 256).
        """
        import mujoco

        context = self.sim._render_context_offscreen
        context.render(
            width=px, height=px, camera_id=self.sim.model.camera_name2id(camera), segmentation=True
        )
        colours = np.empty((px, px, 3), np.uint8)
        mujoco.mjr_readPixels(rgb=colours, depth=None, viewport=mujoco.MjrRect(0, 0, px, px), con=context.con)
        numbers = colours.astype(np.int32) @ np.array([1, 256, 65536])
        geoms = np.full(context.scn.ngeom + 1, -1)
        for drawn in context.scn.geoms[: context.scn.ngeom]:
            if drawn.segid != -1 and drawn.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                geoms[drawn.segid + 1] = drawn.objid
        return geoms[np.where(numbers <= context.scn.ngeom, numbers, 0)]


_open: dict[int, Scene] = {}


def scene_of(task: int, image_px: int) -> Scene:
    """Return the task's scene; a process keeps one, for each holds a rendering context."""
    if task not in _open:
        close_scenes()
        _open[task] = Scene(task, image_px=image_px)
    return _open[task]


def close_scenes() -> None:
    """Free the scene that this process keeps, if any."""
    for scene in _open.values():
        scene.close()
    _open.clear()


def is_place(place: Array) -> bool:
    """Return whether an object may stand at (x, y), metres: in sight and within the hand's reach."""
    on_floor = FLOOR_X[0] < place[0] < FLOOR_X[1] and FLOOR_Y[0] < place[1] < FLOOR_Y[1]
    beside_basket = place[0] > BESIDE_BASKET[0] and place[1] > BESIDE_BASKET[1]
    return bool(on_floor and not beside_basket and np.linalg.norm(place - ROBOT) < REACH)


def random_place(rng: np.random.Generator) -> Array:
    """Return a random place (x, y), metres, at which an object may stand."""
    while True:
        place = np.array([rng.uniform(*FLOOR_X), rng.uniform(*FLOOR_Y)])
        if is_place(place):
            return place


def random_places(
    names: tuple[str, ...], rng: np.random.Generator, fixed: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """Return a random layout: (x, y), metres, of each object and the basket, none too close to another.

    Args:
        names: the objects.
        rng: source of chance.
        fixed: places that are given.
    """
    while True:
        places = dict(fixed or {})
        for name in names:
            if name in places:
                continue
            for _ in range(100):
                place = random_place(rng)
                if all(np.linalg.norm(place - other) > APART for other in places.values()):
                    places[name] = place
                    break
        if all(name in places for name in names):
            places[BASKET] = np.array([rng.uniform(*BASKET_X), rng.uniform(*BASKET_Y)])
            return places
