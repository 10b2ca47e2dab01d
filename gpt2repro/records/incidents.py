"""A record of updates that were skipped because loss or gradient was not finite."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from gpt2repro.system import atomic

MAX_IN_A_ROW = 5  # one bad batch is the data's fault; five in a row are the run's


class IncidentLog:
    """Counts skipped updates in a row, and keeps their rows where a person can look at them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._in_a_row = 0

    @property
    def too_many(self) -> bool:
        return self._in_a_row >= MAX_IN_A_ROW

    def over(self) -> None:
        """An update was made: what came before was passing."""
        self._in_a_row = 0

    def count(self) -> None:
        """An update was skipped."""
        self._in_a_row += 1

    def record(
        self,
        rows_of_ranks: Sequence[torch.Tensor],
        *,
        step: int,
        tokenizer,
        loss: float,
        grad_norm: float,
        rows_digest: str,
    ) -> None:
        """Write each rank's rows (R, T+1) of a skipped step, as ids and as text; rank 0 alone."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for rank, rows in enumerate(rows_of_ranks):
            content = {
                "step": step,
                "loss": str(loss),
                "grad_norm": str(grad_norm),
                "rows_digest": rows_digest,
                "rows": rows.tolist(),
                "texts": tokenizer.batch_decode(rows),
            }
            path = self.directory / f"step_{step:08d}_rank_{rank}.json"
            with atomic.new_file(path) as scratch:
                scratch.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    def advice(self) -> str:
        """What to say when the run stops for it."""
        return (
            f"Stopped: loss or gradient was not finite in {MAX_IN_A_ROW} steps in a row. Lower "
            f"max_lr, raise warmup_steps or set mixed_precision to no; {self.directory} holds the "
            "rows. The same command goes on from the last checkpoint."
        )
