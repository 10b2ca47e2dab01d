"""Tasks of lm-evaluation-harness, put to a model by our engine.

The harness makes the requests of a task (prompts, few-shot examples, choices) and turns answers
into figures; between them stand `loglikelihoods` and `continuations`, with their few shapes, their
ranks and their paired errors. So a task's figures are the harness' own.
"""

import contextlib
import difflib
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from gpt2repro import UserError
from gpt2repro.data.corpora.corpus import in_a_line
from gpt2repro.data.tokens.token_ids import begin_id, end_ids, ids_to_continue
from gpt2repro.evaluation.estimates import Estimate, mean, nanmean, ratio, weighted
from gpt2repro.evaluation.likelihoods import Request, Scores, encode_pairs
from gpt2repro.evaluation.task import MalformedRow, OnHub, Task, TaskGroup, checked
from gpt2repro.evaluation.writing import Prompt
from gpt2repro.system.patience import patiently

FEWSHOT_SEED = 1234  # the harness' own default: which examples stand before a question
NUM_NEW_TOKENS = 256  # the harness' default where a task that writes names no number
OF_OURS = Path(__file__).parent  # task files for what the harness has not


@dataclass(frozen=True)
class Example:
    """A row's questions, the harness' `Instance`s."""

    row: int | str
    instances: list[Any]


class LmEvalTask(Task):
    """A task of the harness; what it asks and how it counts is the harness' business.

    stride: of the windows that cut a whole text, in tokens; None is `max_length`, the harness'.
    """

    asked = "request"

    def __init__(
        self,
        task: Any,
        tokenizer: Any,
        *,
        max_length: int,
        limit: int | None = None,
        stride: int | None = None,
    ) -> None:
        self._task, self._tokenizer, self._stride = task, tokenizer, stride or max_length
        # Its `task_name` would draw a random name beside it, and shuffled choices be others.
        self.name, self.prefix = task.config.task, f"{task.config.task}/"
        path = task.config.dataset_path or ""
        if "/" in path and not Path(path).exists():
            self.dataset = OnHub(path, self.name)
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            self.note = f"; stride {self._stride}"
        super().__init__(_documents(task, limit), tokenizer, max_length=max_length)
        self._unasked = self.skipped
        self.examples = [*map(Example, self.rows, self.examples)]
        for example in self.examples:
            for instance in example.instances:
                if instance.request_type == "generate_until":
                    self._prompt(example.row, instance.args)

    def parse(self, row: list[Any] | MalformedRow) -> list[Any]:
        if isinstance(row, MalformedRow):
            raise row
        for instance in row:
            if instance.request_type == "generate_until":
                num_new = _how_to_write(instance.args[1])[0]
                if num_new >= self.max_length:
                    positions = f"{self.max_length} positions"
                    raise MalformedRow(f"asks for {num_new} new tokens of a model of {positions}")
        return row

    def encode(self, tokenizer: Any, examples: list[list[Any]]) -> list[list[Request]]:
        """The requests of each document, those of a question one after the other."""
        pairs = [i.args for each in examples for i in each if i.request_type == "loglikelihood"]
        scored = iter(encode_pairs(tokenizer, pairs) if pairs else [])

        def requests(instance: Any) -> list[Request]:
            if instance.request_type == "loglikelihood":
                return [next(scored)]
            if instance.request_type == "generate_until":
                return []
            return _rolling(tokenizer, instance.args[0], self.max_length, self._stride)

        return [[r for instance in each for r in requests(instance)] for each in examples]

    def _prompt(self, row: int | str, asked: tuple[str, dict[str, Any]]) -> None:
        text, how = asked
        num_new, stops = _how_to_write(how)
        [ids] = ids_to_continue(self._tokenizer, [text])
        room = self.max_length - num_new
        if len(ids) > room:
            self.truncated.append(row)
        end = end_ids(self._tokenizer)[:1]  # as the harness: what begins a text ends none
        is_over = partial(_is_over, self._tokenizer, end, stops)
        self.prompts.append(Prompt(ids[-room:], num_new, is_over))

    def score(self, scores: Scores) -> dict[str, Estimate]:
        texts = iter(
            self._tokenizer.decode(ids, skip_special_tokens=True) for ids in scores.written
        )
        for example, at in zip(self.examples, self.slices, strict=True):
            _answer(example, scores[at], texts)
        self._task._instances = [i for example in self.examples for i in example.instances]
        self._task.apply_filters()
        counted = self._count()
        values: dict[str, list[Any]] = {}
        for _, figures in counted:
            for name, value in figures.items():
                values.setdefault(name, []).append(value)
        aggregation = self._task.aggregation()
        found = {
            name: _estimate(each, aggregation.get(name.partition(",")[0], np.mean))
            for name, each in values.items()
        }
        golds = [_gold(self._task, example) for example, _ in counted]
        if golds and all(golds):
            # Moves where accuracy of a small model still is that of guessing.
            found["gold_bits_per_byte"] = ratio(*np.array(golds).T) * (-1 / math.log(2))
        return found

    def _count(self) -> list[tuple[Example, dict[str, Any]]]:
        """What each row adds to each figure; one that cannot be counted is named, and left out.

        All are counted anew: a training loop scores the same rows again and again.
        """
        counted, failed = [], {}
        for example in self.examples:
            try:
                counted.append((example, _figures_of(self._task, example)))
            except Exception as error:  # a task's own code, on a row that it did not foresee
                failed[example.row] = _reason(error)
        self.rows, self.skipped = [each.row for each, _ in counted], self._unasked | failed
        checked(self)
        return counted


