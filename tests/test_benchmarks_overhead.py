"""The benchmarks of overhead, memory and growth run, and what they call a miss is one."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from forked import STOCK, Forked, run_script  # noqa: E402

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SETTINGS = ("default", "summary", "all layers")


@pytest.fixture
def benchmark(monkeypatch):
    """Import a benchmark as it imports itself: its folder is the first on the path."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.fixture
def run_quick(benchmark, monkeypatch, tmp_path):
    """Run a benchmark with --quick; return its rows by name, and the whole JSON."""

    def run(name, *options):
        target = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", [name, "--quick", "--json", str(target), *options])
        assert benchmark(name).main() == 0
        return read(target)

    return run


def read(target):
    document = json.loads(target.read_text())
    assert document["quick"] is True
    assert document["machine"]["cores"] >= 1
    rows = {row["what"]: row for row in document["results"]}
    assert len(rows) == len(document["results"]), "two rows have one name"
    assert all(math.isfinite(row["value"]) for row in rows.values())
    return rows, document


def start(name, folder, *arguments):
    """Start a benchmark as a command, elsewhere than here."""
    return Forked(run_script, folder, STOCK, script=str(BENCHMARKS / f"{name}.py"), argv=arguments)


def the_row(rows, *parts):
    (found,) = [what for what in rows if all(part in what for part in parts)]
    return rows[found]


def test_overhead_of_an_inference(run_quick):
    rows, document = run_quick("overhead", "--only", "inference")
    seconds = document["details"]["inference_s"]
    assert len(rows) == len(seconds) == 1 + 2 * len(SETTINGS)
    for setting in SETTINGS:
        for kind in (setting, f"{setting}, recorded"):
            row = the_row(rows, f"capture {kind} over without")
            assert row["value"] == seconds[kind][0] / seconds["without capture"][0]
            assert row["at_most"] is None


@pytest.mark.libero
@pytest.mark.parametrize(("policy", "of"), [("pi05_tiny", ""), ("smolvla_tiny", " with smolvla_tiny")])
def test_overhead_of_a_rollout(libero_ready, tmp_path, policy, of):
    """In a process of its own, because the simulation leaves its GL context behind."""
    target = tmp_path / "result.json"
    arguments = ["--quick", "--only", "rollouts", "--policy", policy, "--json", str(target)]
    with start("overhead", tmp_path, *arguments) as process:
        assert process.wait(300) == 0, process.log
    rows, document = read(target)
    row = the_row(rows, f"LIBERO rollout of 11 frames{of}, capture default over without")
    seconds = document["details"]["rollout_s"]
    assert row["value"] == seconds["default"][0] / seconds["without capture"][0]
    assert (row["at_most"], row["headline"]) == (1.05, True)


@pytest.mark.libero
def test_what_masks_cost_in_a_rollout(libero_ready, tmp_path):
    target = tmp_path / "result.json"
    with start("segmentation", tmp_path, "--quick", "--json", str(target)) as process:
        assert process.wait(300) == 0, process.log
    rows, document = read(target)
    row = the_row(rows, "LIBERO rollout of 11 frames, recorded with masks over without")
    seconds = document["details"]["rollout_s"]
    assert row["value"] == seconds["recorded with masks"][0] / seconds["recorded without masks"][0]
    assert (row["at_most"], row["headline"]) == (1.1, True)


def test_actions_must_be_the_same_bits(benchmark):
    same = benchmark("overhead").SameActions()
    actions = torch.ones(2, 3)
    same.check("off", actions)
    same.check("default", actions.clone())
    actions[1, 2] += 1e-7
    with pytest.raises(RuntimeError, match="default: the actions differ"):
        same.check("default", actions)


def test_compiled(run_quick):
    """The compiler is told to run eagerly: to compile takes minutes. tests/test_compiled.py does it."""
    rows, document = run_quick("compiled", "--denoise-steps", "2")
    difference = the_row(rows, "largest difference of a weight")
    assert difference["value"] == 0
    assert difference["at_most"] == 2**-11
    overhead = the_row(rows, "compiled inference", "with capture over without")
    seconds = document["details"]["seconds"]
    compiled = seconds["compiled, with capture"][0] / seconds["compiled, without capture"][0]
    assert overhead["value"] == compiled


def test_a_wrong_map_is_seen(benchmark):
    compiled, policies = benchmark("compiled"), benchmark("policies")
    records = []
    for seed in (0, 0, 1):
        policy = policies.tiny_policy(depth=2, num_inference_steps=1, init_seed=seed)
        with compiled.capture_attention(policy, on_record=records.append):
            policies.infer(policy, policies.observation(policy))
    assert compiled.largest_difference(records[0], records[1]) == 0
    assert compiled.largest_difference(records[0], records[2]) > compiled.FLOAT16_STEP


