"""Episodes whose attention is known, written like recorded ones: to test analysis, figures and speed.

    path = write_planted_episode("out", SyntheticPlan())   # attention on one known patch per frame and camera
    path = write_planted_episode("out", FAMILIES["smolvla"])   # with the token layout of another policy
    path = write_planted_episode("out", SyntheticPlan(objects={"block": "target", "bowl": "destination"}))
    path = write_planted_episode("out", SyntheticPlan(neurons={"vlm": (0, 3)}))   # a unit follows the frames
    path = write_softmax_episode("out", SyntheticPlan.full_size())   # Pi0.5's sizes, softmax-like numbers

No policy runs: what these stores hold was made up, and each says so in its `policy` attribute.
"""

from lerobot_attn.synthetic.activations import planted_activations, planted_unit
from lerobot_attn.synthetic.plan import FAMILIES, SyntheticPlan
from lerobot_attn.synthetic.planted import (
    planted_partner,
    planted_patch,
    planted_shares,
    planted_word,
    write_planted_episode,
)
from lerobot_attn.synthetic.scene import Box, planted_box, planted_scene
from lerobot_attn.synthetic.softmax import write_softmax_episode
from lerobot_attn.synthetic.store import camera_frames

__all__ = [
    "FAMILIES",
    "Box",
    "SyntheticPlan",
    "camera_frames",
    "planted_activations",
    "planted_box",
    "planted_partner",
    "planted_patch",
    "planted_scene",
    "planted_shares",
    "planted_unit",
    "planted_word",
    "write_planted_episode",
    "write_softmax_episode",
]
