import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lerobot_attn.errors import Check
from lerobot_attn.machine import doctor
from lerobot_attn.machine.doctor import check_rendering, print_report, run_checks
from lerobot_attn.machine.libero import ASSET_FOLDERS, config_path

NAMES = ["Python", "torch", "LeRobot", "rendering", "LIBERO config", "LIBERO assets", "ffmpeg", "disk space"]


def report(checks: list[Check]) -> tuple[int, list[str]]:
    out = io.StringIO()
    status = print_report(checks, Console(file=out, width=40))
    return status, out.getvalue().splitlines()


# The report


@pytest.mark.parametrize(
    ("statuses", "expected"), [(["ok"], 0), (["ok", "warning"], 0), (["warning", "failed", "ok"], 1), ([], 0)]
)
def test_exit_status(statuses: list[str], expected: int) -> None:
    assert report([Check("a", status, "detail") for status in statuses])[0] == expected


def test_a_line_per_check_and_its_remedy_unwrapped_and_without_markup() -> None:
    remedy = "pip install 'lerobot_policy_attn[eval]' and then a good deal more than forty columns"
    status, lines = report(
        [Check("torch", "failed", "torch [is] missing", remedy), Check("Python", "ok", "3.12.1")]
    )
    assert status == 1
    assert lines == [
        "failed  torch   torch [is] missing",
        f"{'':16}remedy: {remedy}",
        "ok      Python  3.12.1",
        "1 ok, 1 failed",
    ]


def test_an_unknown_status_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of ok, warning, failed"):
        Check("a", "fine", "detail")


def test_a_check_of_two_outcomes_says_whether_it_passed() -> None:
    checks = [Check.of("a", passed, "detail") for passed in (True, False, None)]
    assert [check.status for check in checks] == ["ok", "failed", "skipped"]
    assert [check.passed for check in checks] == [True, False, None]
    assert Check("a", "warning", "detail").passed is True
    status, lines = report(checks)
    assert (status, lines[-1]) == (1, "1 ok, 1 failed, 1 skipped")
    assert lines[2] == "skipped a  detail"


# The run


def test_a_check_that_breaks_is_a_failed_line_and_the_others_still_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def break_down(name: str) -> Check:
        raise OSError("libcudart.so: cannot open\nshared object file")

    def leave(name: str) -> Check:
        raise SystemExit("bye")

    checks = {"torch": break_down, "LeRobot": leave, "last": lambda name: Check(name, "ok", "fine")}
    monkeypatch.setattr(doctor, "_CHECKS", checks)
    broken, left, last = run_checks(Console(file=io.StringIO()))
    assert broken.status == left.status == "failed"
    assert broken.detail == "the check broke: OSError: libcudart.so: cannot open shared object file"
    assert "lerobot_policy_attn[eval]" in broken.remedy
    assert last == Check("last", "ok", "fine")


# A finder that hides what only the `eval` extra brings: the base install, as far as imports can tell.
BASE_INSTALL_ONLY = """
import sys
HIDDEN = {"torch", "lerobot", "libero", "mujoco", "gymnasium", "draccus", "robosuite", "transformers"}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in HIDDEN else find_spec(name, package)
from rich.console import Console
from lerobot_attn.machine.doctor import print_report, run_checks
sys.exit(print_report(run_checks(), Console()))
"""


def test_with_the_base_install_only_every_line_is_there_with_its_remedy(home: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BASE_INSTALL_ONLY],
        cwd=work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    for name, status in zip(
        NAMES, ["ok", "failed", "failed", "failed", "failed", "warning", "ok", None], strict=True
    ):
        (index,) = (i for i, line in enumerate(lines) if line[8:].startswith(f"{name:<13}  "))
        assert status is None or lines[index].startswith(status), lines[index]
        if status == "failed":
            assert lines[index + 1].strip() == "remedy: pip install 'lerobot_policy_attn[eval]'"
    # No check writes outside temporary folders.
    assert list(work.iterdir()) == []
    assert list(home.iterdir()) == []


def test_importing_doctor_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'lerobot', 'libero', 'mujoco', 'imageio_ffmpeg', 'lerobot_attn.plugin'}"
    code = f"import sys, lerobot_attn.machine.doctor; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Single checks


def test_lerobot_problems_and_a_broken_import_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lerobot")
    plugin = pytest.importorskip("lerobot_attn.plugin")
    monkeypatch.setattr(plugin, "check_lerobot", lambda: ["rollout is gone", "run_one has moved"])
    check = doctor._check_lerobot("LeRobot")
    assert check.status == "failed"
    assert check.detail.endswith(": rollout is gone; run_one has moved")

    monkeypatch.setattr(plugin, "check_lerobot", lambda: [])
    monkeypatch.setattr(plugin, "check_rollout", lambda: ["the queue has no merge"])
    check = doctor._check_lerobot("LeRobot")
    assert check.status == "warning"  # evaluations are recorded all the same
    assert "lerobot-rollout: the queue has no merge" in check.detail
    monkeypatch.undo()
    assert doctor._check_lerobot("LeRobot").status == "ok"

    monkeypatch.setitem(sys.modules, "lerobot_attn.plugin", None)
    monkeypatch.setattr(doctor, "_CHECKS", {"LeRobot": doctor._check_lerobot})
    (check,) = run_checks(Console(file=io.StringIO()))
    assert check.status == "failed"
    assert "lerobot_attn.plugin" in check.detail


