"""Make the demo policy's training frames in LIBERO's simulator.

No frame shows one of LIBERO's initial layouts.

Two kinds. "approach": every frame is a new random layout and a pose of the arm that was really reached; the
teacher imagines its next actions for every object in sight. "episode": the teacher fetches an object in the
simulator, is disturbed every now and then, and what it then really does are the labels.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from expert import CHUNK, GRIPS, HOVER, OPENED, Moment, Stage, act, holds, imagine
from frames import write_shard
from numpy.typing import NDArray
from scene import BASKET, OBJECTS, Scene, is_place, random_place, random_places, scene_of

Array = NDArray[Any]

RENDER_PX, IMAGE_PX = 360, 224  # LeRobot renders the one, the policy shrinks it to the other

# butter and cream cheese are smaller than a patch of the agent view: seen in training, never asked for.
NAMED = tuple(name for name in OBJECTS if name not in ("butter", "cream_cheese"))

QUIET = (26, 40)  # steps between disturbances: long enough for labels
SHORTEST_LABEL = 14  # actions; a policy carries out ten of them
MOST_STEPS = 320
HIGHER = 0.07  # metres by which the teacher lifts higher, where it lifts low or high at random


@dataclass(frozen=True)
class Job:
    """One shard.

    Attributes:
        kind: "approach" or "episode".
        task: number of the task whose scene it shows.
        index: number of the shard among those of its kind and task.
        n: frames.
        seed: of the whole data.
        folder: where shards go.
        poses: of the arm, from which frames of the kind "approach" draw.
        lifts: whether the teacher lifts high in a random half of the episodes.
        disturber: a checkpoint whose policy acts between the teacher's stretches; None for random
            disturbances.
    """

    kind: str
    task: int
    index: int
    n: int
    seed: int
    folder: Path
    poses: int = 4000
    lifts: bool = False
    disturber: Path | None = None

    @property
    def path(self) -> Path:
        """Where the shard lies."""
        return self.folder / f"{self.kind}-task{self.task}-{self.index:03d}.npz"

    @property
    def rng(self) -> np.random.Generator:
        """Chance of this shard alone: the same whichever process makes it, and when."""
        kind = sum(map(ord, self.kind))
        return np.random.default_rng([self.seed, kind, self.task, self.index])


def jobs_for(
    kind: str, frames: int, shard: int, tasks: Sequence[int], seed: int, folder: Path, **settings: Any
) -> list[Job]:
    """Return the jobs that make about `frames` frames of a kind, spread evenly over tasks' scenes.

    Args:
        kind: "approach" or "episode".
        frames: how many in all.
        shard: how many in one file.
        tasks: whose scenes.
        seed: of chance.
        folder: where to.
        **settings: other fields of `Job`.
    """
    per_task = max(1, round(frames / len(tasks) / shard))
    return [
        Job(kind, task, index, shard, seed, folder, **settings) for index in range(per_task) for task in tasks
    ]


def generate(jobs: list[Job], processes: int, progress: Callable[[int], object]) -> None:
    """Make the shards that are not there yet.

    Args:
        jobs: which shards.
        processes: how many simulators run at once.
        progress: called with the number of frames that are there, after each shard.
    """
    missing = [job for job in jobs if not job.path.exists()]
    progress(sum(job.n for job in jobs) - sum(job.n for job in missing))
    if not missing:
        return
    # A scene takes seconds to build: jobs of one task follow one another, in as many lines as processes.
    missing.sort(key=lambda job: (job.task, job.kind, job.index))
    context = multiprocessing.get_context("spawn")  # a rendering context does not survive a fork
    with context.Pool(min(processes, len(missing)), maxtasksperchild=None) as pool:
        for n in pool.imap_unordered(_make, missing):
            progress(n)


def _make(job: Job) -> int:
    """Make one shard in a worker process; return its number of frames."""
    scene = scene_of(job.task, RENDER_PX)
    frames = approach_frames(scene, job) if job.kind == "approach" else episode_frames(scene, job)
    write_shard(job.path, frames)
    return job.n


def picture(scene: Scene) -> dict[str, Any]:
    """Return what every frame holds of the scene as it is now: images, patches, state and positions."""
    positions = np.full((len(OBJECTS) + 1, 3), np.nan)
    for name in scene.names:
        positions[OBJECTS.index(name)] = scene.position(name)
    positions[-1] = scene.position(BASKET)
    return {
        "images": shrink(scene.images()),
        "patches": scene.patches(),
        "state": scene.state(),
        "positions": positions,
    }


def shrink(images: Array) -> Array:
    """Return images (n, 360, 360, 3) uint8 at the policy's size, shrunk as LeRobot's Pi0.5 does."""
    import torch
    from lerobot.policies.pi05.modeling_pi05 import resize_with_pad_torch

    torch.set_num_threads(1)
    small = resize_with_pad_torch(
        torch.from_numpy(np.ascontiguousarray(images)).float() / 255, IMAGE_PX, IMAGE_PX
    )
    return (small * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def moment(scene: Scene, name: str) -> Moment:
    """Return what the teacher knows when it is to fetch an object."""
    return Moment(scene.hand, scene.opening, scene.position(name), scene.rest[name], scene.position(BASKET))


def imagined(scene: Scene, velocity: Array, lift: float = 0.0) -> tuple[Array, Array]:
    """Return the teacher's next actions, (10, 50, 7), for every object, and how many are known, (10,)."""
    actions, known = np.zeros((len(OBJECTS), CHUNK, 7)), np.zeros(len(OBJECTS), int)
    for name in scene.names:
        if name in NAMED:
            number = OBJECTS.index(name)
            actions[number] = imagine(moment(scene, name), GRIPS[name], velocity=velocity, lift=lift)
            known[number] = CHUNK
    return actions, known


