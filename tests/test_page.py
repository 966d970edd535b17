"""A report's page: the same in Markdown and in HTML, whatever the words in it."""

from pathlib import Path

import pytest

from lerobot_attn.errors import ConfigError
from lerobot_attn.report.page import Page


def test_both_forms_say_the_same_and_no_text_becomes_markup(tmp_path):
    picture = tmp_path / "effects.png"
    picture.write_bytes(b"\x89PNG")
    page = Page("Effects of <b>\nbold</b>")
    page.heading("Results")
    page.text("no <script>alert(1)</script>")
    page.points(["one", "two"])
    page.points([])
    page.table(["a|b", "c"], [["1", "x|y"], ["2", "<i>"]])
    page.picture(picture, 'the "figure"')
    markdown, document = (file.read_text() for file in page.write(tmp_path))
    assert markdown.splitlines() == [
        *("# Effects of &lt;b> bold&lt;/b>", "", "## Results", ""),
        *("no &lt;script>alert(1)&lt;/script>", "", "- one", "- two", ""),
        *(r"| a\|b | c |", "| --- | --- |", r"| 1 | x\|y |", "| 2 | &lt;i> |", ""),
        '![the "figure"](effects.png)',
    ]
    assert "<script>" not in document
    assert "<td>x|y</td>" in document
    assert 'src="data:image/png;base64,iVBORw=="' in document
    assert "<li>two</li></ul>" in document


def test_a_folder_that_is_not_there_is_one_line():
    with pytest.raises(ConfigError, match="/nowhere: cannot write the report: No such file"):
        Page("x").write(Path("/nowhere"))
