"""The loss on held-out rows, in a training loop or out of it, on any engine."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gpt2repro.evaluation.likelihoods import Reduce, evaluating

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class ValidationResult:
    """`loss` in nats per token, the mean over `num_tokens` tokens."""

    loss: float
    num_tokens: int

    def bits_per_byte(self, num_bytes: float) -> float:
        """The tokens being `num_bytes` bytes of text: how tokenizers compare."""
        return self.loss / math.log(2) * self.num_tokens / num_bytes


def validation_loss(
    model: torch.nn.Module,
    rows: np.ndarray,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    reduce: Reduce | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> ValidationResult | None:
    """Mean loss of `rows` (N, T+1) of token ids, each predicting its last T. Call on all ranks.

    The same for any batch size, world size and engine, up to float summation: batches of
    consecutive rows are dealt to the ranks in turn, sums and counts are reduced once, and divided
    once. Every forward has the same shape and every rank runs as many: what is missing is filled
    with rows that do not count. The model is ours, which computes the loss as in training.

    `reduce` sums a tensor over the ranks. `should_stop` is polled before each batch and must answer
    alike on all ranks; None is returned when it says so. `on_batch` is told the number of rows that
    each of this rank's batches finished.
    """
    rows = np.asarray(rows)
    assert rows.ndim == 2 and len(rows) > 0, "rows are (N, T+1), at least one"
    device = next(model.parameters()).device
    num_batches = -(-len(rows) // (batch_size * world_size)) * world_size
    losses: list[torch.Tensor] = []  # on the device, which nobody waits for in between
    counts: list[int] = []
    with evaluating(model):
        for batch in range(rank, num_batches, world_size):
            if should_stop is not None and should_stop():
                return None
            index = np.arange(batch * batch_size, (batch + 1) * batch_size)
            tokens = torch.from_numpy(rows[index % len(rows)].astype(np.int64)).to(device)
            targets = tokens[:, 1:].clone()
            targets[torch.from_numpy(index >= len(rows)).to(device)] = IGNORED
            num_counted = int((index < len(rows)).sum())
            num_tokens = num_counted * targets.shape[1]
            # As training has it: a compiler takes rows of another stride for a model of its own.
            inputs, options = tokens[:, :-1].contiguous(), {"skip_logits": True, "use_cache": False}
            losses.append(model(input_ids=inputs, shift_labels=targets, **options).loss)
            counts.append(num_tokens)
            if on_batch is not None:
                on_batch(num_counted)
    sums = torch.zeros(2, dtype=torch.float64)  # nats, tokens
    for loss, num_tokens in zip(torch.stack(losses).tolist(), counts, strict=True):
        if num_tokens:  # where no row counts, the mean is none
            sums += torch.tensor([loss * num_tokens, num_tokens], dtype=torch.float64)
    if world_size > 1:
        assert reduce is not None, "several ranks need a reduce"
        sums = reduce(sums.to(device)).cpu()
    return ValidationResult(float(sums[0] / sums[1]), int(sums[1]))
