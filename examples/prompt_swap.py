"""The same scene, another word: does the policy look, and go, elsewhere when another object is named?

    lerobot-attn demo-policy demo
    python examples/prompt_swap.py demo out
    lerobot-attn compare out/attention/loop_0/episode_0000{0,1}.zarr -o report

LIBERO's first scene of libero_object, each time from the same initial state; only the instruction differs.
Needs LIBERO (`bash scripts/setup.sh eval`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lerobot.envs.configs import LiberoEnv
from lerobot.envs.factory import make_env, make_env_pre_post_processors
from lerobot.envs.utils import preprocess_observation
from lerobot.policies.factory import make_pre_post_processors

from lerobot_attn import AttentionConfig, record_episodes
from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy

NAMES = ("alphabet soup", "milk", "tomato sauce", "salad dressing")  # all of them stand in this scene
N_FRAMES = 100


def main(checkpoint: str, folder: Path) -> None:
    """Record an episode for each name into `folder`."""
    settings = LiberoEnv(task="libero_object", task_ids=[0])
    policy = PI05TinyPolicy.from_pretrained(checkpoint)
    preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path=checkpoint)
    env_preprocess, _ = make_env_pre_post_processors(settings, policy.config)
    config = AttentionConfig(layers="all", existing="overwrite")
    fps = settings.fps
    with record_episodes(policy, folder, config, fps=fps, preprocessor=preprocess) as recording:
        for name in NAMES:
            # A new environment begins with the first initial state.
            env = make_env(settings)["libero_object"][0]
            instruction = f"pick up the {name} and place it in the basket"
            with recording.episode(task=instruction) as episode:
                policy.reset()
                torch.manual_seed(0)
                pixels, _ = env.reset(seed=[0])
                for _ in range(N_FRAMES):
                    observation = env_preprocess({**preprocess_observation(pixels), "task": [instruction]})
                    with torch.inference_mode():
                        action = postprocess(policy.select_action(preprocess(observation)))
                    episode.step(observation, action)
                    pixels, _, terminated, _, _ = env.step(action.numpy())
                    if terminated.any():  # the scene's own task is solved: its object lies in the basket
                        episode.success = True
                        break
            env.close()
    for result in recording.results:
        print(result.path)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
