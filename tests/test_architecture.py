"""The house: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lerobot_attn

ROOT = Path(lerobot_attn.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
FRAMEWORK_FREE = (
    "config",
    "layout",
    "prompt",
    "errors",
    "store",
    "inspection",
    "plugin.launch",
    "machine.libero",
    "cli",
    "settings",
    "sizes",
    "synthetic",
    "analysis",
    "figures",
    "explorer",
    "plot",
    "overlay",
    "verify",
    "report",
)
FRAMEWORKS = {"torch", "lerobot", "transformers", "gymnasium"}


def imports_of(path, *, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_plugin_touches_lerobots_scripts(name):
    text = MODULES[name].read_text()
    touches = any(module.startswith("lerobot.scripts") for module in imports_of(MODULES[name]))
    # launch.py names the module on a command line; the plugin alone reaches into it.
    assert not touches
    if "lerobot.scripts" in text:
        assert name.startswith("lerobot_attn.plugin") or name == "lerobot_attn.machine.doctor", name


def is_framework_free(name):
    own = name.removeprefix("lerobot_attn.")
    return any(own == room or own.startswith(f"{room}.") for room in FRAMEWORK_FREE)


@pytest.mark.parametrize("name", sorted(filter(is_framework_free, MODULES)))
def test_reading_and_looking_need_no_framework(name):
    used = {module.split(".")[0] for module in imports_of(MODULES[name])}
    assert not used & FRAMEWORKS


def test_no_import_cycles():
    graph = {
        name: {m for m in imports_of(path, top_level_only=True) if m in MODULES and m != name}
        for name, path in MODULES.items()
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name in done:
            return
        path.append(name)
        for other in graph[name]:
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import lerobot_attn", ["torch", "lerobot", "zarr", "xarray", "numpy"]),
        ("from lerobot_attn import open_episode, open_run", ["torch", "lerobot"]),
        ("import lerobot_attn.inspection, lerobot_attn.cli", ["torch", "lerobot"]),
    ],
)
def test_imports_stay_light(statement, forbidden):
    code = f"{statement}\nimport sys\nprint([m for m in {forbidden!r} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_public_names_exist():
    for name in lerobot_attn.__all__:
        assert getattr(lerobot_attn, name) is not None
    assert set(lerobot_attn.__all__) <= set(dir(lerobot_attn))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = lerobot_attn.nonsense
