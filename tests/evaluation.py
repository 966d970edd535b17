"""LeRobot's own evaluation as the plugin wraps it, without a command line: what tests of recordings call."""

import contextlib
import importlib.util

from lerobot_attn import plugin


def evaluate_all(envs, policy, run=None, *, group="group", first_episode=0, acting=None, wraps=(), **changes):
    """Call `eval_policy_all` over `{task_id: vector environment}`; return LeRobot's summary.

    Args:
        envs: the tasks' environments.
        policy: what acts in them.
        run: a `RunRecorder` that records it; None: nothing is recorded.
        group: the tasks' name.
        first_episode: number of each task's first episode.
        acting: what is done to the policy, if something is.
        wraps: what else wraps the script's functions; each takes its globals and returns a context manager.
        changes: arguments of `eval_policy_all` that are not the usual ones.
    """
    # A fresh copy of the script, whose functions look each other up in its globals.
    spec = importlib.util.find_spec(plugin.EVAL_MODULE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    processors = ("env_preprocessor", "env_postprocessor", "preprocessor", "postprocessor")
    arguments = {
        **dict.fromkeys(processors, lambda value: value),
        "n_episodes": next(iter(envs.values())).num_envs,
        "max_episodes_rendered": 0,
        "videos_dir": None,
        "start_seed": 1000,
        **changes,
    }
    with contextlib.ExitStack() as stack:
        if run is not None:
            how = {"env_type": "scripted", "first_episode": first_episode, "acting": acting}
            stack.enter_context(plugin.recording(vars(module), run, **how))
        for wrap in wraps:
            stack.enter_context(wrap(vars(module)))
        return module.eval_policy_all(envs={group: envs}, policy=policy, **arguments)
