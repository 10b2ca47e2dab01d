"""The benchmarks: what each asks of a model, and how its answers become figures.

A `Task` holds the requests of one benchmark in one convention, and turns their log-likelihoods into
`Estimate`s through an `evaluate.Metric`. Rows that cannot be scored are named, never dropped.
"""

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from gpt2repro.evaluation.estimates import (
    CorpusPerplexity,
    Estimate,
    LastWordAccuracy,
    MultipleChoiceAccuracy,
)
from gpt2repro.evaluation.likelihoods import Request, Scores, encode_pairs, prefix_token

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

    def __init__(self, rows: Iterable[Row | MalformedRow], tokenizer, *, max_length: int) -> None:
        self.max_length = max_length
        self.skipped: dict[int, str] = {}
        self.rows: list[int] = []
        self.truncated: list[int] = []
        self.examples: list[Any] = []
        self.requests: list[Request] = []
        self.slices: list[slice] = []
        parsed: dict[int, Any] = {}
        for number, row in enumerate(rows, start=1):
            try:
                parsed[number] = self.parse(row)
            except MalformedRow as reason:
                self.skipped[number] = str(reason)
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
        """Figures by their full names, such as "lambada/acc"."""
        found = self.score(scores)
        return {f"{self.prefix}{metric}": estimate for metric, estimate in found.items()}

    def parse(self, row: Any) -> Any:
        """An example; raises MalformedRow with the reason where there is none."""
        raise NotImplementedError

    def encode(self, tokenizer, examples: list) -> list[list[Request]]:
        raise NotImplementedError

    def score(self, scores: Scores) -> dict[str, Estimate]:
        raise NotImplementedError


def _text(row: Any, key: str) -> str:
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


# ---------------------------------------------------------------- HellaSwag (Zellers et al. 2019)


@dataclass(frozen=True)
class Choices:
    """A context, its possible endings, and the index of the right one."""

    context: str
    endings: list[str]
    label: int


def _endings(row: Any) -> list[str]:
    endings = row.get("endings")
    if not isinstance(endings, list | tuple) or len(endings) < 2:
        raise MalformedRow("'endings' is not a list of at least two texts")
    if not all(isinstance(ending, str) for ending in endings):
        raise MalformedRow("'endings' holds something that is not text")
    return list(endings)


def _choices(context: str, endings: list[str], label: Any) -> Choices:
    if not context.strip():
        raise MalformedRow("the context is empty")
    if not all(ending.strip() for ending in endings):
        raise MalformedRow("an ending is empty")
    if label is None or label == "":  # the Hub's test split has ""
        raise MalformedRow("no 'label'")
    if isinstance(label, bool) or not re.fullmatch("[0-9]+", str(label)):
        raise MalformedRow(f"'label' is {label!r}, not the index of an ending")
    if int(label) >= len(endings):
        raise MalformedRow(f"'label' is {label}, but there are {len(endings)} endings")
    return Choices(context, endings, int(label))


class _HellaSwag(Task):
    asked = "ending"

    def lengths(self, example: Choices, requests: list[Request]) -> list[int]:
        """What `acc_norm` divides the log-likelihood of each ending by."""
        raise NotImplementedError

    def score(self, scores: Scores) -> dict[str, Estimate]:
        return MultipleChoiceAccuracy(keep_in_memory=True).compute(
            predictions=[scores.log_likelihood[at] for at in self.slices],
            lengths=[
                self.lengths(example, self.requests[at])
                for example, at in zip(self.examples, self.slices, strict=True)
            ],
            references=[example.label for example in self.examples],
            estimates=True,
        )


