"""A record of updates that were skipped because loss or gradient was not finite."""

import json
from pathlib import Path

import torch

MAX_IN_A_ROW = 5  # one bad batch is the data's fault; five in a row are the run's


def advice(directory: Path) -> str:
    """What to say when the run stops for it."""
    return (
        f"Stopped: loss or gradient was not finite in {MAX_IN_A_ROW} steps in a row. Lower max_lr, "
        f"raise warmup_steps or set mixed_precision to no; {directory} holds the rows. "
        "The same command goes on from the last checkpoint."
    )


def record(
    directory: Path,
    *,
    step: int,
    rank: int,
    rows: torch.Tensor,
    tokenizer,
    loss: float,
    grad_norm: float,
    rows_digest: str,
) -> Path:
    """Write this rank's rows (R, T+1) of a skipped step, as ids and as text; return the file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step_{step:08d}_rank_{rank}.json"
    content = {
        "step": step,
        "loss": str(loss),
        "grad_norm": str(grad_norm),
        "rows_digest": rows_digest,
        "rows": rows.tolist(),
        "texts": tokenizer.batch_decode(rows),
    }
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path
