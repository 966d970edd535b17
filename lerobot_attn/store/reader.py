"""Open episode stores lazily: milliseconds to open, no tensor read until asked.

    episode = open_episode("out/attention/libero_object_0/episode_00000.zarr")
    episode.dataset.suffix_attention.sel(layer=17, denoise_step=9)[0].values

Knows neither torch nor LeRobot. Stores may come from strangers: `lerobot_attn.store.trust` checks them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from lerobot_attn.errors import StoreError, first_line
from lerobot_attn.layout import TokenLayout
from lerobot_attn.masks import ROLES, Instance, in_words
from lerobot_attn.store.attributes import Header, RecordedCondition, read_header
from lerobot_attn.store.location import bare_name, files_at
from lerobot_attn.store.references import RemoteVideo, Video, film_of, referenced
from lerobot_attn.store.stills import still_of
from lerobot_attn.store.trust import shortened, shown
from lerobot_attn.store.url import Place, Url, place_of

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

# Relative error of rounding a float32 to a dtype.
_ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


class Episode:
    """One episode's store. Get it from `open_episode`.

    Attributes:
        path: the store's folder, or its file where it is packed; a `Url` of either.
        attributes: everything that the store says of itself.
    """

    def __init__(self, path: Place, header: Header):
        self.path = path
        self.attributes = header.attributes
        self._header = header

    def __copy__(self) -> Episode:
        """Return a copy that shares what is open already; what it opens itself is its own."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process opens the same episode by; nothing that is open."""
        return {"path": self.path.absolute(), "attributes": self.attributes, "_header": self._header}

    def __repr__(self) -> str:
        """Say which episode this is."""
        state = "complete" if self.is_complete else "incomplete"
        return (
            f"<Episode {self.path.parent.name}/{self.path.name}: {self.task!r}, {self.n_frames} frames, "
            f"{self.n_inferences} inferences, {state}>"
        )

    @property
    def header(self) -> Header:
        """What the store said of itself when it was opened."""
        return self._header

    @property
    def bare_name(self) -> str:
        """The store's name without its suffix, packed or not: what the names of its videos begin with."""
        return bare_name(self.path.name)

    @property
    def task(self) -> str:
        """The instruction."""
        return self._header.task

    @property
    def is_complete(self) -> bool:
        """Whether the episode was recorded to its end."""
        return self._header.is_complete

    @property
    def success(self) -> bool | None:
        """Whether the task was solved; None if the episode was interrupted."""
        return self._header.success

    @property
    def n_inferences(self) -> int:
        """Number of inferences that are there."""
        return self._header.n_inferences

    @property
    def n_frames(self) -> int:
        """Number of frames that are there."""
        return self._header.n_frames

    @property
    def has_random_weights(self) -> bool:
        """Whether the policy was a demo whose maps mean nothing."""
        return self._header.has_random_weights

    @property
    def policy_remark(self) -> str:
        """One line on the policy that belongs beside its maps; "" if none, or if the weights are random."""
        return self._header.policy_remark

    @property
    def condition(self) -> RecordedCondition:
        """What was done to the policy: the interventions, whose text belongs beside the maps."""
        return self._header.condition

    @cached_property
    def layout(self) -> TokenLayout:
        """Segments of the keys, cameras and their geometry.

        Raises:
            StoreError: the store's layout is damaged.
        """
        try:
            return TokenLayout.from_dict(self.attributes["layout"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self.path}: its token layout is damaged ({shown(error)})") from error

    @cached_property
    def dataset(self) -> xr.Dataset:
        """All arrays as a lazy xarray dataset, one Dask chunk per chunk of the store.

        Its selections can be written with `to_zarr` and `to_netcdf`. In its attributes, objects such as the
        layout are JSON text, because netCDF takes no objects; `attributes` has them as objects.

        Raises:
            StoreError: the arrays' metadata is damaged.
        """
        return self._open(with_dask=True)

    @cached_property
    def arrays(self) -> xr.Dataset:
        """The same dataset without Dask: a selection is read when its values are asked for.

        The quickest for single maps; a computation over many of them belongs on `dataset`.

        Raises:
            StoreError: the arrays' metadata is damaged.
        """
        return self._open(with_dask=False)

    def rewards(self) -> NDArray[Any] | None:
        """Return (frame,) rewards, without opening the other arrays; None where the loop had none.

        Raises:
            StoreError: they are damaged.
        """
        from lerobot_attn.store.lazy import single_array

        if self.array_shape("reward") is None:
            return None
        try:
            return single_array(self.path, "reward", self.n_frames)
        except Exception as error:  # a damaged chunk raises whatever its codec raises
            raise StoreError(f"{self.path}: reward cannot be read: {first_line(error)}") from error

    def _open(self, *, with_dask: bool) -> xr.Dataset:
        from lerobot_attn.store.lazy import lazy_dataset
        from lerobot_attn.store.numbers import allowed_numbers

        # What a recording has committed since this episode was opened is for `refresh`.
        rows = {"inference": self.n_inferences, "frame": self.n_frames}
        cameras = self.attributes.get("layout", {}).get("cameras")
        n_queries = self._header.shapes["action_chunk"][1]
        allowed = allowed_numbers(
            len(cameras) if isinstance(cameras, list) else 0,
            self.n_inferences,
            n_queries,
            (self._header.shapes.get("instance") or (0,))[0],
        )
        try:
            return lazy_dataset(self.path, rows, allowed, with_dask=with_dask)
        except Exception as error:  # zarr and xarray raise many kinds for damaged metadata
            raise StoreError(f"{self.path}: damaged metadata: {shortened(first_line(error))}") from error

    @cached_property
    def instances(self) -> tuple[Instance, ...]:
        """What the episode's masks can show, in the order of their numbers; none if it has no masks.

        Raises:
            StoreError: a role does not exist.
        """
        if self.array_shape("segmentation") is None:
            return ()
        names, roles = (self.arrays[name].values.tolist() for name in ("instance", "instance_role"))
        odd = [role for role in roles if role not in ROLES]
        if odd:
            raise StoreError(f"{self.path}: its instance_role has {shown(odd[0])}, no role: damaged")
        return tuple(map(Instance, names, roles))

    @property
    def masked(self) -> dict[str, Any] | None:
        """What the episode's masks are of, as plain JSON values and as a line of text; None without masks."""
        if not self.instances:
            return None
        said = self.attributes.get("segmentation", {})
        cameras = [str(camera) for camera in self.arrays["mask_camera"].values]
        height, width = (self.array_shape("segmentation") or ())[-2:]
        short = ", ".join(camera.rpartition(".")[2] for camera in cameras)
        return {
            "source": said.get("source"),
            "cameras": cameras,
            "size_px": [height, width],
            "instances": [instance._asdict() for instance in self.instances],
            "text": f"{short} {height} x {width}, from {said.get('source')}: {in_words(self.instances)}",
        }

    def array_shape(self, name: str) -> tuple[int, ...] | None:
        """Return an array's shape without opening it, or None if the episode does not have it."""
        return self._header.shapes.get(name)

    def refresh(self) -> Episode:
        """Return the episode as it is now: while it is recorded, with what was committed since.

        Raises:
            StoreError: the store is gone or damaged.
        """
        return open_episode(self.path)

    def follow(self, *, poll_s: float = 0.5, timeout_s: float | None = None) -> Iterator[Episode]:
        """Yield the episode, and again whenever inferences or frames were committed, until it is complete.

        Looks at the store every so often, so it works on network file systems too; what is yielded always
        holds whole inferences only.

        Args:
            poll_s: seconds between two looks.
            timeout_s: stop after so many seconds without anything new (a killed recording is never
                completed); None waits for ever.

        Raises:
            StoreError: the store is gone or damaged.
        """
        episode, since = self.refresh(), time.monotonic()
        yield episode
        while not episode.is_complete and (timeout_s is None or time.monotonic() - since < timeout_s):
            time.sleep(poll_s)
            latest = self.refresh()
            if _progress_of(latest) != _progress_of(episode):
                episode, since = latest, time.monotonic()
                yield episode

    @cached_property
    def videos(self) -> dict[str, Video]:
        """Camera → MP4 of what it showed the policy, or its part of a data set's file; where that exists.

        A recording that was killed could not list its videos: they are found by their names beside the store.
        """
        listed = self.attributes.get("videos")
        if isinstance(self.path, Url):
            return self._videos_at(self.path.parent, listed if isinstance(listed, dict) else {})
        if not isinstance(listed, dict):
            return self._unlisted_videos()
        found = {}
        for camera, video in listed.items():
            shown: Video | None = None
            if isinstance(video, dict) and video.get("reference") is True:
                shown = referenced(video, self.path, self.n_frames)
            elif isinstance(video, dict):
                shown = self._beside(video.get("path"))
            if shown is not None:
                found[camera] = shown
        return found

    def video(self, camera: str) -> Video:
        """Return the MP4 of what a camera showed the policy, or its part of a data set's file.

        Raises:
            StoreError: there is none.
        """
        if camera not in self.videos:
            raise StoreError(f"{self.path}: has no video of camera {camera}: {self.why_no_video(camera)}")
        return self.videos[camera]

    def why_no_video(self, camera: str) -> str:
        """Say in one line why there is no video of a camera, and what helps."""
        failed, listed, capture = (
            self.attributes.get(name) for name in ("video_errors", "videos", "capture")
        )
        if isinstance(failed, dict) and camera in failed:
            return f"its video could not be written: {failed[camera]}"
        if isinstance(listed, dict) and camera in listed:
            video = listed[camera]
            if isinstance(video, dict) and video.get("reference") is True:
                return (
                    f"the data set's file {video.get('absolute_path')} is not there, or another one by now; "
                    "put it back, or replay with cameras=true"
                )
            return "its MP4 is not beside the store; copy it too"
        if isinstance(capture, dict) and capture.get("cameras") is False:
            return "recorded without cameras (cameras=false)"
        return "no video beside the store; record with --eval.attention.cameras=true (the default)"

    def still(self, camera: str, frame: int) -> Path | None:
        """Return the JPEG of a camera at the newest inference's first frame, while it is recorded.

        Args:
            camera: its full name.
            frame: the frame's number; of others there is none.
        """
        video = self.videos.get(camera)
        return self._beside(still_of(video, frame).name, ".jpg") if isinstance(video, Path) else None

    def image_size_px(self, camera: str) -> tuple[int, int] | None:
        """Return (height, width) of a camera's images; its video may have a row or column more."""
        geometry = next((c.geometry for c in self.layout.cameras if c.name == camera), None)
        return None if geometry is None else (geometry.height_px, geometry.width_px)

    @cached_property
    def eval_video(self) -> Path | None:
        """The evaluation's own MP4 of this episode, where the file exists.

        It is looked for in the run's `videos` and in the store's own folder alone, whatever the store says.
        """
        return None if isinstance(self.path, Url) else film_of(self.path, self.attributes)

    def stored_bytes(self) -> int:
        """Return the size of the store's files, bytes."""
        return files_at(self.path).total_bytes()

    def raw_bytes(self) -> int:
        """Return the size of the maps before compression, bytes."""
        return self._header.raw_bytes()

    def row_sum_tolerance(self, n_keys: int | None = None) -> float:
        """Return how far from 1 a row of attention may sum, by the roundings that it went through.

        The policy hands its softmax over in some dtype (relative error 2^-8 for bfloat16, 2^-11 for float16):
        the store's `attention_dtype`, in older stores the policy's own. It is then rounded to float16 (2^-11,
        and 2^-25 absolute for tiny values), and to `keep_bits` mantissa bits if that was chosen. The sum is
        over the keys that the layer can see.

        Args:
            n_keys: keys of a row; by default those of the token layout.
        """
        keep_bits = self.attributes.get("capture", {}).get("keep_bits")
        tolerance = 2**-11 + (self.layout.n_keys if n_keys is None else n_keys) * 2**-25
        dtype = self.attributes.get("attention_dtype", self.attributes.get("policy", {}).get("dtype"))
        tolerance += _ROUNDING.get(dtype, 0.0) if isinstance(dtype, str) else 0.0
        if type(keep_bits) is int and 0 <= keep_bits <= 10:
            tolerance += 2.0 ** -(keep_bits + 1)
        return tolerance

    def _unlisted_videos(self) -> dict[str, Video]:
        found: dict[str, Video] = {}
        for camera in self.layout.cameras if "layout" in self.attributes else ():
            # Of two cameras with one short name, the second one's file has the whole name.
            for name in (camera.name, camera.name.rpartition(".")[2]):
                path = self._beside(f"{self.bare_name}.{name}.mp4")
                if path is not None and path not in found.values():
                    found[camera.name] = path
                    break
        return found

    def _videos_at(self, folder: Url, listed: dict[str, Any]) -> dict[str, Video]:
        """Return the videos beside a store at a URL, whose files are fetched when they are asked for."""
        from lerobot_attn.store.remote import fetched

        names = {camera: video.get("path") for camera, video in listed.items() if isinstance(video, dict)}
        return {
            camera: RemoteVideo(str(folder / name), partial(fetched, folder / name))
            for camera, name in names.items()
            if _is_plain(name, ".mp4")
        }

    def _beside(self, name: Any, suffix: str = ".mp4") -> Path | None:
        """Return the file of that name in the store's own folder, if it is there.

        Anything with a path in it is refused, and so is a link that leads elsewhere.
        """
        if not _is_plain(name, suffix) or isinstance(self.path, Url):
            return None
        path = self.path.parent / name
        try:
            is_here = path.is_file() and path.resolve().parent == self.path.parent.resolve()
        except (OSError, RuntimeError, ValueError):  # too long a name, a loop of links, a null byte
            return None
        return path if is_here else None


def open_episode(path: str | Place) -> Episode:
    """Open an episode's store; reads one small file.

    Args:
        path: the store's folder, whatever it is called, or its `….zarr.zip` where it is packed; a URL of
            either (s3://, gs://, az://, http://, https://, hf://datasets/…), which needs the extra `remote`.

    Raises:
        StoreError: nothing there, something else, damaged metadata, a newer schema, or a recording that has
            not committed anything yet.
    """
    # Of the metadata the attributes and shapes are kept: thousands of episodes fit into memory.
    place = place_of(path)
    return Episode(place, read_header(place))


def _is_plain(name: Any, suffix: str) -> TypeGuard[str]:
    return isinstance(name, str) and Path(name).name == name and Path(name).suffix == suffix


def _progress_of(episode: Episode) -> tuple[int, int, bool]:
    return episode.n_inferences, episode.n_frames, episode.is_complete


def __getattr__(name: str) -> Any:
    """Find `open_run`, `Run` and `TableRow`, which were here before they had a module of their own."""
    if name in ("open_run", "Run", "TableRow"):
        from importlib import import_module

        return getattr(import_module(f"{__package__}.runs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
