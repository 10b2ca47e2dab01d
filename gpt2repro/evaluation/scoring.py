"""Evaluation of any causal language model, on any engine, in a training loop or out of it.

A loop calls `validation_loss` and `score_hellaswag` on all ranks; the verb `evaluate` runs the same
tasks through `score_task`. Rows come from local JSONL files or from the Hub.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch.nn import functional as F

from gpt2repro import UserError
from gpt2repro.evaluation.estimates import Estimate
from gpt2repro.evaluation.likelihoods import POSITIONS_AT_ONCE, evaluating, loglikelihoods
from gpt2repro.evaluation.tasks import (
    CompletionHellaSwag,
    LMEvalHellaSwag,
    MalformedRow,
    Row,
    Task,
    wikitext_pages,
)
from gpt2repro.system.patience import patiently
from modeling_gpt2repro import GPT2ReproForCausalLM

Reduce = Callable[[torch.Tensor], torch.Tensor]

# ---------------------------------------------------------------- in a training loop

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class ValidationResult:
    """`loss` in nats per token, the mean over `num_tokens` tokens."""

    loss: float
    num_tokens: int

    def bits_per_byte(self, num_tokens: int, num_bytes: int) -> float:
        """For a text of `num_bytes` bytes in `num_tokens` tokens: how tokenizers compare."""
        return self.loss / math.log(2) * num_tokens / num_bytes


def validation_loss(
    model: torch.nn.Module,
    rows: np.ndarray,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    reduce: Reduce | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> ValidationResult | None:
    """Mean loss of `rows` (N, T+1) of token ids, each predicting its last T. Call on all ranks.

    The same for any batch size, world size and engine, up to float summation: batches of
    consecutive rows are dealt to the ranks in turn, sums and counts are reduced once, and divided
    once. Every forward has the same shape and every rank runs as many: what is missing is filled
    with rows that do not count. Our model computes its own loss, as in training; of any other one
    the (B, T, V) logits are taken.

    `reduce` sums a tensor over the ranks. `should_stop` is polled before each batch and must answer
    alike on all ranks; None is returned when it says so.
    """
    rows = np.asarray(rows)
    assert rows.ndim == 2 and len(rows) > 0, "rows are (N, T+1), at least one"
    device = next(model.parameters()).device
    num_batches = -(-len(rows) // (batch_size * world_size)) * world_size
    sums = torch.zeros(2, dtype=torch.float64)  # nats, tokens
    with evaluating(model):
        for batch in range(rank, num_batches, world_size):
            if should_stop is not None and should_stop():
                return None
            index = np.arange(batch * batch_size, (batch + 1) * batch_size)
            tokens = torch.from_numpy(rows[index % len(rows)].astype(np.int64)).to(device)
            targets = tokens[:, 1:].clone()
            targets[torch.from_numpy(index >= len(rows)).to(device)] = IGNORED
            num_tokens = int((index < len(rows)).sum()) * targets.shape[1]
            # As training has it: a compiler takes rows of another stride for a model of its own.
            nats = _summed_loss(model, tokens[:, :-1].contiguous(), targets, num_tokens)
            if num_tokens:
                sums += torch.tensor([nats, num_tokens], dtype=torch.float64)
    if world_size > 1:
        assert reduce is not None, "several ranks need a reduce"
        sums = reduce(sums.to(device)).cpu()
    return ValidationResult(float(sums[0] / sums[1]), int(sums[1]))


def _summed_loss(
    model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor, num_tokens: int
) -> float:
    """Nats, summed over the `num_tokens` targets (B, T) that are not IGNORED."""
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(bare, GPT2ReproForCausalLM):  # stock GPT-2 would swallow `shift_labels`
        loss = model(input_ids=inputs, shift_labels=targets, skip_logits=True).loss
        return loss.item() * num_tokens
    logits, targets = model(input_ids=inputs).logits.flatten(0, 1), targets.flatten()
    chunks = zip(logits.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True)
    parts = [
        F.cross_entropy(some.float(), wanted, ignore_index=IGNORED, reduction="sum")
        for some, wanted in chunks
    ]
    return torch.stack(parts).double().sum().item()


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
    """Run `task` through `loglikelihoods` (which takes `how`); None when told to stop."""
    began = time.perf_counter()
    scores = loglikelihoods(
        model, task.requests, max_length=task.max_length, batch_size=batch_size, **how
    )
    if scores is None:
        return None
    estimates = task.estimates(scores)
    return TaskResult(task, estimates, scores.padding_waste, time.perf_counter() - began)


def hellaswag_tasks(
    tokenizer, *, max_length: int, hellaswag_file: str | None = None, limit: int | None = None
) -> list[Task]:
    """HellaSwag in both conventions, from a JSONL file or the Hub; raises UserError."""
    rows = read_rows("hellaswag", hellaswag_file, limit)
    conventions = (CompletionHellaSwag, LMEvalHellaSwag)
    tasks = [convention(rows, tokenizer, max_length=max_length) for convention in conventions]
    return [checked(task) for task in tasks]


def score_hellaswag(
    model: torch.nn.Module,
    tasks: Sequence[Task],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    reduce: Reduce | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, float] | None:
    """The figures of `hellaswag_tasks` by name, with their `_stderr`; alike on all ranks.

    One pass for all tasks: a compiled model sees `batch_size` rows in at most
    `loglikelihood.NUM_SHAPES` lengths. None when `should_stop` says so (see `validation_loss`).
    """
    scores = loglikelihoods(
        model,
        [request for task in tasks for request in task.requests],
        max_length=tasks[0].max_length,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        reduce=reduce,
        should_stop=should_stop,
    )
    if scores is None:
        return None
    figures: dict[str, float] = {}
    begin = 0
    for task in tasks:
        end = begin + len(task.requests)
        for name, estimate in task.estimates(scores[begin:end]).items():
            figures |= {name: estimate.value, f"{name}_stderr": estimate.stderr}
        begin = end
    return figures


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class HubData:
    """Where a benchmark's rows are on the Hub."""

    name: str
    config: str | None
    split: str


