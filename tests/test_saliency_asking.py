"""A policy is asked what matters to it: one whose action hangs on one known patch, and the real families."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

import scripted  # noqa: E402
from lerobot.configs import FeatureType, PolicyFeature  # noqa: E402
from recorded import write_dataset  # noqa: E402
from test_recording import scripted_adapter  # noqa: E402, F401

from lerobot_attn import AttentionConfig, cli, record_dataset  # noqa: E402
from lerobot_attn.analysis.saliency_tables import areas, saliency_table  # noqa: E402
from lerobot_attn.errors import ConfigError  # noqa: E402
from lerobot_attn.layout import Camera, ImageGeometry, TokenLayout, tiled  # noqa: E402
from lerobot_attn.plugin import checkpoints  # noqa: E402
from lerobot_attn.plugin.saliency import measure_saliency  # noqa: E402
from lerobot_attn.policies import ADAPTERS  # noqa: E402
from lerobot_attn.policies.base import InferenceInputs, PolicyDescription, Site, SiteInfo  # noqa: E402
from lerobot_attn.policies.taps import replaced_attribute  # noqa: E402
from lerobot_attn.recording import VideoFrames  # noqa: E402
from lerobot_attn.recording.dataset import DatasetFrames  # noqa: E402
from lerobot_attn.store.video import VideoWriter  # noqa: E402

SIZE, GRID, CHUNK, EXECUTED = 32, 8, 6, 4
OBJECT = (5, 2)  # the patch that the action hangs on
CAMERA = scripted.CAMERA
FEW = {"n_masks": 32, "hidden_share": 0.125, "n_draws": 2, "batch_size": 16}


class OnePatchPolicy(scripted.ScriptedPolicy):
    """Its executed actions are the colour of one patch, and noise; the others see the whole picture."""

    batches: tuple[int, ...] = ()

    def predict_action_chunk(self, batch, noise=None, **kwargs):
        image = batch[CAMERA]
        self.batches += (len(image),)
        row, column = (slice(SIZE // GRID * place, SIZE // GRID * (place + 1)) for place in OBJECT)
        colour = image[:, :, row, column].mean(dim=(1, 2, 3))
        actions = (torch.randn(len(image), CHUNK, 4) if noise is None else noise[:, :CHUNK]).clone()
        actions[:, :EXECUTED] += 100 * colour[:, None, None]
        actions[:, EXECUTED:] += 100 * image.mean(dim=(1, 2, 3))[:, None, None]
        return actions


def planted_maps(frame):
    """(layer, head, patch): layer 0 looks about the object, layer 1 at smooth patches of the frame's own."""
    y, x = np.mgrid[:GRID, :GRID]
    near = np.exp(-((y - OBJECT[0]) ** 2 + (x - OBJECT[1]) ** 2) / 2)
    elsewhere = np.random.default_rng(frame).random((2, GRID, GRID))
    maps = np.stack([np.stack([near, near + 0.01]), elsewhere]).reshape(2, 2, -1)
    return maps / maps.sum(axis=-1, keepdims=True)


