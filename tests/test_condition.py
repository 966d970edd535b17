"""The condition of an episode, what was done to its policy, is said wherever a map of it is shown."""

import json

import pandas as pd
import pytest
from browser import until
from test_inspection import run_cli

from lerobot_attn import analysis, open_episode, open_run
from lerobot_attn.errors import SelectionError, StoreError
from lerobot_attn.explorer.facts import facts
from lerobot_attn.overlay.about import about
from lerobot_attn.overlay.film import Film
from lerobot_attn.overlay.settings import OverlaySettings, RerunSettings
from lerobot_attn.plot import plot
from lerobot_attn.report import CompareSettings, comparison_figure
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode
from lerobot_attn.verify import contact_sheet

TEXT = "attention to the target blocked, suffix, all layers"
DONE = [{"kind": "block_attention", "keys": {"role": "target"}}]
BLOCKED = {"name": "block_target", "text": TEXT, "interventions": DONE}
BASELINE = {"name": "baseline", "text": "nothing", "interventions": []}
SMALL = {"n_frames": 6, "grid": (4, 4), "n_text": 60}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A task's four episodes: two untouched, of which one says so, and two blocked."""
    folder = tmp_path_factory.mktemp("runs")
    for index, condition in enumerate((None, BASELINE, BLOCKED, BLOCKED)):
        said = {} if condition is None else {"condition": condition}
        write_planted_episode(folder, SyntheticPlan(**SMALL, episode_index=index), **said)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return list(open_run(folder))


def words(figure):
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def test_an_episode_knows_its_condition(run):
    untouched, baseline, blocked, _ = (episode.condition for episode in run)
    assert untouched == baseline == ("baseline", "", ())
    assert blocked == ("block_target", TEXT, tuple(DONE))


@pytest.mark.parametrize(
    "condition",
    [
        "block_target",
        {"text": TEXT},
        {"name": "x" * 201, "text": TEXT, "interventions": DONE},
        {"name": "x", "text": "y" * 2001, "interventions": DONE},
        {"name": "x", "text": ["y"], "interventions": DONE},
        {"name": "x", "text": "y", "interventions": {"kind": "task"}},
        {"name": "x", "text": "y", "interventions": ["task"]},
        {"name": "x", "text": "y", "interventions": DONE * 101},
    ],
)
def test_a_strangers_condition_is_a_line_or_the_store_is_refused(tmp_path, condition):
    path = write_planted_episode(tmp_path, SyntheticPlan(**SMALL, videos=False))
    metadata = path / "zarr.json"
    document = json.loads(metadata.read_text())
    document["attributes"]["condition"] = condition
    metadata.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=r"its condition is .*: damaged") as caught:
        open_episode(path)
    assert len(str(caught.value)) < 500


def test_several_lines_become_one(tmp_path):
    said = {"name": "two", "text": "first\n\x1b[31msecond", "interventions": DONE}
    episode = open_episode(
        write_planted_episode(tmp_path, SyntheticPlan(**SMALL, videos=False), condition=said)
    )
    assert episode.condition.text == "first \x1b[31msecond"
    assert "\x1b" not in words(plot(episode, "text"))


def test_tables_have_a_column(folder):
    table = open_run(folder).table
    assert table["condition"].tolist() == ["baseline", "baseline", "block_target", "block_target"]
    found = analysis.summarise_run(open_run(folder), "modality_share").table
    assert found.groupby("condition", observed=True)["path"].nunique().to_dict() == {
        "baseline": 2,
        "block_target": 2,
    }


def test_inspect_says_it_of_an_episode_and_of_a_run(folder, run, monkeypatch, capsys):
    _, blocked, _ = run_cli(monkeypatch, capsys, "inspect", run[2].path)
    assert TEXT in " ".join(blocked.split())
    for episode in run[:2]:
        assert "condition" not in run_cli(monkeypatch, capsys, "inspect", episode.path)[1]
    _, text, _ = run_cli(monkeypatch, capsys, "inspect", folder)
    assert text.count("condition: ") == 1
    assert f"condition: {TEXT}" in " ".join(text.split())
    said = json.loads(run_cli(monkeypatch, capsys, "inspect", folder, "--json")[1])
    assert said["conditions"] == {"baseline": "", "block_target": TEXT}


@pytest.mark.parametrize("kind", ["image", "text", "timeline"])
def test_captions_of_figures_say_it(run, kind):
    assert f"condition: {TEXT}" in words(plot(run[2], kind))
    assert "condition" not in words(plot(run[0], kind))


