"""A benchmark: what it asks of a model, and how its answers become figures.

A `Task` holds the requests of one benchmark in one convention, and turns their log-likelihoods into
`Estimate`s. Rows that cannot be scored are named, never dropped.
"""

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2repro import UserError
from gpt2repro.evaluation.estimates import Estimate
from gpt2repro.evaluation.likelihoods import Request, Scores
from gpt2repro.evaluation.writing import Prompt

Row = dict[str, Any]


class MalformedRow(ValueError):
    """A row that cannot be scored; the message says why. In a list it stands for that row."""


class OnHub(NamedTuple):
    """Where a benchmark's rows are, for a model card."""

    name: str
    title: str  # for people


class Task:
    """One benchmark in one convention, for one tokenizer and one context length.

    Attributes:
        name: of the benchmark and its convention, unique; `prefix` begins the names of its figures.
        requests: what to ask, flat; `examples[i]` owns `requests[slices[i]]`.
        prompts: what to continue, where the model is to write; most tasks have none.
        rows: the numbers, from 1, of the rows that are scored; `truncated` are those among them
            whose context loses tokens on its left. Of a group's rows also their tasks.
        skipped: row number -> why that row cannot be scored.
        dataset: None where the rows are not from the Hub.
    """

    name: str
    prefix: str
    asked: str  # what one request stands for, in messages
    dataset: OnHub | None = None
    note = ""  # what else a reader of the figures must know
    members: Sequence["Task"] = ()  # of a group

    def __init__(self, rows: Iterable[Any], tokenizer, *, max_length: int) -> None:
        self.max_length = max_length
        self.skipped: dict[int | str, str] = {}
        self.rows: list[int | str] = []
        self.truncated: list[int | str] = []
        self.examples: list[Any] = []
        self.requests: list[Request] = []
        self.prompts: list[Prompt] = []
        self.slices: list[slice] = []
        parsed: dict[int, Any] = {}
        for number, row in enumerate(rows, start=1):
            try:
                parsed[number] = self.parse(row)
            except MalformedRow as reason:
                self.skipped[number] = str(reason)
        parsed = self.arrange(parsed)
        encoded = self.encode(tokenizer, list(parsed.values())) if parsed else []
        for (number, example), requests in zip(parsed.items(), encoded, strict=True):
            self._add(number, example, requests)

    def _add(self, number: int, example: Any, requests: list[Request]) -> None:
        reason = self._unscorable(requests)
        if reason is not None:
            self.skipped[number] = reason
            return
        self.rows.append(number)
        self.examples.append(example)
        self.slices.append(slice(len(self.requests), len(self.requests) + len(requests)))
        self.requests.extend(requests)
        if any(request.is_truncated(self.max_length) for request in requests):
            self.truncated.append(number)

    def _unscorable(self, requests: list[Request]) -> str | None:
        for i, request in enumerate(requests):
            if request.num_scored < 1:
                return f"{self.asked} {i} has no tokens of its own"
            if request.num_scored > self.max_length:
                limit = f"the model's {self.max_length} positions"
                return f"{self.asked} {i} has {request.num_scored} tokens, more than {limit}"
        return None

    @property
    def num_rows(self) -> int:
        return len(self.rows) + len(self.skipped)

    def parts(self) -> Iterator["Task"]:
        """The members and theirs."""
        for each in self.members:
            yield each
            yield from each.parts()

    def identity(self) -> Any:
        """Equal for two tasks whose figures are about the same examples, one by one."""
        return self.rows

    def estimates(self, scores: Scores) -> dict[str, Estimate]:
        """Figures by their full names, such as "piqa/acc"; equal requests of a row tie."""
        at = np.arange(len(self.requests))
        for row in self.slices:  # the batches that they are in would break the tie
            first: dict[tuple[int, bytes], int] = {}
            for i in range(row.start, row.stop):
                ids = np.asarray(self.requests[i].ids, np.int64).tobytes()
                at[i] = first.setdefault((self.requests[i].num_scored, ids), i)
        nats, is_greedy = scores.log_likelihood[at], scores.is_greedy[at]
        found = self.score(replace(scores, log_likelihood=nats, is_greedy=is_greedy))
        if np.isnan(nats).any():  # who says nothing has no figure, and has not chosen the first
            found = dict.fromkeys(found, Estimate(np.nan, np.full(len(self.rows), np.nan)))
        return {f"{self.prefix}{metric}": estimate for metric, estimate in found.items()}

    def parse(self, row: Any) -> Any:
        """An example; raises MalformedRow with the reason where there is none."""
        return row

    def arrange(self, parsed: dict[int, Any]) -> dict[int, Any]:
        """The examples by their rows' numbers, in the order in which they are asked."""
        return parsed

    def encode(self, tokenizer, examples: list) -> list[list[Request]]:
        raise NotImplementedError

    def score(self, scores: Scores) -> dict[str, Estimate]:
        raise NotImplementedError