class OnePatchAdapter(scripted.ScriptedAdapter):
    noise_shape = (CHUNK, 4)
    sees_images = True

    def describe(self):
        return PolicyDescription(
            policy_type="scripted",
            n_layers=2,
            n_prefix_layers=0,
            n_heads=2,
            n_denoise_steps=2,
            chunk_size=CHUNK,
            n_action_steps=EXECUTED,
            noise_shape=self.noise_shape,
        )

    def sites(self):
        return {Site("expert", layer): SiteInfo(n_heads=2, keys="prefix") for layer in range(2)}

    @contextmanager
    def observe(self, probe, sites, *, compiled):
        predict, n_patches = self.policy.predict_action_chunk, GRID * GRID
        geometry = ImageGeometry.letterbox((SIZE, SIZE), (SIZE, SIZE), (GRID, GRID), padding="centred")
        images = [("image", CAMERA, n_patches)] if self.sees_images else []
        cameras = (Camera(CAMERA, geometry),) if self.sees_images else ()
        layout = TokenLayout(tiled([*images, ("language", "language", 2), ("action", "action", CHUNK)]),
                             n_patches * self.sees_images + 2, cameras)  # fmt: skip

        def observed(batch, **kwargs):
            image = batch[CAMERA]
            mask = torch.ones(len(image), layout.n_keys, dtype=torch.bool)
            probe.begin(InferenceInputs(layout, torch.zeros(len(image), 2, dtype=torch.long), mask))
            maps = torch.zeros(len(image), 2, 2, CHUNK, layout.prefix_len)
            if self.sees_images:
                # Tokens that are not executed look elsewhere: row by row from the end.
                planted = planted_maps(int(1e4 * float(image[0].mean())))
                maps[..., :n_patches] = torch.from_numpy(planted)[None, :, :, None].float()
                maps[..., EXECUTED:, :n_patches] = maps[..., EXECUTED:, :n_patches].flip(-1)
            for step in range(2):
                probe.denoise_step(1 - step / 2)
                for layer in range(2):
                    probe.at(Site("expert", layer), maps[:, layer])
            actions = predict(batch, **kwargs)
            probe.end(actions)
            return actions

        with replaced_attribute(self.policy, "predict_action_chunk", observed):
            yield


@pytest.fixture
def policy(monkeypatch, scripted_adapter):  # noqa: F811
    monkeypatch.setitem(ADAPTERS, "scripted", (__name__, "OnePatchAdapter"))
    policy = OnePatchPolicy(scripted.make_config(chunk_size=CHUNK))
    policy.config.input_features = {CAMERA: PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE))}
    return policy


@pytest.fixture(scope="module")
def table_top(tmp_path_factory):
    """A data set of two episodes whose pictures are noise, the object's patch as well."""
    root = tmp_path_factory.mktemp("data") / "table"
    return write_dataset(root, (9, 5), cameras=(CAMERA,), dims=(3, 4), size=SIZE)


def mean_row(table, metric, layer, **more):
    """The one row of the mean over frames."""
    chosen = table[(table["frame"] == "mean") & (table["metric"] == metric) & (table["layer"] == layer)]
    for name, value in more.items():
        chosen = chosen[chosen[name] == value]
    (row,) = chosen.to_dict("records")
    return row


def peak(found, values):
    return np.unravel_index(found.patches.rectangle(values, CAMERA).argmax(), (GRID, GRID))


def test_importance_peaks_at_the_patch_that_the_action_hangs_on(policy, table_top):
    told = []
    found = measure_saliency(policy, table_top, progress=lambda *counts: told.append(counts), **FEW)
    # Where the policy would be asked anew.
    assert [(frame.episode, frame.frame) for frame in found.frames] == [
        (0, 0),
        (0, 4),
        (0, 8),
        (1, 0),
        (1, 4),
    ]
    for frame in found.frames:
        assert peak(found, frame.importance) == OBJECT
        assert frame.floor == 0, "all of a frame's questions start from the same noise"
        # Nothing but the patch's colour changes: to the mean of the picture.
        picture = frame.pictures[CAMERA] / 255
        colour = picture[20:24, 8:12].mean()
        assert frame.importance.max() == pytest.approx(100 * abs(colour - picture.mean()), rel=1e-3)
        assert frame.all_hidden == pytest.approx(frame.importance.max())
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert max(policy.batches) == 16


def test_attention_is_that_of_the_executed_tokens_and_the_mean_has_no_rows_of_its_own(policy, table_top):
    found = measure_saliency(policy, table_top, frames=[0], episodes=[1], **FEW)
    (frame,) = found.frames
    assert frame.attention.shape == (2, 2, GRID * GRID)
    assert peak(found, frame.attention[0, 0]) == OBJECT
    assert found.map_names[0] == ("0", "0")
    assert found.map_names[-1] == ("mean", "mean")
    np.testing.assert_allclose(found.attention(frame, "0"), frame.attention[0].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.attention(frame, "mean"), frame.attention.mean(axis=(0, 1)), rtol=1e-5)


