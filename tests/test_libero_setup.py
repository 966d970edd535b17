import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from lerobot_attn.errors import SetupError
from lerobot_attn.machine import libero
from lerobot_attn.machine.libero import (
    ASSET_FOLDERS,
    assets_state,
    config_path,
    install_assets,
    write_libero_config,
)

needs_libero = pytest.mark.skipif(libero._benchmark_root() is None, reason="libero is not installed")


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    """A folder that holds `assets/`, with one file in every needed folder."""
    folder = tmp_path / "source"
    for name in ASSET_FOLDERS:
        (folder / "assets" / name).mkdir(parents=True)
        (folder / "assets" / name / "model.xml").write_text(f"<mujoco model='{name}'/>")
    return folder


def tar_of(folder: Path, path: Path, mode: str) -> Path:
    with tarfile.open(path, mode) as archive:
        archive.add(folder / "assets", "assets")
    return path


def zip_of(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in (folder / "assets").rglob("*"):
            archive.write(file, file.relative_to(folder))
    return path


def installed_files(home: Path) -> list[str]:
    root = home / ".cache" / "libero"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


EXPECTED_FILES = sorted(f"assets/{name}/model.xml" for name in ASSET_FOLDERS)


# Config


@needs_libero
@pytest.mark.parametrize("custom", [False, True])
def test_importing_libero_afterwards_asks_nothing_and_finds_its_own_defaults(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, custom: bool
) -> None:
    expected_path = home / ".libero" / "config.yaml"
    if custom:
        monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "custom"))
        expected_path = tmp_path / "custom" / "config.yaml"

    assert write_libero_config() == expected_path

    # stdin is closed: a question would end in EOFError.
    code = "import yaml, libero.libero as l; print(yaml.dump(l.get_default_path_dict()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == yaml.safe_load(expected_path.read_text())
    assert [path.name for path in expected_path.parent.iterdir()] == ["config.yaml"]


@needs_libero
def test_without_the_config_libero_asks(home: Path) -> None:
    """The reason for `write_libero_config`; when this fails it is no longer needed."""
    done = subprocess.run(
        [sys.executable, "-c", "import libero.libero"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "EOFError" in done.stderr


def test_an_existing_config_stays(home: Path) -> None:
    path = home / ".libero" / "config.yaml"
    path.parent.mkdir()
    path.write_text("benchmark_root: /mine\n")
    assert write_libero_config() == path
    assert path.read_text() == "benchmark_root: /mine\n"


def test_the_config_needs_libero_installed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libero", None)
    monkeypatch.setattr(libero, "_benchmark_root", lambda: None)
    with pytest.raises(SetupError, match=r"libero is not installed.*pip install"):
        write_libero_config()
    assert not config_path().parent.exists()


@needs_libero
def test_a_config_folder_that_cannot_be_made_is_one_line(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "file" / "folder"))
    with pytest.raises(SetupError, match="LIBERO_CONFIG_PATH") as caught:
        write_libero_config()
    assert "\n" not in str(caught.value)


def test_the_module_loads_neither_torch_nor_libero() -> None:
    code = "import sys, lerobot_attn.machine.libero; print({'torch', 'libero', 'lerobot'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Assets


@pytest.mark.parametrize(
    "kind", ["tar.xz", "tar.gz", "zip", "parent folder", "assets folder", "read-only folder"]
)
def test_assets_are_installed_where_hf_libero_looks(
    home: Path, assets: Path, tmp_path: Path, kind: str
) -> None:
    source = {
        "tar.xz": lambda: tar_of(assets, tmp_path / "a.tar.xz", "w:xz"),
        "tar.gz": lambda: tar_of(assets, tmp_path / "a.tar.gz", "w:gz"),
        "zip": lambda: zip_of(assets, tmp_path / "a.zip"),
        "parent folder": lambda: assets,
        "assets folder": lambda: assets / "assets",
        "read-only folder": lambda: assets,
    }[kind]()
    if kind == "read-only folder":
        for path in assets.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)

    assert assets_state().missing == ASSET_FOLDERS
    assert install_assets(source) == home / ".cache" / "libero" / "assets"

    assert installed_files(home) == EXPECTED_FILES
    assert assets_state().complete
    # Nothing temporary is left, and the source is still there.
    assert [path.name for path in (home / ".cache" / "libero").iterdir()] == ["assets"]
    assert source.exists()
    assert all(path.stat().st_mode & 0o200 for path in assets_state().folder.rglob("*"))


