"""The background writer: order, bounded memory, failures that stay with their episode."""

import os
import sys
import threading
import time
import weakref

import pytest

from lerobot_attn.recording import background
from lerobot_attn.recording.background import BackgroundWriter


@pytest.fixture
def writer():
    writer = BackgroundWriter(max_bytes=100)
    yield writer
    writer.close()


def test_jobs_run_in_order(writer):
    done = []
    for index in range(50):
        writer.submit("a", lambda index=index: done.append(index), 10)
    writer.flush()
    assert done == list(range(50))


def test_submit_waits_while_the_queue_is_full(writer):
    gate = threading.Event()
    writer.submit("a", gate.wait, 60)
    threading.Timer(0.2, gate.set).start()
    started = time.perf_counter()
    writer.submit("a", lambda: None, 60)
    assert time.perf_counter() - started > 0.15
    assert writer.waited_s > 0.15


def test_a_job_larger_than_the_queue_goes_through_alone(writer):
    done = []
    writer.submit("a", lambda: done.append(1), 1000)
    writer.submit("a", lambda: done.append(2), 1000)
    writer.flush()
    assert done == [1, 2]


def test_a_job_without_bytes_never_waits(writer):
    gate = threading.Event()
    writer.submit("a", gate.wait, 1000)
    timer = threading.Timer(5, gate.set)
    timer.start()
    writer.submit("a", lambda: None)
    timer.cancel()
    gate.set()
    assert writer.waited_s == 0


def test_shared_arrays_are_counted_until_their_last_job_is_done(writer):
    first, last, done = threading.Event(), threading.Event(), []
    writer.submit_shared({"a": first.wait, "b": last.wait}, 90)
    thread = threading.Thread(target=lambda: (writer.submit("c", lambda: None, 20), done.append("c")))
    thread.start()
    first.set()
    thread.join(0.2)
    assert not done, "room was given back while the arrays were in use"
    last.set()
    thread.join()
    assert done == ["c"]


def test_a_failure_stops_its_own_key_only(writer):
    done = []

    def fail():
        raise OSError("disk full")

    writer.submit("a", fail)
    writer.submit("a", lambda: done.append("a"))
    writer.submit("a", lambda: done.append("a cleanup"), always=True)
    writer.submit("b", lambda: done.append("b"))
    writer.flush()
    assert done == ["a cleanup", "b"]
    assert isinstance(writer.failure("a"), OSError)
    assert writer.failure("b") is None


class Array:
    """Something that a failing job holds."""


def test_a_failure_does_not_keep_what_its_job_held(writer):
    held = []

    def fail():
        array = Array()
        held.append(weakref.ref(array))
        try:
            raise OSError("disk full")
        except OSError as error:
            raise RuntimeError("not written") from error

    writer.submit("a", fail)
    writer.flush()
    assert str(writer.failure("a")) == "not written"
    assert held[0]() is None


def test_what_large_jobs_freed_goes_back_to_the_system(monkeypatch):
    trimmed = []
    monkeypatch.setattr(background, "_trim", lambda: trimmed.append(len(done)))
    writer, done = BackgroundWriter(100_000_000), []
    for n_bytes in (10, 20_000_000, 10, 30_000_000):
        writer.submit("a", lambda n_bytes=n_bytes: done.append(n_bytes), n_bytes)
        writer.flush()
    assert trimmed == [2, 4]
    writer.close()


def test_while_more_is_queued_it_goes_back_less_often(monkeypatch):
    trimmed, gate = [], threading.Event()
    monkeypatch.setattr(background, "_trim", lambda: trimmed.append(len(done)))
    writer, done = BackgroundWriter(1_000_000_000), []
    writer.submit("a", gate.wait)
    for _ in range(6):
        writer.submit("a", lambda: done.append("20 MB"), 20_000_000)
    gate.set()
    writer.close()
    assert trimmed == [4, 6], "after 64 MB, and when nothing is left"


