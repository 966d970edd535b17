#!/usr/bin/env python
"""Compose an evaluation from configs/ and run it through lerobot-eval, printing the equivalent command.

python scripts/eval.py env=libero_object capture=summary policy.path=CHECKPOINT eval.n_episodes=10
python scripts/eval.py -m env=libero_object,libero_goal capture=last_two policy.path=CHECKPOINT
python scripts/eval.py -m hydra/launcher=submitit_slurm hydra.sweep.dir=out policy.path=CHECKPOINT \
    env=libero_object,libero_goal 'env.task_ids=range(10)' seed=1000,2000
python scripts/eval.py -m intervention=fixed_noise,no_language env=libero_object policy.path=CHECKPOINT

Fields of LeRobot's config that configs/ does not name are added with a plus, maps and lists too:
+policy.n_action_steps=5 +trust_remote_code=true '+env.camera_name_mapping={agentview_image: front}'
Without attention capture: ~capture. Launchers are in configs/hydra/launcher; docs/recipes.md, "A cluster".
"""

import sys
import warnings

try:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf
except ModuleNotFoundError as error:
    if error.name not in ("hydra", "omegaconf"):
        raise
    sys.exit("error: hydra-core is not installed, scripts/eval.py needs it; pip install '.[eval]' brings it")

from lerobot_attn.errors import LerobotAttnError
from lerobot_attn.plugin.launch import check_launcher, eval_arguments, job_settings, launch_eval


@hydra.main(version_base="1.3", config_path="../configs", config_name="eval")
def main(config: DictConfig) -> None:
    """Run one composed evaluation."""
    settings = OmegaConf.to_container(config, resolve=True)
    hydra_config = HydraConfig.get()
    # A launcher's own process or machine, rather than this one.
    is_job = hydra_config.mode == RunMode.MULTIRUN and "basic_launcher" not in hydra_config.launcher._target_
    try:
        arguments = eval_arguments(job_settings(settings) if is_job else settings)
    except LerobotAttnError as error:
        if is_job:
            raise
        sys.exit(f"error: {error}")
    status = launch_eval(arguments)
    if status and is_job:  # an exception is what launchers hand back; the other jobs go on
        raise RuntimeError(
            f"lerobot-eval ended with status {status}; see the log of {settings['output_dir']}"
        )
    if status:
        sys.exit(status)


if __name__ == "__main__":
    try:
        check_launcher(sys.argv[1:])
    except LerobotAttnError as error:
        sys.exit(f"error: {error}")
    # Ours are whole, so they do not depend on what Hydra will stop doing.
    warnings.filterwarnings("ignore", "\\s*'hydra/launcher/.*is validated against ConfigStore schema")
    main()
