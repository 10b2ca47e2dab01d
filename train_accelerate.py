"""Train GPT-2: `accelerate launch train_accelerate.py [--recipe FILE] [--FIELD VALUE ...]`.

Without arguments this is the reproduction, recipes/gpt2.yaml. Everything here is recipe -> parts ->
loop -> export; the parts live in gpt2repro/.

Exit status: 0 trained, 2 mend the input, 3 diverged, 75 stopped by a signal and saved.
"""

import sys

import torch

from gpt2repro.data.stream import StepRows
from gpt2repro.records import checkpoints, incidents
from gpt2repro.records.metrics import Stopwatch
from gpt2repro.speed import cpu_memory
from gpt2repro.system import command_line, ranks
from gpt2repro.training.finish import finish
from gpt2repro.training.observation import Result, due, note_incident, observe, report, report_end
from gpt2repro.training.optimizers import lr_at, set_lr
from gpt2repro.training.run import AlreadyFinished, Run, prepare

EXIT_DIVERGED = 3
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the same command goes on
LOOK_UP_SECONDS = 1.0  # how often a run that waits for data looks for signals


def main(argv: list[str]) -> int:
    try:
        with prepare(argv) as run:
            return train(run) or finish(run)
    except AlreadyFinished as finished:
        if ranks.rank() == 0:
            print(finished)
        return 0
    finally:
        ranks.leave_group()


def train(run: Run) -> int:
    """The loop over optimizer steps; returns the exit status, 0 when all steps are done."""
    recipe, watch, skipped_in_a_row = run.recipe, Stopwatch(), 0
    for step in range(run.first_step, recipe.num_steps):
        figures = observe(run, step)

        watch.lap()
        waited = run.stream.wait_seconds
        batch = next_rows(run)
        if batch is None:
            return leave(run, step)
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
        if step == run.first_step and run.accelerator.device.type == "cpu":
            cpu_memory.keep_freed_memory()  # compilation is over
        run.lanes = batch.lanes
        run.throughput.add(recipe.batch_tokens, watch.lap(), run.stream.wait_seconds - waited)

        report(run, step, result, lr, figures)
        skipped_in_a_row = 0 if result.finite else skipped_in_a_row + 1
        if not result.finite:
            note_incident(run, step, batch, result)
        if skipped_in_a_row == incidents.MAX_IN_A_ROW:
            run.progress.note(incidents.advice(run.directory.incidents))
            return EXIT_DIVERGED
        done = step + 1
        if done == recipe.num_steps or due(recipe.save_every, done):
            save(run, done)

    figures = observe(run, recipe.num_steps)
    if run.stop.agreed:
        return leave(run, recipe.num_steps)
    report_end(run, figures)
    return 0


def next_rows(run: Run) -> StepRows | None:
    """This rank's rows of the next step, once all ranks have theirs; None if a stop was agreed on.

    Waiting together keeps every rank reachable by signals while one of them sits out an outage.
    """
    device = run.accelerator.device
    while not run.stop.poll():
        if ranks.all_ranks(run.stream.wait(LOOK_UP_SECONDS), device):
            return next(run.stream)
    return None


def train_step(run: Run, batch: StepRows, lr: float) -> Result | None:
    """One optimizer step on this rank's rows; None, and nothing changed, if a stop was agreed on.

    A step whose loss or gradient is not finite leaves the weights as they are.
    """
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    set_lr(optimizer, lr)
    # From pinned memory the copy waits in the GPU's queue, and not this process for the copy.
    tokens = batch.tokens.pin_memory() if accelerator.device.type == "cuda" else batch.tokens
    rows = tokens.to(accelerator.device, non_blocking=True)
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    size = run.recipe.micro_batch_size
    micro_batches = list(zip(inputs.split(size), targets.split(size), strict=True))
    loss = torch.zeros((), device=accelerator.device)
    for input_ids, shift_labels in micro_batches:
        if run.looks_for_signals_within_steps and run.stop.poll():
            optimizer.zero_grad()
            return None
        with accelerator.accumulate(model):  # gradients sync on the last micro-batch only
            # Rows all have T targets, so a mean over micro-batches and ranks is one over tokens.
            micro_loss = model(
                input_ids=input_ids, shift_labels=shift_labels, skip_logits=True
            ).loss
            accelerator.backward(micro_loss)
        loss += micro_loss.detach() / len(micro_batches)
    grad_norm = checkpoints.whole(
        accelerator.clip_grad_norm_(model.parameters(), run.recipe.max_grad_norm)
    )
    loss_mean = ranks.reduce_sum(loss) / ranks.world_size()
    digest = ranks.sum_uint64(batch.digest, accelerator.device)
    result = Result(loss_mean.item(), grad_norm.item(), f"{digest:016x}")
    if result.finite:
        optimizer.step()
    optimizer.zero_grad()
    return result


def save(run: Run, step: int) -> None:
    """A checkpoint of the state before `step`, which the Hub gets too if the recipe says so."""
    if step != run.saved_step:
        path = checkpoints.save(
            run.directory.checkpoints,
            step=step,
            model=run.model,
            optimizer=run.optimizer,
            state=run.state(),
            keep_last=run.recipe.keep_last,
        )
        run.saved_step = step
        if run.push is not None:
            run.push.submit(path, f"Step {step}")


def leave(run: Run, step: int) -> int:
    """Save what a stop request interrupts and say how to go on."""
    save(run, step)
    run.progress.close()
    if run.accelerator.is_main_process:
        run.directory.preempted.touch()
        place = run.directory.checkpoints
        print(f"Stopped at step {step}, saved in {place}. The same command goes on.")
    return EXIT_PREEMPTED


if __name__ == "__main__":
    sys.exit(command_line.run("train_accelerate.py", main, sys.argv[1:]))
