"""The explorer on episodes with neurons: which sets there are, how active they are; else nothing of it."""

import json
import re
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
import xarray as xr
from browser import drawn, pixels, until
from neuron_stores import CAMERA, GROUPS, LAYERS, N_UNITS, write_neurons
from test_explorer import client_of, edit_attributes
from test_explorer_export import Document
from test_explorer_page import AXE
from test_inspection import run_cli
from xarray.backends import BackendArray
from xarray.core import indexing

from lerobot_attn import open_episode
from lerobot_attn.errors import ConfigError, SelectionError
from lerobot_attn.explorer.export import ExportSettings, export_html
from lerobot_attn.explorer.facts import facts
from lerobot_attn.explorer.neurons import (
    MOST_EACH,
    MOST_UNITS,
    FoundSet,
    activations,
    fired_units,
    neurons,
    read_found,
)
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

PLAN = SyntheticPlan(n_frames=12, n_executed=2)
FIRED = {"vlm": {"2": [5, 7], "0": [1]}, "expert": {"3": [6]}}
FOUND = (FoundSet("words.csv", {"vlm": [(2, 5), (3, 1), (9, 1)], "expert": [(3, 6)]}),)
FIRST, STEERED, PLAIN = (f"attention:synthetic_0:episode_0000{index}" for index in range(3))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A baseline, an episode whose condition fires neurons and that is longer, and one without neurons."""
    folder = tmp_path_factory.mktemp("neurons") / "out"
    write_neurons(folder, PLAN)
    longer = SyntheticPlan(n_frames=16, n_executed=2, episode_index=1)
    write_neurons(folder, longer, fired=("steer_up", FIRED), lift=1.5)
    write_planted_episode(folder, SyntheticPlan(n_frames=4, episode_index=2, videos=False))
    return folder


def opened(run, id_):
    return open_episode(run.joinpath(*id_.split(":")).with_suffix(".zarr"))


@pytest.fixture(scope="module")
def episode(run):
    return opened(run, FIRST)


@pytest.fixture(scope="module")
def steered(run):
    return opened(run, STEERED)


def stored(episode, stream, units, group, reduction, step=None):
    """Return (inference, unit), and (inference, unit) the mean of each unit's layer, by labels."""
    array = episode.arrays[f"{stream}_neurons"].load()
    where = {f"{stream}_group": group, "reduction": reduction} | (
        {} if step is None else {"denoise_step": step}
    )
    layers = [array.sel({**where, f"{stream}_neuron_layer": layer}).values for layer, _ in units]
    each = [values[:, unit] for values, (_, unit) in zip(layers, units, strict=True)]
    means = [values.astype(float).mean(axis=1) for values in layers]
    return np.stack(each, axis=1).astype(float), np.stack(means, axis=1)


# What the server answers


def test_an_episode_says_which_neurons_it_holds(episode, steered):
    found = facts(episode, FOUND)["neurons"]
    assert found["streams"] == {
        stream: {
            "groups": GROUPS[stream],
            "reductions": ["mean", "max"],
            "layers": LAYERS[stream],
            "n_units": N_UNITS[stream],
            "per_step": stream == "expert",
        }
        for stream in ("vlm", "expert")
    }
    # Layer 9 was not recorded.
    units = {"vlm": [[2, 5], [3, 1]], "expert": [[3, 6]]}
    assert found["sets"] == [{"kind": "found", "name": "words.csv", "units": units, "n_left_out": 1}]
    assert facts(episode)["neurons"]["sets"] == []
    fired = {"vlm": [[2, 5], [2, 7], [0, 1]], "expert": [[3, 6]]}
    both = facts(steered, FOUND)["neurons"]["sets"]
    assert [one["kind"] for one in both] == ["found", "fired"]
    assert both[1] == {"kind": "fired", "name": "steer_up", "units": fired, "n_left_out": 0}


