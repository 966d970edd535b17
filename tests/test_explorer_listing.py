"""A part of the run's table: filtered, sorted and paged by the server; and thousands that are looked at."""

import json
import shutil
from urllib.parse import quote

import pytest
from test_explorer import client_of
from test_store import write_episode

from lerobot_attn.errors import ConfigError
from lerobot_attn.explorer import library as library_module
from lerobot_attn.explorer import listing as listing_module
from lerobot_attn.explorer import rounds as rounds_module
from lerobot_attn.explorer.library import Library
from lerobot_attn.explorer.listing import Listing, Wanted, news, part, wanted_of
from lerobot_attn.explorer.rounds import Rounds
from lerobot_attn.explorer.summary import Summary
from lerobot_attn.store.pack import pack
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.runs import open_run

TASKS = ("pick up the Milk", "pick up the soup")


def summary(number, *, version="v", **facts):
    """Return an episode's row: of three one fails, of seven one is not complete, of two one is blocked."""
    known = {
        "task": TASKS[number % 2],
        "task_group": "libero_object",
        "task_id": number % 2,
        "episode": number,
        "success": number % 3 != 0,
        "complete": number % 7 != 6,
        "random_weights": False,
        "policy_remark": "",
        "condition": "no token reads it" if number % 2 else "",
        "condition_name": "block_target" if number % 2 else "baseline",
        "n_frames": 10 + number * 7 % 5,
        "n_inferences": 4,
        "stored_bytes": 1000 - number,
        "camera": None,
    }
    return Summary(f"task:episode_{number:05d}", version, {**known, **facts})


def numbers(found):
    return [row["episode"] for row in found["episodes"]]


LISTING = Listing([summary(number) for number in range(14)])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, range(14)),
        ({"find": "MILK"}, range(0, 14, 2)),
        ({"find": "soup  failure"}, [3, 9]),
        ({"find": "libero_object 00012"}, [12]),
        ({"find": "no token reads"}, range(1, 14, 2)),
        ({"find": "block_target 7"}, [7]),
        ({"find": "tea"}, []),
        ({"outcome": "failure"}, [0, 3, 9, 12]),
        ({"outcome": "incomplete"}, [6, 13]),
        ({"outcome": "unknown"}, []),
        ({"task": TASKS[0], "outcome": "success"}, [2, 4, 8, 10]),
        ({"task": "pick up"}, []),
        ({"condition": "baseline", "outcome": "incomplete"}, [6]),
        ({"descending": True}, range(13, -1, -1)),
        ({"sort": "size"}, range(13, -1, -1)),
        ({"sort": "frames"}, [0, 5, 10, 3, 8, 13, 1, 6, 11, 4, 9, 2, 7, 12]),
        ({"sort": "frames", "descending": True}, [2, 7, 12, 4, 9, 1, 6, 11, 3, 8, 13, 0, 5, 10]),
        ({"sort": "outcome", "find": "0000"}, [1, 2, 4, 5, 7, 8, 0, 3, 9, 6]),
        ({"sort": "condition", "descending": True}, [*range(1, 14, 2), *range(0, 14, 2)]),
        ({"sort": "task"}, [*range(0, 14, 2), *range(1, 14, 2)]),
    ],
)
def test_rows_are_filtered_and_sorted(wanted, expected):
    found = part(LISTING, Wanted(**wanted))
    assert numbers(found) == [*expected]
    assert (found["offset"], found["n_found"]) == (0, len(expected))


def test_what_is_not_known_comes_last_either_way():
    rows = Listing([summary(1, success=None), summary(2, task=""), summary(3), summary(4)])
    for descending, outcome, task in (
        (False, [2, 4, 3, 1], [4, 1, 3, 2]),
        (True, [3, 2, 4, 1], [1, 3, 4, 2]),
    ):
        assert numbers(part(rows, Wanted(sort="outcome", descending=descending))) == outcome
        assert numbers(part(rows, Wanted(sort="task", descending=descending))) == task


