"""The verb `evaluate`: figures of any causal language model, and of a baseline beside it.

    gpt2repro evaluate --model runs/gpt2/final --tasks val,hellaswag,lambada,wikitext2 \
        --baseline openai-community/gpt2 --output results.json

Both models go through the same loader, the same requests and the same batches. Figures published
by others are shown in a column of their own and are never mixed with computed ones.
"""

import json
import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from gpt2repro import UserError
from gpt2repro.commands.parser import DTYPES, OneLineParser, find_device, make_room, named
from gpt2repro.evaluation.published import PUBLISHED, is_the_published_text
from gpt2repro.recipe import Benchmark
from gpt2repro.system import atomic
from gpt2repro.system.text import printable

if TYPE_CHECKING:
    from gpt2repro.data.corpus import Corpus
    from gpt2repro.evaluation.scoring import TaskResult
    from gpt2repro.evaluation.task import Task

TASKS = ("val", *get_args(Benchmark))
TOLERANCE = 0.003  # of a published CORE figure, within which --certify calls ours the same
CONVENTIONS = {
    "completion": ["completion"],
    "lm_eval": ["lm_eval"],
    "both": ["completion", "lm_eval"],
}


def main(argv: list[str]) -> int:
    """Evaluate, print the table, write the JSON. Several processes share the work."""
    arguments = _parse(argv)
    make_room(arguments.output and Path(arguments.output))
    import torch
    from accelerate import PartialState

    from gpt2repro.evaluation.tables import differences, notes, table

    state = PartialState(cpu=arguments.device == "cpu" or not torch.cuda.is_available())
    device = find_device(arguments.device) if arguments.device else state.device
    if any(map(_is_core, arguments.tasks)):
        from gpt2repro.evaluation.core import read_bundle

        read_bundle(arguments.core_dir)
    if arguments.certify:
        return _certify(arguments, device)
    # All of it is opened before any of it runs: a mistake shows now, not after the first model.
    named = {"--model": arguments.model, "--baseline": arguments.baseline}
    models = [_load(name, option, arguments) for option, name in named.items() if name]
    columns, controls = [], []
    for loaded, tasks in zip(models, _tasks_of_models(models, arguments), strict=True):
        loaded.model.to(device)
        columns.append(_score_all(loaded, tasks, arguments.batch_size))
        if arguments.controls:
            controls.append(_score_controls(loaded, tasks, arguments.batch_size))
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
    for name, results, of_name in zip(names, columns, controls, strict=False):
        print(printable("\n" + table([name, *of_name], [results, *of_name.values()], {}, {})))
    if arguments.output:
        _write(arguments, names, columns, difference, published, controls)
    return 0