def test_a_broken_gl_backend_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco")
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    check = check_rendering()
    assert check.status == "failed"
    assert "MUJOCO_GL=nonsense" in check.detail
    assert "\n" not in check.detail
    for word in ("libegl1", "libgl1-mesa-dri", "MUJOCO_GL=osmesa", "libosmesa6"):
        assert word in check.remedy


PICTURE = 'print(\'{"renderer": "fake", "low": %d, "high": %d}\')'


@pytest.mark.parametrize(
    ("code", "status", "detail"),
    [
        ("import os; os.abort()", "failed", "ended by signal 6"),
        (PICTURE % (0, 0), "failed", "fake renders a blank picture"),
        (PICTURE % (0, 255), "ok", "fake (MUJOCO_GL=egl)"),
        (PICTURE % (0, 255) + "\nraise SystemExit(3)", "warning", "fake renders, then"),
        ("import time; time.sleep(60)", "failed", "no picture after 2 s"),
        ("print('no json')", "failed", "exit status 0"),
    ],
)
def test_how_a_renderer_can_end(monkeypatch: pytest.MonkeyPatch, code: str, status: str, detail: str) -> None:
    pytest.importorskip("mujoco")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(doctor, "_RENDER_SCENE", code)
    monkeypatch.setattr(doctor, "TIMEOUT_S", 2)
    check = check_rendering()
    assert (check.status, detail in check.detail) == (status, True), check


def test_without_mujoco_gl_the_check_says_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(doctor, "_RENDER_SCENE", "import os, sys; sys.exit(os.environ['MUJOCO_GL'])")
    backend = "cgl" if sys.platform == "darwin" else "egl"
    assert f": {backend} (MUJOCO_GL={backend}, as robosuite takes" in check_rendering().detail


@pytest.mark.libero
def test_rendering_really_renders() -> None:
    assert check_rendering().status == "ok"


def test_a_processor_that_ends_bfloat16_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_BFLOAT16_LAYER", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    check = doctor._check_bfloat16("bfloat16")
    assert check.status == doctor.WARNING
    assert check.detail == "on the CPU, a bfloat16 layer was ended by signal 4"
    assert "ONEDNN_MAX_CPU_ISA" in check.remedy


def test_bfloat16_really_runs() -> None:
    pytest.importorskip("torch")
    assert doctor._check_bfloat16("bfloat16").status == doctor.OK


def test_libero_config_missing_damaged_stale_and_right(home: Path) -> None:
    pytest.importorskip("mujoco")
    if not doctor._installed("libero"):
        pytest.skip("libero is not installed")
    from lerobot_attn.machine.libero import write_libero_config

    check = doctor._check_libero_config("config")
    assert (check.status, check.remedy) == ("failed", "lerobot-attn setup-libero")

    path = write_libero_config()
    assert doctor._check_libero_config("config") == Check("config", "ok", str(path))

    right = path.read_text()
    for text, detail in [
        (right.replace("bddl_files:", "other:"), "lacks some of"),
        ("[1, 2", "cannot be read"),
        ("", "lacks some of"),
        (right.replace("bddl_files: ", "bddl_files: /gone"), "which does not exist"),
    ]:
        config_path().write_text(text)
        check = doctor._check_libero_config("config")
        assert (check.status, detail in check.detail) == ("failed", True), check
        assert str(path) in check.remedy
        assert "\n" not in check.detail


def test_assets_missing_is_a_warning_and_incomplete_a_failure(home: Path) -> None:
    check = doctor._check_libero_assets("assets")
    assert (check.status, "will download" in check.detail) == ("warning", True)

    folder = home / ".cache" / "libero" / "assets"
    for name in ASSET_FOLDERS[:-1]:
        (folder / name).mkdir(parents=True)
        (folder / name / "model.xml").touch()
    check = doctor._check_libero_assets("assets")
    assert (check.status, check.detail) == ("failed", f"{folder} lacks scenes")

    (folder / "scenes").mkdir()
    (folder / "scenes" / "scene.xml").touch()
    assert doctor._check_libero_assets("assets").status == "ok"


def test_an_ffmpeg_that_does_not_run_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._check_ffmpeg("ffmpeg").status == "ok"

    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "no_ffmpeg"))
    monkeypatch.setattr(doctor, "_CHECKS", {"ffmpeg": doctor._check_ffmpeg})
    (check,) = run_checks(Console(file=io.StringIO()))
    assert check.status == "failed"
    assert "IMAGEIO_FFMPEG_EXE" in check.remedy


@pytest.mark.parametrize(("free_bytes", "status"), [(50e9, "ok"), (5e9, "warning"), (0.5e9, "failed")])
def test_disk_space(monkeypatch: pytest.MonkeyPatch, free_bytes: float, status: str) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": free_bytes}))
    check = doctor._check_disk("disk")
    assert check.status == status
    assert bool(check.remedy) == (status != "ok")
    assert f"{free_bytes / 1e9:.1f} GB free in {Path.cwd()}" == check.detail
