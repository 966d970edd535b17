"""Copies of a store's small files in its metadata: the files' bytes, or none, and never in a file's place."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
import zarr
from servers import serving
from test_attach import write_pngs

from lerobot_attn.store import copies
from lerobot_attn.store.attach import attach_masks
from lerobot_attn.store.copies import copies_in, copies_of
from lerobot_attn.store.damage import find_damage
from lerobot_attn.store.pack import pack
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.repair import repair
from lerobot_attn.store.schema import BY_NAME
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

pytest.importorskip("obstore")

CAMERA = "observation.images.image"
PLAN = SyntheticPlan(
    n_frames=6,
    n_executed=2,
    n_queries=2,
    n_denoise_steps=2,
    n_layers=3,
    layers=(1, 2),
    prefix_layers=(0,),
    n_heads=1,
    grid=(2, 2),
    n_text=24,
    task="pick up",
    image_px={CAMERA: (16, 16)},
    videos=False,
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return write_planted_episode(tmp_path_factory.mktemp("recorded"), PLAN)


@pytest.fixture
def store(recorded, copied):
    return copied(recorded)


def document_of(store):
    return json.loads((store / "zarr.json").read_text())


def change(store, do):
    """Change the copies in a store's metadata."""
    document = document_of(store)
    do(document["consolidated_metadata"]["copies"])
    (store / "zarr.json").write_text(json.dumps(document))


def at_a_url(store):
    """Everything in a store, as it is read at a URL, and what was asked for."""
    with serving(store.parent) as server:
        return open_episode(f"{server.url}/{store.name}").arrays.load(), server.asked


# What is copied


def test_copies_are_the_files_bytes_and_only_small_ones_are_made(recorded):
    found = copies_in(document_of(recorded))
    assert found.files
    for name, content in found.files.items():
        assert (recorded / name).read_bytes() == content
    for name, content in found.ends.items():
        assert (recorded / name).read_bytes().endswith(content)
    small = [
        file.relative_to(recorded).as_posix()
        for file in recorded.rglob("[0-9]*")
        if file.is_file()
        and not BY_NAME[file.relative_to(recorded).parts[0]].sharded
        and file.stat().st_size <= copies._MAX_FILE_BYTES
    ]
    assert {*found.files} == {*small}
    shards = [
        spec for spec in document_of(recorded)["consolidated_metadata"]["metadata"] if BY_NAME[spec].sharded
    ]
    assert {name.split("/")[0] for name in found.ends} == {*shards}
    assert len(found.ends) == 3 * len(shards)


def test_there_is_room_for_so_much_and_an_array_is_copied_whole_or_not(recorded, monkeypatch):
    arrays = document_of(recorded)["consolidated_metadata"]["metadata"]
    for limit, kind in (("_MAX_TABLES_BYTES", "files"), ("_MAX_INDEXES_BYTES", "ends")):
        with monkeypatch.context() as patched:
            patched.setattr(copies, limit, 150)
            made = copies_of(recorded, arrays)[kind]
        assert made
        assert sum(len(base64.b64decode(text)) for text in made.values()) <= 150
        for name in {name.split("/")[0] for name in made}:
            assert sum(one.startswith(f"{name}/") for one in made) == copies.n_files(arrays[name])


def test_what_is_still_written_is_not_copied(tmp_path):
    unfinished = write_planted_episode(tmp_path, replace(PLAN, complete=False))
    # A recording that was ended is closed; one that was killed has made no copies.
    change(unfinished, dict.clear)
    values, _ = at_a_url(unfinished)
    xr.testing.assert_identical(values, open_episode(unfinished).arrays.load())


def test_nothing_is_copied_before_the_end(tmp_path, monkeypatch):
    from lerobot_attn.store.writer import EpisodeWriter

    seen, original = [], EpisodeWriter._replace_metadata

    def looked_at(writer):
        original(writer)
        seen.append(
            (writer._attributes["complete"], "copies" in document_of(writer.path)["consolidated_metadata"])
        )

    monkeypatch.setattr(EpisodeWriter, "_replace_metadata", looked_at)
    write_planted_episode(tmp_path, PLAN)
    assert len(seen) > 2
    assert {*seen[:-1]} == {(False, False)}
    assert seen[-1] == (True, True)


# Who reads them


def test_at_a_url_they_stand_for_the_files(recorded):
    values, asked = at_a_url(recorded)
    xr.testing.assert_identical(values, open_episode(recorded).arrays.load())
    found = copies_in(document_of(recorded))
    names = [one.path.partition("/")[2] for one in asked]
    assert not {*names} & found.files.keys()
    assert not [one for one in asked if (one.range or "").startswith("bytes=-")]


def test_on_this_machine_files_count(store):
    number = zarr.open_array(zarr.storage.LocalStore(store), path="layer", mode="r+")
    number[...] = [7, 8]
    assert open_episode(store).arrays.layer.values.tolist() == [7, 8]


def changed(text, do):
    content = bytearray(base64.b64decode(text))
    do(content)
    return base64.b64encode(content).decode()


