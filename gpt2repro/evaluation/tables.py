"""Results as text and as JSON: a column for each model, their difference, the published figures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt2repro.evaluation.estimates import Estimate
from gpt2repro.evaluation.published import is_of_the_published_rows
from gpt2repro.evaluation.row_scores import Difference
from gpt2repro.evaluation.scoring import TaskResult

NUM_NAMED_ROWS = 5  # of the skipped, on the screen; all are in the JSON


def figures(results: list[TaskResult]) -> dict[str, Estimate]:
    return {name: value for result in results for name, value in result.estimates.items()}


@dataclass(frozen=True)
class Table:
    """Figures, a column for each model; their difference; what others published of them."""

    names: Sequence[str]
    values: Sequence[Mapping[str, Estimate]]
    differences: Mapping[str, Difference] = field(default_factory=dict)
    published: Mapping[str, tuple[float, str]] = field(default_factory=dict)  # value, source

    def cells(self) -> list[list[str]]:
        """The first row is the header."""
        rows = [["", *self.names]]
        rows += [[key, *(_cell(v.get(key)) for v in self.values)] for key in self.values[0]]
        if self.differences:
            rows[0].append("difference")
            for row in rows[1:]:
                row.append(_signed_cell(self.differences.get(row[0])))
        if shown := self.published_of_these_rows():
            rows[0].append("published, not computed")
            for row in rows[1:]:
                row.append(f"{shown[row[0]][0]:g}" if row[0] in shown else "")
        return rows

    def published_of_these_rows(self) -> dict[str, tuple[float, str]]:
        """Value and source of what was published of as many rows as were scored here."""
        return {
            key: self.published[key]
            for key, estimate in self.values[0].items()
            if key in self.published and is_of_the_published_rows(key, len(estimate.influence))
        }

    def _sources(self) -> list[str]:
        sources = {source for _, source in self.published_of_these_rows().values()}
        return [f"published by: {source}" for source in sorted(sources)]

    def as_text(self) -> str:
        rows = self.cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *self._sources()])

    def as_markdown(self) -> str:
        cells = [[cell.replace("|", "/") for cell in row] for row in self.cells()]
        cells.insert(1, ["---"] * len(cells[0]))
        lines = [f"| {' | '.join(row)} |" for row in cells]
        return "\n".join([*lines, *(f"\n{source}" for source in self._sources())])

    def as_json(self) -> dict[str, Any]:
        """Plain values; the second model is the baseline."""
        columns = zip(self.names, self.values, strict=True)
        content, *others = [{"model": name, "results": plain(found)} for name, found in columns]
        for baseline in others:
            content["baseline"] = baseline
            content["difference"] = plain(self.differences)
        content["published_not_computed"] = {
            key: {"value": value, "source": source}
            for key, (value, source) in self.published_of_these_rows().items()
        }
        return content


def _cell(estimate: Estimate | None) -> str:
    return f"{_digits(estimate.value)} ± {_digits(estimate.stderr)}" if estimate else "-"


def _signed_cell(difference: Difference | None) -> str:
    if difference is None:  # a figure that one of the models lacks
        return "-"
    mark = "" if difference.paired else " unpaired"
    return f"{_digits(difference.value, '+')} ± {_digits(difference.stderr)}{mark}"


def _digits(value: float, sign: str = "") -> str:
    """Four decimals; of an untrained model's huge perplexity five digits are enough."""
    return f"{value:{sign}.4f}" if abs(value) < 1000 else f"{value:{sign}.5g}"


def notes(name: str, results: list[TaskResult]) -> list[str]:
    """What a reader of the table must know of each task: rows left out, rows cut, cost."""
    lines = []
    for result in results:
        task = result.task
        pace = len(task.rows) / result.seconds
        lines.append(
            f"{name}: {task.name}: {len(task.rows)} of {task.num_rows} rows scored, "
            f"{len(task.skipped)} skipped, {len(task.truncated)} with a truncated context; "
            f"{pace:.1f} rows/s, padding {100 * result.padding_waste:.1f} %" + task.note
        )
        named = list(task.skipped.items())
        lines += [f"  row {row} skipped: {reason}" for row, reason in named[:NUM_NAMED_ROWS]]
        if len(named) > NUM_NAMED_ROWS:
            lines.append(f"  and {len(named) - NUM_NAMED_ROWS} more, all named in --output")
    return lines


def number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def plain(found: Mapping[str, Estimate | Difference]) -> dict[str, dict[str, Any]]:
    """Figures or differences, for JSON."""
    return {
        key: {"value": number(each.value), "stderr": number(each.stderr)}
        | ({"paired": each.paired} if isinstance(each, Difference) else {})
        for key, each in found.items()
    }


def of_tasks(results: list[TaskResult]) -> dict[str, Any]:
    """What a reader must know of each task, for JSON."""
    return {
        result.task.name: {
            "dataset": result.task.dataset and result.task.dataset._asdict(),
            "figures": [*result.estimates],
            "num_rows": result.task.num_rows,
            "num_scored": len(result.task.rows),
            "skipped": result.task.skipped,
            "truncated": result.task.truncated,
            "padding_waste": result.padding_waste,
            "seconds": result.seconds,
        }
        for result in results
    }
