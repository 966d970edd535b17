"""What shows a recording while it is made: processes of their own beside it. Knows no store and no page."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import SetupError

logger = logging.getLogger(__name__)

_COMMAND = "from lerobot_attn.cli import main; main()"  # of this very Python, wherever it is installed
_NICENESS = 10  # the policy and the loop go first
_GRACE_S = 3.0
_RERUN_GRACE_S = 10.0  # an episode's pictures are sent when it is complete


@contextmanager
def viewers_beside(folder: Path, config: AttentionConfig, rerun_url: str | None = None) -> Iterator[None]:
    """Start what the settings ask for to look at a recording with: the explorer, and Rerun.

    Args:
        folder: where the stores go.
        config: its `view` and `rerun` say what is wanted.
        rerun_url: where Rerun's viewer listens; by default on this machine.

    Raises:
        SetupError: Rerun is wanted and not installed.
    """
    with explorer_beside(folder, config.view), rerun_beside(folder, config.rerun, rerun_url):
        yield


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
    with _beside("The explorer", ["view", str(folder), "--wait"], _GRACE_S):
        yield
    logger.info("To look at the recording again: lerobot-attn view %s", folder)


@contextmanager
def rerun_beside(folder: Path, wanted: bool, url: str | None = None) -> Iterator[None]:
    """Send a recording to a Rerun viewer while it is made, into this process's own session where it has one.

    Args:
        folder: where the stores go.
        wanted: whether to do anything.
        url: where the viewer listens; by default on this machine.

    Raises:
        SetupError: Rerun is not installed.
    """
    if not wanted:
        yield
        return
    if "rerun" not in sys.modules and importlib.util.find_spec("rerun") is None:
        raise SetupError(
            "rerun=true: Rerun is not installed; expected rerun-sdk 0.24 to 0.33: "
            "pip install 'lerobot_policy_attn[rerun]'"
        )
    # What was recorded before is not what is recorded now. A file system may round times to whole seconds.
    words = ["export-rerun", str(folder), "--follow", "--since", str(time.time() - 1)]
    if url is not None:
        words += ["--connect", url]
    with _beside("Rerun", [*words, *_session()], _RERUN_GRACE_S, may_finish=True):
        yield
    logger.info("To look at an episode again: lerobot-attn export-rerun EPISODE -o episode.rrd")


def _session() -> list[str]:
    """Return the options that join the Rerun session of this process, which LeRobot may have begun."""
    rerun = sys.modules.get("rerun")  # a session is begun by whoever has imported it
    if rerun is None:
        return []
    application, recording = rerun.get_application_id(), rerun.get_recording_id()
    if application is None or recording is None:
        return []
    return ["--application", str(application), "--recording-id", str(recording)]


@contextmanager
def _beside(name: str, words: Sequence[str], grace_s: float, *, may_finish: bool = False) -> Iterator[None]:
    """Run one of our commands while the block runs, and end it then.

    Args:
        name: what a warning calls it.
        words: the command.
        grace_s: how long it may take to end.
        may_finish: it is told by a line of input that nothing more comes, and ends when it has done the rest.
            A signal would end a process that has only just begun.
    """
    # It does not get Ctrl-C, which is the recording's: it ends with the recording.
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *words],
        stdin=subprocess.PIPE if may_finish else subprocess.DEVNULL,
        start_new_session=True,
    )
    with suppress(OSError, AttributeError):  # a system without priorities
        os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
    try:
        yield
    finally:
        if process.poll() is not None:
            logger.warning(
                "%s ended by itself, with exit status %d; the recording did not", name, process.returncode
            )
        try:
            if process.stdin is None:
                process.terminate()
            else:
                with suppress(OSError):  # it has ended
                    process.stdin.write(b"\n")
                    process.stdin.close()
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
