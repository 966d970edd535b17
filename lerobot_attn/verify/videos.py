"""Checks of an episode's videos: their frames, whose view they show, and when. Reads no attention."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.errors import Check, StoreError
from lerobot_attn.overlay import resized
from lerobot_attn.store.damage import was_cut
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.references import Video, file_of
from lerobot_attn.store.video import Frame, count_frames, read_frames
from lerobot_attn.verify.ticks import Ticks

_SHIFTS = (-2, -1, 0, 1, 2)
# Two encodings of one image differ by 1 to 3 of 255; another camera, or a turned one, by 20 to 80.
_SAME_IMAGE = 8.0
# A shift must fit worse than none by this much, of 255 and of the difference itself, to be told from noise.
_CLEARLY = (0.01, 0.005)
_STRIDE = 2  # every other row and column of pixels is compared


def frame_counts(episode: Episode) -> list[Check]:
    """Check that each video has as many frames as the store."""
    cameras = [camera.name for camera in episode.layout.cameras if not camera.is_empty]
    errors = episode.attributes.get("video_errors")
    errors = errors if isinstance(errors, dict) else {}
    checks = []
    for camera in cameras:
        name = f"frames of {episode.layout.short_names[camera]}"
        if camera in episode.videos:
            checks.append(_frame_count(name, episode.videos[camera], episode))
        elif camera in errors:
            checks.append(Check.of(name, None, f"its video could not be written: {errors[camera]}"))
        elif camera in episode.attributes.get("videos", {}):
            checks.append(Check.of(name, None, episode.why_no_video(camera)))
        else:
            checks.append(Check.of(name, None, "no video of it was recorded"))
    name = "frames of evaluation"
    if episode.eval_video is not None:
        checks.append(_frame_count(name, episode.eval_video, episode))
    else:
        checks.append(Check.of(name, None, _no_eval_video(episode)))
    return checks


def _frame_count(name: str, video: Video, episode: Episode) -> Check:
    try:
        found = count_frames(video)
    except StoreError as error:
        return Check.of(name, False, str(error))
    if found == episode.n_frames:
        return Check.of(name, True, f"{found}, as the store")
    if found > episode.n_frames and was_cut(episode):
        return Check.of(name, True, f"{found}, of which a repair left the store {episode.n_frames}")
    return Check.of(name, False, f"{file_of(video).name} has {found} frames, the store {episode.n_frames}")


@dataclass
class _Match:
    """How a camera's frames fit the evaluation's: mean absolute differences of 255, by shift."""

    camera: str
    by_shift: dict[int, float]
    turned: float

    @property
    def best(self) -> float:
        return min(self.by_shift.values())


def against_eval_video(episode: Episode, ticks: Ticks) -> list[Check]:
    """Check that a camera shows what the evaluation filmed, and at the same frames."""
    names = ("evaluation's view", "evaluation's timing")
    if episode.eval_video is None:
        return [Check.of(name, None, _no_eval_video(episode)) for name in names]
    if not episode.videos:
        return [Check.of(name, None, "no camera video to compare with") for name in names]
    matches = _matches(episode, ticks)
    if not matches:
        return [Check.of(name, None, "the videos hold no frames to compare") for name in names]
    best = min(matches, key=lambda match: match.best)
    turned = min(matches, key=lambda match: match.turned)
    short = episode.layout.short_names
    found = f"{short[best.camera]} differs by {best.best:.2f} of 255 a pixel"
    if best.best > _SAME_IMAGE:
        hint = "; an environment may film another view than the policy's"
        if turned.turned <= _SAME_IMAGE:
            hint = f"; {short[turned.camera]} turned by 180° differs by {turned.turned:.2f}"
        view = Check.of(names[0], False, f"no camera's view: {found}, expected at most {_SAME_IMAGE:g}{hint}")
        return [view, Check.of(names[1], None, "no camera shows what the evaluation filmed")]
    return [Check.of(names[0], True, found), _timing(names[1], best)]


def _timing(name: str, match: _Match) -> Check:
    same = match.by_shift.get(0)
    others = {shift: value for shift, value in match.by_shift.items() if shift}
    if same is None or not others:
        return Check.of(name, None, "too few frames to tell")
    shift = min(others, key=lambda key: others[key])
    margin = max(_CLEARLY[0], _CLEARLY[1] * same)
    found = ", ".join(f"{value:+d}: {match.by_shift[value]:.2f}" for value in sorted(match.by_shift))
    if same + margin < others[shift]:
        return Check.of(name, True, f"each frame fits its own number best ({found})")
    if others[shift] + margin < same:
        return Check.of(name, False, f"frame t fits the evaluation's frame t{shift:+d} better ({found})")
    return Check.of(name, None, f"the scene moves too little to tell ({found})")


def _matches(episode: Episode, ticks: Ticks) -> list[_Match]:
    """Compare each camera's frames t with the evaluation's frames t-2 … t+2, for the same t all of them."""
    assert episode.eval_video is not None
    n_film = count_frames(episode.eval_video)
    matches = []
    for index, (camera, video) in enumerate(episode.videos.items()):
        n = min(count_frames(video), n_film)
        if n == 0:
            continue
        reach = min(2, (n - 1) // 2)
        shifts = [shift for shift in _SHIFTS if abs(shift) <= reach]
        totals, turned = dict.fromkeys(shifts, 0.0), 0.0
        # Frames t-2 … t+2 of the evaluation are held, and no more.
        window: deque[NDArray[np.int16]] = deque(maxlen=2 * reach + 1)
        views: deque[NDArray[np.int16]] = deque(maxlen=reach + 1)  # its first is of the window's middle
        pairs = zip(
            read_frames(video, size_px=episode.image_size_px(camera)),
            read_frames(episode.eval_video),
            strict=False,
        )
        for number, (view, film) in enumerate(pairs):
            if number >= n:
                break
            window.append(_fitted(film, view.shape[:2])[::_STRIDE, ::_STRIDE].astype(np.int16))
            views.append(view[::_STRIDE, ::_STRIDE].astype(np.int16))
            if index == 0:
                ticks.tick()
            if len(window) < 2 * reach + 1:
                continue
            middle = views[0]
            for shift in shifts:
                totals[shift] += float(np.abs(window[reach + shift] - middle).mean())
            turned += float(np.abs(window[reach][::-1, ::-1] - middle).mean())
        compared = n - 2 * reach
        means = {shift: total / compared for shift, total in totals.items()}
        matches.append(_Match(camera, means, turned / compared))
    return matches


def _fitted(film: Frame, size_px: tuple[int, ...]) -> Frame:
    height, width = size_px
    # Odd sizes are padded by one in the file; a frame of another size altogether is scaled.
    if 0 <= film.shape[0] - height <= 1 and 0 <= film.shape[1] - width <= 1:
        return film[:height, :width]
    return resized(film, (height, width))


def _no_eval_video(episode: Episode) -> str:
    if isinstance(episode.attributes.get("eval_video"), dict):
        return "the evaluation's MP4 is not in the run's folder; LeRobot renders 10 episodes a task"
    return "the evaluation wrote no MP4 of this episode"
