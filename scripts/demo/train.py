"""Train the demo policy from nothing but LIBERO's assets, in some hours on two cores.

    python scripts/demo/train.py                     # into outputs/demo; goes on where it was interrupted
    python scripts/demo/train.py --config-name heights    # the variant that lifts low or high at random
    python scripts/demo/train.py --config-name miniature folder=DIR   # a minute, to see that it runs
    python scripts/demo/train.py export=true         # and put the weights into the package

Stages: frames, the image encoder on what patches show, actions by flow matching, then frames of what the
policy gets itself into (DAgger, Ross et al. 2011, with the teacher taking over) and more flow matching,
evaluation, export. Settings: configs/demo/train.yaml, any of which can be given as `name=value`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grounding
import hydra
import torch
from evaluate import evaluate, table
from frames import read_shards
from generate import Job, generate, jobs_for
from learn import CloningSettings, Data, Prompts, VisionSettings, prepare, teach_actions, teach_vision
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from lerobot_attn.demo import trained
from lerobot_attn.demo.checkpoint import libero_config, save_policy, statistics
from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy
from lerobot_attn.demo.tokenizer import demo_tokenizer_json, vocab_size
from lerobot_attn.errors import LerobotAttnError


class Training:
    """One training in one folder; each method is a stage that does what is not done yet."""

    def __init__(self, config: DictConfig):
        """Take the settings of configs/demo/train.yaml."""
        self.config = config
        self.folder = Path(config.folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer_json = demo_tokenizer_json()
        settings = trained.settings(config.variant)
        self.policy_config = libero_config(vocab_size(self.tokenizer_json), **settings)
        torch.set_num_threads(config.threads)

    def run(self) -> None:
        """Do all stages."""
        config = self.config
        jobs = [
            *self.jobs("approach", config.frames.approach),
            *self.jobs("episode", config.frames.episode),
        ]
        self.generate("frames", jobs)
        policy = self.taught(self.data(jobs), config.cloning, "cloning")
        for number, round_ in enumerate(config.dagger, start=1):
            checkpoint = self.save(policy, f"checkpoint-{number}")
            jobs += self.jobs("episode", round_.frames, number, disturber=checkpoint)
            self.generate(f"frames of round {number}", jobs)
            policy = self.taught(self.data(jobs), round_.cloning, f"dagger-{number}", policy)
        checkpoint = self.save(policy, "checkpoint")
        self.evaluate(checkpoint)
        if config.export:
            self.export(policy)

    def jobs(self, kind: str, frames: DictConfig, number: int = 0, **settings: Any) -> list[Job]:
        """Return the shards of a kind, those of a later round with other chance and in another folder."""
        folder = self.folder / ("frames" if number == 0 else f"frames-{number}")
        seed = self.config.seed + 7919 * number
        return jobs_for(
            kind,
            frames.frames,
            frames.shard,
            tuple(self.config.frames.tasks),
            seed,
            folder,
            poses=self.config.frames.poses,
            lifts=self.config.lifts,
            **settings,
        )

    def generate(self, name: str, jobs: list[Job]) -> None:
        """Make the frames that are not there yet."""
        with tqdm(total=sum(job.n for job in jobs), desc=name, unit="frame", dynamic_ncols=True) as bar:
            self._timed(name, lambda: generate(jobs, self.config.processes, bar.update))

    def data(self, jobs: list[Job]) -> Data:
        """Return the frames of jobs."""
        return read_shards(job.path for job in jobs)

    def taught(
        self, data: Data, settings: DictConfig, name: str, policy: PI05TinyPolicy | None = None
    ) -> PI05TinyPolicy:
        """Return the policy after learning actions, the image encoder first if there is none yet."""
        config = self.config
        if policy is None:
            policy = PI05TinyPolicy(self.policy_config)
            prepare(policy, data, config.seed)
            vision = VisionSettings(**dict(config.vision))
            self._timed("vision", lambda: teach_vision(policy, data, vision, self.folder, config.seed))
        cloning = CloningSettings(**{str(name): _plain(value) for name, value in settings.items()})
        return self._timed(
            name,
            lambda: teach_actions(policy, data, self.prompts(), cloning, self.folder, config.seed, name=name),
        )

    def prompts(self) -> Prompts:
        """Return Pi0.5's own preprocessor as a function of states and instructions."""
        from lerobot_attn.demo.processor_pi05_tiny import make_pi05_tiny_pre_post_processors

        stats = {
            "observation.state": statistics(trained.STATE_RANGES),
            "action": statistics(trained.ACTION_RANGES),
        }
        before, _ = make_pi05_tiny_pre_post_processors(self.policy_config, stats, self.tokenizer_json)

        def prompts(states: Any, tasks: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
            batch = before({"observation.state": torch.as_tensor(states), "task": tasks})
            mask = batch["observation.language.attention_mask"].bool()
            longest = int(mask.sum(1).max())
            return batch["observation.language.tokens"][:, :longest], mask[:, :longest]

        return prompts

    def save(self, policy: PI05TinyPolicy, name: str) -> Path:
        """Write a checkpoint of the weights as the package would hold them, float16; return its folder."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        rounded = trained.load(trained.shipped(policy), replace(self.policy_config))
        save_policy(folder, rounded, self.tokenizer_json, trained.STATE_RANGES, trained.ACTION_RANGES)
        return folder

    def evaluate(self, checkpoint: Path) -> None:
        """Measure the checkpoint in closed loop and write the table beside it."""
        config = self.config
        settings: Any = OmegaConf.to_container(config.evaluation)
        rows = self._timed(
            "evaluation",
            lambda: evaluate(
                checkpoint,
                settings["official"],
                settings["named"],
                self.folder / "evaluation.jsonl",
                config.processes,
                settings["steps"],
            ),
        )
        found = f"{table(rows)}\n\n{self.grounding(checkpoint)}\n"
        (self.folder / "evaluation.md").write_text(found, encoding="utf-8")
        print(found)

    def grounding(self, checkpoint: Path) -> str:
        """Return where the checkpoint looks, as Markdown."""
        settings = self.config.evaluation.grounding
        n, poses = len(settings.tasks) * settings.frames, min(grounding.POSES, self.config.frames.poses)
        with tqdm(total=n, desc="grounding", unit="frame", dynamic_ncols=True) as bar:
            return grounding.table(
                grounding.grounding(checkpoint, list(settings.tasks), settings.frames, bar.update, poses)
            )

    def export(self, policy: PI05TinyPolicy) -> None:
        """Put the weights and their tokenizer into the package."""
        from safetensors.torch import save_file

        save_file(trained.shipped(policy), trained.WEIGHTS / f"{self.config.variant}.safetensors")
        (trained.WEIGHTS / "tokenizer.json").write_text(self.tokenizer_json, encoding="utf-8")
        shutil.copy(self.folder / "log.jsonl", trained.WEIGHTS / f"{self.config.variant}.log.jsonl")

    def _timed(self, name: str, stage: Any) -> Any:
        """Run a stage and log how long it took."""
        start = time.monotonic()
        result = stage()
        hours = (time.monotonic() - start) / 3600
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": name, "hours": round(hours, 3)}) + "\n")
        return result


def _plain(value: Any) -> Any:
    """Return lists of the settings as tuples."""
    return value if isinstance(value, int | float) else tuple(value)


@hydra.main(version_base="1.3", config_path="../../configs/demo", config_name="train")
def main(config: DictConfig) -> None:
    """Train."""
    try:
        Training(config).run()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on from here")
    except LerobotAttnError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
