"""Episodes go to a bucket: whole or not at all, only what is missing, and never at an evaluation's cost."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from servers import serving
from test_inspection import run_cli

from lerobot_attn.errors import SetupError, StoreError
from lerobot_attn.report.eval_info import gather
from lerobot_attn.report.run_status import status_of
from lerobot_attn.store import bucket, services
from lerobot_attn.store import upload as uploads
from lerobot_attn.store.pack import pack
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.receipts import receipt_of
from lerobot_attn.store.runs import open_run
from lerobot_attn.store.sending import remove_sent
from lerobot_attn.store.upload import upload
from lerobot_attn.store.zipped import Zipped, names_in_order, zipped_store
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

pytest.importorskip("obstore")

PLAN = SyntheticPlan(n_frames=4)
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
URL = "s3://bucket/eval"
TASK = "synthetic_0"
ZIP = f"bucket/eval/{TASK}/episode_00000.zarr.zip"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of two complete episodes and one that is not."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    for number in (0, 1, 2):
        write_planted_episode(folder, replace(PLAN, episode_index=number, complete=number < 2))
    return folder


@pytest.fixture
def run(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "run")


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """An empty bucket, the keys for it in the environment, and no waiting between tries."""
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    monkeypatch.setattr(uploads, "_WAITS_S", (0.0, 0.0))
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with serving(tmp_path / "served", buckets=True) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        server.folder = tmp_path / "served"
        yield server


def stores_of(run):
    return [run / "attention" / TASK / f"episode_{number:05d}.zarr" for number in range(3)]


def written(server):
    return [asked.path for asked in server.asked if asked.method in ("PUT", "POST")]


def files_of(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


def send(run, **options):
    return [*upload(run, URL, **options)]


# The file that is made on the way


def test_what_is_sent_is_what_pack_writes(run):
    store = stores_of(run)[0]
    zipped = zipped_store(store)
    content = b"".join(zipped.blocks())
    (packed,) = pack(store)
    assert content == packed.path.read_bytes()
    assert len(content) == zipped.size
    with zipped.open() as file:
        pass  # opened before the folder went; nothing is read of it
    from lerobot_attn.store.packed import packed_at

    files = packed_at(packed.path)
    again = Zipped.of(files, reversed(files.members), {"zarr.json": b"{}"})
    with again.open() as file:
        file.seek(7)
        assert file.read(50_000) == b"".join(again.blocks())[7:50_007]
    (run / "x.zip").write_bytes(b"".join(again.blocks()))
    changed = packed_at(run / "x.zip")
    assert changed.read("zarr.json") == b"{}"
    assert {name: changed.read(name) for name in changed.members if name != "zarr.json"} == {
        name: files.read(name) for name in files.members if name != "zarr.json"
    }


def test_a_store_that_changes_on_the_way_is_not_sent(run):
    store = stores_of(run)[0]
    zipped = zipped_store(store)
    file = store / names_in_order(store)[-2]
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(StoreError, match="was changed"):
        b"".join(zipped.blocks())


# What is sent, and when


@pytest.mark.parametrize("part_bytes", [1 << 23, 10_000])
def test_a_run_goes_whole_and_once(run, s3, monkeypatch, part_bytes):
    monkeypatch.setattr(bucket, "_PART_BYTES", part_bytes)
    before = files_of(run)
    seen = []
    done = send(run, progress=lambda *n: seen.append(n))
    assert [one.sent for one in done if one.refused is None] == [True, True]
    assert [one.refused for one in done][2].endswith(
        "is incomplete, expected an episode recorded to its end; not sent"
    )
    assert seen[-1][0] == seen[-1][1]
    after = files_of(run)
    assert {name: after[name] for name in before} == before
    assert {*after} - {*before} == {f"attention/{TASK}/episode_0000{n}.uploaded.json" for n in (0, 1)}
    there = open_run(URL)
    assert [episode.is_complete for episode in there] == [True, True]
    for theirs, store in zip(there, stores_of(run), strict=False):
        ours = open_episode(store)
        np.testing.assert_array_equal(
            theirs.arrays.suffix_attention.values, ours.arrays.suffix_attention.values
        )
        assert theirs.attributes == ours.attributes
        for camera, video in ours.videos.items():
            assert theirs.videos[camera].fetch().read_bytes() == video.read_bytes()
    # Whoever sees a store sees its videos: it is written last.
    sent = [*dict.fromkeys(written(s3))]
    assert [Path(name).name for name in sent[:3]] == [
        "episode_00000.image.mp4",
        "episode_00000.wrist.mp4",
        "episode_00000.zarr.zip",
    ]
    s3.asked.clear()
    assert [one.sent for one in send(run)] == [False] * 3
    assert {asked.method for asked in s3.asked} == {"HEAD"}
    assert len(s3.asked) == 2


def test_without_a_receipt_checksums_tell_what_is_there(run, s3):
    send(run)
    for store in stores_of(run)[:2]:
        store.with_name(f"{store.stem}.uploaded.json").unlink()
    (s3.folder / ZIP).with_name("episode_00001.image.mp4").unlink()
    s3.asked.clear()
    assert [one.sent for one in send(run)] == [False, True, False]
    assert written(s3) == [f"bucket/eval/{TASK}/episode_00001.image.mp4"]
    assert receipt_of(stores_of(run)[0]).sha256 == receipt_of(stores_of(run)[0]).sha256
    assert not [asked for asked in s3.asked if asked.method == "GET"]


def test_a_service_that_tells_no_md5_is_read_back(run, s3):
    s3.tells_md5 = False
    assert send(run)[0].sent
    assert [asked.path for asked in s3.asked if asked.method == "GET" and asked.path == ZIP]
    assert not send(run)[0].sent


@pytest.mark.parametrize("form", ["run", "attention", "task", "episode", "packed"])
def test_the_names_are_the_same_from_wherever_it_is_sent(run, s3, form):
    store = stores_of(run)[0]
    if form == "packed":
        (packed,) = pack(store)
        store = packed.path
    path = {"run": run, "attention": run / "attention", "task": store.parent}.get(form, store)
    assert send(path)[0].url == f"s3://{ZIP}"


def test_another_recording_in_its_place_is_not_replaced(run, s3, tmp_path):
    write_planted_episode(tmp_path / "other", replace(PLAN, seed=7))
    assert send(tmp_path / "other")[0].sent
    there = files_of(s3.folder)
    refused = send(run)[0].refused
    assert "holds another recording" in refused
    assert "\n" not in refused
    assert {name: files_of(s3.folder)[name] for name in there} == there
    assert send(run, overwrite=True)[0].sent
    assert files_of(s3.folder)[ZIP] == b"".join(zipped_store(stores_of(run)[0]).blocks())


def test_what_arrives_harmed_is_sent_again_and_never_stays(run, s3):
    harmed = []

    def harm(content):
        if len(harmed) < 2 and content.startswith(b"PK"):
            harmed.append(content)
            return content[:-9] + bytes(9)
        return content

    s3.harm = harm
    assert send(run, keep_local=False)[0].sent
    assert len(harmed) == 2
    assert open_run(URL)[0].is_complete


def test_what_always_arrives_harmed_stays_here(run, s3):
    s3.harm = lambda content: content[:-9] + bytes(9) if content.startswith(b"PK") else content
    with pytest.raises(StoreError, match=r"another checksum .* 0 of 3 episodes are there") as error:
        send(run, keep_local=False)
    assert "\n" not in str(error.value)
    assert not (s3.folder / ZIP).exists()
    assert open_episode(stores_of(run)[0]).is_complete
    assert receipt_of(stores_of(run)[0]) is None


def test_links_and_damage_are_one_line_each_and_the_others_go(run, s3):
    first, second, _ = stores_of(run)
    (first / "link").symlink_to("/etc/hostname")
    (second / "zarr.json").write_text("{")
    done = send(run)
    assert "is a link" in done[0].refused
    assert "damaged" in done[1].refused
    assert not written(s3)


# What stays here


def test_local_copies_go_and_leave_a_receipt(run, s3):
    assert [one.sent for one in send(run, keep_local=False)] == [True, True, False]
    left = {name for name in files_of(run / "attention" / TASK) if "00002" not in name}
    assert left == {"episode_00000.uploaded.json", "episode_00001.uploaded.json"}
    receipt = receipt_of(stores_of(run)[0])
    assert receipt.removed
    assert receipt.url == f"s3://{ZIP}"
    assert receipt.header.attributes == open_run(URL)[0].attributes
    shutil.rmtree(stores_of(run)[2])
    assert send(run, keep_local=False) == []
    with pytest.raises(StoreError, match=re.escape(f"s3://{ZIP}")):
        open_run(run)


def test_status_and_gather_count_what_was_sent(run, s3, monkeypatch, capsys):
    before = gather(open_run(run)).info["overall"]
    n_bytes = sum(episode.stored_bytes() for episode in open_run(run))
    send(run, keep_local=False)
    status = status_of(open_run(run))
    assert (status.n_done, status.n_sent) == (2, 2)
    assert status.n_bytes == pytest.approx(n_bytes, rel=0.1)  # packed, an episode has other headers
    assert "2 of the done sent and removed here" in status.line
    shutil.rmtree(stores_of(run)[2])  # the one that was not sent, because it is incomplete
    assert json.loads(run_cli(monkeypatch, capsys, "status", run, "--json")[1])["n_sent"] == 2
    assert run_cli(monkeypatch, capsys, "gather", run, "-o", run / "all.json")[0] == 0
    found = json.loads((run / "all.json").read_text())["overall"]
    assert found["n_episodes"] == 2
    assert found["pc_success"] == before["pc_success"]


def test_what_was_changed_since_it_was_sent_stays(run, s3):
    send(run)
    store = stores_of(run)[0]
    receipt = receipt_of(store)
    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["note"] = "changed"
    (store / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(StoreError, match="was changed since"):
        remove_sent(store, receipt)
    assert open_episode(store).is_complete
    assert "another recording" in send(run)[0].refused


@pytest.mark.parametrize("at", [(Path, "rename"), (shutil, "rmtree"), (Path, "unlink")])
def test_a_removal_that_was_killed_is_finished(run, s3, monkeypatch, at):
    store = stores_of(run)[0]
    (run / "attention" / TASK / ".episode_00000.zarr.new").mkdir(exist_ok=at[1] != "rename")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(*at, killed)
        with pytest.raises(KeyboardInterrupt):
            send(store, keep_local=False)
    assert receipt_of(store).removed
    assert store.exists() == (at[1] != "unlink")
    s3.asked.clear()
    done = send(run, keep_local=False)
    assert not [one for one in done if one.sent and one.path == store]
    assert not [name for name in written(s3) if "00000" in name]
    left = [file.name for file in store.parent.iterdir() if "00000" in file.name]
    assert left == ["episode_00000.uploaded.json"]


def test_a_damaged_receipt_counts_for_nothing(run):
    path = stores_of(run)[0].with_name("episode_00000.uploaded.json")
    for text in ("", "[]", "{}", '{"shapes": 1}', '{"shapes": {}, "stamp": [], "url": 3}'):
        path.write_text(text)
        assert receipt_of(stores_of(run)[0]) is None


# What cannot be sent


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://wrong/eval", "NoSuchBucket"),
        ("https://host/eval", "cannot be written to, expected a bucket (s3://, gs://, az://)"),
        ("hf://datasets/user/name", "`lerobot-attn push` sends a run to the Hub"),
        ("elsewhere", "cannot be written to"),
        ("az://container", "AZURE_STORAGE_ACCOUNT_NAME"),
        ("DEAD", "0 of 3 episodes are there"),
        ("NOKEYS", "AWS_ACCESS_KEY_ID"),
    ],
)
def test_one_line_and_nothing_is_lost(run, s3, monkeypatch, capsys, url, message):
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    if url == "DEAD":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    if url == "NOKEYS":
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    before = files_of(run)
    status, *both = run_cli(monkeypatch, capsys, "upload", run, URL if url.isupper() else url)
    assert status == 1
    said = " ".join(" ".join(both).split())
    assert message in said
    assert "Traceback" not in said
    assert files_of(run) == before


def test_without_the_extra(run, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(SetupError, match=r"lerobot_policy_attn\[remote\]"):
        send(run)
    assert services.EXTRA.endswith("[remote]'")


def test_the_command(run, s3, monkeypatch, capsys):
    status, *both = run_cli(monkeypatch, capsys, "upload", run, URL)
    assert status == 1  # one is incomplete
    assert f"s3://{ZIP}" in both[0]
    shutil.rmtree(stores_of(run)[2])
    assert run_cli(monkeypatch, capsys, "upload", run, URL, "--remove-local")[0] == 0
    status, *both = run_cli(monkeypatch, capsys, "upload", run, URL)
    assert status == 0
    assert "nothing to do" in both[0]
