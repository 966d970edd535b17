"""A LeRobot script's main function with the attention options. Knows no script in particular."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lerobot_attn.errors import LerobotAttnError
from lerobot_attn.plugin.command_line import Options, expand_attention_file

logger = logging.getLogger(__name__)


def with_options(
    original: Callable[..., Any], run: Callable[[Any], Any], config_type: type, options: Options
) -> Callable[..., Any]:
    """Return a main function that parses another config, and says in one line what is wrong with it.

    Args:
        original: the script's own main function.
        run: takes the parsed config.
        config_type: its class.
        options: how they are written on the command line.
    """
    from lerobot.configs import parser

    # The parser reads the config's class from here, and cannot resolve a name.
    run.__annotations__["cfg"] = config_type
    parsed = parser.wrap()(run)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            with _one_line_errors():
                return parsed(*args, **kwargs)
        before = sys.argv
        try:
            with _one_line_errors():
                sys.argv = [before[0], *expand_attention_file(before[1:], options)]
                return parsed()
        finally:
            sys.argv = before

    wrapper.lerobot_attn = True  # type: ignore[attr-defined]
    return wrapper


@contextmanager
def replaced_names(
    namespace: dict[str, Any], wrappers: Mapping[str, Callable[[Any], Callable[..., Any]]]
) -> Iterator[None]:
    """Put wrapped functions into a script while the block runs.

    Args:
        namespace: globals of the script, where its functions look each other up by name.
        wrappers: name of a function → returns what stands in its place, given the function.
    """
    originals = {name: namespace[name] for name in wrappers}
    try:
        namespace.update({name: wrap(originals[name]) for name, wrap in wrappers.items()})
        yield
    finally:
        namespace.update(originals)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, LerobotAttnError):
            cause = cause.__cause__  # the config parser wraps what our settings' checks raise
        if cause is None:
            raise
        logger.debug("", exc_info=True)
        sys.exit(f"error: {cause}")
