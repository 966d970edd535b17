"""Interventions: what their data says, which tokens and pixels they choose, and what they do to a policy."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from test_act import make_batch  # noqa: E402
from test_act import make_policy as make_act  # noqa: E402
from test_pi05 import IMAGE, WRIST, raw_observation  # noqa: E402

from lerobot_attn import (  # noqa: E402
    AttentionConfig,
    AttentionPolicy,
    BlockAttention,
    Condition,
    FixedNoise,
    Occlude,
    Task,
    capture_attention,
    intervene,
)
from lerobot_attn.errors import ConfigError  # noqa: E402
from lerobot_attn.interventions.blocking import Blocker, Rows  # noqa: E402
from lerobot_attn.interventions.keys import Keys, PromptLabels  # noqa: E402
from lerobot_attn.interventions.occlusion import Occluder  # noqa: E402
from lerobot_attn.interventions.selectors import key_selectors  # noqa: E402
from lerobot_attn.layout import Camera, ImageGeometry, TokenLayout, tiled  # noqa: E402
from lerobot_attn.masks import SceneMasks, instances_of  # noqa: E402
from lerobot_attn.policies.base import InferenceInputs, PolicyDescription, Site  # noqa: E402
from lerobot_attn.policies.prompts import parse_task_line  # noqa: E402
from lerobot_attn.prompt import find_tokenizer  # noqa: E402

INSTANCES = instances_of(["background", "soup", "robot"], {"soup": "target", "robot": "robot"}, where="here")
TARGET = {"role": "target"}


# Data


def condition(*parts, **more):
    return {"name": "a_name", "interventions": list(parts), **more}


WHOLE = condition(
    {
        "kind": "block_attention",
        "keys": [{"random_like": {"role": "target", "camera": "image"}, "seed": 3}, {"words": "soup"}],
        "passes": "both",
        "queries": "actions",
        "layers": [-1],
        "heads": 0,
        "denoise_steps": [0, 1],
        "renormalise": False,
    },
    {"kind": "block_attention", "keys": {"all_but_top": 20, "layers": [2]}},
    {"kind": "occlude", "where": {"camera": "image", "box": [0, 0.5, 0.5, 1]}, "fill": "blur"},
    {"kind": "task", "replace": {"alphabet soup": "milk"}},
    {"kind": "fixed_noise", "seed": 4},
    experiment={"name": "x", "condition": "a_name", "control_of": None},
)


def test_a_condition_survives_yaml_and_a_store(tmp_path):
    made = Condition.from_dict(WHOLE)
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(made.to_dict()))
    assert Condition.from_yaml(tmp_path / "file.yaml") == made
    assert Condition.from_dict({**made.to_dict(), "text": made.text}) == made
    assert made.needs_masks
    assert made.changes_task
    assert made.interventions[0].layers == [-1]
    assert made.experiment == WHOLE["experiment"]
    assert "\n" not in made.text
    for part in ("as much elsewhere as the target in image", '"soup"', "blurred", "milk", "noise fixed"):
        assert part in made.text
    (tmp_path / "block_it.yaml").write_text("interventions:\n- {kind: fixed_noise}\n")
    assert Condition.from_yaml(tmp_path / "block_it.yaml") == Condition("block_it", (FixedNoise(),))
    assert Condition("baseline").to_dict() == {"name": "baseline", "interventions": []}
    assert not Condition("baseline").needs_masks


def block(keys, **more):
    return {"kind": "block_attention", "keys": keys, **more}


WRONG = [
    ({"kind": "blocks"}, "got kind 'blocks', expected one of block_attention, occlude, task, neurons"),
    ({"kind": "block_attention"}, "keys is missing, expected a selector"),
    (block({"role": "tarjet"}), "got role 'tarjet', expected one of target"),
    (block({"rolle": "target"}), "expected a selector, with one of role, words"),
    (block([]), "expected a selector"),
    (block({"segment": "words"}), "got 'words', expected one of task, state, template"),
    (block({"camera": "image", "patches": [[0]]}), r"got \[0\], expected \[row, column\]"),
    (block({"camera": "image", "box": [0, 0, 1, 1]}), "got 'box' beside camera, expected patches there"),
    (block({"random_like": {"words": ["soup"]}}), "expected a camera or a role"),
    (block({"random_like": {"camera": "image"}}), "got all of camera image, expected a part of it"),
    (block({"all_but_top": 0}), "got 0, expected a number of patches"),
    (block(TARGET, passes="suffixes"), "passes: got 'suffixes', expected one of suffix, prefix, both"),
    (block(TARGET, queries="me"), "queries: got 'me', expected one of all, actions"),
    (block(TARGET, layers="last"), "got 'last', expected 'all' or a list of numbers"),
    (block(TARGET, speed=1), "unknown key 'speed'; expected one of keys, passes"),
    ({"kind": "occlude", "where": {"camera": "image", "box": [0.5, 0, 0.5, 1]}}, "expected top < bottom"),
    ({"kind": "occlude", "where": {"camera": "image", "box": [0, 0, 224, 224]}}, "expected fractions"),
    ({"kind": "occlude", "where": {"words": ["soup"]}}, "expected a selector, with one of role, random_like"),
    ({"kind": "occlude", "where": {"camera": "image"}, "fill": "inpaint"}, "nothing is left to continue"),
    ({"kind": "task"}, "got none, expected one of text, replace, remove, shuffle, empty"),
    ({"kind": "task", "text": "a", "empty": True}, "got text, empty, expected one of"),
    ({"kind": "task", "replace": {"": "milk"}}, "expected words of the task"),
    ({"kind": "fixed_noise", "seed": -1}, "got -1, expected a whole number from 0"),
]


@pytest.mark.parametrize(("part", "message"), WRONG)
def test_what_cannot_be_done_is_said_in_one_line(part, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Condition.from_dict(condition(part), where="file.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("file.yaml: interventions[0]: ")


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (Task(text="open the drawer"), "open the drawer"),
        (Task(replace={"alphabet  Soup": "milk"}), "pick up the milk, then place the soups"),
        (Task(remove=["the", "alphabet soup"]), "pick up , then place soups"),
        (Task(empty=True), ""),
    ],
)
def test_tasks(task, expected):
    assert task.applied("pick up the alphabet soup, then place the soups", 0) == expected


def test_shuffled_words_are_the_same_words_in_an_order_of_their_episode():
    task, said = Task(shuffle=True), "pick up the soup and place it in the basket"
    found = [task.applied(said, episode) for episode in range(5)]
    assert {" ".join(sorted(one.split())) for one in found} == {" ".join(sorted(said.split()))}
    assert said not in found
    assert len(set(found)) > 2
    assert task.applied(said, 3) == found[3]
    assert Task(shuffle=True).applied("go go", 0) == "go go"


@pytest.mark.parametrize("task", [Task(replace={"sou": "milk"}), Task(remove=["milk"])])
def test_words_that_are_not_in_the_task_are_named(task):
    with pytest.raises(ConfigError, match=r"is not in the task, expected words of 'pick up the soup'"):
        task.applied("pick up the soup", 0)


# Which tokens

PROMPT = "pick up the soup\n"
GRID = 4
N_PATCHES = GRID * GRID


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, token_ids, **kwargs):
        return "".join(map(chr, token_ids))


def made_keys(scenes=None, *, episodes=(0, 1), maps=None, prompt=PROMPT, tokenizer=None, image_px=(32, 64)):
    """Two cameras of 4 x 4 patches, of which the letterbox pads the first and last row, a prompt, a state."""
    geometry = ImageGeometry.letterbox(image_px, (64, 64), (GRID, GRID), padding="centred")
    cameras = tuple(Camera(f"observation.images.{name}", geometry) for name in ("image", "wrist"))
    parts = [("image", camera.name, N_PATCHES) for camera in cameras]
    parts += [("language", "language", len(prompt) + 2), ("state", "state", 1), ("action", "action", 5)]
    layout = TokenLayout(tiled(parts), 2 * N_PATCHES + len(prompt) + 3, cameras)
    n = len(episodes)
    mask = np.ones((n, layout.n_keys), bool)
    mask[:, layout.language.stop - 2 : layout.language.stop] = False
    ids = np.tile([*map(ord, prompt), 0, 0], (n, 1))
    prompts = PromptLabels(tokenizer or Letters(), parse_task_line)
    return Keys(layout, ids, mask, prompts, episodes=episodes, scenes=scenes, maps=maps or {}), layout


def chosen(keys, selectors):
    return keys.chosen(key_selectors(selectors, "keys"))


def scene(row, column, *, px=4, camera="image", size=(32, 64)):
    """A target of so many pixels a side at a place of a picture."""
    mask = np.zeros(size, np.int16)
    mask[row : row + px, column : column + px] = 1
    return SceneMasks(INSTANCES, {f"observation.images.{camera}": mask})


def test_words_segments_cameras_and_patches():
    keys, layout = made_keys()
    start = layout.language.start
    for row in chosen(keys, {"words": ["Soup"]}):
        assert np.flatnonzero(row).tolist() == [start + PROMPT.index("soup") + i for i in range(4)]
    both = chosen(keys, [{"words": ["the soup"]}, {"camera": "wrist", "patches": [[1, 2]]}])[0]
    # The blank before a word is a token of this tokenizer alone, and of no word.
    assert np.flatnonzero(both).tolist() == [
        N_PATCHES + GRID + 2,
        *(start + i for i, letter in enumerate(PROMPT[:16]) if i >= 8 and letter != " "),
    ]
    task = chosen(keys, {"segment": "task"})[0]
    template = chosen(keys, {"segment": "template"})[0]
    text = chosen(keys, {"segment": "text"})[0]
    assert (task ^ template).tolist() == text.tolist()
    assert text.sum() == len(PROMPT)  # unused slots are no keys
    assert np.flatnonzero(chosen(keys, {"segment": "state"})[0]).tolist() == [layout.prefix_len - 1]
    assert np.flatnonzero(chosen(keys, {"camera": "observation.images.wrist"})[1]).tolist() == list(
        range(N_PATCHES, 2 * N_PATCHES)
    )
    assert chosen(keys, {"segment": "image"})[0].sum() == 2 * N_PATCHES


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ({"words": ["milk"]}, "'milk' is not in the task, expected words of 'pick up the soup'"),
        ({"camera": "images"}, "got 'images', expected one that the policy sees: image, wrist"),
        (
            {"camera": "image", "patches": [[0, 4]]},
            r"got \[0, 4\], expected rows below 4 and columns below 4",
        ),
        (TARGET, "nobody says what the pixels show"),
        ({"all_but_random": 32}, "got 32, expected fewer than the 32 patches there are"),
    ],
)
def test_tokens_that_are_not_there_are_named(selector, message):
    keys, _ = made_keys()
    with pytest.raises(ConfigError, match=message) as caught:
        chosen(keys, selector)
    assert "\n" not in str(caught.value)


def test_a_role_is_the_patches_that_show_it_in_each_row_of_the_batch():
    # A patch is 16 x 16 pixels; above the picture, of 32 x 64, the letterbox has a row of patches.
    scenes = [scene(0, 16, px=16), scene(20, 40, px=3)]
    keys, _ = made_keys(scenes)
    rows = chosen(keys, TARGET)
    assert np.flatnonzero(rows[0]).tolist() == [GRID + 1]
    # Smaller than a tenth of a patch: the patch that shows most of it.
    assert np.flatnonzero(rows[1]).tolist() == [2 * GRID + 2]
    keys, _ = made_keys([scene(0, 14, px=8), scene(0, 12, px=8)])
    rows = chosen(keys, TARGET)
    # Two of its columns of pixels, 16 of 256, are less than a tenth of the patch; four are more.
    assert np.flatnonzero(rows[0]).tolist() == [GRID + 1]
    assert np.flatnonzero(rows[1]).tolist() == [GRID, GRID + 1]
    assert np.flatnonzero(chosen(keys, {**TARGET, "overlap": 0.05})[0]).tolist() == [GRID, GRID + 1]
    with pytest.raises(ConfigError, match=r"no mask of observation\.images\.wrist, expected one"):
        chosen(keys, {**TARGET, "camera": "wrist"})
    with pytest.raises(ConfigError, match="the scene has nothing of it"):
        chosen(keys, {"role": "destination"})


def test_a_random_control_has_as_many_patches_and_none_of_the_targets():
    scenes = [scene(0, 0, px=16), scene(10, 30, px=20)]
    keys, layout = made_keys(scenes)
    target, control = (chosen(keys, one) for one in (TARGET, {"random_like": TARGET}))
    assert target.sum(1).tolist() == control.sum(1).tolist() == [1, 4]
    assert not (target & control).any()
    shown = np.zeros(layout.n_keys, bool)
    shown[GRID : 3 * GRID] = True  # of this camera, what is no padding
    assert not control[:, ~shown].any()
    assert (control == chosen(keys, {"random_like": TARGET})).all()
    other, _ = made_keys([scenes[0], scenes[0]], episodes=(0, 7))
    assert (chosen(other, {"random_like": TARGET})[0] == control[0]).all()  # whatever else the batch holds
    assert (chosen(other, {"random_like": TARGET})[1] != control[0]).any()  # another episode's
    assert (chosen(keys, {"random_like": TARGET, "seed": 1}) != control).any()


def test_a_control_that_has_not_room_enough_is_smaller_and_that_is_said(caplog):
    keys, _ = made_keys([scene(0, 0, px=48), scene(0, 0, px=48)])
    control = chosen(keys, {"random_like": TARGET})
    assert control.sum(1).tolist() == [2, 2]
    assert ["has only 2 other patches where 6" in one.message for one in caplog.records] == [True]


def test_all_but_the_most_attended_patches_and_all_but_as_many_random_ones():
    attention = np.random.default_rng(0).random((2, 80)).astype(np.float32)
    keys, _ = made_keys(maps={"[1]": attention})
    top = chosen(keys, {"all_but_top": 5, "layers": [1]})
    random = chosen(keys, {"all_but_random": 5})
    patches = slice(0, 2 * N_PATCHES)
    for row in range(2):
        kept = np.flatnonzero(~top[row, patches])
        assert set(kept) == set(np.argsort(attention[row, patches])[-5:])
        assert (~random[row, patches]).sum() == 5
    assert (random[0] != random[1]).any()
    assert not top[:, 2 * N_PATCHES :].any()
    assert not random[:, 2 * N_PATCHES :].any()


# Taking them out of maps


def begun(spec, value, n_prefix, *, key_mask=None, steps=1):
    """A blocker in an inference of a policy without cameras: a state of `n_prefix` tokens, and actions."""
    n_keys = max(value.shape[-1], n_prefix + 3)
    layout = TokenLayout(
        tiled([("state", "state", n_prefix), ("action", "action", n_keys - n_prefix)]), n_prefix, ()
    )
    n = len(value)
    policy = PolicyDescription("made up", 2, 2, value.shape[1], 3, n_keys - n_prefix, 2)
    blocker = Blocker([spec], policy, PromptLabels(None, parse_task_line), lambda: Rows(range(n), None))
    mask = torch.ones(n, n_keys, dtype=torch.bool) if key_mask is None else key_mask
    blocker.begin(InferenceInputs(layout, torch.zeros(n, 0, dtype=torch.int64), mask))
    for _ in range(steps):
        blocker.denoise_step(1.0)
    return blocker


def blocked(spec, value, site, n_prefix, **options):
    """What a blocker makes of one map."""
    return begun(spec, value, n_prefix, **options).at(site, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocking_is_a_mask_before_the_softmax(dtype):
    scores = 4 * torch.randn(2, 2, 4, 10, generator=torch.Generator().manual_seed(0))
    value = scores.softmax(-1).to(dtype)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[:, :6] = True
    found = blocked(BlockAttention({"segment": "state"}), value, Site("expert", 0), 6)
    expected = scores.masked_fill(mask[:, None, None], float("-inf")).softmax(-1)
    assert found.dtype == dtype
    assert not found[..., :6].any()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    assert (found.float() - expected).abs().max() <= tolerance
    assert (found.float().sum(-1) - 1).abs().max() <= tolerance * 4
    less = blocked(BlockAttention({"segment": "state"}, renormalise=False), value, Site("expert", 0), 6)
    assert torch.equal(less, value.masked_fill(mask[:, None, None], 0))


def test_scores_are_masked_where_they_can_be_and_then_nothing_is_left_to_do():
    value = torch.rand(2, 2, 4, 10).softmax(-1)
    words = BlockAttention({"segment": "text"}, heads=[1])
    layout = TokenLayout(
        tiled([("language", "language", 4), ("state", "state", 2), ("action", "action", 4)]), 6, ()
    )
    policy = PolicyDescription("made up", 1, 1, 2, 1, 4, 4)
    site, mask = Site("expert", 0), torch.ones(2, 10, dtype=torch.bool)
    for used, is_left in ((4, False), (3, True)):  # of the slots; the one that is left over stays unblocked
        blocker = Blocker([words], policy, PromptLabels(None, parse_task_line), lambda: Rows([0, 1], None))
        keys = mask.clone()
        keys[:, used:4] = is_left
        spec_layout = (
            layout
            if not is_left
            else TokenLayout(
                tiled(
                    [
                        ("image", "eye", 1),
                        ("language", "language", 3),
                        *[(s.kind, s.name, len(s)) for s in layout.segments[1:]],
                    ]
                ),
                6,
                (Camera("eye", ImageGeometry(8, 8, 8, 8, 0, 0, 8, 8, 1, 1)),),
            )
        )
        blocker.begin(InferenceInputs(spec_layout, torch.zeros(2, 4 - is_left, dtype=torch.int64), keys))
        blocker.denoise_step(1.0)
        bias = blocker.bias(site)
        assert blocker.only_masks(site) == is_left
        assert blocker.only_masks(Site("vlm", 0))  # where nothing is blocked, no map is asked for
        if not is_left:  # the state alone, which not every token may read: rows are cut instead
            assert bias is None
            assert not blocker.at(site, value)[:, 1, :, :4].any()
            continue
        expected = torch.zeros(2, 2, 1, 10)
        expected[:, 1, :, 1:4] = float("-inf")
        assert torch.equal(bias.broadcast_to(expected.shape), expected)
        assert blocker.at(site, value) is None
        assert not blocker.at(site, value)[:, 1, :, 1:4].any()  # its scores were not masked
        blocker.rank()
        assert not blocker.only_masks(site)  # for maps rank patches


def test_a_row_of_which_nothing_is_left_reads_nothing():
    value = torch.rand(1, 2, 6, 6).softmax(-1)
    found = blocked(BlockAttention({"segment": "state"}, passes="prefix"), value, Site("vlm", 1), 6)
    assert torch.equal(found, torch.zeros_like(value))


def test_only_the_chosen_queries_heads_layers_and_steps_are_blocked():
    value = torch.rand(2, 2, 4, 10, generator=torch.Generator().manual_seed(0)).softmax(-1)
    state = {"segment": "state"}
    site = Site("expert", 1)
    found = blocked(BlockAttention(state, heads=[1]), value, site, 6)
    assert torch.equal(found[:, 0], value[:, 0])
    assert not found[:, 1, :, :6].any()
    for spec, steps, expected in (
        (BlockAttention(state, layers=[0]), 1, None),
        (BlockAttention(state, denoise_steps=[0, 2]), 2, None),
        (BlockAttention(state, passes="prefix"), 1, None),
        (BlockAttention(state, queries="state"), 1, None),  # which is none of the suffix's
        (BlockAttention(state, layers=[-1], denoise_steps=[-1], queries="actions"), 3, "cut"),
    ):
        found = blocked(spec, value, site, 6, steps=steps)
        assert found is None if expected is None else not found[..., :6].any()
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, :6] = False  # of the second row nothing is there to block: it stays bit for bit
    found = blocked(BlockAttention(state), value, site, 6, key_mask=mask)
    assert torch.equal(found[1], value[1])
    with pytest.raises(ConfigError, match="layer 2 does not exist"):
        blocked(BlockAttention(state, layers=[2]), value, site, 6)


# Pictures


def pictures(n=2, size=(32, 48)):
    return {"images.top": torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(0))}


def painted(where, fill="mean", *, scenes=None, batch=None, episodes=(0, 1)):
    batch = batch or pictures(len(episodes))
    return Occluder([Occlude(where, fill)], list(batch)).painted(batch, episodes, scenes), batch


def test_a_box_gets_the_mean_colour_of_the_rest():
    found, batch = painted({"camera": "top", "box": [0.25, 0.5, 0.5, 0.75]})
    before, after = batch["images.top"], found["images.top"]
    inside = torch.zeros(32, 48, dtype=torch.bool)
    inside[8:16, 24:36] = True
    assert torch.equal(after[..., ~inside], before[..., ~inside])
    expected = before[..., ~inside].mean(-1, keepdim=True).expand(-1, -1, 96)
    torch.testing.assert_close(after[..., inside], expected)
    assert torch.equal(before, pictures()["images.top"])


def test_inpainting_continues_what_is_around():
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij")
    smooth = torch.stack([rows / 64, columns / 96, (rows + columns) / 160])[None]
    spoiled = smooth.clone()
    spoiled[..., 10:20, 10:30] = 1.0
    batch = {"images.top": spoiled}
    where = {"camera": "top", "box": [10 / 32, 10 / 48, 20 / 32, 30 / 48]}
    found, _ = painted(where, "inpaint", batch=batch, episodes=(0,))
    torch.testing.assert_close(found["images.top"], smooth, atol=1e-5, rtol=0)
    # A region at the picture's edge has a rim on one side alone.
    found, _ = painted({"camera": "top", "box": [0, 0, 1, 0.5]}, "inpaint", batch=batch, episodes=(0,))
    assert torch.isfinite(found["images.top"]).all()


def test_blur_keeps_the_mean_and_loses_the_detail():
    found, batch = painted({"camera": "top"}, "blur")
    before, after = batch["images.top"], found["images.top"]
    torch.testing.assert_close(after.mean((2, 3)), before.mean((2, 3)), atol=0.02, rtol=0)
    assert after.std() < before.std() / 4


def test_a_role_is_painted_in_each_row_and_its_control_is_the_same_shape_elsewhere():
    mask = np.zeros((16, 24), np.int16)  # of half the picture's size
    mask[4:8, 6:10] = 1
    mask[5, 7] = 0
    other = np.roll(mask, (6, 10), (0, 1))
    scenes = [SceneMasks(INSTANCES, {"images.top": one}) for one in (mask, other)]
    before = pictures()["images.top"]
    changed = []
    for where in (TARGET, {"random_like": TARGET}):
        found, _ = painted(where, scenes=scenes)
        changed.append((found["images.top"] != before).any(1).numpy())
    target, control = changed
    for row, one in enumerate((mask, other)):
        assert (target[row] == one.repeat(2, 0).repeat(2, 1).astype(bool)).all()
        assert control[row].sum() == target[row].sum()
        assert not (control[row] & target[row]).any()
        edges = [np.flatnonzero(pixels.any(axis))[[0, -1]] for axis in (0, 1) for pixels in (control[row],)]
        assert [int(last - first) for first, last in edges] == [7, 7]  # one piece, of the same sides
    again, _ = painted({"random_like": TARGET}, scenes=scenes)
    assert ((again["images.top"] != before).any(1).numpy() == control).all()


def test_a_shape_that_fits_nowhere_else_has_a_smaller_control(caplog):
    mask = np.ones((32, 48), np.int16)
    mask[:, 40:] = 0
    scenes = [SceneMasks(INSTANCES, {"images.top": mask})]
    found, batch = painted({"random_like": TARGET}, scenes=scenes, episodes=(0,))
    changed = (found["images.top"] != batch["images.top"]).any(1).numpy()[0]
    assert changed.any()
    assert not changed[:, :40].any()
    assert "there is no place as large" in caplog.text


# A policy


@pytest.fixture(scope="module")
def loaded(demo_policy):
    return demo_policy(num_inference_steps=2)


@pytest.fixture
def policy(loaded):
    loaded[0].reset()
    return loaded[0]


@pytest.fixture
def batch(loaded):
    return loaded[1](raw_observation())


def chunk(policy, batch, seed=0, **more):
    torch.manual_seed(seed)
    with torch.inference_mode():
        return policy.predict_action_chunk(batch, **more).clone()


def rows(batch, numbers):
    """The rows of a batch that are asked for."""
    taken = {name: value[list(numbers)] for name, value in batch.items() if torch.is_tensor(value)}
    return {**batch, **taken}


def scenes_for(*places):
    return [scene(row, column, px=60, size=(256, 256)) for row, column in places]


def test_noise_is_that_of_its_episode_and_inference_whatever_the_batch(policy, batch):
    seeds = itertools.count()  # what was drawn before is another thing each time
    with intervene(policy, FixedNoise(3)) as acting:
        acting.begin([4, 9])
        first, second = (chunk(policy, batch, next(seeds)) for _ in range(2))
        acting.begin([9, 4])
        swapped = chunk(policy, rows(batch, [1, 0]), next(seeds))
        acting.begin([9])
        alone = chunk(policy, rows(batch, [1]), next(seeds))
        acting.begin([4])
        other = chunk(policy, rows(batch, [1]), next(seeds))
        with pytest.raises(ConfigError, match="got a batch of 2, expected 1, as begin"):
            chunk(policy, batch)
    assert not torch.equal(first, second)
    assert torch.equal(swapped, first[[1, 0]])
    torch.testing.assert_close(alone, first[1:], atol=1e-4, rtol=0)
    assert (other - alone).abs().max() > 1e-2
    block = BlockAttention({"camera": "image", "patches": [[0, 0]]}, layers=[0], heads=[0])
    with intervene(policy, [block, FixedNoise(3)]) as acting, capture_attention(policy) as capture:
        acting.begin([4, 9])
        policy.reset()
        policy.select_action(batch)  # the same noise under another condition, and through another door
    blocked = torch.from_numpy(next(capture.drain()).action_chunk)
    # One patch in one head hardly matters, so it is the same noise; another seed's would show.
    assert (blocked - first).abs().max() < (second - first).abs().max() / 10


def test_roles_are_blocked_row_by_row_and_recorded_as_they_acted(policy, batch):
    """Nested both ways: inside, what acted is recorded; outside it could not be, which is refused."""
    scenes = scenes_for((0, 0), (144, 144))  # patches have 16 pixels a side
    spec = BlockAttention(TARGET, layers=[1], heads=[0], denoise_steps=[1], queries="actions")
    expected = [np.zeros((16, 16), bool), np.zeros((16, 16), bool)]
    expected[0][:4, :4] = True
    expected[1][9:13, 9:13] = True
    watching = AttentionPolicy(policy)
    with intervene(watching, spec, masks=lambda: scenes):
        watching.enable_attention_map_saving()
        chunk(watching, batch)
        maps = watching.get_attention_maps(last_n_layers=4)
        watching.disable_attention_map_saving()
    for step, layer, head, row in itertools.product(range(2), range(4), range(2), range(2)):
        weights = maps[step]["attention_weights"][layer][row, head, :, :256].numpy()
        is_zero = (weights == 0).all(0).reshape(16, 16)
        acts = (step, layer, head) == (1, 1, 0)
        assert (is_zero == (expected[row] & acts)).all(), (step, layer, head, row)
    watching.enable_attention_map_saving()
    with (
        pytest.raises(ConfigError, match=r"is already being captured, .*; enter intervene first"),
        intervene(policy, spec, masks=lambda: scenes),
    ):
        pass
    with intervene(policy, FixedNoise()):  # which changes no map on its way, may be entered late
        chunk(policy, batch)
    watching.disable_attention_map_saving()


def test_all_but_the_top_patches_by_an_unblocked_pass_with_the_same_noise(policy, batch):
    with capture_attention(policy, AttentionConfig(layers=[2])) as capture:
        plain = chunk(policy, batch)
        state = torch.get_rng_state()
    (record,) = capture.drain()
    ranked = record.suffix_attention_mean.astype(np.float64).mean((0, 1, 3))  # (batch, key)
    spec = BlockAttention({"all_but_top": 10, "layers": [2]})
    with (
        intervene(policy, spec) as acting,
        capture_attention(policy, AttentionConfig(layers="all")) as capture,
    ):
        acting.begin([0, 1])
        blocked = chunk(policy, batch)
        assert torch.equal(torch.get_rng_state(), state)
    (record,) = capture.drain()  # the pass that acted, and not the one that ranked
    assert not torch.equal(blocked, plain)
    is_patch = record.key_kind == 1
    for row in range(2):
        read = record.suffix_attention[:, :, row].max((0, 1, 2, 3)) > 0
        patches = np.flatnonzero(is_patch[row])
        assert set(np.flatnonzero(read & is_patch[row])) == set(
            patches[np.argsort(ranked[row, patches])[-10:]]
        )


def test_occlusion_is_what_the_policy_sees_and_others_can_see_it_too(policy, batch):
    target = Occlude(TARGET)
    scenes = scenes_for((0, 0), (150, 150))
    by_hand = {**batch, IMAGE: batch[IMAGE].clone()}
    for row, (top, left) in enumerate([(0, 0), (150, 150)]):
        picture = by_hand[IMAGE][row]
        inside = torch.zeros(256, 256, dtype=torch.bool)
        inside[top : top + 60, left : left + 60] = True
        picture[:, inside] = picture[:, ~inside].mean(-1, keepdim=True)
    n_asked = []

    def masks():
        n_asked.append(1)
        return scenes

    with intervene(policy, target, masks=masks) as acting:
        assert acting.seen(batch)[IMAGE] is batch[IMAGE]
        policy.reset()
        torch.manual_seed(0)
        with torch.inference_mode():
            action = policy.select_action(batch)
            seen = acting.seen(batch)
            policy.select_action(batch)  # from the queue: no inference
        assert acting.seen(batch)[IMAGE] is batch[IMAGE]
    assert len(n_asked) == 1
    torch.testing.assert_close(seen[IMAGE], by_hand[IMAGE])
    assert torch.equal(seen[WRIST], batch[WRIST])
    policy.reset()
    expected = chunk(policy, by_hand)[:, 0]
    torch.testing.assert_close(action, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(action, chunk(policy, batch)[:, 0], atol=1e-3)


def test_another_task_must_reach_the_policy(loaded, policy):
    raw = raw_observation()
    with intervene(policy, Task(text="open the drawer")) as acting:
        with pytest.raises(ConfigError, match=r"asked before anybody asked Intervener\.task"):
            chunk(policy, loaded[1](raw))
        raw["task"] = [acting.task(task, episode) for episode, task in enumerate(raw["task"])]
        found = chunk(policy, loaded[1](raw))
    assert raw["task"] == ["open the drawer"] * 2
    raw["task"] = ["open the drawer"] * 2
    assert torch.equal(found, chunk(policy, loaded[1](raw)))


def test_words_are_found_by_the_preprocessors_tokenizer(loaded, policy):
    raw = raw_observation()
    raw["task"] = ["pick up the soup", "open the soup"]
    batch = loaded[1](raw)
    spec = BlockAttention({"words": ["soup"]}, passes="both")
    with (
        intervene(policy, spec, preprocessor=loaded[1]),
        capture_attention(policy, AttentionConfig(layers="all"), tokenizer=None) as capture,
    ):
        chunk(policy, batch)
    (record,) = capture.drain()
    tokenizer = find_tokenizer(loaded[1])
    for row in range(2):
        gone = np.flatnonzero(
            (record.suffix_attention[:, :, row].max((0, 1, 2, 3)) == 0) & record.key_mask[row]
        )
        ids = batch["observation.language.tokens"][row, gone - record.layout.language.start]
        assert tokenizer.decode(ids.tolist()).strip() == "soup"
    with (
        pytest.raises(ConfigError, match="no tokenizer is known, expected one; give intervene"),
        intervene(policy, spec),
    ):
        pass
    with (
        intervene(policy, BlockAttention({"words": ["milk"]}), preprocessor=loaded[1]),
        pytest.raises(ConfigError, match="'milk' is not in the task, expected words of 'pick up the soup'"),
    ):
        chunk(policy, batch)


def test_masks_must_be_there_for_every_row(policy, batch):
    with intervene(policy, Condition("mine", (BlockAttention(TARGET),))) as acting:
        with pytest.raises(ConfigError, match=r"mine: speaks of roles, .*give intervene"):
            chunk(policy, batch)
        acting.masks = lambda: scenes_for((0, 0))
        with pytest.raises(ConfigError, match="got 1 scenes, expected 2, one for each row"):
            chunk(policy, batch)


def test_a_policy_acts_in_another_thread_and_with_gradients(policy, batch):
    """As real-time chunking does it."""
    spec = BlockAttention({"camera": "image"}, passes="both")
    noise = torch.zeros(2, 50, 32)
    with intervene(policy, spec), ThreadPoolExecutor(1) as thread:
        here = chunk(policy, batch, noise=noise)
        there = thread.submit(policy.predict_action_chunk, batch, noise=noise).result()
    assert torch.equal(here, there)
    value = torch.rand(1, 2, 4, 10).log_softmax(-1).requires_grad_()
    found = blocked(BlockAttention({"segment": "state"}), value.softmax(-1), Site("expert", 0), 6)
    found[..., 6].sum().backward()
    assert torch.isfinite(value.grad).all()
    assert value.grad.abs().sum() > 0


def test_what_makes_no_sense_for_a_policy_is_refused(demo_policy, xvla_policy):
    act = make_act()
    with (
        pytest.raises(ConfigError, match="task: act is given no instruction"),
        intervene(act, Task(empty=True)),
    ):
        pass
    with (
        intervene(act, BlockAttention({"segment": "text"})),
        pytest.raises(ConfigError, match="given no words"),
    ):
        act.predict_action_chunk(make_batch())
    with intervene(act, FixedNoise()):  # it draws nothing
        act.predict_action_chunk(make_batch())
    xvla = xvla_policy()[0]
    with pytest.raises(ConfigError, match="fixed_noise: xvla takes no noise"), intervene(xvla, FixedNoise()):
        pass
