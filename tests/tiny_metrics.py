"""What a run logs, made up: for pictures and tables."""

import math


def run_metrics(steps: int = 40, *, floor: float = 4.0, eval_every: int = 10) -> list[dict]:
    """A loss that falls from 8 towards `floor`, as the training loop logs it."""
    records = []
    for step in range(steps + 1):
        loss = floor + (8 - floor) * math.exp(-4 * step / steps)
        record = {"step": step, "tokens": min(step + 1, steps) * 4096}
        if step % eval_every == 0 or step == steps:
            record |= {"val_loss": loss, "val_bits_per_byte": loss / 2}
        if step < steps:
            record |= {"loss": loss, "lr": 1e-3, "grad_norm": 0.5 + step % 3, "mfu": None}
            record |= {"tokens_per_second": 9000.0, "data_wait_fraction": 0.001}
        records.append(record)
    return records