def test_without_neurons_there_are_none(run):
    plain = opened(run, PLAIN)
    assert facts(plain, FOUND)["neurons"] is None
    with pytest.raises(SelectionError, match=r"without neurons of stream 'vlm'; record with"):
        activations(plain, 0, "vlm", [(2, 5)], group="task")


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize(
    ("stream", "units", "group", "step"),
    [
        ("vlm", [(2, 5)], "task", None),
        ("vlm", [(3, 0), (0, 11), (3, 4)], CAMERA, None),
        ("vlm", [(0, 1), (2, 5)], "state", None),
        ("expert", [(3, 6), (1, 0)], "actions", 1),
    ],
)
def test_activations_are_the_stores(episode, stream, units, group, reduction, step):
    each, means = stored(episode, stream, units, group, reduction, step)
    asked = {"group": group, "reduction": reduction, "each": True}
    found = activations(episode, 0, stream, units, denoise_step=-1 if step is None else step, **asked)
    assert (found["units"], found["denoise_step"]) == ([list(unit) for unit in units], step)
    np.testing.assert_allclose(np.array(found["each"], float), each, rtol=1e-5)
    np.testing.assert_allclose(np.array(found["mean"], float), each.mean(axis=1), rtol=1e-5)
    # What as many units have on average that are drawn at random from the same layers.
    np.testing.assert_allclose(np.array(found["expected"], float), means.mean(axis=1), rtol=1e-5)
    later = activations(episode, 4, stream, units, denoise_step=-1 if step is None else step, **asked)
    assert [later[name] for name in ("mean", "each")] == [found[name][4:] for name in ("mean", "each")]
    if group == "state":
        assert found["mean"][1] is found["expected"][1] is None
        assert found["each"][1] == [None, None]


def test_the_last_denoise_step_is_what_one_gets_unasked(episode):
    last = activations(episode, 0, "expert", [(3, 6)], group="actions")
    assert last["denoise_step"] == 2
    assert last == activations(episode, 0, "expert", [(3, 6)], group="actions", denoise_step=2)
    assert last != activations(episode, 0, "expert", [(3, 6)], group="actions", denoise_step=-3)


def test_what_is_too_large_for_float16_counts_as_the_largest():
    values = np.full((2, 1, 1, 1, 4), 1.0, np.float16)
    values[1, ..., 2] = np.inf
    found = activations(fake(values), 0, "vlm", [(0, 2), (0, 1)], group="task")
    assert found["mean"] == [1, pytest.approx((65504 + 1) / 2, rel=1e-5)]
    assert found["expected"][1] == pytest.approx((65504 + 3) / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"stream": "vision"}, "without neurons of stream 'vision'"),
        ({"units": [(1, 0)]}, "vlm layer 1 was not recorded"),
        ({"units": [(2, 12)]}, "unit 12 does not exist"),
        ({"units": []}, "got 0 neurons"),
        ({"units": [(2, 5)] * (MOST_UNITS + 1)}, f"got {MOST_UNITS + 1} neurons"),
        ({"group": "actions"}, "vlm_group 'actions' was not recorded"),
        ({"reduction": "median"}, "reduction 'median' was not recorded"),
        ({"stream": "expert", "units": [(3, 6)], "group": "actions", "denoise_step": 7}, "denoise_step 7"),
        ({"stream": "expert", "units": [(3, 6)], "group": "actions", "denoise_step": -4}, "denoise_step -4"),
        ({"first": 7}, "inference 7 does not exist"),
    ],
)
def test_what_an_episode_does_not_hold_is_refused(run, episode, change, why):
    asked = {"first": 0, "stream": "vlm", "units": [(2, 5)], "group": "task", **change}
    first, stream, units = (asked.pop(name) for name in ("first", "stream", "units"))
    with pytest.raises(SelectionError, match=re.escape(why)):
        activations(episode, first, stream, units, **asked)