def approach_frames(scene: Scene, job: Job) -> list[dict[str, Any]]:
    """Return frames of new layouts with the arm somewhere on its way to an object, the hand empty."""
    rng = job.rng
    poses = _poses(scene, job.poses)
    frames: list[dict[str, Any]] = []
    scene.reset()
    while len(frames) < job.n:
        target = scene.names[rng.integers(len(scene.names))]
        arm, hand = _draw(poses, rng)
        place = _place_near(hand, target, rng)
        if place is None:
            continue
        if rng.random() < 0.1:  # fingers that are half closed: a grasp that failed
            arm = arm.copy()
            arm[7], arm[8] = (opening := rng.uniform(0.0, OPENED)) / 2, -opening / 2
        scene.put(random_places(scene.names, rng, {target: place}), arm=arm, upright=True)
        if scene.touching():
            continue
        actions, known = imagined(scene, np.zeros(3), _lift(job, rng))
        frames.append(
            picture(scene)
            | {
                "actions": actions,
                "known": known,
                "stage": Stage.APPROACH,
                "target": OBJECTS.index(target),
            }
        )
    return frames


def _draw(poses: tuple[Array, Array], rng: np.random.Generator) -> tuple[Array, Array]:
    """Return one pose of the arm, (9,), and where the hand is in it, (3,)."""
    index = rng.integers(len(poses[0]))
    return poses[0][index], poses[1][index]


def _place_near(hand: Array, target: str, rng: np.random.Generator) -> Array | None:
    """Return a place for the target, mostly such that the hand is on its way to it; None if none fits."""
    above = hand[2] - GRIPS[target].height
    if rng.random() < 0.65:
        if above < -0.01:
            return None
        spread = 0.015 if above < HOVER else 0.06
        away, angle = 0.006 + abs(rng.normal()) * spread, rng.uniform(0, 2 * np.pi)
        place: Array = hand[:2] + away * np.array([np.cos(angle), np.sin(angle)])
        return place if is_place(place) else None
    return random_place(rng)


_kept_poses: list[tuple[Array, Array]] = []


def _poses(scene: Scene, n: int) -> tuple[Array, Array]:
    """Return poses of the arm that were reached, fingers open, (n, 9), and the hand's positions, (n, 3)."""
    if not _kept_poses:
        rng = np.random.default_rng(0)
        scene.reset(0, {name: np.array([-2.0 - 0.3 * i, 2.0]) for i, name in enumerate(scene.names)})
        arms: list[Array] = []
        hands: list[Array] = []
        goal = scene.hand
        while len(arms) < n:
            if rng.random() < 0.04 or np.linalg.norm(goal - scene.hand) < 0.01:
                goal = _somewhere(rng)
            move = (goal - scene.hand) * 10 + rng.normal(size=3) * 0.1
            scene.step(np.array([*(move / max(1.0, np.abs(move).max())), 0, 0, 0, -1]))
            arms.append(scene.arm)
            hands.append(scene.hand)
        _kept_poses.append((np.array(arms), np.array(hands)))
    return _kept_poses[0]


def _somewhere(rng: np.random.Generator) -> Array:
    """Return a position for the hand: mostly low over the floor, sometimes high, also over the basket."""
    if rng.random() < 0.15:
        return np.array([rng.uniform(-0.1, 0.1), rng.uniform(0.05, 0.28), rng.uniform(0.24, 0.32)])
    height = rng.uniform(0.01, 0.15) if rng.random() < 0.55 else rng.uniform(0.1, 0.3)
    x, y = random_place(rng)
    return np.array([x, y, height])


def episode_frames(scene: Scene, job: Job) -> list[dict[str, Any]]:
    """Return frames of the teacher at work in the simulator, with what it did next as labels."""
    rng = job.rng
    frames: list[dict[str, Any]] = []
    while len(frames) < job.n:
        frames += _episode(scene, rng, _disturber(job), _lift(job, rng))
    return [frames[index] for index in sorted(rng.permutation(len(frames))[: job.n])]


