"""What a run shows while it works: a bar over its steps, others over what interrupts them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from tqdm import tqdm

from gpt2repro.system.command_line import bar_is_shown
from gpt2repro.system.text import folded, printable

MEMORY = 0.9  # of the moving average of a step's seconds


class Progress:
    """The main process's bars; lines go above them.

    The time that is left is that of the steps alone: start, validation and saving, which tqdm would
    spread over all steps, are not counted.
    """

    def __init__(self, *, first_step: int, num_steps: int, enabled: bool) -> None:
        self._enabled = enabled
        self._watched = sys.stderr.isatty()  # else it is a log file, which wants few lines
        self._seconds, self._is_under_way = 0.0, False  # of a batch, averaged
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}",
            dynamic_ncols=True,
            disable=not enabled,
            mininterval=0.5 if self._watched else 60.0,
        )

    def update(
        self, *, loss: float, tokens_per_second: float, seconds: float, batches_left: int
    ) -> None:
        """Another step is done, whose batches took so many seconds each."""
        if self._is_under_way:
            before = self._seconds or seconds
            self._seconds = MEMORY * before + (1 - MEMORY) * seconds
        self._is_under_way = True  # the first step may wait for the compiler
        left = tqdm.format_interval(batches_left * (self._seconds or seconds))
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, {tokens_per_second:,.0f} tok/s, {left} left", refresh=False
        )
        self._bar.update()

    def phase(self, name: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
        """A bar below, for what interrupts the steps; yields what moves it on."""
        return phase(name, total, enabled=self._enabled, position=1)

    def note(self, text: str) -> None:
        """Print a line above the bars, on the main process only."""
        if self._enabled:
            self._bar.write(folded(printable(text)))

    def close(self) -> None:
        self._bar.close()


@contextmanager
def phase(
    name: str, total: int, *, enabled: bool, position: int = 0
) -> Iterator[Callable[[int], object]]:
    """A bar of its own for what takes more than a moment; yields what moves it on."""
    watched = sys.stderr.isatty()
    bar = tqdm(
        total=total,
        desc=name,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {remaining} left",
        position=position,
        leave=False,
        dynamic_ncols=True,
        disable=not enabled,
        delay=1.0 if watched else 60.0,
        mininterval=0.5 if watched else 60.0,
    )
    try:
        with bar_is_shown():
            yield bar.update
    finally:
        bar.close()
