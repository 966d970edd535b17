"""LIBERO's files: the config file it would otherwise ask about, and its 3D assets.

Imports no module of LIBERO that could ask a question: `import libero.libero` reads an answer from stdin until
its config file exists. Knows nothing of tasks, simulation or rendering, and downloads nothing: without assets
hf-libero fetches them from the Hub itself.
"""

from __future__ import annotations

import importlib.util
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from lerobot_attn.errors import SetupError

# hf-libero downloads unless the first four are there; without the scenes no task loads.
ASSET_FOLDERS = (
    "articulated_objects",
    "stable_scanned_objects",
    "turbosquid_objects",
    "stable_hope_objects",
    "scenes",
)
# RuntimeError: a zip file with a password.
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, RuntimeError)
CONFIG_KEYS = ("benchmark_root", "bddl_files", "init_states", "datasets", "assets")


@dataclass(frozen=True)
class AssetsState:
    """Where hf-libero will look for its assets, and what is not there.

    Attributes:
        folder: the folder that hf-libero will use.
        missing: names of the needed folders that are absent or empty; none when the assets are complete.
    """

    folder: Path
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether LIBERO can run without downloading anything."""
        return not self.missing


def config_path() -> Path:
    """Return the config file that LIBERO reads: in `$LIBERO_CONFIG_PATH`, by default `~/.libero`."""
    folder = os.environ.get("LIBERO_CONFIG_PATH")
    # An empty variable means the working folder, as it does to LIBERO.
    return (Path.home() / ".libero" if folder is None else Path(folder)) / "config.yaml"


def write_libero_config() -> Path:
    """Write LIBERO's config file with LIBERO's own defaults, so that importing it asks nothing.

    Returns:
        The config file's path. A file that exists already stays as it is.

    Raises:
        SetupError: LIBERO is not installed, or the file cannot be written.
    """
    path = config_path()
    if path.exists():
        return path
    root = _benchmark_root()
    if root is None:
        raise SetupError(
            "libero is not installed, expected the hf-libero package; pip install 'lerobot_policy_attn[eval]'"
        )
    # Joined as LIBERO joins them ("./bddl_files"), so that both write the same file.
    values = (
        str(root),
        os.path.join(root, "./bddl_files"),  # noqa: PTH118  pathlib would drop the dots
        os.path.join(root, "./init_files"),  # noqa: PTH118
        os.path.join(root, "../datasets"),  # noqa: PTH118
        os.path.join(root, "./assets"),  # noqa: PTH118
    )
    text = yaml.dump(dict(zip(CONFIG_KEYS, values, strict=True)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: LIBERO takes a half-written file for a finished one.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            new = Path(folder) / path.name
            new.write_text(text)
            new.replace(path)
    except OSError as error:
        raise SetupError(
            f"cannot write {path}: {error.strerror}; set LIBERO_CONFIG_PATH to a folder that is writable"
        ) from error
    return path


def assets_state() -> AssetsState:
    """Return which assets folder hf-libero will use, and what it lacks."""
    root = _benchmark_root()
    packaged = None if root is None else root / "assets"
    # hf-libero prefers a folder inside its package, complete or not.
    folder = packaged if packaged is not None and packaged.exists() else _cached_assets()
    return AssetsState(folder, _missing_folders(folder))


def install_assets(source: Path) -> Path:
    """Put LIBERO's assets where hf-libero looks before it downloads them.

    Args:
        source: an archive (.tar.xz, .tar.gz, .zip) or a folder that holds `assets/`, or an assets folder.

    Returns:
        The assets folder. Complete assets stay as they are; incomplete ones are replaced.

    Raises:
        SetupError: `source` is missing, unsafe, damaged or without complete assets, or the target cannot be
            written.
    """
    state = assets_state()
    if state.complete:
        return state.folder
    source = Path(source).expanduser()
    if not source.exists():
        raise SetupError(f"{source} does not exist, expected LIBERO's assets as an archive or a folder")
    target = _cached_assets()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A sibling is on the same file system, so that the last step is one rename.
        with tempfile.TemporaryDirectory(prefix=".assets-", dir=target.parent) as work:
            unpacked = Path(work) / "new"
            if source.is_dir():
                shutil.copytree(_find_assets(source, source), unpacked / "assets")
            else:
                unpacked.mkdir()
                _unpack(source, unpacked)
            _make_writable(unpacked)
            new = _find_assets(unpacked, source)
            _replace_folder(target, new, aside=Path(work) / "old")
    except OSError as error:
        raise SetupError(
            f"cannot install LIBERO's assets in {target}: {error}; check its permissions and the free space"
        ) from error
    return target


def _benchmark_root() -> Path | None:
    """Return the folder of `libero.libero`, or None without LIBERO; runs only the outer, empty package."""
    spec = importlib.util.find_spec("libero")
    if spec is None:
        return None
    for location in spec.submodule_search_locations or ():
        root = Path(location).absolute() / "libero"
        if (root / "__init__.py").is_file():
            return root
    return None


def _cached_assets() -> Path:
    return Path.home() / ".cache" / "libero" / "assets"


def _missing_folders(folder: Path) -> tuple[str, ...]:
    return tuple(
        name for name in ASSET_FOLDERS if not (folder / name).is_dir() or not any((folder / name).iterdir())
    )


def _find_assets(folder: Path, source: Path) -> Path:
    """Return the complete assets folder: `folder/assets` or `folder` itself."""
    for candidate in (folder / "assets", folder):
        if not _missing_folders(candidate):
            return candidate
    found = folder / "assets" if (folder / "assets").is_dir() else folder
    raise SetupError(
        f"{source} holds no complete LIBERO assets: {', '.join(_missing_folders(found))} missing, "
        f"expected assets/ with {', '.join(ASSET_FOLDERS)}"
    )


def _replace_folder(target: Path, new: Path, aside: Path) -> None:
    """Put `new` in `target`'s place and what was there in `aside`; on failure `target` is as it was."""
    if target.exists():
        target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive that may come from anywhere: a member that would leave `folder` is refused."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                for member in opened.infolist():
                    _check_zip_member(member, archive)
                opened.extractall(folder)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        else:
            raise SetupError(f"{archive} is not an archive, expected .tar.xz, .tar.gz or .zip, or a folder")
    except SetupError:
        raise
    except tarfile.FilterError as error:
        raise SetupError(f"{archive} is unsafe and was not installed: {error}") from error
    except _DAMAGED as error:
        raise SetupError(f"{archive} is damaged: {error or type(error).__name__}; get it again") from error


def _check_zip_member(member: zipfile.ZipInfo, archive: Path) -> None:
    # zipfile would quietly move such a file into the folder; an archive with one is not what it says it is.
    name = member.filename.replace("\\", "/")
    outside = name.startswith("/") or ":" in name.split("/")[0] or ".." in name.split("/")
    if outside or stat.S_ISLNK(member.external_attr >> 16):
        raise SetupError(f"{archive} is unsafe and was not installed: {member.filename!r} points outside it")


def _make_writable(folder: Path) -> None:
    # A read-only folder cannot be renamed, nor removed later, by anybody but root.
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | stat.S_IWUSR | (stat.S_IRWXU if path.is_dir() else stat.S_IRUSR))