class TestGpuOverhead:
    def test_runs_on_a_cpu_and_says_so(self, run_quick):
        rows, document = run_quick("gpu_overhead", "--device", "cpu")
        assert document["benchmark"] == "gpu_overhead_cpu"
        assert len(rows) == len(SETTINGS) + 1
        for what, row in rows.items():
            assert what.startswith("cpu, batch 1, ")
            assert row["at_most"] is None
            assert not row["headline"]

    def test_no_gpu_no_figures(self, benchmark):
        choose = benchmark("gpu_overhead").choose_device
        for asked in (None, "cuda", "cuda:1"):
            with pytest.raises(SystemExit, match="error: no CUDA device, so no GPU figures"):
                choose(asked, False)
        with pytest.raises(SystemExit, match="error: --device tpu"):
            choose("tpu", True)
        assert choose("cpu", False) == choose("cpu", True) == "cpu"
        assert choose(None, True) == "cuda"
        assert choose("cuda:1", True) == "cuda:1"

    def test_targets_are_those_of_a_gpu(self, benchmark):
        seconds = {"without capture": [1.0, 2.0], "default": [1.01, 2.02], "all layers": [1.2, 2.4]}
        memory = {"without capture": 100.0, "default": 101.0, "all layers": 130.0}
        make = benchmark("gpu_overhead").claims
        rows = {row.what: row for row in make(seconds, memory, 8, "H200", on_gpu=True)}
        default = rows["H200, batch 8, inference with capture default over without"]
        assert (round(default.value, 9), default.at_most, default.met) == (1.01, 1.02, True)
        everything = rows["H200, batch 8, inference with capture all layers over without"]
        assert (round(everything.value, 9), everything.at_most, everything.met) == (1.2, 1.10, False)
        assert rows["H200, batch 8, peak memory added by capture all layers"].value == 30
        assert not any(row.headline for row in make(seconds, {}, 8, "cpu", on_gpu=False))

    def test_another_policys_actions_are_refused(self, benchmark):
        module, policies = benchmark("gpu_overhead"), benchmark("policies")
        sizes = {"depth": 2, "num_inference_steps": 1}
        watched = {
            "without capture": policies.tiny_policy(**sizes),
            "default": policies.tiny_policy(**sizes, init_seed=1),
        }
        with pytest.raises(RuntimeError, match="default: the actions differ"):
            module.measure(watched, 1, 1, "cpu", compiled=False)


