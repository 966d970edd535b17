"""The Hub: a run goes there and comes back, whole, without what it says of a machine, also in pieces."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_inspection import run_cli

from lerobot_attn import open_run
from lerobot_attn.errors import RANDOM_WEIGHTS, ConfigError, SetupError, StoreError
from lerobot_attn.report.card import write_card
from lerobot_attn.store import hub, hub_access
from lerobot_attn.store.hub import CARD, CARD_MARK, SHEET, pull, push
from lerobot_attn.store.hub_access import parsed
from lerobot_attn.store.pack import pack
from lerobot_attn.store.parcel import pack_up
from lerobot_attn.store.scrub import Scrubber, differences
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

huggingface_hub = pytest.importorskip("huggingface_hub")
from hub_server import TOKEN, serving  # noqa: E402
from huggingface_hub import constants  # noqa: E402

NAME = "me/attn"
PLAN = SyntheticPlan(n_frames=6, layers=(3,), image_px={"observation.images.image": (64, 64)}, fps=20)
CHECKPOINT = "/scratch/jane/train/last/pretrained_model"
POLICY = {"type": "pi05", "path": CHECKPOINT, "n_layers": 4, "remark": "a remark"}
STORE = "attention/synthetic_0/episode_00000.zarr"
SECRETS = (b"jane", b"scratch", b"hunter2")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of a success, a failure and an incomplete episode, beside what is nobody else's business."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    write_planted_episode(folder, PLAN, policy=POLICY, error=f"[Errno 28] No space: '{CHECKPOINT}/x'")
    condition = {"name": "blind", "interventions": [{"kind": "occlude"}], "text": "blind: wrist occluded"}
    other = replace(PLAN, episode_index=1, success=False, seed=1)
    write_planted_episode(folder, other, policy=POLICY | {"random_weights": True}, condition=condition)
    write_planted_episode(folder, replace(PLAN, episode_index=2, complete=False), policy=POLICY)
    (folder / "attention" / ".lerobot-attn.lock").write_text("process 7 on jane-pc")
    (folder / "notes.txt").write_text("hunter2")
    (folder / STORE / ".hidden").write_text("hunter2")
    return folder


@pytest.fixture
def run(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "run")


@pytest.fixture
def there(monkeypatch):
    """An empty Hub, and nothing that keeps requests from it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_access, "_WAITS_S", (0.0, 0.0, 0.0))
    with serving() as found:
        found.api = huggingface_hub.HfApi(endpoint=found.endpoint, token=TOKEN)
        yield found


def send(run, there, **options):
    return push(pack_up(open_run(run)), NAME, api=there.api, **options)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


# There and back


def test_a_run_comes_back_as_it_went_without_what_it_says_of_a_machine(run, there, tmp_path):
    found = open_run(run)
    parcel = pack_up(found)
    assert parcel.left_out == ("attention/synthetic_0/episode_00002.zarr: it is incomplete",)
    assert parcel.replaced[CHECKPOINT] == "…/pretrained_model"
    seen = []
    done = push(
        parcel,
        NAME,
        beside=write_card(found, parcel, NAME),
        api=there.api,
        progress=lambda *n: seen.append(n),
    )
    assert (done.private, done.n_sent, done.n_there) == (True, 2, 0)
    assert there.repos[NAME]["private"] is True
    assert all(one <= total for one, total in seen)
    assert seen[-1][0] == seen[-1][1]
    sent = there.files(NAME)
    for secret in SECRETS:
        assert not [name for name, content in sent.items() if secret in content or secret in name.encode()]
    assert not [name for name in sent if "lock" in name or "notes" in name or "hidden" in name]
    back = pull(NAME, tmp_path / "back", api=there.api)
    assert (back.n_episodes, len(open_run(back.folder))) == (2, 2)
    ours = contents(run)
    theirs = {name: content for name, content in contents(back.folder).items() if name in ours}
    changed = {name for name in theirs if theirs[name] != ours[name]}
    assert changed == {
        name for name in theirs if name.endswith("0.zarr/zarr.json") or "1.zarr/zarr.json" in name
    }
    videos = {name for name in ours if name.endswith(".mp4") and "00002" not in name}
    assert {*theirs} >= {name for name in videos if "eval_episode_2" not in name}
    for mine, other in zip(open_run(run), open_run(back.folder), strict=False):
        mine.dataset.attrs.clear(), other.dataset.attrs.clear()
        assert other.dataset.identical(mine.dataset)
        assert {*other.videos} == {*mine.videos} != set()
        assert other.eval_video is not None
        assert other.attributes["policy"]["path"] == "…/pretrained_model"