class LmEvalGroup(TaskGroup):
    """A group of the harness that has means of its own, by the number of rows or by tasks."""

    def __init__(self, group: Any, members: Sequence[Task]) -> None:
        super().__init__(group.name, members)
        self._means = group.aggregate_metric_list

    def means(self, found: Sequence[dict[str, Estimate]]) -> dict[str, Estimate]:
        figures = {name: figure for each in found for name, figure in each.items()}
        leaves = [part.prefix for part in self.parts() if not part.members]
        by_name: dict[str, list[Estimate]] = {}
        for prefix in leaves:
            for name in figures:
                if name.startswith(prefix):
                    by_name.setdefault(name.removeprefix(prefix), []).append(figures[name])
        means: dict[str, Estimate] = {}
        for rule in self._means:
            for name, parts in by_name.items():
                metric, _, filtered = name.partition(",")
                wanted = rule.filter_list is None or (filtered or "none") in rule.filter_list
                if metric == rule.metric and wanted:
                    sizes = [len(part.influence) if rule.weight_by_size else 1 for part in parts]
                    means[name] = weighted(parts, [size / sum(sizes) for size in sizes])
        return means


def _documents(task: Any, limit: int | None) -> Iterator[list[Any] | MalformedRow]:
    """What the harness asks of each document, or why that is nothing."""
    for number, doc in task.doc_iterator(limit=limit):
        metadata = (task.config.task, number, task.config.repeats)
        shots = {"num_fewshot": task.config.num_fewshot or 0}
        try:
            if prefix := task.doc_to_prefix(doc):
                shots["gen_prefix"] = prefix
            context = task.fewshot_context(doc, **shots)
            found = task.construct_requests(doc=doc, ctx=context, metadata=metadata)
        except Exception as error:  # a task's own code, on a row that it did not foresee
            yield MalformedRow(_reason(error))
            continue
        instances = found if isinstance(found, list) else [found]
        yield instances or MalformedRow("it makes no request")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]


