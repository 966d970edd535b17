"""The table of policies is true of the LeRobot that is installed, and docs and command show it."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("lerobot")

import lerobot.policies  # noqa: F401  (registers LeRobot's own)
from lerobot.configs import PreTrainedConfig
from typer.testing import CliRunner

from lerobot_attn.cli import app
from lerobot_attn.errors import UnsupportedPolicyError
from lerobot_attn.plugin.registry import policy_table
from lerobot_attn.policies import ADAPTERS, adapter_type
from lerobot_attn.policies.families import FAMILIES, WHY_NOT, markdown, table

PAGE = (Path(__file__).parent.parent / "docs" / "policies.md").read_text(encoding="utf-8")
POLICIES = Path(importlib.util.find_spec("lerobot").origin).parent / "policies"
OWN = {name for name in PreTrainedConfig.get_known_choices() if (POLICIES / name).is_dir()}


def code_of(name):
    """A policy's own code, without its comments and docstrings."""
    folder = "\n".join(
        ast.unparse(ast.parse(path.read_text(encoding="utf-8"))) for path in (POLICIES / name).rglob("*.py")
    )
    return re.sub(r'""".*?"""', "", folder, flags=re.DOTALL)


def test_every_policy_of_lerobot_has_its_row():
    rows = {row.policy_type: row for row in policy_table()}
    assert len(OWN) > 15
    assert set(rows) >= OWN
    assert {*WHY_NOT, *ADAPTERS} == OWN
    for name in OWN:
        assert bool(rows[name].why_not) == (name not in ADAPTERS)
        assert "not known" not in rows[name].why_not
    assert set(ADAPTERS) <= set(FAMILIES)


def test_what_is_captured_is_what_an_adapter_is_found_for():
    for name in OWN:
        config_class = PreTrainedConfig.get_choice_class(name)
        config = object.__new__(config_class)
        if name in ADAPTERS:
            assert adapter_type(config) == name
            continue
        with pytest.raises(UnsupportedPolicyError, match=re.escape(f"{name!r} ({WHY_NOT[name]}); supported")):
            adapter_type(config)


@pytest.mark.parametrize("name", sorted(name for name, why in WHY_NOT.items() if "from the Hub" in why))
def test_what_needs_the_hub_fetches_from_there(name):
    assert re.search(r"\.from_pretrained\(|hf_hub_download", code_of(name))


@pytest.mark.parametrize("name", sorted(name for name, why in WHY_NOT.items() if "no attention" in why))
def test_what_has_no_attention_has_none(name):
    kernels = r"scaled_dot_product_attention|MultiheadAttention|nn\.Transformer"
    assert not re.search(kernels, code_of(name))


def test_the_page_has_the_table():
    found = PAGE.split("<!-- policies -->")[1].split("<!-- /policies -->")[0].strip()
    assert found == markdown(ADAPTERS), "run benchmarks/readme_table.py"


def test_the_command_prints_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    done = CliRunner().invoke(app, ["policies"])
    assert done.exit_code == 0, done.output
    for row in policy_table():
        (line,) = (line for line in done.output.splitlines() if line.split()[:1] == [row.policy_type])
        assert (row.why_not or row.captured) in line


def test_derived_and_unknown_types():
    parent = next(iter(ADAPTERS))
    derived, unknown = table({"mine", "other"}, ADAPTERS, {"mine": ["between", parent]})
    assert derived.captured.endswith(f"(as {parent})")
    assert (derived.edited, derived.why_not) == ("yes", "")
    assert unknown.why_not == "not known to this version of lerobot-attn"
