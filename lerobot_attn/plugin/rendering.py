"""Cameras that are drawn only at frames at which the policy looks: `--eval.render=inferences`.

Most of a LIBERO step on a CPU is drawing pictures, and a policy that acts in chunks looks at one in
`n_action_steps` of them. What it sees, its actions, rewards and successes are bit for bit what they are
otherwise. In between the newest picture stands, so nothing that shows pictures of every frame is written.

Says when the environments draw, and that the policy looks at no other frame. How an environment leaves
pictures out is its own business (`libero_env.py`); knows no recording.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lerobot_attn.errors import CaptureError, ConfigError, first_line
from lerobot_attn.interventions.experiment import ALWAYS, INFERENCES, RENDER
from lerobot_attn.plugin.command_line import EVAL
from lerobot_attn.plugin.script import replaced_names
from lerobot_attn.plugin.segmentation import LIBERO
from lerobot_attn.policies import adapter_for
from lerobot_attn.policies.taps import replaced_attribute

METHOD = "lerobot_attn_draw"
_OPTION = f"--{EVAL.render}={INFERENCES}"


def draws_at_inferences(cfg: Any, options: Any) -> bool:
    """Return whether cameras are drawn at inferences alone, checked before an environment is built.

    Args:
        cfg: the parsed options of `lerobot-eval`.
        options: those of `--eval`.

    Raises:
        ConfigError: no such choice; the environment cannot do it; or something would show every frame.
    """
    if options.render not in RENDER:
        raise ConfigError(f"--{EVAL.render}: got {options.render!r}, expected {' or '.join(RENDER)}")
    if options.render == ALWAYS:
        return False
    if cfg.env.type not in LIBERO:
        raise ConfigError(
            f"{_OPTION}: got env.type={cfg.env.type}, expected {' or '.join(LIBERO)}, whose cameras can be "
            "left out; leave the option out"
        )
    attention = options.attention
    if options.save_attention_maps and (attention.cameras or attention.view or attention.rerun):
        shows = next(name for name in ("cameras", "view", "rerun") if getattr(attention, name))
        raise ConfigError(
            f"--{EVAL.attention}.{shows}: got {getattr(attention, shows)!r} with {_OPTION}, expected false, "
            "because between two inferences there are no pictures; set it to false, or leave the other out"
        )
    if getattr(options, "recording", False):
        raise ConfigError(
            f"--eval.recording: got true with {_OPTION}, expected false, because a data set has the pictures "
            "of every frame; leave one of the two out"
        )
    return True


def drawing_at_inferences(namespace: dict[str, Any]) -> AbstractContextManager[None]:
    """Wrap the evaluation script's functions: cameras are drawn at inferences alone, and no video is written.

    To be entered last, so that a recording is told of no video either.

    Args:
        namespace: globals of the script, where its functions look each other up by name.
    """
    return replaced_names(namespace, {"run_one": _wrap_run_one, "rollout": _wrap_rollout})


def _wrap_run_one(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def run_one(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments |= {"max_episodes_rendered": 0, "videos_dir": None}
        return original(*bound.args, **bound.kwargs)

    return run_one


def _wrap_rollout(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def rollout(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        adapter = adapter_for(call["policy"])
        policy, predicts = adapter.policy, adapter.predicts
        drawing = _Drawing(call["env"], adapter.describe().n_action_steps)
        with (
            replaced_attribute(call["env"], "step", drawing.step),
            replaced_attribute(policy, predicts, drawing.checked(getattr(policy, predicts))),
        ):
            return original(*args, **kwargs)

    return rollout


class _Drawing:
    """One rollout: tells its environments before each step whether the policy looks at what comes of it.

    Args:
        env: the vector environment, not stepped yet.
        every: frames from one inference to the next.

    Raises:
        ConfigError: the environments cannot leave pictures out.
    """

    def __init__(self, env: Any, every: int):
        self._env, self._every = env, every
        self._step = env.step
        self._frame = 0
        try:
            env.call(METHOD, True)
        except AttributeError as error:
            raise ConfigError(
                f"{_OPTION}: what is evaluated cannot leave pictures out ({first_line(error)}), expected "
                "LeRobot's LIBERO; leave the option out"
            ) from error
        self._draws = True

    def step(self, *args: Any, **kwargs: Any) -> Any:
        looks = (self._frame + 1) % self._every == 0
        if looks != self._draws:
            self._env.call(METHOD, looks)
            self._draws = looks
        self._frame += 1
        return self._step(*args, **kwargs)

    def checked(self, predict: Callable[..., Any]) -> Callable[..., Any]:
        """Return the policy's method that predicts, which refuses a frame whose pictures were left out."""

        @functools.wraps(predict)
        def predict_where_drawn(*args: Any, **kwargs: Any) -> Any:
            if self._frame % self._every:
                raise CaptureError(
                    f"{_OPTION}: the policy looked at frame {self._frame}, whose pictures were not drawn, "
                    f"expected every {self._every} frames (n_action_steps); leave the option out"
                )
            return predict(*args, **kwargs)

        return predict_where_drawn
