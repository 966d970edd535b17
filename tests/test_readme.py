"""The README's tables are what the code says, and its pictures are there."""

import re
from pathlib import Path

from lerobot_attn import analysis
from lerobot_attn.config import AttentionConfig
from lerobot_attn.plot import KINDS
from lerobot_attn.store.schema import schema_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_schema_table_is_generated():
    table = README.split("<!-- schema -->")[1].split("<!-- /schema -->")[0].strip()
    assert table == schema_table(), "write schema_table() of lerobot_attn/store/schema.py into the README"


def test_every_setting_is_explained():
    section = README.split("## Record")[1].split("\n## ")[0]
    for name in AttentionConfig().to_dict():
        assert f"`--eval.attention.{name}`" in section or f"`{name}`" in section, name


def test_preset_sizes_are_the_presets_own():
    for preset in (ROOT / "configs" / "capture").glob("*.yaml"):
        size = re.search(r"full size: ([\d.]+ MB)", preset.read_text())[1]
        assert re.search(rf"\| `{preset.stem}` \|.*\| {re.escape(size)} \|", README), preset.stem


def test_every_picture_is_there_and_small():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert {Path(picture).stem for picture in pictures} >= set(KINDS)
    assert sum((ROOT / picture).stat().st_size for picture in pictures) < 3_000_000


def test_every_kind_of_plot_is_explained():
    section = README.split("## Look")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE)
    assert rows[1:] == list(KINDS)


def test_every_function_of_the_analysis_is_named():
    section = README.split("## Ask")[1].split("\n## ")[0]
    functions = {name for name in analysis.__all__ if name[0].islower()}
    named = set(re.findall(r"`([a-z_]+)`", section))
    assert functions - named <= {"to_table", "camera_geometry", "camera_names"}
    assert named - functions <= set()
