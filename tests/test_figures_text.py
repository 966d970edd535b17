"""Any text is a legal instruction: figures show it as it is, or say what they lack."""

import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from matplotlib.text import Text

from lerobot_attn.figures import Caption, fonts, save_figure, text_figure
from lerobot_attn.figures.canvas import new_figure, store_name, styled
from lerobot_attn.plot import KINDS, PlotSettings, plot
from lerobot_attn.store.reader import open_episode
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

TASKS = {
    "dollars": "pick up the $$ coin",
    "formula": r"pick $\foo$ and \frac{1}{2} ^_{} up",
    "subscript": "put $bowl_x$ on $plate_y$",
    "Chinese": "拿起 红色方块 放进 碗里",
    "emoji": "pick 🤖 up 👩‍🚀 ❤️ 😀",
    "Arabic": "ارفع المكعب الأحمر",
    "Hebrew": "הרם את הקובייה",
    "Devanagari": "लाल घन उठाओ",
    "controls": "pick\x07up\x00the\x1bblock",
    "newlines": "pick up\nthe block\r\n\tnow",
    "long": f"pick {'Donaudampfschifffahrt' * 20} up",
    "markup": "<b>pick</b> &amp; {place} %s %(x)s [red]",
}


@pytest.fixture
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def tokens_of(words):
    shares = np.linspace(0.05, 0.3, len(words), dtype=np.float32)
    coords = {
        "label": ("token", words),
        "kind": ("token", ["task"] * len(words)),
        "token": np.arange(len(words)),
    }
    tokens = xr.DataArray(shares, dims="token", coords=coords)
    return tokens, xr.concat([tokens, tokens], "layer").assign_coords(layer=[0, 1])


def only_matplotlibs():
    return [font for font in fontManager.ttflist if font.name.startswith(("DejaVu", "Last Resort"))]


