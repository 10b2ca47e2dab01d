"""What every row of every benchmark added to its figures: two models compared by it, and its file.

The file is parquet, one line a figure and row. `influence` is the row's own value where the figure
is a mean, and its linearized effect, up to a constant, where it is not: all that standard errors
and paired differences take.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpt2repro import UserError
from gpt2repro.data.corpora.corpus import digest, in_a_line
from gpt2repro.evaluation.estimates import Estimate
from gpt2repro.evaluation.scoring import TaskResult
from gpt2repro.evaluation.task import Task
from gpt2repro.system import atomic

KEY = b"gpt2repro"  # of the schema's metadata: the model, its settings, the figures' values


class Figure(NamedTuple):
    """An estimate, the names of the rows that it is of, and a hash of what these are."""

    estimate: Estimate
    rows: list[str]
    identity: str


@dataclass(frozen=True)
class Scored:
    """A model's figures by their names, and what decides how their rows are asked."""

    model: str
    settings: Mapping[str, Any]
    figures: Mapping[str, Figure]

    @property
    def estimates(self) -> dict[str, Estimate]:
        return {name: figure.estimate for name, figure in self.figures.items()}


def scored(model: str, results: Sequence[TaskResult], settings: Mapping[str, Any]) -> Scored:
    figures = {}
    for result in results:
        identity = digest(result.task.identity())
        for name, estimate in result.estimates.items():
            rows = _rows_of(result.task, name, len(estimate.influence))
            figures[name] = Figure(estimate, rows, identity)
    return Scored(model, settings, figures)


def _rows_of(task: Task, figure: str, number: int) -> list[str]:
    """The rows that a figure is of: of a group's figures some are one member's."""
    for each in task.members:
        if figure.startswith(each.prefix) and (rows := _rows_of(each, figure, number)):
            return rows
    return [f"{row}" for row in task.rows] if len(task.rows) == number else []


class Difference(NamedTuple):
    """Model minus baseline. Paired where both scored the same examples: then the examples'
    common difficulty cancels, and the standard error is that of the mean of differences."""

    value: float
    stderr: float
    paired: bool


def differences(ours: Scored, theirs: Scored) -> dict[str, Difference]:
    """For each figure that both models have."""
    found = {}
    for name, (one, _, identity) in ours.figures.items():
        if name in theirs.figures:
            other, _, of_other = theirs.figures[name]
            # A task may leave some of the same rows out of a figure.
            paired = identity == of_other and len(one.influence) == len(other.influence)
            stderr = (one - other).stderr if paired else math.hypot(one.stderr, other.stderr)
            found[name] = Difference(one.value - other.value, stderr, paired)
    return found


# --- Files ----------------------------------------------------------------------------------------


def write_row_scores(path: Path, scores: Scored) -> None:
    """`path`, whole or not at all."""
    figures = {name: figure for name, figure in scores.figures.items() if figure.rows}
    names = [name for name, each in figures.items() for _ in each.rows]
    columns = {
        "figure": pa.array(names, pa.string()).dictionary_encode(),
        "row": [row for each in figures.values() for row in each.rows],
        "influence": np.concatenate([[], *(f.estimate.influence for f in figures.values())]),
    }
    about = {
        "model": scores.model,
        "settings": scores.settings,
        "figures": {n: (each.estimate.value, each.identity) for n, each in figures.items()},
    }
    table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(about)})
    with atomic.naming(path), atomic.new_file(path) as scratch:
        pq.write_table(table, scratch)


def read_row_scores(path: Path) -> Scored:
    """Raises UserError, which begins with `--compare`, for another kind of file."""
    with in_a_line(f"--compare {path}: it is no file of --rows"):
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[KEY])
        names, rows = (np.array(table[n].to_pylist(), object) for n in ("figure", "row"))
        influence, figures = table["influence"].to_numpy(), {}
        for name, (value, identity) in about["figures"].items():
            own = names == name
            estimate = Estimate(float(value), influence[own])
            figures[name] = Figure(estimate, rows[own].tolist(), str(identity))
        return Scored(str(about["model"]), dict(about["settings"]), figures)


def compared(ours: Scored, theirs: Scored) -> dict[str, Difference]:
    """The differences of two files.

    Raises:
        UserError: they have no figure in common, or were asked otherwise.
    """
    for name, value in ours.settings.items():
        if (other := theirs.settings.get(name)) != value:
            raise UserError(f"--compare: rows were asked otherwise: {name} {value} and {other}")
    found = differences(ours, theirs)
    if not found:
        raise UserError(f"--compare: {ours.model} and {theirs.model} have no figure in common")
    return found
