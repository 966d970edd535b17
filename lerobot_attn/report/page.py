"""A report's text, written as Markdown and as HTML. Knows paragraphs, tables and pictures, no findings."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from lerobot_attn.errors import ConfigError

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-size:13px}td,th{border-bottom:1px solid #ddd;padding:.25rem .6rem;"
    "text-align:left}img{max-width:100%}"
)


class Page:
    """A page that grows from its title down.

    Args:
        title: its heading.
    """

    def __init__(self, title: str):
        self._title = title
        self._markdown = [f"# {_inline(title)}"]
        self._html = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._markdown.append(f"## {_inline(text)}")
        self._html.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._markdown.append(_inline(text))
        self._html.append(f"<p>{html.escape(text)}</p>")

    def points(self, texts: Iterable[str]) -> None:
        """Add a list; nothing if it is empty."""
        if found := list(texts):
            self._markdown.append("\n".join(f"- {_inline(text)}" for text in found))
            self._html.append("<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in found) + "</ul>")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Add a table.

        Args:
            header: names of the columns.
            rows: as many cells each.
        """
        found = [list(row) for row in rows]
        lines = [list(header), ["---"] * len(header), *found]
        self._markdown.append("\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines))
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in found
        )
        self._html.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def code(self, text: str) -> None:
        """Add lines to copy."""
        self._markdown.append(f"```\n{text.replace('```', '')}\n```")
        self._html.append(f"<pre>{html.escape(text)}</pre>")

    def picture(self, path: Path, text: str) -> None:
        """Add a PNG that lies in the report's folder; the HTML holds it, so that it can be sent alone.

        Args:
            path: the file.
            text: what it shows, for those who cannot see it.
        """
        self._markdown.append(f"![{_inline(text)}]({path.name})")
        data = base64.b64encode(path.read_bytes()).decode()
        self._html.append(f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">')

    def linked_picture(self, name: str, text: str) -> None:
        """Add a picture that will lie beside the page, under that name.

        Args:
            name: of its file.
            text: what it shows, for those who cannot see it.
        """
        self._markdown.append(f"![{_inline(text)}]({name})")
        self._html.append(f'<img alt="{html.escape(text)}" src="{html.escape(name)}">')

    @property
    def markdown(self) -> str:
        """The page so far, as Markdown."""
        return "\n\n".join(self._markdown) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Write `report.md` and `report.html` into a folder that is there; return both.

        Raises:
            ConfigError: they cannot be written.
        """
        files = [folder / "report.md", folder / "report.html"]
        document = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style></head>"
            f"<body>{''.join(self._html)}</body></html>\n"
        )
        try:
            files[0].write_text(self.markdown, encoding="utf-8")
            files[1].write_text(document, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{folder}: cannot write the report: {error.strerror or error}") from error
        return files


def _inline(text: str) -> str:
    """Return text as Markdown shows it: in one line, and nothing in it a tag."""
    return " ".join(text.split()).replace("<", "&lt;")


def _cell(text: str) -> str:
    return _inline(text).replace("|", "\\|")
