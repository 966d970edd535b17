"""The lock by which one process alone writes into a folder of stores, and that ends with the process.

Knows files. Knows nothing of stores, or of why a folder is claimed.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lerobot_attn.errors import StoreError

logger = logging.getLogger(__name__)

LOCK = ".lerobot-attn.lock"


@contextmanager
def claim_folder(folder: Path, remedy: str = "wait for it") -> Iterator[None]:
    """Keep others out of a folder while this lasts; a killed process's claim ends with it.

    Args:
        folder: it exists.
        remedy: what to do where it is claimed, for the error.

    Raises:
        StoreError: another process has claimed it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two runs at once are not noticed there
        yield
        return
    with (folder / LOCK).open("a+") as file:
        try:
            # A POSIX lock: the process's own, so environments forked off do not keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"{folder}: another run{_owner(file)} records into it, expected a folder of this "
                f"run's own; {remedy}"
            ) from error
        except OSError as error:  # file systems without locks
            logger.warning("%s cannot be locked (%s): do not start two runs in it", folder, error)
        _sign(file)
        yield


def _sign(file: IO[str]) -> None:
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def _owner(file: IO[str]) -> str:
    file.seek(0)
    text = file.read(200).strip()
    return f" ({text})" if text else ""
