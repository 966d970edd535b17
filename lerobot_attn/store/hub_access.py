"""Asking the Hugging Face Hub: names of data sets, trying again, and what went wrong in one line.

Knows `huggingface_hub`, which is imported when it is used. Knows neither runs nor files.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lerobot_attn.errors import ConfigError, SetupError, StoreError, first_line

_WAITS_S = (1.0, 4.0, 16.0)
_PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}  # HTTP statuses that may be gone in a moment
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def repository(repo: str) -> str:
    """Return the name "user/name" of a data set's repository.

    Raises:
        ConfigError: it is none.
    """
    name = repo.removeprefix("hf://").removeprefix("datasets/")
    if _REPO.fullmatch(name) is None:
        raise ConfigError(f"{repo!r}: no name of a data set on the Hub, expected user/name")
    return name


def parsed(place: str) -> tuple[str, str | None, str]:
    """Return a place's repository, its revision, and the folder in it.

    Raises:
        ConfigError: it is none on the Hub.
    """
    text = re.sub(r"^(?:hf://|https?://[^/]+/)", "", place).removeprefix("datasets/").strip("/")
    user, _, rest = text.partition("/")
    name, _, part = rest.partition("/")
    name, _, revision = name.partition("@")
    if _REPO.fullmatch(f"{user}/{name}") is None or (
        place.startswith("hf://") and "hf://datasets/" not in place
    ):
        raise ConfigError(
            f"{place!r}: no data set on the Hub, expected user/name or hf://datasets/user/name[@revision][/folder]"
        )
    return f"{user}/{name}", revision or None, part


def imported() -> Any:
    """Return the module `huggingface_hub`.

    Raises:
        SetupError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise SetupError(
            "huggingface_hub is not installed; expected it: pip install 'lerobot_policy_attn[hub]'"
        ) from error
    return huggingface_hub


@contextmanager
def bars_off() -> Iterator[None]:
    """Keep the Hub's own progress bars, one a file, from being drawn over ours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was_off = are_progress_bars_disabled()
    if not was_off:
        disable_progress_bars()
    try:
        yield
    finally:
        if not was_off:
            enable_progress_bars()


def tried[Result](call: Callable[[], Result]) -> Result:
    """Call the Hub, up to three times more where what went wrong may be gone in a moment."""
    for wait_s in _WAITS_S:
        try:
            return call()
        except Exception as error:
            if not _may_pass(error):
                raise
        time.sleep(wait_s)
    return call()


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _may_pass(error: Exception) -> bool:
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    return _status(error) in _PASSING or isinstance(
        error, httpx.TransportError | ConnectionError | TimeoutError
    )


@contextmanager
def told(repo: str, so_far: Callable[[], str]) -> Iterator[None]:
    """Say in one line what went wrong with the Hub, and that the same command goes on.

    Raises:
        StoreError: whatever it was.
    """
    import httpx
    from huggingface_hub import errors

    try:
        yield
    except StoreError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise StoreError(f"{repo}: HF_HUB_OFFLINE is set, expected a network; unset it") from error
    except (errors.HFValidationError, errors.LocalTokenNotFoundError) as error:
        raise StoreError(f"{repo}: {first_line(error)}; expected user/name, and `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise StoreError(
            f"{repo}: no such data set or revision on the Hub, or no right to see it ({_status(error)}); log "
            "in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except (errors.HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        status = _status(error)
        if status in (401, 403):
            raise StoreError(
                f"{repo}: the Hub refuses ({status}), expected the right to do this; log in with "
                "`hf auth login`, or set HF_TOKEN, with a token that may write"
            ) from error
        later = "in an hour, for the Hub asks to slow down" if status == 429 else "to go on"
        raise StoreError(
            f"{repo}: the Hub cannot be reached, or failed ({first_line(error)}); {so_far()}, nothing was "
            f"lost; run the same command again {later}"
        ) from error
