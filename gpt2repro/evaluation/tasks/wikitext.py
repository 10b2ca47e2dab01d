"""WikiText-2 (Merity et al. 2016): perplexity of articles."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gpt2repro import UserError
from gpt2repro.evaluation.estimates import CorpusPerplexity, Estimate
from gpt2repro.evaluation.likelihoods import Request, Scores, prefix_token
from gpt2repro.evaluation.task import Benchmark, MalformedRow, Row, Task, text_of

# lm-evaluation-harness' de-tokenization, in its order: perplexity is of the text as people write
# it, so the spaces around punctuation and the corpus' "@-@" go.
_SPACED_OUT = (
    *(("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
# Each takes all that is no closing mark, in one go: where none follows, none does further on.
_BRACKETED = [
    re.compile(f"([{a}])([^{b}]*+)([{b}])?") for a, b in ("()", (r"\[", r"\]"), "{}", '""', "''")
]
_THE_REST = (
    *(("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°")),
    *((" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)


def _tightened(run: re.Match[str]) -> str:
    opening, inner, closing = run.groups()
    return run[0] if closing is None else f"{opening}{inner.strip()}{closing}"


def detokenize_wikitext(page: str) -> str:
    for old, new in _SPACED_OUT:
        page = page.replace(old, new)
    for pattern in _BRACKETED:
        page = pattern.sub(_tightened, page)
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
        self.note = f"; stride {self.stride}"
        super().__init__(rows, tokenizer, max_length=max_length)

    def parse(self, row: Any) -> Page:
        page = text_of(row, "page")
        if not page.strip():
            raise MalformedRow("the page is empty")
        return Page(detokenize_wikitext(page), len(re.split(r"\s+", page)), len(page.encode()))

    def encode(self, tokenizer, examples: list[Page]) -> list[list[Request]]:
        texts = [page.text for page in examples]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [self._windows([prefix_token(tokenizer), *ids]) for ids in encoded]

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


def _as_pages(rows: list[Row | MalformedRow]) -> list[Row | MalformedRow]:
    """Rows with a `page` as they are; rows of lines, as the Hub has them, made into pages."""
    if any(isinstance(row, dict) and "page" in row for row in rows):
        return rows
    return [{"page": page} for page in wikitext_pages(_lines(rows))]


def _lines(rows: Iterable[Row | MalformedRow]) -> Iterable[str]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f"wikitext2: row {number} has neither 'page' nor 'text'")
        yield row["text"]


BENCHMARK = Benchmark(
    name="wikitext2",
    title="WikiText-2",
    dataset="Salesforce/wikitext",
    config="wikitext-2-raw-v1",
    split="test",
    conventions={"lm_eval": WikiText2},
    prepare=_as_pages,
)
