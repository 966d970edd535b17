"""`lerobot-attn inspect`: true numbers, and one clear line for everything that is no episode."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_store import SIZES, frame_rows, inference_rows, make_writer, write_episode

from lerobot_attn import cli
from lerobot_attn.inspection import describe_episode, describe_run, segment_mass
from lerobot_attn.store import runs
from lerobot_attn.store.reader import open_episode, open_run


def run_cli(monkeypatch, capsys, *arguments):
    """Return (exit status, stdout, stderr) of the command."""
    monkeypatch.setattr(sys, "argv", ["lerobot-attn", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


def planted(path, mass=(0.5, 0.25, 0.125, 0.125), *, broken=False):
    """An episode whose attention is known: (camera, task word, state digit, actions)."""
    rng = np.random.default_rng(0)
    writer = make_writer(path, task_group="a", task_id=0, episode_index=0, seed=3)
    for index in range(4):
        rows = inference_rows(rng, index)
        row = np.zeros(SIZES["key"], np.float16)
        row[[1, 6, 7, 12]] = mass
        rows["suffix_attention_mean"] = np.broadcast_to(row, rows["suffix_attention_mean"].shape)
        if broken and index == 2:
            rows["suffix_attention_mean"] = rows["suffix_attention_mean"] * np.float16(1.1)
        writer.append_inference(rows)
        writer.append_frames(frame_rows(rng, index))
    writer.close(complete=True, attributes={"success": True})
    return path


def test_segment_mass_is_the_planted_one(tmp_path):
    shares, deviation, missing = segment_mass(open_episode(planted(tmp_path / "episode_00000.zarr")), 1)
    assert shares == {"cam": 0.5, "task": 0.25, "state": 0.125, "template": 0.0, "actions": 0.125}
    assert deviation == missing == 0


def test_rows_that_do_not_sum_to_one_are_told(tmp_path, monkeypatch, capsys):
    path = planted(tmp_path / "episode_00000.zarr", broken=True)
    facts = describe_episode(open_episode(path))
    assert facts["rows_sum_to_one"] is False
    assert facts["row_sum_max_deviation"] == pytest.approx(0.1, abs=0.001)
    _, out, _ = run_cli(monkeypatch, capsys, "inspect", path)
    assert "ROWS DO NOT SUM TO 1" in out


def test_facts_are_json_and_complete(tmp_path, monkeypatch, capsys):
    path = planted(tmp_path / "episode_00000.zarr")
    status, out, _ = run_cli(monkeypatch, capsys, "inspect", path, "--json")
    assert status == 0
    facts = json.loads(out)
    assert facts["saved"] == {
        "layer": [16, 17],
        "all_layer": [0, 1, 2, 3],
        "prefix_layer": [17],
        "denoise_step": [0, 4, 9],
        "head": [1, 5],
        "vision_layer": [3, 11],
    }
    assert facts["arrays"]["suffix_attention"]["shape"] == [4, 3, 2, 2, 5, 14]
    assert [(s["name"], s["tokens"]) for s in facts["segments"]] == [
        ("cam", 4),
        ("language", 5),
        ("action", 5),
    ]
    assert facts["compression_ratio"] > 0
    assert facts["attributes"]["seed"] == 3


def test_interrupted_store_is_said_to_be_incomplete(tmp_path, monkeypatch, capsys):
    path = tmp_path / "episode_00000.zarr"
    write_episode(path, 2, complete=False, interrupted_by="KeyboardInterrupt")
    _, out, _ = run_cli(monkeypatch, capsys, "inspect", path)
    text = " ".join(out.split())
    assert "INCOMPLETE (KeyboardInterrupt): it holds the 2 inferences committed before" in text


def test_a_store_without_inferences_can_be_inspected(tmp_path):
    make_writer(tmp_path / "episode_00000.zarr")
    facts = describe_episode(open_episode(tmp_path / "episode_00000.zarr"))
    assert facts["n_inferences"] == 0
    assert facts["rows_sum_to_one"] is None


def test_run_with_a_damaged_store(tmp_path, monkeypatch, capsys):
    planted(tmp_path / "attention" / "a_0" / "episode_00000.zarr")
    broken = tmp_path / "attention" / "a_0" / "episode_00001.zarr"
    broken.mkdir()
    facts = describe_run(open_run(tmp_path))
    assert (facts["n_episodes"], facts["n_success"], len(facts["damaged"])) == (1, 1, 1)
    _, out, _ = run_cli(monkeypatch, capsys, "inspect", tmp_path)
    assert "1 episodes, 1 complete, 1 successful" in " ".join(out.split())
    assert "damaged:" in out


def test_each_store_of_a_run_is_opened_once(tmp_path, monkeypatch):
    folder = tmp_path / "attention" / "a_0"
    for index in range(2):
        planted(folder / f"episode_{index:05d}.zarr")
    (folder / "episode_00002.zarr").mkdir()
    run, opened = open_run(tmp_path), []

    def counted(path):
        opened.append(path)
        return open_episode(path)

    monkeypatch.setattr(runs, "open_episode", counted)
    facts = describe_run(run)
    assert (facts["n_episodes"], len(facts["damaged"]), facts["random_weights"]) == (2, 1, False)
    assert sorted(opened) == sorted(run.stores)


@pytest.mark.parametrize("name", ["none.zarr", "maps.pt", "."])
def test_what_is_no_episode_is_one_line(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "maps.pt").write_bytes(b"")
    status, out, error = run_cli(monkeypatch, capsys, "inspect", tmp_path / name)
    assert (status, out) == (1, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_damaged_chunk_is_one_line(tmp_path, monkeypatch, capsys):
    path = planted(tmp_path / "episode_00000.zarr")
    shard = next(p for p in (path / "suffix_attention_mean" / "c").rglob("*") if p.is_file())
    data = bytearray(shard.read_bytes())
    data[10] ^= 0xFF
    shard.write_bytes(bytes(data))
    status, _, error = run_cli(monkeypatch, capsys, "inspect", path)
    assert status == 1
    assert "cannot be read" in error
    assert error.count("\n") == 1


def test_script_is_the_command(tmp_path):
    path = planted(tmp_path / "episode_00000.zarr")
    script = Path(__file__).parent.parent / "scripts" / "inspect_attention.py"
    command = [sys.executable, str(script), str(path), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["n_inferences"] == 4


def test_a_policy_whose_config_names_no_dtype(tmp_path, monkeypatch, capsys):
    """SmolVLA's: what is said is the dtype in which its attention was applied."""
    path = tmp_path / "episode_00000.zarr"
    policy = {"type": "smolvla", "dtype": None, "n_layers": 4}
    writer = make_writer(path, policy=policy, attention_dtype="bfloat16")
    writer.append_inference(inference_rows(np.random.default_rng(0), 0))
    writer.close(complete=True)
    _, out, _ = run_cli(monkeypatch, capsys, "inspect", path)
    (line,) = [line for line in out.splitlines() if line.startswith("policy")]
    assert "smolvla, attention in bfloat16, 4 layers" in line
