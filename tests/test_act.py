"""ACT: the contract, each way in which a map could be wrong, and a recording of it to the last picture."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from adapter_contract import AdapterContract, act  # noqa: E402
from lerobot.configs import PreTrainedConfig  # noqa: E402
from lerobot.configs.types import FeatureType, PolicyFeature  # noqa: E402
from lerobot.policies.act.configuration_act import ACTConfig  # noqa: E402
from lerobot.policies.act.modeling_act import ACTPolicy  # noqa: E402
from matplotlib.text import Text  # noqa: E402
from test_explorer import client_of, values  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from lerobot_attn import open_episode, open_run, record_episodes  # noqa: E402
from lerobot_attn.analysis import attention, modality_share  # noqa: E402
from lerobot_attn.analysis.propagation import attention_flow, attention_rollout  # noqa: E402
from lerobot_attn.capture import capture_attention  # noqa: E402
from lerobot_attn.cli import app  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.errors import ConfigError, SelectionError  # noqa: E402
from lerobot_attn.layout import Kind  # noqa: E402
from lerobot_attn.plot import plot  # noqa: E402
from lerobot_attn.plot.kinds import KINDS  # noqa: E402
from lerobot_attn.policies import adapter_for  # noqa: E402
from lerobot_attn.store.video import read_frames  # noqa: E402
from lerobot_attn.verify import verify_episode  # noqa: E402

TOP, WRIST = "observation.images.top", "observation.images.wrist"
SIZE = (96, 128)


def make_policy(
    policy_class=ACTPolicy, config_class=ACTConfig, *, cameras=(TOP, WRIST), env_state=0, **settings
):
    """A small ACT with random weights; its attention is made peaked, so that mixed-up indices show."""
    features = {name: PolicyFeature(FeatureType.VISUAL, (3, *SIZE)) for name in cameras}
    features["observation.state"] = PolicyFeature(FeatureType.STATE, (6,))
    if env_state:
        features["observation.environment_state"] = PolicyFeature(FeatureType.ENV, (env_state,))
    torch.manual_seed(0)
    policy = policy_class(
        config_class(
            **{
                "device": "cpu",
                "pretrained_backbone_weights": None,
                "dim_model": 32,
                "n_heads": 4,
                "dim_feedforward": 64,
                "n_encoder_layers": 2,
                "n_decoder_layers": 3,
                "n_vae_encoder_layers": 1,
                "latent_dim": 8,
                "chunk_size": 10,
                "n_action_steps": 4,
                "input_features": features,
                "output_features": {"action": PolicyFeature(FeatureType.ACTION, (6,))},
                **settings,
            }
        )
    ).eval()
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if name.endswith("in_proj_weight"):
                weight *= 3
    return policy


@PreTrainedConfig.register_subclass("act_of_somebody")
@dataclass
class DerivedConfig(ACTConfig):
    pass


class DerivedPolicy(ACTPolicy):
    config_class = DerivedConfig
    name = "act_of_somebody"


def make_batch(n=2, seed=0, size=SIZE, cameras=(TOP, WRIST), env_state=0):
    noise = torch.Generator().manual_seed(seed)
    batch = {name: torch.rand(n, 3, *size, generator=noise) for name in cameras}
    batch["observation.state"] = torch.rand(n, 6, generator=noise)
    if env_state:
        batch["observation.environment_state"] = torch.rand(n, env_state, generator=noise)
    return batch


@pytest.fixture(scope="module")
def made():
    return make_policy()


@pytest.fixture
def policy(made):
    made.reset()
    return made


@pytest.fixture
def batch():
    return make_batch()


class ACTContract(AdapterContract):
    is_exact = False

    @pytest.fixture
    def longer(self):
        """No prompt changes the number of tokens here, but the size of the images does."""

        @contextmanager
        def with_wider_images():
            yield make_batch(size=(96, 160))

        return with_wider_images

    def breaks_at(self, base):
        return base.model.decoder.layers[-1].linear1


class TestACT(ACTContract):
    pass


class TestACTInBfloat16(ACTContract):
    """`--policy.use_amp=true`; a policy of bfloat16 weights LeRobot cannot run, for its latent is float32."""

    is_bfloat16 = True

    def act(self, policy, batch, seed, n=1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return act(policy, batch, seed, n)


@pytest.fixture(scope="module")
def derived():
    return make_policy(DerivedPolicy, DerivedConfig, pre_norm=True, n_encoder_layers=3)


class TestACTDerived(ACTContract):
    @pytest.fixture
    def policy(self, derived):
        derived.reset()
        return derived


@pytest.fixture(scope="module")
def wrapped():
    peft = pytest.importorskip("peft")
    base = make_policy()
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["linear1", "linear2"])).eval()


class TestACTWithLora(ACTContract):
    @pytest.fixture
    def policy(self, wrapped):
        wrapped.reset()
        return wrapped


def captured(policy, batch, **settings):
    with capture_attention(policy, AttentionConfig(layers="all", prefix_layers="all", **settings)) as capture:
        actions, _ = act(policy, batch, 5)
    (record,) = capture.drain()
    return record, actions


def test_stored_softmax_equals_an_independent_one(policy, batch):
    """Softmaxed in float64 by numpy, from what the modules got and their own weights."""
    modules = [layer.self_attn for layer in policy.model.encoder.layers]
    modules += [layer.multihead_attn for layer in policy.model.decoder.layers]
    got = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: got.__setitem__(
                module, (*args[:2], kwargs.get("query"), kwargs.get("key"))
            ),
            with_kwargs=True,
        )
        for module in modules
    ]
    record, _ = captured(policy, batch)
    for handle in handles:
        handle.remove()

    def true(module):
        inputs = [part.double() for part in got[module] if part is not None]
        weights = module.in_proj_weight.double().chunk(3)
        biases = module.in_proj_bias.double().chunk(3)
        q, k = (
            (part @ weight.T + bias).unflatten(-1, (4, 8)).permute(1, 2, 0, 3)
            for part, weight, bias in zip(inputs, weights, biases, strict=False)
        )
        scores = (q @ k.transpose(-2, -1) / 8**0.5).detach().numpy()
        exponents = np.exp(scores - scores.max(-1, keepdims=True))
        return exponents / exponents.sum(-1, keepdims=True)

    for layer in range(2):
        np.testing.assert_allclose(
            record.prefix_attention[layer], true(modules[layer]), rtol=2**-10, atol=2**-18
        )
    for layer in range(3):
        found = record.suffix_attention[0, layer][..., : record.layout.prefix_len]
        np.testing.assert_allclose(found, true(modules[2 + layer]), rtol=2**-10, atol=2**-18)


def test_maps_differ_so_that_a_mixed_up_index_shows(policy, batch):
    record, _ = captured(policy, batch)
    maps = record.suffix_attention[..., : record.layout.prefix_len].astype(np.float32)
    for axis in range(1, 6):
        assert np.abs(np.diff(maps, axis=axis)).max() > 0.01, axis


def test_query_i_is_action_i(policy, batch):
    """An action's own position decides its row, in the first layer and no other row."""
    before, _ = captured(policy, batch)
    with torch.no_grad():
        policy.model.decoder_pos_embed.weight[6] += 1
    after, _ = captured(policy, batch)
    with torch.no_grad():
        policy.model.decoder_pos_embed.weight[6] -= 1
    first = [record.suffix_attention[0, 0].astype(np.float32) for record in (before, after)]
    change = np.nanmax(np.abs(first[1] - first[0]), axis=(0, 1, 3))
    assert change.argmax() == 6
    assert np.delete(change, 6).max() < change[6] / 5


