"""Memory that networks free and take on a CPU.

glibc gives each freed block above 32 MB back to the system at once. A training step frees and takes hundreds of such
blocks, and the system fills each page with zeros again (docs/speed.md).
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: glibc's parameters of mallopt (malloc.h), and the values they have if nobody sets them.
_TRIM_THRESHOLD, _TRIM_THRESHOLD_DEFAULT = -1, 128 * 1024
_MMAP_MAX, _MMAP_MAX_DEFAULT = -4, 65536
#: Whether the process keeps freed memory now.
_inside = False


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is one that can be told."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within it, memory that is freed stays with the process; at its end all of it goes back to the system.

    One within another changes nothing. Nor does it where the C library is not glibc. Memory on a GPU is kept by PyTorch
    itself.
    """
    global _inside
    library = _glibc()
    if library is None or _inside:
        yield
        return
    _inside = True
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)  # read as the largest size
    try:
        yield
    finally:
        _inside = False
        library.mallopt(_MMAP_MAX, _MMAP_MAX_DEFAULT)
        library.mallopt(_TRIM_THRESHOLD, _TRIM_THRESHOLD_DEFAULT)
        library.malloc_trim(0)


def return_freed_memory() -> None:
    """Free what only cycles hold, and give the system what glibc keeps: it would hide what is taken next."""
    gc.collect()
    if (library := _glibc()) is not None:
        library.malloc_trim(0)
