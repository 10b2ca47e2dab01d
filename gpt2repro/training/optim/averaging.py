"""An exponential moving average of the weights, kept beside them: nothing is trained on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from gpt2repro.system.ranks import reshard

AVERAGE = "ema"  # in the optimizer's state, so a checkpoint has it as `<parameter>/ema`


def keep_average(optimizer: Optimizer, decay: float) -> None:
    """From now on every update of a parameter w by `optimizer` moves its average:

        a <- decay a + (1 - decay) w

    It begins as what w is when the first one is done, and has w's shape, dtype, device and
    sharding. An update that `found_inf` skips leaves both alone; the device decides that by itself.
    """

    @torch.no_grad()
    def move(optimizer: Any, *_: Any) -> None:
        for parameter, state in optimizer.state.items():
            if AVERAGE not in state:
                state[AVERAGE] = parameter.detach().clone()
        if not optimizer.state:  # the first of all was skipped, and on this device not even begun
            return
        weights, averages = zip(*_pairs(optimizer), strict=True)
        skipped = 0.0 if optimizer.found_inf is None else optimizer.found_inf
        rate = torch.as_tensor((1 - decay) * (1 - skipped), device=weights[0].device)
        torch._foreach_lerp_(averages, weights, [rate] * len(averages))

    optimizer.register_step_post_hook(move)


def has_average(optimizer: Optimizer) -> bool:
    """Whether there is one yet: not before the first update."""
    return any(AVERAGE in state for state in optimizer.state.values())


def drop_average(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        state.pop(AVERAGE, None)


@contextmanager
def averaged(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Within, the weights of `model` are their averages; afterwards, to the bit, what they were.

    They change places, which takes no memory, and which compiled code and wrappers do not notice.
    """
    _exchange(model, optimizer)
    try:
        yield
    finally:
        _exchange(model, optimizer)


@torch.no_grad()
def _exchange(model: nn.Module, optimizer: Optimizer) -> None:
    reshard(model)
    for weight, average in _pairs(optimizer):
        held = weight.clone()
        weight.copy_(average)
        average.copy_(held)


def _pairs(optimizer: Optimizer) -> Iterator[tuple[Tensor, ...]]:
    """This rank's part of each parameter, and of its average."""
    for parameter, state in optimizer.state.items():
        if AVERAGE in state:
            both = (parameter, state[AVERAGE])
            yield tuple(t.to_local() if isinstance(t, DTensor) else t for t in both)
