"""Recordings and commands in processes of their own, which a test may interrupt, kill or measure.

One process imports everything once, then forks for each call: a fresh process costs milliseconds instead of
seconds. This file started as a script is that process. No Python thread runs in it, so its
forks are safe.

There are two of them: one for recordings of scripted policies, and one that has imported LeRobot and nothing
of this package: what is forked off it is as a fresh interpreter is.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

# A busy machine is slow; what takes longer than this hangs.
START_PATIENCE_S = 300
PATIENCE_S = 60

RECORDINGS, STOCK = "recordings", "stock"
OUTPUT = "stdout"  # the file of a command's standard output


class Forked:
    """A function that runs in a process of its own, which leads its own process group; one at a time.

    Use it in a `with` block, which leaves no process behind.

    Attributes:
        said: event → what the process has said of it last.
    """

    def __init__(self, function, folder, server=RECORDINGS, **arguments):
        """Start `function(folder, tell, **arguments)`; `tell(event)` says a line to the test.

        Args:
            function: a function of a module in this folder.
            folder: where it records; its log goes there too.
            server: which process it is forked off.
            arguments: plain values.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "log"
        self._output = folder / OUTPUT
        self._status = None
        self.said = {}
        self._server = _server(server)
        call = [function.__module__, function.__name__, str(folder), arguments, _environment()]
        self._server.stdin.write(json.dumps(call).encode() + b"\n")
        self._server.stdin.flush()
        self.pid = int(self.wait_for("child"))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._status is None:
            self.kill()
            self.wait()

    @property
    def log(self):
        """What the process has printed and logged so far."""
        return self._log.read_text()

    @property
    def output(self):
        """What a command (`run_…`) has printed on its standard output; its log is its standard error."""
        return self._output.read_text()

    def wait_for(self, event):
        """Wait until the process tells of an event; return what it says of it."""
        while (found := self._next_event()) != event:
            assert found != "ended", f"the process ended before {event!r}: {self.log[-4000:]}"
        return self.said[event]

    def wait_for_count(self, event, count):
        """Wait until the process tells of an event with at least this number."""
        while int(self.wait_for(event)) < count:
            pass

    def wait_for_log(self, text):
        """Wait until the process has logged a text."""
        end = time.monotonic() + PATIENCE_S
        while text not in self.log:
            assert time.monotonic() < end, f"{text!r} never came: {self.log[-4000:]}"
            time.sleep(0.01)

    def interrupt(self):
        """Press Ctrl-C: a terminal sends the signal to every process of the group."""
        os.killpg(self.pid, signal.SIGINT)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, patience_s=PATIENCE_S):
        """Wait until the process has ended; return its exit status, negative for a signal."""
        while self._status is None:
            self._next_event(patience_s)
        return self._status

    def _next_event(self, patience_s=PATIENCE_S):
        line = _read_line(self._server.stdout.fileno(), patience_s)
        assert line, "the forking process ended"
        event, _, said = line.partition(" ")
        self.said[event] = said
        if event == "ended":
            self._status = os.waitstatus_to_exitcode(int(said))
        return event


def run_code(folder, tell, code, argv):
    """Be `python -c code argv…`."""
    _print_to(folder)
    sys.argv = ["-c", *argv]
    exec(code, {"__name__": "__main__"})


def run_script(folder, tell, script, argv):
    """Be `python script argv…`, in the folder."""
    _print_to(folder)
    os.chdir(folder)
    sys.argv = [script, *argv]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def run_lerobot_eval(folder, tell, argv):
    """Be `lerobot-eval argv…`."""
    _print_to(folder)
    # As the command's own file does, which the processes of environments import first.
    multiprocessing.set_forkserver_preload(["lerobot.scripts.lerobot_eval"])
    sys.argv = ["lerobot-eval", *argv]
    importlib.import_module("lerobot.scripts.lerobot_eval").main()


def _print_to(folder):
    os.dup2(os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)


def _environment():
    return {**os.environ, "SLURM_JOB_ID": "0"}  # LeRobot's own way to leave its progress bars out


@functools.cache
def _server(name):
    server = subprocess.Popen(
        # The threads that the warning is about are idle ones of OpenBLAS and jemalloc.
        [sys.executable, "-W", "ignore:This process:DeprecationWarning", __file__, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=_environment(),
        start_new_session=True,  # Ctrl-C on the tests is not one on the recordings
    )

    def end():
        server.stdin.close()
        server.wait(PATIENCE_S)
        server.stdout.close()

    atexit.register(end)
    assert _read_line(server.stdout.fileno(), START_PATIENCE_S) == "ready"
    return server


def _read_line(file, patience_s=PATIENCE_S):
    """Return the next line of a pipe, byte by byte: nothing is left in a buffer that `select` cannot see."""
    line = b""
    while not line.endswith(b"\n"):
        assert select.select([file], [], [], patience_s)[0], f"nothing came for {patience_s} s"
        byte = os.read(file, 1)
        if not byte:
            break
        line += byte
    return line.decode().strip()


def _import_for_recordings():
    import scripted

    from lerobot_attn import plugin
    from lerobot_attn.policies import ADAPTERS

    importlib.import_module("test_recording")
    importlib.import_module(plugin.EVAL_MODULE)  # which takes its time
    ADAPTERS["scripted"] = scripted.ADAPTER


def _import_lerobot():
    for name in ("lerobot_eval", "lerobot_train"):
        importlib.import_module(f"lerobot.scripts.{name}")


def _serve(name):
    """Fork for each call that comes on the standard input, and tell how it ended."""
    events = os.dup(1)

    def tell(event):
        os.write(events, f"{event}\n".encode())

    {RECORDINGS: _import_for_recordings, STOCK: _import_lerobot}[name]()
    tell("ready")
    for line in sys.stdin:
        module, function, folder, arguments, environment = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.environ.clear()
            os.environ.update(environment)
            log = os.open(Path(folder) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            tell(f"child {os.getpid()}")
            getattr(importlib.import_module(module), function)(Path(folder), tell, **arguments)
            return
        tell(f"ended {os.waitpid(child, 0)[1]}")


if __name__ == "__main__":
    _serve(sys.argv[1])
