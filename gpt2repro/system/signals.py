"""Stopping in good order: signals become a request that all ranks agree on and the loop polls.

SIGTERM (schedulers), SIGUSR1 (Slurm's `--signal`), SIGHUP (a terminal that is gone; not under
`nohup`) and SIGINT (Ctrl-C) all ask for the same: save, say how to resume, leave. A second Ctrl-C
leaves at once. When the launcher dies, its processes get a SIGTERM from the kernel, so that
signalling the launcher works too (Linux).

Before the first step and after the last there is nothing to save: signals then end the process as
they do any other.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

# Read on import: by the time the kernel is asked to watch it, it may be gone.
PARENT = os.getppid()
# What `accelerate launch` and `torchrun` leave in the environment.
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")

ANSWER = (
    b"\nStopping after this step and saving ...\n",
    b"\nStopping after this step and saving ... (Ctrl-C again: leave at once, unsaved)\n",
)

# Ctrl-C reaches a rank from the terminal and once more from its launcher: that is one request.
SAME_REQUEST_SECONDS = 1.0


class StopRequest:
    """Remembers a signal to this process, and learns whether any rank got one.

    Args:
        any_rank: all-reduce of a flag: True on every rank if it is True on one. Collective.
    """

    def __init__(self, any_rank: Callable[[bool], bool]) -> None:
        self.any_rank = any_rank
        self.signal: signal.Signals | None = None  # what this process got
        self.agreed = False  # what all ranks know
        self.received_at = 0.0
        # `nohup` makes it deaf: then it is to go on.
        is_deaf = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heard = [number for number in SIGNALS if number != signal.SIGHUP or not is_deaf]
        self.before = {number: signal.signal(number, self.receive) for number in heard}

    def close(self) -> None:
        """Let signals do again what they did before; one that nobody has polled comes again."""
        for number, handler in self.before.items():
            # Deaf is the launcher of launch/slurm.sh, from which this process has it.
            is_deaf = number != signal.SIGINT and handler == signal.SIG_IGN
            signal.signal(number, signal.SIG_DFL if is_deaf else handler)
        if self.signal is not None and not self.agreed:
            signal.raise_signal(self.signal)

    def receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        again = self.signal is not None and now - self.received_at > SAME_REQUEST_SECONDS
        if number == signal.SIGINT and again:
            _tell(b"\nStopping at once; the last checkpoint stands.\n")
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self.received_at = signal.Signals(number), now
            if os.environ.get("RANK", "0") == "0":
                _tell(ANSWER[number == signal.SIGINT])

    def poll(self) -> bool:
        """Whether any rank was asked to stop. Every rank must call at the same point."""
        self.agreed = self.agreed or self.any_rank(self.signal is not None)
        return self.agreed


def _tell(line: bytes) -> None:
    """Within a signal handler, where a stream may be in the middle of a line."""
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, line)


def end_with_launcher(parent: int = PARENT) -> None:
    """Have the kernel send this process SIGTERM when its launcher dies (Linux, `prctl(2)`).

    A process that was started by hand outlives its shell, as `nohup` users expect.
    """
    if sys.platform != "linux" or not any(name in os.environ for name in LAUNCHER_VARIABLES):
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM))
    if os.getppid() != parent:  # it died before the kernel was asked
        signal.raise_signal(signal.SIGTERM)