def _figures_of(task: Any, example: Example) -> dict[str, Any]:
    """What a row adds, by the names of figures: of a filter's, but the plain one's, with it."""
    ordered = sorted(example.instances, key=lambda instance: instance.idx)
    found: dict[str, Any] = {}
    for filtered in ordered[0].filtered_resps:
        answers = [instance.filtered_resps[filtered] for instance in ordered]
        end = "" if filtered == "none" else f",{filtered}"
        of_filter = task.process_results(ordered[0].doc, answers)
        found |= {f"{metric}{end}": value for metric, value in of_filter.items()}
    return found


def _rolling(tokenizer: Any, text: str, max_length: int, stride: int) -> list[Request]:
    """A whole text in windows of which every token is predicted once, as the harness cuts it."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    [ids] = ids_to_continue(tokenizer, [text]) if text else [[]]
    how = {"max_seq_len": max_length, "context_len": max_length - stride + 1}
    cut = map(make_disjoint_window, get_rolling_token_windows(ids, begin_id(tokenizer), **how))
    return [Request([*context, *predicted], len(predicted)) for context, predicted in cut]


def _how_to_write(how: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """The number of new tokens at most, and the texts that end them."""
    from lm_eval.models.utils import normalize_gen_kwargs

    normal = normalize_gen_kwargs(how, NUM_NEW_TOKENS)
    return normal["max_gen_toks"], tuple(filter(None, normal["until"]))


def _is_over(tokenizer: Any, end: list[int], stops: tuple[str, ...], new: list[int]) -> bool:
    return new[-1:] == end or (bool(stops) and any(map(tokenizer.decode(new).__contains__, stops)))


def _answer(example: Example, scores: Scores, texts: Iterator[str]) -> None:
    """Put what the model said where the harness looks for it."""
    begin, of_kind = 0, {"loglikelihood": 1, "generate_until": 0}
    for instance in example.instances:
        answer: Any
        # A whole text, which is the only question of its row, has become all of its requests.
        count = of_kind.get(instance.request_type, len(scores.log_likelihood))
        if instance.request_type == "generate_until":
            answer = next(texts)
            for stop in _how_to_write(instance.args[1])[1]:
                answer = answer.split(stop)[0]
        else:
            answer = float(scores.log_likelihood[begin : begin + count].sum())
            if instance.request_type == "loglikelihood":
                answer = answer, bool(scores.is_greedy[begin])
        instance.resps = [answer] * (instance.repeats or 1)
        begin += count


def _gold(task: Any, example: Example) -> tuple[float, int] | None:
    """The right choice's nats and bytes, where a document has one right choice."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    ordered = sorted(example.instances, key=lambda instance: instance.idx)
    doc = ordered[0].doc
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str) and gold in (choices := task.doc_to_choice(doc)):
        gold = choices.index(gold)
    if not isinstance(gold, int) or not 0 <= gold < len(ordered):
        return None
    num_bytes = len(ordered[gold].args[1].encode(errors="replace"))
    return (ordered[gold].resps[0][0], num_bytes) if num_bytes else None


