"""Main memory for training on CPUs: what a step has used, the next one finds.

The C library gives every large block back to the kernel as soon as it is freed, and the kernel
zeroes each page when it is touched anew. A training step frees and allocates the same large tensors
over and over: for the 124M model that is half a million page faults and a fifth of the time. So
from the second step on freed memory is kept. Blocks beyond 32 MiB are still given back: a handful
in a step, the gaps that they leave when they are kept cost a tenth of the memory and more.

Not from the first step on: what its compilation leaves behind would lie between the large tensors
for good, and break up the room that they leave. Until then they are allocated apart from it.
Measured for a 124M that was just compiled, forward and backward, twice each: at its peak 1,684 and
1,689 MiB, instead of 1,712 and 1,752.
"""

import ctypes
import gc
import platform

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 32 * 2**20  # as much as glibc allows
SMALLEST_APART = 128 * 2**10  # where glibc begins, to raise it by itself unless it is set


def return_freed_memory() -> bool:
    """Let malloc hold large blocks apart and return them when freed; False without glibc.

    The same as starting the process with MALLOC_MMAP_THRESHOLD_=131072.
    """
    libc = glibc()
    return libc is not None and bool(libc.mallopt(M_MMAP_THRESHOLD, SMALLEST_APART))


def keep_freed_memory() -> bool:
    """Return what is free by now, and let malloc reuse what is freed later; False without glibc."""
    libc = glibc()
    if libc is None:
        return False
    gc.collect()
    libc.malloc_trim(ctypes.c_size_t(0))
    kept = libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and libc.mallopt(M_TRIM_THRESHOLD, -1)
    return bool(kept)


def glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
