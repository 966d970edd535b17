"""The vision tower's own attention: each way in which a map of it could be wrong, from policy to picture."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from adapter_contract import Editor, act  # noqa: E402
from matplotlib.text import Text  # noqa: E402
from test_pi05 import IMAGE, WRIST, raw_observation  # noqa: E402
from transformers.models.siglip.modeling_siglip import SiglipAttention  # noqa: E402
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionAttention  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from lerobot_attn import analysis, open_run, record_episodes  # noqa: E402
from lerobot_attn.capture import capture_attention  # noqa: E402
from lerobot_attn.cli import app  # noqa: E402
from lerobot_attn.config import AttentionConfig  # noqa: E402
from lerobot_attn.demo.modeling_smolvla_tiny import SmolVLATinyPolicy  # noqa: E402
from lerobot_attn.plot import PlotSettings, plot  # noqa: E402
from lerobot_attn.policies.base import Site  # noqa: E402
from lerobot_attn.verify import verify_episode  # noqa: E402

TASK = "pick up the soup"
VISION = AttentionConfig(layers=[-1], vision_layers="all")
# Where each policy keeps its tower, and what its attention modules are.
TOWERS = {
    "pi05": lambda policy: policy.model.paligemma_with_expert.paligemma.model.vision_tower,
    "pi0": lambda policy: policy.model.paligemma_with_expert.paligemma.model.vision_tower,
    "smolvla": lambda policy: policy.model.vlm_with_expert.vlm.model.vision_model,
}
KINDS = (SiglipAttention, SmolVLMVisionAttention)


@pytest.fixture(scope="module", params=list(TOWERS))
def family(request):
    """A family's name, its policy and its preprocessor."""
    name = request.param
    load = request.getfixturevalue({"pi05": "demo_policy"}.get(name, f"{name}_policy"))
    steps = "num_steps" if name == "smolvla" else "num_inference_steps"
    policy, preprocessor, _ = load(**{steps: 2})
    return name, policy, preprocessor


def captured(policy, batch, config=VISION, probes=()):
    with capture_attention(policy, config, probes=probes) as capture:
        actions, _ = act(policy, batch, 3)
    (record,) = capture.drain()
    return actions, record


