"""Tasks put to a model, one by one or all in one pass."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gpt2repro.evaluation.estimates import Estimate
from gpt2repro.evaluation.likelihoods import loglikelihoods
from gpt2repro.evaluation.task import Task, TaskGroup
from gpt2repro.evaluation.writing import continuations


@dataclass(frozen=True)
class TaskResult:
    """A task's figures, and what it took to get them."""

    task: Task
    estimates: dict[str, Estimate]
    padding_waste: float  # share of the computed positions
    seconds: float


def score_task(
    model: torch.nn.Module, task: Task, *, batch_size: int, **how: Any
) -> TaskResult | None:
    """Put `task` to `model`; `how` goes to `loglikelihoods`. None when told to stop."""
    began = time.perf_counter()
    scores = loglikelihoods(
        model, task.requests, max_length=task.max_length, batch_size=batch_size, **how
    )
    if scores is None:
        return None
    how.pop("trim_logits", None)
    written = continuations(model, task.prompts, batch_size=batch_size, **how)
    if written is None:
        return None
    estimates = task.estimates(replace(scores, written=written))
    return TaskResult(task, estimates, scores.padding_waste, time.perf_counter() - began)


def score_tasks(
    model: torch.nn.Module, tasks: Sequence[Task], *, batch_size: int, **how: Any
) -> dict[str, float] | None:
    """The figures of tasks of one context length by name, with their `_stderr`; alike on all ranks.

    One pass for all of them: a compiled model sees `batch_size` rows in at most
    `likelihoods.NUM_SHAPES` lengths. `how` goes to `loglikelihoods`; None when told to stop.
    """
    result = score_task(model, TaskGroup("tasks", tasks), batch_size=batch_size, **how)
    if result is None:
        return None
    figures: dict[str, float] = {}
    for name, estimate in result.estimates.items():
        figures |= {name: estimate.value, f"{name}_stderr": estimate.stderr}
    return figures
