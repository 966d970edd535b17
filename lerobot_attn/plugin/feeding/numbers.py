"""Checks of numbers: statistics of the normalisation, and where state and actions lie in them.

Pure: facts in, one `Check` out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from lerobot_attn.errors import FAILED, OK, SKIPPED, WARNING, Check
from lerobot_attn.plugin.feeding.facts import ACTION, NEEDS, STATE, Facts

# Normalised values from which on a number is unusual, and from which on training cannot have had it: -1 to 1
# is all of training for MIN_MAX, 98 % of it for QUANTILES, 80 % for QUANTILE10.
_LIMITS = {"MEAN_STD": (5.0, 10.0), "MIN_MAX": (1.5, 3.0), "QUANTILES": (1.5, 3.0), "QUANTILE10": (4.0, 8.0)}
_MANY = 0.05  # share of a data set's frames that may lie outside
_NARROW = 0.05  # of what training had: 1/57 if radians are fed where degrees were trained
_SOME_FRAMES = 20  # fewer say nothing about a range
_DEGREES = 180 / np.pi
_STATISTICS_REMEDY = (
    "load the checkpoint's processors with the statistics of its training data, "
    'preprocessor_overrides={"normalizer_processor": {"stats": dataset.meta.stats}} and '
    'postprocessor_overrides={"unnormalizer_processor": …}, and save them with save_pretrained'
)


def check_statistics(name: str, facts: Facts) -> Check:
    """Is there something to normalise with, and does it change anything?"""
    expected = facts.expected
    missing: list[str] = []
    placeholders: list[str] = []
    doubtful: list[str] = []
    good: list[str] = []
    for feature, mode in expected.modes.items():
        if mode not in NEEDS or (feature in expected.cameras and feature not in expected.shown_cameras):
            continue
        lacking = expected.lacks(feature)
        if lacking:
            missing.append(f"{feature} has no {' and no '.join(lacking)} for {mode}")
            continue
        low, high = (np.asarray(expected.statistics[feature][one], np.float64) for one in NEEDS[mode])
        neutral = (0, 1) if mode == "MEAN_STD" else (-1, 1)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            missing.append(f"{feature} has numbers that are not finite")
        elif (low == neutral[0]).all() and (high == neutral[1]).all():
            # Actions that a controller limits to -1 … 1 may really fill that range; no state does.
            limited = feature == ACTION and mode != "MEAN_STD"
            said = f"{feature} has {NEEDS[mode][0]} {neutral[0]} and {NEEDS[mode][1]} 1 throughout"
            (doubtful if limited else placeholders).append(said)
        else:
            flat = np.flatnonzero(high == 0 if mode == "MEAN_STD" else high <= low)
            if flat.size and feature in (STATE, ACTION):
                doubtful.append(f"{feature} never changed in dimension {', '.join(map(str, flat))}")
            good.append(f"{feature} by {mode}")
    if missing or placeholders:
        idle = [f"{', '.join(placeholders)}: that normalises nothing"] if placeholders else []
        return Check(name, FAILED, "; ".join([*missing, *idle]), _STATISTICS_REMEDY)
    if doubtful:
        return Check(name, WARNING, "; ".join(doubtful), f"if training was not so: {_STATISTICS_REMEDY}")
    return Check(name, OK, ", ".join(good) or "the checkpoint normalises nothing")


def check_state_size(name: str, facts: Facts) -> Check:
    """Has the state as many numbers as the policy was trained with?"""
    expected, fed = facts.expected, facts.fed
    if expected.state_dim is None:
        return Check(name, SKIPPED, "the policy takes no state")
    if fed is None:
        return Check(name, SKIPPED, "no observation was looked at")
    scale = expected.scale(STATE)
    trained = expected.state_dim if scale is None else np.size(scale.centre)
    remedy = "feed the state that the policy was trained with, or train it on this robot"
    if fed.state is None:
        return Check(name, FAILED, f"no {STATE}, expected {trained} numbers", remedy)
    got = len(fed.state)
    # A feature of the size to which states are padded says nothing of the robot's.
    is_any = scale is None and expected.state_dim == expected.most_dims
    # A preprocessor may have padded it already (EVO-1's does).
    is_any |= scale is None and got == expected.most_dims and not np.any(fed.state[trained:])
    if (got != trained and not is_any) or (expected.most_dims is not None and got > expected.most_dims):
        return Check(name, FAILED, f"got {got} numbers, expected {trained}", remedy)
    return Check(name, OK, f"{got} numbers")


def check_state_range(name: str, facts: Facts) -> Check:
    """Does the state lie where it lay in training?"""
    fed, recorded = facts.fed, facts.recorded
    scale = facts.expected.scale(STATE)
    found = []
    if fed is not None and fed.state is not None:
        names = facts.world.state_names if facts.world else recorded.state_names if recorded else ()
        found.append(_check_range(name, facts, STATE, np.asarray(fed.state, np.float64)[None], names))
    if scale is not None and recorded is not None and recorded.states is not None:
        found.append(_check_recorded(name, facts, STATE, recorded.states, recorded.state_names))
    if not found:
        return Check(name, SKIPPED, "no state was looked at")
    return max(found, key=lambda check: (SKIPPED, OK, WARNING, FAILED).index(check.status))


def check_action_range(name: str, facts: Facts) -> Check:
    """Do a data set's actions lie where they lay in training?"""
    recorded = facts.recorded
    if recorded is None or recorded.actions is None:
        return Check(name, SKIPPED, "no data set was looked at")
    if facts.expected.relative:
        return Check(name, SKIPPED, "the policy's actions are relative to its state, the data set's are not")
    return _check_recorded(name, facts, ACTION, recorded.actions, recorded.action_names)