def test_the_card_says_what_there_is_and_how_to_open_it(run, there):
    found = open_run(run)
    files = write_card(found, pack_up(found), NAME)
    card = files[CARD].decode()
    assert card.startswith("---\ntags: [")
    for text in (
        "pi05 (…/pretrained_model)",
        "on synthetic",
        "1 of 2 successful (50%)",
        RANDOM_WEIGHTS,
        "- a remark",
        "blind: wrist occluded",
        "| synthetic 0 | pick up the red block and place it in the bowl | baseline | 1 | 1 of 1 | 6 |",
        f"lerobot-attn pull {NAME} -o run",
        f"inspect run/{STORE}",
        f"]({SHEET})",
        CARD_MARK,
    ):
        assert text in card
    assert files[SHEET].startswith(b"\x89PNG")
    assert write_card(found, pack_up(found), NAME) == files  # so that it is not sent again
    for video in run.rglob("*.mp4"):
        video.unlink()
    found = open_run(run)
    without = write_card(found, pack_up(found), NAME)
    assert {*without} == {CARD}
    assert SHEET not in without[CARD].decode()


def test_a_card_counts_no_success_that_nobody_knows_of(tmp_path):
    for index, known in enumerate([True, False]):
        write_planted_episode(tmp_path, replace(PLAN, episode_index=index, has_success=known, videos=False))
    found = open_run(tmp_path)
    for store in found.stores[1:]:
        file = store / "zarr.json"
        document = json.loads(file.read_text())
        document["attributes"]["success"] = None
        file.write_text(json.dumps(document))
    card = write_card(found, pack_up(found), NAME)[CARD].decode()
    assert "2 episodes; 1 of 1 successful (100%); of 1 nobody knows how they ended; " in card


def test_a_card_that_somebody_wrote_stays(run, there):
    send(run, there, beside={CARD: f"{CARD_MARK} ours".encode()})
    send(run, there, beside={CARD: f"{CARD_MARK} newer".encode()})
    assert there.files(NAME)[CARD].endswith(b"newer")
    there.commit(NAME, "mine", there.files(NAME) | {CARD: b"my own words"})
    done = send(run, there, beside={CARD: f"{CARD_MARK} ours".encode()})
    assert there.files(NAME)[CARD] == b"my own words"
    assert "stays" in done.notes[0]
    send(run, there, beside={CARD: f"{CARD_MARK} ours".encode()}, overwrite=True)
    assert there.files(NAME)[CARD].endswith(b"ours")


# Interruptions, and what is there already


def test_a_push_that_breaks_off_leaves_whole_episodes_and_goes_on(run, there, monkeypatch):
    monkeypatch.setattr(hub, "_COMMIT_FILES", 1)  # an episode a commit
    commits = []

    def second_fails(asked):
        commits.extend([asked] if "/commit/" in asked else [])
        return 500 if len(commits) > 1 and "/commit/" in asked else None

    there.fails = second_fails
    with pytest.raises(StoreError, match=r"1 of 2 episodes are there.*run the same command again to go on"):
        send(run, there)
    assert len(commits) == 1 + 4  # one, and one that was tried three times more
    assert {hub._store_of(name) for name in there.files(NAME)} == {None, STORE}
    there.fails = lambda asked: None
    del there.asked[:]
    done = send(run, there)
    assert (done.n_sent, done.n_there) == (1, 1)
    assert not [asked for asked in there.asked if asked.startswith("PUT")]  # had come before its commit
    assert len(there.messages(NAME)) == 3
    del there.asked[:]
    assert (send(run, there).n_sent, len(there.messages(NAME))) == (0, 3)
    assert not [asked for asked in there.asked if "/commit/" in asked]


