"""HellaSwag (Zellers et al. 2019) as build-nanogpt scores it: which of four endings follows."""

import re
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gpt2repro import UserError
from gpt2repro.evaluation.estimates import Estimate, choices
from gpt2repro.evaluation.likelihoods import Request, Scores
from gpt2repro.evaluation.task import MalformedRow, OnHub, Row, Task, read_jsonl, text_of
from gpt2repro.system.patience import patiently

DATASET, SPLIT = "Rowan/hellaswag", "validation"


@dataclass(frozen=True)
class Choices:
    """A context, its possible endings, and the index of the right one."""

    context: str
    endings: list[str]
    label: int


class HellaSwagCompletion(Task):
    """`ctx` as it is, context and " " + ending encoded apart; `acc_norm` divides by tokens."""

    name, prefix, asked = "hellaswag_completion", "hellaswag/completion_", "ending"
    dataset: OnHub | None = OnHub(DATASET, "HellaSwag")

    def parse(self, row: Any) -> Choices:
        context, endings, label = text_of(row, "ctx"), row.get("endings"), row.get("label")
        if not isinstance(endings, list | tuple) or len(endings) < 2:
            raise MalformedRow("'endings' is not a list of at least two texts")
        if not all(isinstance(ending, str) for ending in endings):
            raise MalformedRow("'endings' holds something that is not text")
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
        return Choices(context, list(endings), int(label))

    def encode(self, tokenizer, examples: list[Choices]) -> list[list[Request]]:
        def ids_of(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

        contexts = ids_of([example.context for example in examples])
        endings = iter(ids_of([f" {end}" for example in examples for end in example.endings]))
        return [
            [Request(context + ids, len(ids)) for ids in islice(endings, len(example.endings))]
            for example, context in zip(examples, contexts, strict=True)
        ]

    def score(self, scores: Scores) -> dict[str, Estimate]:
        return choices(
            [scores.log_likelihood[at] for at in self.slices],
            [[request.num_scored for request in self.requests[at]] for at in self.slices],
            [example.label for example in self.examples],
        )


def read_rows(file: str | None) -> list[Row | MalformedRow]:
    """The rows of a local JSONL file, or else of the Hub's dataset.

    Raises:
        UserError: the file or the Hub cannot be read; names `hellaswag_file`.
    """
    if file is not None:
        return read_jsonl(file, "hellaswag_file")
    import datasets

    advice = "; give a local copy with --hellaswag_file"
    try:
        return list(
            patiently(
                lambda: datasets.load_dataset(DATASET, split=SPLIT),
                f"read {DATASET}",
                give_up_after_seconds=300,
                if_unreachable=advice,
                reaches_hub=False,  # it may have come from the cache
            )
        )
    except UserError as error:
        raise UserError(str(error) if advice in str(error) else f"{error}{advice}") from error
    except (OSError, ValueError) as error:  # a cache that cannot be used, a changed dataset
        raise UserError(f"cannot read {DATASET}: {error}{advice}") from error
