"""A disk slower than the policy: memory stays bounded, the policy waits, nothing is lost.

The disk is slowed where a chunk's bytes go into their file, inside a process that records for real: each
write takes as long as a disk of the given speed would take, and holds the thread that writes. (A file system
that is slow itself would need FUSE and root, which not every machine has.)
"""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path

import allocator
import numpy as np
import pytest
import scripted
import torch
from forked import Forked
from test_recording import evaluate, make_policy, scripted_adapter  # noqa: F401

from lerobot_attn.store import writer
from lerobot_attn.store.reader import open_episode

pytestmark = pytest.mark.alone

QUEUE_MB = 8
# Beside the queue: the inference in the policy's hands, three copies of the one that is being written (its
# own maps, their compressed chunks, the shard), and some room for allocators and the encoder.
FIXED_MB = 24
N_HEADS = 32  # an inference has 2.3 MB
N_INFERENCES = 45
DISK_MB_PER_S = 10


def slow_down_disk(mb_per_s):
    """Make this process's stores take so many bytes a second; return a list of the sizes written."""
    replace_bytes, written = writer.replace_bytes, []

    def slowly(parts):
        for part in parts:
            written.append(len(part))
            time.sleep(len(part) / (mb_per_s * 1e6))
            yield part

    writer.replace_bytes = lambda path, parts: replace_bytes(path, slowly(parts))
    return written


def memory_mb(name):
    """Return a size of this process as Linux reports it: VmRSS, now, or VmHWM, at most."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1000


def record_and_measure(folder, tell, mb_per_s):
    """Record an episode of `N_INFERENCES` inferences; tell memory and times."""
    logging.basicConfig(level=logging.INFO, force=True)
    allocator.give_back()
    torch.set_num_threads(1)  # so that the thread's own time is the policy's
    scripted.HEADS = N_HEADS
    evaluate(folder / "warm_up", {0: scripted.make_envs((3,))}, policy=make_policy(), layers="all")
    written = slow_down_disk(mb_per_s) if mb_per_s else []
    before_mb = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    started, busy_before = time.perf_counter(), time.thread_time()
    info, _ = evaluate(
        folder,
        {0: scripted.make_envs((N_INFERENCES,))},
        policy=make_policy(n_action_steps=1),
        layers="all",
        queue_mb=QUEUE_MB,
    )
    result = {
        "seconds": time.perf_counter() - started,
        "busy_s": time.thread_time() - busy_before,
        "growth_mb": memory_mb("VmHWM") - before_mb,
        "written_mb": sum(written) / 1e6,
        "attention": info["per_task"][0]["metrics"]["attention"],
    }
    tell(f"measured {json.dumps(result)}")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What an undisturbed and a slowed-down recording say of themselves: (result, episode, log) of each."""
    found = []
    for name, mb_per_s in (("fast", None), ("slow", DISK_MB_PER_S)):
        folder = tmp_path_factory.mktemp(name)
        with Forked(record_and_measure, folder, mb_per_s=mb_per_s) as process:
            result = json.loads(process.wait_for("measured"))
            assert process.wait() == 0
            episode = open_episode(folder / "attention" / "group_0" / "episode_00000.zarr")
            found.append((result, episode, process.log))
    return found


def test_memory_stays_within_the_queue_and_a_fixed_part(measured):
    (fast, _, _), (slow, episode, _) = measured
    assert episode.raw_bytes() > 10 * QUEUE_MB * 1e6
    assert slow["growth_mb"] <= QUEUE_MB + FIXED_MB
    assert slow["growth_mb"] - fast["growth_mb"] <= QUEUE_MB + FIXED_MB


def test_the_policy_waits_and_nothing_is_dropped(measured, monkeypatch):
    (_, undisturbed, _), (slow, episode, _) = measured
    assert slow["written_mb"] > 0.9 * episode.stored_bytes() / 1e6, "the disk was not slowed down"
    assert slow["seconds"] >= slow["written_mb"] / DISK_MB_PER_S
    assert episode.is_complete
    assert (episode.n_inferences, episode.n_frames) == (N_INFERENCES, N_INFERENCES)
    for name, stored in episode.dataset.load().items():
        np.testing.assert_array_equal(stored, undisturbed.dataset[name], err_msg=name)
    monkeypatch.setattr(scripted, "HEADS", N_HEADS)
    last = scripted.attention_of(N_INFERENCES - 1, 2, 2, 1)[0].numpy().astype(np.float16)
    stored = episode.dataset.suffix_attention.sel(denoise_step=2, layer=2)[N_INFERENCES - 1]
    np.testing.assert_array_equal(stored, last)


def test_the_wait_is_reported(measured):
    _, (slow, _, log) = measured
    waited_s = slow["attention"]["waited_for_writer_s"]
    idle_s = slow["seconds"] - slow["busy_s"]  # also waits for a processor, on a busy machine
    assert 0.5 * idle_s <= waited_s <= idle_s
    said = re.findall(r"waited ([0-9.]+) s for the writer", log)[-1]  # before it, that of the warm-up
    assert float(said) == pytest.approx(waited_s, abs=0.051)  # rounded to 0.1 s, the other to 0.001 s