def _parse(argv: list[str]) -> Namespace:
    parser = OneLineParser(prog="gpt2repro evaluate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=named, help="directory or Hub id of a causal language model")
    add("--baseline", type=named, help="a second model; the table shows both and the difference")
    known = f"of {','.join(TASKS)},core, and lm-evaluation-harness' names; commas between"
    add("--tasks", default="hellaswag,lambada", help=known)
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
    local = parser.add_argument_group("local data (JSON lines) instead of the Hub's")
    for name in get_args(Benchmark):
        about = "its fields are in docs/evaluation.md"
        local.add_argument(f"--{name}_file", type=named, help=about)
    core = parser.add_argument_group("CORE (--tasks core, or core/LABEL for one of its tasks)")
    core.add_argument("--core_dir", type=named, help="directory of the evaluation bundle")
    about = "compare OpenAI's four models with their published CORE; status 1 if one is off"
    core.add_argument("--certify", action="store_true", help=about)
    core.add_argument("--models", type=named, nargs="+", help="those to certify")
    about = "certify under bfloat16 autocast, as the published figures were made"
    core.add_argument("--autocast", action="store_true", help=about)
    how = parser.add_argument_group("conventions")
    about = "score the same rows after contexts that should not help, too"
    how.add_argument("--controls", action="store_true", help=about)
    how.add_argument("--hellaswag_convention", choices=CONVENTIONS, default="both")
    how.add_argument("--wikitext2_stride", type=int, help="tokens; default: the whole context")
    theirs = parser.add_argument_group("tasks of lm-evaluation-harness, with gpt2repro[eval]")
    theirs.add_argument("--num_fewshot", type=int, help="default: each task's own number")
    theirs.add_argument("--tasks_dir", type=named, help="a directory of more task files (YAML)")
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
    _check_models(arguments, parser.get_default("tasks"))
    _check(arguments)
    return arguments


def _check_models(arguments: Namespace, tasks: str) -> None:
    if not arguments.certify:
        if arguments.model is None:
            raise UserError("--model: which one is to be scored?")
        for name in ("models", "autocast"):
            if getattr(arguments, name):
                raise UserError(f"--{name} goes with --certify only")
        return
    others = ("model", "baseline", "limit", "max_length", "controls")
    given = {name: getattr(arguments, name) for name in others} | {
        "tasks": arguments.tasks != tasks
    }
    for name in filter(given.get, given):
        raise UserError(f"--{name}: --certify scores whole models of its own, on CORE alone")
    arguments.tasks = "core"
    known = [name for name in PUBLISHED if "core" in PUBLISHED[name]]
    arguments.models = arguments.models or [f"openai-community/{name}" for name in known]
    for name in arguments.models:
        if Path(name).name not in known:
            raise UserError(f"--models: {name}: published are {', '.join(known)}")


def _check(arguments: Namespace) -> None:
    arguments.tasks = list(dict.fromkeys(filter(None, arguments.tasks.split(","))))
    if not arguments.tasks:
        raise UserError(f"--tasks: none; there are {', '.join(TASKS)}, and those of the harness")
    others = [task for task in arguments.tasks if task not in TASKS and not _is_core(task)]
    if others and not find_spec("lm_eval"):
        raise UserError(
            f"--tasks: {', '.join(others)}: there are {', '.join(TASKS)}; the tasks of "
            "lm-evaluation-harness need `pip install 'gpt2repro[eval]'`"
        )
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


def _is_core(task: str) -> bool:
    return task.partition("/")[0] == "core"


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
    """Each model's tasks, in the same order; rows are read once for all models."""
    from gpt2repro.evaluation import benchmarks

    rows = {
        name: benchmarks.BENCHMARKS[name].read_rows(
            getattr(arguments, f"{name}_file"), arguments.limit
        )
        for name in arguments.tasks
        if name in benchmarks.BENCHMARKS
    }
    corpus = _open_corpus(arguments) if "val" in arguments.tasks else None
    shortest = min(loaded.max_length for loaded in models)
    sequence_length = arguments.sequence_length or shortest
    if sequence_length > shortest:
        raise UserError(f"--sequence_length: a model has {shortest} positions only")
    if (arguments.wikitext2_stride or 0) > shortest:
        raise UserError(f"--wikitext2_stride: a model has {shortest} positions only")
    options: dict[str, dict[str, Any]] = {
        "hellaswag": {"conventions": CONVENTIONS[arguments.hellaswag_convention]},
        "wikitext2": {"stride": arguments.wikitext2_stride},
    }

    def tasks(name: str, loaded: Loaded) -> list["Task"]:
        if name == "val":
            assert corpus is not None
            return [benchmarks.checked(_validation(corpus, loaded, sequence_length, arguments))]
        if _is_core(name):
            return [_core(name, loaded, arguments)]
        if name not in rows:
            return _tasks_of_the_harness(name, loaded, arguments)
        return benchmarks.tasks_of(
            benchmarks.BENCHMARKS[name],
            rows[name],
            loaded.tokenizer,
            max_length=loaded.max_length,
            **options.get(name, {}),
        )

    return [[task for name in arguments.tasks for task in tasks(name, loaded)] for loaded in models]


def _core(name: str, loaded: Loaded, arguments: Namespace) -> "Task":
    from gpt2repro.evaluation.core import open_core

    limits = {"max_length": loaded.max_length, "limit": arguments.limit}
    return open_core(arguments.core_dir, name, loaded.tokenizer, **limits)


def _tasks_of_the_harness(name: str, loaded: Loaded, arguments: Namespace) -> list["Task"]:
    from gpt2repro.evaluation import benchmarks, lm_eval_tasks

    tasks = lm_eval_tasks.open_lm_eval_tasks(
        [name],
        loaded.tokenizer,
        max_length=loaded.max_length,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        tasks_dir=arguments.tasks_dir,
    )
    return [benchmarks.checked(task) for task in tasks]


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


def _score_controls(
    loaded: Loaded, tasks: list["Task"], batch_size: int
) -> dict[str, list["TaskResult"]]:
    """By kind, the tasks that have something to control; the others are named."""
    from gpt2repro.data.token_ids import begin_id
    from gpt2repro.evaluation.controls import KINDS, control
    from gpt2repro.system import ranks

    found = {}
    for kind in KINDS:
        made = {task.name: control(task, kind, begin_id(loaded.tokenizer)) for task in tasks}
        results = _score_all(loaded, [each for each in made.values() if each], batch_size)
        asked = [task for task in tasks if made[task.name]]  # without the requests of each kind
        found[kind] = [replace(r, task=task) for r, task in zip(results, asked, strict=True)]
        for task in tasks:
            left = made[task.name]
            out = len(task.rows) - (len(left.rows) if left else 0)
            if out and ranks.rank() == 0:
                say = f"{loaded.name}: {task.name}: {kind}: nothing to change in {out} rows"
                print(printable(say), file=sys.stderr)
    return found


# --- Certification --------------------------------------------------------------------------------


def _certify(arguments: Namespace, device: Any) -> int:
    """0 if the CORE of every model is the published one, within TOLERANCE; else 1."""
    import torch

    from gpt2repro.evaluation.tables import notes, number
    from gpt2repro.system import ranks

    found: dict[str, dict[str, Any]] = {}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=arguments.autocast)
    for name in arguments.models:
        loaded = _load(name, "--models", arguments)
        loaded.model.to(device)
        tasks = [_core("core", loaded, arguments)]
        with autocast:
            results = _score_all(loaded, tasks, arguments.batch_size)
        ours, published = results[0].estimates["core"], PUBLISHED[Path(name).name]["core"][0]
        same = abs(ours.value - published) <= TOLERANCE
        found[name] = {"value": number(ours.value), "stderr": number(ours.stderr)} | {
            "published": published,
            "certified": same,
        }
        if ranks.rank() == 0:
            print(printable("\n".join(notes(name, results))), file=sys.stderr)
            verdict = f"within {TOLERANCE}" if same else f"NOT within {TOLERANCE}"
            figure = f"core {ours.value:.4f} ± {ours.stderr:.4f}, published {published:.4f}"
            print(printable(f"{name}: {figure}: {verdict}"), flush=True)
    if arguments.output and ranks.rank() == 0:
        _dump({"certification": found}, arguments)
    return 0 if all(each["certified"] for each in found.values()) else 1


