"""Fixtures that several test modules share."""

import pytest


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory):
    """A demo checkpoint's folder."""
    from lerobot_attn.demo.checkpoint import make_demo_checkpoint

    return make_demo_checkpoint(tmp_path_factory.mktemp("demo") / "pi05_tiny")


@pytest.fixture(scope="session")
def demo_policy(demo_checkpoint):
    """Load the demo checkpoint as lerobot-eval does: settings → (policy, preprocessor, postprocessor)."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.envs.configs import LiberoEnv
    from lerobot.policies.factory import make_policy, make_pre_post_processors

    import lerobot_attn.demo.configuration_pi05_tiny  # noqa: F401

    def load(**settings):
        overrides = [f"--{name}={value}" for name, value in settings.items()]
        config = PreTrainedConfig.from_pretrained(demo_checkpoint, cli_overrides=overrides)
        config.pretrained_path = demo_checkpoint
        policy = make_policy(config, env_cfg=LiberoEnv()).eval()
        return policy, *make_pre_post_processors(config, pretrained_path=str(demo_checkpoint))

    return load
