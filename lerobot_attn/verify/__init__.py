"""Whether an episode's maps, frames and videos belong together: the checks that a sceptic wants.

    report = verify_episode(open_episode("….zarr"))
    report.passed, report.to_dict()
    contact_sheet(open_episode("….zarr"))  # a figure, to check with one's own eyes

Reads nothing but the store and the videos beside it; what is missing is skipped, what is damaged fails.
"""

from lerobot_attn.errors import Check
from lerobot_attn.verify.checks import verify_episode
from lerobot_attn.verify.contact_sheet import VerifySettings, contact_sheet
from lerobot_attn.verify.findings import VerifyReport

__all__ = ["Check", "VerifyReport", "VerifySettings", "contact_sheet", "verify_episode"]
