"""LAMBADA (Paperno et al. 2016): the last word of a passage."""

from typing import Any

from gpt2repro.evaluation.estimates import Estimate, LastWordAccuracy
from gpt2repro.evaluation.likelihoods import Request, Scores, encode_pairs
from gpt2repro.evaluation.task import Benchmark, MalformedRow, Task, text_of


class Lambada(Task):
    """OpenAI's version, as lm-evaluation-harness' `lambada_openai`: the last word of a passage."""

    name, prefix, asked = "lambada", "lambada/", "last word"

    def parse(self, row: Any) -> tuple[str, str]:
        context, _, word = text_of(row, "text").rpartition(" ")
        if not word:
            raise MalformedRow("no last word after the last space")
        return context, f" {word}"

    def encode(self, tokenizer, examples: list[tuple[str, str]]) -> list[list[Request]]:
        return [[request] for request in encode_pairs(tokenizer, examples)]

    def score(self, scores: Scores) -> dict[str, Estimate]:
        return LastWordAccuracy(keep_in_memory=True).compute(
            predictions=scores.log_likelihood, is_greedy=scores.is_greedy, estimates=True
        )


BENCHMARK = Benchmark(
    name="lambada",
    title="LAMBADA (OpenAI's version)",
    dataset="EleutherAI/lambada_openai",
    config="default",
    split="test",
    conventions={"lm_eval": Lambada},
)
