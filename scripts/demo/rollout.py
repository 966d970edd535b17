"""Let a checkpoint of the demo policy act in a scene, through LeRobot's own policy and processors.

Cameras are rendered when the policy looks, not at every step as LeRobot's evaluation does: the same actions
in a third of the time.
"""

from __future__ import annotations

import contextlib
import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scene import Scene, instruction

Array = NDArray[Any]


def load(checkpoint: Path) -> tuple[Any, Any, Any]:
    """Return the policy of a checkpoint folder, its pre- and its postprocessor."""
    from lerobot.policies.factory import make_pre_post_processors

    from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy

    with contextlib.redirect_stdout(io.StringIO()):  # LeRobot prints what it loads
        policy = PI05TinyPolicy.from_pretrained(checkpoint).eval()
    return policy, *make_pre_post_processors(policy.config, pretrained_path=str(checkpoint))


def observation(images: Array, state: Array, name: str) -> dict[str, Any]:
    """Return what LeRobot hands the preprocessor.

    Args:
        images: (2, px, px, 3) uint8, agent view and wrist.
        state: (8,) float32.
        name: of the object that is named.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return {
        "observation.images.image": pixels[:1],
        "observation.images.image2": pixels[1:],
        "observation.state": torch.from_numpy(state)[None],
        "task": [instruction(name)],
    }


class PolicyActor:
    """A policy, its processors, and the actions of its last chunk that are still to be done."""

    def __init__(self, checkpoint: Path):
        """Load a checkpoint folder."""
        self._policy, self._before, self._after = load(checkpoint)
        self._waiting: list[Array] = []

    @classmethod
    def of(cls, checkpoint: Path) -> PolicyActor:
        """Return the policy of a checkpoint, loaded once in a process."""
        return _loaded(checkpoint)

    def begin(self) -> None:
        """Forget the last chunk: an episode begins, or another object is named."""
        self._waiting.clear()

    @torch.no_grad()
    def act(self, scene: Scene, name: str) -> Array:
        """Return the next action, (7,), when an object is named; looks at the scene if a new chunk is due."""
        if not self._waiting:
            seen = observation(scene.images(), scene.state(), name)
            chunk = self._policy.predict_action_chunk(self._before(seen))
            actions = self._after(chunk[0, : self._policy.config.n_action_steps])
            self._waiting = list(actions.float().numpy())
        return self._waiting.pop(0)

    def disturb(self, scene: Scene, target: str, rng: np.random.Generator) -> int:
        """Let the policy act for a while, to see what it gets itself into; return the steps."""
        self.begin()
        n = int(rng.integers(10, 60))
        torch.manual_seed(int(rng.integers(2**31)))
        for step in range(n):
            scene.step(self.act(scene, target))
            if scene.in_basket(target):
                return step + 1
        return n


@cache
def _loaded(checkpoint: Path) -> PolicyActor:
    torch.set_num_threads(1)
    return PolicyActor(checkpoint)
