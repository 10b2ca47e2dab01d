"""CORE, by which DCLM (Li et al. 2024, arXiv:2406.11794) grades base models, as nanochat scores it.

bundle -> rows, shuffled -> prompts with examples -> tokens, cut to the model's positions ->
`Request`s -> accuracies, centred so that guessing gives 0 -> their mean over the tasks

The bundle is a directory: core.yaml lists the tasks, eval_meta_data.csv has what guessing scores in
each, eval_data/ the rows as JSON lines. Where nanochat's core_eval.py stops (at a row that is
malformed, or too long), the row is named and counted.
"""

import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gpt2repro import UserError
from gpt2repro.data.corpora.corpus import in_a_line
from gpt2repro.data.tokens.token_ids import begin_id
from gpt2repro.evaluation.estimates import Estimate, mean, weighted
from gpt2repro.evaluation.likelihoods import Request, Scores
from gpt2repro.evaluation.task import MalformedRow, Task, TaskGroup, checked, read_jsonl, text_of

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
WHERE = f"it is the evaluation bundle, {URL} (about 162 MB), unpacked"
SHUFFLE_SEED, FEWSHOT_SEED = 1337, 1234  # nanochat's
ROWS_AT_ONCE = 256  # tokenized together: as Python's integers, all of them would be gigabytes

CHOICE, SCHEMA, CONTINUE = "multiple_choice", "schema", "language_modeling"
KEYS = {CHOICE: ("query", "choices"), SCHEMA: ("continuation", "context_options")}


@dataclass(frozen=True)
class Rules:
    """What the bundle says of one task."""

    label: str
    file: str  # below eval_data/
    kind: str  # CHOICE, SCHEMA or CONTINUE
    num_fewshot: int
    delimiter: str  # between a context and its continuation
    baseline: float  # what guessing scores, 0 to 1


@dataclass
class Example:
    """A row as its prompts need it: prompt j is `stems[j]`, the delimiter, `ends[j]`."""

    stems: list[str]
    ends: list[str]
    gold: int
    num_scored: list[int] = field(default_factory=list)  # tokens of each prompt that are scored


# --- The bundle -----------------------------------------------------------------------------------


def read_bundle(core_dir: str | None) -> list[Rules]:
    """The tasks of the bundle in `core_dir`, all of whose files are there.

    Raises:
        UserError: none was named, a file is missing, or what it says is no list of tasks.
    """
    if core_dir is None:
        raise UserError(f"--core_dir: name the directory of CORE's data; {WHERE}")
    files = [_file(core_dir, name) for name in ("core.yaml", "eval_meta_data.csv")]
    with in_a_line(f"--core_dir {core_dir}: {files[0].name} or {files[1].name} is malformed"):
        tasks, baselines = (file.read_text(encoding="utf-8-sig") for file in files)
        lines = csv.DictReader(baselines.splitlines())
        percents = {line["Eval Task"]: line["Random baseline"] for line in lines}
        found = [_rules(entry, percents) for entry in yaml.safe_load(tasks)["icl_tasks"]]
        if len({each.label for each in found}) < max(1, len(found)):
            raise ValueError("no task, or one twice")
    for each in found:
        _file(core_dir, f"eval_data/{each.file}")
    return found


def _file(core_dir: str, name: str) -> Path:
    path = Path(core_dir) / name
    if not path.is_file():
        raise UserError(f"--core_dir {core_dir}: there is no {name} in it; {WHERE}")
    return path


def _rules(entry: dict[str, Any], percents: dict[str, str]) -> Rules:
    label, kind, num_fewshot = entry["label"], entry["icl_task_type"], entry["num_fewshot"][0]
    if kind not in (CHOICE, SCHEMA, CONTINUE):
        raise ValueError(f"{label}: icl_task_type {kind!r}")
    if type(num_fewshot) is not int or num_fewshot < 0:
        raise ValueError(f"{label}: num_fewshot {num_fewshot!r}")
    baseline = float(percents.get(label, "nan")) / 100
    if ".." in Path(file := str(entry["dataset_uri"])).parts or Path(file).is_absolute():
        raise ValueError(f"{label}: dataset_uri {file!r} is not in the bundle")
    if not 0 <= baseline < 1:
        raise ValueError(f"{label}: no random baseline in percent")
    delimiter = entry.get("continuation_delimiter", " ")
    return Rules(str(label), file, kind, num_fewshot, str(delimiter), baseline)