def texts_of(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("kind", ["text", "combined", "cross-modal"])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_any_instruction_is_drawn_without_a_warning(tmp_path, strict, task, kind):
    plan = SyntheticPlan(task=task, n_frames=3, n_text=400, layers=(3,), prefix_layers=(3,), videos=False)
    figure = plot(open_episode(write_planted_episode(tmp_path, plan)), kind)
    for suffix in (".png", ".svg", ".pdf") if kind == "text" else (".png",):
        assert save_figure(figure, tmp_path / f"a{suffix}", dpi=60).stat().st_size > 1000
    shown = "\n".join(texts_of(figure))
    for word in task.split():
        if len(word) < 20 and word.isprintable():
            assert word in shown
    for text in figure.findobj(Text):
        assert not text.get_parse_math()


@pytest.mark.parametrize("word", [r"$\foo$", "$$", "$bowl_x$", r"a$_b$c"])
def test_a_dollar_begins_no_formula_whatever_matplotlibs_settings_say(tmp_path, strict, word):
    with mpl.rc_context({"text.parse_math": True, "text.usetex": False, "font.family": "serif"}):
        figure = text_figure(*tokens_of(["pick", word]), Caption([f"task {word}"]))
        # Somebody else's savefig, outside of the package's style.
        figure.savefig(tmp_path / "a.svg")
    assert word in (tmp_path / "a.svg").read_text()


def test_half_a_character_is_drawn_as_a_replacement(tmp_path, strict):
    figure = text_figure(*tokens_of(["pick", "\ud83e up"]), Caption(["task \udc80"]))
    save_figure(figure, tmp_path / "a.png", dpi=60)
    assert "� up" in texts_of(figure)
    assert "task �" in texts_of(figure)


@pytest.mark.parametrize(
    ("text", "script", "package"),
    [
        ("拿起", "Han", "fonts-noto-cjk"),
        ("ひらがな", "Hiragana", "fonts-noto-cjk"),
        ("블록", "Hangul", "fonts-noto-cjk"),
        ("लाल", "Devanagari", "fonts-noto-core"),
        ("🤖", "symbols", "fonts-symbola"),
    ],
)
def test_a_script_without_a_font_is_named(monkeypatch, strict, text, script, package):
    monkeypatch.setattr(fontManager, "ttflist", only_matplotlibs())
    assert fonts.missing_scripts(f"pick {text} up") == [script]
    figure = text_figure(*tokens_of(["pick", text]), Caption(["facts"], "warning"))
    shown = texts_of(figure)
    assert f"no font on this machine has: {script}; install e.g. {package}" in shown
    assert shown[-1] == "warning"
    figure.draw_without_rendering()
    assert figure.get_tightbbox().y0 >= -0.01, "the caption's further line has no room"


def test_latin_needs_no_other_font():
    assert fonts.families_for("pick up the $$ coin, łódź, ελληνικά, кубик") == [fonts.BASE, fonts.LAST_RESORT]
    assert fonts.missing_note("pick ❤\ufe0f up\u200d") == ""


def write_font(path: Path, family: str, characters: str):
    """Write a font whose every glyph is a square."""
    names = [".notdef", *(f"u{ord(character):x}" for character in characters)]
    pen = TTGlyphPen(None)
    for place in ((0, 0), (0, 700), (700, 700), (700, 0)):
        (pen.lineTo if place != (0, 0) else pen.moveTo)(place)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): name for c, name in zip(characters, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_a_font_of_the_machine_that_has_the_letters_is_used(tmp_path, monkeypatch, strict):
    monkeypatch.setattr(fontManager, "ttflist", only_matplotlibs())
    assert fonts.missing_scripts("拿起") == ["Han"]
    write_font(tmp_path / "one.ttf", "One of Han", "拿")
    write_font(tmp_path / "both.ttf", "Both of Han", "拿起")
    for name in ("one", "both"):
        fontManager.addfont(tmp_path / f"{name}.ttf")
    assert fonts.missing_scripts("拿起") == []
    assert [font.path.name for font in fonts.fonts_for("拿起")][1:] == ["both.ttf"]
    figure = text_figure(*tokens_of(["拿起", "up"]), Caption([]))
    (word,) = (text for text in figure.axes[0].texts if text.get_text() == "拿起")
    assert "Both of Han" in word.get_fontfamily()
    save_figure(figure, tmp_path / "a.png", dpi=60)
    assert not any("no font" in text for text in texts_of(figure))


def test_a_text_is_cut_into_parts_of_one_font_each(tmp_path, monkeypatch):
    monkeypatch.setattr(fontManager, "ttflist", only_matplotlibs())
    write_font(tmp_path / "han.ttf", "Han and blanks", "拿起 ")
    fontManager.addfont(tmp_path / "han.ttf")
    parts = [(run.path.name, run.text) for run in fonts.runs_of("pick 拿 起up\u200d 블!")]
    assert parts == [
        ("DejaVuSans.ttf", "pick "),
        ("han.ttf", "拿 起"),
        ("DejaVuSans.ttf", "up\u200d "),
        ("LastResortHE-Regular.ttf", "블"),
        ("DejaVuSans.ttf", "!"),
    ]
    assert fonts.runs_of("") == []


@pytest.mark.parametrize("task", [TASKS["Arabic"], TASKS["Hebrew"]])
def test_right_to_left_sentences_run_from_the_right(task):
    figure = text_figure(*tokens_of(task.split()), Caption([]))
    places = {text.get_text(): text.get_position()[0] for text in figure.axes[0].texts}
    rights = [places[word] for word in task.split()]
    assert rights == sorted(rights, reverse=True)
    figure = text_figure(*tokens_of(["pick", *task.split()]), Caption([]))
    lefts = [text.get_position()[0] for text in figure.axes[0].texts]
    assert lefts == sorted(lefts)


def test_a_word_longer_than_the_line_is_shortened_in_its_middle():
    word = "x" * 400 + "end"
    figure = text_figure(*tokens_of(["pick", word, "up"]), Caption([]), width_in=3.4)
    (shown,) = (text.get_text() for text in figure.axes[0].texts if "…" in text.get_text())
    assert shown.startswith("xxx")
    assert shown.endswith("end")
    figure.draw_without_rendering()
    assert figure.get_tightbbox().x1 <= 3.4 + 0.02


def test_controls_and_line_breaks_of_words_are_blanks():
    assert fonts.one_line("a\x00b\n c\t\r\n d") == "a b c d"
    assert fonts.drawable("a\x07\nb") == "a \nb"
    assert fonts.one_line("abcdefghij", 7) == "abcd…ij"


@pytest.mark.parametrize("path", ["a/b/episode_00001.zarr", "episode_00001.zarr", "./episode_00001.zarr"])
def test_a_store_is_called_by_its_folder_and_its_name(tmp_path, monkeypatch, path):
    folder = tmp_path / "libero_object_4"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert store_name(Path(path)) == f"{'b' if '/b/' in path else 'libero_object_4'}/episode_00001"
    assert store_name(Path("/episode_00001.zarr")) == "episode_00001"


@pytest.mark.parametrize("kind", KINDS)
def test_captions_of_an_episode_opened_by_a_bare_path(tmp_path, monkeypatch, kind):
    path = write_planted_episode(
        tmp_path, SyntheticPlan(n_frames=3, prefix_layers=(2,), vision_layers=(1,), videos=False)
    )
    monkeypatch.chdir(path.parent)
    figure = plot(open_episode(path.name), kind, PlotSettings(frames=0))
    (line, *_) = (text.get_text() for text in figure.texts)
    assert "synthetic_0/episode_00000, success" in line


def test_captions_wrap_wide_letters():
    @styled
    def empty():
        return new_figure(3.4, 1, Caption(["拿起红色方块" * 20]))

    figure = empty()
    figure.draw_without_rendering()
    assert len(figure.texts) > 2
    assert all(text.get_window_extent().x1 <= 3.4 * figure.dpi for text in figure.texts)


@pytest.mark.parametrize("name", ["h#1", "a?b=c&d", "x::y", "with blank", "[1]", "%41", "ä拿", "n" * 240])
def test_figures_are_written_under_any_legal_path(tmp_path, strict, name):
    @styled
    def empty():
        return new_figure(2, 1, Caption(["x"]))

    path = save_figure(empty(), tmp_path / name / f"{name}.PNG", dpi=40)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