def test_a_failure_that_passes_is_not_noticed(run, there):
    answers = iter([503, 429])
    there.fails = lambda asked: next(answers, None) if "/commit/" in asked else None
    assert send(run, there).n_sent == 2


def test_another_recording_in_an_episodes_place_is_not_replaced_unasked(run, there):
    send(run, there)
    before = dict(there.files(NAME))
    shutil.rmtree(run / STORE)
    write_planted_episode(run, replace(PLAN, seed=5, n_frames=3, has_reward=False), policy=POLICY)
    with pytest.raises(StoreError, match=rf"another recording at {STORE}.*--overwrite"):
        send(run, there)
    assert there.files(NAME) == before
    send(run, there, overwrite=True)
    after = {name for name in there.files(NAME) if name.startswith(STORE)}
    assert after == {f"{STORE}/{name}" for name in contents(run / STORE)}
    assert {name for name in before if name.startswith(f"{STORE}/reward/")}  # which are gone


def test_what_only_the_hub_has_stays(run, there):
    send(run, there)
    shutil.rmtree(run / STORE)
    assert "1 further episodes" in send(run, there).notes[0]
    assert f"{STORE}/zarr.json" in there.files(NAME)


@pytest.mark.parametrize("public", [False, True])
def test_who_can_see_it_is_never_a_surprise(run, there, public):
    there.api.create_repo(NAME, repo_type="dataset", private=not public)
    if public:
        with pytest.raises(StoreError, match=r"everybody can see it.*--public"):
            send(run, there)
        assert not [name for name in there.files(NAME) if "zarr/" in name]
        assert send(run, there, public=True).private is False
    else:
        done = send(run, there, public=True)
        assert done.private
        assert "stays so" in done.notes[0]


def test_a_link_in_a_store_is_not_followed(run):
    (run / STORE / "reward" / "c").mkdir(exist_ok=True)
    (run / STORE / "reward" / "c" / "7").symlink_to("/etc/hostname")
    with pytest.raises(StoreError, match="is a link"):
        pack_up(open_run(run))


@pytest.mark.parametrize("form", ["packed before", "packed on the way"])
def test_packed_episodes_go_as_one_file_each_without_what_they_say_of_a_machine(run, there, tmp_path, form):
    wanted = open_run(run)[0].dataset.load()
    if form == "packed before":
        list(pack(run / STORE))
    parcel = pack_up(open_run(run), packed=form != "packed before")
    (done,) = [push(parcel, NAME, beside=write_card(open_run(run), parcel, NAME), api=there.api)]
    assert (done.n_sent, done.n_there) == (2, 0)
    sent = there.files(NAME)
    assert [name for name in sent if name.startswith(STORE)] == [f"{STORE}.zip"]
    for secret in SECRETS:
        assert not [name for name, content in sent.items() if secret in content]
    assert f"inspect run/{STORE}.zip" in sent[CARD].decode()
    there.asked.clear()
    again = push(pack_up(open_run(run), packed=form != "packed before"), NAME, api=there.api)
    assert (again.n_sent, again.n_there, again.notes) == (0, 2, ())
    assert not [asked for asked in there.asked if "/commit/" in asked]
    for part in ("", f"/{STORE}", f"/{STORE}.zip"):
        back = pull(f"{NAME}{part}", tmp_path / f"back{len(part)}", api=there.api)
        assert back.n_episodes == (1 if part else 2)
        found = open_run(back.folder)[0]
        assert found.path.name == "episode_00000.zarr.zip"
        assert found.dataset.load().drop_attrs().identical(wanted.drop_attrs())
        assert found.attributes["policy"]["path"] == "…/pretrained_model"
        assert found.videos


def test_the_other_form_of_an_episode_is_replaced_when_asked(run, there):
    send(run, there)
    with pytest.raises(StoreError, match=r"in another form \(packed or not\)"):
        push(pack_up(open_run(run), packed=True), NAME, api=there.api)
    done = push(pack_up(open_run(run), packed=True), NAME, api=there.api, overwrite=True)
    assert done.n_sent == 2
    assert {name for name in there.files(NAME) if name.startswith(STORE)} == {f"{STORE}.zip"}


