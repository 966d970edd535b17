#!/usr/bin/env python
"""Run an experiment of configs/experiment, one lerobot-eval a condition, as `lerobot-attn experiment` does.

python scripts/experiment.py experiment=prompt_swap policy.path=CHECKPOINT
python scripts/experiment.py experiment=block_target policy.path=CHECKPOINT n_episodes=20 'env.task_ids=[0,3]'
python scripts/experiment.py -m experiment=block_target,occlude_target policy.path=CHECKPOINT

Results go to outputs/experiment/NAME unless output_dir=… says otherwise; the same command goes on where it
was interrupted. Then: lerobot-attn effects outputs/experiment/NAME. Fields that configs/ does not name are
added with a plus: +policy.n_action_steps=5. To see the commands alone: dry_run=true.
"""

import sys
from pathlib import Path

try:
    import hydra
    from omegaconf import DictConfig, OmegaConf
except ModuleNotFoundError as error:
    if error.name not in ("hydra", "omegaconf"):
        raise
    sys.exit(
        "error: hydra-core is not installed, scripts/experiment.py needs it; pip install '.[eval]' brings it"
    )

from lerobot_attn.errors import LerobotAttnError
from lerobot_attn.plugin.experiment import ExperimentPlan, run_experiment


@hydra.main(version_base="1.3", config_path="../configs", config_name="experiment")
def main(config: DictConfig) -> None:
    """Run one composed experiment."""
    values = OmegaConf.to_container(config, resolve=True)
    out, dry_run = Path(values.pop("output_dir")), values.pop("dry_run")
    try:
        plan = ExperimentPlan.from_dict(values, where="the composed plan")
        status = run_experiment(plan, out, dry_run=dry_run, say=lambda line: print(line, flush=True))
    except LerobotAttnError as error:
        sys.exit(f"error: {error}")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
