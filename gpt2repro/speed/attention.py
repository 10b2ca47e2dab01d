"""The kernel behind torch's attention: which one it takes, and which it should not."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import attention
from torch.nn.attention import SDPBackend

# What a recipe calls torch's attention with a kernel that its authors' package brings.
IN_TORCH = {"sdpa_flash_3": "FA3", "sdpa_flash_4": "FA4"}
GENERATIONS = {"sdpa_flash_3": (9,), "sdpa_flash_4": (9, 10)}  # of GPUs that have it: 9 is Hopper


def activate(implementation: str) -> str:
    """transformers' name for an implementation, whose kernel torch takes from now on.

    Raises:
        ImportError: the kernel's package is missing, or not as torch needs it.
    """
    if implementation not in IN_TORCH:
        return implementation
    try:
        attention.activate_flash_attention_impl(IN_TORCH[implementation])
    except RuntimeError as error:  # the package is there, and is another version's
        raise ImportError(str(error)) from None
    torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper torch would prefer it
    return "sdpa"


def runs_on(implementation: str, device: torch.device) -> bool:
    """Whether the device may have the kernel; torch says so at its first use."""
    if implementation not in GENERATIONS:
        return True
    is_cuda = device.type == "cuda" and torch.version.hip is None
    return is_cuda and torch.cuda.get_device_capability(device)[0] in GENERATIONS[implementation]


def kernel_taken(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> str:
    """What torch's attention takes in training for causal (B, H, T, D): flash, cudnn, math ..."""
    query = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
    choice = torch._fused_sdp_choice(query, query, query, None, 0.0, True)
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


@contextmanager
def for_generation() -> Iterator[None]:
    """Without cuDNN's kernel, which torch prefers on Hopper from 2.11 on.

    It is good for training, but prepares every new length of the keys for 23 to 37 ms, and in
    generation every token is a new length.
    """
    preferred = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(preferred)
