"""HellaSwag (Zellers et al. 2019): which of four endings follows a context."""

import re
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gpt2repro.evaluation.estimates import Estimate, MultipleChoiceAccuracy
from gpt2repro.evaluation.likelihoods import Request, Scores, encode_pairs
from gpt2repro.evaluation.task import Benchmark, MalformedRow, Task, text_of


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
    if isinstance(label, bool) or not re.fullmatch("[0-9]{1,9}", str(label)):
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
        context = text_of(row, "ctx")
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


def _clean(text: str) -> str:
    """lm-evaluation-harness' cleaning: the WikiHow half carries markers such as "[header]"."""
    text = text.strip().replace(" [title]", ". ")
    # Without a "]" the run is kept in one go: a marker cannot begin within it either.
    text = re.sub(r"\[[^]\n]*+(])?", lambda run: "" if run[1] else run[0], text)
    return text.replace("  ", " ")


class LMEvalHellaSwag(_HellaSwag):
    """As lm-evaluation-harness scores: activity label and cleaned text.

    `acc_norm` divides by the ending's characters, as its code does (the same as bytes but for
    endings that are not ASCII), without the space in front.
    """

    name, prefix = "hellaswag/lm_eval", "hellaswag/lm_eval_"

    def parse(self, row: Any) -> Choices:
        context = f"{text_of(row, 'ctx_a')} {text_of(row, 'ctx_b').capitalize()}"
        context = _clean(f"{text_of(row, 'activity_label')}: {context}")
        endings = [_clean(ending) for ending in _endings(row)]
        return _choices(context, endings, row.get("label"))

    def encode(self, tokenizer, examples: list[Choices]) -> list[list[Request]]:
        pairs = [(example.context, f" {end}") for example in examples for end in example.endings]
        requests = iter(encode_pairs(tokenizer, pairs))
        return [list(islice(requests, len(example.endings))) for example in examples]

    def lengths(self, example: Choices, requests: list[Request]) -> list[int]:
        return [len(ending) for ending in example.endings]


BENCHMARK = Benchmark(
    name="hellaswag",
    title="HellaSwag",
    dataset="Rowan/hellaswag",
    config=None,
    split="validation",
    conventions={"completion": CompletionHellaSwag, "lm_eval": LMEvalHellaSwag},
)
