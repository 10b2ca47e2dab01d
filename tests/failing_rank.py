"""Run by two processes (see test_failing_rank.py): the training script, in which one of them fails.

How is in the environment: FAULT, FAULT_RANK, FAULT_STEP. What happens when is printed as
`EVENT {...}`.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

import train_accelerate
from gpt2repro import UserError
from gpt2repro.data.rows.producer import StepRows
from gpt2repro.data.rows.stream import TokenStream
from gpt2repro.system import command_line
from gpt2repro.training import finish, run

RANK = int(os.environ["RANK"])
GROUP_SECONDS, PUBLISH_SECONDS = 1, 4


def event(name: str, **more) -> None:
    told = {"event": name, "rank": RANK, "pid": os.getpid(), "at": time.time()}
    os.write(1, f"\nEVENT {json.dumps(told | more)}\n".encode())  # in one piece, in order


def wait_seconds() -> float:
    """How long this rank waits for the other in a collective."""
    return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def meet_a_bug() -> NoReturn:
    raise ZeroDivisionError("a bug")


def run_out_of_memory() -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lose_the_data(stream: TokenStream) -> StepRows:
    raise UserError("the token has expired")


FAULTS = {"exception": meet_a_bug, "out of memory": run_out_of_memory, "killed": be_killed}


def fail_in_step(fault: str, failing_rank: int, failing_step: int) -> None:
    train_step = run.Run.train_step

    def train_or_fail(self, step, rows):
        if fault == "data" and (RANK, step) == (failing_rank, failing_step):
            event("fault")  # for the rows of the next step
            TokenStream.__next__ = lose_the_data
            return train_step(self, step, rows)
        event("step", step=step, wait_seconds=wait_seconds())
        if (RANK, step) == (failing_rank, failing_step):
            # NCCL would wait here for the other rank, which waits for this one; gloo would not.
            dist.destroy_process_group = lambda: time.sleep(1000)
            event("fault")
            FAULTS[fault]()
        return train_step(self, step, rows)

    run.Run.train_step = train_or_fail


def note_saves() -> None:
    save = run.Checkpoints.save

    def noting(self, *args, **options):
        event("save", wait_seconds=wait_seconds())
        save(self, *args, **options)

    run.Checkpoints.save = noting


def publish_slowly() -> None:
    """Longer than the ranks would wait for each other."""
    original = finish.finish

    def finish_impatiently(run):
        dist.group.WORLD.set_timeout(timedelta(seconds=GROUP_SECONDS))
        return original(run)

    def publish(run, tensors):
        time.sleep(PUBLISH_SECONDS)
        event("published")
        return True

    finish.finish, finish._publish = finish_impatiently, publish


if __name__ == "__main__":
    if fault := os.environ.get("FAULT"):
        fail_in_step(fault, int(os.environ["FAULT_RANK"]), int(os.environ["FAULT_STEP"]))
    note_saves()
    publish_slowly()
    status = command_line.run(train_accelerate.NAME, train_accelerate.main, sys.argv[1:])
    event("left", status=status)
    sys.exit(status)
