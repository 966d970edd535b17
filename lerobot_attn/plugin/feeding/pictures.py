"""Checks of cameras and pictures: which there are, how they are coded, how they are turned.

Pure: facts in, one `Check` out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from lerobot_attn.errors import FAILED, OK, SKIPPED, WARNING, Check
from lerobot_attn.plugin.feeding.facts import Facts
from lerobot_attn.policies.cameras import likely_renames

_IMAGES = "observation.image"
_STEP = 1 / 255
_DARK = 2 * _STEP
_SIDE_PX = 32  # pictures are compared this small: where things are, not what they look like
_ALIKE, _BETTER = 0.5, 0.1  # correlation from which on pictures show the same, and by which one is better
_TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mirrored": lambda picture: picture[:, ::-1],
    "upside down": lambda picture: picture[::-1],
    "turned by 180°": lambda picture: picture[::-1, ::-1],
    "turned by 90°": lambda picture: np.rot90(picture),
    "turned by 270°": lambda picture: np.rot90(picture, 3),
}


def check_cameras(name: str, facts: Facts) -> Check:
    """Has the policy the cameras that it was trained with?"""
    expected, fed = facts.expected, facts.fed
    if fed is None:
        return Check(name, SKIPPED, "no observation was looked at")
    if fed.has_patches:
        return Check(name, SKIPPED, "the preprocessor leaves patches, and no picture that could be looked at")
    missing = [camera for camera in expected.shown_cameras if camera not in fed.pictures]
    extra = [camera for camera in fed.pictures if camera not in expected.cameras]
    where = "the observation" if facts.world is None else facts.world.what
    if missing:
        detail = f"{where} lacks {', '.join(missing)}: the policy goes on without, and raises no error"
        detail += f"; it drops {', '.join(extra)}" if extra else ""
        return Check(name, FAILED, detail, _rename(missing, extra))
    known = ", ".join(expected.shown_cameras) or "the policy looks at no camera"
    if extra:
        return Check(
            name,
            WARNING,
            f"the policy drops {', '.join(extra)}: it was trained with {known}",
            "nothing, if that is meant; otherwise train a policy with that camera",
        )
    return Check(name, OK, known)


def check_pictures(name: str, facts: Facts) -> Check:
    """Are pictures float in [0, 1], do they show something, and are they as wide as high as in training?"""
    expected, fed = facts.expected, facts.fed
    wrong, odd, good = [], [], []
    for camera, picture in ({} if fed is None else fed.pictures).items():
        if camera not in expected.cameras:
            continue
        if picture.dtype.kind != "f":
            wrong.append(f"{camera} is {picture.dtype}")
            continue
        scale = expected.scale(camera)
        values = picture if scale is None else picture * scale.half + scale.centre
        low, high = float(values.min()), float(values.max())
        height, width = _channels_last(values).shape[:2]
        good.append(f"{camera} {width}x{height}, {round(low, 3) + 0:.2g} to {high:.2g}")
        if not (low >= -0.01 and high <= 1.01):  # nor a number that is none
            wrong.append(f"{camera} goes from {low:.3g} to {high:.3g}")
        elif high < _DARK and (np.abs(values / _STEP - np.round(values / _STEP)) > 0.01).mean() > 0.5:
            # Finer steps than a camera has.
            wrong.append(f"{camera} goes up to {high:.2g}, as if divided by 255 twice")
        elif high - low < _DARK:
            odd.append(f"{camera} shows one colour, {high:.2g}")
        trained = expected.cameras[camera]
        if len(trained) == 3 and abs(width / height * trained[1] / trained[2] - 1) > 0.05:
            odd.append(f"{camera} is {width}x{height}, in training {trained[2]}x{trained[1]}")
    if wrong:
        return Check(
            name,
            FAILED,
            f"{', '.join(wrong)}; expected float in [0, 1]: actions are wrong then, without an error",
            "convert once, before the preprocessor: image.float() / 255",
        )
    if odd:
        return Check(
            name, WARNING, ", ".join(odd), "look at what the camera shows, and show it as in training"
        )
    return Check(name, OK, "; ".join(good)) if good else Check(name, SKIPPED, "no picture was looked at")


def check_orientation(name: str, facts: Facts) -> Check:
    """Are pictures turned, mirrored, swapped or recoloured against those of the data set?"""
    if facts.fed is None or facts.recorded is None or facts.world is None or not facts.recorded.pictures:
        return Check(name, SKIPPED, "give a data set beside an environment to compare their pictures")
    recorded = {
        camera: [_small(picture) for picture in pictures]
        for camera, pictures in facts.recorded.pictures.items()
        if len(pictures)
    }
    wrong, unlike, good = [], [], []
    for camera in facts.expected.shown_cameras:
        picture = facts.fed.pictures.get(camera)
        if picture is None or picture.dtype.kind != "f" or camera not in recorded:
            continue
        shown = _small(_channels_last(picture))
        found = _likeness(shown, recorded[camera])
        others = {f"is {turn}": _likeness(move(shown), recorded[camera]) for turn, move in _TURNS.items()}
        others |= {
            f"looks like {other}": _likeness(shown, pictures)
            for other, pictures in recorded.items()
            if other != camera
        }
        best = max(others, key=lambda one: others[one])
        if others[best] > max(_ALIKE, found + _BETTER):
            wrong.append(f"{camera} {best} (correlation {others[best]:.2f}, as it is {found:.2f})")
        elif found < _ALIKE:
            unlike.append(f"{camera} (correlation {found:.2f})")
        elif _swaps_colours(shown, recorded[camera]):
            wrong.append(f"{camera} has red and blue swapped")
        else:
            good.append(f"{camera} as in the data set (correlation {found:.2f})")
    if wrong:
        return Check(
            name,
            FAILED,
            f"{', '.join(wrong)} against the data set",
            "turn, rename or recolour pictures on their way to the policy until they are as in training",
        )
    if unlike:
        return Check(
            name,
            WARNING,
            f"unlike every first frame of the data set: {', '.join(unlike)}",
            "compare them by eye: another scene, or another view of it",
        )
    return Check(name, OK, "; ".join(good)) if good else Check(name, SKIPPED, "no camera is in both")


def _rename(missing: Sequence[str], extra: Sequence[str]) -> str:
    if not extra:
        return "show that camera too, or use a policy that was trained without it"
    pairs = likely_renames(missing, extra)
    return f"perhaps --rename_map='{json.dumps(pairs)}' (of doctor and replay: --rename)"


def _channels_last(picture: np.ndarray) -> np.ndarray:
    """Return (height, width, 3) of that or of (3, height, width)."""
    return np.moveaxis(picture, 0, -1) if picture.shape[0] == 3 else picture


def _small(picture: np.ndarray) -> np.ndarray:
    """Return a picture, (height, width, 3) in [0, 1], averaged to a few pixels."""
    pixels = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return np.asarray(pixels.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BOX), np.float64)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    norm = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / norm) if norm else 0.0


def _likeness(picture: np.ndarray, pictures: Sequence[np.ndarray]) -> float:
    """Return the correlation with the recorded picture that is most like it, without colours."""
    return max(_correlation(picture.mean(axis=2), other.mean(axis=2)) for other in pictures)


def _swaps_colours(picture: np.ndarray, pictures: Sequence[np.ndarray]) -> bool:
    """Whether what is red is blue in the recorded picture that is most like it."""
    other = max(pictures, key=lambda one: _correlation(picture.mean(axis=2), one.mean(axis=2)))
    colours, others = (one - one.mean(axis=2, keepdims=True) for one in (picture, other))
    if min(np.abs(colours).mean(), np.abs(others).mean()) < 2:  # of 255: grey pictures tell nothing
        return False
    return _correlation(colours[..., ::-1], others) > _correlation(colours, others) + 3 * _BETTER
