"""Settings from YAML and options, and choices of labels as people write them."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from lerobot_attn.errors import ConfigError
from lerobot_attn.overlay import OverlaySettings
from lerobot_attn.plot import PlotSettings
from lerobot_attn.report import CompareSettings
from lerobot_attn.settings import check_numbers, from_mapping, load_settings, parse_choice, read_mapping


@dataclass
class Settings:
    layers: list[int] = field(default_factory=lambda: [-1])
    camera: str | None = None
    alpha: float = 0.5

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha: got {self.alpha}, expected 0 to 1")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("layers: [1, 2]\ncamera: wrist\n", {"layers": [1, 2], "camera": "wrist"}),
        ("camera: ~", {"camera": None}),
        ("", {}),
        ("# nothing\n", {}),
        ("{}", {}),
        ("camera: caméra", {"camera": "caméra"}),
    ],
)
def test_read_mapping(tmp_path, text, values):
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    assert read_mapping(path) == read_mapping(str(path)) == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "got a list, expected a mapping of settings to values"),
        (b"wrist", "got a str, expected a mapping"),
        (b"a: [1", "not valid YAML: "),
        (b"a: !!python/object/apply:os.system [true]", "not valid YAML: could not determine a constructor"),
        (b"camera: \xff\xfe", r"cannot read the settings \(not UTF-8\); expected a YAML file"),
        (None, r"cannot read the settings \(No such file or directory\); expected a YAML file"),
    ],
)
def test_read_mapping_errors(tmp_path, content, message):
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"settings\.yaml: {message}") as error:
        read_mapping(path)
    assert "\n" not in str(error.value)


def test_read_mapping_of_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the settings \(Is a directory\)"):
        read_mapping(tmp_path)


def test_from_mapping():
    assert from_mapping(Settings, {}, where="here") == Settings()
    assert from_mapping(Settings, {"alpha": 1}, where="here") == Settings(alpha=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 1}, "here: unknown key 'beta'; expected one of layers, camera, alpha"),
        ({"zeta": 1, "beta": 1, "alpha": 2}, "here: unknown key 'beta'"),
        ({7: 1}, "here: unknown key '7'"),
        ({"alpha": 2}, "alpha: got 2, expected 0 to 1"),
    ],
)
def test_from_mapping_errors(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(Settings, values, where="here")


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (None, {}, Settings()),
        (None, {"camera": "wrist", "alpha": None}, Settings(camera="wrist")),
        ("alpha: 0.1\ncamera: top", {}, Settings(camera="top", alpha=0.1)),
        ("alpha: 0.1\ncamera: top", {"alpha": 0.9, "camera": None}, Settings(camera="top", alpha=0.9)),
        ("alpha: 0.1", {"alpha": 0}, Settings(alpha=0)),  # 0 was given, None was not
        ("alpha: 7", {"alpha": 1}, Settings(alpha=1)),  # only what is used is checked
    ],
)
def test_options_win_over_the_file(tmp_path, text, options, expected):
    path = None
    if text is not None:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
    assert load_settings(Settings, path, **options) == expected


def test_load_settings_names_the_source_of_an_unknown_key(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("colour: red")
    with pytest.raises(ConfigError, match=r"mine\.yaml: unknown key 'colour'; expected one of layers"):
        load_settings(Settings, path)
    with pytest.raises(ConfigError, match="settings: unknown key 'colour'"):
        load_settings(Settings, colour="red")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("17", 17),
        ("-1", -1),
        ("0", 0),
        (" 3 ", 3),
        ("0,4,9", [0, 4, 9]),
        ("0, 4 ,9", [0, 4, 9]),
        ("[0, 4, 9]", [0, 4, 9]),
        ("-2,-1", [-2, -1]),
        ("0-3", [0, 1, 2, 3]),
        ("3-3", 3),
        ("0-2,9", [0, 1, 2, 9]),
        ("9,0 - 2", [9, 0, 1, 2]),
        ("0-9:3", [0, 3, 6, 9]),
        ("2-9:5, 1", [2, 7, 1]),
        ("0-9:20", 0),
        ("1,1", [1, 1]),
        ("all", "all"),
        (" mean ", "mean"),
        ("frame", "frame"),
        ("", ""),
        (17, 17),
        ([0, 4], [0, 4]),
        (None, None),
        (0.5, 0.5),
    ],
    ids=repr,
)
def test_parse_choice(text, choice):
    found = parse_choice(text)
    assert found == choice
    assert type(found) is type(choice)


@pytest.mark.parametrize(
    "text",
    [
        "3-0",
        "1,",
        "1,,2",
        "1,x",
        "0-",
        "-",
        "--1",
        "-3--1",
        "1.5",
        "1e3",
        "1-2-3",
        "0-3,5-4",
        "4 5",
        "0-9:",
        "0-9:0",
        "0-9:-1",
        "9:2",
    ],
)
def test_parse_choice_errors(text):
    message = "expected a number, a list as 0,4,9 or a range as 0-3"
    with pytest.raises(ConfigError, match=f"got '{text}', {message}".replace(".", r"\.")):
        parse_choice(text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("all", "all"),
        (3, (3,)),
        (np.int64(3), (3,)),
        ([0, 2], (0, 2)),
        (np.array([0, 2]), (0, 2)),
        ((), ()),
    ],
)
def test_lists_of_numbers(value, expected):
    assert check_numbers("frames", value, "all") == expected


@pytest.mark.parametrize("value", ["some", True, 1.5, [1, "2"], None])
def test_what_is_no_list_of_numbers(value):
    with pytest.raises(ConfigError, match=r"frames: got .*, expected 'all', a number, a list or a range"):
        check_numbers("frames", value, "all")


LOOKS = {"exclude": "sinks", "normalisation": "image", "clip": 95, "colormap": "viridis", "alpha": 0.5}
LOOKS |= {"interpolation": "linear", "query": "3"}
DEFAULTS = {"exclude": (), "clip": 99.9, "colormap": "inferno", "interpolation": "nearest"}


@pytest.mark.parametrize(
    ("cls", "defaults"),
    [
        (PlotSettings, {"normalisation": "share", "alpha": 0.7, "query": None, "layers": None}),
        (OverlaySettings, {"normalisation": "episode", "alpha": 0.6, "query": "frame", "layer": None}),
        (CompareSettings, {"normalisation": "image", "alpha": 0.7, "query": "frame", "layer": None}),
    ],
)
def test_every_picture_is_chosen_and_coloured_by_the_same_settings(tmp_path, cls, defaults):
    plain = cls()
    for name, value in {**DEFAULTS, **defaults}.items():
        assert getattr(plain, name) == value, name
    path = tmp_path / "look.yaml"
    path.write_text("\n".join(f"{name}: {value}" for name, value in LOOKS.items()))
    chosen = load_settings(cls, path, alpha=0.25)
    for name, value in {**LOOKS, "alpha": 0.25, "query": 3}.items():
        assert getattr(chosen, name) == value, name


@pytest.mark.parametrize("cls", [PlotSettings, OverlaySettings, CompareSettings])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalisation": "log"}, "normalisation: got 'log', expected one of share, image, frame, episode"),
        ({"interpolation": "cubic"}, "interpolation: got 'cubic', expected nearest or linear"),
        ({"alpha": 2}, "alpha: got 2, expected a number from 0 to 1"),
        ({"clip": 20}, "clip: got 20, expected a number from 50 to 100"),
        ({"exclude": "sink"}, "exclude: got 'sink', expected 'sinks', a number, a list or a range"),
        ({"colormap": "rainbows"}, "colormap 'rainbows': unknown"),
        ({"colormap": 3}, "colormap: got 3, expected a matplotlib name"),
        ({"query": "1-"}, "got '1-', expected a number, a list"),
    ],
)
def test_every_picture_refuses_the_same(cls, settings, message):
    with pytest.raises(ConfigError, match=message):
        cls(**settings)


@pytest.mark.parametrize("cls", [PlotSettings, OverlaySettings, CompareSettings])
def test_former_names_of_settings_are_still_taken(tmp_path, cls):
    path = tmp_path / "old.yaml"
    path.write_text("leave_out: [3, 4]\n")
    assert load_settings(cls, path).exclude == (3, 4)
    # An option comes on top of the file, whichever name each of them has.
    assert load_settings(cls, path, exclude="7").exclude == (7,)
    assert load_settings(cls, path, leave_out="7").exclude == (7,)
    with pytest.warns(DeprecationWarning, match=f"{cls.__name__}: leave_out is now called exclude"):
        old = cls(leave_out="sinks")
    assert old == cls(exclude="sinks")
    assert old.leave_out == old.exclude == "sinks"
    with pytest.warns(DeprecationWarning, match="exclude"):
        assert replace(old, leave_out=(1,)).exclude == (1,)
