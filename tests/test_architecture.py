"""The house: who may import whom. CONTRIBUTING claims it, and these tests hold it."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

import lerobot_attn

ROOT = Path(lerobot_attn.__file__).parent


def modules_of(folder: Path) -> dict[str, Path]:
    return {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(folder.rglob("*.py"))
        if "node_modules" not in path.parts
    }


MODULES = modules_of(ROOT)
OUTSIDE_ROOMS = ("lerobot_policy_attn", "scripts", "benchmarks")
OUTSIDE = {name: path for folder in OUTSIDE_ROOMS for name, path in modules_of(ROOT.parent / folder).items()}

# The rooms from the ground up: a room is a module or package directly in lerobot_attn (`lerobot_attn` itself
# is its front door), or what stands outside and uses it. A room imports only rooms that stand before it.
ORDER = (
    # The ground: words, settings, descriptions.
    "errors",
    "settings",
    "sizes",
    "config",
    "layout",
    "masks",
    "prompt",
    # Left of the store: what runs beside a policy.
    "policies",
    "interventions",
    "capture",
    # The store itself: its writer serves the left, its reader the right.
    "store",
    "recording",
    # Right of the store: what needs no policy.
    "analysis",
    "figures",
    "synthetic",
    "inspection",
    "overlay",
    "plot",
    "report",
    "verify",
    "explorer",
    # What reaches into LeRobot.
    "demo",
    "plugin",
    "machine",
    # The doors.
    "cli",
    "lerobot_attn",
    "lerobot_policy_attn",
    "scripts",
    "benchmarks",
)
LEFT = ("policies", "interventions", "capture", "recording", "plugin", "demo")
RIGHT = (
    *("store", "analysis", "figures", "synthetic", "inspection"),
    *("overlay", "plot", "report", "verify", "explorer"),
)
# In the store's own room, what the left writes with.
WRITES = (
    *("schema", "references", "location", "files", "attributes"),
    *("lock", "trust", "encoding", "writer", "video", "packed", "remote", "url", "index"),
    *("services", "zipped", "bucket", "receipts", "sending"),
)
READS = ("lerobot_attn.store.reader", "lerobot_attn.store.runs")
FRAMEWORK_FREE = (
    "config",
    "layout",
    "masks",
    "prompt",
    "errors",
    "store",
    "inspection",
    "interventions.firing",
    "interventions.selectors",
    "interventions.spec",
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
MOST_ARROWS = 148  # for 29 rooms
MOST_LINES = 450
REASON = f"Longer than {MOST_LINES} lines because"


class Import(NamedTuple):
    module: str
    typing_only: bool = False


def imports_of(path: Path) -> list[Import]:
    """Everything that a file imports, in functions too; of this package also what it names in a string."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            names = [target(f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Constant) and node.value in MODULES and node.value != "lerobot_attn":
            names = [node.value]  # for importlib
        found += [Import(name, node in typing_only) for name in names if name]
    return found


def target(name: str) -> str | None:
    """The module that `from package import name` needs: a submodule, or the package."""
    if name == "lerobot_attn.__version__":
        return None  # needs nothing: Python imports the root before any of its modules
    return name if name in MODULES else name.rpartition(".")[0]


def room_of(module: str) -> str | None:
    """The room of one of our modules."""
    first, *rest = module.split(".")
    if first == "lerobot_attn":
        return rest[0] if rest else first
    return first if first in OUTSIDE_ROOMS else None


def inner_name(module: str) -> str:
    return module.removeprefix("lerobot_attn.")


IMPORTS = {name: imports_of(path) for name, path in {**MODULES, **OUTSIDE}.items()}


def arrows(imports: dict[str, list[Import]], *, typing: bool) -> set[tuple[str, str]]:
    """The pairs of rooms of which the first imports the second, anywhere."""
    return {
        (room_of(name), room_of(used.module))
        for name, all_used in imports.items()
        for used in all_used
        if room_of(used.module) not in (None, room_of(name)) and (typing or not used.typing_only)
    }


def used_by(names: Iterable[str], is_wrong: Callable[[str, str], bool]) -> dict[str, list[str]]:
    """Which of these modules import what they must not, and what; one test for all: there are hundreds."""
    found = {name: [used.module for used in IMPORTS[name] if is_wrong(name, used.module)] for name in names}
    return {name: used for name, used in found.items() if used}