@pytest.fixture
def numbers(policy, table_top):
    def of(**settings):
        return measure_saliency(
            policy, table_top, curve_layers=[0, 1], frames=[0, 1, 2, 3, 4], **{**FEW, **settings}
        )

    return of


def test_attention_on_the_object_beats_random_rankings_and_attention_elsewhere_does_not(numbers):
    found = numbers()
    table = saliency_table(found)
    for metric in ("deletion_gain", "insertion_gain", "deletion_gain_shifted", "insertion_gain_shifted"):
        on, off = mean_row(table, metric, "0"), mean_row(table, metric, "1")
        assert on["low"] > 0.1, metric
        assert off["low"] < 0 < off["high"], metric
        assert on["n_frames"] == 10
    ceiling = mean_row(table, "deletion_gain", "importance")["value"]
    assert ceiling == pytest.approx(mean_row(table, "deletion_gain", "0")["value"], abs=0.01)
    # The first patch that is hidden is the object: the whole change at once.
    area = areas(found)["attention 0"]
    np.testing.assert_allclose(area, [[1 - 1 / 128, 1 / 128]] * 10, atol=1e-3)


def test_rank_correlations_stand_beside_their_chance_level(numbers):
    table = saliency_table(numbers())
    of_object = mean_row(table, "rank_correlation", "0", head="0")
    elsewhere = mean_row(table, "rank_correlation", "1", head="mean")
    assert of_object["value"] > elsewhere["value"]
    assert elsewhere["chance_low"] < elsewhere["value"] < elsewhere["chance_high"]
    assert of_object["low"] <= of_object["value"] <= of_object["high"]
    assert table[table["metric"] == "asked_again"]["value"].max() == 0
    assert set(table.columns[:10]) >= {"frame", "camera", "layer", "head", "metric", "value", "chance"}
    # Each frame has its rows, without an interval.
    alone = table[(table["frame"] != "mean") & (table["metric"] == "deletion_gain")]
    assert len(alone) == 10 * 3
    assert alone["low"].isna().all()


def test_the_same_seed_gives_the_same_numbers_whatever_the_batch(policy, table_top):
    one, again, other = (
        measure_saliency(policy, table_top, episodes=[0], frames=[3], **{**FEW, **more})
        for more in ({}, {"batch_size": 5}, {"seed": 1})
    )
    np.testing.assert_allclose(one.frames[0].importance, again.frames[0].importance, atol=1e-5)
    assert not np.allclose(one.frames[0].importance, other.frames[0].importance)


