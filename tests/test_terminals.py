"""Commands on terminals that are not UTF-8, and with instructions of every kind."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

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
