"""Names of cameras that do not fit a policy's, and which of them may be meant."""

from __future__ import annotations

from collections.abc import Sequence


def likely_renames(missing: Sequence[str], spare: Sequence[str]) -> dict[str, str]:
    """Guess which cameras a policy's missing ones are.

    Args:
        missing: cameras that the policy looks at and that are not there.
        spare: cameras that are there and that the policy does not look at.

    Returns:
        Spare camera → missing one: the spare one whose name ends alike, otherwise the first that is left.
    """
    pairs, left = {}, list(spare)
    for name in missing[: len(spare)]:
        short = name.rsplit(".", 1)[-1]
        like = next((camera for camera in left if camera.rsplit(".", 1)[-1] == short), left[0])
        pairs[like] = name
        left.remove(like)
    return pairs