def test_a_policy_that_draws_its_noise_draws_the_same_each_time(policy, table_top, monkeypatch):
    monkeypatch.setattr(OnePatchAdapter, "noise_shape", None)
    before = torch.random.get_rng_state()
    found = measure_saliency(policy, table_top, episodes=[0], frames=[3], **FEW)
    assert found.frames[0].floor == 0
    assert max(policy.batches) == 1
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_blur_hides_less_than_the_mean_colour_and_other_patches_stay(policy, table_top):
    seen = []

    def keep(batch):
        seen.append(batch[CAMERA].clone())
        return batch

    keep.steps = ()
    for fill in ("mean", "blur"):
        seen.clear()
        measure_saliency(policy, table_top, preprocessor=keep, frames=[0], episodes=[0], fill=fill, **FEW)
        plain, copies = seen[0][0], seen[1]
        assert torch.equal(copies[0], plain)
        hidden = copies[1]  # every patch
        if fill == "mean":
            assert torch.allclose(hidden, plain.mean(dim=(1, 2), keepdim=True).expand_as(plain))
        else:
            assert 0 < hidden.std(dim=(1, 2)).max() < plain.std(dim=(1, 2)).min()
        masked = (copies[2] != plain).any(dim=0)
        blocks = masked.reshape(GRID, SIZE // GRID, GRID, SIZE // GRID).float().mean(dim=(1, 3))
        assert ((blocks == 0) | (blocks > 0.8)).all(), "whole patches are hidden, and no others"
        assert 0 < (blocks > 0).float().mean() < 0.3


# The command


@pytest.fixture
def episode(policy, table_top, tmp_path):
    config = AttentionConfig(layers=[-1], mean_layers="none")
    record_dataset(policy, table_top, tmp_path / "run", config, episodes=[0])
    (path,) = (tmp_path / "run").rglob("*.zarr")
    return path


def command(monkeypatch, policy, *arguments):
    """Run the command with a policy in the place of a checkpoint."""
    checkpoint = SimpleNamespace(config=policy.config, preprocessor=None)
    monkeypatch.setattr(checkpoints, "read_checkpoint", lambda path, options: checkpoint)
    monkeypatch.setattr(checkpoints, "load_policy", lambda *_, **__: policy)
    monkeypatch.setattr(sys, "argv", ["lerobot-attn", "saliency", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


FEW_OPTIONS = (
    "--policy.path=p",
    "--n-masks=16",
    "--hidden-share=0.25",
    "--n-draws=1",
    "--curve-layers=0,mean",
)


def test_an_episodes_report(policy, episode, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report"
    assert command(monkeypatch, policy, episode, "-o", out, *FEW_OPTIONS) == 0, capsys.readouterr().err
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("report.md", "report.html", "saliency.csv", "saliency.npz"),
        *("maps.png", "correlation.png", "curves.png"),
    }
    text = (out / "report.md").read_text()
    assert "frames of MP4s, which lose detail" in text
    assert "3 frames of 1 episode: episode 0: 0, 4, 8" in text
    assert "predicts what matters" in text
    table = pd.read_csv(out / "saliency.csv", dtype={"layer": str, "head": str})
    arrays = np.load(out / "saliency.npz")
    assert arrays[f"importance {CAMERA}"].shape == (3, GRID, GRID)
    assert arrays[f"attention {CAMERA}"].shape == (3, 2, 2, GRID, GRID)
    assert arrays["frame"].tolist() == [0, 4, 8]
    # The video lost detail, and the object's patch is one of noise: it is found all the same.
    for grid in arrays[f"importance {CAMERA}"]:
        assert np.unravel_index(grid.argmax(), grid.shape) == OBJECT
    assert mean_row(table, "deletion_gain", "0")["low"] > 0


def test_a_data_sets_report(policy, table_top, tmp_path, monkeypatch):
    arguments = (table_top, "-o", tmp_path / "report", "--episodes=1", "--frames=2", *FEW_OPTIONS)
    assert command(monkeypatch, policy, *arguments) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "1 frame of 1 episode: episode 1: 2" in text
    assert "MP4" not in text
    assert "no interval" in text


def without_videos(episode):
    for path in episode.parent.glob("*.mp4"):
        path.unlink()


@pytest.mark.parametrize(
    ("arguments", "change", "said"),
    [
        (["--frames=9"], None, "frames: got 9, episode 0 has frames 0 to 8"),
        (["--frames=x"], None, "--frames: got 'x', expected numbers"),
        (["--episodes=1"], None, "--episodes: got numbers beside one episode's store"),
        ([], without_videos, "has no camera videos to ask about: its MP4 is not beside the store"),
        (["--fill=black"], None, "fill: got 'black', expected one of mean, blur"),
        (["--hidden-share=0.7"], None, "hidden_share: got 0.7, expected a number above 0, up to 0.5"),
        (["--n-masks=2"], None, "n_masks: got 2, expected a whole number of at least 8"),
        (["--curve-layers=5"], None, "curve layer 5 does not exist: this policy has 2"),
        (
            ["--layers=0", "--curve-layers=1"],
            None,
            "curve_layers: got 1, expected one of layers (0), or 'mean'",
        ),
        (["--curve-layers=best"], None, "curve_layers: got 'best', expected numbers of layers, or 'mean'"),
        (["--attention.x=1"], None, "no such option"),
    ],
)
def test_what_does_not_fit_is_one_line(
    policy, episode, tmp_path, monkeypatch, capsys, arguments, change, said
):
    if change is not None:
        change(episode)
    assert command(monkeypatch, policy, episode, "-o", tmp_path / "r", *FEW_OPTIONS[:4], *arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert not (tmp_path / "r").exists()


def test_a_policy_that_sees_no_image_is_refused(policy, table_top, monkeypatch):
    monkeypatch.setattr(OnePatchAdapter, "sees_images", False)
    with pytest.raises(ConfigError, match="saw no camera image"):
        measure_saliency(policy, table_top, frames=[0], **FEW)


def test_frames_are_thinned_evenly_unless_they_are_named(policy, table_top):
    frames = measure_saliency(policy, DatasetFrames(table_top), max_frames=3, **FEW).frames
    assert [(frame.episode, frame.frame) for frame in frames] == [(0, 0), (0, 8), (1, 4)]


# The families


def test_with_random_weights_no_rank_correlation_and_no_difference_between_the_controls(
    demo_policy, tmp_path
):
    """The tools find nothing where nothing is.

    The attention's own gain is above 0 also there, because attention decides how much of a patch enters:
    docs/evidence.md has the numbers. Two rankings that know nothing of the picture do not differ.
    """
    policy, preprocessor, _ = demo_policy(num_inference_steps=1)
    policy.config.input_features.pop("observation.images.empty_camera_0")  # it takes time alone
    data = write_dataset(tmp_path / "kitchen", (1,))
    few = {"n_masks": 8, "hidden_share": 0.25, "n_draws": 2, "shares": (1 / 8,), "batch_size": 10}
    found = measure_saliency(policy, data, preprocessor=preprocessor, **few)
    assert found.facts["random_weights"]
    table = saliency_table(found)
    correlations = table[(table["frame"] == "mean") & (table["metric"] == "rank_correlation")]
    assert len(correlations) == 2 * 5 * 9
    assert (correlations["p"] > 0.05).all()
    both = areas(found)
    assert np.abs((both["shifted mean"] - both["random mean"]).mean(axis=0)).max() < 0.1


def test_act_and_its_grid(tmp_path):
    from test_act import SIZE as PICTURE
    from test_act import TOP, WRIST, make_policy

    policy = make_policy()
    data = write_dataset(tmp_path / "act", (3,), cameras=(TOP, WRIST), dims=(6, 6), size=PICTURE[0])
    found = measure_saliency(policy, data, frames=[0], n_masks=8, hidden_share=0.25, n_draws=1, shares=[0.25])
    (frame,) = found.frames
    assert found.patches.cameras == [TOP, WRIST]
    assert frame.importance.shape == (len(found.patches),)
    assert np.isfinite(frame.attention).all()
    assert frame.floor < 1e-4 * frame.all_hidden


def test_videos_of_odd_sizes_are_cropped_to_the_pictures(tmp_path):
    path = tmp_path / "odd.mp4"
    writer = VideoWriter(path, fps=10, size_px=(33, 31))
    for level in (40, 200):
        writer.write(np.full((33, 31, 3), level, np.uint8))
    writer.close()
    videos = {"image": path}
    assert VideoFrames(videos, task="").observation(0, 0)[CAMERA].shape == (3, 34, 32)
    cropped = VideoFrames(videos, task="", sizes_px={CAMERA: (33, 31)})
    assert cropped.observation(0, 1)[CAMERA].shape == (3, 33, 31)
    assert cropped.observation(0, 0)[CAMERA].shape == (3, 33, 31), "also after the video began anew"
    assert cropped.pictures(0, 1, [CAMERA])[CAMERA].shape == (3, 33, 31)
