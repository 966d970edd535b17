"""What a robot did: heights and speeds of made-up episodes, whose truth is planted."""

import numpy as np
import pytest
import xarray as xr

from lerobot_attn.analysis.behaviour import (
    lift_height,
    lift_height_max,
    lift_heights,
    lift_profile,
    mean_speed,
)
from lerobot_attn.errors import SelectionError

NAMES = ("eef_x", "eef_y", "eef_z", "gripper_left", "gripper_right")


def made_up(opening, height, *, x=None, basket=None, asked=1, names=NAMES):
    """An episode of a hand: the gripper's opening (m), its height (m), and where it is along x (m)."""
    opening, height = np.asarray(opening, float), np.asarray(height, float)
    x = np.zeros(len(height)) if x is None else np.asarray(x, float)
    state = np.stack([x, 0 * x, height, opening / 2, -opening / 2], axis=1)
    arrays = {"state": (("frame", "state_dim"), state[:, : len(names)])}
    coords = {"state_dim": list(names)}
    if basket is not None:
        frames = np.arange(0, len(height), asked)
        where = np.full((len(frames), 3, 3), np.nan)
        where[:, 1] = (0.0, 0.0, 0.04)
        where[:, 2] = (basket, 0.0, 0.0)
        arrays["instance_position"] = (("inference", "instance", "xyz"), where)
        coords |= {
            "instance_role": ("instance", ["background", "target", "destination"]),
            "inference_frame": ("inference", frames),
        }
    return xr.Dataset(arrays, coords)


OPENED, CLOSED = [0.08] * 3, [0.04] * 6
#            approach        closes  rises            over the basket  opens
OPENING = [*OPENED, *CLOSED, 0.08, 0.08]
HEIGHT = [0.3, 0.2, 0.1, 0.1, 0.15, 0.25, 0.30, 0.30, 0.20, 0.1, 0.3]
X = [0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.3, 0.46, 0.5, 0.5, 0.5]


def test_the_lift_segment_goes_from_the_closing_to_the_opening():
    episode = made_up(OPENING, HEIGHT)
    np.testing.assert_allclose(lift_heights(episode), [0.1, 0.15, 0.25, 0.3, 0.3, 0.2])
    assert lift_height(episode) == pytest.approx(1.3 / 6)
    assert lift_height_max(episode) == pytest.approx(0.3)


@pytest.mark.parametrize("asked", [1, 4])
def test_it_ends_where_the_hand_arrives_over_the_destination(asked):
    episode = made_up(OPENING, HEIGHT, x=X, basket=0.5, asked=asked)
    np.testing.assert_allclose(lift_heights(episode), [0.1, 0.15, 0.25, 0.3, 0.3])  # within 5 cm of it
    missed = made_up(OPENING, HEIGHT, x=X, basket=0.9)
    assert len(lift_heights(missed)) == 6


@pytest.mark.parametrize(
    ("opening", "height", "expected"),
    [
        ([0.08] * 4, [0.1, 0.2, 0.3, 0.4], []),  # it never closed
        ([0.08, 0.04, 0.04, 0.04], [0.1, 0.1, 0.1, 0.11], [0.1, 0.1, 0.11]),  # nor rose
        # A grasp that failed, then one that lifted.
        (
            [0.08, 0.04, 0.08, 0.08, 0.04, 0.04],
            [0.2, 0.1, 0.1, 0.1, 0.1, 0.4],
            [0.1, 0.4],
        ),
        # It was dropped, and taken up again: the first lift counts.
        ([0.08, 0.04, 0.04, 0.08, 0.04, 0.04], [0.1, 0.1, 0.2, 0.2, 0.1, 0.9], [0.1, 0.2]),
    ],
    ids=["never", "not risen", "second grasp", "dropped"],
)
def test_which_grasp_counts(opening, height, expected):
    episode = made_up(opening, height)
    np.testing.assert_allclose(lift_heights(episode), expected)
    assert np.isnan(lift_height(episode)) == np.isnan(lift_height_max(episode)) == (not expected)
    assert np.isnan(lift_profile(episode, 5)).all() == (not expected)


def test_a_lift_of_another_length_has_the_same_profile():
    slow = made_up([0.08, *[0.04] * 9], [0.1, *np.linspace(0.1, 0.5, 9)])
    fast = made_up([0.08, *[0.04] * 5], [0.1, *np.linspace(0.1, 0.5, 5)])
    for episode in (slow, fast):
        np.testing.assert_allclose(lift_profile(episode, 5), [0.1, 0.2, 0.3, 0.4, 0.5])


def test_speed_is_the_way_from_frame_to_frame():
    episode = made_up([0.08] * 4, [0.1, 0.1, 0.1, 0.14], x=[0.0, 0.03, 0.03, 0.06])
    assert mean_speed(episode) == pytest.approx((30 + 0 + 50) / 3)
    assert np.isnan(mean_speed(episode.isel(frame=[0])))


def test_without_a_gripper_nothing_is_made_up():
    with pytest.raises(SelectionError, match=r"lift: the state names no gripper, expected"):
        lift_heights(made_up([0.08] * 4, [0.1] * 4, names=NAMES[:3]))
    with pytest.raises(SelectionError, match=r"end effector: the state has"):
        mean_speed(made_up([0.08] * 4, [0.1] * 4, names=("a", "b", "c")))