def test_the_requests_answer_the_same(run, episode):
    with client_of(run, found=FOUND) as client:
        told = client.get(f"/api/episodes/{FIRST}").json()
        assert told["neurons"] == neurons(episode, FOUND)
        at = f"/api/episodes/{FIRST}/{told['version']}/neurons"
        asked = f"{at}/vlm?units=2:5,3:1&group={quote(CAMERA)}&reduction=max&first=1&each=1"
        expected = activations(episode, 1, "vlm", [(2, 5), (3, 1)], group=CAMERA, reduction="max", each=True)
        answer = client.get(asked)
        assert (answer.json(), answer.headers["Cache-Control"]) == (expected, "no-cache")
        found = client.get(f"{at}/expert?units=3:6&group=actions&denoise_step=0").json()
        assert found == activations(episode, 0, "expert", [(3, 6)], group="actions", denoise_step=0)
        odd = ["", "units=", "units=2", "units=2:5,", "units=-1:5", "units=2:1e3", "units=²:5"]
        for query in (*map(quote, odd), f"units={'9' * 10}:1"):
            assert client.get(f"{at}/vlm?{query}&group=task").status_code == 400
        assert client.get(f"{at}/vlm?units=2:99&group=task").status_code == 404
        assert client.get(f"{at}/vlm?units=2:5").status_code == 404  # no group
        answer = client.get(f"/api/episodes/{PLAIN}/latest/neurons/vlm?units=2:5&group=task")
        assert "without neurons" in answer.json()["error"]


class Counted(BackendArray):
    """An array that knows how many of its values were read at once."""

    def __init__(self, values, *, fill=None, shape=None):
        self.values, self.fill, self.most, self.total = values, fill, 0, 0
        self.shape, self.dtype = shape or values.shape, np.dtype(np.float16)

    def __getitem__(self, key):
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._read)

    def _read(self, key):
        sizes = [
            len(range(n)[part]) for n, part in zip(self.shape, key, strict=True) if isinstance(part, slice)
        ]
        n = int(np.prod(sizes))
        self.most, self.total = max(self.most, n), self.total + n
        return np.full(sizes, self.fill, np.float16) if self.values is None else self.values[key]


def fake(values, **sizes):
    """Return an episode that holds these activations alone: (inference, group, reduction, layer, unit)."""
    dims = ("inference", "vlm_group", "reduction", "vlm_neuron_layer", "vlm_unit")
    lazy = values if isinstance(values, np.ndarray) else indexing.LazilyIndexedArray(values)
    data = xr.Dataset({"vlm_neurons": xr.Variable(dims, lazy)})
    groups, reductions, n_layers = values.shape[1:4]
    coordinates = {
        "vlm_group": ["task", *(f"group {i}" for i in range(1, groups))],
        "reduction": ["mean", "max"][:reductions],
        "vlm_neuron_layer": np.arange(n_layers),
    }
    return SimpleNamespace(arrays=data.assign_coords(coordinates), n_inferences=values.shape[0])


def test_no_more_is_read_than_is_asked_for():
    """A unit of full size: 18 layers of 16384 neurons, five groups, 100 inferences are 295 million values."""
    counted = Counted(None, fill=0.5, shape=(100, 5, 2, 18, 16384))
    found = activations(fake(counted), 0, "vlm", [(3, 17)], group="task")
    assert found["mean"] == [0.5] * 100
    assert counted.total == 100 * 16384  # of the one layer, group and reduction
    counted.most = counted.total = 0
    activations(fake(counted), 0, "vlm", [(0, 1), (17, 5)], group="group 4", reduction="max")
    assert counted.total == 100 * 18 * 16384
    assert counted.most <= 2**22  # 8 MB at once


def test_a_strangers_layers_are_not_read_whatever_their_size():
    counted = Counted(None, fill=0, shape=(3, 1, 1, 1, 2**27))
    with pytest.raises(SelectionError, match="too large to be looked at"):
        activations(fake(counted), 0, "vlm", [(0, 1)], group="task")
    assert counted.total == 0


@pytest.mark.parametrize(
    "intervention",
    [
        {"kind": "neurons", "stream": "vlm", "units": {"random_like": {"1": [3]}, "seed": 0}},
        {"kind": "neurons", "stream": "tower", "units": {"1": [3]}},
        {"kind": "neurons", "stream": ["vlm"], "units": {"1": [3]}},
        {"kind": "neurons", "stream": "vlm", "units": [3]},
        {"kind": "neurons", "stream": "vlm", "units": {"1": "all", "2": [-3, "4", True, 1.5, None]}},
        {"kind": "neurons", "stream": "vlm", "units": {"9" * 5000: [1], "²": [1], "-1": [1]}},
        {"kind": "neurons"},
        {"kind": "residual", "stream": "vlm", "units": {"2": [5]}},
    ],
)
def test_what_a_stranger_says_of_fired_units_wrongly_is_passed_over(tmp_path, intervention):
    path = write_neurons(tmp_path, SyntheticPlan(n_frames=2, videos=False))
    fine = {"kind": "neurons", "stream": "vlm", "units": {"2": [5]}}
    condition = {"name": "odd", "text": "odd", "interventions": [intervention, fine]}
    edit_attributes(path, condition=condition)
    episode = open_episode(path)
    assert {stream: units for stream, units in fired_units(episode).items() if units} == {"vlm": [(2, 5)]}
    assert neurons(episode)["sets"][0]["units"] == {"vlm": [[2, 5]]}


