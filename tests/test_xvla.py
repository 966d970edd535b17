"""X-VLA: the contract, each way in which a map could be wrong, and a recording of it to the last picture."""

from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from adapter_contract import AdapterContract, act  # noqa: E402

from lerobot_attn.capture import capture_attention  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402

TOP, WRIST = "observation.images.top", "observation.images.wrist"
SIZE = (96, 128)
TASKS = ("put the bowl on the plate", "open the drawer")
EVERYTHING = AttentionConfig(layers="all", prefix_layers="all")


def raw_observation(n=2, seed=0, size=SIZE, tasks=TASKS, cameras=(TOP, WRIST)):
    """What the preprocessor gets: images in [0, 1]."""
    noise = torch.Generator().manual_seed(seed)
    raw = {name: torch.rand(n, 3, *size, generator=noise) for name in cameras}
    raw["observation.state"] = torch.rand(n, 6, generator=noise)
    return {**raw, "task": [tasks[i % len(tasks)] for i in range(n)]}


@pytest.fixture(scope="module")
def loaded(xvla_policy):
    return xvla_policy()


@pytest.fixture(scope="module")
def preprocessor(loaded):
    return loaded[1]


@pytest.fixture
def policy(loaded):
    loaded[0].reset()
    return loaded[0]


@pytest.fixture(scope="module")
def batch(preprocessor):
    return preprocessor(raw_observation())


def captured(policy, batch, config=EVERYTHING, **options):
    """Return the record of one inference."""
    policy.reset()
    with capture_attention(policy, config, **options) as capture:
        act(policy, batch, 0)
    (record,) = capture.drain()
    return record


def denormalised(image):
    """Undo what the preprocessor does with ImageNet's mean and standard deviation."""
    std = image.new_tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return image * std + image.new_tensor([0.485, 0.456, 0.406]).view(3, 1, 1)


class XVLAContract(AdapterContract):
    def picture(self, image):
        return denormalised(image)

    @pytest.fixture
    def longer(self, batch):
        @contextmanager
        def with_more_slots():
            tokens = batch["observation.language.tokens"]
            yield {**batch, "observation.language.tokens": torch.cat([tokens, tokens[:, -3:]], dim=1)}

        return with_more_slots

    @pytest.fixture
    def break_policy(self, policy):
        @contextmanager
        def broken():
            def fail(*args):
                raise RuntimeError("the policy broke")

            base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
            handle = base.model.transformer.blocks[-1].mlp.register_forward_pre_hook(fail)
            try:
                yield
            finally:
                handle.remove()

        return broken


class TestXVLA(XVLAContract):
    pass


@pytest.fixture(scope="module")
def in_bfloat16(xvla_policy):
    return xvla_policy(dtype="bfloat16")[0]


class TestXVLAInBfloat16(XVLAContract):
    is_bfloat16 = True

    @pytest.fixture
    def policy(self, in_bfloat16):
        in_bfloat16.reset()
        return in_bfloat16


@pytest.fixture(scope="module")
def wrapped(xvla_policy):
    peft = pytest.importorskip("peft")
    targets = r".*\.(q_proj|v_proj|qkv)"
    return peft.get_peft_model(xvla_policy()[0], peft.LoraConfig(r=2, target_modules=targets)).eval()


class TestXVLAWithLora(XVLAContract):
    @pytest.fixture
    def policy(self, wrapped):
        wrapped.reset()
        return wrapped


@pytest.fixture(scope="module")
def with_a_view_too_many(xvla_policy):
    return xvla_policy(use_hetero_proj=True, num_image_views=3)[0]


class TestXVLAWithAViewTooMany(XVLAContract):
    @pytest.fixture
    def policy(self, with_a_view_too_many):
        with_a_view_too_many.reset()
        return with_a_view_too_many
