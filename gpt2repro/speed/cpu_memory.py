"""Main memory for training on CPUs: what a step has used, the next one finds.

The C library gives every large block back to the kernel as soon as it is freed, and the kernel
zeroes each page when it is touched anew. A training step frees and allocates the same large tensors
over and over: for the 124M model that is half a million page faults and a fifth of the time. So
from the second step on freed memory is kept. Blocks beyond 32 MiB are still given back: a handful
in a step, the gaps that they leave when they are kept cost a tenth of the memory and more.
"""

import ctypes
import gc
import platform

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 32 * 2**20  # as much as glibc allows


def keep_freed_memory() -> bool:
    """Return what is free by now, and let malloc reuse what is freed later; False without glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    gc.collect()
    libc.malloc_trim(ctypes.c_size_t(0))
    kept = libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and libc.mallopt(M_TRIM_THRESHOLD, -1)
    return bool(kept)
