"""How one process of several fails: it says why, once for all of them, and is gone.

Its peers stand in a collective that it will never join, so whatever waits for them on the way out
waits in vain: ending the group (NCCL hangs even in its abort), threads, destructors, exit handlers.
Nothing of it is done. The launcher sees a process that left with a status, and ends the others.
"""

import contextlib
import os
import re
import signal
import sys
import traceback
from typing import NoReturn

import torch
import torch.distributed as dist

from gpt2repro.system import command_line, ranks

LAST_WORDS_SECONDS = 10  # a screen or a machine that does not answer may not keep the peers waiting

GOES_ON = (
    "The run stops. What was saved is safe: the same command goes on from the last checkpoint."
)
OUT_OF_MEMORY = (
    "Lower micro_batch_size (or let it be auto) or set gradient_checkpointing; a new run may also "
    "take a shorter sequence_length."
)
NO_COMPILER = (
    "torch.compile needs a C and C++ compiler, for a GPU also Triton and Python's headers, and a "
    "TMPDIR with room that may hold programs; or set compile to false."
)
# How gloo and NCCL tell that the process at the other end is there no more.
PEER_GONE = re.compile(
    r"Connection closed by peer \[\S+|Connection reset by peer|Broken pipe|ncclRemoteError"
)


def advise(error: BaseException) -> None:
    """Let the traceback of a process that is alone end with what to do, where that is known."""
    if known := _known(error):
        error.add_note(f"This process {known} {GOES_ON}")


def leave_at_once(prog: str, error: BaseException) -> NoReturn:
    """End this process because of `error`, without waiting for anything.

    The exit status is what `command_line.run` gives, else 1. The first rank to fail tells all; what
    another has to say after it is one line, and nothing if it follows from the first.
    """
    expected = command_line.in_one_line(error)
    status = command_line.EXIT_FAILED if expected is None else expected[0]
    if status == command_line.EXIT_USAGE:
        command_line.let_rank_0_speak()
    signal.alarm(LAST_WORDS_SECONDS)  # the kernel ends what hangs here
    try:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        if said := _last_words(error, is_first=_is_first()):
            print(f"{prog}: {said}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _last_words(error: BaseException, *, is_first: bool) -> str:
    """What to say of this rank, after its traceback if the error needs one; maybe nothing."""
    who = f"rank {ranks.rank()} of {ranks.world_size()}"
    if (expected := command_line.in_one_line(error)) is not None:
        _, said = expected
        return (said if ranks.rank() == 0 else f"{said} ({who} alone)") if is_first else ""
    if isinstance(error, RuntimeError) and (gone := PEER_GONE.search(str(error))):
        silent = "If that one left no message, the system killed it, often for want of memory."
        said = f"{who} lost another ({gone[0]}). {silent} {GOES_ON}"
        return said if is_first else ""
    if not is_first:
        return f"{who} failed too: {''.join(traceback.format_exception_only(error)).strip()}"
    sys.excepthook(type(error), error, error.__traceback__)
    if known := _known(error):
        return f"{who} {known} {GOES_ON}"
    return f"{who} failed: its error is above. {GOES_ON}"


def _known(error: BaseException) -> str:
    """What happened and what to do, where that is known."""
    cause = getattr(error, "inner_exception", error)  # of an error that the compiler wrapped
    said = str(cause) if isinstance(cause, RuntimeError) else ""  # by a CPU, by a Mac's GPU
    in_words = "can't allocate memory" in said or "MPS backend out of memory" in said
    if in_words or isinstance(cause, torch.OutOfMemoryError | MemoryError):
        return f"ran out of memory. {OUT_OF_MEMORY}"
    # By name: asking for the class would import the compiler.
    if any(kind.__name__ == "BackendCompilerFailed" for kind in type(error).__mro__):
        return f"could not compile the model. {NO_COMPILER}"
    return ""


def _is_first() -> bool:
    """Whether no rank has failed before: the launcher keeps count, in the store of the ranks."""
    assert dist.group.WORLD is not None
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store may outlive a restart
    try:
        return dist.group.WORLD.get_group_store().add(f"failures of start {start}", 1) == 1
    except RuntimeError:  # its machine is gone; or rank 0, if no launcher holds it
        return True