def _lift(job: Job, rng: np.random.Generator) -> float:
    """Return by how much higher than needed the teacher lifts, metres."""
    return HIGHER if job.lifts and rng.random() < 0.5 else 0.0


def _episode(scene: Scene, rng: np.random.Generator, disturb: Disturber, lift: float) -> list[dict[str, Any]]:
    """Let the teacher fetch one random object, disturbed in between; return the frames with labels.

    An episode that does not end with the object in the basket gives the frames of its way to the object only.
    """
    names = [name for name in scene.names if name in NAMED]
    target = names[rng.integers(len(names))]
    scene.reset(0, random_places(scene.names, rng))
    recorder = _Recorder(scene, target, lift)
    steps = 0
    if rng.random() < 0.5:
        steps += disturb(scene, target, rng)
    while steps < MOST_STEPS:
        for index in range(rng.integers(*QUIET)):
            recorder.look(rng, first=index == 0)
            recorder.step()
            steps += 1
            if scene.in_basket(target):
                recorder.finish()
                return recorder.frames
        recorder.end_stretch()
        steps += disturb(scene, target, rng)
    return [frame for frame in recorder.frames if frame["stage"] == Stage.APPROACH]


class _Recorder:
    """Steps the teacher and keeps frames, whose labels are what the teacher does afterwards."""

    def __init__(self, scene: Scene, target: str, lift: float):
        self.frames: list[dict[str, Any]] = []
        self._scene, self._target, self._lift = scene, target, lift
        self._number = OBJECTS.index(target)
        self._actions: list[Array] = []  # of the present stretch
        self._waiting: list[tuple[int, dict[str, Any]]] = []  # frames without labels, and their places in it
        self._hand = scene.hand

    def look(self, rng: np.random.Generator, *, first: bool) -> None:
        """Keep the present moment, by chance: more often the farther the teacher is with the object."""
        scene, target = self._scene, self._target
        velocity, self._hand = (np.zeros(3) if first else scene.hand - self._hand), scene.hand
        now, grip = moment(scene, target), GRIPS[target]
        _, stage = act(now, grip)
        if rng.random() > _RENDERED[stage]:
            return
        actions: Array = np.zeros((len(OBJECTS), CHUNK, 7))
        known: Array = np.zeros(len(OBJECTS), int)
        if stage == Stage.APPROACH:
            actions, known = imagined(scene, velocity, self._lift)
        labels = {"actions": actions, "known": known, "stage": stage, "target": self._number}
        self._waiting.append((len(self._actions), picture(scene) | labels))

    def step(self) -> None:
        """Let the teacher act once."""
        action, _ = act(moment(self._scene, self._target), GRIPS[self._target], lift=self._lift)
        self._actions.append(action)
        self._scene.step(action)

    def end_stretch(self) -> None:
        """Label the frames of the stretch with the actions that followed; those with too few are dropped."""
        for place, frame in self._waiting:
            followed = self._actions[place : place + CHUNK]
            if len(followed) >= SHORTEST_LABEL:
                frame["actions"][self._number, : len(followed)] = followed
                frame["known"][self._number] = len(followed)
                self.frames.append(frame)
        self._actions, self._waiting = [], []

    def finish(self) -> None:
        """Label the last frames: the object is in the basket, the teacher lets go of it and leaves."""
        for _ in range(SHORTEST_LABEL):
            self.step()
        self.end_stretch()


# Share of the moments of a stage that become frames.
_RENDERED = {
    Stage.APPROACH: 0.05,
    Stage.GRASP: 0.30,
    Stage.LIFT: 0.25,
    Stage.CARRY: 0.25,
    Stage.LOWER: 0.30,
    Stage.LEAVE: 0.1,
}

Disturber = Callable[[Scene, str, np.random.Generator], int]


def _disturber(job: Job) -> Disturber:
    """Return what acts between the teacher's stretches: (scene, target, rng) → steps taken."""
    if job.disturber is None:
        return disturb_at_random
    from rollout import PolicyActor  # torch, and a checkpoint

    return PolicyActor.of(job.disturber).disturb


def disturb_at_random(scene: Scene, target: str, rng: np.random.Generator) -> int:
    """Push the hand somewhere, or open the fingers, for some steps; return how many."""
    held = holds(moment(scene, target), GRIPS[target])
    n = int(rng.integers(3, 12))
    push = rng.normal(size=3) * 0.6
    kind = rng.random()
    other = scene.names[rng.integers(len(scene.names))]
    for _ in range(n):
        now = moment(scene, target)
        action, _ = act(now, GRIPS[target])
        if held and kind < 0.12:
            action[6] = -1.0  # drop it
        elif not held and kind < 0.4:  # a detour towards another object
            action, _ = act(moment(scene, other), GRIPS[other])
            action[6] = -1.0
        elif kind < 0.8:
            action[:3] = np.clip(action[:3] + push, -1, 1)
        else:
            action[:3] = np.clip(action[:3] + rng.normal(size=3) * 0.5, -1, 1)
        scene.step(action)
    return n