def test_a_condition_that_fires_whole_layers_is_cut(tmp_path):
    path = write_neurons(tmp_path, SyntheticPlan(n_frames=2, videos=False))
    units = {"vlm": {"2": list(range(5000)), "3": [1]}}
    done = [{"kind": "neurons", "stream": "vlm", "units": units["vlm"]}]
    edit_attributes(path, condition={"name": "many", "text": "many", "interventions": done})
    (found,) = neurons(open_episode(path))["sets"]
    assert len(found["units"]["vlm"]) == N_UNITS["vlm"] + 1  # those that exist
    assert found["n_left_out"] == 5001 - 13


def test_an_inference_that_is_damaged_costs_no_other(tmp_path):
    path = write_neurons(tmp_path, SyntheticPlan(n_frames=6, n_executed=1, videos=False))
    whole = activations(open_episode(path), 0, "vlm", [(2, 5)], group="task")
    chunk = next(f for f in (path / "vlm_neurons").rglob("*") if f.parts[-5:] == ("3", "1", "0", "0", "0"))
    chunk.write_bytes(b"nonsense" * 20)
    found = activations(open_episode(path), 0, "vlm", [(2, 5)], group="task")
    assert found["mean"][3] is found["expected"][3] is None
    assert [found["mean"][i] for i in (0, 1, 2, 4, 5)] == [whole["mean"][i] for i in (0, 1, 2, 4, 5)]


# The found set


def table(path, *rows, columns="stream,layer,unit"):
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


def test_a_found_set_is_the_first_rows_of_its_table(tmp_path):
    file = table(tmp_path / "mine.csv", "vlm,2,5", "vlm,2,5", "expert,3,6", "vlm,0,1")
    assert read_found(file) == (FoundSet("mine.csv", {"vlm": [(2, 5), (0, 1)], "expert": [(3, 6)]}),)
    assert read_found(file, 2) == (FoundSet("mine.csv", {"vlm": [(2, 5)], "expert": [(3, 6)]}),)
    many = table(tmp_path / "many.csv", *(f"vlm,0,{i}" for i in range(MOST_UNITS + 50)))
    assert len(read_found(many)[0].units["vlm"]) == 20
    assert len(read_found(many, 10**6)[0].units["vlm"]) == MOST_UNITS


def test_words_and_the_sides_of_a_contrast_are_sets_of_their_own(tmp_path):
    columns = "word,stream,layer,unit"
    words = ("high,vlm,2,5", "high,vlm,0,1", "low,vlm,2,5", "low,vlm,3,2")
    found = read_found(table(tmp_path / "words.csv", *words, columns=columns), 1)
    assert found == (
        FoundSet("words.csv, high", {"vlm": [(2, 5)]}),
        FoundSet("words.csv, low", {"vlm": [(2, 5)]}),
    )
    columns = "stream,layer,unit,auc"
    contrast = ("expert,3,6,0.9", "expert,3,1,0.05", "vlm,2,5,0.8")
    found = read_found(table(tmp_path / "contrast.csv", *contrast, columns=columns))
    assert found == (
        FoundSet("contrast.csv, more active", {"expert": [(3, 6)], "vlm": [(2, 5)]}),
        FoundSet("contrast.csv, less active", {"expert": [(3, 1)]}),
    )
    (found,) = read_found(table(tmp_path / "one.csv", contrast[0], columns=columns))
    assert found.name == "one.csv, more active"
    many = (f"word{i},vlm,0,{i}" for i in range(50))
    assert len(read_found(table(tmp_path / "many.csv", *many, columns="word,stream,layer,unit"))) == 8


