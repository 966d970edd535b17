"""What tests share: no network, a headless renderer and browser, the gate before LIBERO, the demo policy."""

from __future__ import annotations

import functools
import gc
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import allocator
import pytest

# Before anything imports mujoco or huggingface_hub, which read them once.
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Some virtual machines announce AMX and end a process that uses it; torch would, for bfloat16.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
allocator.keep()  # a test of resident memory says give_back()

# What is compared is told there, too, when an assertion fails.
pytest.register_assert_rewrite("adapter_contract", "small_policies")

REQUIRE_LIBERO = "LEROBOT_ATTN_REQUIRE_LIBERO"


# The files that take longest. What begins last on one core should be short, or the others wait for it.
LONGEST_FIRST = (
    *("test_libero.py", "test_demo_trained.py", "test_explorer_page.py", "test_benchmarks_overhead.py"),
    *("test_benchmarks.py", "test_replay.py", "test_robots.py", "test_interruptions.py", "test_act.py"),
    *("test_smolvla.py", "test_xvla.py", "test_pi0_fast.py", "test_pi05.py", "test_pi0.py"),
    *("test_molmoact2.py", "test_eo1.py", "test_evo1.py"),
    *("test_legal_paths.py", "test_untrusted.py", "test_vision.py", "test_verify.py"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--alone",
        choices=("skip", "only"),
        help="leave the tests out that are marked `alone`, or run no others (default: run all)",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()  # what was imported stays: to look through it takes half a second, each time


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if wanted := config.getoption("--alone"):
        _deselect(config, items, lambda item: bool(item.get_closest_marker("alone")) != (wanted == "only"))
    if hasattr(config, "workerinput"):  # of pytest-xdist, whose processes each take the next file
        places = {name: place for place, name in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: places.get(item.path.name, len(places)))
    for item in items:
        if item.get_closest_marker("libero") and isinstance(item, pytest.Function):
            # First, so that no other fixture starts a simulation that cannot run.
            item.fixturenames[:] = ["libero_ready", *(n for n in item.fixturenames if n != "libero_ready")]
        if item.get_closest_marker("browser"):
            # On busy cores a browser may be slower than any patience. What is wrong is wrong each time;
            # earlier failures are shown as RERUN.
            item.add_marker(pytest.mark.flaky(reruns=2))


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Where a test ends its process again and again, pytest-xdist gives up, and the others are not run.
    scheduler = getattr(session.config.pluginmanager.getplugin("dsession"), "sched", None)
    if scheduler and scheduler.collection_is_completed and scheduler.has_pending:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def _deselect(
    config: pytest.Config, items: list[pytest.Item], left_out: Callable[[pytest.Item], bool]
) -> None:
    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]


@pytest.fixture(scope="session")
def libero_ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of LIBERO's assets, with its config file in place and rendering tried.

    Skips when something is missing; fails instead when LEROBOT_ATTN_REQUIRE_LIBERO=1.
    """
    reason = _why_libero_cannot_run()
    if reason:
        if os.environ.get(REQUIRE_LIBERO) == "1":
            pytest.fail(f"{REQUIRE_LIBERO}=1, but {reason}", pytrace=False)
        pytest.skip(reason)

    from lerobot_attn.machine.libero import assets_state, config_path, write_libero_config

    if not config_path().exists():
        # Of the whole session, child processes too; the person's own folder stays as it is.
        os.environ["LIBERO_CONFIG_PATH"] = str(tmp_path_factory.mktemp("libero_config"))
        write_libero_config()
    return assets_state().folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium, of a module: Playwright keeps an event loop running, in the way of others' own."""
    from browser import started

    with started() as browser:
        yield browser


@pytest.fixture
def pages(chromium: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Opens pages in the browser; the test fails if their consoles say anything."""
    from browser import Pages

    opened = Pages(chromium, request.node.name)
    yield opened
    opened.close()
    assert not opened.said, "the console is not empty"


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy the run that an episode is of, for a test to change: the episode → its path in the copy."""

    def copy(episode: Path) -> Path:
        run = episode.parents[2]
        return shutil.copytree(run, tmp_path / "run") / episode.relative_to(run)

    return copy


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, without LIBERO's files."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    return folder


def _why_libero_cannot_run() -> str:
    import importlib.util

    from lerobot_attn.machine.doctor import check_rendering
    from lerobot_attn.machine.libero import assets_state

    if importlib.util.find_spec("libero") is None:
        return "libero is not installed; pip install 'lerobot_policy_attn[eval]'"
    state = assets_state()
    if not state.complete:
        return (
            f"LIBERO's assets in {state.folder} lack {', '.join(state.missing)}; "
            "lerobot-attn setup-libero --assets ARCHIVE_OR_FOLDER"
        )
    check = check_rendering()
    return f"{check.detail}; {check.remedy}" if check.status == "failed" else ""


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a demo checkpoint."""
    from lerobot_attn.demo.checkpoint import make_demo_checkpoint

    return make_demo_checkpoint(tmp_path_factory.mktemp("demo") / "pi05_tiny", random=True)


@pytest.fixture(scope="session")
def demo_policy(demo_checkpoint: Path) -> Callable[..., tuple[Any, Any, Any]]:
    """Load the demo checkpoint as lerobot-eval does: settings → (policy, preprocessor, postprocessor)."""
    return functools.partial(_load, demo_checkpoint)


@pytest.fixture(scope="session")
def pi0_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a demo checkpoint of type pi0_tiny."""
    return _random_checkpoint(tmp_path_factory, "pi0_tiny")


@pytest.fixture(scope="session")
def pi0_policy(pi0_checkpoint: Path) -> Callable[..., tuple[Any, Any, Any]]:
    """Load it as lerobot-eval does: settings → (policy, preprocessor, postprocessor)."""
    return functools.partial(_load, pi0_checkpoint)


@pytest.fixture(scope="session")
def smolvla_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a demo checkpoint of type smolvla_tiny."""
    return _random_checkpoint(tmp_path_factory, "smolvla_tiny")


@pytest.fixture(scope="session")
def smolvla_policy(smolvla_checkpoint: Path) -> Callable[..., tuple[Any, Any, Any]]:
    """Load it as lerobot-eval does: settings → (policy, preprocessor, postprocessor)."""
    return functools.partial(_load, smolvla_checkpoint)


@pytest.fixture(scope="session")
def fast_policy() -> Callable[..., Any]:
    """Make a small Pi0-FAST without the Hub: settings → policy."""
    from fast_policy import make_policy

    return make_policy


@pytest.fixture(scope="session")
def xvla_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any, Any]]:
    """Make a small X-VLA without the Hub: settings → (policy, preprocessor, postprocessor)."""
    from xvla_policy import make_policy, save_tokenizer

    return functools.partial(make_policy, save_tokenizer(tmp_path_factory.mktemp("xvla") / "tokenizer"))


@pytest.fixture(scope="session")
def eo1_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any, Any]]:
    """Make a small EO-1 without the Hub: settings → (policy, preprocessor, postprocessor)."""
    from eo1_policy import make_policy, save_processor

    return functools.partial(make_policy, save_processor(tmp_path_factory.mktemp("eo1") / "processor"))


@pytest.fixture(scope="session")
def evo1_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any, Any]]:
    """Make a small EVO-1 without the Hub: settings → (policy, preprocessor, postprocessor)."""
    from evo1_policy import make_policy, save_language_model

    return functools.partial(make_policy, save_language_model(tmp_path_factory.mktemp("evo1") / "internvl"))


@pytest.fixture(scope="session")
def groot_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any, Any]]:
    """Make a small GR00T N1.7 without the Hub: settings → (policy, preprocessor, postprocessor)."""
    from groot_policy import make_policy, save_backbone

    return functools.partial(make_policy, save_backbone(tmp_path_factory.mktemp("groot") / "qwen"))


@pytest.fixture(scope="session")
def molmoact2_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any, Any]]:
    """Make a small MolmoAct2 without the Hub: settings → (policy, preprocessor, postprocessor)."""
    from molmoact2_policy import make_policy

    return functools.partial(make_policy, tmp_path_factory.mktemp("molmoact2"))


@pytest.fixture(scope="session")
def wall_x_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any, Any]]:
    """Make a small Wall-X without the Hub: settings → (policy, preprocessor, postprocessor)."""
    from wall_x_policy import make_policy, save_model

    return functools.partial(make_policy, save_model(tmp_path_factory.mktemp("wall_x") / "qwen"))


def _random_checkpoint(tmp_path_factory: pytest.TempPathFactory, policy_type: str) -> Path:
    from lerobot_attn.demo.checkpoint import make_demo_checkpoint

    folder = tmp_path_factory.mktemp("demo") / policy_type
    return make_demo_checkpoint(folder, policy_type=policy_type, random=True)


def _load(checkpoint: Path, **settings: Any) -> tuple[Any, Any, Any]:
    from lerobot.configs import PreTrainedConfig
    from lerobot.envs.configs import LiberoEnv
    from lerobot.policies.factory import make_policy, make_pre_post_processors

    import lerobot_attn.plugin

    lerobot_attn.plugin.load()  # registers the demo policies
    overrides = [f"--{name}={value}" for name, value in settings.items()]
    config = PreTrainedConfig.from_pretrained(checkpoint, cli_overrides=overrides)
    config.pretrained_path = checkpoint
    policy = make_policy(config, env_cfg=LiberoEnv()).eval()
    return policy, *make_pre_post_processors(config, pretrained_path=str(checkpoint))
