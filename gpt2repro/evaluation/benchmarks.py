"""Every benchmark by its name: ours, or lm-evaluation-harness'."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from gpt2repro import UserError
from gpt2repro.evaluation.task import Task
from gpt2repro.evaluation.tasks.hellaswag import HellaSwagCompletion, read_rows

OURS = (HellaSwagCompletion.name,)


def check_names(names: Sequence[str], option: str) -> None:
    """That there is something to open these by.

    Raises:
        UserError: they are the harness', and it is not installed; begins with `option`.
    """
    theirs = [name for name in names if name not in OURS]
    if theirs and not find_spec("lm_eval"):
        raise UserError(
            f"{option}: {', '.join(theirs)}: the tasks of lm-evaluation-harness need "
            f"`pip install 'gpt2repro[eval]'`; without it there is {', '.join(OURS)}"
        )


def open_tasks(
    names: Sequence[str],
    tokenizer: Any,
    *,
    max_length: int,
    option: str = "--tasks",
    limit: int | None = None,
    hellaswag_file: str | None = None,
    **of_the_harness: Any,
) -> list[Task]:
    """Benchmarks in the order of their names, each once, for one tokenizer and context length.

    Args:
        option: what named them, for messages.
        limit: rows of each at most.
        hellaswag_file: rows of ours, instead of the Hub's.
        of_the_harness: what `open_lm_eval_tasks` takes besides.

    Raises:
        UserError: a name is unknown, rows cannot be read, or none of a benchmark can be scored.
    """
    check_names(names, option)
    opened: dict[str, list[Task]] = {}
    if theirs := [name for name in dict.fromkeys(names) if name not in OURS]:
        from gpt2repro.evaluation.tasks.harness import open_lm_eval_tasks

        how: dict[str, Any] = {
            "max_length": max_length,
            "option": option,
            "limit": limit,
        } | of_the_harness
        opened = open_lm_eval_tasks(theirs, tokenizer, **how)
    if HellaSwagCompletion.name in names:
        rows = read_rows(hellaswag_file)[:limit]
        task = HellaSwagCompletion(rows, tokenizer, max_length=max_length)
        opened[task.name] = [task]
    tasks = [task for name in dict.fromkeys(names) for task in opened[name]]
    return [checked(task) for task in tasks]


def checked(task: Task) -> Task:
    """The task, unless none of its rows can be scored: a UserError."""
    if task.rows:
        return task
    first = next((f"; row {row}: {reason}" for row, reason in task.skipped.items()), "")
    raise UserError(f"{task.name}: none of its {task.num_rows} rows can be scored{first}")
