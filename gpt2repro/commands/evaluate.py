"""The verb `evaluate`: figures of any causal language model, and of a baseline beside it.

    gpt2repro evaluate --model runs/gpt2/final --tasks val,hellaswag,lambada,wikitext2 \
        --baseline openai-community/gpt2 --output results.json

Both models go through the same loader, the same requests and the same batches. Figures published
by others are shown in a column of their own and are never mixed with computed ones.
"""

import inspect
import json
import math
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.data.corpus import Corpus, open_corpus
from gpt2repro.data.stream import validation_set
from gpt2repro.data.tokenizer import bulk_encoder
from gpt2repro.evaluation.estimates import Estimate
from gpt2repro.evaluation.scoring import TaskResult, checked, read_rows, score_task
from gpt2repro.evaluation.tasks import (
    CompletionHellaSwag,
    Lambada,
    LMEvalHellaSwag,
    Task,
    Validation,
    WikiText2,
)
from gpt2repro.records.saved_models import find_tokenizer, load_causal_lm
from gpt2repro.system import machine, ranks

TASKS = ("val", "hellaswag", "lambada", "wikitext2")
CONVENTIONS: dict[str, list[type[Task]]] = {
    "completion": [CompletionHellaSwag],
    "lm_eval": [LMEvalHellaSwag],
    "both": [CompletionHellaSwag, LMEvalHellaSwag],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NUM_NAMED_ROWS = 5  # of the skipped, on the screen; all are in the JSON

NANOGPT = "karpathy/build-nanogpt"
HARNESS = "lm-evaluation-harness, as reported by build-nanogpt and the harness' issue 2159"
# Of OpenAI's weights; name of the model on the Hub -> figure -> (value, who published it).
PUBLISHED: dict[str, dict[str, tuple[float, str]]] = {
    "gpt2": {
        "val/loss": (3.2924, NANOGPT),
        "hellaswag/completion_acc": (0.2859, NANOGPT),
        "hellaswag/completion_acc_norm": (0.2955, NANOGPT),
        "hellaswag/lm_eval_acc": (0.2892, HARNESS),
        "hellaswag/lm_eval_acc_norm": (0.3114, HARNESS),
        "lambada/acc": (0.3256, HARNESS),
        "lambada/perplexity": (40.06, HARNESS),
    },
    "gpt2-medium": {"hellaswag/completion_acc_norm": (0.3752, NANOGPT)},
    "gpt2-large": {"hellaswag/completion_acc_norm": (0.4320, NANOGPT)},
    "gpt2-xl": {"hellaswag/completion_acc_norm": (0.4889, NANOGPT)},
}


def parse_arguments(argv: list[str]) -> Namespace:
    parser = OneLineParser(prog="gpt2repro evaluate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="directory or Hub id of a causal language model")
    add("--baseline", help="a second model; the table shows both and the difference")
    add("--tasks", default="hellaswag,lambada", help=f"of {','.join(TASKS)}; commas between")
    add("--limit", type=int, help="score the first N rows of each task only")
    add("--batch_size", type=int, default=16, help="rows of one forward on one process")
    add("--max_length", type=int, help="context in tokens; default: the model's positions")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", help="such as cuda, cuda:1, cpu; default: the GPU if there is one")
    add("--tokenizer", help="default: the one beside each model")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--output", help="write everything to this JSON file")
    local = parser.add_argument_group("local data (JSON lines) instead of the Hub's")
    local.add_argument("--hellaswag_file", help="rows of the official schema")
    local.add_argument("--lambada_file", help="rows with 'text'")
    local.add_argument("--wikitext2_file", help="articles as 'page', or lines as 'text'")
    how = parser.add_argument_group("conventions")
    how.add_argument("--hellaswag_convention", choices=CONVENTIONS, default="both")
    how.add_argument("--wikitext2_stride", type=int, help="tokens; default: the whole context")
    val = parser.add_argument_group("held-out text of --tasks val")
    val.add_argument("--dataset_name", default="HuggingFaceFW/fineweb-edu")
    val.add_argument("--dataset_config", help="default: sample-10BT for FineWeb-Edu")
    val.add_argument("--dataset_split", default="train")
    val.add_argument("--dataset_revision")
    val.add_argument("--data_files", nargs="+")
    val.add_argument("--text_column", default="text")
    val.add_argument("--num_validation_units", type=int, default=100)
    val.add_argument("--validation_tokens", type=int, default=10_485_760)
    val.add_argument("--sequence_length", type=int, help="default: the context of both models")
    arguments = parser.parse_args([_underscored(argument) for argument in argv])
    if arguments.dataset_name == parser.get_default("dataset_name"):
        arguments.dataset_config = arguments.dataset_config or "sample-10BT"
    _check(arguments)
    return arguments


def _underscored(argument: str) -> str:
    """--batch-size as --batch_size: both spellings are common."""
    name, equals, value = argument.partition("=")
    return (
        name.replace("-", "_").replace("__", "--", 1) + equals + value
        if (argument.startswith("--"))
        else argument
    )


def _check(arguments: Namespace) -> None:
    arguments.tasks = list(dict.fromkeys(filter(None, arguments.tasks.split(","))))
    unknown = [task for task in arguments.tasks if task not in TASKS]
    if unknown or not arguments.tasks:
        raise UserError(f"--tasks: {unknown or 'none'}; there are {', '.join(TASKS)}")
    for name, value in vars(arguments).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")


# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class Loaded:
    """A model on its device, and what its requests are made with."""

    name: str
    model: torch.nn.Module
    tokenizer: Any
    max_length: int


def load(name: str, option: str, arguments: Namespace) -> Loaded:
    """Any causal model that transformers loads, on the CPU, and its tokenizer."""
    model = load_causal_lm(
        name,
        option=option,
        model_class=AutoModelForCausalLM,  # type: ignore[arg-type]
        dtype=DTYPES[arguments.dtype],
        trust_remote_code=arguments.trust_remote_code,
    )
    tokenizer = find_tokenizer(name, arguments.tokenizer)
    return Loaded(name, model, tokenizer, _context(model, option, arguments))


def _context(model: torch.nn.Module, option: str, arguments: Namespace) -> int:
    fields = ("max_position_embeddings", "n_positions", "n_ctx")
    found = (getattr(model.config, field, None) for field in fields)
    positions: int | None = next(filter(None, found), None)
    if positions is None and arguments.max_length is None:
        raise UserError(f"--max_length: the configuration of {option} does not tell its context")
    if positions and arguments.max_length and arguments.max_length > positions:
        raise UserError(f"--max_length: {option} has {positions} positions only")
    return int(arguments.max_length or positions or 0)


# ---------------------------------------------------------------- tasks


def tasks_of(models: list[Loaded], arguments: Namespace) -> list[list[Task]]:
    """Each model's tasks, in the same order; rows are read once for all models."""
    rows = {
        name: read_rows(name, getattr(arguments, f"{name}_file"), arguments.limit)
        for name in arguments.tasks
        if name != "val"
    }
    corpus = _open_corpus(arguments) if "val" in arguments.tasks else None
    shortest = min(loaded.max_length for loaded in models)
    sequence_length = arguments.sequence_length or shortest
    stride = arguments.wikitext2_stride
    if sequence_length > shortest:
        raise UserError(f"--sequence_length: a model has {shortest} positions only")
    if (stride or 0) > shortest:
        raise UserError(f"--wikitext2_stride: a model has {shortest} positions only")

    def tasks(name: str, loaded: Loaded) -> list[Task]:
        how = {"tokenizer": loaded.tokenizer, "max_length": loaded.max_length}
        if name == "val":
            assert corpus is not None
            return [_validation(corpus, loaded, sequence_length, arguments)]
        if name == "hellaswag":
            kinds = CONVENTIONS[arguments.hellaswag_convention]
            return [kind(rows[name], **how) for kind in kinds]
        if name == "lambada":
            return [Lambada(rows[name], **how)]
        return [WikiText2(rows[name], **how, stride=stride)]

    return [
        [checked(task) for name in arguments.tasks for task in tasks(name, loaded)]
        for loaded in models
    ]


def _validation(
    corpus: Corpus, loaded: Loaded, sequence_length: int, arguments: Namespace
) -> Validation:
    held_out = validation_set(
        corpus,
        bulk_encoder(loaded.tokenizer),
        sequence_length=sequence_length,
        num_units=arguments.num_validation_units,
        max_tokens=arguments.validation_tokens,
    )
    return Validation(
        held_out.rows[: arguments.limit],
        bytes_per_token=held_out.num_bytes / held_out.num_tokens,
    )


def _open_corpus(arguments: Namespace) -> Corpus:
    return open_corpus(
        arguments.dataset_name,
        config=arguments.dataset_config,
        split=arguments.dataset_split,
        revision=arguments.dataset_revision,
        data_files=arguments.data_files,
        text_column=arguments.text_column,
        if_unreachable="; give a local dataset with --dataset_name",
    )


def score_all(loaded: Loaded, tasks: list[Task], batch_size: int) -> list[TaskResult]:
    """Every task on all processes, with a progress bar on the first."""
    rank, world_size = ranks.rank(), ranks.world_size()
    trim = "logits_to_keep" in inspect.signature(type(loaded.model).forward).parameters
    results = []
    for task in tasks:
        with tqdm(
            total=len(task.requests) // world_size,
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
            results.append(result)
    return results


# ---------------------------------------------------------------- the report


def figures(results: list[TaskResult]) -> dict[str, Estimate]:
    return {name: value for result in results for name, value in result.estimates.items()}


@dataclass(frozen=True)
class Difference:
    """Model minus baseline. Paired where both scored the same examples: then the examples'
    common difficulty cancels, and the standard error is that of the mean of differences."""

    value: float
    stderr: float
    paired: bool


def differences(ours: list[TaskResult], theirs: list[TaskResult]) -> dict[str, Difference]:
    found = {}
    for one, other in zip(ours, theirs, strict=True):
        paired = one.task.identity() == other.task.identity()
        for name, a in one.estimates.items():
            b = other.estimates[name]
            stderr = (a - b).stderr if paired else math.hypot(a.stderr, b.stderr)
            found[name] = Difference(a.value - b.value, stderr, paired)
    return found


def published_for(arguments: Namespace) -> dict[str, tuple[float, str]]:
    """What others published about the OpenAI model that is being evaluated, if one is."""
    for name in (arguments.baseline, arguments.model):
        model = (name or "").removeprefix("openai-community/")
        if model in PUBLISHED:
            found = dict(PUBLISHED[model])
            comparable = (
                arguments.dataset_name == "HuggingFaceFW/fineweb-edu"
                and arguments.dataset_config == "sample-10BT"
                and arguments.num_validation_units == 100
            )
            if not comparable:
                found.pop("val/loss", None)
            return found
    return {}


def table(
    names: list[str],
    columns: list[list[TaskResult]],
    difference: dict[str, Difference],
    published: dict[str, tuple[float, str]],
) -> str:
    """The figures as text: a column for each model, then the difference, then the published."""
    values = [figures(results) for results in columns]
    rows = [["", *names]]
    rows += [
        [key, *(f"{_digits(v[key].value)} ± {_digits(v[key].stderr)}" for v in values)]
        for key in values[0]
    ]
    if difference:
        rows[0].append("difference")
        for row in rows[1:]:
            d = difference[row[0]]
            mark = "" if d.paired else " unpaired"
            row.append(f"{_digits(d.value, '+')} ± {_digits(d.stderr)}{mark}")
    shown = {key: source for key, source in published.items() if key in values[0]}
    if shown:
        rows[0].append("published, not computed")
        for row in rows[1:]:
            row.append(f"{shown[row[0]][0]:g}" if row[0] in shown else "")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    sources = sorted({source for _, source in shown.values()})
    return "\n".join([*lines, *(f"published by: {source}" for source in sources)])


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
            f"{pace:.1f} rows/s, padding {100 * result.padding_waste:.1f} %"
            + (f"; stride {task.stride}" if isinstance(task, WikiText2) else "")
        )
        named = list(task.skipped.items())
        lines += [f"  row {row} skipped: {reason}" for row, reason in named[:NUM_NAMED_ROWS]]
        if len(named) > NUM_NAMED_ROWS:
            lines.append(f"  and {len(named) - NUM_NAMED_ROWS} more, all named in --output")
    return lines


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def report(name: str, results: list[TaskResult]) -> dict[str, Any]:
    """One model's part of the JSON file."""
    return {
        "model": name,
        "results": {
            key: {"value": _number(e.value), "stderr": _number(e.stderr)}
            for key, e in figures(results).items()
        },
        "tasks": {
            result.task.name: {
                "num_rows": result.task.num_rows,
                "num_scored": len(result.task.rows),
                "skipped": result.task.skipped,
                "truncated": result.task.truncated,
                "padding_waste": result.padding_waste,
                "seconds": result.seconds,
            }
            for result in results
        },
    }


def main(argv: list[str]) -> int:
    """Evaluate, print the table, write the JSON. Several processes share the work."""
    arguments = parse_arguments(argv)
    _make_room(arguments.output)
    state = PartialState(cpu=arguments.device == "cpu" or not torch.cuda.is_available())
    device = torch.device(arguments.device) if arguments.device else state.device
    # All of it is opened before any of it runs: a mistake shows now, not after the first model.
    named = {"--model": arguments.model, "--baseline": arguments.baseline}
    models = [load(name, option, arguments) for option, name in named.items() if name]
    columns = []
    for loaded, tasks in zip(models, tasks_of(models, arguments), strict=True):
        loaded.model.to(device)
        columns.append(score_all(loaded, tasks, arguments.batch_size))
        loaded.model.to("cpu")
    if not state.is_main_process:
        return 0
    names = [loaded.name for loaded in models]
    difference = differences(*columns) if len(columns) == 2 else {}
    published = published_for(arguments)
    print(table(names, columns, difference, published))
    for name, results in zip(names, columns, strict=True):
        print("\n".join(notes(name, results)), file=sys.stderr)
    if arguments.output:
        _write(arguments, names, columns, difference, published)
    return 0


def _make_room(output: str | None) -> None:
    """Find out before the work whether the JSON file can be written."""
    if output is None:
        return
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).open("a", encoding="utf-8").close()
    except OSError as error:
        raise UserError(f"--output {output}: {error}") from error


def _write(arguments: Namespace, names, columns, difference, published) -> None:
    content = report(names[0], columns[0])
    if len(columns) == 2:
        content["baseline"] = report(names[1], columns[1])
        content["difference"] = {
            key: {"value": _number(d.value), "stderr": _number(d.stderr), "paired": d.paired}
            for key, d in difference.items()
        }
    content["published_not_computed"] = {
        key: {"value": value, "source": source}
        for key, (value, source) in published.items()
        if key in content["results"]
    }
    content["settings"] = vars(arguments)
    content["environment"] = machine.describe(arguments.device)
    Path(arguments.output).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
