"""Train GPT-2: `accelerate launch train_accelerate.py [--recipe FILE] [--FIELD VALUE ...]`.

Without arguments this is the reproduction, recipes/gpt2.yaml. The script opens a run, loops over
optimizer steps, and exports what was trained; its parts live in gpt2repro/training/.

Exit status: 0 trained, 2 mend the input, 3 diverged, 75 stopped by a signal and saved.
"""

import sys
from typing import TYPE_CHECKING

from gpt2repro.recipe import load_recipe
from gpt2repro.system import command_line

if TYPE_CHECKING:
    from gpt2repro.training.run import Run

NAME = "train_accelerate.py"
EXIT_DIVERGED = 3
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the same command goes on


def main(argv: list[str]) -> int:
    recipe = load_recipe(argv)
    # Only now, since they take seconds to import: a mistyped option is answered at once.
    with command_line.underway("Loading torch and transformers ..."):
        from gpt2repro.system import failure, ranks
        from gpt2repro.training.finish import finish
        from gpt2repro.training.run import AlreadyFinished, open_run

    status = 0
    try:
        with open_run(recipe, argv) as run:
            status = train(run) or finish(run)
    except AlreadyFinished as finished:
        if ranks.rank() == 0:
            print(finished)
    except BaseException as error:
        if ranks.world_size() > 1:  # the others may wait for this one in a collective
            failure.leave_at_once(NAME, error)
        failure.advise(error)
        raise
    ranks.leave_group()
    return status


def train(run: "Run") -> int:
    """The loop over optimizer steps; returns the exit status, 0 when all steps are done."""
    recipe, monitor = run.recipe, run.monitor
    if run.saves_before(run.checkpoints.first_step):
        run.save(run.checkpoints.first_step)
    for step in range(run.checkpoints.first_step, recipe.num_steps):
        figures = monitor.observe(step)  # validation, benchmarks, a sample: what is due
        with monitor.timing():
            rows = run.next_rows(step)  # (this rank's rows, T+1) token ids
            launched = run.train_step(step, rows) if rows else None  # a GPU is still at it
        if rows is None or launched is None:  # all ranks have agreed to stop, or the data failed
            return leave(run, step)
        monitor.report(step, rows, launched, figures)
        if monitor.diverged():
            return EXIT_DIVERGED
        if run.saves_after(step):
            run.save(step + 1)

    figures = monitor.observe(recipe.num_steps)
    run.save(recipe.num_steps)  # again, if the disk did not take it
    if run.stop.agreed or run.failure is not None:
        return leave(run, recipe.num_steps)
    monitor.report_end(figures)
    return 0


def leave(run: "Run", step: int) -> int:
    """Save what a stop request or a failure interrupts, and say how to go on."""
    failure, place = run.failure, run.directory.checkpoints
    if failure is None or step > run.checkpoints.first_step:
        run.save(step)
        run.wait_for_checkpoint()
        if run.failure is not None and run.checkpoints.saved_step != step:
            raise run.failure  # the disk does not take it
        if failure is None and run.accelerator.is_main_process:
            run.directory.preempted.touch()
        if run.accelerator.is_main_process:
            run.monitor.progress.close()
            print(
                f"Stopped at step {step}, saved in {place}. The same command goes on.", flush=True
            )
        run.monitor.draw_loss_curve()  # last: of a long run it takes seconds
    if failure is not None:
        raise failure
    return EXIT_PREEMPTED


if __name__ == "__main__":
    sys.exit(command_line.run(NAME, main, sys.argv[1:], outlives_readers=True))
