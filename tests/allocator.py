"""Whether the C library gives the memory of large arrays back at once, or keeps it for the next ones.

A map of attention of the demo policy has 32 MB. glibc asks the kernel for each of them anew, who clears it
page by page, so an inference of two takes three times as long as with memory that is kept. Knows no test.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_KEPT_BYTES, _GIVEN_BACK_BYTES = 2**30, 2**17  # the latter is where glibc begins
_MAPPED_AT_MOST = 65536  # arrays, as glibc has it


def keep() -> None:
    """Keep what is freed, for as long as this process and those that are forked from it run."""
    _set(_KEPT_BYTES, 2**31 - 1)


def give_back() -> None:
    """Give back what is freed, so that the resident memory is what is in use; also what was kept so far."""
    _set(_GIVEN_BACK_BYTES, _GIVEN_BACK_BYTES)
    if library := _glibc():
        library.malloc_trim(0)


def _set(mapped_from_bytes: int, trimmed_from_bytes: int) -> None:
    library = _glibc()
    if library is None:
        return
    # Some releases take no threshold above 32 MB; then no array is mapped at all.
    is_set = library.mallopt(_MMAP_THRESHOLD, mapped_from_bytes)
    library.mallopt(_MMAP_MAX, _MAPPED_AT_MOST if is_set else 0)
    library.mallopt(_TRIM_THRESHOLD, trimmed_from_bytes)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