@pytest.mark.parametrize(
    ("wanted", "offset", "expected"),
    [
        ({"limit": 5}, 0, range(5)),
        ({"offset": 5, "limit": 5}, 5, range(5, 10)),
        ({"offset": 10, "limit": 5}, 10, range(10, 14)),
        ({"offset": 14, "limit": 5}, 10, range(10, 14)),
        ({"offset": 999, "limit": 7}, 7, range(7, 14)),
        ({"offset": 999}, 14, []),
        ({"offset": 12}, 12, [12, 13]),
        ({"offset": 5, "limit": 2, "first": "task:episode_00003"}, 3, [3, 4]),
        ({"offset": 5, "limit": 2, "first": "task:gone"}, 5, [5, 6]),
        ({"offset": 2, "limit": 2, "first": "task:episode_00003", "task": TASKS[0]}, 2, [4, 6]),
        ({"offset": 4, "limit": 4, "find": "tea"}, 0, []),
    ],
)
def test_a_part_begins_where_it_is_wanted(wanted, offset, expected):
    found = part(LISTING, Wanted(**wanted))
    assert (found["offset"], numbers(found)) == (offset, [*expected])


def test_the_overview_is_of_all_and_bounded(monkeypatch):
    overview = LISTING.overview
    assert overview["n_episodes"] == 14
    assert overview["outcomes"] == {"success": 8, "failure": 4, "incomplete": 2, "unknown": 0}
    assert overview["tasks"] == [{"name": name, "n": 7} for name in TASKS]
    assert [choice["name"] for choice in overview["conditions"]] == ["baseline", "block_target"]
    assert overview["is_changed"] is True
    monkeypatch.setattr(listing_module, "MOST_CHOICES", 1)
    monkeypatch.setattr(listing_module, "MOST_PROBLEMS", 2)
    few = Listing([summary(0), summary(1), summary(3)], ["a", "b", "c"], 5).overview
    assert few["tasks"] == [{"name": TASKS[1], "n": 2}]
    assert (few["damaged"], few["n_damaged"], few["n_unread"]) == (["a", "b"], 3, 5)


@pytest.mark.parametrize(
    "said",
    ["sort=colour", "sort=--size", "outcome=all", "offset=-1", "offset=1.5", "limit=0", "limit=" + "9" * 12],
)
def test_what_cannot_be_wanted_is_refused(said):
    name, value = said.split("=")
    with pytest.raises(ConfigError, match=f"^{name}: got '-*[^']*', expected"):
        wanted_of({name: value})


def test_news_are_what_differs():
    grown, other = summary(1, n_frames=99), summary(20)
    before = Listing([summary(0), summary(1), summary(2)], ["a"], 3)
    told = news(before, Listing([summary(1, n_frames=99), summary(2), other], ["a"], 2))
    assert told == {
        "changed": [grown.to_dict(), other.to_dict()],
        "grown": [grown.id],
        "removed": [summary(0).id],
        "damaged": ["a"],
        "n_damaged": 1,
        "n_unread": 2,
    }
    assert news(before, Listing([*before.summaries], ["a"], 3)) is None
    assert news(before, Listing([*before.summaries], ["b"], 3))["changed"] == []


def test_each_has_its_turn_and_what_changed_always(monkeypatch):
    monkeypatch.setattr(rounds_module, "_AT_LEAST", 3)
    now = 0.0
    monkeypatch.setattr(rounds_module.time, "monotonic", lambda: now)
    rounds = Rounds()
    rounds.over(map(str, range(10)))
    assert rounds.turn() == ["0", "1", "2"]
    rounds.note_change("7")
    assert rounds.turn() == ["7", "3", "4", "5"]
    assert rounds.turn() == ["7", "6", "8"]
    assert rounds.turn() == ["7", "9", "0", "1"]
    now = rounds_module._ROUND_S / 2
    assert len(rounds.turn()) == 6  # half of them in half of the time, and the one
    now = 1000.0
    assert sorted(rounds.turn(), key=int) == [str(number) for number in range(10)]
    assert rounds.turn() == ["7", "8", "9"]  # what changed long ago has its turn only
    rounds.over(["a"])
    assert rounds.turn() == ["a"]
    rounds.over([])
    assert rounds.turn() == []


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Thirty episodes of two tasks, their metadata alone: all that the table reads."""
    folder = tmp_path_factory.mktemp("many")
    write_episode(folder / "one.zarr", 1)
    metadata = json.loads((folder / "one.zarr" / "zarr.json").read_text())
    for number in range(30):
        add_store(folder / "run", metadata, number)
    return folder / "run", metadata


def add_store(run, metadata, number, folder=None):
    """Make an episode of one's metadata, in one step: nobody finds it half written."""
    store = run / (folder or f"task_{number % 2}") / f"episode_{number:05d}.zarr"
    new = run.parent / "new"
    new.mkdir(parents=True)
    store.parent.mkdir(parents=True, exist_ok=True)
    facts = {"episode_index": number, "task": f"fetch {number % 2} & go", "success": number % 3 > 0}
    attributes = metadata["attributes"] | facts | {"created": str(number)}
    (new / "zarr.json").write_text(json.dumps(metadata | {"attributes": attributes}))
    return new.rename(store)