def checked(task: Task) -> Task:
    """The task, unless none of its rows can be scored: a UserError."""
    if task.rows:
        return task
    first = next((f"; row {row}: {reason}" for row, reason in task.skipped.items()), "")
    raise UserError(f"{task.name}: none of its {task.num_rows} rows can be scored{first}")


class TaskGroup(Task):
    """Tasks of one context length as one, their figures and means of them."""

    def __init__(self, name: str, members: Sequence[Task]) -> None:
        self.name, self.prefix = name, f"{name}/"
        self.asked = members[0].asked
        self._take(members)

    def of(self, members: Sequence[Task]) -> "TaskGroup":
        """The same of other members, such as the same ones with some rows."""
        made = copy.copy(self)
        made._take(members)
        return made

    def _take(self, members: Sequence[Task]) -> None:
        super().__init__([], None, max_length=members[0].max_length)
        self.members = members
        for each in members:
            begin = len(self.requests)
            self.slices += [slice(begin + at.start, begin + at.stop) for at in each.slices]
            self.requests += each.requests
            self.prompts += each.prompts
        self._count_rows()

    def _count_rows(self) -> None:
        """Of the members, which may leave rows out when they are scored."""
        self.rows, self.truncated, self.skipped = [], [], {}
        for each in self.members:
            self.rows += [f"{each.name} {row}" for row in each.rows]
            self.truncated += [f"{each.name} {row}" for row in each.truncated]
            self.skipped |= {f"{each.name} {row}": why for row, why in each.skipped.items()}

    def identity(self) -> Any:
        return [each.identity() for each in self.members]

    def estimates(self, scores: Scores) -> dict[str, Estimate]:
        found: list[dict[str, Estimate]] = []
        asked, prompted = 0, 0
        for each in self.members:
            own = scores[asked : asked + len(each.requests)]
            written = scores.written[prompted : prompted + len(each.prompts)]
            found.append(each.estimates(replace(own, written=written)))
            asked, prompted = asked + len(each.requests), prompted + len(each.prompts)
        self._count_rows()
        means = self.means(found)
        return {f"{self.prefix}{name}": figure for name, figure in means.items()} | {
            name: figure for each in found for name, figure in each.items()
        }

    def means(self, found: Sequence[dict[str, Estimate]]) -> dict[str, Estimate]:
        """Figures of the whole, from those of each member by their full names."""
        return {}


def text_of(row: Any, key: str) -> str:
    """A field that must be text; it may be empty."""
    if isinstance(row, MalformedRow):
        raise row
    if not isinstance(row, dict):
        raise MalformedRow(f"is a {type(row).__name__}, not an object with fields")
    if row.get(key) is None:
        raise MalformedRow(f"no {key!r}")
    if not isinstance(row[key], str):
        raise MalformedRow(f"{key!r} is a {type(row[key]).__name__}, not text")
    return row[key]


def read_jsonl(file: str, option: str) -> list[Row | MalformedRow]:
    """A row for each line, so that row numbers are line numbers; unreadable lines say why."""
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--{option} {file}: {error}") from None
    rows: list[Row | MalformedRow] = []
    for line in lines:
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # no half of a surrogate pair in it
            rows.append(row)
        except (ValueError, RecursionError) as error:
            rows.append(MalformedRow(f"not JSON: {error}" if line.strip() else "an empty line"))
    return rows
