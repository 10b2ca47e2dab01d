"""Main memory for training on CPUs: what the process has, it keeps.

The C library gives every large block back to the kernel as soon as it is freed, and the kernel
zeroes each page when it is touched anew. A training step frees and allocates the same large tensors
over and over: for the 124M model that is half a million page faults and a fifth of the time. The
price is memory lost to gaps between tensors, about a tenth.
"""

import ctypes
import platform

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let malloc reuse large blocks instead of returning them; False where there is no glibc.

    The same as starting the process with MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=-1.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
