"""What a store says of the machine that it was recorded on, taken out before it is given away.

Knows texts and places. Knows nothing of what the attributes mean, nor of where a store goes.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_GONE = "…"
_HOMES = ("home", "users")  # whose folders are named after people
_STOP = r"\s'\"`<>|,;()\[\]{}"
# A text that is nothing but a path: it may hold spaces.
_WHOLE = re.compile(r"(?:~\w*[\\/]|[\\/]|[A-Za-z]:[\\/]|(?:\.\.[\\/])+)[^\n:]*")
# Paths inside a text. A single "/word" is none, and neither is what follows a letter, as in "and/or".
_INSIDE = re.compile(
    rf"file://[^{_STOP}]+"
    rf"|(?<![\w/\\])[A-Za-z]:[\\/][^{_STOP}]+"
    rf"|(?<![\w/\\.-])\\\\[^{_STOP}]+"
    rf"|(?<![\w/\\.~-])(?:~\w*)?(?:/[^/:{_STOP}]+){{2,}}/?"
    rf"|(?<![\w/\\.])(?:\.\.[\\/])+[^:{_STOP}]+"
)
_PASSWORD = re.compile(r"(?<=://)[^/\s@]+@")


class Scrubber:
    """Shortens paths of a machine to their last part, for the stores of one run.

    What is a path by its look is shortened wherever it was recorded; of this machine also its name, and paths
    with spaces below the home folder, the working folder, the run's and the temporary one. What stays:
    addresses and names on the Hub, relative paths, and those that lead to a file of the run itself.

    Args:
        root: the folder that is given away as a whole.
    """

    def __init__(self, root: Path):
        self._root = Path(os.path.normpath(root.absolute()))
        places = {self._root, Path.home(), Path.cwd(), Path(tempfile.gettempdir())}
        known = sorted({text for one in places for text in (str(one), str(one.resolve()))}, key=len)
        spaced = "|".join(re.escape(text) for text in reversed(known) if len(Path(text).parts) > 1)
        self._places = re.compile(rf"(?:{spaced})(?:[\\/][^\n:'\"`<>|,;()]*)?(?![\w-])")
        host = socket.gethostname()
        names = {name for name in (host, host.partition(".")[0]) if len(name) > 3}
        names -= {"localhost"}
        found = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        self._machine = re.compile(rf"(?<![\w-])(?:{found})(?![\w-])") if found else None

    def text(self, text: str, folder: Path | None = None) -> str:
        """Return a text with the last part of each path in it alone: "…/pretrained_model".

        Args:
            text: what a store says.
            folder: the folder from which relative paths count; by default the root.
        """
        if self._is_inside(text, folder or self._root):
            return text
        if _WHOLE.fullmatch(text):
            return _shortened(text)
        text = self._places.sub(lambda found: _shortened(found[0]), text)
        text = _INSIDE.sub(lambda found: _shortened(found[0]), text)
        text = _PASSWORD.sub("", text)
        return text if self._machine is None else self._machine.sub(_GONE, text)

    def value(self, value: Any, folder: Path | None = None) -> Any:
        """Return a JSON value with every text in it treated so, names too."""
        if isinstance(value, str):
            return self.text(value, folder)
        if isinstance(value, list):
            return [self.value(one, folder) for one in value]
        if isinstance(value, dict):
            return {self.text(name, folder): self.value(one, folder) for name, one in value.items()}
        return value

    def _is_inside(self, text: str, folder: Path) -> bool:
        """Return whether a text is a relative path that leads to something of the run."""
        if not text.startswith("..") or "\n" in text:
            return False
        return Path(os.path.normpath(folder.absolute() / text)).is_relative_to(self._root)


def differences(before: Any, after: Any) -> Iterator[tuple[str, str]]:
    """Yield each text that was changed, as it was and as it is, of two JSON values of one form."""
    if isinstance(before, str):
        if before != after:
            yield before, after
    elif isinstance(before, list):
        for one, other in zip(before, after, strict=True):
            yield from differences(one, other)
    elif isinstance(before, dict):
        for (name, one), (new_name, other) in zip(before.items(), after.items(), strict=True):
            yield from differences(name, new_name)
            yield from differences(one, other)


def _shortened(path: str) -> str:
    """Return a path's last part after a sign that something was before it; of a home folder not even that."""
    parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", "..", "file:")]
    is_home = len(parts) < 2 or (len(parts) == 2 and parts[0].lower() in _HOMES) or path == str(Path.home())
    is_told = path.startswith("..") and bool(parts)
    return f"{_GONE}/{parts[-1]}" if is_told or not is_home else _GONE
