"""What cameras showed at a replay's frames, read by another thread ahead of when it is filmed.

Knows footage and what a policy's adapter makes of pictures. Asks no policy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from lerobot_attn.errors import CaptureError, LerobotAttnError, first_line
from lerobot_attn.recording.episode import Views
from lerobot_attn.recording.replay_ask import Question

FilmedFrames = list[Views | None]  # one for each frame; None where its pictures cannot be had

_AHEAD_BYTES = 128_000_000


class ViewsAhead:
    """The pictures of a batch's questions, in their order, read ahead as far as memory allows.

    Args:
        reader: the one thread that reads.
        read: reads the pictures of a question's frames; gets what is at hand of the first one, or None.
        questions: the batch.
        first: what the cameras showed at the first frame of each question: camera → picture. It is used while
            memory allows, and read anew beyond that.
        frame_bytes: memory that the pictures of one frame take.
    """

    def __init__(
        self,
        reader: ThreadPoolExecutor,
        read: Callable[[Question, Mapping[str, Tensor] | None], FilmedFrames],
        questions: Sequence[Question],
        first: Sequence[Mapping[str, Tensor]],
        frame_bytes: int,
    ):
        self._reader = reader
        self._read = read
        self._frame_bytes = frame_bytes
        self._waiting = deque(questions)
        self._running: deque[tuple[Future[FilmedFrames], int]] = deque()
        self._bytes = 0
        self._read_ahead(first)

    def take(self) -> FilmedFrames:
        """Return the pictures of the next question's frames, as soon as they are there."""
        future, n_bytes = self._running.popleft()
        found = future.result()
        self._bytes -= n_bytes
        self._read_ahead()
        return found

    def _read_ahead(self, first: Sequence[Mapping[str, Tensor]] = ()) -> None:
        at_hand = deque(first)
        while self._waiting:
            question = self._waiting[0]
            n_bytes = self._frame_bytes * (question.stop - question.frame)
            if self._running and self._bytes + n_bytes > _AHEAD_BYTES:
                return
            self._waiting.popleft()
            self._bytes += n_bytes
            seen = at_hand.popleft() if at_hand else None
            self._running.append((self._reader.submit(self._read, question, seen), n_bytes))


def computes_alone() -> None:
    """Let what this thread computes with tensors be computed by it alone, for as long as it lives.

    Otherwise it brings threads of its own. Once there are more of these than cores, those of the policy sleep
    after each of its operations instead of waiting awake for the next, which comes in microseconds.
    """
    torch.get_num_threads()  # torch sets a thread's number when it is first asked: that must be over
    threadpool_limits(1, user_api="openmp")


@contextmanager
def reading(index: int, frame: int) -> Iterator[None]:
    """Say which frame of which episode cannot be read, whatever the reader raises.

    Raises:
        CaptureError: it cannot.
    """
    try:
        yield
    except LerobotAttnError:
        raise
    except Exception as error:  # decoders and readers raise many kinds
        raise CaptureError(
            f"frame {frame} of episode {index} cannot be read: {first_line(error)}; mend it, or leave the "
            "episode out (episodes)"
        ) from error
