"""The verb `evaluate`: figures of any causal language model, and of a baseline beside it.

    gpt2repro evaluate --model runs/gpt2/final --tasks val,hellaswag_completion,piqa,wikitext \
        --baseline openai-community/gpt2 --output results.json results.md results.svg

Both models go through the same loader, the same requests and the same batches. Figures published
by others are shown in a column of their own and are never mixed with computed ones.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2repro import UserError
from gpt2repro.commands.parser import DTYPES, OneLineParser, find_device, make_room, named
from gpt2repro.system import atomic
from gpt2repro.system.text import printable

if TYPE_CHECKING:
    from gpt2repro.commands.scored_model import Loaded
    from gpt2repro.data.corpora.corpus import Corpus
    from gpt2repro.evaluation.scoring import TaskResult
    from gpt2repro.evaluation.tables import Table
    from gpt2repro.evaluation.task import Task

PICTURES = (".svg", ".png")
ENDINGS = (".json", ".md", *PICTURES)  # of --output
# What is said beside the two uses that score no --model; nothing else means anything there.
BESIDE = {
    "compare": ("output",),
    "certify": (
        *("models", "core_dir", "autocast", "dtype", "device", "tokenizer"),
        *("trust_remote_code", "batch_size", "output"),
    ),
}


def main(argv: list[str]) -> int:
    """Evaluate, print the table, write the files. Several processes share the work."""
    arguments = _parse(argv)
    for file in arguments.output:
        make_room(Path(file))
    if arguments.rows:
        make_room(Path(arguments.rows), "--rows")
    if arguments.compare:
        return _compare(arguments)
    import torch
    from accelerate import PartialState

    from gpt2repro.commands import certification
    from gpt2repro.commands.scored_model import load_for_scoring, score_all, score_controls
    from gpt2repro.evaluation.benchmarks import is_core
    from gpt2repro.evaluation.core import read_bundle

    state = PartialState(cpu=arguments.device == "cpu" or not torch.cuda.is_available())
    device = find_device(arguments.device) if arguments.device else state.device
    if arguments.certify:
        table, content = certification.certify(arguments, device)
        if state.is_main_process:
            _write(arguments, table, {"certification": content})
        return 0 if all(each["certified"] for each in content.values()) else 1
    # All of it is opened before any of it runs: a mistake shows now, not after the first model.
    if any(map(is_core, arguments.tasks)):
        read_bundle(arguments.core_dir)
    options = {"--model": arguments.model, "--baseline": arguments.baseline}
    models = [load_for_scoring(name, to, arguments) for to, name in options.items() if name]
    columns, controls = [], []
    for loaded, tasks in zip(models, _tasks_of_models(models, arguments), strict=True):
        loaded.model.to(device)
        columns.append(score_all(loaded, tasks, arguments.batch_size))
        if arguments.controls:
            controls.append(score_controls(loaded, tasks, arguments.batch_size))
        loaded.model.to("cpu")
    if state.is_main_process:
        _report(arguments, models, columns, controls)
    return 0


# --- The command line -----------------------------------------------------------------------------


def _parse(argv: list[str]) -> Namespace:
    parser = OneLineParser(prog="gpt2repro evaluate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=named, help="directory or Hub id of a causal language model")
    add("--baseline", type=named, help="a second model; the table shows both and the difference")
    known = "val, hellaswag_completion, core, and lm-evaluation-harness' names; commas between"
    add("--tasks", help=f"{known}; default: hellaswag_completion")
    add("--preset", help="a list of tasks by its name: gpt2-paper, early or core")
    add("--limit", type=int, help="score the first N rows of each task only")
    about = "score the same rows after contexts that should not help, too"
    add("--controls", action="store_true", help=about)
    add("--batch_size", type=int, default=16, help="rows of one forward on one process")
    add("--max_length", type=int, help="context in tokens; default: the model's positions")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", help="such as cuda, cuda:1, cpu; default: the GPU if there is one")
    add("--tokenizer", type=named, help="default: the one beside each model")
    about = "run code that comes with model or tokenizer"
    add("--trust_remote_code", action="store_true", help=about)
    add("--hellaswag_file", type=named, help="JSON lines for hellaswag_completion, not the Hub's")
    about = "files to write: .json everything, .md the table, .svg or .png a picture"
    add("--output", type=named, nargs="+", default=(), help=about)
    add("--rows", type=named, help="write what each row added to the model's figures (parquet)")
    about = "compare two files of --rows; no model is needed"
    add("--compare", type=named, nargs=2, metavar="FILE", help=about)
    _add_groups(parser)
    arguments = parser.parse_args(argv)
    _check_use(arguments, parser)
    if arguments.dataset_name == parser.get_default("dataset_name"):
        arguments.dataset_config = arguments.dataset_config or "sample-10BT"
        if arguments.num_validation_units is None:
            arguments.num_validation_units = 100
    _check(arguments)
    return arguments


def _add_groups(parser: OneLineParser) -> None:
    theirs = parser.add_argument_group("tasks of lm-evaluation-harness, where it is installed")
    theirs.add_argument("--num_fewshot", type=int, help="default: each task's own number")
    theirs.add_argument("--tasks_dir", type=named, help="a directory of more task files (YAML)")
    theirs.add_argument("--stride", type=int, help="of whole texts, tokens; default: the context")
    core = parser.add_argument_group("CORE (--tasks core, or core/LABEL for one of its tasks)")
    core.add_argument("--core_dir", type=named, help="directory of the evaluation bundle")
    about = "compare OpenAI's four models with their published CORE; status 1 if one is off"
    core.add_argument("--certify", action="store_true", help=about)
    core.add_argument("--models", type=named, nargs="+", help="those to certify")
    about = "certify under bfloat16 autocast, as the published figures were made"
    core.add_argument("--autocast", action="store_true", help=about)
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


def _check_use(arguments: Namespace, parser: OneLineParser) -> None:
    """That what is given belongs to one of the three uses: --certify, --compare, or neither."""
    given = {n: value for n, value in vars(arguments).items() if value != parser.get_default(n)}
    for use, beside in BESIDE.items():
        if use in given:
            if stray := [name for name in given if name not in (use, *beside)]:
                options = ", ".join(f"--{name}" for name in beside)
                raise UserError(f"--{stray[0]}: --{use} goes with {options} only")
            return
    for name in ("models", "autocast"):
        if name in given:
            raise UserError(f"--{name} goes with --certify only")


def _check(arguments: Namespace) -> None:
    for file in arguments.output:
        if Path(file).suffix not in ENDINGS:
            raise UserError(f"--output {file}: ends in none of {', '.join(ENDINGS)}")
    if arguments.compare:
        return
    for name, value in vars(arguments).items():
        counts = isinstance(value, int) and not isinstance(value, bool)
        if counts and value < (0 if name == "num_fewshot" else 1):
            raise UserError(f"--{name} {value}: must be at least {int(name != 'num_fewshot')}")
    if arguments.certify:
        from gpt2repro.commands.certification import check_models

        return check_models(arguments)
    if arguments.model is None:
        raise UserError("--model: which one is to be scored?")
    from gpt2repro.evaluation.benchmarks import is_of_harness

    arguments.tasks = _names_of_tasks(arguments)
    for name in ("num_fewshot", "stride"):  # they would stand in the record of figures without them
        if getattr(arguments, name) is not None and not any(map(is_of_harness, arguments.tasks)):
            raise UserError(f"--{name}: --tasks names none of lm-evaluation-harness")
    if arguments.tasks_dir and not Path(arguments.tasks_dir).is_dir():
        raise UserError(f"--tasks_dir {arguments.tasks_dir}: no such directory")
    if "val" in arguments.tasks and arguments.num_validation_units is None:
        raise UserError(
            "--num_validation_units: say how many the run held out of "
            f"{arguments.dataset_name}; its recipe.yaml has the number"
        )


def _names_of_tasks(arguments: Namespace) -> list[str]:
    from gpt2repro.data.dataset import split_at_commas
    from gpt2repro.evaluation.benchmarks import PRESETS, check_names

    if arguments.preset is not None and arguments.preset not in PRESETS:
        raise UserError(f"--preset {arguments.preset}: there are {', '.join(PRESETS)}")
    given = arguments.tasks
    if given is None:
        given = "" if arguments.preset else "hellaswag_completion"
    names = [*PRESETS.get(arguments.preset, ()), *split_at_commas(given.replace(" ", ""))]
    if not names:
        raise UserError("--tasks: none are named")
    check_names([name for name in names if name != "val"], "--tasks")
    return [*dict.fromkeys(names)]


# --- Tasks ----------------------------------------------------------------------------------------


def _tasks_of_models(models: list["Loaded"], arguments: Namespace) -> list[list["Task"]]:
    """Each model's tasks, in the same order."""
    from gpt2repro.evaluation import benchmarks

    corpus = _open_corpus(arguments) if "val" in arguments.tasks else None
    shortest = min(loaded.max_length for loaded in models)
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
            core_dir=arguments.core_dir,
            num_fewshot=arguments.num_fewshot,
            tasks_dir=arguments.tasks_dir,
            stride=arguments.stride,
        )
        if corpus is not None:
            tasks.insert(0, _validation(corpus, loaded.tokenizer, shortest, arguments))
        found.append(tasks)
    return found