def test_tokens_are_what_the_layout_says(policy, batch):
    """Each input disturbed changes what the encoder is given at its own tokens, and nowhere else."""
    given = []
    handle = policy.model.encoder.register_forward_pre_hook(
        lambda module, args: given.append(args[0].detach())
    )
    try:
        record, _ = captured(policy, batch)
        layout = record.layout
        segments = {segment.name: segment for segment in layout.segments}
        assert list(segments) == ["latent", "state", TOP, WRIST, "action"]
        for name, key in (("state", "observation.state"), (TOP, TOP), (WRIST, WRIST)):
            given.clear()
            captured(policy, batch)
            captured(policy, {**batch, key: batch[key] * 0.5})
            changed = (given[1] - given[0]).abs().amax(dim=(1, 2)).numpy() > 0
            expected = np.zeros(layout.prefix_len, bool)
            expected[segments[name].start : segments[name].stop] = True
            np.testing.assert_array_equal(changed, expected)
    finally:
        handle.remove()
    kinds = record.key_kind[0]
    assert (kinds[0], kinds[1], kinds[-1]) == (Kind.SPECIAL, Kind.STATE, Kind.ACTION)
    assert not {Kind.TASK, Kind.TEXT, Kind.TEMPLATE, Kind.PADDING} & set(kinds.tolist())
    assert record.token_id.shape == (2, 0)
    assert record.prompt_truncated is None
    assert not record.layers_seeing_suffix