class CompletionHellaSwag(_HellaSwag):
    """As build-nanogpt scores: `ctx` as it is, and `acc_norm` divides by the ending's tokens."""

    name, prefix = "hellaswag/completion", "hellaswag/completion_"

    def parse(self, row: Any) -> Choices:
        context = _text(row, "ctx")
        return _choices(context, _endings(row), row.get("label"))

    def encode(self, tokenizer, examples: list[Choices]) -> list[list[Request]]:
        """Context and " " + ending are encoded apart and joined."""

        def ids_of(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

        contexts = ids_of([example.context for example in examples])
        endings = iter(ids_of([f" {end}" for example in examples for end in example.endings]))
        return [
            [Request(context + ids, len(ids)) for ids in islice(endings, len(example.endings))]
            for example, context in zip(examples, contexts, strict=True)
        ]

    def lengths(self, example: Choices, requests: list[Request]) -> list[int]:
        return [request.num_scored for request in requests]


def clean_hellaswag(text: str) -> str:
    """lm-evaluation-harness' cleaning: the WikiHow half carries markers such as "[header]"."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


class LMEvalHellaSwag(_HellaSwag):
    """As lm-evaluation-harness scores: activity label and cleaned text.

    `acc_norm` divides by the ending's characters, as its code does (the same as bytes but for
    endings that are not ASCII), without the space in front.
    """

    name, prefix = "hellaswag/lm_eval", "hellaswag/lm_eval_"

    def parse(self, row: Any) -> Choices:
        context = f"{_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
        context = clean_hellaswag(f"{_text(row, 'activity_label')}: {context}")
        endings = [clean_hellaswag(ending) for ending in _endings(row)]
        return _choices(context, endings, row.get("label"))

    def encode(self, tokenizer, examples: list[Choices]) -> list[list[Request]]:
        pairs = [(example.context, f" {end}") for example in examples for end in example.endings]
        requests = iter(encode_pairs(tokenizer, pairs))
        return [list(islice(requests, len(example.endings))) for example in examples]

    def lengths(self, example: Choices, requests: list[Request]) -> list[int]:
        return [len(ending) for ending in example.endings]


# ---------------------------------------------------------------- LAMBADA (Paperno et al. 2016)


class Lambada(Task):
    """OpenAI's version, as lm-evaluation-harness' `lambada_openai`: the last word of a passage."""

    name, prefix, asked = "lambada", "lambada/", "last word"

    def parse(self, row: Any) -> tuple[str, str]:
        context, _, word = _text(row, "text").rpartition(" ")
        if not word:
            raise MalformedRow("no last word after the last space")
        return context, f" {word}"

    def encode(self, tokenizer, examples: list[tuple[str, str]]) -> list[list[Request]]:
        return [[request] for request in encode_pairs(tokenizer, examples)]

    def score(self, scores: Scores) -> dict[str, Estimate]:
        return LastWordAccuracy(keep_in_memory=True).compute(
            predictions=scores.log_likelihood, is_greedy=scores.is_greedy, estimates=True
        )


# ---------------------------------------------------------------- WikiText-2 (Merity et al. 2016)

# lm-evaluation-harness' de-tokenization, in its order: perplexity is of the text as people write
# it, so the spaces around punctuation and the corpus' "@-@" go.
_SPACED_OUT = (
    *(("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_BRACKETED = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_THE_REST = (
    *(("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°")),
    *((" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)


def detokenize_wikitext(page: str) -> str:
    for old, new in _SPACED_OUT:
        page = page.replace(old, new)
    for pattern, replacement in _BRACKETED:
        page = re.sub(pattern, replacement, page)
    for old, new in _THE_REST:
        page = page.replace(old, new)
    return page


def wikitext_pages(lines: Iterable[str]) -> list[str]:
    """The articles in the lines of WikiText: each begins at a heading of the first level.

    The Hub's rows end in a newline, and its empty ones were " \\n" in the original files.
    """
    pages: list[list[str]] = []
    for line in lines:
        line = line or " \n"
        if not pages or re.fullmatch(r"= [^=](.*[^=])? =", line.strip()):
            pages.append([])
        pages[-1].append(line)
    pages_of_text = ["".join(page) for page in pages]
    return [page for page in pages_of_text if page.strip()]


@dataclass(frozen=True)
class Page:
    """An article; words and bytes are those of the corpus' own, spaced-out text."""

    text: str
    num_words: int
    num_bytes: int


