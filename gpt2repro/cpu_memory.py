"""Main memory for training on CPUs: what a step has used, the next one finds.

The C library gives every large block back to the kernel as soon as it is freed, and the kernel
zeroes each page when it is touched anew. A training step frees and allocates the same large tensors
over and over: for the 124M model that is half a million page faults and a fifth of the time. Blocks
beyond 32 MiB are still given back: a handful in a step, the gaps that they leave when they are kept
cost a tenth of the memory and more.

Kept memory holds gaps, and what a compiler leaves behind lies all over it. So what is free is given
back once, after the first step. That costs the second step its page faults; the peak of a 124M that
was just compiled fell by 95 to 145 MiB, of 1,850 for forward and backward, of 3,000 with AdamW.
"""

import ctypes
import gc
import platform

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 32 * 2**20  # as much as glibc allows


def keep_freed_memory() -> bool:
    """Let malloc reuse blocks instead of returning them; False where there is no glibc.

    The same as starting the process with MALLOC_MMAP_THRESHOLD_=33554432 and
    MALLOC_TRIM_THRESHOLD_=-1.
    """
    libc = glibc()
    if libc is None:
        return False
    kept = libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and libc.mallopt(M_TRIM_THRESHOLD, -1)
    return bool(kept)


def release_freed_memory() -> bool:
    """Give what lies free back to the kernel; whether there was any, False without glibc."""
    libc = glibc()
    if libc is None:
        return False
    gc.collect()
    return bool(libc.malloc_trim(ctypes.c_size_t(0)))


def glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
