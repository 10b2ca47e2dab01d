"""Main memory for training on CPUs: what the process has, it keeps.

The C library gives every large block back to the kernel as soon as it is freed, and the kernel
zeroes each page when it is touched anew. A training step frees and allocates the same large tensors
over and over: for the 124M model that is half a million page faults, a quarter to a third of the
time of a step (benchmarks/train_step.py).
"""

import ctypes
import platform

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
GROW_BY_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let malloc reuse large blocks instead of returning them; False where there is no glibc.

    The same as starting the process with MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=-1.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: GROW_BY_BYTES}
    return [mallopt(parameter, value) for parameter, value in settings.items()] == [1, 1, 1]