WRONG = {
    "no text": lambda text, other: 7,
    "no base64": lambda text, other: "?" + text[1:],
    "a flipped byte": lambda text, other: changed(
        text, lambda content: content.__setitem__(5, content[5] ^ 1)
    ),
    "longer": lambda text, other: changed(text, lambda content: content.append(0)),
    "much longer": lambda text, other: text * 4000,
    "of another array": lambda text, other: other,
    "nothing": lambda text, other: "",
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize(
    ("kind", "name", "other"),
    [
        ("files", "layer/c/0", "key_row/c/0"),
        ("files", "action_dim/c/0", "token_text/c/0/0"),
        ("ends", "suffix_attention/c/1/0/0/0/0/0", "suffix_attention_mean/c/1/0/0/0/0"),
    ],
)
def test_what_cannot_be_the_files_is_not_taken(store, how, kind, name, other):
    def do(said):
        said[kind][name] = WRONG[how](said[kind][name], said[kind][other])

    change(store, do)
    found = copies_in(document_of(store))
    assert name not in (found.files if kind == "files" else found.ends)
    assert other in (found.files if kind == "files" else found.ends)
    values, asked = at_a_url(store)
    xr.testing.assert_identical(values, open_episode(store).arrays.load())
    assert [one for one in asked if one.path.endswith(f"/{name}")]


@pytest.mark.parametrize(
    "said", [None, [], 3, {}, {"files": [], "ends": 3}, {"files": {"../x": "AAAA", "x": "AAAA"}}]
)
def test_other_forms_are_none(store, said):
    document = document_of(store)
    document["consolidated_metadata"]["copies"] = said
    assert copies_in(document) == ({}, {})
    (store / "zarr.json").write_text(json.dumps(document))
    assert at_a_url(store)[0].sizes == open_episode(store).arrays.sizes


def test_older_stores_are_read_as_they_were(store):
    document = document_of(store)
    del document["consolidated_metadata"]["copies"]
    (store / "zarr.json").write_text(json.dumps(document))
    xr.testing.assert_identical(at_a_url(store)[0], open_episode(store).arrays.load())
    assert not find_damage(store).damaged


def test_others_who_read_zarr_pass_them_over(recorded):
    group = zarr.open_consolidated(zarr.storage.LocalStore(recorded), zarr_format=3)
    assert group["layer"][...].tolist() == [1, 2]
    assert "copies" not in group.attrs
    assert "copies" not in xr.open_zarr(recorded, zarr_format=3).attrs


# Whoever changes a store


@pytest.mark.parametrize("name", ["layer", "suffix_attention"])
def test_a_copy_of_something_else_is_named_and_made_anew(store, name):
    array = zarr.open_array(zarr.storage.LocalStore(store), path=name, mode="r+")
    array[...] = array[...] / 2 if name == "suffix_attention" else array[...] + 1
    damaged = find_damage(store).damaged
    assert {(damage.kind, damage.array) for damage in damaged} == {("copy", name)}
    assert str(damaged[0]).startswith(f"{name}: zarr.json: its copy of {name}/c/0")
    (planned,) = repair(store)
    assert [*planned.lines(done=True)][1:] == ["  wrote zarr.json anew"]
    assert not find_damage(store).damaged
    xr.testing.assert_identical(at_a_url(store)[0], open_episode(store).arrays.load())


@pytest.mark.parametrize("packed", [False, True])
def test_damage_at_a_url_is_that_of_the_files(store, packed):
    file = store / "key_row" / "c" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    if packed:
        (done,) = pack(store)
        store = done.path
    with serving(store.parent) as server:
        url = f"{server.url}/{store.name}"
        assert open_episode(url).arrays.sizes  # takes the copies
        assert [damage.array for damage in find_damage(url).damaged] == ["key_row"]


def test_no_copy_outlives_what_a_repair_drops(store, monkeypatch):
    from lerobot_attn.store import repair as repairs

    shard = store / "suffix_attention/c/1/0/0/0/0/0"
    content = bytearray(shard.read_bytes())
    content[3] ^= 0xFF
    shard.write_bytes(content)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(repairs, "_say_so", killed)
        with pytest.raises(KeyboardInterrupt):
            repair(store)
    assert "copies" not in document_of(store)["consolidated_metadata"]
    repair(store)
    there = at_a_url(store)[0]
    xr.testing.assert_identical(there, open_episode(store).arrays.load())
    assert np.isnan(there.suffix_attention[1, 0, 0]).all()
    assert "suffix_attention/c/1/0/0/0/0/0" in copies_in(document_of(store)).ends
    assert not find_damage(store).damaged


def test_masks_that_are_attached_are_copied_and_replaced(store, tmp_path):
    for names in (["background", "cup"], ["background", "a plate"]):
        folder = write_pngs(tmp_path / names[1], {(CAMERA, 2): np.ones((16, 16), np.uint8)}, names)
        attach_masks(store, folder, overwrite=True)
        there = at_a_url(store)[0]
        assert there.instance.values.tolist() == names
        assert "instance/c/0" in copies_in(document_of(store)).files
        xr.testing.assert_identical(there, open_episode(store).arrays.load())