# --- The report -----------------------------------------------------------------------------------


def _published_for(arguments: Namespace, sequence_length: int) -> dict[str, tuple[float, str]]:
    """What others published about the OpenAI model that is being evaluated, if one is."""
    for name in (arguments.baseline, arguments.model):
        model = (name or "").removeprefix("openai-community/")
        if model in PUBLISHED:
            found = dict(PUBLISHED[model])
            text = vars(arguments) | {"sequence_length": sequence_length}
            if arguments.limit or not is_the_published_text(text):
                found.pop("val/loss", None)
            if arguments.limit:
                found.pop("core", None)
            return found
    return {}


def _write(arguments: Namespace, names, columns, difference, published, controls) -> None:
    from gpt2repro.evaluation.tables import number, plain, report

    reports = [report(name, results) for name, results in zip(names, columns, strict=True)]
    for each, of_kind in zip(reports, controls, strict=False):
        each["controls"] = {kind: plain(results) for kind, results in of_kind.items()}
    content = reports[0]
    if len(columns) == 2:
        content["baseline"] = reports[1]
        content["difference"] = {
            key: {"value": number(d.value), "stderr": number(d.stderr), "paired": d.paired}
            for key, d in difference.items()
        }
    content["published_not_computed"] = {
        key: {"value": value, "source": source}
        for key, (value, source) in published.items()
        if key in content["results"]
    }
    _dump(content, arguments)


def _dump(content: dict[str, Any], arguments: Namespace) -> None:
    from gpt2repro.system import machine

    content["settings"] = vars(arguments)
    content["environment"] = machine.describe(arguments.device)
    output = Path(arguments.output)
    with atomic.naming(output):
        output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
