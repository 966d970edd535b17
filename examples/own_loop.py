"""Record episodes of your own loop, here of the demo policy and made-up observations; then look at them.

    python examples/own_loop.py out
    lerobot-attn view out

The demo policy was trained on LIBERO's pictures: on made-up ones its maps mean nothing. Put your policy and
robot in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.factory import make_pre_post_processors

from lerobot_attn import AttentionConfig, record_episodes
from lerobot_attn.demo.checkpoint import make_demo_checkpoint
from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy

TASK = "pick up the alphabet soup and place it in the basket"
N_FRAMES = 30


def observations(seed: int) -> Iterator[dict[str, Any]]:
    """Yield what a robot with two cameras might see: a square that wanders over a grey picture.

    Pictures are (1, 3, height, width) float32 in [0, 1], the state is (1, 8).
    """
    noise = torch.Generator().manual_seed(seed)
    for frame in range(N_FRAMES):
        pictures = {}
        for camera in ("image", "image2"):
            picture = torch.full((1, 3, 256, 256), 0.4)
            picture[:, seed % 3, 100:150, 4 * frame : 4 * frame + 50] = 0.9
            pictures[f"observation.images.{camera}"] = picture
        state = 0.1 * torch.rand(1, 8, generator=noise)
        yield {**pictures, "observation.state": state, "task": [TASK]}


def main(folder: Path) -> None:
    """Record two episodes into `folder`."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        make_demo_checkpoint(checkpoint)
    policy = PI05TinyPolicy.from_pretrained(checkpoint)
    preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path=str(checkpoint))
    config = AttentionConfig(layers=[-2, -1], existing="overwrite")
    with record_episodes(policy, folder, config, fps=20, preprocessor=preprocess) as recording:
        for seed in range(2):
            with recording.episode(task=TASK, seed=seed) as episode:
                policy.reset()
                for observation in observations(seed):
                    with torch.inference_mode():
                        action = postprocess(policy.select_action(preprocess(observation)))
                    # Here your robot or environment would take the action.
                    episode.step(observation, action)
                episode.success = seed == 0  # where somebody knows
    for result in recording.results:
        print(result.path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out"))