def test_a_run_without_a_complete_episode_is_refused(tmp_path):
    write_planted_episode(tmp_path, replace(PLAN, complete=False))
    with pytest.raises(StoreError, match="none is complete"):
        pack_up(open_run(tmp_path))


# Bringing it back


def test_a_part_comes_alone_and_further_parts_later(run, there, tmp_path):
    send(run, there)
    part = f"hf://datasets/{NAME}/{STORE}"
    assert pull(part, tmp_path / "back", api=there.api).n_episodes == 1
    found = contents(tmp_path / "back")
    assert {hub._store_of(name) for name in found} == {None, STORE}
    assert "attention/synthetic_0/episode_00000.image.mp4" in found
    first = there.repos[NAME]["commits"][1]["id"]
    back = pull(f"{NAME}@{first}", tmp_path / "back", api=there.api)
    assert (back.n_episodes, back.revision) == (2, first)
    assert pull(f"{NAME}/attention", tmp_path / "third", api=there.api).n_episodes == 2


def test_a_pull_that_breaks_off_goes_on(run, there, tmp_path):
    send(run, there)
    there.fails = lambda asked: 404 if "episode_00001.zarr/zarr.json" in asked else None
    with pytest.raises(StoreError, match="run the same command again"):
        pull(NAME, tmp_path / "back", api=there.api)
    there.fails = lambda asked: None
    pull(NAME, tmp_path / "back", api=there.api)
    assert [len(one.videos) for one in open_run(tmp_path / "back")] == [1, 1]
    assert not (tmp_path / "back" / ".cache" / "huggingface").exists()


def test_nothing_of_ones_own_is_written_over(run, there, tmp_path):
    send(run, there)
    before = contents(run)
    with pytest.raises(StoreError, match="holds something already"):
        pull(NAME, run, api=there.api)
    with pytest.raises(StoreError, match="is a file"):
        pull(NAME, run / "notes.txt", api=there.api)
    assert contents(run) == before


@pytest.mark.parametrize(
    "name", ["../attention/a/episode_00000.zarr/zarr.json", "a/../../b.zarr/x", "C:\\x.mp4"]
)
def test_a_strangers_names_do_not_lead_out_of_the_folder(run, there, tmp_path, name):
    send(run, there)
    there.commit(NAME, "odd", there.files(NAME) | {name: b"{}"})
    with pytest.raises(StoreError, match="expected a path inside the folder"):
        pull(NAME, tmp_path / "in" / "back", api=there.api)
    assert not contents(tmp_path / "in")


def test_whatever_else_a_repository_holds_stays_there(run, there, tmp_path):
    send(run, there)
    there.commit(NAME, "more", there.files(NAME) | {"run.sh": b"rm", "a/x.pkl": b"\x80", ".env": b"x"})
    pull(NAME, tmp_path / "back", api=there.api)
    assert not {*contents(tmp_path / "back")} & {"run.sh", "a/x.pkl", ".env"}


# What goes wrong


def test_what_goes_wrong_is_one_line(run, there, tmp_path, monkeypatch):
    for act in (
        lambda api: pull(NAME, tmp_path / "x", api=api),
        lambda api: push(pack_up(open_run(run)), NAME, api=api),
    ):
        nobody = huggingface_hub.HfApi(endpoint=there.endpoint, token=False)
        with pytest.raises(StoreError, match="log in with") as error:
            act(nobody)
        assert "\n" not in str(error.value)
        dead = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token=TOKEN)
        with pytest.raises(StoreError, match=r"cannot be reached, or failed \(.*run the same command again"):
            act(dead)
        with monkeypatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            with pytest.raises(StoreError, match="HF_HUB_OFFLINE is set"):
                act(there.api)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "huggingface_hub", None)
            with pytest.raises(SetupError, match=r"lerobot_policy_attn\[hub\]"):
                act(None)
    with pytest.raises(StoreError, match="no such data set"):
        pull("me/none", tmp_path / "x", api=there.api)
    there.api.create_repo("me/empty", repo_type="dataset")
    with pytest.raises(StoreError, match="holds no episode store"):
        pull("me/empty", tmp_path / "x", api=there.api)
    assert not (tmp_path / "x").exists()
    for odd in ("attn", "hf://models/me/attn", "s3://me/attn/x y", "hf://me/attn"):
        with pytest.raises(ConfigError, match="expected user/name"):
            pull(odd, tmp_path / "x", api=there.api)


