"""Tasks of lm-evaluation-harness, scored by our engine.

The harness makes the requests of a task (prompts, few-shot examples, choices) and turns answers
into figures; between them stands `loglikelihoods`, with its few shapes, its ranks and its paired
errors. So a task's figures are the harness' own. Tasks that have the model write are left to it.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt2repro import UserError
from gpt2repro.data.corpus import in_a_line
from gpt2repro.data.token_ids import begin_id
from gpt2repro.evaluation.estimates import Estimate, mean, ratio
from gpt2repro.evaluation.likelihoods import Request, Scores, encode_pairs
from gpt2repro.evaluation.task import Task

FEWSHOT_SEED = 1234  # the harness' own default: which examples stand before a question


@dataclass(frozen=True)
class Example:
    """A document's questions, the harness' `Instance`s, and how many requests each has become."""

    instances: list[Any]
    num_requests: list[int]


class LmEvalTask(Task):
    """A task of the harness; what it asks and how it counts is the harness' business."""

    asked = "request"

    def __init__(self, task: Any, tokenizer: Any, *, max_length: int, limit: int | None) -> None:
        self._task = task
        self.name, self.prefix = task.task_name, f"{task.task_name}/"
        self.dataset = {"name": task.config.dataset_path or "", "title": task.task_name}
        with _quietly():
            task.build_all_requests(limit=limit)
        documents: dict[int, list[Any]] = {}
        for instance in task.instances:
            documents.setdefault(instance.doc_id, []).append(instance)
        super().__init__([*documents.values()], tokenizer, max_length=max_length)
        own = zip(self.examples, self.slices, strict=True)
        self.examples = [_counted(example, self.requests[at]) for example, at in own]

    def parse(self, row: list[Any]) -> list[Any]:
        return row

    def encode(self, tokenizer: Any, examples: list[list[Any]]) -> list[list[Request]]:
        """The requests of each document, those of a question one after the other."""
        pairs = [i.args for each in examples for i in each if i.request_type == "loglikelihood"]
        scored = iter(encode_pairs(tokenizer, pairs) if pairs else [])

        def requests(instance: Any) -> list[Request]:
            if instance.request_type == "loglikelihood":
                return [next(scored)]
            return _rolling(tokenizer, instance.args[0], self.max_length)

        return [[r for instance in each for r in requests(instance)] for each in examples]

    def score(self, scores: Scores) -> dict[str, Estimate]:
        for example, at in zip(self.examples, self.slices, strict=True):
            _answer(example, scores[at])
        instances = [instance for example in self.examples for instance in example.instances]
        self._task._instances = instances
        self._task.apply_filters()
        found: dict[str, Estimate] = {}
        aggregation = self._task.aggregation()
        for filtered in instances[0].filtered_resps:
            values: dict[str, list[Any]] = {}
            for example in self.examples:
                ordered = sorted(example.instances, key=lambda instance: instance.idx)
                answers = [instance.filtered_resps[filtered] for instance in ordered]
                of_document = self._task.process_results(ordered[0].doc, answers)
                for metric, value in of_document.items():
                    values.setdefault(metric, []).append(value)
            for metric, each in values.items():
                name = metric if filtered == "none" else f"{metric},{filtered}"
                found[name] = _estimate(each, aggregation[metric])
        return found


def _counted(instances: list[Any], requests: Sequence[Request]) -> Example:
    """How many of a document's requests belong to each of its questions: all, or one each."""
    rolling = len(instances) == 1
    return Example(instances, [len(requests)] if rolling else [1] * len(instances))


def _rolling(tokenizer: Any, text: str, max_length: int) -> list[Request]:
    """A whole text in windows of which every token is predicted once, as the harness cuts it."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = get_rolling_token_windows(ids, begin_id(tokenizer), max_length, context_len=1)
    cut = map(make_disjoint_window, windows)
    return [Request([*context, *predicted], len(predicted)) for context, predicted in cut]


def _answer(example: Example, scores: Scores) -> None:
    """Put what the model said where the harness looks for it."""
    begin = 0
    for instance, count in zip(example.instances, example.num_requests, strict=True):
        nats = float(scores.log_likelihood[begin : begin + count].sum())
        pair = instance.request_type == "loglikelihood"
        instance.resps = [(nats, bool(scores.is_greedy[begin])) if pair else nats]
        begin += count


def _estimate(values: list[Any], aggregate: Callable[[list[Any]], Any]) -> Estimate:
    """The harness' figure, with an influence of each document where we know its formula."""
    how, n = aggregate.__name__, len(values)
    if how in ("mean", "nanmean"):
        return mean(np.array(values, np.float64))
    if how == "perplexity":
        return (mean(values) * -1).exp()
    if how in ("weighted_perplexity", "bits_per_byte"):
        nats = ratio(*np.array(values, np.float64).T) * -1
        return nats.exp() if how == "weighted_perplexity" else nats * (1 / math.log(2))
    return Estimate(float(aggregate(values)), np.full(n, np.nan))


def open_lm_eval_tasks(
    names: Sequence[str],
    tokenizer: Any,
    *,
    max_length: int,
    num_fewshot: int | None = None,
    limit: int | None = None,
    tasks_dir: str | None = None,
) -> list[Task]:
    """Tasks, groups or tags of the harness by their names, for one tokenizer and context length.

    Args:
        num_fewshot: examples before each question; None is the task's own number.
        tasks_dir: a directory of more task files (YAML).

    Raises:
        ImportError: the harness, of the extra `eval`, is not installed.
        UserError: a task or its data cannot be opened.
    """
    manager = _manager_of(names, tasks_dir)
    opened: list[Task] = []
    for name in names:
        with _quietly(), in_a_line(f"--tasks: {name} cannot be opened"):
            for task in manager.load([name])["tasks"].values():
                if task.OUTPUT_TYPE == "generate_until":
                    raise UserError(
                        f"--tasks: {task.task_name} has the model write; `lm_eval` scores it"
                    )
                if num_fewshot is not None and task.config.num_fewshot != 0:
                    task.set_config("num_fewshot", num_fewshot)
                task.set_fewshot_seed(FEWSHOT_SEED)
                opened.append(LmEvalTask(task, tokenizer, max_length=max_length, limit=limit))
    return opened


def _manager_of(names: Sequence[str], tasks_dir: str | None) -> Any:
    """What knows all `names`: the user's own files, or else the harness' thousands too."""
    from lm_eval.tasks import TaskManager

    for with_theirs in (False, True) if tasks_dir else (True,):
        with _quietly(), in_a_line("--tasks_dir"):
            manager = TaskManager(include_path=tasks_dir, include_defaults=with_theirs)
        unknown = [name for name in names if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise UserError(f"--tasks: lm-evaluation-harness has no task {', '.join(unknown)}")


@contextlib.contextmanager
def _quietly():
    """Without the harness' own lines and bars, of which there is one a task."""
    import lm_eval.api.task as harness

    level, bar = logging.getLogger("lm_eval").level, harness.tqdm
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        logging.getLogger("lm_eval").setLevel(level)
        harness.tqdm = bar