@pytest.mark.parametrize(
    ("backbone", "dilated"), [("resnet18", False), ("resnet50", False), ("resnet50", True)]
)
def test_cells_are_centred_where_the_geometry_says(backbone, dilated):
    """By the gradient of a cell of the feature map in the image's pixels: fields are wide, centres exact."""
    policy = make_policy(
        vision_backbone=backbone,
        replace_final_stride_with_dilation=dilated,
        cameras=(TOP,),
        n_decoder_layers=1,
    )
    size = (480, 640)
    record, _ = captured(policy, make_batch(1, size=size, cameras=(TOP,)))
    (camera,) = record.layout.cameras
    geometry = camera.geometry
    stride = 16 if dilated else 32
    assert (geometry.grid_rows, geometry.grid_columns) == (480 // stride, 640 // stride)
    for row, column in ((7, 11),):
        if dilated:
            row, column = 2 * row, 2 * column
        image = make_batch(1, size=size, cameras=(TOP,))[TOP].requires_grad_()
        policy.model.backbone(image)["feature_map"][0, :, row, column].sum().backward()
        weight = image.grad[0].pow(2).sum(0).numpy()
        weight /= weight.sum()
        y = weight.sum(1) @ (np.arange(size[0]) + 0.5)
        x = weight.sum(0) @ (np.arange(size[1]) + 0.5)
        assert geometry.patch_at(y, x) == (row, column)
        centre = [
            (index + 0.5) * stride - pad
            for index, pad in ((row, geometry.pad_top_px), (column, geometry.pad_left_px))
        ]
        assert abs(y - centre[0]) < stride / 4
        assert abs(x - centre[1]) < stride / 4


@pytest.mark.parametrize("camera", [TOP, WRIST])
@pytest.mark.parametrize("at", [(0, 0), (100, 70), (130, 300), (230, 310)])
def test_a_planted_object_lands_in_the_right_patch(policy, camera, at):
    """A bright square changes the state of its own cell most, among all tokens that the encoder is given.

    The backbone is a stub that keeps the ResNet's strides and paddings: a ResNet's fields are far wider than
    the cells between them, which the gradients of the test above are for.
    """
    side, size = 9, (240, 320)

    class Narrow(torch.nn.Module):
        def forward(self, image):
            for kernel, padding in ((7, 3), (3, 1), (3, 1), (3, 1), (3, 1)):
                image = torch.nn.functional.avg_pool2d(image, kernel, 2, padding)
            return {"feature_map": image.mean(1, keepdim=True).expand(-1, 512, -1, -1)}

    dark = {name: torch.full((1, 3, *size), 0.2) for name in (TOP, WRIST)}
    batch = {**dark, "observation.state": torch.zeros(1, 6)}
    lit = {**batch, camera: dark[camera].clone()}
    lit[camera][..., at[0] : at[0] + side, at[1] : at[1] + side] = 1
    given, features = [], Narrow()
    handles = [
        policy.model.encoder.register_forward_pre_hook(lambda module, args: given.append(args[0].detach())),
        policy.model.backbone.register_forward_hook(lambda module, args, output: features(args[0])),
    ]
    try:
        captured(policy, batch)
        record, _ = captured(policy, lit)
    finally:
        for handle in handles:
            handle.remove()
    token = int((given[1] - given[0]).norm(dim=-1)[:, 0].argmax())
    layout = record.layout
    index = [c.name for c in layout.cameras].index(camera)
    assert layout.key_camera()[token] == index
    rows, columns = layout.key_patch()
    expected = layout.cameras[index].geometry.patch_at(at[0] + side / 2, at[1] + side / 2)
    assert (rows[token], columns[token]) == expected


@pytest.mark.parametrize("n", [1, 3])
def test_any_batch_size(policy, n):
    record, _ = captured(policy, make_batch(n))
    assert record.suffix_attention.shape[2] == record.batch_size == n


def test_a_state_of_the_environment_is_a_token_and_cameras_may_be_none():
    policy = make_policy(cameras=(), env_state=4)
    record, _ = captured(policy, make_batch(cameras=(), env_state=4))
    assert [segment.name for segment in record.layout.segments] == [
        "latent",
        "state",
        "environment_state",
        "action",
    ]
    assert record.layout.cameras == ()


def test_temporal_ensembling_infers_at_every_step():
    policy = make_policy(temporal_ensemble_coeff=0.01, n_action_steps=1)
    expected, _ = act(policy, make_batch(), 0, n=3)
    with capture_attention(policy) as capture:
        found, _ = act(policy, make_batch(), 0, n=3)
    assert torch.equal(found, expected)
    assert len(capture.records) == 3


def test_an_ensembled_action_is_no_token_of_a_chunk(tmp_path):
    policy = make_policy(temporal_ensemble_coeff=0.01, n_action_steps=1)
    with (
        record_episodes(policy, tmp_path, AttentionConfig(layers=[-1]), fps=10) as recording,
        recording.episode() as episode,
    ):
        policy.reset()
        for t in range(4):
            batch = observation(t)
            with torch.inference_mode():
                action = policy.select_action(batch)
            episode.step({name: value[0] for name, value in batch.items()}, action[0])
    (found,) = open_run(tmp_path)
    assert found.dataset.frame_query.values.tolist() == [0, -1, -1, -1]
    assert found.dataset.frame_inference.values.tolist() == [0, 1, 2, 3]
    assert attention(found.dataset, frame=2).attrs["query"].startswith("mean of executed action")


def test_a_policy_of_one_layer_needs_no_setting():
    """LeRobot's ACT has one decoder layer unless told otherwise; the default is to keep the last two."""
    policy = make_policy(n_decoder_layers=1)
    with capture_attention(policy) as capture:
        act(policy, make_batch(), 0)
    assert next(capture.drain()).suffix_attention.shape[1] == 1
    with (
        pytest.raises(ConfigError, match="layer -3 does not exist: this policy has 1"),
        capture_attention(policy, AttentionConfig(layers=[-3])),
    ):
        pass


def test_training_goes_on_unrecorded(policy, batch):
    """The loss runs the same modules without an inference."""
    target = {**batch, "action": torch.zeros(2, 10, 6), "action_is_pad": torch.zeros(2, 10, dtype=torch.bool)}
    with capture_attention(policy) as capture:
        policy.forward(target)
        assert not capture.records
        act(policy, batch, 0)
    assert len(capture.records) == 1


def test_normalised_images_are_no_pictures(policy, batch):
    batch[TOP] = batch[TOP] * 2 - 1
    assert set(adapter_for(policy).camera_views(batch)) == {WRIST}


def test_the_loops_observation_shows_what_was_normalised(policy, tmp_path):
    """Also where normalised values happen to lie in [0, 1], as those of a grey wall do."""
    grey = torch.full((1, 3, *SIZE), 0.6)
    seen = {TOP: grey, WRIST: grey.clone(), "observation.state": torch.zeros(1, 6)}
    seen[WRIST][..., 10:40, 10:40] = 0.1
    batch = {**seen, **{name: (seen[name] - 0.5) / 0.25 for name in (TOP, WRIST)}}
    assert set(adapter_for(policy).camera_views(batch)) == {TOP}
    with (
        record_episodes(policy, tmp_path, AttentionConfig(layers=[-1]), fps=10) as recording,
        recording.episode() as episode,
    ):
        for _ in range(4):
            with torch.inference_mode():
                action = policy.select_action(batch)
            episode.step({name: value[0] for name, value in seen.items()}, action[0])
    (found,) = open_run(tmp_path)
    for name in (TOP, WRIST):
        (first, *_) = read_frames(found.videos[name])
        expected = seen[name][0].permute(1, 2, 0).numpy() * 255
        assert np.abs(first - expected).mean() < 4, name


def test_pictures_of_cameras_that_the_policy_does_not_know_are_told(policy, tmp_path, caplog):
    batch = make_batch(1)
    batch |= {name: batch[name] * 4 - 2 for name in (TOP, WRIST)}
    seen = {"observation.images.front": batch[TOP][0] / 4 + 0.5, "observation.state": torch.zeros(6)}
    with (
        record_episodes(policy, tmp_path, AttentionConfig(layers=[-1]), fps=10) as recording,
        recording.episode() as episode,
        caplog.at_level("WARNING"),
    ):
        for _ in range(3):
            with torch.inference_mode():
                action = policy.select_action(batch)
            episode.step(seen, action[0])
    (said,) = [r.getMessage() for r in caplog.records if "has pictures" in r.getMessage()]
    assert said.startswith(
        f"The observation has pictures of observation.images.front, expected some of the "
        f"policy's cameras ({TOP}, {WRIST})"
    )
    (found,) = open_run(tmp_path)
    assert found.is_complete
    assert not found.videos


def test_weights_in_bfloat16_fail_as_they_do_unwatched(batch):
    """In LeRobot itself, whose latent is float32; the recording does not stand before its error."""
    policy = make_policy().to(torch.bfloat16)
    batch = {name: value.to(torch.bfloat16) for name, value in batch.items()}
    with pytest.raises(RuntimeError, match="same dtype") as unwatched:
        act(policy, batch, 0)
    with capture_attention(policy) as capture, pytest.raises(RuntimeError, match="same dtype") as watched:
        act(policy, batch, 0)
    assert str(watched.value) == str(unwatched.value)
    assert watched.traceback[-1].path == unwatched.traceback[-1].path
    assert watched.value.__cause__ is watched.value.__context__ is None
    assert not capture.records


def test_compiled_changes_nothing_and_says_so(policy, batch, caplog):
    with caplog.at_level("WARNING"):
        captured(policy, batch, compiled=True)
    assert [r.getMessage() for r in caplog.records] == [
        "compiled=true changes nothing: LeRobot does not compile ACT"
    ]


def observation(t):
    """A square that moves by 3 pixels a frame, in both cameras."""
    batch = make_batch(1)
    for name in (TOP, WRIST):
        batch[name] = torch.full((1, 3, *SIZE), 0.2)
        batch[name][..., 20 + 3 * t : 32 + 3 * t, 30:42] = 1
    return batch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two episodes of one's own loop, which tells of each frame what the robot would."""
    folder, policy = tmp_path_factory.mktemp("act"), make_policy()
    config = AttentionConfig(layers="all", prefix_layers="all")
    with record_episodes(policy, folder, config, fps=10) as recording:
        for _ in range(2):
            with recording.episode() as episode:
                policy.reset()
                for t in range(12):
                    batch = observation(t)
                    with torch.inference_mode():
                        action = policy.select_action(batch)
                    episode.step({name: value[0] for name, value in batch.items()}, action[0])
                episode.success = True
    return folder


def test_a_recording_says_what_the_policy_lacks(run):
    for episode in open_run(run):
        data = episode.dataset
        assert (episode.is_complete, episode.n_frames, data.sizes["inference"]) == (True, 12, 3)
        assert data.frame_query.values.tolist() == [0, 1, 2, 3] * 3
        assert data.sizes["text"] == 0
        assert np.isnan(data.flow_time.values).tolist() == [True]
        assert not data.layer_sees_suffix.values.any()
        assert set(episode.videos) == {TOP, WRIST}
        shares = modality_share(data, frame=0).compute()
        assert "task" not in shares.modality.values
        assert np.isnan(shares.sel(modality="actions"))
        assert shares.sum() == pytest.approx(1, abs=1e-3)
        assert attention(data, frame=0).attrs["denoise_step"] == ""


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_plots_are_drawn_or_refused_in_one_line(run, kind, tmp_path):
    refusals = {
        "denoise": "the policy does not denoise: an inference is one pass",
        "actions": "no action attends to another",
        "cross-modal": "the policy is given no instruction",
        "vision": "vision attention was not captured; record a policy that has a vision transformer",
    }
    episode = open_run(run)[0]
    if kind in refusals:
        with pytest.raises(SelectionError, match=refusals[kind]) as caught:
            plot(episode, kind)
        assert "\n" not in str(caught.value)
        return
    figure = plot(episode, kind)
    said = " ".join(text.get_text() for text in figure.findobj(Text))
    assert "noise" not in said
    assert "step" not in said
    assert "nan" not in said


@pytest.mark.parametrize("function", [attention_rollout, attention_flow])
def test_attention_is_not_followed_through_layers_that_do_not_meet(run, function):
    with pytest.raises(SelectionError, match=r"all layers of act come after the last prefix layer"):
        function(open_run(run)[0].dataset, inference=0, query=0)


def test_commands_take_the_recording(run, tmp_path):
    store = str(open_run(run)[0].path)
    film, sheet = str(tmp_path / "film.mp4"), str(tmp_path / "sheet.png")
    for command in (
        ["inspect", store],
        ["verify", store, "-o", sheet],
        ["overlay", store, "-o", film],
        ["overlay", store, "-o", str(tmp_path / "state.mp4"), "--prefix-query", "state"],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (command, done.output)
        if command[0] == "inspect":
            said = " ".join(done.output.split())
            assert "act, attention in float32, 3 layers, 4 heads, no denoise steps" in said
            assert "denoise_step 0;" not in said


def test_the_explorer_serves_the_recording(run):
    with client_of(run) as client:
        first = client.get("/api/run").json()["episodes"][0]
        facts = client.get(f"/api/episodes/{first['id']}").json()
        assert (facts["flow_time"], facts["denoise_steps"]) == ([None], [0])
        base = f"/api/episodes/{first['id']}/{first['version']}"
        means = values(client.get(f"{base}/inferences/0/means/0"))
        maps = values(client.get(f"{base}/inferences/0/maps/0/2"))
        prefix_len = facts["prefix_len"]
        for slab in (means, maps):
            assert np.isnan(slab[..., prefix_len:]).all()
            assert np.abs(slab[..., :prefix_len].astype(np.float32).sum(-1) - 1).max() < 2**-9
        tokens = client.get(f"{base}/inferences/0/tokens").json()
        assert "task" not in str(tokens)
        for address in ("shares", "timeline", "ranges/0", f"cameras/{TOP}/frames/4.jpg"):
            assert client.get(f"{base}/{address}").status_code == 200, address


@pytest.mark.browser
def test_the_page_says_that_the_policy_takes_no_instruction(run, pages):
    """Which is not an instruction that was left empty."""
    with pages.serving(open_run(run)[0].path) as address:
        page = pages.open(f"{address}?frame=4")
        panel = page.locator("#words")
        panel.get_by_text("This policy takes no instruction.").wait_for()
        assert "instruction is empty" not in page.locator("main").inner_text()
        assert "Words" not in panel.locator("h3").all_inner_texts()


def test_without_cameras_what_is_about_images_is_refused_in_one_line(tmp_path):
    policy = make_policy(cameras=(), env_state=4)
    config = AttentionConfig(layers="all", prefix_layers="all")
    with (
        record_episodes(policy, tmp_path, config, fps=10) as recording,
        recording.episode() as episode,
    ):
        policy.reset()
        for _ in range(5):
            batch = make_batch(1, cameras=(), env_state=4)
            with torch.inference_mode():
                action = policy.select_action(batch)
            episode.step({name: value[0] for name, value in batch.items()}, action[0])
    (found,) = open_run(tmp_path)
    for kind in ("image", "heads", "combined"):
        with pytest.raises(SelectionError, match=r"^the episode's policy saw no camera image$"):
            plot(found, kind)
    for kind in ("timeline", "evolution", "text"):
        plot(found, kind)
    store = str(found.path)
    assert CliRunner().invoke(app, ["inspect", store]).exit_code == 0
    done = CliRunner().invoke(app, ["verify", store, "-o", str(tmp_path / "sheet.png")])
    assert "the episode's policy saw no camera image" in done.output
    assert "0 failed" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["overlay", store, "-o", str(tmp_path / "film.mp4")])
    assert isinstance(done.exception, SelectionError)


@pytest.mark.parametrize(("more", "passes"), [(0, True), (1, False)])
def test_verify_knows_how_far_cells_reach(run, tmp_path, more, passes):
    """Half a cell of the image may lie beyond the last one, and no more."""
    source = open_run(run)[0].path
    store = tmp_path / source.name
    shutil.copytree(source, store)
    described = store / "zarr.json"
    group = json.loads(described.read_text(encoding="utf-8"))
    for camera in group["attributes"]["layout"]["cameras"]:
        camera["geometry"]["pad_top_px"] += more
    described.write_text(json.dumps(group), encoding="utf-8")
    (check,) = (check for check in verify_episode(open_episode(store)).checks if check.name == "layout")
    assert check.status == ("ok" if passes else "failed"), check
    assert ("reaches beyond the policy's input" in check.detail) == (not passes)
