"""Train GPT-2: `accelerate launch train_accelerate.py [--recipe FILE] [--FIELD VALUE ...]`.

Without arguments this is the reproduction, recipes/gpt2.yaml. Everything here is recipe -> parts ->
loop -> export; the parts live in gpt2repro/.

Exit status: 0 trained, 2 something to mend in the input, 3 diverged, 75 stopped by a signal and saved.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch

from gpt2repro import checkpoint, cli, incidents, ranks
from gpt2repro.evaluation import validation_loss
from gpt2repro.finish import draw_loss_curve, finish
from gpt2repro.metrics import Stopwatch
from gpt2repro.optim import lr_at, set_lr
from gpt2repro.run import AlreadyFinished, Run, prepare
from gpt2repro.sampling import sample_text
from gpt2repro.stream import StepRows

EXIT_DIVERGED = 3
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the same command goes on
SPIKE_Z = 5.0  # standard deviations above the recent mean that make a loss worth a line


def main(argv: list[str]) -> int:
    try:
        run = prepare(argv)
    except AlreadyFinished as finished:
        print(finished)
        return 0
    with run:
        return train(run) or finish(run)


def train(run: Run) -> int:
    """The loop over optimizer steps; returns the exit status, 0 when all steps are done."""
    recipe, watch, skipped_in_a_row = run.recipe, Stopwatch(), 0
    for step in range(run.first_step, recipe.num_steps):
        record: dict[str, Any] = {"step": step, "tokens": (step + 1) * recipe.batch_tokens}
        if step == 0 or due(recipe.eval_every, step):
            record |= validate(run, step)
        if step > 0 and due(recipe.sample_every, step):
            sample(run, step)

        watch.lap()
        waited = run.stream.wait_seconds
        batch = next(run.stream)
        lr = lr_at(
            step,
            max_lr=recipe.max_lr,
            min_lr=recipe.min_lr,
            warmup_steps=recipe.warmup_steps,
            num_steps=recipe.num_steps,
        )
        result = train_step(run, batch, lr)
        if result is None:
            return leave(run, step)
        run.lanes = batch.lanes
        run.throughput.add(recipe.batch_tokens, watch.lap(), run.stream.wait_seconds - waited)

        report(run, record, result, lr)
        skipped_in_a_row = 0 if result.finite else skipped_in_a_row + 1
        if skipped_in_a_row:
            note_incident(run, step, batch, result)
        if skipped_in_a_row == incidents.MAX_IN_A_ROW:
            run.progress.note(incidents.advice(run.directory.incidents))
            return EXIT_DIVERGED
        done = step + 1
        if run.stop.agreed:
            return leave(run, done)
        if done == recipe.num_steps or due(recipe.save_every, done):
            save(run, done)
    last = {"step": recipe.num_steps, "tokens": recipe.num_steps * recipe.batch_tokens}
    run.write(last | validate(run, recipe.num_steps))
    return leave(run, recipe.num_steps) if run.stop.agreed else 0


@dataclass
class Result:
    """What one optimizer step reports, the same on every rank."""

    loss: float  # mean over the step's tokens, nats
    grad_norm: float  # L2, before clipping
    rows_digest: str  # of all ranks' rows, 64 bits in hex

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(run: Run, batch: StepRows, lr: float) -> Result | None:
    """One optimizer step on this rank's rows; None, and nothing changed, if a stop was agreed on.

    A step whose loss or gradient is not finite leaves the weights as they are.
    """
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    set_lr(optimizer, lr)
    rows = batch.tokens.to(accelerator.device, non_blocking=True)
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    size = run.recipe.micro_batch_size
    micro_batches = list(zip(inputs.split(size), targets.split(size), strict=True))
    loss = torch.zeros((), device=accelerator.device)
    for input_ids, shift_labels in micro_batches:
        if run.stop.agreed or (run.looks_for_signals_within_steps and run.stop.poll()):
            optimizer.zero_grad()
            return None
        with accelerator.accumulate(model):  # gradients sync on the last micro-batch only
            # Rows all have T targets, so a mean over micro-batches and ranks is one over tokens.
            micro_loss = model(input_ids=input_ids, shift_labels=shift_labels).loss
            accelerator.backward(micro_loss)
        loss += micro_loss.detach() / len(micro_batches)
    grad_norm = checkpoint.whole(
        accelerator.clip_grad_norm_(model.parameters(), run.recipe.max_grad_norm)
    )
    loss_mean = ranks.reduce_sum(loss) / ranks.world_size()
    digest = ranks.sum_uint64(batch.digest, accelerator.device)
    result = Result(loss_mean.item(), grad_norm.item(), f"{digest:016x}")
    if result.finite:
        optimizer.step()
    optimizer.zero_grad()
    run.stop.poll()
    return result


def validate(run: Run, step: int) -> dict[str, float]:
    """Validation loss and bits per byte; nothing if there is no validation set or a stop came."""
    if run.validation is None:
        return {}
    result = validation_loss(
        run.model,
        run.validation.rows,
        batch_size=run.recipe.micro_batch_size,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        reduce=ranks.reduce_sum,
        should_stop=run.stop.poll,
    )
    if result is None:
        return {}
    bits_per_byte = result.bits_per_byte(run.validation.num_tokens, run.validation.num_bytes)
    run.progress.note(
        f"step {step}: validation loss {result.loss:.4f} ({bits_per_byte:.4f} bits per byte)"
    )
    return {"val_loss": result.loss, "val_bits_per_byte": bits_per_byte}


def sample(run: Run, step: int) -> None:
    """Show how the model continues the recipe's prompt."""
    text = sample_text(
        run.model,
        run.tokenizer,
        run.recipe.sample_prompt,
        num_tokens=48,
        seed=run.recipe.seed + step,
    )
    run.progress.note(f"step {step}: {' '.join(text.split())}")


