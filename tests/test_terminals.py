"""Commands on terminals that are not UTF-8, and with instructions of every kind."""

import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import termios
from dataclasses import replace

import pyte
import pytest
from forked import PATIENCE_S
from test_store import write_episode

from lerobot_attn.synthetic import FAMILIES, write_planted_episode

TASKS = {
    "Chinese": "抓住 红色 方块",
    "emoji": "pick up the 🥣 bowl",
    "right to left": "التقط الوعاء الأحمر",
    "dollars": r"pick up the $$ coin and $\foo$ and $bowl_x$",
    "markup": "[red]stop[/red] [bold]now[/bold] [/]",
    "escapes": "a\x1b[31mred\x1b[0m bell\x07",
}


def run(*arguments, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "COLUMNS": "120"}
    command = [sys.executable, "-m", "lerobot_attn.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300, check=False)
    return done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding)


@pytest.fixture(scope="module")
def episode(tmp_path_factory):
    task = " ".join(TASKS.values())
    plan = replace(FAMILIES["pi05"], videos=False, n_text=200, task=task)
    return write_planted_episode(tmp_path_factory.mktemp("terminal"), plan)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_inspect_and_verify_say_all_they_know(episode, encoding):
    for command in (("inspect", episode), ("inspect", episode.parents[2]), ("verify", episode, "--no-sheet")):
        status, out, err = run(*command, encoding=encoding)
        assert "Traceback" not in err
        assert status == 0, err
        assert "[red]stop[/red]" in out or command[0] == "verify"
    status, out, _ = run("inspect", episode, "--json", encoding=encoding)
    assert "抓住" in json.loads(out)["task"]
    _, out, _ = run("inspect", episode, encoding=encoding)
    assert ("█" in out) == (encoding == "utf-8")
    assert ("##" in out) == (encoding != "utf-8")


def test_errors_of_any_path_are_one_line(tmp_path):
    for encoding in ("ascii", "latin-1"):
        status, _, err = run("inspect", tmp_path / "抓住 🥣", encoding=encoding)
        assert status == 1
        assert err.startswith("error: ")
        assert err.count("\n") == 1


class Terminal:
    """A command on a terminal of its own, where Ctrl-C is the terminal's, and what it shows."""

    def __init__(self, words, folder, size):
        self.screen = pyte.Screen(*size)
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = os.openpty()
        columns, lines = size
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lerobot_attn.cli", *words],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    @property
    def lines(self):
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def wait_for(self, text):
        while not any(text in line for line in self.lines):
            assert self._read(), f"it ended before {text!r}: {self.lines}"

    def press_ctrl_c(self):
        """End it so; return its exit status."""
        os.write(self._master, b"\x03")
        while self._read():
            pass
        return self._process.wait(PATIENCE_S)

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def _read(self):
        assert select.select([self._master], [], [], PATIENCE_S)[0], f"nothing came: {self.lines}"
        try:
            said = os.read(self._master, 65536)
        except OSError:  # as Linux says that nobody has the other end any more
            return False
        self._stream.feed(said)
        return bool(said)


def test_a_run_is_watched_in_a_terminal_until_ctrl_c(tmp_path):
    """Each look takes the place of the one before, as far as the terminal is high, and the last one stays."""
    write_episode(tmp_path / "one.zarr", 2)
    document = json.loads((tmp_path / "one.zarr" / "zarr.json").read_text())

    def put(task, episode):
        store = tmp_path / "out" / f"kitchen_{task}" / f"episode_{episode:05d}.zarr"
        own = {"task_group": "kitchen", "task_id": task, "episode_index": episode, "success": True}
        text = json.dumps({**document, "attributes": {**document["attributes"], **own}})
        store.mkdir(parents=True)
        (store / "zarr.json").write_text(text)
        return store

    for task in range(12):  # more than there are lines for
        broken = put(task, 0)
    (broken / "zarr.json").write_text("{")
    terminal = Terminal(["status", "out", "--watch", "--expected", "16"], tmp_path, (120, 14))
    try:
        for number in range(11, 14):
            terminal.wait_for(f"{number} of 16 episodes done")
            put(0, number)
        terminal.wait_for("14 of 16 episodes done")
        assert terminal.press_ctrl_c() == 0
    finally:
        terminal.close()
    line, titles, _, *rest = terminal.lines
    assert line.startswith("out: 14 of 16 episodes done (88%), 14 successful, 0 failing, 1 broken; ")
    assert [*titles.split(), rest[0].split()[:4]] == [
        *("task", "done", "successful", "broken", "size"),
        ["kitchen", "14", "14", "1"],
    ]
    assert rest[1].startswith(f"broken: out/kitchen_11/{broken.name}: its zarr.json is damaged")
    assert not [line for line in rest[2:] if line.startswith(("out: ", " task", " kitchen", "..."))]
    assert not terminal.screen.cursor.hidden
