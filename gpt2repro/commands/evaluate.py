"""The verb `evaluate`: figures of any causal language model, and of a baseline beside it.

    gpt2repro evaluate --model runs/gpt2/final --tasks val,hellaswag_completion,piqa,wikitext \
        --baseline openai-community/gpt2 --output results.json

Both models go through the same loader, the same requests and the same batches. Figures published
by others are shown in a column of their own and are never mixed with computed ones.
"""

import json
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2repro import UserError
from gpt2repro.commands.parser import DTYPES, OneLineParser, find_device, make_room, named
from gpt2repro.system import atomic
from gpt2repro.system.text import printable

if TYPE_CHECKING:
    from gpt2repro.data.corpus import Corpus
    from gpt2repro.evaluation.scoring import TaskResult
    from gpt2repro.evaluation.task import Task


def main(argv: list[str]) -> int:
    """Evaluate, print the table, write the JSON. Several processes share the work."""
    arguments = _parse(argv)
    make_room(arguments.output and Path(arguments.output))
    import torch
    from accelerate import PartialState

    from gpt2repro.evaluation.tables import differences, notes, table

    state = PartialState(cpu=arguments.device == "cpu" or not torch.cuda.is_available())
    device = find_device(arguments.device) if arguments.device else state.device
    # All of it is opened before any of it runs: a mistake shows now, not after the first model.
    named = {"--model": arguments.model, "--baseline": arguments.baseline}
    models = [_load(name, option, arguments) for option, name in named.items() if name]
    columns = []
    for loaded, tasks in zip(models, _tasks_of_models(models, arguments), strict=True):
        loaded.model.to(device)
        columns.append(_score_all(loaded, tasks, arguments.batch_size))
        loaded.model.to("cpu")
    if not state.is_main_process:
        return 0
    names = [loaded.name for loaded in models]
    difference = differences(*columns) if len(columns) == 2 else {}
    context = arguments.sequence_length or min(loaded.max_length for loaded in models)
    published = _published_for(arguments, context)
    print(printable(table(names, columns, difference, published)))
    for name, results in zip(names, columns, strict=True):
        print(printable("\n".join(notes(name, results))), file=sys.stderr)
    if arguments.output:
        _write(arguments, names, columns, difference, published)
    return 0