def test_policies_can_share_their_weights(benchmark):
    policies = benchmark("policies")
    one = policies.tiny_policy(depth=2, num_inference_steps=1)
    other = policies.tiny_policy(depth=2, num_inference_steps=1, init_seed=1)
    batch = policies.observation(one)
    assert not torch.equal(policies.infer(one, batch), policies.infer(other, batch))
    policies._share(one.model, other.model)
    assert torch.equal(policies.infer(one, batch), policies.infer(other, batch))
    for mine, theirs in zip(other.parameters(), one.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()


class TestMemory:
    def test_lerobot_eval_is_sampled_with_and_without_capture(self, run_quick):
        rows, document = run_quick("memory")
        (curves,) = document["details"]["resident_mb"]
        assert list(curves) == ["12", "30"]
        peaks = {}
        for n_frames, curve in curves.items():
            for kind, samples in curve.items():
                assert len(samples) == int(n_frames)
                peaks[kind, n_frames] = max(samples)
        # Torch and LeRobot alone are some hundred MB; capture holds maps of 17 MB besides.
        assert peaks["with capture", "30"] > peaks["without capture", "30"] + 17 > 300
        grown = {kind: peaks[kind, "30"] - peaks[kind, "12"] for kind in ("with capture", "without capture")}
        claim = the_row(rows, "30 frames over 12: what capture adds")
        assert claim["value"] == pytest.approx(grown["with capture"] - grown["without capture"])
        assert (claim["at_most"], claim["headline"]) == (64.0, True)

    def test_only_what_capture_adds_counts(self, benchmark):
        memory = benchmark("memory")
        assert memory.added_growth((1000, 1300), (900, 1100)) == 100
        assert memory.late_growth([0, 5, 5, 7]) == 2
        assert memory.late_growth([1] * 100) == 0

    def test_resident_memory_is_of_children_too(self):
        # In a process of its own: what the tests before have left is given back at any moment.
        script = """
            import subprocess, sys
            import numpy as np
            from memory import resident_mb

            found = [resident_mb()]
            held = np.ones(100_000_000, np.uint8)
            found.append(resident_mb())
            holds = "held = bytearray(b'1' * 100_000_000); print('ready', flush=True); input()"
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            with subprocess.Popen([sys.executable, "-c", holds], **pipes) as child:
                child.stdout.readline()
                found.append(resident_mb())
                child.stdin.close()
            print(*found, resident_mb())
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            cwd=BENCHMARKS,
            capture_output=True,
            text=True,
            check=True,
        )
        before, own, with_child, after = map(float, done.stdout.split())
        assert 90 < own - before < 150
        assert 90 < with_child - own < 350
        assert abs(after - own) < 50

    def test_an_evaluation_that_failed_or_ended_early_is_told(self, benchmark, tmp_path):
        samples_of = benchmark("memory").samples_of
        (tmp_path / "log").write_text("no such checkpoint")
        (tmp_path / "samples.json").write_text("[100, 101]")

        def ended_with(status):
            return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status})"])

        assert samples_of(ended_with(0), tmp_path, 2) == [100, 101]
        with pytest.raises(RuntimeError, match="lerobot-eval ended with 3: no such checkpoint"):
            samples_of(ended_with(3), tmp_path, 2)
        with pytest.raises(RuntimeError, match="the episode had 2 frames, expected 3"):
            samples_of(ended_with(0), tmp_path, 3)


class TestGrowth:
    def test_every_axis_and_cost_has_a_row(self, run_quick):
        rows, document = run_quick("growth")
        for axis in ("episodes", "environments of a batch", "layers"):
            for cost in ("time", "peak memory", "stored bytes"):
                assert rows[f"recording: {cost}, over 1, 2 {axis}"]["at_most"] == 1.1
        medians = document["details"]["medians"]
        for axis in medians:
            stored = medians[axis]["recording: stored bytes"]
            # Twice the maps; the means of all layers stay the same.
            assert 1.8 < stored["2"] / stored["1"] < 2.1, axis
        assert rows["open_run and its table: time, over 1, 2 episodes"]["at_most"] == 1.1
        overhead = rows["inference with capture over without, over 1, 2 environments of a batch"]
        assert overhead["at_most"] == 0.1
        steepest = the_row(rows, "steepest growth")
        assert steepest["value"] == max(
            row["value"] for row in rows.values() if row["at_most"] == 1.1 and row is not steepest
        )

    @pytest.mark.parametrize(
        ("cost", "steepest", "met"),
        [
            (lambda n: 5 * n, 1.0, True),
            (lambda n: 7.0, 0.0, True),
            (lambda n: n**2, 2.0, False),
            # A fit over all sizes would see 1.0: the square shows in the last step only.
            (lambda n: 1 + n + 0.01 * n * n, 1.2235, False),
        ],
    )
    def test_super_linear_growth_is_a_miss(self, benchmark, cost, steepest, met):
        module = benchmark("growth")
        assert module.growth({n: cost(n) for n in (100, 1, 10)}).most == pytest.approx(steepest, abs=1e-3)
        costs = {"recording: time, s": {n: [cost(n), cost(n), 1e9] for n in (1, 10, 100)}}
        (row,) = module.claims("episodes", costs)
        assert row.what == "recording: time, over 1, 10, 100 episodes"
        assert row.met is met

    def test_memory_that_was_given_back_is_seen(self, benchmark):
        peak_mb = benchmark("growth").peak_mb
        assert 95 < peak_mb(lambda: np.ones(100_000_000, np.uint8).sum()) < 200
        assert peak_mb(lambda: None) < 20


def test_full_size_inference_checks(run_quick):
    rows, document = run_quick("full_size_inference")
    assert rows["maps of an inference, float16, full and means"]["value"] > 30
    assert all(row["value"] <= row["at_most"] for row in rows.values() if row["at_most"] is not None)
    assert document["details"]["suffix_attention"] == [10, 4, 1, 8, 50, 1018]


def test_overlay_speed(run_quick):
    rows, document = run_quick("overlay_speed")
    row = the_row(rows, "overlay of 10 full-size frames")
    assert row["at_least"] == 60
    assert row["value"] == document["details"]["frames_per_s"][0]
    assert len(document["details"]["seconds"]) == 4


def test_a_benchmark_runs_from_anywhere(tmp_path, monkeypatch):
    """One command each: without a GPU, one line says why there are no figures."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with start("gpu_overhead", tmp_path) as process:
        assert process.wait() == 1
    assert process.log.splitlines()[-1].startswith("error: no CUDA device, so no GPU figures")


def test_a_robots_loop_is_timed_with_and_without(run_quick, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows, document = run_quick("robot_loop")
    assert set(document["details"]["jitter_p99_ms"]) == {"with", "without"}
    (ticks,) = document["details"]["tick_ms"]
    assert len(ticks) > 20
    assert min(ticks) > 0
    assert any("p99 of the ticks' jitter" in row for row in rows)


class TestReplay:
    def test_both_are_measured_on_the_same_frames(self, run_quick):
        rows, document = run_quick("replay", "--batch-size", "2")
        for words in ("chunk starts", "every frame"):
            seconds = document["details"][f"asked at {words}"]
            row = the_row(rows, words, "speed of the replay")
            assert row["value"] == seconds["the policy alone"][0] / seconds["replayed"][0]
            assert row["at_least"] == (0.9 if words == "every frame" else None)

    def test_other_actions_are_refused(self, benchmark, tmp_path):
        replays = benchmark("replay").Replays(tmp_path, 3, 32, 2, num_inference_steps=1)
        replays.replayed(1)()
        with torch.no_grad():
            next(replays._policy.model.action_out_proj.parameters()).add_(0.1)
        with pytest.raises(RuntimeError, match="every frame: the actions differ"):
            replays.alone(1)()