@pytest.mark.parametrize("command", ["view", "export-html"])
def test_a_table_that_is_none_is_said_in_one_line(run, tmp_path, monkeypatch, capsys, command):
    path = run.joinpath(*FIRST.split(":")).with_suffix(".zarr")
    file = tmp_path / "odd.csv"
    file.write_text("layer,unit\n2,5\n")
    for name, what in (("odd.csv", "stream"), ("none.csv", "none.csv")):
        status, _, said = run_cli(monkeypatch, capsys, command, path, "--neurons", tmp_path / name)
        *progress, line = said.strip().splitlines()
        assert (status, "error" in line, what in line) == (1, True, True), said
        assert all(one.startswith("Reading") for one in progress)


# The exported page


def test_an_export_holds_the_sets_and_says_so(episode, steered, tmp_path):
    file = table(tmp_path / "words.csv", "vlm,2,5", "vlm,3,1", "expert,3,6")
    settings = ExportSettings(frames="0,7", neurons=str(file), denoise_steps="0,2")
    data = Document(export_html(steered, tmp_path / "a.html", settings).path).data
    found = read_found(file)
    assert data["facts"]["neurons"] == neurons(steered, found)
    assert "the sets found: words.csv, fired: steer_up are here" in data["facts"]["excerpt"]
    # Two sets: three groups and two reductions of the vlm, one group and two steps of the expert.
    assert len(data["neurons"]) == 2 * (3 * 2 + 2 * 2)
    expected = activations(
        steered, 0, "expert", [(3, 6)], group="actions", reduction="max", denoise_step=0, each=True
    )
    assert json.loads(json.dumps(expected)) in data["neurons"]
    # Without a set, neurons are left out, and it says so.
    data = Document(export_html(episode, tmp_path / "b.html").path).data
    assert (data["facts"]["neurons"], "neurons" in data) == (None, False)
    assert "Neurons are left out." in data["facts"]["excerpt"]


def test_an_export_of_an_episode_without_neurons_does_not_speak_of_them(run, tmp_path):
    file = table(tmp_path / "words.csv", "vlm,2,5")
    settings = ExportSettings(neurons=str(file))
    data = Document(export_html(opened(run, PLAIN), tmp_path / "a.html", settings).path).data
    assert (data["facts"]["neurons"], "neurons" in data) == (None, False)
    assert "euron" not in data["facts"]["excerpt"]


def test_an_export_has_single_neurons_of_small_sets_alone(episode, tmp_path):
    n = MOST_EACH + 1
    file = table(
        tmp_path / "many.csv", *(f"vlm,{2 * (i // 12 > 0) + (i // 12 > 1)},{i % 12}" for i in range(n))
    )
    for top, has_each in ((n, False), (MOST_EACH, True)):
        settings = ExportSettings(frames="0", neurons=str(file), top=top)
        data = Document(export_html(episode, tmp_path / "a.html", settings).path).data
        assert {one["each"] is not None for one in data["neurons"]} == {has_each}


@pytest.mark.parametrize("wrong", [{"top": 0}, {"top": MOST_UNITS + 1}, {"top": 2.5}, {"neurons": 3}])
def test_odd_settings_of_neurons_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ExportSettings(**wrong)


# What the page shows


@pytest.fixture(scope="module")
def url(run):
    with client_of(run, found=FOUND) as client:
        yield f"http://127.0.0.1:{client.port}/"


def short(value):
    return "–" if value is None else f"{float(f'{value:.3g}'):g}"


def keys_of(page, side=0):
    """Return what the legend says of activation, chance and height, at the shown frame."""
    return page.locator(".neuron-keys").nth(side).locator("output").all_inner_texts()


def assert_keys(page, expected, beside, inference, side=0, unit=" m"):
    activation, chance = (short(expected[name][inference]) for name in ("mean", "expected"))
    wanted = [activation, chance, f"{short(beside)}{unit}"]
    until(page, lambda: keys_of(page, side) == wanted, f"the legend says {wanted}, not {keys_of(page, side)}")