HUB_DATA = {
    "hellaswag": HubData("Rowan/hellaswag", None, "validation"),
    "lambada": HubData("EleutherAI/lambada_openai", "default", "test"),
    "wikitext2": HubData("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
}


def read_rows(task: str, file: str | None, limit: int | None) -> list[Row | MalformedRow]:
    """The first `limit` rows of a local JSONL file, or else of the benchmark's Hub dataset."""
    rows = read_jsonl(file, task) if file is not None else _read_hub(task)
    if task == "wikitext2" and not any(isinstance(row, dict) and "page" in row for row in rows):
        rows = [{"page": page} for page in wikitext_pages(_lines(rows))]
    return rows[:limit]


def _lines(rows: Iterable[Row | MalformedRow]) -> Iterable[str]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f"wikitext2: row {number} has neither 'page' nor 'text'")
        yield row["text"]


def read_jsonl(file: str, task: str) -> list[Row | MalformedRow]:
    """A row for each line, so that row numbers are line numbers; unreadable lines say why."""
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--{task}_file {file}: {error}") from None
    rows: list[Row | MalformedRow] = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            rows.append(MalformedRow(f"not JSON: {error}" if line.strip() else "an empty line"))
    return rows


def _read_hub(task: str) -> list[Row | MalformedRow]:
    import datasets

    source = HUB_DATA[task]
    advice = f"; give a local copy with --{task}_file"
    try:
        return list(
            patiently(
                lambda: datasets.load_dataset(source.name, source.config, split=source.split),
                f"read {source.name}",
                give_up_after_seconds=300,
                if_unreachable=advice,
                reaches_hub=False,  # it may have come from the cache
            )
        )
    except UserError as error:
        raise UserError(str(error) if advice in str(error) else f"{error}{advice}") from error
    except (OSError, ValueError) as error:  # a cache that cannot be used, a changed dataset
        raise UserError(f"cannot read {source.name}: {error}{advice}") from error


def checked(task: Task) -> Task:
    """The task, unless none of its rows can be scored: a UserError."""
    if task.rows:
        return task
    first = next((f"; row {row}: {reason}" for row, reason in task.skipped.items()), "")
    raise UserError(f"{task.name}: none of its {task.num_rows} rows can be scored{first}")
