"""Connections to buckets and hosts through obstore, and what their errors mean in one line.

Credentials come from the environment alone. Knows no files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lerobot_attn.errors import SetupError, StoreError, first_line
from lerobot_attn.store.url import Url

EXTRA = "pip install 'lerobot_policy_attn[remote]'"
PATIENCE_S = 20
_CONNECT_S = 5
_ENVIRONMENT = ("AWS_", "GOOGLE_", "AZURE_", "HF_")  # what credentials' names begin with
_MOST_LETTERS = 300
_HOW = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION; AWS_SKIP_SIGNATURE=true for public buckets",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
    "hf": "HF_TOKEN",
}


def credentials() -> tuple[tuple[str, str], ...]:
    """Return what the environment says, so that a store is connected to anew where that has changed."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)))


def connect(root: str, *, patience_s: float = PATIENCE_S, retries: int = 2) -> Any:
    """Return obstore's store of a bucket or host; nothing is asked yet.

    Args:
        root: scheme and bucket or host, "s3://bucket".
        patience_s: how long a request may take, and how long it is tried again.
        retries: how often a request that fails is tried again.

    Raises:
        SetupError: obstore is not installed.
        StoreError: the environment does not say what such a store needs.
    """
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise SetupError(f"{root}: URLs need obstore, which is not installed; {EXTRA}") from error
    said = dict(credentials())
    plain = root.startswith("http://") or any(
        said.get(name, "").startswith("http://") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    )
    options: Mapping[str, Any] = {
        "timeout": timedelta(seconds=patience_s),
        "connect_timeout": timedelta(seconds=_CONNECT_S),
        "allow_http": plain,
    }
    retry: Any = {"max_retries": retries, "retry_timeout": timedelta(seconds=patience_s)}
    try:
        return from_url(root, client_options=options, retry_config=retry)  # type: ignore[call-overload]
    except Exception as error:
        raise StoreError(
            f"{root}: cannot be connected to: {first_line(error)}; expected an address and what it needs in "
            f"the environment ({_HOW.get(root.partition(':')[0], 'nothing')})"
        ) from error


def told(where: Url, error: Exception, action: str = "read") -> StoreError:
    """Return what went wrong at an address in one line, with what helps.

    Args:
        where: the address.
        error: of obstore or fsspec.
        action: what cannot be done there, "read" or "written".
    """
    if isinstance(error, StoreError):
        return error
    kind, text = type(error).__name__, first_line(error)
    text = text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 3]}…"
    refused = kind in ("PermissionDeniedError", "UnauthenticatedError", "GatedRepoError") or any(
        word in text.lower() for word in ("credential", "forbidden", "unauthorized", "accessdenied")
    )
    if refused:
        may = "read it" if action == "read" else "list, read and write it"
        help_ = f"expected credentials in the environment that may {may} ({_HOW.get(where.scheme, 'none')})"
    elif "NotFoundError" in kind or "nosuchbucket" in text.lower():
        help_ = "expected a bucket or data set that is there, with credentials if it is not public"
    else:
        parts = ", and reads of parts of files" if action == "read" else ""
        help_ = f"expected a server that answers{parts}; is the address right?"
    return StoreError(f"{where}: cannot be {action}: {text}; {help_}")
