"""A run on the Hugging Face Hub, as a data set's repository, and back: whole episodes, or none of them.

    parcel = pack_up(open_run("outputs/eval"))
    push(parcel, "user/name")
    pull("user/name", "outputs/eval-of-somebody")

Each commit holds whole episodes, so a reader never meets half of one, and what is there is not sent again.
Knows the Hub through `huggingface_hub` alone, which it imports when it is used. Knows nothing of maps.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lerobot_attn.errors import StoreError
from lerobot_attn.sizes import Progress, format_bytes
from lerobot_attn.store.hub_access import bars_off, imported, parsed, repository, told, tried
from lerobot_attn.store.location import PACKED_EPISODE_SUFFIX, bare_name, is_episode_name
from lerobot_attn.store.parcel import Item, Parcel
from lerobot_attn.store.schema import EPISODE_SUFFIX
from lerobot_attn.store.zipped import Zipped

CARD, SHEET = "README.md", "contact_sheet.png"
# In a card that may be written anew; without it the card is somebody's own work.
CARD_MARK = (
    "<!-- Written by `lerobot-attn push`, and anew by the next one; remove this line to keep changes. -->"
)
_TYPE = "dataset"
# A commit of more files, or bytes, may be refused or time out; an episode is never divided.
_COMMIT_FILES, _COMMIT_BYTES = 400, 4 * 10**9
_UPLOAD_FILES = 32  # sent between two steps of the progress bar
_MARK = ".lerobot-attn-pulled"  # in a folder that was pulled, with the repository's name


@dataclass(frozen=True)
class Pushed:
    """What `push` did.

    Attributes:
        url: where the data set can be looked at.
        private: whether only its owners can.
        n_sent: episodes that were sent.
        n_there: episodes that were there already, the same bytes.
        n_bytes: what was sent, bytes.
        notes: what else is to be known, a line each.
    """

    url: str
    private: bool
    n_sent: int
    n_there: int
    n_bytes: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return where it is and how much was sent."""
        return (
            f"{self.url}, {'private' if self.private else 'public'}: {self.n_sent} episodes sent "
            f"({format_bytes(self.n_bytes)}), {self.n_there} were there already"
        )


@dataclass(frozen=True)
class Pulled:
    """What `pull` did.

    Attributes:
        folder: where the run lies.
        revision: the repository's commit.
        n_episodes: episodes of it.
        n_bytes: their size and that of their videos, bytes.
    """

    folder: Path
    revision: str
    n_episodes: int
    n_bytes: int

    def __str__(self) -> str:
        """Return where it lies and how much it is."""
        size = format_bytes(self.n_bytes)
        return f"{self.folder}: {self.n_episodes} episodes ({size}), commit {self.revision[:12]}"