def open_core(
    core_dir: str | None,
    name: str,
    tokenizer: Any,
    *,
    max_length: int,
    limit: int | None = None,
    option: str = "--tasks",
) -> Task:
    """`core`, all tasks of the bundle and their mean, or `core/LABEL`, one of them.

    Args:
        limit: rows of each task; the examples before a question come from them too.
        option: what named it, for messages.

    Raises:
        UserError: the bundle is not all there, or a task has too few rows.
    """
    rules, label = read_bundle(core_dir), name.partition("/")[2]
    chosen = [each for each in rules if label in ("", each.label)]
    if not chosen:
        known = ", ".join(each.label for each in rules)
        raise UserError(f"{option}: {name}: core.yaml in {core_dir} has {known}")
    tasks = []
    for each in chosen:
        rows = read_jsonl(f"{core_dir}/eval_data/{each.file}", "core_dir")
        tasks.append(CoreTask(each, rows, tokenizer, max_length=max_length, limit=limit))
        checked(tasks[-1])
    return tasks[0] if label else Core(tasks)


# --- One task -------------------------------------------------------------------------------------


class CoreTask(Task):
    """One task of CORE; its rows are the lines of its file, in the order in which they are asked.

    A malformed line is as good as not there: the shuffle and the choice of examples are those of
    nanochat on a file without it.
    """

    asked = "continuation"

    def __init__(
        self, rules: Rules, rows: Sequence[Any], tokenizer, *, max_length: int, limit: int | None
    ) -> None:
        self.rules, self.limit = rules, limit
        self.name, self.prefix = f"core/{rules.label}", f"core/{rules.label}_"
        self.note = f"; {rules.file}, {rules.num_fewshot} examples before each"
        super().__init__(rows, tokenizer, max_length=max_length)

    def parse(self, row: Any) -> Example:
        if self.rules.kind == CONTINUE:
            return Example([_text(row, "context").strip()], [_text(row, "continuation", True)], 0)
        single, several = KEYS[self.rules.kind]
        text = _text(row, single, full=single == "continuation")
        options = row.get(several)
        if not isinstance(options, list) or len(options) < 2:
            raise MalformedRow(f"{several!r} is not a list of at least two texts")
        options = [_text({several: option}, several, full=True) for option in options]
        gold, n = row.get("gold"), len(options)
        if type(gold) is not int or not 0 <= gold < n:
            raise MalformedRow(f"'gold' is {str(gold)[:40]!r}, not the index of one of {n} options")
        alike = [text] * n
        choice = self.rules.kind == CHOICE
        return Example(alike if choice else options, options if choice else alike, gold)

    def arrange(self, parsed: dict[int, Example]) -> dict[int, Example]:
        """Shuffled, for rows often come sorted, and cut to the limit."""
        rows = list(parsed.items())
        random.Random(SHUFFLE_SEED).shuffle(rows)
        rows = rows[: self.limit]
        number = self.rules.num_fewshot
        if 0 < len(rows) <= number:
            option = "--limit" if self.limit and self.limit <= number else "--core_dir"
            drawn = f"{self.name} draws {number} examples from its other rows"
            raise UserError(f"{option}: {drawn}, and has {len(rows)} rows")
        return dict(rows)

    def encode(self, tokenizer, examples: list[Example]) -> list[list[Request]]:
        begin, requests = begin_id(tokenizer), []
        for at in range(0, len(examples), ROWS_AT_ONCE):
            some = range(at, min(at + ROWS_AT_ONCE, len(examples)))
            prompts = [list(self._prompts(examples, index)) for index in some]
            texts = [prompt for each in prompts for prompt in each]
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            ids = (np.array([begin, *each], np.int32) for each in encoded)
            for index, each in zip(some, prompts, strict=True):
                tokens = [next(ids) for _ in each]
                requests.append(self._requests(examples[index], tokens))
        return requests

    def _prompts(self, examples: list[Example], index: int) -> Iterator[str]:
        """The texts to tokenize for a row: of a continuation, first what stands before it."""
        rng = random.Random(FEWSHOT_SEED + index)
        others = rng.sample(range(len(examples) - 1), self.rules.num_fewshot)
        shots = [examples[i + (i >= index)] for i in others]  # all rows but this one
        before = "".join(
            f"{shot.stems[shot.gold]}{self.rules.delimiter}{shot.ends[shot.gold]}\n\n"
            for shot in shots
        )
        example = examples[index]
        if self.rules.kind == CONTINUE:
            # Without the space at its end, which a byte-level BPE keeps with the next word.
            yield f"{before}{example.stems[0]}{self.rules.delimiter}".strip()
        for stem, end in zip(example.stems, example.ends, strict=True):
            yield f"{before}{stem}{self.rules.delimiter}{end}"

    def _requests(self, example: Example, tokens: list[np.ndarray]) -> list[Request]:
        """What is scored: where choices part, where contexts have met, or the continuation."""
        if self.rules.kind == CONTINUE:
            prompt, *tokens = tokens
            common = _common_length([prompt, *tokens])
            num_scored = [len(tokens[0]) - common if common == len(prompt) else 0]
        elif self.rules.kind == CHOICE:
            common = _common_length(tokens)
            num_scored = [len(each) - common for each in tokens]
        else:
            common = _common_length([each[::-1] for each in tokens])
            num_scored = [common if common < len(each) else 0 for each in tokens]
        example.num_scored = num_scored
        requests = []
        for ids, number in zip(tokens, num_scored, strict=True):
            # As nanochat cuts: to as many tokens as there are positions, the last included.
            kept = max(self.max_length, number + 1)
            if number or self.rules.kind == CONTINUE:
                requests.append(Request(ids[-kept:], number, len(ids) > kept))
        return requests

    def score(self, scores: Scores) -> dict[str, Estimate]:
        pairs = zip(self.examples, self.slices, strict=True)
        right = np.array([self._is_right(example, scores[at]) for example, at in pairs], np.float64)
        baseline = self.rules.baseline
        return {"acc": mean(right), "centered": mean((right - baseline) / (1 - baseline))}

    def _is_right(self, example: Example, scores: Scores) -> bool:
        if self.rules.kind == CONTINUE:
            return bool(scores.is_greedy.all())
        nats = iter(scores.log_likelihood)
        # A choice without tokens of its own (the beginning of another) has no mean: it is taken if
        # it comes first, and else never, as by `min` over NaN in nanochat.
        losses = [-next(nats) / number if number else float("nan") for number in example.num_scored]
        return min(range(len(losses)), key=losses.__getitem__) == example.gold