def test_places_on_the_hub():
    assert parsed("me/attn") == ("me/attn", None, "")
    assert parsed("hf://datasets/me/attn@v1/attention/a_0/") == ("me/attn", "v1", "attention/a_0")
    assert parsed("https://huggingface.co/datasets/me/attn") == ("me/attn", None, "")


# What stores say of a machine


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CHECKPOINT, "…/pretrained_model"),
        ("/mnt/My Disk/run of jane/last", "…/last"),
        ("/home/jane", "…"),
        ("/data", "…"),
        ("~/train/last", "…/last"),
        ("~jane/last", "…/last"),
        (r"C:\Users\Jane Doe\train\last", "…/last"),
        (r"\\server\share\last", "…/last"),
        ("../../../jane/videos/file.mp4", "…/file.mp4"),
        ("file:///scratch/jane/x.npy", "…/x.npy"),
        ("[Errno 2] No such file: '/scratch/jane/x'", "[Errno 2] No such file: '…/x'"),
        ("x=/scratch/jane/a.npy, y=/scratch/jane/b.npy", "x=…/a.npy, y=…/b.npy"),
        (f"{Path.home()}/My Runs/last: full", "…/last: full"),
        ("https://jane:hunter2@host.org/x", "https://host.org/x"),
        # What says nothing of a machine.
        ("lerobot/pi05_libero", "lerobot/pi05_libero"),
        ("outputs/train/last", "outputs/train/last"),
        ("s3://bucket/train/last", "s3://bucket/train/last"),
        ("https://huggingface.co/me/attn", "https://huggingface.co/me/attn"),
        ("pick up the red and/or blue block", "pick up the red and/or blue block"),
        ("1/2 of the way / or so", "1/2 of the way / or so"),
        ("../../videos/a_0/eval_episode_0.mp4", "../../videos/a_0/eval_episode_0.mp4"),
    ],
)
def test_paths_of_a_machine_are_shortened(text, expected, tmp_path):
    folder = tmp_path / "run" / "attention" / "a_0"
    assert Scrubber(tmp_path / "run").text(text, folder) == expected


def test_this_machines_name_is_cut_out(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "jane-pc.lab.org")
    scrubber = Scrubber(tmp_path)
    assert scrubber.text("lost jane-pc, jane-pc.lab.org:80 and jane-pcs") == "lost …, …:80 and jane-pcs"


def test_every_text_of_an_attribute_is_looked_at(tmp_path):
    before = {"a": [1, None, {"/scratch/jane/b": ["/scratch/jane/c", 2.5, True]}]}
    after = Scrubber(tmp_path).value(before)
    assert after == {"a": [1, None, {"…/b": ["…/c", 2.5, True]}]}
    assert [*differences(before, after)] == [("/scratch/jane/b", "…/b"), ("/scratch/jane/c", "…/c")]


# The command line


def test_the_commands_push_and_pull(run, there, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: there.api)

    def done(*words):
        status, out, err = run_cli(monkeypatch, capsys, *words)
        assert status == 0, err
        return out, err

    out, _ = done("push", run, "--repo", NAME, "--dry-run")
    assert there.asked == []
    assert f"would go to {NAME}, private; the card:" in out
    assert "1 of 2 successful" in out
    out, err = done("push", run, "--repo", NAME)
    assert f"{there.endpoint}/datasets/{NAME}, private: 2 episodes sent" in out
    assert f"shortened: {CHECKPOINT!r} to '…/pretrained_model'" in err
    assert "left out: attention/synthetic_0/episode_00002.zarr: it is incomplete" in err
    out, _ = done("pull", NAME, "-o", tmp_path / "back")
    assert "2 episodes" in out
    assert json.loads((tmp_path / "back" / STORE / "zarr.json").read_text())["attributes"]["complete"]