def _validation(
    corpus: "Corpus", tokenizer: Any, sequence_length: int, arguments: Namespace
) -> "Task":
    from gpt2repro.data.rows.held_out import validation_set
    from gpt2repro.data.tokens.encoder import BulkEncoder
    from gpt2repro.evaluation.tasks.held_out import Validation

    held_out = validation_set(
        corpus,
        BulkEncoder(tokenizer),
        sequence_length=sequence_length,
        num_units=arguments.num_validation_units,
        max_tokens=arguments.validation_tokens,
    )
    return Validation(held_out.rows[: arguments.limit], held_out.num_bytes[: arguments.limit])


def _open_corpus(arguments: Namespace) -> "Corpus":
    from gpt2repro.data.dataset import split_at_commas
    from gpt2repro.data.opening import open_corpus

    given = arguments.data_files or ()  # words, or with commas as in a recipe
    files = [file for word in given for file in split_at_commas(word)]
    return open_corpus(
        arguments.dataset_name,
        config=arguments.dataset_config,
        split=arguments.dataset_split,
        revision=arguments.dataset_revision,
        data_files=files or None,
        text_column=arguments.text_column,
        document=arguments.document,
        if_unreachable="; give a local dataset with --dataset_name",
    )


# --- The report -----------------------------------------------------------------------------------


