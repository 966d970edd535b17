"""Checks of this machine: each says what it found and, where something is wrong, what to do.

Changes nothing: what has to be written goes to temporary folders. Knows no policy and no store. Needs only
the base install; what is missing beyond it is a finding, not a crash.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from lerobot_attn.errors import FAILED, OK, SKIPPED, WARNING, Check
from lerobot_attn.machine.libero import CONFIG_KEYS, assets_state, config_path

PYTHON_FLOOR = (3, 12)
EVAL_REMEDY = "pip install 'lerobot_policy_attn[eval]'"
GL_REMEDY = (
    "apt-get install libegl1 libgl1-mesa-dri for MUJOCO_GL=egl, "
    "or set MUJOCO_GL=osmesa and apt-get install libosmesa6"
)
TIMEOUT_S = 120  # of a check in a process of its own
GB = 1e9
# A 300-frame LIBERO episode with the default settings is some hundred MB.
DISK_WARNING_BYTES = 10 * GB
DISK_FAILED_BYTES = 1 * GB
_STYLES = {OK: "green", WARNING: "yellow", FAILED: "bold red", SKIPPED: "dim"}

Finding = Check  # the former name

# Prints one JSON line: what rendered, and the picture's smallest and largest value.
_RENDER_SCENE = """
import json
import mujoco
scene = '<light pos="0 0 3"/><geom type="sphere" size="0.3" rgba="1 0 0 1"/>'
scene = f"<mujoco><worldbody>{scene}</worldbody></mujoco>"
model = mujoco.MjModel.from_xml_string(scene)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 64, 64) as renderer:
    renderer.update_scene(data)
    picture = renderer.render()
    try:
        from OpenGL import GL
        name = GL.glGetString(GL.GL_RENDERER).decode()
    except Exception:
        name = "unknown renderer"
    print(json.dumps({"renderer": name, "low": int(picture.min()), "high": int(picture.max())}), flush=True)