def check_digits(name: str, facts: Facts) -> Check:
    """How many of the numbers that stand for the state in the prompt are the last ones that there are?"""
    digits = () if facts.fed is None else facts.fed.digits
    if not digits:
        return Check(name, SKIPPED, "no state was found in the prompt")
    n_saturated = sum(digit < 0 or digit >= 255 for digit in digits)
    detail = f"{' '.join(map(str, digits))}: {n_saturated} of {len(digits)} are saturated"
    if n_saturated > len(digits) / 2:
        remedy = "see normalisation and state range: the policy cannot tell this state from others"
        return Check(name, FAILED, detail, remedy)
    return Check(name, OK, detail)


def reach(facts: Facts) -> float | None:
    """Return the largest action that training had, in the robot's units; None where nothing says it."""
    found = facts.expected.statistics.get(ACTION, {})
    # Of the widest that is known, outliers aside.
    for low, high in (NEEDS["QUANTILES"], NEEDS["QUANTILE10"], NEEDS["MIN_MAX"]):
        if low in found and high in found:
            return float(max(np.abs(found[low]).max(), np.abs(found[high]).max()))
    return None


def _check_recorded(name: str, facts: Facts, feature: str, values: np.ndarray, names: Sequence[str]) -> Check:
    """Hold a data set's values, (frame, dim) in the robot's units, to what the checkpoint was trained on."""
    scale = facts.expected.scale(feature)
    if scale is None:
        return Check(name, SKIPPED, f"{feature} is not normalised: nothing says where it lay in training")
    if values.shape[1] != np.size(scale.centre):
        return Check(
            name,
            FAILED,
            f"the data set's {feature} has {values.shape[1]} numbers, expected {np.size(scale.centre)}",
            "use a policy that was trained for this robot",
        )
    rows = (values.astype(np.float64) - scale.centre) / scale.half
    return _check_range(name, facts, feature, rows, names, "of the data set's frames")


def _check_range(
    name: str, facts: Facts, feature: str, rows: np.ndarray, names: Sequence[str], of: str = ""
) -> Check:
    """Check normalised values.

    Args:
        name: the check's.
        facts: the policy's statistics.
        feature: whose values they are.
        rows: (frame, dim), one frame or many.
        names: of the dimensions, or none.
        of: whose frames they are, for the message, where there are many.
    """
    scale = facts.expected.scale(feature)
    if scale is None:
        return Check(name, SKIPPED, f"{feature} is not normalised: nothing says where it lay in training")
    n_frames, dim = rows.shape
    if dim != np.size(scale.centre):
        return Check(name, SKIPPED, f"{feature} has another size, see state size")
    if not np.isfinite(rows).all():
        return Check(name, FAILED, f"{feature} has numbers that are not finite", "repair what gives them")
    usual, most = _LIMITS[facts.expected.modes[feature]]
    in_deviations = facts.expected.modes[feature] == "MEAN_STD"
    for status, limit in ((FAILED, most), (WARNING, usual)):
        outside = (np.abs(rows) > limit).mean(axis=0)
        far = np.flatnonzero(outside > _MANY)
        if far.size:
            labels = names if len(names) == dim else [f"dimension {i}" for i in range(dim)]
            # Of each dimension the value that lies furthest out.
            worst = rows[np.abs(rows).argmax(axis=0), np.arange(dim)] * scale.half + scale.centre
            low, high = scale.centre - scale.half, scale.centre + scale.half
            trained = [f"{a:.3g} to {b:.3g}" for a, b in zip(low, high, strict=True)]
            if in_deviations:
                trained = [f"{a:.3g} ± {b:.3g}" for a, b in zip(scale.centre, scale.half, strict=True)]
            said = [f"{labels[i]} {worst[i]:.3g} (training {trained[i]})" for i in far[:4]]
            more = f" and {far.size - 4} more" if far.size > 4 else ""
            share = f", in {outside.max():.0%} {of}" if of else ""
            detail = (
                f"{'far ' if status == FAILED else ''}outside of training: {', '.join(said)}{more}{share}"
            )
            return Check(name, status, detail, _remedy(rows, scale.centre, scale.half, usual))
    if n_frames >= _SOME_FRAMES:
        spread = np.median(rows.max(axis=0) - rows.min(axis=0)) / 2
        if spread < _NARROW:
            return Check(
                name,
                WARNING,
                f"{feature} varies {spread:.1%} as much as in training",
                "see its unit: radians where degrees were trained? a robot that stands still?",
            )
    unit = "standard deviations" if in_deviations else "times the range of training"
    return Check(name, OK, f"within {np.abs(rows).max():.2g} {unit}")


def _remedy(rows: np.ndarray, centre: np.ndarray, half: np.ndarray, usual: float) -> str:
    """Say what would bring the values back, if something simple does."""
    row = np.median(rows, axis=0) * half + centre
    for factor, what in (
        (1 / _DEGREES, "convert it from degrees to radians"),
        (_DEGREES, "convert it from radians to degrees"),
        (0.001, "convert it from millimetres to metres"),
    ):
        outside = np.abs((row - centre) / half) > usual
        scaled = np.abs((np.where(outside, row * factor, row) - centre) / half)
        if outside.any() and (scaled <= usual).all():
            return f"{what}: it fits then"
    cost = np.maximum(np.abs((row[:, None] - centre) / half) - usual, 0)  # (number, place)
    _, places = linear_sum_assignment(cost)
    if np.trace(cost) > 0 and cost[np.arange(len(row)), places].sum() == 0:
        order = ", ".join(str(int(place)) for place in np.argsort(places))
        return f"put its dimensions in the order of training; in the order {order} they fit"
    return "feed what the policy was trained with (robot, units, order), or give it the right statistics"