def test_the_contact_sheet_and_the_checks_say_it(run, tmp_path, monkeypatch, capsys):
    assert f"condition: {TEXT}" in words(contact_sheet(run[2]))
    assert "condition" not in words(contact_sheet(run[1]))
    sheet = tmp_path / "sheet.png"
    _, text, _ = run_cli(monkeypatch, capsys, "verify", run[2].path, "--no-sheet", "-o", sheet)
    assert f"condition: {TEXT}" in " ".join(text.split())
    _, text, _ = run_cli(monkeypatch, capsys, "verify", run[1].path, "--no-sheet", "--json")
    assert json.loads(text)["condition"] == ""


def test_an_overlay_has_it_below_the_pictures(run, monkeypatch):
    import lerobot_attn.overlay.film as film

    lines, broken = [], film.broken
    monkeypatch.setattr(film, "broken", lambda parts, *rest: lines.extend(parts) or broken(parts, *rest))
    Film(run[2], OverlaySettings())
    assert f"condition: {TEXT}" in lines
    lines.clear()
    Film(run[1], OverlaySettings())
    assert not any("condition" in line for line in lines)


def test_rerun_says_it_beside_the_maps(run):
    found = [[*about(episode, {}, RerunSettings(), 1.0, True)] for episode in run[1:3]]
    assert f"condition: {TEXT}" in found[1]
    assert not any("condition" in line for line in found[0])


def test_the_page_is_told(run):
    assert [facts(episode)["condition"] for episode in run] == ["", "", TEXT, TEXT]


def test_a_comparison_says_which_side_is_which(run):
    text = words(comparison_figure(run[:2], run[2:], CompareSettings(n_phases=3)))
    assert text.count("condition") == 1
    assert text.index(TEXT) > text.index("B: 2 episodes")
    mixed = words(comparison_figure(run[1:3], run[2:], CompareSettings(n_phases=3)))
    assert f"condition: {TEXT} | none" in mixed


def test_episodes_are_split_by_their_condition(run):
    a, b = analysis.split_by_condition(run[::-1])
    assert [episode.condition.name for episode in (*a, *b)] == [*["baseline"] * 2, *["block_target"] * 2]
    a, b = analysis.split_by_condition([e.arrays for e in run], ["block_target", "baseline"])
    assert (len(a), len(b)) == (2, 2)
    assert b[0].equals(run[0].arrays)
    with pytest.raises(SelectionError, match=r"of baseline \(2\); expected two conditions"):
        analysis.split_by_condition(run[:2])
    with pytest.raises(SelectionError, match=r"got baseline, nothing, expected two of baseline \(2\), bl"):
        analysis.split_by_condition(run, ["baseline", "nothing"])


@pytest.mark.parametrize(
    ("by", "first"), [("condition", "baseline"), ("condition=block_target,baseline", "block_target")]
)
def test_the_command_compares_conditions(folder, tmp_path, monkeypatch, capsys, by, first):
    status, *_ = run_cli(monkeypatch, capsys, "compare", folder, "--by", by, "-o", tmp_path)
    assert status == 0
    sides = [x for x in (tmp_path / "report.md").read_text().splitlines() if x.startswith(("- A", "- B"))]
    assert [TEXT in side for side in sides] == [first != "baseline", first == "baseline"]
    assert (pd.read_csv(tmp_path / "overall.csv")[["n_a", "n_b"]] == 2).all(axis=None)


@pytest.mark.parametrize("by", ["success=a,b", "conditions", "condition=baseline"])
def test_the_command_refuses_other_sides(folder, tmp_path, monkeypatch, capsys, by):
    status, _, error = run_cli(monkeypatch, capsys, "compare", folder, "--by", by, "-o", tmp_path / "out")
    assert status == 1
    assert error.startswith(("error: --by: got", "error: conditions: got"))
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.browser
def test_the_page_says_it_in_the_table_above_the_maps_and_beside_a_compared_one(folder, pages):
    with pages.serving(folder) as address:
        page = pages.open(address, wait=False)
        table = page.locator("table.episodes")
        table.get_by_text(TEXT).locator("visible=true").first.wait_for()
        assert table.get_by_role("columnheader", name="Condition").count() == 1
        assert table.get_by_text(TEXT).locator("visible=true").count() == 2
        page.get_by_role("searchbox").fill("blocked")
        until(page, lambda: table.locator("tbody tr").count() == 2, "those that were found are there")
        name = "attention:synthetic_0:episode_0000"
        page = pages.open(f"{address}?episode={name}2")
        assert page.get_by_text(f"condition: {TEXT}", exact=True).count() == 1
        page = pages.open(f"{address}?episode={name}0&compare={name}3")
        page.locator(".side-title").get_by_text(TEXT).wait_for()
        assert page.get_by_text(TEXT).count() == 1
        page = pages.open(f"{address}?episode={name}1")
        assert page.get_by_text("condition").count() == 0
    assert not pages.said
