"""Checks of what a policy is told and how it is run: prompt, names, chunk, control, dtype.

Pure: facts in, one `Check` out.
"""

from __future__ import annotations

import json

from lerobot_attn.errors import FAILED, OK, SKIPPED, WARNING, Check
from lerobot_attn.plugin.feeding.facts import ACTION, STATE, Facts
from lerobot_attn.plugin.feeding.numbers import reach

_BLIND_S = 2.0  # for longer nobody should act without looking
_LIMITED = 1.5  # of a controller that takes -1 to 1


def check_names(name: str, facts: Facts) -> Check:
    """Have state and action their dimensions in the order of the data set?"""
    world, recorded = facts.world, facts.recorded
    if world is None or recorded is None:
        return Check(name, SKIPPED, "give a data set beside an environment to compare their names")
    permuted: list[str] = []
    other: list[str] = []
    compared: list[str] = []
    for feature, ours, theirs in (
        (STATE, [*world.state_names], [*recorded.state_names]),
        (ACTION, [*world.action_names], [*recorded.action_names]),
    ):
        if not ours or len(ours) != len(theirs):
            continue
        compared.append(feature)
        if ours != theirs:
            said = f"{feature} is {', '.join(ours)}; in the data set {', '.join(theirs)}"
            (permuted if sorted(ours) == sorted(theirs) else other).append(said)
    if permuted:
        remedy = "put the dimensions in the data set's order on their way to the policy"
        return Check(name, FAILED, "; ".join([*permuted, *other]), remedy)
    if other:
        return Check(name, WARNING, "; ".join(other), "see whether they mean the same, in the same order")
    if not compared:
        return Check(name, SKIPPED, f"{world.what} or the data set does not name its dimensions")
    return Check(name, OK, f"{' and '.join(compared)} as in the data set")


def check_prompt(name: str, facts: Facts) -> Check:
    """Does the policy get the instruction, whole?"""
    fed = facts.fed
    if not facts.expected.takes_words:
        return Check(name, SKIPPED, "the policy takes no instruction")
    if fed is None or fed.prompt is None:
        return Check(name, SKIPPED, "no prompt was looked at")
    shown, task = json.dumps(fed.prompt, ensure_ascii=False), fed.task
    if fed.is_cut:
        return Check(
            name,
            FAILED,
            f"its end is cut off, it does not fit the policy's slots: {shown}",
            "shorten the task; more slots (tokenizer_max_length) only if the policy was trained with them",
        )
    if task is not None and not task.strip():
        return Check(name, FAILED, f"no task: {shown}", "give the instruction of training")
    if task is not None and "_" in task and " " not in task.strip():
        remedy = "give the sentence of training instead of a name"
        return Check(name, WARNING, f"the task is a name, no sentence: {shown}", remedy)
    return Check(name, OK, shown)


def check_chunk(name: str, facts: Facts) -> Check:
    """Does the policy look often enough at what its actions do?"""
    n, size = facts.expected.n_action_steps, facts.expected.chunk_size
    if n is None or size is None:
        return Check(name, SKIPPED, "the policy predicts no chunks")
    if not 0 < n <= size:
        return Check(
            name,
            FAILED,
            f"n_action_steps is {n}, expected 1 to {size} (chunk_size)",
            f"--policy.n_action_steps={size}, or fewer",
        )
    detail, fps = f"{n} of {size} actions are executed", _fps(facts)
    if fps is None:
        return Check(name, OK, detail)
    detail += f", {n / fps:.2g} s at {fps:g} a second"
    if n / fps > _BLIND_S:
        remedy = f"try fewer, e.g. --policy.n_action_steps={max(1, int(fps / 2))}"
        return Check(name, WARNING, f"{detail}, without looking", remedy)
    return Check(name, OK, detail)


def check_control(name: str, facts: Facts) -> Check:
    """Do actions mean what they meant in training, and are there as many a second?"""
    world, recorded, expected = facts.world, facts.recorded, facts.expected
    if world is None:
        return Check(name, SKIPPED, "no environment was looked at")
    if world.action_dim and expected.action_dim and world.action_dim > expected.action_dim:
        return Check(
            name,
            FAILED,
            f"{world.what} takes {world.action_dim} numbers, the policy's actions have {expected.action_dim}",
            "use a policy that was trained for this robot",
        )
    furthest, mode = reach(facts), world.control_mode
    if mode == "relative" and furthest is not None and furthest > _LIMITED:
        return Check(
            name,
            FAILED,
            f"{world.what} takes relative actions, -1 to 1; the policy's went to {furthest:.3g} in training",
            "--env.control_mode=absolute, if the policy was trained on absolute actions",
        )
    if mode == "absolute" and furthest is not None and furthest <= 1.0:
        return Check(
            name,
            WARNING,
            f"{world.what} takes absolute actions; the policy's were within -1 to 1, as relative ones are",
            "--env.control_mode=relative, if the policy was trained on relative actions",
        )
    if recorded is not None and recorded.fps and world.fps and abs(recorded.fps / world.fps - 1) > 0.1:
        return Check(
            name,
            WARNING,
            f"{world.what} takes {world.fps:g} actions a second, the data set has {recorded.fps:g}",
            f"--env.fps={recorded.fps:g}, unless the data set was thinned out or says it wrongly",
        )
    parts = [*([f"{mode} actions"] if mode else []), *([f"{world.fps:g} a second"] if world.fps else [])]
    return Check(name, OK, ", ".join(parts) or f"nothing is known of {world.what}")


def check_precision(name: str, facts: Facts) -> Check:
    """Does the policy compute as it is meant to, where it runs?"""
    expected = facts.expected
    compiled = f"compiled ({expected.compile_mode})" if expected.compile_mode else "not compiled"
    detail = f"{expected.dtype or 'a dtype that the config does not say'} on {expected.device}, {compiled}"
    on_cpu = expected.device.startswith("cpu")
    if expected.dtype in ("float16", "half"):
        remedy = "--policy.dtype=bfloat16 or float32: float16 overflows in large language models"
        return Check(name, WARNING, detail, remedy)
    if on_cpu and expected.dtype == "bfloat16":
        remedy = "--policy.device=cuda, or --policy.dtype=float32 on a CPU"
        return Check(name, WARNING, f"{detail}: slow, and rounded otherwise than on a GPU", remedy)
    if on_cpu and expected.compile_mode:
        return Check(name, WARNING, f"{detail}: takes minutes to compile", "--policy.compile_model=false")
    return Check(name, OK, detail)


def _fps(facts: Facts) -> float | None:
    for source in (facts.world, facts.recorded):
        if source is not None and source.fps:
            return source.fps
    return None
