"""The teacher: picks up an object and puts it into the basket, knowing where everything is.

What it does depends on the present moment alone (positions and the fingers' opening), all of which the policy
can see: a policy without memory can learn it. It acts in the simulator, or in imagination, where the hand
moves by a rule of thumb: `imagine` gives the next 50 actions for every object of a picture without simulating
any.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CHUNK = 50  # actions that the policy predicts at once

GAIN = 16.0  # action per metre of distance; actions end at 1, and below about 0.1 the arm does not move
HOVER = 0.10  # metres above the grasp from which the hand comes down
CENTRED = 0.015  # horizontal distance at which the fingers may close, metres
ALIGNED = 0.010  # horizontal distance at which the hand may be all the way down
CONE = 0.03  # horizontal metres over which the hand comes down from HOVER
RIM = 0.145  # height of the basket's rim, metres
OPEN = -1.0
CLOSE = 1.0

# How the hand answers actions: velocity is carried on by INERTIA, an action of 1 is STEP metres in the long
# run.
INERTIA, STEP = 0.45, 0.0122
FINGER_STEP = 0.010  # metres by which the opening changes a step
OPENED = 0.078  # opening of open fingers


class Stage(IntEnum):
    """What the teacher is doing."""

    APPROACH = 0
    GRASP = 1
    LIFT = 2
    CARRY = 3
    LOWER = 4
    LEAVE = 5


@dataclass(frozen=True)
class Grip:
    """How an object is grasped.

    Attributes:
        height: of the hand over the floor when the fingers close, metres.
        width: opening of the fingers that hold it, metres.
    """

    height: float
    width: float


# Measured: the hand's height at which the fingers stop at a wide part, and the widest opening that held it.
GRIPS = {
    "alphabet_soup": Grip(0.045, 0.0632),
    "cream_cheese": Grip(0.010, 0.0430),
    "salad_dressing": Grip(0.120, 0.0375),
    "bbq_sauce": Grip(0.085, 0.0370),
    "ketchup": Grip(0.115, 0.0355),
    "tomato_sauce": Grip(0.045, 0.0625),
    "butter": Grip(0.010, 0.0395),
    "milk": Grip(0.112, 0.0540),
    "chocolate_pudding": Grip(0.013, 0.0467),
    "orange_juice": Grip(0.112, 0.0542),
}


@dataclass(frozen=True)
class Moment:
    """What the teacher knows; positions in metres, shape (3,).

    Attributes:
        hand: the end effector's position.
        opening: between the fingers, metres.
        target: centre of the object to be fetched.
        rest: height of that centre when the object stands on the floor.
        basket: the basket's position.
    """

    hand: Array
    opening: float
    target: Array
    rest: float
    basket: Array


def holds(moment: Moment, grip: Grip) -> bool:
    """Return whether the fingers have closed on the object."""
    offset = moment.target - moment.hand
    between = np.hypot(offset[0], offset[1]) < 0.03
    level = abs(offset[2] - (moment.rest - grip.height)) < 0.03
    return bool(between and level and grip.width - 0.02 < moment.opening < grip.width + 0.004)


def carry_height(grip: Grip) -> float:
    """Return how high over the floor the hand carries an object over the basket's rim, metres."""
    return max(0.24, grip.height + RIM + 0.025)


def act(moment: Moment, grip: Grip, *, lift: float = 0.0) -> tuple[Array, Stage]:
    """Return the teacher's action, shape (7,), and what it is doing.

    Args:
        moment: where everything is.
        grip: how the object is grasped.
        lift: by how much the object is lifted and carried higher than needed, metres.
    """
    if holds(moment, grip):
        goal, fingers, stage, sideways = _deliver(moment, grip, lift)
    else:
        goal, fingers, stage, sideways = _fetch(moment, grip)
    move = (goal - moment.hand) * GAIN
    move[:2] *= sideways
    action = np.zeros(7)
    action[:3] = move / max(1.0, np.abs(move).max())
    action[6] = fingers
    return action, stage


def _fetch(moment: Moment, grip: Grip) -> tuple[Array, float, Stage, Array]:
    """Return where to, what the fingers do, the stage, and factors on the sideways move, (2,)."""
    hand, target = moment.hand, moment.target
    away = float(np.hypot(*(target - hand)[:2]))
    if np.hypot(*(target - moment.basket)[:2]) < 0.07 and target[2] < RIM:  # there already
        return np.array([hand[0], hand[1], 0.30]), OPEN, Stage.LEAVE, np.ones(2)
    above = HOVER * min(1.0, max(0.0, away - ALIGNED) / CONE)
    goal = np.array([target[0], target[1], grip.height + above])
    if away < CENTRED and abs(hand[2] - grip.height) < 0.018:
        return goal, CLOSE, Stage.GRASP, np.ones(2)
    low = away > 0.04 and hand[2] < grip.height + 0.8 * HOVER  # rise before going sideways among objects
    return goal, OPEN, Stage.APPROACH, np.full(2, 0.3 if low else 1.0)


def _deliver(moment: Moment, grip: Grip, lift: float) -> tuple[Array, float, Stage, Array]:
    """Return where to, what the fingers do, the stage, and factors on the sideways move, (2,)."""
    hand, basket = moment.hand, moment.basket
    away = float(np.hypot(*(basket - hand)[:2]))
    carry = carry_height(grip) + lift  # much higher, and the arm is stretched
    low = grip.height + 0.03
    share = min(1.0, max(0.0, (away - 0.025) / 0.025))
    goal = np.array([basket[0], basket[1], low + share * (carry - low)])
    if away < 0.05:
        fingers = OPEN if away < 0.045 and hand[2] < low + 0.03 else CLOSE
        return goal, fingers, Stage.LOWER, np.ones(2)
    # The arm cannot stretch past the basket's far side: first come nearer, then go across.
    across = min(1.0, max(0.0, 1 - (hand[0] - basket[0] - 0.03) / 0.05))
    goal[1] = hand[1] + across * (basket[1] - hand[1])
    if hand[2] >= carry - 0.03:
        return goal, CLOSE, Stage.CARRY, np.ones(2)
    nearer = 0.8 if hand[0] > basket[0] + 0.03 else 0.1
    return goal, CLOSE, Stage.LIFT, np.array([nearer, 0.1])


def imagine(
    moment: Moment, grip: Grip, *, velocity: Array | None = None, lift: float = 0.0, n: int = CHUNK
) -> Array:
    """Return the teacher's next actions, (n, 7) float32, were the hand to move by the rule of thumb.

    Args:
        moment: where everything is now.
        grip: how the object is grasped.
        velocity: the hand's, metres a step, shape (3,); at rest by default.
        lift: as in `act`.
        n: number of actions.
    """
    velocity = np.zeros(3) if velocity is None else velocity
    actions = np.zeros((n, 7), np.float32)
    for index in range(n):
        action, _ = act(moment, grip, lift=lift)
        actions[index] = action
        carried = holds(moment, grip)
        velocity = INERTIA * velocity + (1 - INERTIA) * STEP * action[:3]
        hand = moment.hand + velocity
        if action[6] > 0:
            around = np.hypot(*(moment.target - hand)[:2]) < 0.03
            opening = max(grip.width if around else 0.0, moment.opening - FINGER_STEP)
        else:
            opening = min(OPENED, moment.opening + FINGER_STEP)
        target = moment.target + velocity if carried and action[6] > 0 else moment.target
        moment = replace(moment, hand=hand, opening=opening, target=target)
    return actions
