"""The same scene, another word: does the policy look, and go, elsewhere when another object is named?

    lerobot-attn demo-policy demo
    python examples/prompt_swap.py demo out
    lerobot-attn compare out/attention/scene_0/episode_0000{0,1}.zarr -o report

Scenes of LIBERO's object suite; in each, one object after the other is named, from the same initial state and
with the same noise: only the instruction differs. Needs LIBERO (`bash scripts/setup.sh eval`). Afterwards,
examples/walkthrough.ipynb asks where the first look went. Scenes can be chosen: `… demo out 0 3`.
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

# What stands in each scene, by the number of its task; only what the demo policy knows by name.
SCENES = {
    0: ("alphabet soup", "milk", "tomato sauce", "salad dressing"),
    2: ("salad dressing", "ketchup", "alphabet soup", "milk", "tomato sauce"),
    3: ("bbq sauce", "chocolate pudding", "ketchup", "salad dressing", "alphabet soup"),
    4: ("ketchup", "bbq sauce", "salad dressing", "alphabet soup", "milk"),
    5: ("tomato sauce", "milk", "orange juice", "chocolate pudding", "bbq sauce"),
    7: ("milk", "tomato sauce", "orange juice", "chocolate pudding"),
    8: ("chocolate pudding", "orange juice", "bbq sauce", "ketchup", "salad dressing", "alphabet soup"),
    9: ("orange juice", "chocolate pudding", "bbq sauce", "ketchup", "salad dressing"),
}
N_FRAMES = 100
STATE = [f"eef_{name}" for name in ("x", "y", "z", "rx", "ry", "rz")] + ["gripper_left", "gripper_right"]


def main(checkpoint: str, folder: Path, scenes: list[int]) -> None:
    """Record an episode for each name in each scene into `folder`."""
    policy = PI05TinyPolicy.from_pretrained(checkpoint)
    preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path=checkpoint)
    config = AttentionConfig(mean_layers="all", existing="overwrite")
    with record_episodes(
        policy, folder, config, fps=20, preprocessor=preprocess, state_names=STATE
    ) as recording:
        for scene, name in ((number, name) for number in scenes for name in SCENES[number]):
            settings = LiberoEnv(task="libero_object", task_ids=[scene])
            env_preprocess, _ = make_env_pre_post_processors(settings, policy.config)
            # Made anew, it begins with its first initial state.
            env = make_env(settings)["libero_object"][scene]
            instruction = f"pick up the {name} and place it in the basket"
            with recording.episode(task=instruction, group="scene", task_id=scene) as episode:
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
    main(sys.argv[1], Path(sys.argv[2]), [int(number) for number in sys.argv[3:]] or list(SCENES))