"""

# A layer of Gemma's shape: oneDNN takes its quickest instructions for it.
_BFLOAT16_LAYER = """
import torch
torch.nn.functional.linear(torch.ones(2, 968, 64).bfloat16(), torch.ones(512, 64).bfloat16())
"""
BFLOAT16_REMEDY = "export ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16, or run the policy in float32 or on a GPU"


def run_checks(console: Console | None = None) -> list[Check]:
    """Run every check, in the order in which problems should be solved.

    Args:
        console: where progress is shown, if it is a terminal; by default standard error.

    Returns:
        One `Check` each. A check that breaks is reported as failed; none raises.
    """
    console = Console(stderr=True) if console is None else console
    checks = []
    with console.status("Checking") as spinner:
        for name, function in _CHECKS.items():
            spinner.update(f"Checking {name}")
            try:
                checks.append(function(name))
            # SystemExit: what an imported package may raise, too.
            except (Exception, SystemExit) as error:
                checks.append(Check(name, FAILED, f"the check broke: {_one_line(error)}", _repair(name)))
    return checks


def check_policy(
    policy_path: str, dataset: str | None, rename: str | None, options: Sequence[str]
) -> list[Check]:
    """Check what a policy is fed against what it was trained on.

    Args:
        policy_path: the checkpoint's folder, or its name on the Hub.
        dataset: a LeRobotDataset's folder or name; None: none is looked at.
        rename: JSON of a data set's or an environment's feature → the policy's; None: nothing is renamed.
        options: `--policy.name=value` and `--env.name=value`.

    Raises:
        ConfigError: there is no such checkpoint, environment or data set, or an option is none.
        UnsupportedPolicyError: nobody knows the policy.
    """
    with Console(stderr=True).status("Loading LeRobot") as spinner:
        from lerobot_attn.plugin.feeding.command import FeedingRequest, run_feeding_checks

        return run_feeding_checks(FeedingRequest(policy_path, dataset, rename, options), spinner.update)


def print_report(checks: list[Check], console: Console) -> int:
    """Print one line per check, and its remedy below where there is one.

    Returns:
        The exit status: 1 when a check failed, otherwise 0.
    """
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        line = Text.assemble(
            (f"{check.status:<8}", _STYLES[check.status]), f"{check.name:<{width}}  ", check.detail
        )
        # Not wrapped: a remedy must stay copyable.
        console.print(line, soft_wrap=True, highlight=False)
        if check.remedy:
            console.print(
                Text(f"{'':8}{'':{width}}  remedy: {check.remedy}"), soft_wrap=True, highlight=False
            )
    counts = {status: sum(check.status == status for check in checks) for status in _STYLES}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    console.print(Text(summary or "nothing was checked"), soft_wrap=True, highlight=False)
    return 1 if counts[FAILED] else 0


def check_rendering(name: str = "rendering") -> Check:
    """Render a small scene off screen.

    It runs in a process of its own: a broken EGL can abort the process that uses it.
    """
    if not _installed("mujoco"):
        return Check(name, FAILED, "mujoco is not installed", EVAL_REMEDY)
    given = os.environ.get("MUJOCO_GL")
    # robosuite takes egl on Linux when nothing is said.
    fallback = "cgl" if sys.platform == "darwin" else "egl"
    environment = {**os.environ, "MUJOCO_GL": given or fallback}
    used = f"MUJOCO_GL={given}" if given else f"MUJOCO_GL={fallback}, as robosuite takes when it is not set"
    # mujoco writes its log to the working folder.
    with tempfile.TemporaryDirectory() as folder:
        done = _run_code(_RENDER_SCENE, folder=folder, environment=environment)
    if done is None:
        return Check(name, FAILED, f"no picture after {TIMEOUT_S} s ({used})", GL_REMEDY)
    result = _last_json(done.stdout)
    if result is None:
        return Check(name, FAILED, f"{_why_it_ended(done)} ({used})", GL_REMEDY)
    if result["low"] == result["high"]:
        return Check(name, FAILED, f"{result['renderer']} renders a blank picture ({used})", GL_REMEDY)
    # A failure after the picture is one while the context closes, which LIBERO does after every task.
    if done.returncode:
        return Check(
            name, WARNING, f"{result['renderer']} renders, then {_why_it_ended(done)} ({used})", GL_REMEDY
        )
    return Check(name, OK, f"{result['renderer']} ({used})")


def _check_python(name: str) -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] < PYTHON_FLOOR:
        floor = ".".join(str(part) for part in PYTHON_FLOOR)
        return Check(name, FAILED, f"{version}, expected {floor} or newer", f"install Python {floor}")
    return Check(name, OK, version)


def _check_torch(name: str) -> Check:
    if not _installed("torch"):
        return Check(name, FAILED, "torch is not installed", EVAL_REMEDY)
    import torch

    if not torch.cuda.is_available():
        return Check(name, OK, f"{torch.__version__}, CPU only: enough for the demo policy")
    devices = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Check(name, OK, f"{torch.__version__}, CUDA: {devices}")


def _check_bfloat16(name: str) -> Check:
    """Run a layer in bfloat16, in a process of its own: some virtual machines announce AMX and lack it."""
    if not _installed("torch"):
        return Check(name, FAILED, "torch is not installed", EVAL_REMEDY)
    done = _run_code(_BFLOAT16_LAYER)
    if done is None:
        return Check(name, WARNING, f"no result on the CPU after {TIMEOUT_S} s", BFLOAT16_REMEDY)
    if done.returncode:
        detail = f"on the CPU, {_why_it_ended(done, 'a bfloat16 layer')}"
        return Check(name, WARNING, detail, BFLOAT16_REMEDY)
    return Check(name, OK, "runs on the CPU")


def _check_lerobot(name: str) -> Check:
    if not _installed("lerobot"):
        return Check(name, FAILED, "lerobot is not installed", EVAL_REMEDY)
    version = importlib.metadata.version("lerobot")
    from lerobot_attn.plugin import check_lerobot, check_rollout

    problems = check_lerobot()
    if problems:
        return Check(name, FAILED, f"{version}: {'; '.join(problems)}", EVAL_REMEDY)
    problems = check_rollout()
    if problems:  # evaluations are recorded all the same
        remedy = "to record robots: pip install 'lerobot[core-scripts]', or a supported LeRobot"
        return Check(name, WARNING, f"{version}: lerobot-rollout: {'; '.join(problems)}", remedy)
    return Check(name, OK, f"{version}, every patch point is there, of evaluations and of rollouts")


def _check_libero_config(name: str) -> Check:
    if not _installed("libero"):
        return Check(name, FAILED, "libero is not installed", EVAL_REMEDY)
    path = config_path()
    if not path.exists():
        return Check(
            name,
            FAILED,
            f"{path} does not exist: LIBERO would ask a question on stdin",
            "lerobot-attn setup-libero",
        )
    remedy = f"delete {path}, then lerobot-attn setup-libero"
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return Check(name, FAILED, f"{path} cannot be read: {_one_line(error)}", remedy)
    if not isinstance(config, dict) or set(CONFIG_KEYS) - set(config):
        return Check(name, FAILED, f"{path} lacks some of {', '.join(CONFIG_KEYS)}", remedy)
    # The others hold downloads, or are found elsewhere, and need not exist.
    for key in ("benchmark_root", "bddl_files", "init_states"):
        if not Path(str(config[key])).is_dir():
            return Check(name, FAILED, f"{path}: {key} is {config[key]}, which does not exist", remedy)
    return Check(name, OK, str(path))


def _check_libero_assets(name: str) -> Check:
    state = assets_state()
    if state.complete:
        return Check(name, OK, str(state.folder))
    if not state.folder.exists():
        return Check(
            name,
            WARNING,
            f"{state.folder} does not exist: hf-libero will download it from the Hub at first use",
            "without a connection to the Hub: lerobot-attn setup-libero --assets ARCHIVE_OR_FOLDER",
        )
    return Check(
        name,
        FAILED,
        f"{state.folder} lacks {', '.join(state.missing)}",
        f"delete {state.folder}, or lerobot-attn setup-libero --assets ARCHIVE_OR_FOLDER",
    )


def _check_ffmpeg(name: str) -> Check:
    import imageio_ffmpeg

    size_px = (16, 16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frame.mp4"
        encoder = imageio_ffmpeg.write_frames(
            str(path), size_px, fps=1, codec="libx264", ffmpeg_log_level="error"
        )
        encoder.send(None)
        encoder.send(bytes(3 * size_px[0] * size_px[1]))
        encoder.close()
        if not path.is_file() or not path.stat().st_size:
            return Check(name, FAILED, f"{imageio_ffmpeg.get_ffmpeg_exe()} wrote no frame", _repair(name))
    return Check(name, OK, f"{imageio_ffmpeg.get_ffmpeg_version()}, encodes H.264")


def _check_disk(name: str) -> Check:
    folder = Path.cwd()
    free_bytes = shutil.disk_usage(folder).free
    detail = f"{free_bytes / GB:.1f} GB free in {folder}"
    if free_bytes >= DISK_WARNING_BYTES:
        return Check(name, OK, detail)
    remedy = "free some space, or give lerobot-eval an --output_dir on a larger disk"
    return Check(name, FAILED if free_bytes < DISK_FAILED_BYTES else WARNING, detail, remedy)


_CHECKS: dict[str, Callable[[str], Check]] = {
    "Python": _check_python,
    "torch": _check_torch,
    "bfloat16": _check_bfloat16,
    "LeRobot": _check_lerobot,
    "rendering": check_rendering,
    "LIBERO config": _check_libero_config,
    "LIBERO assets": _check_libero_assets,
    "ffmpeg": _check_ffmpeg,
    "disk space": _check_disk,
}


def _repair(name: str) -> str:
    """Return what to try when a check itself broke: reinstall what it imports."""
    if name == "ffmpeg":
        return (
            "pip install --force-reinstall 'imageio[ffmpeg]', or set IMAGEIO_FFMPEG_EXE to a working ffmpeg"
        )
    return (
        EVAL_REMEDY if name in ("torch", "bfloat16", "LeRobot", "rendering") else "report it with this line"
    )


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _run_code(
    code: str, *, folder: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str] | None:
    """Run Python code in a process of its own, and return how it ended; None if it did not within the time.

    Args:
        code: the program.
        folder: its working folder; this process's by default.
        environment: its environment variables, likewise.
    """
    try:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return None


def _last_json(text: str) -> dict[str, Any] | None:
    """Return the last line's JSON object; None when there is none, as after an abort."""
    lines = text.strip().splitlines()
    try:
        result = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return result if isinstance(result, dict) else None


def _why_it_ended(done: subprocess.CompletedProcess[str], what: str = "rendering") -> str:
    lines = done.stderr.strip().splitlines()
    last = f": {lines[-1].strip()}" if lines else ""
    if done.returncode < 0:
        return f"{what} was ended by signal {-done.returncode}{last}"
    return f"{what} ended with exit status {done.returncode}{last}"