# The rooms


def test_every_room_has_its_place_in_the_order():
    assert {room_of(name) for name in [*MODULES, *OUTSIDE]} == set(ORDER)
    assert {*LEFT, *RIGHT} < set(ORDER)


def test_no_import_runs_back_up_the_house():
    def is_back(name, used):
        return room_of(used) in ORDER[ORDER.index(room_of(name)) + 1 :]

    assert used_by(IMPORTS, is_back) == {}


def test_the_arrows_between_rooms_are_few(record_property):
    counts = len(arrows(IMPORTS, typing=False)), len(arrows(IMPORTS, typing=True))
    record_property("arrows", counts)
    print(f"arrows between rooms: {counts[0]}, with those for type checkers {counts[1]}")
    assert max(counts) <= MOST_ARROWS


def test_arrows_are_counted_through_functions_type_checkers_and_strings(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        '"""See lerobot_attn.verify."""\n'
        "from __future__ import annotations\n"
        "import typing, torch.nn\n"
        "from lerobot_attn import __version__, open_run, plot\n"
        "if typing.TYPE_CHECKING:\n    from lerobot_attn.store.reader import Episode\n"
        "def f():\n    from lerobot_attn.store import video\n    return g('lerobot_attn.analysis.select')\n"
    )
    imports = {"lerobot_attn.figures.canvas": imports_of(file)}
    found = {used.module: used.typing_only for used in imports["lerobot_attn.figures.canvas"]}
    assert found == {
        "__future__": False,
        "typing": False,
        "torch.nn": False,
        "lerobot_attn": False,
        "lerobot_attn.plot": False,
        "lerobot_attn.store.reader": True,
        "lerobot_attn.store.video": False,
        "lerobot_attn.analysis.select": False,
    }
    rooms = {"lerobot_attn", "plot", "store", "analysis"}
    assert arrows(imports, typing=True) == {("figures", room) for room in rooms}
    imports["lerobot_attn.figures.canvas"].remove(Import("lerobot_attn.store.video"))
    assert arrows(imports, typing=False) == {("figures", room) for room in rooms - {"store"}}


def test_no_import_cycles():
    graph = {
        name: {
            used.module
            for used in IMPORTS[name]
            if used.module in MODULES and used.module != name and not used.typing_only
        }
        for name in MODULES
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


# Data flows one way


def is_left(name):
    room, _, module = inner_name(name).partition(".")
    return room in LEFT or (room == "store" and module in WRITES)


def test_nothing_left_of_the_store_imports_its_reader():
    left = [*filter(is_left, MODULES)]
    assert len(left) > len(LEFT)
    assert used_by(left, lambda _, used: used in READS) == {}


def test_nothing_right_of_the_store_imports_what_is_left_of_it():
    right = [name for name in MODULES if room_of(name) in RIGHT]
    assert len(right) > len(RIGHT)
    assert used_by(right, lambda _, used: room_of(used) in LEFT) == {}


def test_adapters_describe_and_record_nothing():
    used = {room for name, room in arrows(IMPORTS, typing=True) if name == "policies"}
    assert used <= {"errors", "layout", "prompt"}


def test_analysis_and_figures_know_no_store():
    used = {room for name, room in arrows(IMPORTS, typing=True) if name in ("analysis", "figures")}
    assert "store" not in used


def is_framework_free(name):
    own = inner_name(name)
    return any(own == room or own.startswith(f"{room}.") for room in FRAMEWORK_FREE)


def test_reading_and_looking_need_no_framework():
    free = [*filter(is_framework_free, MODULES)]
    assert len(free) > len(FRAMEWORK_FREE)
    assert used_by(free, lambda _, used: used.split(".")[0] in FRAMEWORKS) == {}


def test_only_the_plugin_touches_lerobots_scripts():
    # launch.py names the module on a command line; the plugin alone reaches into it.
    others = [name for name in MODULES if room_of(name) != "plugin"]
    assert used_by(others, lambda _, used: used.startswith(("lerobot.scripts", "lerobot.rollout"))) == {}
    for name in others:
        text = MODULES[name].read_text(encoding="utf-8")
        if "lerobot.scripts" in text or "lerobot.rollout" in text:
            assert name == "lerobot_attn.machine.doctor", name


# One place for one thing


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func).rpartition(".")[2], node