def _text(row: Any, key: str, full: bool = False) -> str:
    """A field of text, or a number as a template would print it; `full`: not empty."""
    number = isinstance(row, dict) and type(row.get(key)) in (int, float)
    text = str(row[key]) if number else text_of(row, key)
    if full and not text.strip():
        raise MalformedRow(f"{key!r} is empty, or one of it")
    return text


def _common_length(sequences: list[np.ndarray]) -> int:
    """How many tokens all begin with."""
    least = min(map(len, sequences))
    same = np.all([each[:least] == sequences[0][:least] for each in sequences], axis=0)
    return least if same.all() else int(same.argmin())


# --- All of them ----------------------------------------------------------------------------------


class Core(TaskGroup):
    """Tasks of CORE in one pass, with their mean as the figure `core`."""

    def __init__(self, parts: Sequence[CoreTask]) -> None:
        super().__init__("core", parts)
        self.prefix = ""
        self.note = f"; the mean of {len(parts)} tasks"

    def means(self, found: Sequence[dict[str, Estimate]]) -> dict[str, Estimate]:
        """The mean of the centred accuracies.

        Its standard error takes each task's rows as a sample of their own. Bootstrapping rows
        within tasks goes to the same figure, which a mean of means has in closed form.
        """
        centered = [
            figures[f"{part.prefix}centered"]
            for part, figures in zip(self.members, found, strict=True)
        ]
        return {"core": weighted(centered, [1 / len(centered)] * len(centered))}
