"""Stopping in good order: signals become a request that all ranks agree on and the loop polls.

SIGTERM (schedulers), SIGUSR1 (Slurm's `--signal`) and SIGINT (Ctrl-C) all ask for the same: save,
say how to resume, leave. A second Ctrl-C leaves at once. When the launcher dies, its processes get
a SIGTERM from the kernel, so that signalling the launcher works too (Linux).
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

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
        for number in SIGNALS:
            signal.signal(number, self.receive)
        signal_with_parent(signal.SIGTERM)

    def receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        again = self.signal is not None and now - self.received_at > SAME_REQUEST_SECONDS
        if number == signal.SIGINT and again:
            os.write(sys.stderr.fileno(), b"\nStopping at once; the last checkpoint stands.\n")
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self.received_at = signal.Signals(number), now

    def poll(self) -> bool:
        """Whether any rank was asked to stop. Every rank must call at the same point."""
        self.agreed = self.agreed or self.any_rank(self.signal is not None)
        return self.agreed


def signal_with_parent(number: signal.Signals) -> None:
    """Ask the kernel to send `number` to this process when its parent dies (Linux `prctl(2)`)."""
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(number))
