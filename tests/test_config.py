"""Settings: every bad value is one clear line, and the same file means the same everywhere."""

from dataclasses import fields

import pytest

from lerobot_attn.config import AttentionConfig, CaptureSettings, StorageSettings, resolve_indices
from lerobot_attn.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "last"}, "layers: got 'last', expected a list of indices or 'all' or 'none'"),
        ({"layers": ["a"]}, "layers: got ['a']"),
        ({"layers": [1.5]}, "layers: got [1.5]"),
        ({"denoise_steps": "none"}, "denoise_steps: got 'none'"),
        ({"denoise_steps": []}, "denoise_steps: got []"),
        ({"heads": True}, "heads: got True"),
        ({"keep_bits": 0}, "keep_bits: got 0, expected a whole number from 1 to 10"),
        ({"keep_bits": 11}, "keep_bits: got 11"),
        ({"level": 10}, "level: got 10, expected a whole number from 0 to 9"),
        ({"queue_mb": 0}, "queue_mb: got 0"),
        ({"keep": "winners"}, "keep: got 'winners', expected one of all, success, failure"),
        ({"on_error": "ignore"}, "on_error: got 'ignore'"),
        ({"compressor": "gzip9"}, "compressor: got 'gzip9'"),
        ({"episodes": [-1]}, "episodes: got [-1]"),
        ({"episodes": []}, "episodes: got an empty list"),
        ({"cameras": "yes"}, "cameras: got 'yes'"),
        ({"layers": "none", "mean_layers": "none"}, "nothing to capture"),
    ],
)
def test_bad_value_is_one_clear_line(settings, message):
    with pytest.raises(ConfigError) as error:
        AttentionConfig(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_key_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown key 'layer'; expected one of layers, denoise_steps"):
        AttentionConfig.from_dict({"layer": [1]})


def test_yaml_roundtrip(tmp_path):
    path = tmp_path / "capture.yaml"
    path.write_text("layers: [16, -1]\nkeep_bits: 7\nepisodes: [0, 2]\nprefix_layers: none\n")
    config = AttentionConfig.from_yaml(path)
    assert config.layers == [16, -1]
    assert config.keep_bits == 7
    assert config.episodes == [0, 2]
    assert AttentionConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: [", "not valid YAML"),
        ("- 1\n", "got a list, expected a mapping"),
        ("layerz: all", "unknown key"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "capture.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        AttentionConfig.from_yaml(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_yaml(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the settings"):
        AttentionConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("selection", "expected"),
    [("all", (0, 1, 2, 3)), ("none", ()), ([-1], (3,)), ([3, 0, -4], (0, 3)), ([2, 2], (2,))],
)
def test_resolve_indices(selection, expected):
    assert resolve_indices("layer", selection, 4) == expected


@pytest.mark.parametrize("index", [4, -5])
def test_resolve_indices_out_of_range(index):
    with pytest.raises(
        ConfigError, match=rf"layer {index} does not exist: this policy has 4, expected 0 to 3"
    ):
        resolve_indices("layer", [index], 4)


def test_capture_and_storage_settings_are_parts_of_one_file(tmp_path):
    path = tmp_path / "capture.yaml"
    path.write_text("layers: [0]\nkeep: success\n")
    config = AttentionConfig.from_yaml(path)
    assert AttentionConfig().capture == CaptureSettings()
    assert config.capture == CaptureSettings(layers=[0])
    assert config.storage == StorageSettings(keep="success")
    names = [f.name for part in (CaptureSettings, StorageSettings) for f in fields(part)]
    assert list(config.to_dict()) == names


@pytest.mark.parametrize(
    ("part", "settings"), [(CaptureSettings, {"layers": "last"}), (StorageSettings, {"level": 10})]
)
def test_a_part_is_checked_too(part, settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=f"{name}: got"):
        part(**settings)


def test_means_that_nobody_chose_are_all_in_evaluations_alone():
    config = AttentionConfig(layers=[-1])
    assert config.mean_layers == "auto"
    assert config.for_evaluation().mean_layers == "all"
    assert AttentionConfig(mean_layers=[0]).for_evaluation().mean_layers == [0]
