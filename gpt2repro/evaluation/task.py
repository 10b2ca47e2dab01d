"""A benchmark: what it asks of a model, and how its answers become figures.

A `Task` holds the requests of one benchmark in one convention, and turns their log-likelihoods into
`Estimate`s through an `evaluate.Metric`. Rows that cannot be scored are named, never dropped.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpt2repro import UserError
from gpt2repro.evaluation.estimates import Estimate
from gpt2repro.evaluation.likelihoods import Request, Scores
from gpt2repro.system.patience import patiently

Row = dict[str, Any]


class MalformedRow(ValueError):
    """A row that cannot be scored; the message says why. In a list it stands for that row."""


class Task:
    """One benchmark in one convention, for one tokenizer and one context length.

    Attributes:
        name: of the benchmark and its convention, unique; `prefix` begins the names of its figures.
        requests: what to ask, flat; `examples[i]` owns `requests[slices[i]]`.
        rows: the numbers, from 1, of the rows that are scored; `truncated` are those among them
            whose context loses tokens on its left.
        skipped: row number -> why that row cannot be scored.
    """

    name: str
    prefix: str
    asked: str  # what one request stands for, in messages
    dataset: dict[str, str] | None = None  # name and title, where no `Benchmark` has them
    note = ""  # what else a reader of the figures must know

    def __init__(self, rows: Iterable[Any], tokenizer, *, max_length: int) -> None:
        self.max_length = max_length
        self.skipped: dict[int | str, str] = {}
        self.rows: list[int | str] = []
        self.truncated: list[int | str] = []
        self.examples: list[Any] = []
        self.requests: list[Request] = []
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

    def identity(self) -> Any:
        """Equal for two tasks whose figures are about the same examples, one by one."""
        return self.rows

    def estimates(self, scores: Scores) -> dict[str, Estimate]:
        """Figures by their full names, such as "lambada/acc"; equal requests of a row tie."""
        at = np.arange(len(self.requests))
        for row in self.slices:  # the batches that they are in would break the tie
            first: dict[tuple[int, bytes], int] = {}
            for i in range(row.start, row.stop):
                ids = np.asarray(self.requests[i].ids, np.int64).tobytes()
                at[i] = first.setdefault((self.requests[i].num_scored, ids), i)
        found = self.score(
            Scores(scores.log_likelihood[at], scores.is_greedy[at], scores.padding_waste)
        )
        return {f"{self.prefix}{metric}": estimate for metric, estimate in found.items()}

    def parse(self, row: Any) -> Any:
        """An example; raises MalformedRow with the reason where there is none."""
        raise NotImplementedError

    def arrange(self, parsed: dict[int, Any]) -> dict[int, Any]:
        """The examples by their rows' numbers, in the order in which they are asked."""
        return parsed

    def encode(self, tokenizer, examples: list) -> list[list[Request]]:
        raise NotImplementedError

    def score(self, scores: Scores) -> dict[str, Estimate]:
        raise NotImplementedError


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


# --- Where rows come from -------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's name, its dataset on the Hub, and the conventions it is scored by."""

    name: str
    title: str  # for people
    dataset: str
    config: str | None
    split: str
    conventions: dict[str, type[Task]]
    prepare: Callable[[list[Row | MalformedRow]], list[Row | MalformedRow]] = field(
        default=lambda rows: rows
    )  # rows as they are stored -> rows as tasks take them

    def read_rows(self, file: str | None, limit: int | None = None) -> list[Row | MalformedRow]:
        """The first `limit` rows of a local JSONL file, or else of the Hub's dataset.

        Raises:
            UserError: the file or the Hub cannot be read; names the option for a local file.
        """
        rows = read_jsonl(file, self.name) if file is not None else self._read_hub()
        return self.prepare(rows)[:limit]

    def _read_hub(self) -> list[Row | MalformedRow]:
        import datasets

        advice = f"; give a local copy with --{self.name}_file"
        try:
            return list(
                patiently(
                    lambda: datasets.load_dataset(self.dataset, self.config, split=self.split),
                    f"read {self.dataset}",
                    give_up_after_seconds=300,
                    if_unreachable=advice,
                    reaches_hub=False,  # it may have come from the cache
                )
            )
        except UserError as error:
            raise UserError(str(error) if advice in str(error) else f"{error}{advice}") from error
        except (OSError, ValueError) as error:  # a cache that cannot be used, a changed dataset
            raise UserError(f"cannot read {self.dataset}: {error}{advice}") from error


def read_jsonl(file: str, task: str, option: str = "--{}_file") -> list[Row | MalformedRow]:
    """A row for each line, so that row numbers are line numbers; unreadable lines say why.

    Raises:
        UserError: the file cannot be read; begins with the `option` of the task.
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{option.format(task)} {file}: {error}") from None
    rows: list[Row | MalformedRow] = []
    for line in lines:
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # no half of a surrogate pair in it
            rows.append(row)
        except (ValueError, RecursionError) as error:
            rows.append(MalformedRow(f"not JSON: {error}" if line.strip() else "an empty line"))
    return rows
