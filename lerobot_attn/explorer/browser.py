"""Open a page in a graphical browser, or in none: a text browser would take the terminal over."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import webbrowser
from pathlib import Path

_TEXT_BROWSERS = frozenset(
    {"browsh", "carbonyl", "cha", "chawan", "edbrowse", "elinks", "links", "links2", "lynx", "lynx-cur"}
    | {"netrik", "retawq", "w3m", "w3m-img", "www-browser"}
)


def open_page(url: str) -> threading.Thread:
    """Open a page, where there is a graphical browser, and return the thread that does so.

    A command of the person's own, from `BROWSER`, is started without the terminal: it may be a script that
    ends in a text browser.
    """
    thread = threading.Thread(target=_open, args=(url,), daemon=True)
    thread.start()
    return thread


def graphical_browser() -> webbrowser.BaseBrowser | None:
    """Return the browser that Python would open, or None where that is a text browser, or there is none.

    On Linux and its like a machine without a display has no graphical browser, unless `BROWSER` names one:
    remote editors set it to a command that opens the page on the machine that one sits at.
    """
    has_display = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    if not has_display:
        return None
    try:
        browser = webbrowser.get()
    except (webbrowser.Error, ValueError, IndexError):  # the others: BROWSER is no command line
        return None
    # `BROWSER="w3m -T text/html"` makes a browser of that whole name.
    command = str(getattr(browser, "name", "")).partition(" ")[0]
    return None if _is_text_browser(command) else browser


def _is_text_browser(command: str) -> bool:
    found = shutil.which(command)
    leads_to = Path(os.path.realpath(found)).name if found else ""  # www-browser and its like are links
    return bool({Path(command).name.lower(), leads_to.lower()} & _TEXT_BROWSERS)


def _open(url: str) -> None:
    browser = graphical_browser()  # asks the desktop, which may take a while
    if isinstance(browser, webbrowser.GenericBrowser):
        command = [browser.name, *(argument.replace("%s", url) for argument in browser.args)]
        nothing = subprocess.DEVNULL
        with contextlib.suppress(OSError):  # the address is printed
            # In a session of its own there is no terminal at /dev/tty either.
            subprocess.Popen(
                command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
            ).wait()
    elif browser is not None:
        browser.open(url)  # Python knows it to be graphical