def test_only_the_store_makes_and_mends_arrays():
    others = [name for name in MODULES if room_of(name) != "store"]  # xarray opens stores elsewhere
    assert used_by(others, lambda _, used: used.startswith(("zarr", "numcodecs"))) == {}


def test_only_the_schema_says_what_arrays_there_are_and_how_they_are_cut():
    for name, (function, call) in [(name, one) for name, path in MODULES.items() for one in calls(path)]:
        if function == "ArraySpec":
            assert name == "lerobot_attn.store.schema", name
        if function == "create_array":
            assert room_of(name) == "store", name
            for keyword in call.keywords:
                if keyword.arg in ("name", "shape", "chunks", "shards", "dtype"):
                    constants = [node for node in ast.walk(keyword.value) if isinstance(node, ast.Constant)]
                    assert not constants, f"{name}: {ast.unparse(keyword.value)}"


def test_no_module_is_long_without_a_reason_in_its_docstring():
    too_long = {}
    for name, path in {**MODULES, **OUTSIDE}.items():
        text = path.read_text(encoding="utf-8")
        if (n_lines := len(text.splitlines())) > MOST_LINES:
            docstring = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
            if REASON not in docstring:
                too_long[name] = n_lines
    assert not too_long, f"split them, or write '{REASON} …'"


# What an install brings


def bare(requirement: str) -> str:
    """The distribution's name of a requirement such as "imageio[ffmpeg]>=2.36"."""
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def requirements() -> tuple[set[str], set[str]]:
    """What the base install brings, and what the extra that runs evaluations adds."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = {bare(one) for one in project["dependencies"]}
    return base, {bare(one) for one in project["optional-dependencies"]["eval"]}


@functools.cache
def homes() -> dict[str, list[str]]:
    # Extras bring all but the first, which is found through a .pth file, which names no package.
    names = {"imageio_ffmpeg": ["imageio"], "rerun": ["rerun-sdk"], "sklearn": ["scikit-learn"]}
    return {**packages_distributions(), **names}


def distributions_of(name: str) -> set[str]:
    """What else than Python and this package a module imports when it runs, by distribution."""
    tops = {used.module.split(".")[0] for used in IMPORTS[name] if not used.typing_only}
    others = tops - set(sys.stdlib_module_names) - {"lerobot_attn"}
    return {bare(home) for top in others for home in homes().get(top, [top])}


def test_reading_and_looking_import_only_what_the_base_install_brings():
    base, _ = requirements()
    for name in filter(is_framework_free, MODULES):
        # Extras of their own, which say so in one line where they are missing: test_rerun.py, test_hub.py, ….
        extras = {
            "lerobot_attn.overlay.rerun": {"rerun-sdk"},
            "lerobot_attn.analysis.probes": {"scikit-learn"},
            "lerobot_attn.analysis.cluster": {"distributed"},
            "lerobot_attn.store.remote": {"fsspec"},
            "lerobot_attn.store.services": {"obstore"},
            "lerobot_attn.store.bucket": {"obstore"},
            "lerobot_attn.store.hub_access": {"huggingface-hub", "httpx"},  # the former brings the latter
        }
        assert distributions_of(name) <= base | extras.get(name, set()), name


def test_what_the_base_install_brings_is_needed_to_read_or_look():
    base, extra = requirements()
    assert not base & extra
    assert "hydra-core" in extra
    needed = {home for name in filter(is_framework_free, MODULES) for home in distributions_of(name)}
    assert base - needed == set()


# What an import costs


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import lerobot_attn", ["torch", "lerobot", "zarr", "xarray", "numpy"]),
        ("from lerobot_attn import open_episode, open_run", ["torch", "lerobot"]),
        ("import lerobot_attn.inspection, lerobot_attn.cli", ["torch", "lerobot"]),
        (
            "import " + ", ".join(name for name in MODULES if room_of(name) in RIGHT),
            [*FRAMEWORKS, "hydra", "rerun", "sklearn", "huggingface_hub", "obstore", "distributed"],
        ),
    ],
    ids=["the package", "reading", "the command line", "everything right of the store"],
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
