"""The benchmarks there are: one line each."""

from collections.abc import Collection
from typing import Any

from gpt2repro import UserError
from gpt2repro.evaluation.task import Benchmark, MalformedRow, Row, Task
from gpt2repro.evaluation.tasks import hellaswag, lambada, wikitext

BENCHMARKS: dict[str, Benchmark] = {
    each.name: each for each in (hellaswag.BENCHMARK, lambada.BENCHMARK, wikitext.BENCHMARK)
}


def open_tasks(
    name: str, tokenizer: Any, *, max_length: int, file: str | None = None
) -> list[Task]:
    """A benchmark in all its conventions, its rows from a JSONL file or the Hub.

    Raises:
        UserError: the rows cannot be read, or none can be scored.
    """
    rows = BENCHMARKS[name].read_rows(file)
    return tasks_of(BENCHMARKS[name], rows, tokenizer, max_length=max_length)


def tasks_of(
    benchmark: Benchmark,
    rows: list[Row | MalformedRow],
    tokenizer: Any,
    *,
    max_length: int,
    conventions: Collection[str] | None = None,
    **options: Any,
) -> list[Task]:
    """`rows` for one tokenizer and context length, a task a convention; `options` are the task's.

    Raises:
        UserError: none of the rows can be scored.
    """
    return [
        checked(kind(rows, tokenizer, max_length=max_length, **options))
        for convention, kind in benchmark.conventions.items()
        if conventions is None or convention in conventions
    ]


def checked(task: Task) -> Task:
    """The task, unless none of its rows can be scored: a UserError."""
    if task.rows:
        return task
    first = next((f"; row {row}: {reason}" for row, reason in task.skipped.items()), "")
    raise UserError(f"{task.name}: none of its {task.num_rows} rows can be scored{first}")
