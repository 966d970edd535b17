#!/usr/bin/env python
"""Compose an evaluation from configs/ and run it through lerobot-eval, printing the equivalent command.

python scripts/eval.py env=libero_object capture=summary policy.path=CHECKPOINT eval.n_episodes=10
python scripts/eval.py -m env=libero_object,libero_goal capture=last_two policy.path=CHECKPOINT
python scripts/eval.py -m intervention=fixed_noise,no_language env=libero_object policy.path=CHECKPOINT

Fields of LeRobot's config that configs/ does not name are added with a plus, maps and lists too:
+policy.n_action_steps=5 +trust_remote_code=true '+env.camera_name_mapping={agentview_image: front}'
Without attention capture: ~capture.
"""

import sys

try:
    import hydra
    from omegaconf import DictConfig, OmegaConf
except ModuleNotFoundError as error:
    if error.name not in ("hydra", "omegaconf"):
        raise
    sys.exit("error: hydra-core is not installed, scripts/eval.py needs it; pip install '.[eval]' brings it")

from lerobot_attn.errors import LerobotAttnError
from lerobot_attn.plugin.launch import eval_arguments, launch_eval


@hydra.main(version_base="1.3", config_path="../configs", config_name="eval")
def main(config: DictConfig) -> None:
    """Run one composed evaluation."""
    try:
        arguments = eval_arguments(OmegaConf.to_container(config, resolve=True))
    except LerobotAttnError as error:
        sys.exit(f"error: {error}")
    status = launch_eval(arguments)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