def rolling_windows(num_tokens: int, max_length: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first scored, end) of the windows that score each token once.

    The first window scores all it holds; each later one scores the next `stride` tokens (fewer at
    the end) and looks back as far as `max_length` allows. `stride` = `max_length` leaves no overlap
    but in the last window, as lm-evaluation-harness does; a smaller stride gives every token more
    context, and so a lower perplexity, for max_length / stride times the work.
    """
    windows, scored = [], 0
    while scored < num_tokens:
        end = min(scored + (stride if scored else max_length), num_tokens)
        windows.append((max(0, end - max_length), scored, end))
        scored = end
    return windows


class WikiText2(Task):
    """Perplexity of de-tokenized WikiText articles, each on its own, over windows of `stride`.

    Rows are articles (`page`). `stride` is in tokens, by default the whole context.
    """

    name, prefix, asked = "wikitext2", "wikitext2/", "window"

    def __init__(self, rows, tokenizer, *, max_length: int, stride: int | None = None) -> None:
        self.stride = max_length if stride is None else stride
        assert 1 <= self.stride <= max_length
        super().__init__(rows, tokenizer, max_length=max_length)

    def parse(self, row: Any) -> Page:
        page = _text(row, "page")
        if not page.strip():
            raise MalformedRow("the page is empty")
        return Page(detokenize_wikitext(page), len(re.split(r"\s+", page)), len(page.encode()))

    def encode(self, tokenizer, examples: list[Page]) -> list[list[Request]]:
        return [
            self._windows([prefix_token(tokenizer), *ids])
            for ids in tokenizer([page.text for page in examples], verbose=False)["input_ids"]
        ]

    def _windows(self, ids: list[int]) -> list[Request]:
        return [
            Request(ids[begin : end + 1], end - scored)
            for begin, scored, end in rolling_windows(len(ids) - 1, self.max_length, self.stride)
        ]

    def score(self, scores: Scores) -> dict[str, Estimate]:
        found = CorpusPerplexity(keep_in_memory=True).compute(
            predictions=[scores.log_likelihood[at].sum() for at in self.slices],
            num_tokens=[sum(r.num_scored for r in self.requests[at]) for at in self.slices],
            num_words=[page.num_words for page in self.examples],
            num_bytes=[page.num_bytes for page in self.examples],
            estimates=True,
        )
        return {k: found[k] for k in ("word_perplexity", "token_perplexity", "bits_per_byte")}


# ---------------------------------------------------------------- held-out text


class Validation(Task):
    """The rows of T+1 tokens that the training data keep out of training; all T are scored."""

    name, prefix, asked = "val", "val/", "row"

    def __init__(self, rows: np.ndarray, *, bytes_per_token: float = 0.0) -> None:
        """`rows` (N, T+1) integers; `bytes_per_token` of the text behind them, 0 if unknown."""
        self.bytes_per_token = bytes_per_token
        self._crc32 = zlib.crc32(np.ascontiguousarray(rows).data)
        super().__init__(rows, None, max_length=rows.shape[1] - 1)

    def identity(self) -> Any:
        return len(self.rows), self._crc32  # another tokenizer cuts the text elsewhere

    def parse(self, row: Any) -> np.ndarray:
        return row

    def encode(self, tokenizer, examples: list[np.ndarray]) -> list[list[Request]]:
        return [[Request(row, len(row) - 1)] for row in examples]

    def score(self, scores: Scores) -> dict[str, Estimate]:
        num_tokens = np.full(len(self.requests), self.max_length, dtype=np.float64)
        return CorpusPerplexity(keep_in_memory=True).compute(
            predictions=scores.log_likelihood,
            num_tokens=num_tokens,
            num_words=np.zeros_like(num_tokens),
            num_bytes=num_tokens * self.bytes_per_token,
            estimates=True,
        )
