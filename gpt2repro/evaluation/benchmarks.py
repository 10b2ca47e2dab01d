"""Every benchmark by its name: ours, CORE, or lm-evaluation-harness'."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from typing import Any

from accelerate.utils import compare_versions

from gpt2repro import UserError
from gpt2repro.evaluation.core import open_core
from gpt2repro.evaluation.published import is_of_the_published_rows
from gpt2repro.evaluation.task import Task, checked
from gpt2repro.evaluation.tasks.hellaswag import HellaSwagCompletion, read_rows

OURS = (HellaSwagCompletion.name, "core")
# Lists that belong together, by a name.
PRESETS = {
    # Table 3 of Radford et al. 2019, as far as task files go; its figures are `published.PAPER`.
    "gpt2-paper": (
        *("lambada_openai", "cbt_cn", "cbt_ne"),
        *("wikitext", "paloma_wikitext_103", "paloma_ptb"),
    ),
    # Cloze tasks: what follows is text, no letter. With `gold_bits_per_byte` they move early.
    "early": (
        *("hellaswag", "arc_easy", "piqa", "openbookqa", "sciq", "social_iqa"),
        *("commonsense_qa_cloze", "winogrande", "lambada_openai"),
    ),
    "core": ("core",),
}


def is_core(name: str) -> bool:
    """`core`, or `core/LABEL` for one of its tasks."""
    return name.partition("/")[0] == "core"


def is_of_harness(name: str) -> bool:
    return name not in (*OURS, "val") and not is_core(name)


def check_names(names: Sequence[str], option: str) -> None:
    """That there is something to open these by.

    Raises:
        UserError: they are the harness', and it is not installed, or as a version whose tasks are
            made otherwise (0.5, of which there is a first draft); begins with `option`.
    """
    theirs = [*filter(is_of_harness, names)]
    if theirs and not _has_harness():
        raise UserError(
            f"{option}: {', '.join(theirs)}: the tasks of lm-evaluation-harness need "
            f"`pip install 'lm_eval<0.5'`; without it there are {', '.join(OURS)}"
        )


def _has_harness() -> bool:
    try:
        return bool(find_spec("lm_eval")) and compare_versions("lm_eval", "<", "0.5.dev0")
    except PackageNotFoundError:  # it lies on the path, as a checkout does
        return True


def open_tasks(
    names: Sequence[str],
    tokenizer: Any,
    *,
    max_length: int,
    option: str = "--tasks",
    limit: int | None = None,
    hellaswag_file: str | None = None,
    core_dir: str | None = None,
    **of_the_harness: Any,
) -> list[Task]:
    """Benchmarks in the order of their names, each once, for one tokenizer and context length.

    Args:
        option: what named them, for messages.
        limit: rows of each at most.
        hellaswag_file: rows of HellaSwag in place of the Hub's.
        core_dir: the evaluation bundle.
        of_the_harness: what `open_lm_eval_tasks` takes besides.

    Raises:
        UserError: a name is unknown, rows cannot be read, none of a benchmark can be scored, one is
            within another, or `hellaswag` is named for a file that another benchmark reads.
    """
    check_names(names, option)
    completion = HellaSwagCompletion.name
    if hellaswag_file and "hellaswag" in names and completion not in names:
        raise UserError(f"{option}: hellaswag does not read hellaswag_file; {completion} does")
    opened: dict[str, list[Task]] = {}
    how: dict[str, Any] = {"max_length": max_length, "limit": limit, "option": option}
    for name in filter(is_core, names):
        opened[name] = [open_core(core_dir, name, tokenizer, **how)]
    if completion in names:
        rows = read_rows(hellaswag_file)
        ours = HellaSwagCompletion(rows[:limit], tokenizer, max_length=max_length)
        if not is_of_the_published_rows(ours.prefix, len(rows)):
            ours.dataset = None  # on a model card some rows would pass for all
        opened[completion] = [checked(ours)]
    if theirs := [name for name in dict.fromkeys(names) if name not in opened]:
        from gpt2repro.evaluation.tasks.harness import open_lm_eval_tasks

        opened |= open_lm_eval_tasks(theirs, tokenizer, **how, **of_the_harness)
    tasks = {task.name: task for name in dict.fromkeys(names) for task in opened[name]}
    named_by = {name: name for name in tasks}
    for name, task in tasks.items():
        for part in task.parts():
            if (other := named_by.setdefault(part.name, name)) != name:
                raise UserError(f"{option}: both {name} and {other} score {part.name}; name one")
    return [*tasks.values()]