def choose(page, label, value):
    page.locator("#neurons").get_by_role("combobox", name=re.compile(f"^{label}")).select_option(value)


@pytest.mark.browser
def test_the_panel_shows_the_found_set_beside_the_height(pages, url, episode):
    page = pages.open(f"{url}?episode={FIRST}&frame=5&step=0")
    panel = page.locator("#neurons")
    assert "words.csv: 2 neurons (vlm)" in panel.inner_text()
    assert "1 of the set was not recorded" in panel.inner_text()
    height = episode.arrays["state"].values[:, 2].tolist()
    units = [(2, 5), (3, 1)]
    assert_keys(page, activations(episode, 0, "vlm", units, group="task"), height[5], 2)
    choose(page, "at tokens", CAMERA)
    choose(page, "their", "max")
    asked = {"group": CAMERA, "reduction": "max"}
    assert_keys(page, activations(episode, 0, "vlm", units, **asked), height[5], 2)
    page.get_by_role("slider", name="Frame").fill("9")
    assert_keys(page, activations(episode, 0, "vlm", units, **asked), height[9], 4)
    choose(page, "beside", "joint_1")
    state = episode.arrays["state"].values[9, 1].tolist()
    assert_keys(page, activations(episode, 0, "vlm", units, **asked), state, 4, unit="")
    choose(page, "Neurons", "found:expert")
    asked = {"group": "actions", "reduction": "max", "denoise_step": 0}
    assert_keys(page, activations(episode, 0, "expert", [(3, 6)], **asked), state, 4, unit="")
    assert "denoise step 0" in panel.inner_text()
    # One neuron of one's own choice.
    choose(page, "Neurons", "unit:expert:3:6")
    choose(page, "stream", "vlm")
    panel.get_by_role("spinbutton", name="unit").fill("9")
    panel.get_by_role("spinbutton", name="unit").press("Enter")
    choose(page, "layer", "2")
    choose(page, "at tokens", "state")
    page.get_by_role("slider", name="Frame").fill("3")  # an inference without tokens of the state
    state = episode.arrays["state"].values[3, 1].tolist()
    none = {"mean": [None] * 6, "expected": [None] * 6}
    assert_keys(page, none, state, 1, unit="")
    until(page, lambda: "neurons=unit:vlm:2:9" in page.url, "the address says which")
    choose(page, "Neurons", "off")
    page.locator(".plot.neurons").wait_for(state="detached")
    assert not page.locator(".neuron-keys").count()


@pytest.mark.browser
def test_the_lines_lie_where_the_numbers_say_on_the_timelines_axis(pages, url, episode):
    page = pages.open(f"{url}?episode={FIRST}&frame=0&neurons=unit:vlm:2:5")
    found = activations(episode, 0, "vlm", [(2, 5)], group="task")
    until(page, lambda: len(keys_of(page)) == 3, "the activation is there")
    page.wait_for_timeout(100)
    shown = pixels(page.locator(".plot.neurons canvas"))
    box, outer = (page.locator(f".plot.neurons {part}").bounding_box() for part in (".u-over", "canvas"))
    lowest = min(found["mean"] + found["expected"])
    highest = max(found["mean"] + found["expected"])
    room = 0.08 * (highest - lowest)
    ratio = shown.shape[1] / outer["width"]
    accent = np.array([138, 34, 106])
    for inference in (0, 2, 4):
        middle = PLAN.n_executed * (inference + 0.5)  # frames begin half a frame before their number
        x = (box["x"] - outer["x"] + box["width"] * middle / PLAN.n_frames) * ratio
        share = (found["mean"][inference] - lowest + room) / (highest - lowest + 2 * room)
        y = (box["y"] - outer["y"] + box["height"] * (1 - share)) * ratio
        column = shown[:, round(x), :3].astype(int)
        rows = np.flatnonzero(np.abs(column - accent).max(axis=1) < 40)
        assert rows.size, f"nothing is drawn at inference {inference}"
        assert np.abs(rows - y).min() <= 3, (inference, rows, y)
    # The same frames lie below each other, and the mark goes through both.
    other = page.locator(".plot").first.locator(".u-over").bounding_box()
    assert (other["x"], other["width"]) == pytest.approx((box["x"], box["width"]), abs=1)
    page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + 10)
    until(page, lambda: int(drawn(page)["frame"]) == 9, "a click in it moves to the frame")
    mark = page.locator(".playhead").bounding_box()
    assert mark["x"] == pytest.approx(box["x"] + box["width"] * 9.5 / 12, abs=2)
    assert mark["y"] < box["y"]
    assert mark["y"] + mark["height"] > box["y"] + box["height"]


