"""`micro_batch_size: auto`: the largest micro-batch that fits the device."""

import math
from collections.abc import Callable

import torch

from gpt2repro import UserError
from gpt2repro.system.ranks import gather

CPU_ROWS = 16  # on a CPU memory is rarely the limit, and larger batches gain nothing
HEADROOM = 0.90  # of the memory that is free, for fragmentation and communication buffers


def largest_that_fits(
    candidates: list[int],
    forward_backward: Callable[[int], None],
    *,
    device: torch.device,
    reserve_bytes: int,
) -> int:
    """The largest candidate whose forward and backward pass fits on every rank.

    Memory grows linearly with the batch, so two small batches predict the rest; the prediction is
    then tried, and the next smaller one taken while it fails. Every rank does the same.

    Args:
        candidates: sizes to choose from.
        forward_backward: runs a batch of that many rows and drops its gradients.
        reserve_bytes: what will be allocated later, such as the optimizer's state.

    Raises:
        UserError: not even one row fits.
    """
    candidates = sorted(candidates)
    if device.type != "cuda":
        return max(size for size in candidates if size <= max(CPU_ROWS, candidates[0]))
    small, double = (_peak_bytes(forward_backward, size, device) for size in (1, 2))
    if math.inf in gather(small):
        raise UserError(
            "micro_batch_size auto: not even one row fits the device; set gradient_checkpointing, "
            "a shorter sequence_length or a smaller model, or shard it (launch/fsdp2.yaml)"
        )
    per_row = double - small
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    budget = HEADROOM * (free - reserve_bytes) + torch.cuda.memory_allocated(device)
    fitting = [size for size in candidates if small + (size - 1) * per_row <= budget]
    size = min(gather(fitting[-1] if fitting else candidates[0]))
    while not all(gather(_runs(forward_backward, size))) and size > candidates[0]:
        size = candidates[candidates.index(size) - 1]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)  # what the run reports later is its own
    return size


def _peak_bytes(forward_backward: Callable[[int], None], size: int, device: torch.device) -> float:
    """Bytes in use at the height of a batch of `size` rows; infinite if it does not fit."""
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device) if _runs(forward_backward, size) else math.inf


def _runs(forward_backward: Callable[[int], None], size: int) -> bool:
    try:
        forward_backward(size)
        return True
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
