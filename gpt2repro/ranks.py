"""The few things that processes of one run say to each other; all work for a single process too."""

from typing import Any

import torch
import torch.distributed as dist

from gpt2repro import UserError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    message = [value]
    if world_size() > 1:
        dist.broadcast_object_list(message, src=0)
    return message[0]


def agree_on(problem: str | None) -> None:
    """Raise rank 0's `problem` on every rank, so that none waits for one that has left."""
    if problem := broadcast(problem):
        raise UserError(problem)


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over ranks, in place; integers wrap around modulo 2**64."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if `flag` is true on one."""
    return bool(reduce_sum(torch.tensor(int(flag), device=device)).item())
