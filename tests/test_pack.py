"""Packed episodes: one file an episode, read in place; the other form goes only once this one is whole."""

import io
import json
import shutil
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import ZipStore

from lerobot_attn import cli, inspection
from lerobot_attn.analysis.runs import summarise_run
from lerobot_attn.errors import StoreError
from lerobot_attn.explorer.library import Library
from lerobot_attn.overlay import OverlaySettings, overlay_frames
from lerobot_attn.plot import plot
from lerobot_attn.recording.folder import RunFolder
from lerobot_attn.report import CompareSettings, write_report
from lerobot_attn.store import pack as packing
from lerobot_attn.store.attach import attach_masks
from lerobot_attn.store.damage import find_damage
from lerobot_attn.store.pack import pack, unpack
from lerobot_attn.store.packed import packed_at
from lerobot_attn.store.reader import open_episode
from lerobot_attn.store.repair import repair
from lerobot_attn.store.runs import open_run
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode
from lerobot_attn.verify import verify_episode

PLAN = SyntheticPlan(n_frames=4)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Path of an episode with videos, not to be changed."""
    return write_planted_episode(tmp_path_factory.mktemp("planted"), PLAN)


@pytest.fixture(scope="module")
def packed(planted, tmp_path_factory):
    """Path of the same episode, packed, not to be changed."""
    run = shutil.copytree(planted.parents[2], tmp_path_factory.mktemp("packed") / "run")
    (done,) = pack(run)
    return done.path


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".lerobot-attn")
    }


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["lerobot-attn", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


# There and back


def test_there_and_back_nothing_has_changed(planted, copied):
    store = copied(planted)
    run, before = store.parents[2], files_of(store.parents[2])
    (there,) = pack(run)
    assert [path.name for path in store.parent.glob("*.zarr*")] == ["episode_00000.zarr.zip"]
    assert not list(store.parent.glob(".*"))
    assert there.path == store.with_name("episode_00000.zarr.zip")
    assert there.n_files == len(files_of(planted))
    (back,) = unpack(run)
    assert back.path == store
    assert files_of(run) == before


def test_packing_again_does_nothing(packed):
    stamp = packed.stat().st_mtime_ns
    assert not list(pack(packed.parents[2]))
    assert not list(pack(packed))
    assert packed.stat().st_mtime_ns == stamp


def test_members_are_stored_and_the_tables_stand_last(packed):
    with zipfile.ZipFile(packed) as archive:
        infos = archive.infolist()
    assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
    assert infos[-1].filename == "zarr.json"
    maps = ["attention" in info.filename and "/c/" in info.filename for info in infos]
    assert any(maps)
    assert maps == sorted(maps, reverse=True)


# Who reads it


def test_zarr_and_xarray_read_it_without_us(planted, packed):
    group = zarr.open_group(ZipStore(packed, mode="r"), mode="r")
    ours = open_episode(planted).arrays
    np.testing.assert_array_equal(group["suffix_attention"][0], ours.suffix_attention[0].values)
    opened = xr.open_zarr(ZipStore(packed, mode="r"), consolidated=True, zarr_format=3, chunks=None)
    np.testing.assert_array_equal(opened.action.values, ours.action.values)


def test_every_value_is_the_same(planted, packed):
    there, here = open_episode(packed), open_episode(planted)
    assert there.attributes == here.attributes
    assert there.n_inferences == here.n_inferences
    for name, variable in here.arrays.variables.items():
        np.testing.assert_array_equal(there.arrays[name].values, variable.values)
    xr.testing.assert_identical(there.dataset.compute(), here.dataset.compute())


def test_all_that_look_take_it(planted, packed, tmp_path):
    there, here = open_episode(packed), open_episode(planted)
    described, same = inspection.describe_episode(there), inspection.describe_episode(here)
    text, wanted = (
        json.dumps(
            {name: value for name, value in facts.items() if "ratio" not in name and "bytes" not in name}
        )
        for facts in (described, same)
    )
    for folder in (packed.parents[2], planted.parents[2]):
        text, wanted = (said.replace(str(folder), "run") for said in (text, wanted))
    assert text.replace(".zarr.zip", ".zarr") == wanted
    assert {name: file.name for name, file in there.videos.items()} == {
        name: file.name for name, file in here.videos.items()
    }
    images = [axes.images[0].get_array() for axes in plot(there, "image").axes if axes.images]
    wanted = [axes.images[0].get_array() for axes in plot(here, "image").axes if axes.images]
    assert len(images) == len(wanted) > 0
    for image, want in zip(images, wanted, strict=True):
        np.testing.assert_array_equal(image, want)
    settings = OverlaySettings(frames=[0, 1])
    for ours, theirs in zip(overlay_frames(there, settings), overlay_frames(here, settings), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    files = write_report([there], [here], tmp_path / "report", CompareSettings(video=False))
    assert all(Path(file).exists() for file in files)


def test_a_run_may_hold_both_forms_of_different_episodes(planted, copied):
    store = copied(planted)
    write_planted_episode(store.parents[2], replace(PLAN, episode_index=1))
    run = store.parents[2]
    list(pack(store))
    found = open_run(run)
    assert [path.name for path in found.stores] == ["episode_00000.zarr.zip", "episode_00001.zarr"]
    assert not found.damaged
    assert len(found.table) == 2
    # The episode's number apart, the two hold the same.
    summary = summarise_run(found, "modality_share").table
    rows = [
        summary[summary.episode == number].drop(columns=["episode", "path"], errors="ignore")
        for number in (0, 1)
    ]
    assert len(rows[0])
    assert len(rows[0]) == len(rows[1])
    library = Library(run)
    assert [one.id for one in library.look().summaries] == [
        f"attention:{store.parent.name}:episode_0000{number}" for number in (0, 1)
    ]
    assert library.episode(library.look().summaries[0].id).is_complete


def test_verify_reads_every_chunk_and_finds_what_is_damaged(packed, tmp_path):
    assert verify_episode(open_episode(packed)).passed
    members = packed_at(packed).members
    name = next(name for name in members if name.startswith("suffix_attention/c/"))
    copy = tmp_path / packed.name
    content = bytearray(packed.read_bytes())
    content[members[name].start + 5] ^= 1
    copy.write_bytes(content)
    report = find_damage(copy)
    assert [(damage.array, damage.kind) for damage in report.damaged] == [("suffix_attention", "chunk")]
    with pytest.raises(StoreError, match="unpack"):
        repair(copy)


def test_masks_are_attached_to_folders_alone(packed, tmp_path):
    with pytest.raises(StoreError, match="unpack"):
        attach_masks(packed, tmp_path)


def test_other_processes_read_it(packed):
    import pickle

    dataset = pickle.loads(pickle.dumps(open_episode(packed).dataset.action))
    np.testing.assert_array_equal(dataset.values, open_episode(packed).arrays.action.values)


def test_no_file_is_held_open(packed):
    episodes = [open_episode(packed) for _ in range(5)]
    before = len([*Path("/proc/self/fd").iterdir()])
    for episode in episodes:
        episode.arrays.action.values  # noqa: B018
    assert len([*Path("/proc/self/fd").iterdir()]) <= before + 1


def test_a_file_that_takes_its_place_is_not_read_as_the_old_one(packed, tmp_path):
    copy = Path(shutil.copy(packed, tmp_path))
    lazy = open_episode(copy).arrays.suffix_attention
    shutil.copy(packed, tmp_path / "new.zip")
    (tmp_path / "new.zip").replace(copy)
    with pytest.raises(StoreError, match="taken its place"):
        lazy[0].values  # noqa: B018


# Recording beside it


def test_a_recording_goes_on_where_episodes_are_packed(packed, tmp_path):
    run = shutil.copytree(packed.parents[2], tmp_path / "run")
    folder = run / "attention"
    store = folder / packed.parent.name / "episode_00000.zarr"
    with pytest.raises(StoreError, match="already holds episodes"):
        RunFolder(folder)
    seed = open_episode(packed).attributes.get("seed")
    assert RunFolder(folder, "skip").kept(store, seed).n_frames == open_episode(packed).n_frames
    with pytest.raises(StoreError, match="already exists"):
        write_planted_episode(run, PLAN)
    RunFolder(folder, "overwrite").settle({}, {})
    assert not files_of(folder)


# What ends a pack on its way


@pytest.mark.parametrize("call", ["_write", "_refuse_difference", "rename"])
@pytest.mark.parametrize("change", [pack, unpack])
def test_whatever_ends_it_one_whole_form_is_there(planted, packed, tmp_path, monkeypatch, call, change):
    original = planted if change is pack else packed
    run = shutil.copytree(original.parents[2], tmp_path / "run")
    before = files_of(planted)

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patched:
        if call == "rename":
            patched.setattr(Path, "rename", killed)
        else:
            patched.setattr(
                packing, {"_write": "_write" if change is pack else "_extract"}.get(call, call), killed
            )
        with pytest.raises(Killed):
            list(change(run))
    left = [path for path in open_run(run).stores if path.exists()]
    assert left
    done = list(change(run))
    folder = run / "attention" / original.parent.name
    names = sorted(path.name for path in folder.iterdir() if ".zarr" in path.name)
    assert names == ["episode_00000.zarr.zip" if change is pack else "episode_00000.zarr"]
    assert all(one.refused is None for one in done)
    list(unpack(run))
    assert files_of(folder / "episode_00000.zarr") == before


def test_a_killed_process_loses_nothing(planted, tmp_path):
    run = shutil.copytree(planted.parents[2], tmp_path / "run")
    program = (
        "import os, sys, pathlib\n"
        "from lerobot_attn.store import pack\n"
        "real = pathlib.Path.replace\n"
        "def replace(self, target):\n    real(self, target)\n    os._exit(9)\n"
        "pathlib.Path.replace = replace\n"
        "list(pack.pack(sys.argv[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", program, run]).returncode == 9
    store = run / planted.relative_to(planted.parents[2])
    assert store.exists()
    assert store.with_name(store.name + ".zip").exists()
    with pytest.raises(StoreError, match="one form of an episode"):
        open_episode(store)
    found = open_run(run)
    assert len(found) == 1
    assert len(found.damaged) == 1
    assert not list(found)
    with pytest.raises(StoreError, match="one form"):
        RunFolder(run / "attention", "skip").kept(store, None)
    list(pack(run))
    assert open_run(run)[0].is_complete
    assert not store.exists()


def test_two_forms_that_differ_are_both_kept(planted, packed, copied):
    store = copied(planted)
    shutil.copy(packed, store.parent)
    next(store.glob("action/c/*/*")).write_bytes(b"other")
    for change in (pack, unpack):
        with pytest.raises(StoreError, match="not the same"):
            list(change(store))
    assert store.exists()
    assert store.with_name(store.name + ".zip").exists()


def test_a_full_disk_is_one_line(planted, copied, monkeypatch):
    store = copied(planted)
    before = files_of(store.parents[2])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "_write", full)
    with pytest.raises(StoreError, match="No space left") as error:
        list(pack(store))
    assert "\n" not in str(error.value)
    assert files_of(store.parents[2]) == before


def test_incomplete_episodes_stay_folders(planted, copied, monkeypatch, capsys):
    store = copied(planted)
    write_planted_episode(store.parents[2], replace(PLAN, episode_index=1))
    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["complete"] = False
    (store / "zarr.json").write_text(json.dumps(document))
    assert command(monkeypatch, "pack", store.parents[2]) == 1
    said = capsys.readouterr()
    assert "incomplete" in said.err
    assert "episode_00001.zarr.zip" in said.out
    assert sorted(path.name for path in open_run(store.parents[2]).stores) == [
        "episode_00000.zarr",
        "episode_00001.zarr.zip",
    ]


def test_commands(planted, copied, monkeypatch, capsys):
    store = copied(planted)
    assert command(monkeypatch, "pack", store) == 0
    packed = store.with_name(store.name + ".zip")
    assert packed.name in capsys.readouterr().out
    assert command(monkeypatch, "pack", packed) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert command(monkeypatch, "unpack", packed) == 0
    assert store.is_dir()
    assert not packed.exists()


# What strangers may send


def members(packed):
    with zipfile.ZipFile(packed) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def write_zip(path, content, **how):
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, value in content.items():
            archive.writestr(zipfile.ZipInfo(name), value, **how)
    return path


def link(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16 if name == "action/zarr.json" else 0
            archive.writestr(info, value)


def twice(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(zipfile.ZipInfo(name), value)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(zipfile.ZipInfo("zarr.json"), content["zarr.json"])


def streamed(path, content):
    class Pipe(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            return file.write(data)

    with path.open("wb") as file, zipfile.ZipFile(Pipe(), "w") as archive:
        for name, value in content.items():
            archive.writestr(zipfile.ZipInfo(name), value)


CASES = {
    "compressed": (
        lambda path, found: write_zip(path, found, compress_type=zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "other names": (
        lambda path, found: write_zip(path, {f"store/{name}": value for name, value in found.items()}),
        "no zarr.json at its top",
    ),
    "a name that escapes": (
        lambda path, found: write_zip(path, found | {"../evil": b"x"}),
        "outside the store",
    ),
    "a name from the root": (lambda path, found: write_zip(path, found | {"/etc/evil": b"x"}), "outside"),
    "a drive": (lambda path, found: write_zip(path, found | {"c:/evil": b"x"}), "no plain path"),
    "a backslash": (lambda path, found: write_zip(path, found | {"..\\evil": b"x"}), "no plain path"),
    "a line break": (lambda path, found: write_zip(path, found | {"a\nb": b"x"}), "no plain path"),
    "a link": (link, "link"),
    "twice": (twice, "twice"),
    "streamed": (streamed, "stream"),
    "empty": (lambda path, found: write_zip(path, {}), "no zarr.json"),
    "no zip": (lambda path, found: path.write_bytes(b"something else"), "no whole zip"),
    "no bytes": (lambda path, found: path.write_bytes(b""), "no whole zip"),
    "another zip": (lambda path, found: write_zip(path, {"zarr.json": b"{}"}), "another kind"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_no_pack_holds_is_one_line(packed, tmp_path, case, monkeypatch, capsys):
    make, message = CASES[case]
    path = tmp_path / "run" / "episode_00000.zarr.zip"
    path.parent.mkdir()
    if case == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, value in members(packed).items():
                archive.writestr(name, value)
    else:
        make(path, members(packed))
    with pytest.raises(StoreError, match=message) as error:
        open_episode(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert command(monkeypatch, "inspect", path) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(StoreError):
        list(unpack(path))
    assert path.exists()
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99, 0.9999])
def test_a_truncated_file_is_one_line(packed, tmp_path, share):
    path = tmp_path / packed.name
    content = packed.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(StoreError, match="no whole zip file") as error:
        open_episode(path)
    assert "\n" not in str(error.value)


def test_any_flipped_byte_of_the_list_is_refused_or_harmless(packed, tmp_path):
    content = packed.read_bytes()
    sound = open_episode(packed).arrays.action.values
    with zipfile.ZipFile(packed) as archive:
        start = archive.start_dir
    random, refused = np.random.default_rng(0), []
    for at in random.integers(start, len(content), 40):
        changed = bytearray(content)
        changed[at] ^= 1 << random.integers(8)
        path = tmp_path / f"{at}.zarr.zip"
        path.write_bytes(changed)
        try:
            found = open_episode(path).arrays.action.values
        except StoreError as error:
            refused.append(str(error))
        except ValueError as error:  # of zarr, as of a folder whose chunk is damaged
            refused.append(str(error))
        else:
            np.testing.assert_array_equal(found, sound)
        path.unlink()
    assert refused
    assert not [text for text in refused if "\n" in text]


def test_trust_checks_hold_inside(packed, tmp_path):
    found = members(packed)
    document = json.loads(found["zarr.json"])
    document["consolidated_metadata"]["metadata"]["action"]["codecs"] = [{"name": "pickle"}]
    path = write_zip(tmp_path / "episode_00000.zarr.zip", found | {"zarr.json": json.dumps(document)})
    with pytest.raises(StoreError, match="codec 'pickle'"):
        open_episode(path)


def test_zips_of_other_programs_are_read(planted, tmp_path):
    """With folders as members, and headers of other lengths than the list's."""
    path = tmp_path / "episode_00000.zarr.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(planted.rglob("*")):
            info = zipfile.ZipInfo.from_file(file, file.relative_to(planted).as_posix())
            info.extra = b"UT\x05\x00\x03abcd"
            archive.writestr(info, b"" if file.is_dir() else file.read_bytes())
    np.testing.assert_array_equal(
        open_episode(path).arrays.suffix_attention[0].values,
        open_episode(planted).arrays.suffix_attention[0].values,
    )


def test_links_are_not_packed(planted, copied, tmp_path):
    store = copied(planted)
    (store / "action" / "odd").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="is a link"):
        list(pack(store))
    assert store.exists()
