"""How lanes, the rows of a step and processes must divide: arithmetic that the recipe uses too."""

import math

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
        other = f"change num_lanes to {_listed(fits)}" if fits else "change batch_tokens"
        raise UserError(
            f"num_lanes {num_lanes} is not divisible by the {world_size} processes of this launch; "
            f"launch {_listed(divisors(num_lanes))} processes, or {other}"
        )


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
