"""Steps of a training: the optimiser, its schedule, a progress bar, a log, and checkpoints to go on from.

Knows nothing of what is learned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lerobot_attn.errors import SetupError


class Progress:
    """A progress bar, and one line of JSON a report in a file."""

    def __init__(self, name: str, steps: int, first: int, log: Path):
        self._name, self._log = name, log
        self._bar = tqdm(total=steps, initial=first, desc=name, unit="step", dynamic_ncols=True)

    def step(self) -> None:
        """Count one step."""
        self._bar.update()

    def report(self, step: int, **numbers: float) -> None:
        """Show numbers and write them to the log."""
        shown = {name: round(float(number), 4) for name, number in numbers.items()}
        self._bar.set_postfix(shown)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self._name, "step": step, **shown}) + "\n")

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


class Loop:
    """Steps of AdamW under a cosine schedule, with checkpoints from which it goes on.

    Iterating gives (step, chance of this step), from the step after the last checkpoint on.
    """

    EVERY = 250  # steps between reports and checkpoints

    def __init__(
        self,
        name: str,
        modules: list[nn.Module],
        parameters: list[nn.Parameter],
        steps: int,
        rate: float,
        folder: Path,
        seed: int,
    ):
        self._modules, self._parameters = modules, parameters
        self._steps, self._rate, self._seed = steps, rate, seed
        self._optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
        self._path = folder / f"{name}.pt"
        self._next = self._resume()
        self._progress = Progress(name, steps, self._next, folder / "log.jsonl")

    def __iter__(self) -> Iterator[tuple[int, np.random.Generator]]:
        for step in range(self._next, self._steps):
            torch.manual_seed(self._seed * 1_000_003 + step)
            share = step / self._steps
            warm = min(1.0, (share + 1 / self._steps) / 0.05)
            for group in self._optimiser.param_groups:
                group["lr"] = self._rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
            yield step, np.random.default_rng([self._seed, step])
            self._progress.step()
            if (step + 1) % self.EVERY == 0 or step + 1 == self._steps:
                self._save(step + 1)
        self._progress.close()

    def descend(self, loss: Tensor) -> None:
        """Do one step down the loss."""
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimiser.step()
        self._optimiser.zero_grad()

    def reports(self, step: int) -> bool:
        """Return whether a step is one after which a report is due."""
        return (step + 1) % self.EVERY == 0 or step + 1 == self._steps

    def report(self, step: int, **numbers: float) -> None:
        """Show and log numbers."""
        self._progress.report(step + 1, **numbers)

    def _save(self, step: int) -> None:
        content = {
            "step": step,
            "steps": self._steps,
            "modules": [module.state_dict() for module in self._modules],
            "optimiser": self._optimiser.state_dict(),
        }
        unfinished = self._path.with_suffix(".unfinished")
        torch.save(content, unfinished)
        unfinished.replace(self._path)

    def _resume(self) -> int:
        """Load the last checkpoint if there is one; return the number of the next step."""
        if not self._path.exists():
            return 0
        try:
            content = torch.load(self._path, weights_only=True)
            for module, state in zip(self._modules, content["modules"], strict=True):
                module.load_state_dict(state)
            self._optimiser.load_state_dict(content["optimiser"])
        except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
            raise SetupError(
                f"cannot go on from {self._path}: got {str(error).splitlines()[0]}, expected a "
                "checkpoint of this training; delete the file to begin the stage anew"
            ) from error
        if content["steps"] != self._steps:
            raise SetupError(
                f"cannot go on from {self._path}: got a training of {content['steps']} steps, expected "
                f"{self._steps}; delete the file to begin the stage anew"
            )
        return int(content["step"])