@needs_libero
def test_hf_libero_uses_what_was_installed_instead_of_downloading(home: Path, assets: Path) -> None:
    write_libero_config()
    installed = install_assets(assets)
    done = subprocess.run(
        [sys.executable, "-c", "import libero.libero as l; print(l.get_assets_path())"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1:] == [str(installed)], done.stderr
    assert "Could not download" not in done.stdout


def test_installing_again_changes_nothing(home: Path, assets: Path, tmp_path: Path) -> None:
    folder = install_assets(assets)
    (folder / "mine.xml").write_text("kept")
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    assert install_assets(tar_of(assets, tmp_path / "a.tar.gz", "w:gz")) == folder
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def test_incomplete_assets_are_replaced(home: Path, assets: Path) -> None:
    """An interrupted download leaves folders without files."""
    target = home / ".cache" / "libero" / "assets"
    (target / ASSET_FOLDERS[0]).mkdir(parents=True)
    (target / "old.xml").touch()
    install_assets(assets)
    assert installed_files(home) == EXPECTED_FILES


def test_incomplete_assets_survive_when_the_new_ones_cannot_take_their_place(
    home: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = home / ".cache" / "libero" / "assets"
    target.mkdir(parents=True)
    (target / "old.xml").touch()
    rename = Path.rename

    def rename_but_not_the_new(self: Path, other: Path) -> Path:
        if self.name == "assets" and self.parent.name == "new":
            raise OSError("disk says no")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", rename_but_not_the_new)
    with pytest.raises(SetupError, match="disk says no"):
        install_assets(assets)
    assert installed_files(home) == ["assets/old.xml"]


def add_member(archive: tarfile.TarFile, name: str, **attributes: object) -> None:
    member = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(member, key, value)
    member.size = 0 if "linkname" in attributes else 4
    archive.addfile(member, io.BytesIO(b"evil"))


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("../evil", {}),
        ("assets/../../evil", {}),
        ("assets/link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("assets/link", {"type": tarfile.SYMTYPE, "linkname": "../../../evil"}),
        ("assets/link", {"type": tarfile.LNKTYPE, "linkname": "../evil"}),
        ("assets/device", {"type": tarfile.CHRTYPE, "linkname": ""}),
    ],
)
def test_a_tar_member_that_leaves_the_folder_is_refused(
    home: Path, assets: Path, tmp_path: Path, name: str, attributes: dict
) -> None:
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(assets / "assets", "assets")
        add_member(archive, name, **attributes)
    with pytest.raises(SetupError, match="unsafe"):
        install_assets(path)
    assert not list(tmp_path.rglob("evil"))
    assert installed_files(home) == []


@pytest.mark.parametrize("name", ["../evil", "/evil", "assets/../../evil", "..\\evil", "C:/evil"])
def test_a_zip_member_that_leaves_the_folder_is_refused(
    home: Path, assets: Path, tmp_path: Path, name: str
) -> None:
    path = zip_of(assets, tmp_path / "evil.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "evil")
    with pytest.raises(SetupError, match="unsafe"):
        install_assets(path)
    assert not list(tmp_path.rglob("evil"))
    assert installed_files(home) == []


@pytest.mark.parametrize("kind", ["xz", "gz"])
def test_a_truncated_archive_installs_nothing(home: Path, assets: Path, tmp_path: Path, kind: str) -> None:
    (assets / "assets" / "noise.bin").write_bytes(os.urandom(100_000))
    path = tar_of(assets, tmp_path / f"a.tar.{kind}", f"w:{kind}")
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(SetupError) as caught:
        install_assets(path)
    assert "\n" not in str(caught.value)
    assert installed_files(home) == []


def test_a_source_without_complete_assets_says_what_is_missing(home: Path, assets: Path) -> None:
    shutil.rmtree(assets / "assets" / "scenes")
    with pytest.raises(SetupError, match="scenes missing, expected assets/"):
        install_assets(assets)
    assert installed_files(home) == []


def test_a_source_that_is_no_archive_or_missing_says_so(home: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SetupError, match="is not an archive"):
        install_assets(tmp_path / "notes.txt")
    with pytest.raises(SetupError, match="does not exist"):
        install_assets(tmp_path / "nothing.tar.xz")


def test_a_folder_inside_the_package_comes_first_as_in_hf_libero(
    home: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libero, "_benchmark_root", lambda: assets)
    assert assets_state().folder == assets / "assets"
    assert install_assets(assets) == assets / "assets"
    assert installed_files(home) == []


# The gate of tests marked `libero`

GATED = """
import pytest

@pytest.fixture(scope="session")
def simulation():
    raise AssertionError("started before the gate")

@pytest.mark.libero
def test_needs_libero(simulation):
    pass
"""


@pytest.mark.parametrize(("required", "outcome"), [("", "1 skipped"), ("1", "1 error")])
def test_tests_on_libero_skip_without_assets_and_fail_where_they_are_required(
    home: Path, tmp_path: Path, required: str, outcome: str
) -> None:
    folder = tmp_path / "gated"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = libero: real LIBERO\n")
    for name in ("conftest.py", "allocator.py"):
        shutil.copy(Path(__file__).with_name(name), folder)
    (folder / "test_gated.py").write_text(GATED)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        env={**os.environ, "LEROBOT_ATTN_REQUIRE_LIBERO": required},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert outcome in done.stdout, done.stdout + done.stderr
    assert "started before the gate" not in done.stdout