def _parse(argv: list[str]) -> Namespace:
    parser = OneLineParser(prog="gpt2repro evaluate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=named, required=True, help="directory or Hub id of a causal language model")
    add("--baseline", type=named, help="a second model; the table shows both and the difference")
    known = "val, hellaswag_completion, and lm-evaluation-harness' names; commas between"
    add("--tasks", default="hellaswag_completion", help=known)
    add("--limit", type=int, help="score the first N rows of each task only")
    add("--batch_size", type=int, default=16, help="rows of one forward on one process")
    add("--max_length", type=int, help="context in tokens; default: the model's positions")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", help="such as cuda, cuda:1, cpu; default: the GPU if there is one")
    add("--tokenizer", type=named, help="default: the one beside each model")
    add(
        "--trust_remote_code",
        action="store_true",
        help="run code that comes with model or tokenizer",
    )
    add("--output", type=named, help="write everything to this JSON file")
    add("--hellaswag_file", type=named, help="JSON lines for hellaswag_completion, not the Hub's")
    theirs = parser.add_argument_group("tasks of lm-evaluation-harness, with gpt2repro[eval]")
    theirs.add_argument("--num_fewshot", type=int, help="default: each task's own number")
    theirs.add_argument("--tasks_dir", type=named, help="a directory of more task files (YAML)")
    theirs.add_argument("--stride", type=int, help="of whole texts, tokens; default: the context")
    val = parser.add_argument_group("held-out text of --tasks val")
    val.add_argument("--dataset_name", type=named, default="HuggingFaceFW/fineweb-edu")
    val.add_argument("--dataset_config", help="default: sample-10BT for FineWeb-Edu")
    val.add_argument("--dataset_split", default="train")
    val.add_argument("--dataset_revision")
    val.add_argument("--data_files", type=named, nargs="+")
    val.add_argument("--text_column", default="text")
    val.add_argument("--document", choices=("file", "line"), help="of local .txt and .md files")
    val.add_argument("--num_validation_units", type=int, help="default: 100 for FineWeb-Edu")
    val.add_argument("--validation_tokens", type=int, default=10_485_760)
    val.add_argument("--sequence_length", type=int, help="default: the context of both models")
    arguments = parser.parse_args(argv)
    if arguments.dataset_name == parser.get_default("dataset_name"):
        arguments.dataset_config = arguments.dataset_config or "sample-10BT"
        if arguments.num_validation_units is None:
            arguments.num_validation_units = 100
    _check(arguments)
    return arguments


def _check(arguments: Namespace) -> None:
    from gpt2repro.evaluation.benchmarks import check_names

    arguments.tasks = list(dict.fromkeys(filter(None, arguments.tasks.split(","))))
    if not arguments.tasks:
        raise UserError("--tasks: none are named")
    check_names([task for task in arguments.tasks if task != "val"], "--tasks")
    if arguments.tasks_dir and not Path(arguments.tasks_dir).is_dir():
        raise UserError(f"--tasks_dir {arguments.tasks_dir}: no such directory")
    fewshot = arguments.num_fewshot
    if fewshot is not None and fewshot < 0:
        raise UserError(f"--num_fewshot {fewshot}: must be at least 0")
    if "val" in arguments.tasks and arguments.num_validation_units is None:
        raise UserError(
            "--num_validation_units: say how many the run held out of "
            f"{arguments.dataset_name}; its recipe.yaml has the number"
        )
    for name, value in vars(arguments).items():
        counts = isinstance(value, int) and not isinstance(value, bool)
        if counts and value < 1 and name != "num_fewshot":
            raise UserError(f"--{name} {value}: must be at least 1")


# --- Models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A model on its device, and what its requests are made with."""

    name: str
    model: Any
    tokenizer: Any
    max_length: int


def _load(name: str, option: str, arguments: Namespace) -> Loaded:
    """Any causal model that transformers loads, on the CPU, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from gpt2repro.records.saved_models import find_tokenizer, load_causal_lm

    model = load_causal_lm(
        name,
        option=option,
        model_class=AutoModelForCausalLM,  # type: ignore[arg-type]
        dtype=getattr(torch, DTYPES[arguments.dtype]),
        trust_remote_code=arguments.trust_remote_code,
    )
    tokenizer = find_tokenizer(
        name, arguments.tokenizer, trust_remote_code=arguments.trust_remote_code
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


# --- Tasks ----------------------------------------------------------------------------------------


def _tasks_of_models(models: list[Loaded], arguments: Namespace) -> list[list["Task"]]:
    """Each model's tasks, in the same order."""
    from gpt2repro.evaluation import benchmarks

    corpus = _open_corpus(arguments) if "val" in arguments.tasks else None
    shortest = min(loaded.max_length for loaded in models)
    sequence_length = arguments.sequence_length or shortest
    if sequence_length > shortest:
        raise UserError(f"--sequence_length: a model has {shortest} positions only")
    if (arguments.stride or 0) > shortest:
        raise UserError(f"--stride: a model has {shortest} positions only")
    named = [name for name in arguments.tasks if name != "val"]
    found = []
    for loaded in models:
        tasks = benchmarks.open_tasks(
            named,
            loaded.tokenizer,
            max_length=loaded.max_length,
            limit=arguments.limit,
            hellaswag_file=arguments.hellaswag_file,
            num_fewshot=arguments.num_fewshot,
            tasks_dir=arguments.tasks_dir,
            stride=arguments.stride,
        )
        if corpus is not None:
            val = _validation(corpus, loaded, sequence_length, arguments)
            tasks.insert(0, benchmarks.checked(val))
        found.append(tasks)
    return found


def _validation(
    corpus: "Corpus", loaded: Loaded, sequence_length: int, arguments: Namespace
) -> "Task":
    from gpt2repro.data.encoder import BulkEncoder
    from gpt2repro.data.held_out import validation_set
    from gpt2repro.evaluation.tasks.held_out import Validation

    held_out = validation_set(
        corpus,
        BulkEncoder(loaded.tokenizer),
        sequence_length=sequence_length,
        num_units=arguments.num_validation_units,
        max_tokens=arguments.validation_tokens,
    )
    return Validation(
        held_out.rows[: arguments.limit],
        bytes_per_token=held_out.num_bytes / held_out.num_tokens,
    )


def _open_corpus(arguments: Namespace) -> "Corpus":
    from gpt2repro.data.opening import open_corpus

    return open_corpus(
        arguments.dataset_name,
        config=arguments.dataset_config,
        split=arguments.dataset_split,
        revision=arguments.dataset_revision,
        data_files=arguments.data_files,
        text_column=arguments.text_column,
        document=arguments.document,
        if_unreachable="; give a local dataset with --dataset_name",
    )


def _score_all(loaded: Loaded, tasks: list["Task"], batch_size: int) -> list["TaskResult"]:
    """Every task on all processes, with a progress bar on the first."""
    import torch
    from tqdm import tqdm

    from gpt2repro.evaluation.likelihoods import takes
    from gpt2repro.evaluation.scoring import score_task
    from gpt2repro.system import ranks

    rank, world_size = ranks.rank(), ranks.world_size()
    trim = takes(loaded.model, "logits_to_keep")
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


# --- The report -----------------------------------------------------------------------------------


def _published_for(arguments: Namespace, sequence_length: int) -> dict[str, tuple[float, str]]:
    """What others published about the OpenAI model that is being evaluated, if one is."""
    from gpt2repro.evaluation.published import PUBLISHED, is_the_published_text

    for name in (arguments.baseline, arguments.model):
        model = (name or "").removeprefix("openai-community/")
        if model in PUBLISHED:
            found = dict(PUBLISHED[model])
            text = vars(arguments) | {"sequence_length": sequence_length}
            if arguments.limit or not is_the_published_text(text):
                found.pop("val/loss", None)
            return found
    return {}


def _write(arguments: Namespace, names, columns, difference, published) -> None:
    from gpt2repro.evaluation.tables import number, report
    from gpt2repro.system import machine

    content = report(names[0], columns[0])
    if len(columns) == 2:
        content["baseline"] = report(names[1], columns[1])
        content["difference"] = {
            key: {"value": number(d.value), "stderr": number(d.stderr), "paired": d.paired}
            for key, d in difference.items()
        }
    content["published_not_computed"] = {
        key: {"value": value, "source": source}
        for key, (value, source) in published.items()
        if key in content["results"]
    }
    content["settings"] = vars(arguments)
    content["environment"] = machine.describe(arguments.device)
    output = Path(arguments.output)
    with atomic.naming(output):
        output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
