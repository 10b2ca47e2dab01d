"""The few things that processes of one run say to each other; all work for a single process too."""

import contextlib
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gpt2repro import UserError

T = TypeVar("T")

SETTLING_SECONDS = 0.5

# Where flags, counts and objects go: None is the group of all ranks, with its device's backend.
_hosts: dist.ProcessGroup | None = None


def talk_by_hosts(timeout_seconds: float) -> None:
    """Let flags, counts and objects go over gloo, beside NCCL, which keeps the tensors.

    NCCL would queue them behind the work of the GPUs, and who reads them would wait for that: so
    much less could a process prepare ahead. Every rank must call.
    """
    global _hosts
    if world_size() > 1:
        _hosts = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    message = [value]
    if world_size() > 1:
        dist.broadcast_object_list(message, src=0, group=_hosts)
    return message[0]


def agree_on(problem: str | None) -> None:
    """Raise rank 0's `problem` on every rank, so that none waits for one that has left."""
    if problem := broadcast(problem):
        raise UserError(problem)


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=_hosts)
    return values


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over ranks, in place; integers wrap around modulo 2**64."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def share(compute: Callable[[torch.Tensor], torch.Tensor], items: torch.Tensor) -> torch.Tensor:
    """`compute(items)`, of which each rank computes a part and sends it to all.

    For what treats every item (the first dimension) by itself, the same `items` on every rank.
    """
    if world_size() == 1:
        return compute(items)
    each = -(-len(items) // world_size())
    missing = items.new_zeros(each * world_size() - len(items), *items.shape[1:])
    mine = compute(torch.cat((items, missing)).split(each)[rank()])
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine.contiguous())
    return torch.cat(parts)[: len(items)]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, gathered from all ranks if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Let every parameter be the optimizer's own again: this rank's part, in its own type.

    FSDP2 keeps what it gathered for the outermost ones, in the type of the products, until a
    backward pass. After an evaluation there is none.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def all_ranks(flag: bool) -> bool:
    """True on every rank if `flag` is true on all."""
    return not any_rank(not flag)


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on one."""
    return sum_uint64(int(flag)) > 0


def on_rank_0(call: Callable[[], T]) -> T:
    """What `call()` returns on rank 0, on every rank; its `UserError` is everybody's too."""
    value, problem = None, None
    if rank() == 0:
        try:
            value = call()
        except UserError as error:
            problem = str(error)
    agree_on(problem)
    return broadcast(value)


def together(call: Callable[[], T]) -> T:
    """`call()`, on every rank; where it fails on one, it fails on all.

    The failing rank has its own error, the others a `UserError` that quotes it.
    """
    value, error = None, None
    try:
        value = call()
    except Exception as failed:
        error = failed
    if any_rank(error is not None):
        problems = gather(None if error is None else f"rank {rank()}: {error}")
        raise error or UserError(next(problem for problem in problems if problem))
    return cast(T, value)


def sum_uint64(number: int) -> int:
    """The sum of every rank's 64-bit unsigned `number`, modulo 2**64."""
    if world_size() == 1:
        return number
    device = "cpu" if _hosts is not None or dist.get_backend() == "gloo" else "cuda"
    signed = torch.tensor(number - 2**64 if number >= 2**63 else number, device=device)
    dist.all_reduce(signed, group=_hosts)
    return int(signed.item()) % 2**64


def wait_at_most(seconds: float) -> None:
    """From here on a collective that a rank does not join fails on the others after `seconds`.

    Every rank must call, and all meet here: what one still does took its time under the old limit.
    """
    if world_size() > 1:
        gather(None)
    for group in (dist.group.WORLD, _hosts):
        if group is not None:
            with contextlib.suppress(RuntimeError):  # a backend but gloo and NCCL keeps its own
                group.set_timeout(timedelta(seconds=seconds))


def leave_group() -> None:
    """End what the processes share, once all of them have come here. See also `failure`.

    What a rank does later it does alone, however long it takes; unless the others leave with a
    status, for which a scheduler may end the machine of this one.

    Gloo's threads drop the tensors of the last collectives a moment after these have returned, and
    take the interpreter's lock for it. Who ends the group holds that lock and waits for those
    threads: without the pause processes hang at their end, one launch in ten (torch 2.13).
    """
    global _hosts
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # another is gone, or later than any may be
            gather(None)
        time.sleep(SETTLING_SECONDS)
        dist.destroy_process_group()
        _hosts = None
