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


class PolicyActor:
    """A policy, its processors, and the actions of its last chunk that are still to be done."""

    def __init__(self, checkpoint: Path):
        """Load a checkpoint folder."""
        from lerobot.policies.factory import make_pre_post_processors

        from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy

        with contextlib.redirect_stdout(io.StringIO()):  # LeRobot prints what it loads
            self._policy = PI05TinyPolicy.from_pretrained(checkpoint)
        self._policy.eval()
        self._before, self._after = make_pre_post_processors(
            self._policy.config, pretrained_path=str(checkpoint)
        )
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
            images = torch.from_numpy(np.ascontiguousarray(scene.images())).permute(0, 3, 1, 2).float() / 255
            observation = {
                "observation.images.image": images[:1],
                "observation.images.image2": images[1:],
                "observation.state": torch.from_numpy(scene.state())[None],
                "task": [instruction(name)],
            }
            chunk = self._policy.predict_action_chunk(self._before(observation))
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
