"""Any legal path is served, any text arrives as it is: in ids, addresses, tables and exported pages."""

import json
import os
import shutil
from urllib.parse import quote

import numpy as np
import pytest
from test_explorer import client_of, edit_attributes
from test_explorer_export import Document, page  # noqa: F401  (a fixture)

from lerobot_attn import open_episode
from lerobot_attn.explorer.export import export_html
from lerobot_attn.explorer.library import Library
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

PLAN = SyntheticPlan(n_frames=3, image_px={"observation.images.image": (32, 32)}, n_empty_cameras=0)
NAMES = (
    "h#1",
    "a?b=c&d",
    "x::y",
    "run:a",
    "[1]",
    "two words",
    "éü",
    "日本",
    "50%",
    "%2F",
    "a+b",
    "a;b",
    "it's",
    'say "hi"',
    "back\\slash",
    "$HOME",
    "-o",
    "~",
    "*",
    "a.b.zarr.c",
    "<b>",
    "line\nbreak",
    os.fsdecode(b"\xff\xfe"),
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A task's folder with an episode and its video."""
    return write_planted_episode(tmp_path_factory.mktemp("recorded"), PLAN).parent


def is_all_there(client, id_):
    """Whether everything of an episode is answered, by the id that the run told."""
    at = f"/api/episodes/{quote(id_, safe='')}"
    facts = client.get(at).json()
    at = f"{at}/{facts['version']}"
    (camera,) = (quote(camera["name"], safe="") for camera in facts["cameras"])
    for path in (
        "/timeline",
        "/shares",
        "/ranges",
        "/inferences/0/tokens",
        "/inferences/0/means/2",
        f"/cameras/{camera}/frames/0.jpg",
        f"/cameras/{camera}.mp4",
    ):
        answer = client.get(at + path)
        assert answer.status_code == 200, (path, answer.text)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_run_in_any_folder_is_served(recorded, tmp_path, name):
    folder = tmp_path / name / "attention" / name
    shutil.copytree(recorded, folder)
    with client_of(tmp_path / name) as client:
        run = client.get("/api/run").json()
        assert run["damaged"] == []
        (episode,) = run["episodes"]
        assert episode["id"].isprintable()
        is_all_there(client, episode["id"])
        refused = client.get(f"/api/episodes/{quote(episode['id'] + 'x', safe='')}")
        assert refused.status_code == 404
        assert len(refused.json()["error"].splitlines()) == 1


@pytest.mark.parametrize("name", [*NAMES, "episode", "my.store", "x.zarr"], ids=ascii)
def test_a_store_of_any_name_is_served_alone(recorded, tmp_path, name, page):  # noqa: F811
    store = tmp_path / name
    shutil.copytree(recorded, tmp_path / "copy")
    (tmp_path / "copy" / "episode_00000.zarr").rename(store)
    shutil.copy(tmp_path / "copy" / "episode_00000.image.mp4", tmp_path)
    with client_of(store) as client:
        run = client.get("/api/run").json()
        (episode,) = run["episodes"]
        assert (run["is_episode"], run["damaged"]) == (True, [])
        is_all_there(client, episode["id"])
    target = tmp_path / f"{'page' if name == '-o' else name.replace('/', '')}.html"
    written = export_html(open_episode(store), target, page=page)
    assert Document(written.path).data["row"]["id"] == episode["id"]


@pytest.mark.parametrize("there", ["relative", ".", "..", "trailing"])
def test_a_path_that_names_no_folder_leads_to_one(recorded, tmp_path, monkeypatch, there):
    shutil.copytree(recorded, tmp_path / "task")
    store = tmp_path / "task" / "episode_00000.zarr"
    monkeypatch.chdir(
        {"relative": tmp_path, ".": store, "..": store / "token_id", "trailing": tmp_path}[there]
    )
    path = {"relative": "task/episode_00000.zarr", "trailing": "task/episode_00000.zarr/"}.get(there, there)
    with client_of(path) as client:
        (episode,) = client.get("/api/run").json()["episodes"]
        assert episode["id"] == "episode_00000"
        is_all_there(client, episode["id"])


def test_no_two_stores_have_one_id(recorded, tmp_path):
    for folder in ("a/b", "a:b", "a%3Ab", "a%3A/b", "a:/b", "a/:b"):
        shutil.copytree(recorded, tmp_path / folder / "deep")
    library = Library(tmp_path)
    ids = [summary.id for summary in library.look().summaries]
    assert len(set(ids)) == len(ids) == 6
    paths = {library.episode(id_).path.relative_to(tmp_path).parts[:-2] for id_ in ids}
    assert len(paths) == 6


def test_task_groups_with_a_slash_are_served_apart(tmp_path):
    """Namespaced environments: "ns/env" and "ns" with a task "env" are two groups."""
    for index, group in enumerate(("ns/env", "ns", "other/ns/env", "/ns/", "a//b")):
        path = write_planted_episode(
            tmp_path / "written", SyntheticPlan(n_frames=3, episode_index=index, videos=False)
        )
        folder = tmp_path / "run" / "attention" / f"{index}" / "deeper" / "env_0"
        shutil.copytree(path, folder / path.name)
        edit_attributes(folder / path.name, task_group=group)
    with client_of(tmp_path / "run") as client:
        episodes = client.get("/api/run").json()["episodes"]
        assert [episode["task_group"] for episode in episodes] == [
            "ns/env",
            "ns",
            "other/ns/env",
            "/ns/",
            "a//b",
        ]
        for episode in episodes:
            facts = client.get(f"/api/episodes/{quote(episode['id'], safe='')}").json()
            assert facts["task_group"] == episode["task_group"]


TEXTS = {
    "dollars": "pick up the $$ coin $\\foo$ $bowl_x$ $",
    "Chinese": "把红色积木放进碗里",
    "emoji": "pick 🤖👨‍👩‍👧 up",
    "right to left": "ضع المكعب الأحمر في الوعاء",
    "newlines": "first\nsecond\r\n\tthird",
    "separators": "a\u2028b\u2029c\x85d",
    "markup": "</script><!--<script>&lt;b&gt;\"'`${x}`<",
    "controls": "a\x00b\x1b[31mc\x7f",
    "a long word": "x" * 3000,
    "half of a pair": "a\ud83eb",
    "an empty one": "",
    "combining": "e\u0301\u0323",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_any_instruction_arrives_as_it_is(recorded, tmp_path, page, text):  # noqa: F811
    shutil.copytree(recorded, tmp_path / "run" / "task")
    store = tmp_path / "run" / "task" / "episode_00000.zarr"
    edit_attributes(store, task=text, task_group=text)
    with client_of(tmp_path / "run") as client:
        (episode,) = client.get("/api/run").json()["episodes"]
        assert (episode["task"], episode["task_group"]) == (text, text)
        facts = client.get(f"/api/episodes/{episode['id']}").json()
        assert (facts["task"], facts["task_group"]) == (text, text)
    data = Document(export_html(open_episode(store), tmp_path / "page.html", page=page).path).data
    assert (data["facts"]["task"], data["row"]["task"]) == (text, text)


@pytest.mark.parametrize("task", [text for name, text in TEXTS.items() if name not in ("half of a pair",)])
def test_any_words_tokens_arrive_as_they_are(tmp_path, task):
    if not 1 <= len(task.split()) <= 5:
        task = f"do {task[:20]}"
    plan = SyntheticPlan(n_frames=3, videos=False, task=task)
    path = write_planted_episode(tmp_path, plan)
    data = open_episode(path).arrays
    with client_of(tmp_path) as client:
        (episode,) = client.get("/api/run").json()["episodes"]
        at = f"/api/episodes/{episode['id']}/{episode['version']}"
        tokens = client.get(f"{at}/inferences/0/tokens").json()
    assert tokens["text"] == [str(piece) for piece in data["token_text"].values[0]]
    words = [group["label"] for group in tokens["groups"] if group["kind"] == "task"]
    assert words == [word.strip() for word in task.split()]


@pytest.mark.parametrize(
    "name", ["observation.images.a/b", "observation.images.top cam", "observation.images.é#1"]
)
def test_a_camera_of_any_name_has_its_pictures(tmp_path, name):
    path = write_planted_episode(
        tmp_path,
        SyntheticPlan(n_frames=3, image_px={"observation.images.image": (32, 32)}, n_empty_cameras=0),
    )
    metadata = json.loads((path / "zarr.json").read_text())
    text = json.dumps(metadata["attributes"]).replace("observation.images.image", name)
    metadata["attributes"] = json.loads(text)
    metadata["attributes"]["videos"][name]["path"] = "episode_00000.image.mp4"
    (path / "zarr.json").write_text(json.dumps(metadata))
    with client_of(tmp_path) as client:
        (episode,) = client.get("/api/run").json()["episodes"]
        assert episode["camera"] == name
        is_all_there(client, episode["id"])
        assert np.ndim(client.get(f"/api/episodes/{episode['id']}").json()["fps"]) == 0
