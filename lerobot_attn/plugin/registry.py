"""The policy types that are registered with the LeRobot that is installed."""

from __future__ import annotations

from lerobot_attn.policies import ADAPTERS
from lerobot_attn.policies.families import Row, table


def policy_table() -> list[Row]:
    """Return what is offered for each registered policy type, those of installed plugins included."""
    import lerobot.policies  # noqa: F401  (registers LeRobot's own)
    from lerobot.configs import PreTrainedConfig
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    known = PreTrainedConfig.get_known_choices()
    names = {config: name for name, config in known.items()}
    parents = {
        name: [names[parent] for parent in config.__mro__[1:] if parent in names]
        for name, config in known.items()
    }
    return table(known, ADAPTERS, parents)
