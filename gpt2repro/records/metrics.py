"""metrics.jsonl: one JSON object a logged step, written as the run goes, read by whoever likes."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gpt2repro.system import atomic

# What of a line a machine decides, and not the run: two launches of one run differ in it.
TIMINGS = frozenset(
    ("tokens_per_second", "data_wait_fraction", "mfu", "save_seconds", "peak_memory_gib")
)


class MetricsLine(BaseModel):
    """A line of the file: beside the step and two texts there are figures, or null for one."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, float | None]

    step: int = Field(ge=0)
    rows_digest: str | None = None
    sample: str | None = None


class MetricsLog:
    """`metrics.jsonl`: one JSON object per logged step, on the main process.

    Each line is flushed as it is written, so that the file can be watched and a killed run loses
    nothing; to the disk itself at each checkpoint, so that a power failure loses nothing that the
    checkpoint knows of. A run that resumes at step s first removes the lines of s and later steps,
    which come again.

    Attributes:
        num_lines: how many the file has.
    """

    def __init__(self, path: Path, num_lines: int = 0) -> None:
        self.path, self.num_lines = path, num_lines
        self._file = path.open("a+", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        # JSON knows no NaN: a non-finite loss is written as null, and its incident says more.
        clean = {k: None if _is_nonfinite(v) else v for k, v in record.items()}
        with atomic.naming(self.path):
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        self.num_lines += 1

    def make_durable(self) -> None:
        """Flush the lines to the disk. If another file or none is in its place, it is there again.

        An editor, or a copy from elsewhere, puts a new file there.
        """
        with atomic.naming(self.path):
            os.fsync(self._file.fileno())
            if not atomic.is_at(self._file, self.path):  # we hold a file with what was written
                self._file.seek(0)
                with atomic.new_file(self.path, durable=True) as scratch:
                    scratch.write_text(self._file.read(), encoding="utf-8")
                self._file.close()
                self._file = self.path.open("a+", encoding="utf-8")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that could not be written, which is told
            self._file.close()


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that can be read."""
    return read_lines(path)[0]


def read_lines(
    path: Path, kind: type[BaseModel] = MetricsLine
) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of a metrics.jsonl, and the numbers of those that cannot be read, from 1.

    Half a line at the end is being written, or was when a kill came: it is neither.
    """
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    records, bad = [], []
    if rest.endswith(b"}"):
        lines.append(rest)
    for number, line in enumerate(lines, 1):
        try:
            kind.model_validate_json(line)
            records.append(json.loads(line))
        except ValueError:
            bad.append(number)
    return records, bad


def comparable(metrics: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines whose `val_loss` compares with the last one: a launch may validate on more text."""
    validated = [line for line in metrics if is_number(line.get("val_loss"))]
    return [line for line in validated if line.get("val_tokens") == validated[-1].get("val_tokens")]


def scored(fields: Iterable[str]) -> list[str]:
    """The figures of benchmarks among fields of a line: those that have a standard error."""
    names = [*fields]
    return [name for name in names if f"{name}_stderr" in names]


def is_number(value: Any) -> bool:
    """A figure: neither null nor missing, and finite."""
    return isinstance(value, int | float) and math.isfinite(value)


def rewind_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep only the lines before `step`, atomically, and return them."""
    kept = [record for record in read_metrics(path) if record["step"] < step]
    with atomic.new_file(path, durable=True) as scratch:
        scratch.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    return kept