def own_attention(name, policy, batch):
    """Softmax of each call's own queries and keys, (camera, layer, batch, head, patch, patch), float64."""
    modules = [module for module in TOWERS[name](policy).modules() if isinstance(module, KINDS)]
    calls = {module: [] for module in modules}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: calls[module].append((args + tuple(kwargs.values()))[0]),
            with_kwargs=True,
        )
        for module in modules
    ]
    act(policy, batch, 3)
    for hook in hooks:
        hook.remove()

    def softmax(module, hidden):
        batch_size, n, width = hidden.shape
        query, key = (
            (hidden.double() @ projection.weight.double().T + projection.bias.double())
            .reshape(batch_size, n, module.num_heads, width // module.num_heads)
            .swapaxes(1, 2)
            for projection in (module.q_proj, module.k_proj)
        )
        scores = (query @ key.swapaxes(2, 3) * (width // module.num_heads) ** -0.5).detach().numpy()
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    by_layer = [[softmax(module, hidden) for hidden in calls[module]] for module in modules]
    return np.array(by_layer).swapaxes(0, 1)


def test_stored_maps_equal_an_independent_softmax_for_each_camera_layer_and_head(family):
    """Cameras show different pictures, so that swapped cameras, layers, heads or axes would differ."""
    name, policy, preprocessor = family
    batch = preprocessor(raw_observation())
    _, record = captured(policy, batch)
    true = own_attention(name, policy, batch)
    assert record.vision_cameras == [IMAGE, WRIST]
    found = record.vision_attention.astype(np.float64)
    assert len(true) >= len(found)  # Pi0 and Pi0.5 encode a missing camera's blank image, too
    np.testing.assert_allclose(found, true[: len(found)], rtol=2**-10, atol=3e-6)
    for axis in (0, 1, 2, 3):
        assert np.abs(np.diff(found, axis=axis)).max() > 1e-3, axis
    assert np.abs(found - found.swapaxes(-1, -2)).max() > 1e-3


def test_maps_of_a_camera_are_of_its_own_picture(family):
    """Another picture on one camera changes its maps alone."""
    _, policy, preprocessor = family
    batch = preprocessor(raw_observation())
    _, before = captured(policy, batch)
    for number, name in enumerate(before.vision_cameras):
        _, after = captured(policy, {**batch, name: 1 - batch[name]})
        pairs = zip(before.vision_attention, after.vision_attention, strict=True)
        changed = [not np.array_equal(*pair) for pair in pairs]
        assert changed == [camera == number for camera in range(2)]


def test_a_bright_square_is_where_the_geometry_says(family):
    """In the first layer the patches of an image without noise differ from the others where the square is."""
    _, policy, preprocessor = family
    raw = raw_observation(sizes=((240, 320), (240, 320)))
    dark = {**raw, IMAGE: torch.zeros(2, 3, 240, 320), WRIST: torch.zeros(2, 3, 240, 320)}
    bright = {**dark, IMAGE: dark[IMAGE].clone()}
    bright[IMAGE][:, :, 160:200, 40:80] = 1  # LIBERO's processor is not in this pipeline: nothing is flipped
    _, before = captured(policy, preprocessor(dark))
    _, after = captured(policy, preprocessor(bright))
    rows, columns = after.vision_grid
    # A patch's own pixels decide its query: in the first layer only changed patches attend differently.
    maps = [record.vision_attention[0, 0, 0, 0].astype(np.float64) for record in (before, after)]
    geometry = next(camera.geometry for camera in after.layout.cameras if camera.name == IMAGE)
    geometry = replace(geometry, grid_rows=rows, grid_columns=columns)
    inside = np.zeros((rows, columns), bool)
    for y, x in np.ndindex(40, 40):
        inside[geometry.patch_at(160 + y + 0.5, 40 + x + 0.5)] = True
    inside = inside.ravel()
    # Among the keys that stayed as they were, an unchanged patch keeps its pattern.
    rest = [m[:, ~inside] / m[:, ~inside].sum(-1, keepdims=True) for m in maps]
    change = np.abs(rest[1] - rest[0]).max(axis=1)
    assert change[inside].min() > 3 * change[~inside].max()


def test_an_edit_of_one_patch_of_one_camera_acts_there_alone(family):
    """Patch 5 of the wrist camera is made to attend to patch 9: the next layer's query 5 alone changes."""
    _, policy, preprocessor = family
    batch = preprocessor(raw_observation())

    class Sender(Editor):
        def camera(self, name):
            self.name = name

    def send(value):
        if editor.name != WRIST:
            return None
        value = value.clone()
        value[..., 5, :] = 0
        value[..., 5, 9] = 1
        return value

    editor = Sender(send, sites=[Site("vision", 0)])
    actions, before = captured(policy, batch)
    edited, after = captured(policy, batch, probes=[(editor, editor.sites)])
    assert not torch.equal(actions, edited)
    image, wrist = (
        (b.astype(np.float64), a.astype(np.float64))
        for b, a in zip(before.vision_attention, after.vision_attention, strict=True)
    )
    np.testing.assert_array_equal(*image)
    assert (wrist[1][0, ..., 5, 9] == 1).all()
    np.testing.assert_array_equal(*(np.delete(maps[0], 5, axis=-2) for maps in wrist))
    # In the next layer token 5 is another one, as query and as key; the others are as before.
    others = [np.delete(np.delete(maps[1], 5, axis=-1), 5, axis=-2) for maps in wrist]
    among = [maps / maps.sum(-1, keepdims=True) for maps in others]
    assert np.abs(among[1] - among[0]).max() < 2e-3
    assert np.abs(wrist[1][1, ..., 5, :] - wrist[0][1, ..., 5, :]).max() > 2e-3


def test_missing_cameras_have_no_maps(family):
    _, policy, preprocessor = family
    batch = preprocessor(raw_observation())
    _, whole = captured(policy, batch)
    without = {key: value for key, value in batch.items() if key != IMAGE}
    _, record = captured(policy, without)
    assert record.vision_cameras == [WRIST]
    np.testing.assert_array_equal(record.vision_attention[0], whole.vision_attention[1])


@pytest.mark.parametrize("name", ["pi05", "smolvla"])
def test_a_compiled_policy_is_read_too(name, request, monkeypatch):
    """The compiler follows the tap; its own kernels are left out, for compiling takes minutes."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode: compile_(function, backend="eager"))
    if name == "pi05":
        policy, preprocessor, _ = request.getfixturevalue("demo_policy")(num_inference_steps=1)
        small = {"depth": 2, "num_inference_steps": 1}
    else:
        policy, preprocessor, _ = request.getfixturevalue("smolvla_policy")(num_steps=1)
        small = {"num_vlm_layers": 2, "resize_imgs_with_padding": (128, 128)}
    policy = type(policy)(replace(policy.config, compile_model=True, compile_mode="default", **small)).eval()
    batch = preprocessor(raw_observation())
    noise = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
    actions, records = [], []
    for is_compiled in (False, True):
        with (
            torch.inference_mode(),
            capture_attention(policy, replace(VISION, compiled=is_compiled)) as capture,
        ):
            for _ in range(2):
                actions.append(policy.predict_action_chunk(batch, noise=noise))
        records += capture.drain()
    torch._dynamo.reset()
    for record, action in zip(records[1:], actions[1:], strict=True):
        assert torch.equal(action, actions[0])
        np.testing.assert_array_equal(record.vision_attention, records[0].vision_attention)


def test_images_of_several_sizes_have_no_one_grid(smolvla_policy):
    """SmolVLA may take images as they are: then one line says why their patches fit into no array."""
    loaded, preprocessor, _ = smolvla_policy(num_steps=1)
    policy = SmolVLATinyPolicy(replace(loaded.config, resize_imgs_with_padding=None)).eval()
    batch = preprocessor(raw_observation(sizes=((256, 256), (128, 128))))
    failures = []
    with capture_attention(policy, VISION, on_failure=failures.append) as capture:
        act(policy, batch, 0)
    assert not capture.records
    (failure,) = failures
    assert "vision attention of layer 0 has shape" in str(failure)
    assert "cameras" in str(failure)


# From the store on


@pytest.fixture(scope="module")
def run(family, tmp_path_factory):
    """An episode of two inferences, of one's own loop, and the records that it was made of."""
    _, policy, preprocessor = family
    folder, frames = tmp_path_factory.mktemp("run"), policy.config.n_action_steps + 1
    record_frames(policy, preprocessor, folder, VISION, frames)
    return folder


def record_frames(policy, preprocessor, folder, config, n_frames):
    """Record an episode of one's own loop, whose cameras show something else at each frame."""
    with (
        record_episodes(policy, folder, config, fps=10, preprocessor=preprocessor) as recording,
        recording.episode(task=TASK) as episode,
    ):
        policy.reset()
        for t in range(n_frames):
            raw = {**raw_observation(seed=t, n=1), "task": [TASK]}
            with torch.inference_mode():
                action = policy.select_action(preprocessor(raw))
            shown = {name: value[0] for name, value in raw.items() if name != "task"}
            episode.step(shown, action[0])


def test_a_recording_holds_the_maps_and_passes_verify(run, family, tmp_path):
    _, policy, preprocessor = family
    (episode,) = open_run(run)
    raw = {**raw_observation(seed=0, n=1), "task": [TASK]}
    _, record = captured(policy, preprocessor(raw))
    data = episode.dataset
    assert data["camera"].values.tolist() == [IMAGE, WRIST]
    np.testing.assert_array_equal(data.vision_attention[0], record.vision_attention[:, :, 0])
    rows, columns = record.vision_grid
    np.testing.assert_array_equal(data.patch_row, np.arange(rows * columns) // columns)
    np.testing.assert_array_equal(data.patch_column, np.arange(rows * columns) % columns)
    assert data.attrs["policy"].count("n_vision_layers") == 1
    report = verify_episode(episode, thorough=True)
    assert report.passed, report.to_dict()
    assert {check.name: check.passed for check in report.checks}["vision maps"] is True
    done = CliRunner().invoke(app, ["inspect", str(episode.path)], env={"COLUMNS": "250"})
    assert done.exit_code == 0
    assert "vision_attention" in done.output
    assert "vision_layer 0-1" in done.output
    file = tmp_path / "vision.png"
    options = ["--kind", "vision", "--patch", "3-4,5", "--layers", "-1", "-o", str(file)]
    done = CliRunner().invoke(app, ["plot", str(episode.path), *options])
    assert done.exit_code == 0, done.output
    assert file.stat().st_size > 10_000


def test_a_patch_attends_as_stored(run):
    (episode,) = open_run(run)
    data = episode.dataset
    columns = int(data.patch_column.max()) + 1
    stored = data.vision_attention.values.astype(np.float32)[1, 1, 1]
    found = analysis.attention_from_patch(data, (2, 7), "image2", inference=1, layer=-1)
    np.testing.assert_allclose(found.values.ravel(), stored[:, 2 * columns + 7].mean(axis=0), rtol=1e-6)


def test_a_run_that_asked_for_none_has_none(family, tmp_path):
    _, policy, preprocessor = family
    record_frames(policy, preprocessor, tmp_path, AttentionConfig(layers=[-1]), 1)
    (found,) = open_run(tmp_path)
    names = ("vision_attention", "camera", "vision_layer", "vision_head", "patch_row", "patch_column")
    assert not set(names) & set(found.dataset.variables)
    assert not {"camera", "patch_query", "patch_key"} & set(found.dataset.dims)


def test_pictures_say_what_they_show(run):
    (episode,) = open_run(run)
    figure = plot(episode, "vision", PlotSettings(patch="2,7", frames=0))
    said = " ".join(text.get_text() for text in figure.findobj(Text))
    for part in (
        "patch 2, 7",
        "layer 0",
        "layer 1",
        "patch at row 2, column 7",
        "share of the patch's attention",
    ):
        assert part in said, part
