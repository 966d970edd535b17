"""What every adapter must do. Inherit from `AdapterContract` and provide the three fixtures."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from lerobot_attn.capture import capture_attention
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import CaptureError, ConfigError
from lerobot_attn.interventions import BlockAttention, Occlude, intervene
from lerobot_attn.interventions.blocking import Blocker
from lerobot_attn.layout import Kind
from lerobot_attn.masks import SceneMasks, instances_of
from lerobot_attn.policies import adapter_for
from lerobot_attn.policies.base import InferenceInputs, PolicyAdapter, Site


def instance_state(policy):
    """Everything on the policy's modules that watching could leave behind."""
    return {
        name: (
            sorted(vars(module)),
            {key: id(value) for key, value in vars(module).items() if callable(value)},
            {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")},
        )
        for name, module in policy.named_modules()
    }


def act(policy, batch, seed, n=1):
    """Return n actions of a fresh episode and the random state after them."""
    torch.manual_seed(seed)
    policy.reset()
    with torch.inference_mode():
        actions = [policy.select_action(batch).clone() for _ in range(n)]
    return torch.stack(actions), torch.get_rng_state()


def rows_that_exist(record):
    """(batch, query) bool: all, but for tokens that an autoregressive policy did not read."""
    return record.key_kind[:, record.layout.prefix_len :] != Kind.PADDING


class Editor:
    """A probe that replaces values by what a function makes of them, and notes where it was asked."""

    edits = True

    def __init__(self, function, sites=None):
        self.function, self.sites, self.seen = function, sites, []

    def at(self, site, value):
        self.seen.append(site)
        return self.function(value)

    def begin(self, inputs):
        pass

    denoise_step = camera = end = begin

    def abandon(self):
        pass

    def fail(self, error):
        raise error

    refuse = fail


def no_map(blocker, site, value):
    pytest.fail(f"{site}: a map was made for a probe that only masks scores")


class Watcher:
    """A probe that keeps a copy of each value: site → the values, in the order in which they came."""

    edits = False

    def __init__(self):
        self.values, self.n_ended = {}, 0

    def at(self, site, value):
        self.values.setdefault(site, []).append(value.detach().clone())

    def begin(self, inputs):
        self.layout = inputs.layout

    def camera(self, name):
        pass

    denoise_step = camera

    def end(self, action_chunk):
        self.n_ended += 1

    def abandon(self):
        pass

    def fail(self, error):
        raise error

    refuse = fail


def attention_sites(policy):
    return [site for site in adapter_for(policy).sites() if site.what == "attention"]


def unit_sites(policy):
    """The sites that are neurons or residuals, of a policy that has them."""
    return [site for site in adapter_for(policy).sites() if site.what != "attention"]


def decoder_layer(policy, site):
    """The layer of a Pi0, Pi0.5 or SmolVLA that a site is in, found by its name."""
    policy = adapter_for(policy).policy
    tower = {
        "vlm": r"model\.(paligemma_with_expert|vlm_with_expert)\.\w+\.model\.(language|text)_model",
        "expert": r"model\.(paligemma_with_expert\.gemma_expert\.model|vlm_with_expert\.lm_expert)",
    }[site.stream]
    pattern = rf"{tower}\.layers\.{site.layer}"
    (found,) = [module for name, module in policy.named_modules() if re.fullmatch(pattern, name)]
    return found


@contextmanager
def computed_beside(policy, sites):
    """Compute what the sites should be from what goes into and comes out of other modules."""
    found, handles = {}, []

    def watch(site):
        layer, before = decoder_layer(policy, site), {}
        norm, mlp = layer.post_attention_layernorm, layer.mlp

        def normed(module, args, output):
            before["residual"] = args[0].detach().clone()
            before["gate"] = output[1] if isinstance(output, tuple) else None

        def fed_forward(module, args, output):
            if site.what == "neurons":
                value = module.act_fn(module.gate_proj(args[0])) * module.up_proj(args[0])
            else:
                added = output.detach().clone()
                value = before["residual"] + (added if before["gate"] is None else added * before["gate"])
            found.setdefault(site, []).append(value.detach())

        handles.append(norm.register_forward_hook(normed))
        handles.append(mlp.register_forward_hook(fed_forward))

    for site in sites:
        watch(site)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class AdapterContract:
    """Fixtures to provide: `policy`; `batch`, of two; `longer`, a context in which the policy gets a prompt
    of another length (it yields the batch to give it). A method to provide: `breaks_at`.

    Attributes:
        settings: capture settings that every test has besides its own.
        is_bfloat16: whether the policy computes in bfloat16.
        can_edit: whether attention can be edited; False for a policy that stays compiled.
        n_blocked: so many keys, from the first, are blocked in order to change actions.
        can_block: whether interventions may block attention.
        sees: whether its actions depend on the pictures.
        cuts_pictures: whether its preprocessor cuts pictures into patches, which nobody can paint over.
        is_exact: whether what is blocked is blocked before the softmax, so that no rounding is left of it.
    """

    settings: ClassVar[dict[str, Any]] = {}
    is_bfloat16 = False
    can_edit = True
    n_blocked = 1
    can_block = True
    sees = True
    cuts_pictures = False
    is_exact = True

    def act(self, policy, batch, seed, n=1):
        """Return n actions of a fresh episode and the random state after them; the same for the same seed."""
        return act(policy, batch, seed, n)

    def picture(self, image):
        """Return an image of the batch in [0, 1]; a family whose preprocessor normalises undoes that."""
        return image

    def config(self, **settings):
        return AttentionConfig(**self.settings, **settings)

    def everything(self, policy):
        """The settings that capture all there is, the vision tower's maps too where there is one."""
        has_tower = adapter_for(policy).describe().n_vision_layers > 0
        return self.config(layers="all", prefix_layers="all", vision_layers="all" if has_tower else "none")

    def breaks_at(self, base):
        """Return a module of the unwrapped policy that every inference calls after some attention."""
        raise NotImplementedError

    @pytest.fixture
    def break_policy(self, policy):
        """A context in which the policy raises in the middle of an inference."""

        def fail(*args):
            raise RuntimeError("the policy broke")

        @contextmanager
        def broken():
            handle = self.breaks_at(adapter_for(policy).policy).register_forward_pre_hook(fail)
            try:
                yield
            finally:
                handle.remove()

        return broken

    def test_is_an_adapter(self, policy):
        assert isinstance(adapter_for(policy), PolicyAdapter)

    def test_description_is_what_is_captured(self, policy, batch):
        config = self.everything(policy)
        with capture_attention(policy, config) as capture:
            self.act(policy, batch, 0)
        (record,) = capture.drain()
        adapter = adapter_for(policy)
        sizes, layout = adapter.describe(), record.layout
        queries, keys, steps = layout.n_queries, layout.n_keys, max(1, sizes.n_denoise_steps)
        assert record.suffix_attention.shape == (steps, sizes.n_layers, 2, sizes.n_heads, queries, keys)
        assert record.suffix_attention_mean.shape == (steps, sizes.n_layers, 2, sizes.n_heads, keys)
        prefix = layout.prefix_len
        if sizes.n_prefix_layers:
            assert record.prefix_attention.shape == (sizes.n_prefix_layers, 2, sizes.n_heads, prefix, prefix)
        else:
            assert record.prefix_attention is None
        assert record.suffix_attention.dtype == np.float16
        assert len(layout.actions) == (sizes.n_decode_steps or sizes.chunk_size)
        assert record.action_chunk.shape[:2] == (2, sizes.chunk_size)
        first = layout.first_action_query
        n_executed = sizes.n_decode_steps or sizes.n_action_steps
        assert record.executed_queries == slice(first, first + n_executed)
        maps = record.suffix_attention.nbytes + record.suffix_attention_mean.nbytes
        maps += record.prefix_attention.nbytes if sizes.n_prefix_layers else 0
        if sizes.n_vision_layers:
            cameras = [camera.name for camera in layout.cameras if not camera.is_empty]
            assert record.vision_cameras == cameras
            grid = record.vision_grid
            patches = grid[0] * grid[1]
            expected = (len(cameras), sizes.n_vision_layers, 2, sizes.n_vision_heads, patches, patches)
            assert record.vision_attention.shape == expected
            assert record.vision_attention.dtype == np.float16
            assert np.isfinite(record.vision_attention).all()
            maps += record.vision_attention.nbytes
        else:
            assert record.vision_attention is None
        assert record.maps_bytes == maps // 2
        assert record.of(0).maps_bytes == maps // 2
        sites = adapter.sites()
        towers = {
            "expert": (sizes.n_layers, sizes.n_heads),
            "vlm": (sizes.n_prefix_layers, sizes.n_heads),
            "vision": (sizes.n_vision_layers, sizes.n_vision_heads),
        }
        for stream, (n_layers, n_heads) in towers.items():
            of_stream = {
                site.layer: info for site, info in sites.items() if site[::2] == (stream, "attention")
            }
            assert sorted(of_stream) == list(range(n_layers))
            assert {info.n_heads for info in of_stream.values()} <= {n_heads}
        assert record.attention_dtype == ("bfloat16" if self.is_bfloat16 else "float32")

    def test_sizes_are_each_inferences_own(self, policy, batch, longer):
        """One capture spans prompts of different lengths."""
        prefix_layers = [0] if adapter_for(policy).describe().n_prefix_layers else "none"
        with capture_attention(policy, self.config(layers="all", prefix_layers=prefix_layers)) as capture:
            self.act(policy, batch, 0)
            with longer() as other:
                self.act(policy, other, 0)
            self.act(policy, batch, 0)
        first, second, third = capture.drain()
        assert first.layout == third.layout
        assert first.layout.prefix_len != second.layout.prefix_len
        for record in (first, second, third):
            keys, prefix = record.layout.n_keys, record.layout.prefix_len
            assert record.suffix_attention.shape[-2:] == (record.layout.n_queries, keys)
            assert record.suffix_attention_mean.shape[-1] == keys
            if record.prefix_attention is not None:
                assert record.prefix_attention.shape[-2:] == (prefix, prefix)
            assert record.key_mask.shape == (2, keys)
            assert record.key_kind.shape == (2, keys)
        np.testing.assert_array_equal(first.suffix_attention, third.suffix_attention)

    def test_an_edit_that_changes_nothing_leaves_actions_bit_identical(self, policy, batch):
        actions, random_state = self.act(policy, batch, 7, n=3)
        editor = Editor(lambda value: value.clone(), sites=list(adapter_for(policy).sites()))
        with self.edited(policy, editor) as capture:
            if capture is None:
                return
            edited, edited_state = self.act(policy, batch, 7, n=3)
        assert set(editor.seen) == set(editor.sites)
        assert torch.equal(actions, edited)
        assert torch.equal(random_state, edited_state)

    def test_an_edit_acts_and_what_acted_is_recorded(self, policy, batch):
        def blocked(value):
            value = value.clone()
            value[..., : self.n_blocked] = 0
            return value / value.sum(-1, keepdim=True)

        actions, _ = self.act(policy, batch, 7)
        with capture_attention(policy, self.everything(policy)) as capture:
            self.act(policy, batch, 7)
        (before,) = capture.drain()
        editor = Editor(blocked)
        with self.edited(policy, editor) as capture:
            if capture is None:
                return
            edited, _ = self.act(policy, batch, 7)
        (after,) = capture.drain()
        assert not torch.equal(actions, edited)
        assert set(editor.seen) == set(attention_sites(policy))
        assert np.nan_to_num(before.suffix_attention[..., 0]).any()
        assert not np.nan_to_num(after.suffix_attention[..., 0]).any()
        assert not after.suffix_attention_mean[..., 0].any()
        if before.prefix_attention is not None:
            assert before.prefix_attention[..., 0].any()
            assert not after.prefix_attention[..., 0].any()
        if before.vision_attention is not None:
            assert before.vision_attention[..., 0].any()
            assert not after.vision_attention[..., 0].any()
        again, _ = self.act(policy, batch, 7)
        assert torch.equal(actions, again), "the edit outlived its context"

    def test_an_edit_of_one_site_leaves_the_others(self, policy, batch):
        """Of the last denoise step and layer: nothing that came before it may change."""
        site = Site("expert", adapter_for(policy).describe().n_layers - 1)
        if not self.can_edit:
            return
        editor = Editor(lambda value: value.flip(-1), sites=[site])
        with capture_attention(policy, self.config(layers="all", denoise_steps=[0])) as capture:
            self.act(policy, batch, 7)
        (before,) = capture.drain()
        config = self.config(layers="all", denoise_steps=[0])
        with capture_attention(policy, config, probes=[(editor, editor.sites)]) as capture:
            self.act(policy, batch, 7)
        (after,) = capture.drain()
        assert set(editor.seen) == {site}
        np.testing.assert_array_equal(after.suffix_attention[:, :-1], before.suffix_attention[:, :-1])
        assert not np.array_equal(
            after.suffix_attention[:, -1], before.suffix_attention[:, -1], equal_nan=True
        )

    def test_replacements_of_another_shape_are_refused(self, policy, batch):
        if not self.can_edit:
            return
        for wrong in (lambda value: value[..., :-1], lambda value: value.double()):
            editor = Editor(wrong)
            with (
                pytest.raises(CaptureError, match=r"a probe returned .* expected .* as it was given"),
                self.edited(policy, editor),
            ):
                self.act(policy, batch, 0)

    def test_nothing_is_left_behind_after_an_edit(self, policy, batch):
        self.act(policy, batch, 0)
        policy.reset()
        before = instance_state(policy)
        editor = Editor(lambda value: value.clone(), sites=list(adapter_for(policy).sites()))
        with self.edited(policy, editor) as capture:
            if capture is None:
                return
            self.act(policy, batch, 0)
        policy.reset()
        assert instance_state(policy) == before

    def test_neurons_and_residuals_are_what_the_layers_compute(self, policy, batch):
        """And to watch them changes neither actions nor random numbers, and leaves nothing behind."""
        adapter, sites = adapter_for(policy), unit_sites(policy)
        if not sites:
            return
        actions, random_state = self.act(policy, batch, 7)
        policy.reset()
        before, watcher = instance_state(policy), Watcher()
        with (
            adapter.observe(watcher, sites, compiled=not self.can_edit),
            computed_beside(policy, sites) as expected,
        ):
            watched, watched_state = self.act(policy, batch, 7)
        policy.reset()
        assert instance_state(policy) == before
        assert torch.equal(actions, watched)
        assert torch.equal(random_state, watched_state)
        assert watcher.n_ended == 1
        assert set(watcher.values) == set(sites)
        layout, n_steps = watcher.layout, adapter.describe().n_denoise_steps
        for site in sites:
            is_vlm, n_units = site.stream == "vlm", adapter.sites()[site].n_units
            assert len(watcher.values[site]) == (1 if is_vlm else n_steps)
            for value, other in zip(watcher.values[site], expected[site], strict=True):
                assert value.shape == (2, layout.prefix_len if is_vlm else layout.n_queries, n_units)
                assert torch.equal(value, other)
                assert value.dtype == (torch.bfloat16 if self.is_bfloat16 else torch.float32)

    def test_what_does_not_reach_the_actions_cannot_change_them(self, policy, batch):
        """Of the last layer of the language model; what is before it can (`test_neuron_sites` has all)."""
        sites = adapter_for(policy).sites()
        if not self.can_edit:
            return

        def edited(*sites):
            editor = Editor(lambda value: 3 * value.flip(-1), sites=list(sites))
            with adapter_for(policy).observe(editor, editor.sites, compiled=False):
                found, _ = self.act(policy, batch, 7)
            assert set(editor.seen) == set(sites)
            return found

        actions, _ = self.act(policy, batch, 7)
        last = adapter_for(policy).describe().n_prefix_layers - 1
        idle = [site for site, info in sites.items() if not info.reaches_actions]
        if not unit_sites(policy):
            assert idle in ([], [Site("vlm", last)])
            assert torch.equal(edited(*idle), actions)
            return
        assert idle == [Site("vlm", last, what) for what in ("attention", "neurons", "residual")]
        assert torch.equal(edited(*idle), actions)
        assert not torch.equal(edited(Site("vlm", last - 1, "neurons")), actions)

    @pytest.mark.parametrize("stream", ["vlm", "expert"])
    def test_what_is_recorded_of_a_residual_is_what_acted(self, policy, batch, stream):
        """The first to be entered acts first, and the next layer adds to what it gave, to the last bit."""
        sites = [Site(stream, layer, "residual") for layer in (0, 1)]
        if not unit_sites(policy) or not self.can_edit:
            return
        editor = Editor(lambda value: torch.full_like(value, 1.25), sites=sites[:1])
        watcher, adapter = Watcher(), adapter_for(policy)
        next_layer = decoder_layer(policy, sites[1])
        adds_nothing = [
            module.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
            for module in (next_layer.self_attn.o_proj, next_layer.mlp)
        ]
        try:
            with (
                adapter.observe(editor, sites[:1], compiled=False),
                adapter.observe(watcher, sites, compiled=False),
            ):
                self.act(policy, batch, 7)
        finally:
            for handle in adds_nothing:
                handle.remove()
        for site in sites:
            assert len(watcher.values[site]) == (1 if stream == "vlm" else adapter.describe().n_denoise_steps)
            for value in watcher.values[site]:
                assert (value == 1.25).all()

    def test_sites_that_nobody_asks_for_cost_nothing(self, policy):
        site = Site("expert", 1, "neurons")
        if site not in unit_sites(policy):
            return
        before = instance_state(policy)
        with adapter_for(policy).observe(Watcher(), [site], compiled=not self.can_edit):
            during = instance_state(policy)
        name = {id(module): name for name, module in policy.named_modules()}
        touched = {one for one, state in during.items() if state != before[one]}
        base, adapter = adapter_for(policy).policy, adapter_for(policy)
        down_proj = decoder_layer(policy, site).mlp.down_proj
        assert touched == {name[id(base)], name[id(adapter.model)], name[id(down_proj)]}

    def test_nothing_that_is_kept_carries_a_graph(self, policy, batch):
        """RTC's guidance runs the policy with gradients."""
        with capture_attention(policy, self.everything(policy)) as capture:
            torch.manual_seed(0)
            policy.reset()
            with torch.enable_grad():
                policy.predict_action_chunk(batch)
        (record,) = capture.drain()
        names = ["suffix_attention", "suffix_attention_mean"]
        names += ["prefix_attention"] if adapter_for(policy).describe().n_prefix_layers else []
        for name in names:
            assert np.isfinite(getattr(record, name)).any(), name
        assert np.isfinite(record.action_chunk).all()
        assert not [
            name for name, value in vars(record).items() if torch.is_tensor(value) and value.requires_grad
        ]

    def first_camera(self, policy, batch):
        features = adapter_for(policy).policy.config.image_features
        return next(name for name in features if name in batch)

    @contextmanager
    def blocking(self, policy, interventions, **options):
        """Intervene; None where that is duly refused."""
        acting = intervene(policy, interventions, **options)
        if self.can_edit and self.can_block:
            with acting as intervener:
                yield intervener
            return
        message = "the policy is compiled" if self.can_block else "got a policy of type .*, expected one of"
        with pytest.raises(ConfigError, match=message) as caught, acting:
            pass
        assert "\n" not in str(caught.value)
        yield None

    def test_what_is_blocked_weighs_nothing_and_its_pixels_do_not_matter(self, policy, batch, monkeypatch):
        """And what acted is recorded; what finds nothing to block changes nothing, and nothing is left.

        Where scores are masked, the policy's own mask does it: no map is made for the blocker, and actions
        are bit for bit those of scores that are masked right before the softmax.
        """
        camera = self.first_camera(policy, batch)
        block = BlockAttention({"camera": camera}, passes="both")
        actions, random_state = self.act(policy, batch, 7)
        policy.reset()
        before = instance_state(policy)
        with self.blocking(policy, block) as acting:
            if acting is None:
                return
            config = self.config(layers="all", prefix_layers="all")
            with capture_attention(policy, config) as capture:
                blocked, blocked_state = self.act(policy, batch, 7)
            with monkeypatch.context() as patch:
                if self.is_exact:
                    patch.setattr(Blocker, "at", no_map)
                other, _ = self.act(policy, {**batch, camera: 1 - batch[camera]}, 7)
            if self.is_exact:
                with monkeypatch.context() as patch:
                    patch.setattr(Blocker, "only_masks", lambda blocker, site: False)
                    assert torch.equal(self.act(policy, batch, 7)[0], blocked)
        policy.reset()
        assert instance_state(policy) == before
        (record,) = capture.drain()
        effect = (actions - blocked).abs().max()
        assert effect > 0
        assert torch.equal(random_state, blocked_state)
        rounding = 0.25 if self.is_bfloat16 else 1e-4
        assert (other - blocked).abs().max() <= (0 if self.is_exact else rounding * effect)
        segment = next(one for one in record.layout.segments if one.name == camera)
        keys = slice(segment.start, segment.stop)
        assert not np.nan_to_num(record.suffix_attention[..., keys]).any()
        assert not record.suffix_attention_mean[..., keys].any()
        assert not record.prefix_attention[..., keys].any()
        tolerance = 2**-11 + record.layout.n_keys * 2**-25 + (2**-8 if self.is_bfloat16 else 0)
        sums = np.nansum(record.suffix_attention, axis=-1, dtype=np.float32)
        assert np.abs(sums - 1).max() <= tolerance
        is_query = record.key_mask[:, : record.layout.prefix_len]
        sums = record.prefix_attention.sum(-1, dtype=np.float32)
        assert np.abs(sums - is_query[:, None]).max() <= tolerance
        instances = instances_of(["background", "soup"], {"soup": "target"}, where="here")
        unseen = SceneMasks(instances, {camera: np.zeros((8, 8), np.int16)})
        target = {"role": "target"}
        parts = [BlockAttention(target, passes="both"), Occlude(target)]
        with intervene(policy, parts, masks=lambda: [unseen, unseen]):
            untouched, untouched_state = self.act(policy, batch, 7)
        assert torch.equal(actions, untouched)
        assert torch.equal(random_state, untouched_state)

    def test_nothing_is_left_behind_when_a_policy_raises_that_is_acted_on(self, policy, batch, break_policy):
        policy.reset()
        before = instance_state(policy)
        block = BlockAttention({"camera": self.first_camera(policy, batch)})
        with break_policy(), self.blocking(policy, block) as acting:
            if acting is None:
                return
            with pytest.raises(RuntimeError, match="the policy broke"):
                self.act(policy, batch, 0)
        policy.reset()
        assert instance_state(policy) == before

    def test_sites_that_do_not_exist_are_named(self, policy):
        site = Site("expert", 99)
        editor = Editor(lambda value: None, sites=[site])
        with (
            pytest.raises(ConfigError, match=r"site expert\.99\.attention does not exist"),
            capture_attention(policy, AttentionConfig(layers=[-1]), probes=[(editor, [site])]),
        ):
            pass

    @contextmanager
    def edited(self, policy, editor):
        """Capture everything while an editor works at its sites; None where editing is duly refused."""
        config = self.everything(policy)
        editor.sites = editor.sites or attention_sites(policy)
        watching = capture_attention(policy, config, probes=[(editor, editor.sites)])
        if self.can_edit:
            with watching as capture:
                yield capture
            return
        with pytest.raises(ConfigError, match="can only be read from a compiled policy"), watching:
            pass
        yield None

    def test_rows_sum_to_one_and_masked_keys_are_zero(self, policy, batch):
        with capture_attention(policy, self.everything(policy)) as capture:
            self.act(policy, batch, 0)
        (record,) = capture.drain()
        tolerance = 2**-11 + record.layout.n_keys * 2**-25 + (2**-8 if self.is_bfloat16 else 0)
        prefix_len = record.layout.prefix_len
        is_read = rows_that_exist(record)
        assert np.isnan(np.moveaxis(record.suffix_attention, 4, 3)[:, :, ~is_read]).all()
        suffix = np.moveaxis(record.suffix_attention, 4, 3)[:, :, is_read]  # (step, layer, row, head, key)
        for maps in (suffix, record.suffix_attention_mean):
            for layer in range(maps.shape[1]):
                n_seen = record.layout.n_keys if layer in record.layers_seeing_suffix else prefix_len
                seen = maps[:, layer, ..., :n_seen].astype(np.float32)
                assert np.abs(seen.sum(-1) - 1).max() <= tolerance
                assert np.isnan(maps[:, layer, ..., n_seen:]).all()
        is_padding = record.key_kind == Kind.PADDING
        for env in range(2):
            assert not record.suffix_attention[:, :, env, :, is_read[env]][..., is_padding[env]].any()
            if record.prefix_attention is None:
                continue
            prefix = record.prefix_attention[:, env].astype(np.float32)
            padding = is_padding[env, : record.layout.prefix_len]
            assert not prefix[..., padding].any()
            assert not prefix[:, :, padding].any()
            assert np.abs(prefix[:, :, ~padding].sum(-1) - 1).max() <= tolerance
        if record.vision_attention is not None:
            tolerance += record.vision_attention.shape[-1] * 2**-25
            assert np.abs(record.vision_attention.sum(-1, dtype=np.float32) - 1).max() <= tolerance

    def test_flow_time_goes_from_noise_to_action(self, policy, batch):
        with capture_attention(policy, self.config()) as capture:
            self.act(policy, batch, 0)
        (record,) = capture.drain()
        steps = adapter_for(policy).describe().n_denoise_steps
        if not steps:  # one pass without a time, and not a step that pretends
            assert np.isnan(record.flow_time).tolist() == [True]
            return
        np.testing.assert_allclose(record.flow_time, 1 - np.arange(steps) / steps, atol=1e-6)

    def test_a_camera_that_is_painted_over_is_not_seen(self, policy, batch):
        """Once for each family: pictures are painted over before any of it runs."""
        if self.is_bfloat16 or not self.can_edit or adapter_for(policy).policy is not policy:
            return
        camera = self.first_camera(policy, batch)
        if self.cuts_pictures:
            with (
                pytest.raises(
                    ConfigError, match=r"^occlude: \w+'s preprocessor cuts pictures .* expected a pol"
                ),
                intervene(policy, Occlude({"camera": camera})),
            ):
                pass
            return
        actions, _ = self.act(policy, batch, 0)
        with intervene(policy, Occlude({"camera": camera})) as acting:
            painted, _ = self.act(policy, batch, 0)
            seen = acting.seen(batch)
        if self.sees:
            assert (actions - painted).abs().max() > 0
        assert not torch.equal(seen[camera], batch[camera])
        assert torch.equal(painted, self.act(policy, seen, 0)[0])
        assert torch.equal(actions, self.act(policy, batch, 0)[0])

    def test_watching_changes_nothing(self, policy, batch):
        actions, random_state = self.act(policy, batch, 7, n=3)
        with capture_attention(policy, self.everything(policy)):
            watched, watched_state = self.act(policy, batch, 7, n=3)
        assert torch.equal(actions, watched)
        assert torch.equal(random_state, watched_state)

    def test_nothing_is_left_behind(self, policy, batch):
        self.act(policy, batch, 0)
        before = instance_state(policy)
        with capture_attention(policy, self.everything(policy)):
            assert instance_state(policy) != before
            self.act(policy, batch, 0)
        policy.reset()
        assert instance_state(policy) == before

    def test_nothing_is_left_behind_when_the_policy_raises(self, policy, batch, break_policy):
        self.act(policy, batch, 0)
        policy.reset()
        before = instance_state(policy)
        with (
            pytest.raises(RuntimeError, match="the policy broke"),
            break_policy(),
            capture_attention(policy, self.everything(policy)) as capture,
        ):
            self.act(policy, batch, 0)
        policy.reset()
        assert instance_state(policy) == before
        assert not capture.records

    def test_capture_goes_on_after_the_policy_raised(self, policy, batch, break_policy):
        with capture_attention(policy, self.config()) as capture:
            with pytest.raises(RuntimeError, match="the policy broke"), break_policy():
                self.act(policy, batch, 0)
            self.act(policy, batch, 0)
        assert len(capture.records) == 1

    def test_an_inference_whose_tokens_cannot_be_told_is_let_pass(self, policy, batch, monkeypatch):
        """It is reported, and acts as if nobody watched; the next one is captured."""
        actions, random_state = self.act(policy, batch, 0)
        failures = []

        def unknown(*args, **kwargs):
            raise CaptureError("nobody knows these tokens")

        with capture_attention(policy, self.everything(policy), on_failure=failures.append) as capture:
            with monkeypatch.context() as patch:
                patch.setattr(InferenceInputs, "__init__", unknown)
                watched, watched_state = self.act(policy, batch, 0)
            assert [str(failure) for failure in failures] == ["nobody knows these tokens"]
            assert not capture.records
            self.act(policy, batch, 0)
        assert torch.equal(actions, watched)
        assert torch.equal(random_state, watched_state)
        assert (len(capture.records), len(failures)) == (1, 1)
        with monkeypatch.context() as patch, capture_attention(policy, self.config()) as capture:
            patch.setattr(InferenceInputs, "__init__", unknown)
            with pytest.raises(CaptureError, match="nobody knows these tokens"):
                self.act(policy, batch, 0)

    def test_chosen_parts_are_the_same_as_of_everything(self, policy, batch):
        with capture_attention(policy, self.everything(policy)) as capture:
            self.act(policy, batch, 3)
        (whole,) = capture.drain()
        has_tower, has_prefix = whole.vision_attention is not None, whole.prefix_attention is not None
        config = self.config(
            layers=[-1],
            mean_layers=[0, 2],
            heads=[1],
            denoise_steps=[0, -1],
            prefix_layers=[-2] if has_prefix else "none",
            vision_layers=[-1] if has_tower else "none",
        )
        with capture_attention(policy, config) as capture:
            self.act(policy, batch, 3)
        (part,) = capture.drain()
        steps = sorted({0, len(whole.flow_time) - 1})
        np.testing.assert_array_equal(part.suffix_attention, whole.suffix_attention[steps][:, -1:, :, 1:2])
        mean = whole.suffix_attention_mean[steps][:, [0, 2]][:, :, :, 1:2]
        np.testing.assert_array_equal(part.suffix_attention_mean, mean)
        if has_prefix:
            np.testing.assert_array_equal(part.prefix_attention, whole.prefix_attention[-2:-1, :, 1:2])
        np.testing.assert_array_equal(part.flow_time, whole.flow_time[steps])
        if has_tower:  # all heads of its own, whatever heads were chosen of the other towers
            np.testing.assert_array_equal(part.vision_attention, whole.vision_attention[:, -1:])

    def test_mean_is_over_the_executed_actions(self, policy, batch):
        with capture_attention(policy, self.config(layers="all")) as capture:
            self.act(policy, batch, 0)
        (record,) = capture.drain()
        is_read = rows_that_exist(record)
        expected = np.full(record.suffix_attention_mean.shape, np.nan, np.float32)
        for env in range(2):
            queries = np.arange(record.layout.n_queries)[record.executed_queries]
            rows = record.suffix_attention[:, :, env][..., queries[is_read[env, queries]], :]
            expected[:, :, env] = rows.astype(np.float32).mean(-2)
        np.testing.assert_allclose(record.suffix_attention_mean, expected, rtol=2**-9, atol=2**-23)

    def test_vision_layers_that_do_not_exist_are_named(self, policy):
        n_layers = adapter_for(policy).describe().n_vision_layers
        if n_layers:
            message = rf"vision_layer 99 does not exist: this policy has {n_layers}, expected 0 to"
        else:
            message = r"vision_layers: this policy \(\w+\) has no vision transformer .*expected 'none'"
        for asked in ([99],) if n_layers else ([99], "all"):
            with (
                pytest.raises(ConfigError, match=message) as caught,
                capture_attention(policy, self.config(layers=[-1], vision_layers=asked)),
            ):
                pass
            assert "\n" not in str(caught.value)

    def test_paused_capture_records_nothing(self, policy, batch):
        with capture_attention(policy, self.config()) as capture:
            capture.enabled = False
            self.act(policy, batch, 0)
            assert not capture.records
            capture.enabled = True
            self.act(policy, batch, 0)
        assert len(capture.records) == 1

    def test_camera_views_are_the_batchs_images(self, policy, batch):
        adapter = adapter_for(policy)
        for name, view in adapter.camera_views(batch).items():
            image = batch[name]
            assert view.dtype == torch.uint8
            assert view.shape == (len(image), *image.shape[2:], 3)
            expected = self.picture(image).permute(0, 2, 3, 1) * 255
            assert (view - expected).abs().max() <= 0.51