def test_a_part_of_the_table_is_asked_for(many):
    run, _ = many
    with client_of(run) as client:
        n_unread = 30
        while n_unread:  # a slow machine does not read all of them at once
            everything = client.get("/api/run").json()
            n_unread = everything["n_unread"]
        assert [len(everything["episodes"]), everything["n_found"]] == [30, 30]
        of_task = f"task={quote('fetch 1 & go')}"
        query = f"{of_task}&outcome=failure&sort=-path&offset=2&limit=2&find=episode_000"
        found = client.get(f"/api/run?{query}").json()
        assert numbers(found) == [15, 9]
        assert (found["offset"], found["n_found"], found["n_episodes"]) == (2, 5, 30)
        assert found["outcomes"] == {"success": 20, "failure": 10, "incomplete": 0, "unknown": 0}
        assert found["episodes"][0] in everything["episodes"]
        first = client.get(f"/api/run?limit=1&first={found['episodes'][0]['id']}").json()
        assert numbers(first) == [15]
        refused = client.get("/api/run?sort=colour")
        assert (refused.status_code, "sort: got 'colour', expected one of path, task" in refused.text) == (
            400,
            True,
        )


def test_a_large_run_is_looked_at_in_turns(many, monkeypatch):
    run, _ = many
    monkeypatch.setattr(rounds_module, "_AT_LEAST", 5)
    monkeypatch.setattr(rounds_module, "_ROUND_S", 1e9)
    library = Library(run, rescan_s=1e9)
    assert len(library.look().summaries) == 30
    looked = []
    signature_of = library_module.signature_of
    monkeypatch.setattr(
        library_module, "signature_of", lambda store: looked.append(store) or signature_of(store)
    )
    listing = library.look()
    assert len(looked) == 5
    assert library.look() is listing  # nothing has changed: whoever compares is done
    for _ in range(4):
        library.look()
    assert len({*looked}) == 30


def test_what_grows_is_read_before_what_nobody_has_seen_yet(many, tmp_path):
    _, metadata = many
    stores = [add_store(tmp_path, metadata, number) for number in range(0, 8, 2)]
    library = Library(tmp_path, rescan_s=0)
    library.look(0)
    listing = library.look(0)
    assert [len(listing.summaries), listing.n_unread] == [2, 2]
    attributes = metadata["attributes"] | {"task": "grown"}
    (stores[1] / "zarr.json").write_text(json.dumps(metadata | {"attributes": attributes}))
    listing = library.look(0)
    assert [listing.summaries[1].facts["task"], len(listing.summaries), listing.n_unread] == ["grown", 2, 2]


def test_who_asks_while_another_reads_gets_what_is_known(many):
    run, _ = many
    library = Library(run)
    known = library.look()
    with library._looking:
        assert library.look(0.01) is known


# Rows from the run's index

FILM = {"top": {"path": "episode_00000.mp4"}}


@pytest.fixture
def opened(monkeypatch):
    """The stores that the explorer opened, in their order."""
    found = []
    monkeypatch.setattr(
        library_module, "open_episode", lambda store: found.append(store) or open_episode(store)
    )
    return found