def report(run: Run, record: dict[str, Any], result: Result, lr: float) -> None:
    """The step's line in metrics.jsonl and the trackers, and the progress bar."""
    record |= {"loss": result.loss, "lr": lr, "grad_norm": result.grad_norm}
    record |= {"rows_digest": result.rows_digest}
    z_score = run.spikes.z_score(result.loss) if result.finite else 0.0
    if z_score > SPIKE_Z:
        record["loss_z_score"] = z_score
        run.progress.note(
            f"step {record['step']}: loss {result.loss:.4f} is {z_score:.1f} standard deviations "
            "above its recent mean"
        )
    run.progress.update(loss=result.loss, tokens_per_second=run.throughput.tokens_per_second)
    if due(run.recipe.log_every, record["step"]) or len(record) > 6:  # more than an ordinary step
        run.write(record | run.throughput.read())
    if "val_loss" in record:
        draw_loss_curve(run)


def note_incident(run: Run, step: int, batch: StepRows, result: Result) -> None:
    """Keep the rows of a skipped update where a person can look at them."""
    incidents.record(
        run.directory.incidents,
        step=step,
        rank=ranks.rank(),
        rows=batch.tokens,
        tokenizer=run.tokenizer,
        loss=result.loss,
        grad_norm=result.grad_norm,
        rows_digest=result.rows_digest,
    )
    run.progress.note(
        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: update skipped, "
        f"rows kept in {run.directory.incidents}"
    )


def save(run: Run, step: int) -> None:
    """A checkpoint of the state before `step`."""
    if step != run.saved_step:
        checkpoint.save(
            run.directory.checkpoints,
            step=step,
            model=run.model,
            optimizer=run.optimizer,
            state=run.state(),
            keep_last=run.recipe.keep_last,
        )
        run.saved_step = step


def leave(run: Run, step: int) -> int:
    """Save what a stop request interrupts and say how to go on."""
    save(run, step)
    run.progress.close()
    if run.accelerator.is_main_process:
        print(
            f"Stopped at step {step}, saved in {run.directory.checkpoints}. The same command goes on."
        )
    return EXIT_PREEMPTED


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


if __name__ == "__main__":
    sys.exit(cli.run("train_accelerate.py", main, sys.argv[1:]))
