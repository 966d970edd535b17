"""The background writer: order, bounded memory, failures that stay with their episode."""

import threading
import time

import pytest

from lerobot_attn.store.background import BackgroundWriter


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


def test_close_finishes_what_is_queued():
    writer = BackgroundWriter(100)
    done = []
    for index in range(5):
        writer.submit("a", lambda index=index: (time.sleep(0.01), done.append(index)))
    writer.close()
    assert done == list(range(5))
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit("a", lambda: None)
