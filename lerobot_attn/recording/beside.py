"""The explorer in a process of its own beside a recording. Knows no store and no page."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_COMMAND = "from lerobot_attn.cli import main; main()"  # of this very Python, wherever it is installed
_NICENESS = 10  # the policy and the loop go first
_GRACE_S = 3.0


@contextmanager
def explorer_beside(folder: Path, wanted: bool) -> Iterator[None]:
    """Serve a recording to the browser while it is made; nobody waits for it, and it may fail alone.

    Args:
        folder: where the stores go.
        wanted: whether to do anything.
    """
    if not wanted:
        yield
        return
    # It does not get Ctrl-C, which is the recording's: it ends with the recording.
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, "view", str(folder), "--wait"],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    with suppress(OSError, AttributeError):  # a system without priorities
        os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
    try:
        yield
    finally:
        if process.poll() is not None:
            logger.warning(
                "The explorer ended by itself, with exit status %d; the recording did not", process.returncode
            )
        process.terminate()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        logger.info("To look at the recording again: lerobot-attn view %s", folder)
