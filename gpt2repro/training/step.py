"""One optimizer step, and the waiting for its rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpt2repro.data.rows.producer import StepRows
from gpt2repro.data.rows.stream import TokenStream
from gpt2repro.records.checkpoints import get_random_state, set_random_state
from gpt2repro.system import ranks
from gpt2repro.training.learner import Learner

LOOK_UP_SECONDS = 1.0  # how often a run that waits for data looks for signals


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, the same on every rank."""

    loss: float  # mean over the step's tokens, nats
    grad_norm: float  # L2, before clipping
    lr: float
    rows_digest: str  # of all ranks' rows, 64 bits in hex

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class LaunchedStep:
    """A step that a GPU may still be at, while this process goes on to prepare the next one."""

    def __init__(self, figures: torch.Tensor, lr: float, rows_digest: str) -> None:
        """`figures`: [loss, gradient norm] on the device."""
        self._lr, self.rows_digest = lr, rows_digest
        self._figures = figures.to("cpu", non_blocking=figures.is_cuda)
        self._copied: torch.cuda.Event | None = None
        if figures.is_cuda:
            self._copied = torch.cuda.Event(blocking=True)  # else who waits keeps a core busy
            self._copied.record()

    def result(self) -> StepResult:
        """Its figures, once the device is done."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, grad_norm = self._figures.tolist()
        return StepResult(loss, grad_norm, self._lr, self.rows_digest)


def next_rows(
    stream: TokenStream, should_stop: Callable[[], bool], check: Callable[[], None]
) -> StepRows | None:
    """This rank's rows of the next batch, once all ranks have theirs; None if a stop was agreed on.

    Waiting together keeps every rank reachable by signals while one of them sits out an outage. If
    the stream of one fails for good, or its `check()` raises, all raise.
    """

    def take() -> StepRows:
        check()
        return next(stream)

    while not should_stop():
        if ranks.all_ranks(stream.wait(LOOK_UP_SECONDS)):
            return ranks.together(take)
    return None


def train_step(
    learner: Learner, batch: StepRows, lr: float, should_stop: Callable[[], bool]
) -> LaunchedStep | None:
    """One optimizer step on this rank's rows; None, and nothing changed, if a stop was agreed on.

    `lr` is what the optimizer's groups were set by, to be told with the step.

    A step whose loss or gradient is not finite leaves the weights as they are. The device decides
    that by itself: nothing here waits for it.
    """
    accelerator, model, optimizer = learner.accelerator, learner.model, learner.optimizer
    device = accelerator.device
    # From pinned memory the copy waits in the GPU's queue, and not this process for the copy.
    tokens = batch.tokens.pin_memory() if device.type == "cuda" else batch.tokens
    rows = tokens.to(device, non_blocking=device.type == "cuda")
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    size = learner.micro_batch_size
    micro_batches = list(zip(inputs.split(size), targets.split(size), strict=True))
    # It counts micro-batches, of which one step may have more than another.
    accelerator.step, accelerator.gradient_accumulation_steps = 0, len(micro_batches)
    # Asking costs nothing in one process, and on CPUs a step may take minutes.
    looks_up = ranks.world_size() == 1 or device.type == "cpu"
    random_state = get_random_state() if looks_up else {}
    loss = torch.zeros((), device=device)
    for input_ids, shift_labels in micro_batches:
        if looks_up and should_stop():
            model.zero_grad()
            set_random_state(random_state)  # as if nothing had been dropped out
            return None
        # The compiler makes a variable of a length that benchmarks, before, have had others of.
        for each in (input_ids, shift_labels):
            torch._dynamo.mark_static(each)
        with accelerator.accumulate(model):  # gradients sync on the last micro-batch only
            # Rows all have T targets, so a mean over micro-batches and ranks is one over tokens.
            micro_loss = model(
                input_ids=input_ids, shift_labels=shift_labels, skip_logits=True
            ).loss
            accelerator.backward(micro_loss)
        loss += micro_loss.detach() / len(micro_batches)
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), learner.max_grad_norm)
    loss_mean = ranks.reduce_sum(loss) / ranks.world_size()
    figures = torch.stack((loss_mean, ranks.whole(grad_norm).to(loss_mean.dtype)))
    # By this name torch's optimizers know it (it was made for the overflows of float16).
    optimizer.optimizer.found_inf = 1.0 - figures.isfinite().all().float()
    optimizer.step()
    optimizer.zero_grad()
    digest = ranks.sum_uint64(batch.digest)
    return LaunchedStep(figures, lr, f"{digest:016x}")
