"""What every row of every benchmark added to its figures, in a file; and two such files compared.

The file is parquet, one line a figure and row. `influence` is the row's own value where the figure
is a mean, and its linearized effect, up to a constant, where it is not: all that standard errors
and paired differences take.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpt2repro import UserError
from gpt2repro.data.corpus import digest, in_a_line
from gpt2repro.evaluation.estimates import Estimate
from gpt2repro.evaluation.scoring import TaskResult
from gpt2repro.evaluation.tables import Difference, difference
from gpt2repro.evaluation.task import Task
from gpt2repro.system import atomic

KEY = b"gpt2repro"  # of the schema's metadata: the model, its settings, the figures' values


@dataclass(frozen=True)
class RowScores:
    """A model's figures, the names of the rows that each is of, and a hash of what these are."""

    model: str
    settings: Mapping[str, Any]  # what decides how rows are asked
    estimates: dict[str, Estimate]
    rows: dict[str, list[str]]
    identities: dict[str, str]


def row_scores(model: str, results: Sequence[TaskResult], settings: Mapping[str, Any]) -> RowScores:
    estimates = {name: each for result in results for name, each in result.estimates.items()}
    rows = {
        name: _rows_of(result.task, name, len(each.influence))
        for result in results
        for name, each in result.estimates.items()
    }
    identities = {
        name: digest(result.task.identity()) for result in results for name in result.estimates
    }
    return RowScores(model, settings, estimates, rows, identities)


def _rows_of(task: Task, figure: str, number: int) -> list[str]:
    """The rows that a figure is of: of a group's figures some are one member's."""
    for each in task.members:
        if figure.startswith(each.prefix) and (rows := _rows_of(each, figure, number)):
            return rows
    return [f"{row}" for row in task.rows] if len(task.rows) == number else []


def write_row_scores(path: Path, scores: RowScores) -> None:
    """`path`, whole or not at all."""
    names = [name for name, rows in scores.rows.items() if rows]
    sizes = [len(scores.rows[name]) for name in names]
    columns = {
        "figure": pa.array(np.repeat(names, sizes)).dictionary_encode(),
        "row": pa.array([row for name in names for row in scores.rows[name]]),
        "influence": np.concatenate([scores.estimates[name].influence for name in names]),
    }
    about = {"model": scores.model, "settings": scores.settings}
    values = {name: (scores.estimates[name].value, scores.identities[name]) for name in names}
    about |= {"figures": values}
    table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(about)})
    with atomic.naming(path), atomic.new_file(path) as scratch:
        pq.write_table(table, scratch)


def read_row_scores(path: Path) -> RowScores:
    """Raises UserError, which begins with `--compare`, for another kind of file."""
    with in_a_line(f"--compare {path}: it is no file of --rows"):
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[KEY])
        names, order = np.unique(table["figure"].to_numpy(), return_inverse=True)
        rows, influence = np.array(table["row"].to_pylist(), object), table["influence"].to_numpy()
        parts = {str(name): order == at for at, name in enumerate(names)}
        return RowScores(
            str(about["model"]),
            dict(about["settings"]),
            {n: Estimate(float(v), influence[parts[n]]) for n, (v, _) in about["figures"].items()},
            {name: rows[part].tolist() for name, part in parts.items()},
            {name: str(identity) for name, (_, identity) in about["figures"].items()},
        )


def compared(ours: RowScores, theirs: RowScores) -> dict[str, Difference]:
    """Ours minus theirs for each figure of both.

    Raises:
        UserError: they have none in common, or were asked otherwise.
    """
    common = [name for name in ours.estimates if name in theirs.estimates]
    if not common:
        raise UserError(f"--compare: {ours.model} and {theirs.model} have no figure in common")
    for name, value in ours.settings.items():
        if theirs.settings.get(name) != value:
            other = theirs.settings.get(name)
            raise UserError(f"--compare: rows were asked otherwise: {name} {value} and {other}")
    return {
        name: difference(
            ours.estimates[name],
            theirs.estimates[name],
            paired=ours.identities[name] == theirs.identities[name],
        )
        for name in common
    }