def _estimate(values: list[Any], aggregate: Callable[[list[Any]], Any]) -> Estimate:
    """The harness' figure, with an influence of each document where we know its formula."""
    how, n = getattr(aggregate, "__name__", ""), len(values)
    if how in ("mean", "nanmean"):
        return (mean if how == "mean" else nanmean)(np.array(values, np.float64))
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
    option: str = "--tasks",
    num_fewshot: int | None = None,
    limit: int | None = None,
    tasks_dir: str | None = None,
    stride: int | None = None,
) -> dict[str, list[Task]]:
    """The tasks, groups or tags of these names, for one tokenizer and context length.

    Args:
        option: what named them, for messages.
        num_fewshot: examples before each question; None is the task's own number.
        limit: documents of each task at most.
        tasks_dir: a directory of more task files (YAML).
        stride: of the windows that cut whole texts; None leaves them without overlap.

    Raises:
        ImportError: the harness, of the extra `eval`, is not installed.
        UserError: a task or its data cannot be opened.
    """
    manager = _manager_of(names, tasks_dir, option)

    def opened(each: Any) -> list[Task]:
        if hasattr(each, "child_names"):
            members = [task for name in each.child_names for task in opened(each.get(name))]
            return [LmEvalGroup(each, members)] if each.has_aggregation else members
        if num_fewshot is not None and each.config.num_fewshot != 0:
            each.set_config("num_fewshot", num_fewshot)
        each.set_fewshot_seed(FEWSHOT_SEED)
        how = each.config.generation_kwargs or {}
        if each.OUTPUT_TYPE == "generate_until" and (
            how.get("do_sample") or float(how.get("temperature") or 0) > 0
        ):
            raise UserError(
                f"{option}: {each.config.task} samples what it writes; `lm_eval` does it"
            )
        how = {"max_length": max_length, "limit": limit, "stride": stride}
        with in_a_line(f"{option}: {_of_data(each, vars(each.config))}"):
            return [checked(LmEvalTask(each, tokenizer, **how))]

    def load(name: str) -> Any:
        _seed()  # also where it is tried again
        return manager.load([name])

    found: dict[str, list[Task]] = {}
    with _random_numbers_kept():
        for name in names:
            with _opening(option), in_a_line(f"{option}: {name} cannot be opened"):
                what = f"open {name} ({option})"
                loaded = patiently(partial(load, name), what, reaches_hub=False)
                group = loaded["groups"].get(name)
                each_of = [group] if group else loaded["tasks"].values()
                found[name] = [task for each in each_of for task in opened(each)]
    return found


def _seed() -> None:
    """As `lm_eval --tasks` seeds what some tasks (GPQA) shuffle their choices by."""
    random.seed(0)
    np.random.seed(1234)


@contextlib.contextmanager
def _random_numbers_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _manager_of(names: Sequence[str], tasks_dir: str | None, option: str) -> Any:
    """What knows all `names`: the user's own files, or else the harness' thousands too."""
    for with_theirs in (False, True):
        with in_a_line(f"{option}_dir"):
            manager = _manager(tasks_dir, with_theirs)
            if manager.task_index.keys() >= _within(names, manager.task_index):
                return manager
    unknown = [name for name in names if name not in manager.task_index]
    if not unknown:  # a member that is defined where it is named
        return manager
    near = difflib.get_close_matches(unknown[0], [*manager.all_tasks, "hellaswag_completion"], 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{option}: lm-evaluation-harness has no task {', '.join(unknown)}{hint}")


def _within(names: Sequence[str], index: Mapping[str, Any]) -> set[str]:
    """These, and whatever the groups among them are said to hold."""
    found = set(names)
    for name in names:
        members = (index[name].cfg or {}).get("task") if name in index else None
        if isinstance(members, list):
            held = [m if isinstance(m, str) else m.get("group", m.get("task")) for m in members]
            found |= _within(held, index)
    return found


@lru_cache(2)
def _manager(tasks_dir: str | None, with_theirs: bool) -> Any:
    """Reading the harness' own takes seconds."""
    from lm_eval.tasks import TaskManager

    folders = [str(OF_OURS), *([tasks_dir] if tasks_dir else [])]
    return TaskManager(include_path=folders, include_defaults=with_theirs)


@contextlib.contextmanager
def _opening(option: str) -> Iterator[None]:
    """Where tasks are made: what fails names the task and its data, in a line of its own."""
    from lm_eval.api.task import ConfigurableTask

    make = ConfigurableTask.__init__

    def made(self: Any, *args: Any, config: Any = None, **options: Any) -> None:
        with in_a_line(f"{option}: {_of_data(self, config or {})}"):
            make(self, *args, config=config, **options)

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    ConfigurableTask.__init__ = made
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ConfigurableTask.__init__ = make
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _of_data(task: Any, config: Mapping[str, Any]) -> str:
    """The beginning of a message; `config` may not have become the task's own yet."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    data = files or config.get("dataset_path") or task.DATASET_PATH
    return f"{config.get('task') or type(task).__name__} cannot be opened from {data}"