@pytest.fixture
def indexed(many, tmp_path):
    """A run of twenty episodes whose stores list videos, mostly none; its index is there."""
    _, metadata = many
    said = {
        0: {"videos": FILM},
        1: {"videos": {"front": {"path": "episode_00001.mp4"}, **FILM}},  # the first one's file is missing
        2: {"videos": {"front": {"path": "../episode_00000.mp4"}, **FILM}},
        3: {"complete": False, "videos": {}},
        5: {"condition": {"name": "blind", "text": "no  camera", "interventions": [{"kind": "block"}]}},
        6: {"policy": {"type": "demo", "random_weights": True}},
        7: {"policy": {"type": "x", "remark": "odd\nmaps"}, "seed": 7},
        8: {"seed": "eight", "task_id": None},
        9: {"success": None},
    }
    stores = []
    for number in range(20):
        own = {"videos": {}, "seed": 1, "task_group": "kitchen", "task_id": 0, **said.get(number, {})}
        if number == 4:
            del own["videos"]  # it does not say whether there are any
        one = {**metadata, "attributes": {**metadata["attributes"], **own}}
        stores.append(add_store(tmp_path / "run", one, number, "kitchen_0"))
    for folder in (tmp_path / "run", stores[0].parent):
        (folder / "episode_00000.mp4").touch()
    open_run(tmp_path / "run").rows()
    return stores


def test_of_what_the_index_has_no_store_is_opened(indexed, tmp_path, opened):
    (index,) = (tmp_path / "run").rglob("*.parquet")
    rows = Library(tmp_path / "run").look()
    assert opened == indexed[1:5]
    assert (len(rows.summaries), rows.n_unread) == (20, 0)
    assert [row.facts["camera"] for row in rows.summaries[:4]] == ["top", "top", "top", None]
    index.unlink()
    opened.clear()
    assert Library(tmp_path / "run").look().summaries == rows.summaries  # as the stores say, versions too
    assert opened == indexed


def test_rows_from_the_index_are_of_the_recordings_that_are_served(indexed, tmp_path):
    library = Library(tmp_path / "run")
    for row in library.look().summaries:
        library.episode(row.id, row.version)


def test_a_store_counts_and_not_its_row_in_the_index(indexed, tmp_path, opened):
    before = Library(tmp_path / "run").look().summaries
    opened.clear()
    changed, broken, gone = indexed[10:13]
    metadata = json.loads((changed / "zarr.json").read_text())
    metadata["attributes"] |= {"task": "grown"}
    (changed / "zarr.json").write_text(json.dumps(metadata))
    (broken / "zarr.json").write_text("{")
    shutil.rmtree(gone)
    listing = Library(tmp_path / "run").look()
    assert opened == [*indexed[1:5], changed, broken]
    assert [row.facts["task"] for row in listing.summaries if row not in before] == ["grown"]
    assert len(listing.summaries) == 18
    assert [str(broken) in problem for problem in listing.problems] == [True]


def test_what_changes_later_is_read_anew(indexed, tmp_path, opened):
    library = Library(tmp_path / "run", rescan_s=0)
    library.look()
    opened.clear()
    metadata = json.loads((indexed[15] / "zarr.json").read_text())
    metadata["attributes"] |= {"task": "grown"}
    (indexed[15] / "zarr.json").write_text(json.dumps(metadata))
    assert library.look().summaries[15].facts["task"] == "grown"
    assert opened == [indexed[15]]


def test_an_episode_in_both_forms_is_refused_whatever_the_index_says(tmp_path, indexed, opened):
    one = indexed[17]
    kept = shutil.copytree(one, tmp_path / "kept")
    (done,) = pack(one)
    shutil.copytree(kept, one)  # as if packing had been interrupted: the index knows this form
    listing = Library(tmp_path / "run").look()
    assert len(listing.summaries) == 19
    assert ["lies beside it" in problem for problem in listing.problems] == [True]
    shutil.rmtree(one)
    open_run(tmp_path / "run").rows()
    opened.clear()
    assert Library(tmp_path / "run").look().summaries[17].facts["episode"] == 17
    assert done.path not in opened


def test_index_rows_keep_to_the_time_that_there_is(indexed, tmp_path, opened):
    library = Library(tmp_path / "run")
    for n_read in range(1, 21):
        listing = library.look(0)
        assert (len(listing.summaries), listing.n_unread) == (n_read, 20 - n_read)
    assert opened == indexed[1:5]
    assert library._index is None  # which of many episodes is large