@pytest.mark.browser
def test_two_sides_show_the_same_neurons(pages, run, episode, steered):
    with pages.serving(run) as address:  # without a found set
        page = pages.open(f"{address}?episode={FIRST}&compare={STEERED}&frame=4")
        panel = page.locator("#neurons")
        assert panel.count() == 1
        until(page, lambda: "fired by steer_up: 3 neurons" in panel.inner_text(), "what the second fires")
        units = [(2, 5), (2, 7), (0, 1)]
        for side, one in enumerate((episode, steered)):
            found = activations(one, 0, "vlm", units, group="task")
            height = one.arrays["state"].values[4, 2].tolist()
            assert_keys(page, found, height, 2, side)
            assert "the other episode" in page.locator(".neuron-keys").nth(side).inner_text()
        assert "condition: steer_up: fires neurons" in page.locator(".side").nth(1).inner_text()
        # Of several conditions, episodes that begin from the same scene have the same name.
        offered = page.get_by_role("combobox", name=re.compile("^Compare"))
        named = "synthetic 0 · episode 1 (steer_up, success)"
        until(page, lambda: named in offered.inner_text(), "the condition is in its name")
        assert "hand's height, eef_z: " in page.locator(".neuron-keys").first.inner_text()
        # Both strips have the same scales.
        until(page, lambda: page.locator(".plot.neurons canvas").count() == 2, "both are drawn")
        page.wait_for_timeout(100)
        left, right = (pixels(one) for one in page.locator(".plot.neurons canvas").all())
        np.testing.assert_array_equal(left[:, :40], right[:, :40])  # the numbers beside the axes
        np.testing.assert_array_equal(left[:, -40:], right[:, -40:])
        # Beside an episode without neurons: a panel for the one, and nothing for the other.
        page = pages.open(f"{address}?episode={STEERED}&compare={PLAIN}")
        until(page, lambda: len(keys_of(page)) == 3, "the first's are there")
        assert page.locator(".plot.neurons").count() == page.locator(".neuron-keys").count() == 1
        page = pages.open(f"{address}?episode={PLAIN}")
        assert page.locator("#neurons, .plot.neurons, .neuron-keys").count() == 0
        page.get_by_role("button", name="Tour").click()
        page.get_by_text("1 of 10", exact=True).wait_for()


@pytest.mark.browser
def test_the_tour_stops_at_the_neurons_and_all_can_be_used_without_eyes(pages, url):
    page = pages.open(f"{url}?episode={FIRST}&tour=6&neurons=off")
    page.get_by_text("6 of 11", exact=True).wait_for()
    assert page.locator("#tour-title").inner_text().startswith("Neurons")
    until(page, lambda: page.locator("#neurons.toured").count(), "the panel is marked")
    page.locator(".plot.neurons").wait_for()
    page.get_by_role("button", name="End the tour").click()
    page.add_script_tag(path=AXE)
    found = page.evaluate("async () => (await axe.run('#neurons')).violations.map((one) => one.help)")
    assert found == []


@pytest.mark.browser
def test_an_exported_page_shows_its_sets(pages, steered, tmp_path):
    written = export_html(steered, tmp_path / "page.html")
    page = pages.open(f"file://{written.path}?frame=6&units=on")
    found = activations(steered, 0, "vlm", [(2, 5), (2, 7), (0, 1)], group="task")
    assert_keys(page, found, steered.arrays["state"].values[6, 2].tolist(), 3)
    choose(page, "Neurons", "fired:expert")
    found = activations(steered, 0, "expert", [(3, 6)], group="actions")
    assert_keys(page, found, steered.arrays["state"].values[6, 2].tolist(), 3)
    names = page.locator("#neurons select").first.inner_text()
    assert "one neuron" not in names