def test_a_writer_that_looks_for_its_jobs_is_not_woken(monkeypatch):
    writer, done = BackgroundWriter(100, look_every_s=0.01), threading.Event()
    woken = []
    monkeypatch.setattr(writer._condition, "notify_all", lambda: woken.append(threading.current_thread()))
    writer.submit("a", done.set)
    assert done.wait(30)
    assert threading.current_thread() not in woken
    monkeypatch.undo()
    writer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
@pytest.mark.parametrize("waits", ["for room", "for all", "for the end"])
def test_a_writer_yields_only_until_somebody_waits_for_it(waits):
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    writer, found, done = BackgroundWriter(100, niceness=5), [], []
    began, gate = threading.Event(), threading.Event()

    def note():
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def noted_at_the_gate():
        note()
        began.set()
        gate.wait()
        done.append("first")

    writer.submit("a", noted_at_the_gate, 60)
    writer.submit("a", lambda: (note(), done.append("second")))
    ways = {
        "for room": lambda: writer.submit("a", note, 60),
        "for all": lambda: writer.flush(),
        "for the end": lambda: writer.close(),
    }
    began.wait()
    waiting = threading.Thread(target=ways[waits])
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    assert not done, "one job at a time"
    gate.set()
    waiting.join()
    writer.close()
    assert done == ["first", "second"]
    assert found[:2] == [min(19, usual + 5), usual]


def test_dropping_leaves_the_running_job_and_the_cleaning_up(writer):
    started, gate, done = threading.Event(), threading.Event(), []
    writer.submit("a", lambda: (started.set(), gate.wait(), done.append("running")))
    writer.submit("a", lambda: done.append("queued"))
    writer.submit("a", lambda: done.append("clean up"), always=True)
    started.wait()
    error = RuntimeError("dropped")
    writer.drop(error)
    assert not writer.flush(0)
    gate.set()
    assert writer.flush()
    assert done == ["running", "clean up"]
    assert writer.failure("a") is error


def test_a_failure_from_outside_may_leave_what_is_queued(writer):
    started, gate, done = threading.Event(), threading.Event(), []
    writer.submit("a", lambda: (started.set(), gate.wait()))
    writer.submit("a", lambda: done.append("queued before"))
    started.wait()
    error = RuntimeError("what comes now cannot be had")
    writer.fail("a", error, keep_queued=True)
    writer.submit("a", lambda: done.append("queued after"))
    writer.submit("a", lambda: done.append("clean up"), always=True)
    gate.set()
    writer.flush()
    assert done == ["queued before", "clean up"]
    assert writer.failure("a") is error


@pytest.mark.parametrize("how", ["a job fails", "dropped"])
def test_what_was_left_is_dropped_all_the_same(writer, how):
    started, gate, done = threading.Event(), threading.Event(), []

    def fail():
        started.set()
        gate.wait()
        if how == "a job fails":
            raise OSError("disk full")

    writer.submit("a", fail)
    writer.submit("a", lambda: done.append("queued before"))
    started.wait()
    writer.fail("a", RuntimeError("outside"), keep_queued=True)
    if how == "dropped":
        writer.drop(RuntimeError("Ctrl-C"))
    gate.set()
    writer.flush()
    assert done == []


def test_waiting_for_the_end_is_counted(writer):
    writer.submit("a", lambda: time.sleep(0.1))
    writer.flush()
    assert writer.waited_s >= 0.05


def test_close_does_not_wait_longer_than_told():
    writer = BackgroundWriter(100)
    gate = threading.Event()
    writer.submit("a", gate.wait)
    writer.close(0.01)
    assert not writer.flush(0)
    gate.set()
    assert writer.flush()


def test_close_finishes_what_is_queued():
    writer = BackgroundWriter(100)
    done = []
    for index in range(5):
        writer.submit("a", lambda index=index: (time.sleep(0.01), done.append(index)))
    writer.close()
    assert done == list(range(5))
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit("a", lambda: None)