def _published_for(arguments: Namespace, sequence_length: int) -> dict[str, tuple[float, str]]:
    """What others published about the OpenAI model that is being evaluated, if one is.

    Nothing where it is asked otherwise than they did.
    """
    from gpt2repro.evaluation.published import PAPER, PUBLISHED, is_the_published_text

    changes = ("limit", "num_fewshot", "max_length", "tokenizer")
    if any(getattr(arguments, name) is not None for name in changes):
        return {}
    for name in (arguments.baseline, arguments.model):
        model = (name or "").removeprefix("openai-community/")
        if model in PUBLISHED:
            found = dict(PUBLISHED[model])
            if not is_the_published_text(vars(arguments) | {"sequence_length": sequence_length}):
                found.pop("val/loss", None)
            found |= PAPER[model] if arguments.preset == "gpt2-paper" else {}
            return {key: (value, f"{by} (of {model})") for key, (value, by) in found.items()}
    return {}


def _report(
    arguments: Namespace,
    models: list["Loaded"],
    columns: list[list["TaskResult"]],
    controls: list[dict[str, list["TaskResult"]]],
) -> None:
    from gpt2repro.evaluation.row_scores import differences, scored, write_row_scores
    from gpt2repro.evaluation.tables import Table, figures, notes, of_tasks, plain

    both = [
        scored(loaded.name, results, _asked_by(arguments, loaded.max_length))
        for loaded, results in zip(models, columns, strict=True)
    ]
    names, values = [each.model for each in both], [each.estimates for each in both]
    published = _published_for(arguments, min(loaded.max_length for loaded in models))
    table = Table(names, values, differences(*both) if len(both) == 2 else {}, published)
    print(printable(table.as_text()))
    content = table.as_json()
    of_models = [content, content.get("baseline", {})]
    for model, name, results in zip(of_models, names, columns, strict=False):
        print(printable("\n".join(notes(name, results))), file=sys.stderr)
        model["tasks"] = of_tasks(results)
    for model, name, found, results_of in zip(of_models, names, values, controls, strict=False):
        beside = {kind: figures(results) for kind, results in results_of.items()}
        print(printable("\n" + Table([name, *beside], [found, *beside.values()]).as_text()))
        model["controls"] = {kind: plain(each) for kind, each in beside.items()}
    _write(arguments, table, content)
    if arguments.rows:
        write_row_scores(Path(arguments.rows), both[0])


def _asked_by(arguments: Namespace, max_length: int) -> dict[str, Any]:
    """What decides how rows are asked: files of `--rows` compare where it is the same."""
    files = {name: getattr(arguments, name) for name in ("tasks_dir", "hellaswag_file", "core_dir")}
    return {
        "num_fewshot": arguments.num_fewshot,
        "max_length": max_length,
        "stride": arguments.stride or max_length,
        **{name: file and str(Path(file).absolute()) for name, file in files.items()},
    }


def _compare(arguments: Namespace) -> int:
    from gpt2repro.evaluation.row_scores import compared, read_row_scores
    from gpt2repro.evaluation.tables import Table

    both = [read_row_scores(Path(file)) for file in arguments.compare]
    difference = compared(*both)
    values = [{name: each.figures[name].estimate for name in difference} for each in both]
    table = Table([each.model for each in both], values, difference)
    print(printable(table.as_text()))
    _write(arguments, table, table.as_json())
    return 0


def _write(arguments: Namespace, table: "Table", content: dict[str, Any]) -> None:
    """`--output`, by their endings: all there is, the table, or a picture of it."""
    from gpt2repro.system import machine

    content |= {"settings": vars(arguments), "environment": machine.describe(arguments.device)}
    for output in map(Path, arguments.output):
        if output.suffix in PICTURES:
            from gpt2repro.plots.benchmarks import benchmark_dots
            from gpt2repro.plots.style import save

            save(benchmark_dots(table), output)
            continue
        text = table.as_markdown() if output.suffix == ".md" else json.dumps(content, indent=2)
        with atomic.new_file(output) as scratch:
            scratch.write_text(f"{text}\n", encoding="utf-8")
