"""How lanes, batches, steps and processes divide: arithmetic that the recipe uses too."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpt2repro import UserError


def check_lanes(num_lanes: int, *, rows_per_step: int, world_size: int = 1) -> None:
    """Every lane gives a step as many rows, and every process has as many lanes.

    Raises:
        UserError: a division is not exact; the message lists what would fit.
    """
    if num_lanes < 1 or rows_per_step % num_lanes:
        fits = [n for n in divisors(rows_per_step) if n <= 2 * max(num_lanes, 1)]
        raise UserError(
            f"num_lanes {num_lanes} does not divide the {rows_per_step} rows of a step "
            f"(batch_tokens / sequence_length); these would: {_listed(fits)}"
        )
    if num_lanes % world_size:
        fits = [n for n in divisors(rows_per_step) if n % world_size == 0]
        other = f"num_lanes to {_listed(fits)}" if fits else "num_lanes and batch_tokens"
        raise UserError(
            f"num_lanes {num_lanes} is not divisible by the {world_size} processes of this launch; "
            f"launch {_listed(divisors(num_lanes))} processes, or change {other}"
        )


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


@dataclass(frozen=True)
class Batches:
    """How many batches of rows a step takes: one, or from some steps on more.

    The stream knows batches alone, all of one size. So what a step of several trains on is as
    exact, and as independent of the number of processes, as what a step of one does.

    multiples: pairs (step, n), in order: from that step on each takes n batches.
    """

    multiples: Sequence[Sequence[int]]

    def of(self, step: int) -> int:
        return next((n for begin, n in reversed(self.multiples) if begin <= step), 1)

    def before(self, step: int) -> int:
        """What all steps before `step` take."""
        ends = [*(begin for begin, _ in self.multiples[1:]), step]
        more = sum(
            (n - 1) * max(0, min(end, step) - begin)
            for (begin, n), end in zip(self.multiples, ends, strict=False)
        )
        return step + more

    def steps_in(self, batches: int) -> int:
        """How many whole steps so many batches are."""
        return bisect.bisect_right(range(batches + 1), batches, key=self.before) - 1


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
