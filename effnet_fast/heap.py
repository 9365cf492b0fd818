"""Keep freed memory in the process, so that the next training step on the CPU reuses it.

glibc maps every tensor of more than 32 MiB anew and unmaps it when it is freed, and the kernel fills the pages with
zeros each time. `keep_freed_memory` turns both off: large tensors come from the heap, and the heap does not shrink.
The process then holds its peak of memory until it ends.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

# Parameters of mallopt (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_SETTINGS = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}  # -1: never trim; the heap grows by 64 MiB
_OF_THE_USER = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Set glibc's malloc to keep freed memory; return whether it did.

    It changes nothing with another C library, or if the user has set malloc by _OF_THE_USER or GLIBC_TUNABLES.
    """
    is_set = any(name in environment for name in _OF_THE_USER) or "malloc" in environment.get("GLIBC_TUNABLES", "")
    if is_set or sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all(libc.mallopt(parameter, value) for parameter, value in _SETTINGS.items())