def push(
    parcel: Parcel,
    repo: str,
    *,
    beside: Mapping[str, bytes] | None = None,
    public: bool = False,
    overwrite: bool = False,
    api: Any = None,
    progress: Progress | None = None,
) -> Pushed:
    """Send a run to the Hub. Where it was interrupted, the same call goes on.

    Args:
        parcel: from `pack_up`.
        repo: "user/name" of a data set's repository; it is made where there is none.
        beside: further files, by name: the card and its pictures. They are sent last.
        public: whether everybody may see it. Otherwise one is made private, and a public one refused.
        overwrite: whether episodes that are there and hold something else, and a card that somebody changed,
            are replaced; the repository's history keeps them.
        api: a `huggingface_hub.HfApi`; by default one that is logged in as this machine's user is.
        progress: called as `progress(done, total)` with megabytes.

    Raises:
        ConfigError: the name is none.
        SetupError: `huggingface_hub` is not installed.
        StoreError: no network, no right to write, or another recording in an episode's place.
    """
    repo, hub = repository(repo), imported()
    api = hub.HfApi() if api is None else api
    done, total = 0, max(1, parcel.n_bytes)

    def step(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress is not None:
            progress(round(done / 1e6), round(total / 1e6))

    sent = there = n_bytes = 0
    with bars_off(), told(repo, lambda: f"{sent + there} of {len(parcel.episodes)} episodes are there"):
        tried(lambda: api.create_repo(repo, repo_type=_TYPE, private=not public, exist_ok=True))
        private = bool(tried(lambda: api.repo_info(repo, repo_type=_TYPE)).private)
        if not private and not public:
            raise StoreError(
                f"{repo}: everybody can see it, expected a private data set; make it private in its settings "
                "on the Hub, choose another name, or say --public"
            )
        remote = _files_there(api, repo)
        plan = [(name, items, _state(name, items, remote)) for name, items in parcel.episodes.items()]
        others = [name for name, _, state in plan if state == "other"]
        if others and not overwrite:
            more = f" and {len(others) - 1} more places" if others[1:] else ""
            raise StoreError(
                f"{repo}: holds another recording at {others[0]}{more}, or this one in another form (packed "
                "or not), expected this run's or none; push to another repository, or replace it with "
                "--overwrite"
            )
        there = sum(state == "same" for _, _, state in plan)
        for _, items, state in plan:
            step(sum(item.size for item in items) if state == "same" else 0)
        for batch in _batches([(name, items) for name, items, state in plan if state != "same"]):
            operations = [
                operation for name, items in batch for operation in _operations(hub, name, items, remote)
            ]
            additions = [one for one in operations if isinstance(one, hub.CommitOperationAdd)]
            for start in range(0, len(additions), _UPLOAD_FILES):
                part = additions[start : start + _UPLOAD_FILES]
                _upload(api, repo, part)
                step(sum(one.upload_info.size for one in part))
            _commit(api, repo, operations, _message([name for name, _ in batch]))
            sent += len(batch)
            n_bytes += sum(item.size for _, items in batch for item in items)
        notes = _send_beside(hub, api, repo, beside or {}, remote, overwrite)
    if public and private:
        notes.append("it was private before and stays so: change that in its settings on the Hub")
    ours = {_store_of(name) for items in parcel.episodes.values() for name in [item.name for item in items]}
    extra = len({_store_of(name) for name in remote} - {None} - ours)
    if extra:
        notes.append(f"it holds {extra} further episodes, which this run does not have; they stay")
    return Pushed(f"{api.endpoint}/datasets/{repo}", private, sent, there, n_bytes, tuple(notes))


def pull(place: str, folder: str | Path, *, api: Any = None) -> Pulled:
    """Bring a run, or a part of it, from the Hub. Where it was interrupted, the same call goes on.

    Only stores, videos and the card are brought, whatever else the repository holds. Read them as what they
    are, a stranger's: opening checks sizes, codecs and names.

    Args:
        place: "user/name", or hf://datasets/user/name@revision/folder/of/it.
        folder: where to; made, and it must hold nothing but an earlier part of the same data set.
        api: as of `push`.

    Raises:
        ConfigError: the place is none.
        SetupError: `huggingface_hub` is not installed.
        StoreError: no network, no such data set, no episode in it, a name that leads out of the folder, too
            little space, or a folder with something else in it.
    """
    repo, revision, part = parsed(place)
    hub, folder = imported(), Path(folder)
    api = hub.HfApi() if api is None else api
    mark = folder / _MARK
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: is a file, expected a folder to pull into; choose another")
    if folder.is_dir() and any(folder.iterdir()) and not _is_marked(mark, repo):
        raise StoreError(
            f"{folder}: holds something already, expected an empty folder or an earlier pull of {repo}; "
            "choose another"
        )
    with told(repo, lambda: f"what has come lies in {folder}"):
        found = tried(lambda: api.repo_info(repo, repo_type=_TYPE, revision=revision))
        commit = str(found.sha)
        files = _files_there(api, repo, commit)
        wanted = {name: file for name, file in files.items() if _is_wanted(name, part)}
        episodes = {_store_of(name) for name in wanted} - {None}
        if not episodes:
            raise StoreError(
                f"{place}: holds no episode store, expected …/episode_*{EPISODE_SUFFIX}; was it pushed with "
                "`lerobot-attn push`?"
            )
        for name in wanted:
            _refuse_odd(name, repo)
        n_bytes = sum(file.size for file in wanted.values())
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if n_bytes - sum(_size(folder / name) for name in wanted) > free:
            raise StoreError(
                f"{folder}: {repo} needs {format_bytes(n_bytes)} and {format_bytes(free)} are free; expected "
                "more space; choose another folder, or a part as hf://datasets/user/name/attention/task_0"
            )
        mark.write_text(f"{repo}\n", encoding="utf-8")
        tried(
            lambda: api.snapshot_download(
                repo, repo_type=_TYPE, revision=commit, local_dir=folder, allow_patterns=_patterns(part)
            )
        )
    # Its notes for going on: folders in it are named as stores are, and would be taken for some.
    shutil.rmtree(folder / ".cache" / "huggingface", ignore_errors=True)
    return Pulled(folder, commit, len(episodes), n_bytes)


def _batches(episodes: Iterable[tuple[str, Sequence[Item]]]) -> Iterator[list[tuple[str, Sequence[Item]]]]:
    """Yield as many whole episodes as a commit takes; one at least."""
    batch: list[tuple[str, Sequence[Item]]] = []
    files = n_bytes = 0
    for name, items in episodes:
        size = sum(item.size for item in items)
        if batch and (files + len(items) > _COMMIT_FILES or n_bytes + size > _COMMIT_BYTES):
            yield batch
            batch, files, n_bytes = [], 0, 0
        batch.append((name, items))
        files, n_bytes = files + len(items), n_bytes + size
    if batch:
        yield batch


def _message(names: Sequence[str]) -> str:
    return f"Add {names[0]}" + (f" and {len(names) - 1} more episodes" if names[1:] else "")


# What is there


def _files_there(api: Any, repo: str, revision: str | None = None) -> dict[str, Any]:
    """Return the files of a repository by name, with their checksums."""
    tree = tried(lambda: [*api.list_repo_tree(repo, repo_type=_TYPE, recursive=True, revision=revision)])
    return {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}


def _store_of(name: str) -> str | None:
    """Return the path of the store, unpacked, that a file of a repository is of; None of other files."""
    if name.endswith(PACKED_EPISODE_SUFFIX):
        return f"{bare_name(name)}{EPISODE_SUFFIX}"
    store, found, _ = name.partition(f"{EPISODE_SUFFIX}/")
    return f"{store}{EPISODE_SUFFIX}" if found else None


def _state(name: str, items: Sequence[Item], remote: Mapping[str, Any]) -> str:
    """Return what is in an episode's place: "none", the "same" bytes, or an"other" recording."""
    stored = {item.name: item for item in items if _store_of(item.name) is not None}
    there = _in_place_of(name, remote)
    if not there:
        return "none"
    if there != {*stored} or not all(item.is_like(remote[item.name]) for item in stored.values()):
        return "other"
    beside = [item for item in items if item.name not in stored]
    if any(item.name not in remote for item in beside):
        return "none"  # a video came later
    return "same" if all(item.is_like(remote[item.name]) for item in beside) else "other"


def _operations(hub: Any, name: str, items: Sequence[Item], remote: Mapping[str, Any]) -> Iterator[Any]:
    """Yield what makes the repository hold this episode, and nothing of another in its place."""
    mine = {item.name for item in items}
    for path in sorted(_in_place_of(name, remote) - mine):
        yield hub.CommitOperationDelete(path_in_repo=path)
    for item in items:
        content: Any = str(item.content) if isinstance(item.content, Path) else item.content
        if isinstance(content, Zipped):
            content = content.open()
        yield hub.CommitOperationAdd(path_in_repo=item.name, path_or_fileobj=content)


def _in_place_of(name: str, remote: Mapping[str, Any]) -> set[str]:
    """Return the files of a repository that are an episode's store, packed or not."""
    store = f"{bare_name(name)}{EPISODE_SUFFIX}"
    return {path for path in remote if _store_of(path) == store}


def _send_beside(
    hub: Any, api: Any, repo: str, beside: Mapping[str, bytes], remote: Mapping[str, Any], overwrite: bool
) -> list[str]:
    """Send the card and what it shows, unless somebody has written one; return what is to be said."""
    if CARD in beside and CARD in remote and not overwrite:
        with tempfile.TemporaryDirectory() as aside:
            path = tried(lambda: api.hf_hub_download(repo, CARD, repo_type=_TYPE, local_dir=aside))
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        if CARD_MARK not in text:
            return ["its card is somebody's own and stays; --overwrite writes ours in its place"]
    changed = {
        name: content
        for name, content in beside.items()
        if name not in remote or not Item.of(name, content).is_like(remote[name])
    }
    if changed:
        operations = [hub.CommitOperationAdd(path_in_repo=n, path_or_fileobj=c) for n, c in changed.items()]
        _commit(api, repo, operations, "Say what is recorded here")
    return []


def _upload(api: Any, repo: str, additions: Sequence[Any]) -> None:
    """Send what files hold, ahead of the commit that names them; what the Hub has it does not take again."""
    tried(lambda: api.preupload_lfs_files(repo, additions=additions, repo_type=_TYPE, free_memory=False))


def _commit(api: Any, repo: str, operations: Sequence[Any], message: str) -> None:
    tried(lambda: api.create_commit(repo, operations, commit_message=message, repo_type=_TYPE))


# What comes back


def _is_wanted(name: str, part: str) -> bool:
    """Return whether a file is a store's or a video, and of the wanted part of a run."""
    inside = not part or name.startswith((f"{part}/", f"{bare_name(part)}."))
    if is_episode_name(part):
        inside = inside or name.startswith(f"{bare_name(part)}{EPISODE_SUFFIX}/")
    return inside and (_store_of(name) is not None or name.endswith(".mp4"))


def _patterns(part: str) -> list[str]:
    """Return what `_is_wanted` wants, and the card, as `huggingface_hub` is told; * is slashes too."""
    shown = [CARD, SHEET]
    if is_episode_name(part):
        bare = glob.escape(bare_name(part))
        return [
            f"{bare}{EPISODE_SUFFIX}/*",
            f"{bare}{PACKED_EPISODE_SUFFIX}",
            f"{bare}.*mp4",
            *shown,
        ]
    inside = f"{glob.escape(part)}/" if part else ""
    return [f"{inside}*{EPISODE_SUFFIX}/*", f"{inside}*{PACKED_EPISODE_SUFFIX}", f"{inside}*.mp4", *shown]


def _refuse_odd(name: str, repo: str) -> None:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or any(letter in name for letter in "\\:\0") or "//" in name:
        raise StoreError(
            f"{repo}: holds a file named {name!r}, expected a path inside the folder; do not trust it"
        )


def _is_marked(mark: Path, repo: str) -> bool:
    return mark.is_file() and mark.read_text(encoding="utf-8", errors="replace").strip() == repo


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
