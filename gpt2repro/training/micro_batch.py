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
    recovers: bool = True,
) -> int:
    """The largest candidate with which training fits on every rank.

    They are tried from the smallest on until one fails: all trials take as long as a few of the
    last. Nothing is concluded from small ones, whose height gradients or logits may decide.

    Args:
        candidates: sizes to choose from.
        forward_backward: computes gradients as a step with micro-batches of that many rows does,
            and drops them, also when it runs out of memory.
        reserve_bytes: what is allocated later and stays, such as the optimizer's state.
        recovers: whether ranks can go on after a trial that ran out of memory. If not, a
            size is not tried that is too large by the line through the last two.

    Raises:
        UserError: not even the smallest fits.
    """
    candidates = sorted(candidates)
    if device.type != "cuda":
        return max(size for size in candidates if size <= max(CPU_ROWS, candidates[0]))
    fitting: list[tuple[int, float]] = []  # rows, and the bytes that are left on the fullest rank
    for size in candidates:
        if not recovers and len(fitting) > 1 and _at(size, *fitting[-2:]) < 0:
            break
        left = min(gather(_bytes_left(forward_backward, size, device, reserve_bytes)))
        if left < 0:
            break
        fitting.append((size, left))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)  # what the run reports later is its own
    if not fitting:
        raise UserError(
            "micro_batch_size auto: not even one row fits the device; set gradient_checkpointing, "
            "a shorter sequence_length or a smaller model, or shard it (launch/fsdp2.yaml)"
        )
    return fitting[-1][0]


def _bytes_left(
    forward_backward: Callable[[int], None], size: int, device: torch.device, reserve_bytes: int
) -> float:
    """What the height of a batch of `size` rows leaves, HEADROOM kept; -inf if it does not fit.

    The reserve is held meanwhile: a trial that runs shows that training does.
    """
    try:
        reserve = torch.empty(reserve_bytes, dtype=torch.uint8, device=device)
        allocated = torch.cuda.memory_allocated(device)
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - allocated
        torch.cuda.reset_peak_memory_stats(device)
        forward_backward(size)
        del reserve
    except torch.OutOfMemoryError:
        return -math.inf
    return allocated + HEADROOM * free - torch.cuda.max_memory_allocated(device)


def _at(size: int, first: tuple[int, float], second: tuple[int, float]) -> float:
    """The height at `size` of the line through two points."""
    (x1, y1), (x2, y2) = first, second
    return y2 + (size - x2) * (y2 - y1) / (x2 - x1)
