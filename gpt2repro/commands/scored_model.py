"""A model that is to be scored: opened, asked, and asked after contexts that should not help."""

import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from math import isnan
from typing import TYPE_CHECKING, Any

from gpt2repro import UserError
from gpt2repro.commands.parser import DTYPES
from gpt2repro.system.text import printable

if TYPE_CHECKING:
    from gpt2repro.evaluation.scoring import TaskResult
    from gpt2repro.evaluation.task import Task


@dataclass(frozen=True)
class Loaded:
    """A model on its device, and what its requests are made with."""

    name: str
    model: Any
    tokenizer: Any
    max_length: int


def load_for_scoring(name: str, option: str, arguments: Namespace) -> Loaded:
    """Any causal model that transformers loads, on the CPU, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from gpt2repro.records.saved_models import find_tokenizer, load_causal_lm, locate

    source = locate(name, option)  # once: both are of one model, also of a run that goes on
    model = load_causal_lm(
        source,
        option=option,
        model_class=AutoModelForCausalLM,  # type: ignore[arg-type]
        dtype=getattr(torch, DTYPES[arguments.dtype]),
        trust_remote_code=arguments.trust_remote_code,
    )
    tokenizer = find_tokenizer(
        source,
        arguments.tokenizer,
        option=option,
        trust_remote_code=arguments.trust_remote_code,
    )
    return Loaded(name, model, tokenizer, _context(model, option, arguments))


def _context(model: Any, option: str, arguments: Namespace) -> int:
    fields = ("max_position_embeddings", "n_positions", "n_ctx")
    found = (getattr(model.config, field, None) for field in fields)
    positions: int | None = next(filter(None, found), None)
    if positions is None and arguments.max_length is None:
        raise UserError(f"--max_length: the configuration of {option} does not tell its context")
    if positions and arguments.max_length and arguments.max_length > positions:
        raise UserError(f"--max_length: {option} has {positions} positions only")
    return int(arguments.max_length or positions or 0)


def score_all(loaded: Loaded, tasks: list["Task"], batch_size: int) -> list["TaskResult"]:
    """Every task on all processes, with a progress bar on the first."""
    import torch
    from tqdm import tqdm

    from gpt2repro.evaluation.likelihoods import takes
    from gpt2repro.evaluation.scoring import score_task
    from gpt2repro.records.saved_models import check_ids
    from gpt2repro.system import ranks

    rank, world_size = ranks.rank(), ranks.world_size()
    trim = takes(loaded.model, "logits_to_keep")
    results = []
    for task in tasks:
        for ids in (*(r.ids for r in task.requests), *(p.ids for p in task.prompts)):
            check_ids(ids, loaded.model)
        with tqdm(
            total=(len(task.requests) + len(task.prompts)) // world_size,
            desc=f"{loaded.name}: {task.name}",
            unit=f" {task.asked}s",
            disable=rank != 0,
        ) as bar:
            try:
                result = score_task(
                    loaded.model,
                    task,
                    batch_size=batch_size,
                    rank=rank,
                    world_size=world_size,
                    reduce=ranks.reduce_sum,
                    on_batch=bar.update,
                    trim_logits=trim,
                )
            except torch.OutOfMemoryError as error:
                raise UserError(f"{task.name}: out of memory; use a lower --batch_size") from error
            assert result is not None, "nobody asked to stop"
            if result.estimates and all(isnan(each.value) for each in result.estimates.values()):
                raise UserError(
                    f"{loaded.name}: {task.name}: its logits are not finite: damaged weights, or "
                    "too large numbers for --dtype"
                )
            results.append(result)
    return results


def score_controls(
    loaded: Loaded, tasks: list["Task"], batch_size: int
) -> dict[str, list["TaskResult"]]:
    """By kind, the tasks that have something to control; the others are named."""
    from gpt2repro.data.tokens.token_ids import begin_id
    from gpt2repro.evaluation.controls import KINDS, control
    from gpt2repro.system import ranks

    found = {}
    for kind in KINDS:
        made = {task.name: control(task, kind, begin_id(loaded.tokenizer)) for task in tasks}
        results = score_all(loaded, [each for each in made.values() if each], batch_size)
        asked = [task for task in tasks if made[task.name]]  # without the requests of each kind
        found[kind] = [replace(r, task=task) for r, task in zip(results, asked, strict=True)]
        for task in tasks:
            left = made[task.name]
            out = len(task.rows) - (len(left.rows) if left else 0)
            if out and ranks.rank() == 0:
                say = f"{loaded.name}: {task.name}: {kind}: nothing to change in {out} rows"
                print(printable(say), file=sys.stderr)
    return found
