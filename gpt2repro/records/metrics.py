"""metrics.jsonl: one JSON object a logged step, written as the run goes, read by whoever likes."""

import json
import math
from pathlib import Path
from typing import Any

from gpt2repro.system import atomic


class MetricsLog:
    """`metrics.jsonl`: one JSON object per logged step, on the main process.

    Each line is flushed as it is written: the file can be watched, and a killed run loses nothing.
    A run that resumes at step s first removes the lines of s and later steps, which come again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        # JSON knows no NaN: a non-finite loss is written as null, and its incident says more.
        clean = {k: None if _is_nonfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(clean) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line torn by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def rewind_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep only the lines before `step`, atomically, and return them."""
    kept = [record for record in read_metrics(path) if record["step"] < step]
    with atomic.new_file(path, durable=True) as scratch:
        scratch.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    return kept
