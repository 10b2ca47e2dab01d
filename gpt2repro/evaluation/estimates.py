"""Figures with standard errors, and two of them as metrics of the `evaluate` library."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as SequenceOf
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Estimate:
    """A figure and the influence of each example on it.

    The influence function linearizes the figure in its examples, so one formula serves means,
    ratios and perplexities, and the difference of two models on the same examples is as easy:
    the standard error is std(influence) / sqrt(n).
    """

    value: float
    influence: np.ndarray  # (n,) float64, up to a constant

    @property
    def stderr(self) -> float:
        """Standard error over the examples as a sample; NaN for a single one."""
        n = len(self.influence)
        return float(self.influence.std(ddof=1) / n**0.5) if n > 1 else float("nan")

    def exp(self) -> "Estimate":
        """The figure's exponential, by the delta method."""
        value = float(np.exp(self.value))
        return Estimate(value, value * self.influence)

    def __mul__(self, factor: float) -> "Estimate":
        return Estimate(self.value * factor, self.influence * factor)

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference of two models on the same examples."""
        return Estimate(self.value - other.value, self.influence - other.influence)


def mean(values: ArrayLike) -> Estimate:
    values = np.asarray(values, dtype=np.float64)
    return Estimate(float(values.mean()), values)


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Sum over sum, each example (a row, a document) a cluster: the usual ratio estimator."""
    numerators, denominators = np.asarray(numerators), np.asarray(denominators)
    value = float(numerators.sum() / denominators.sum())
    return Estimate(value, (numerators - value * denominators) / denominators.mean())


def weighted(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """A weighted mean of figures that have no example in common; the weights add up to one.

    The examples of each are a sample of their own, and of a single one the error is not known.
    """
    n = sum(len(each.influence) for each in estimates)
    influences = [
        (each.influence - each.influence.mean())
        * (weight * n / len(each.influence) if len(each.influence) > 1 else np.nan)
        for each, weight in zip(estimates, weights, strict=True)
    ]
    value = sum(w * each.value for each, w in zip(estimates, weights, strict=True))
    return Estimate(value, np.concatenate(influences))


def choices(
    predictions: Sequence[ArrayLike], lengths: Sequence[ArrayLike], references: Sequence[int]
) -> dict[str, Estimate]:
    """`acc` and `acc_norm`, as `MultipleChoiceAccuracy` has them, with their errors."""
    rows = list(zip(predictions, lengths, references, strict=True))
    norm = [np.argmax(np.divide(scores, length)) == label for scores, length, label in rows]
    return {
        "acc": mean([np.argmax(scores) == label for scores, _, label in rows]),
        "acc_norm": mean(norm),
    }


def perplexity(
    predictions: ArrayLike, num_tokens: ArrayLike, num_words: ArrayLike, num_bytes: ArrayLike
) -> dict[str, Estimate]:
    """`loss`, perplexities and `bits_per_byte`, as `CorpusPerplexity` has them, with errors."""
    nats = -np.asarray(predictions)
    loss = ratio(nats, num_tokens)
    found = {"loss": loss, "token_perplexity": loss.exp()}
    if np.any(num_words):
        found["word_perplexity"] = ratio(nats, num_words).exp()
    if np.any(num_bytes):
        found["bits_per_byte"] = ratio(nats, num_bytes) * (1 / math.log(2))
    return found


# --- As metrics of `evaluate` ---------------------------------------------------------------------


class Metric(evaluate.Metric):
    """An `evaluate.Metric` that is built directly, so that nothing is fetched.

    `compute(...)` gives `{name: value, name_stderr: standard error}`. Across processes
    (`num_process`, `process_id`, `experiment_id`, as evaluate has it) the first process computes
    over the examples of all and the others get None.
    """

    inputs: Mapping[str, Any]
    figures: Callable[..., dict[str, Estimate]]

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._experiment_id, self._round = self.experiment_id, 0

    def _info(self) -> evaluate.MetricInfo:
        doc = self.__class__.__doc__ or ""
        features = Features(self.inputs)
        return evaluate.MetricInfo(
            description=doc, citation="", inputs_description=doc, features=features
        )

    def _init_writer(self, timeout: float = 1) -> None:
        # evaluate's processes meet over lock files that the experiment names. In a second round
        # under the same name a fast process slips through the locks of the first round and
        # overwrites what is still being read. A name for each round keeps the rounds apart.
        self.info.experiment_id = f"{self._experiment_id}-{self._round}"
        self._round += 1
        super()._init_writer(timeout)

    def _compute(self, **inputs) -> dict[str, float]:
        found = type(self).figures(**inputs)
        values = {name: estimate.value for name, estimate in found.items()}
        return values | {f"{name}_stderr": estimate.stderr for name, estimate in found.items()}


class MultipleChoiceAccuracy(Metric):
    """How often the most likely choice is the right one; the first of equals is taken.

    predictions: log-likelihood of each choice, nats. lengths: of each choice, in the unit that
    `acc_norm` divides by (`acc` does not). references: index of the right choice.
    """

    inputs = MappingProxyType(
        {
            **dict.fromkeys(("predictions", "lengths"), SequenceOf(Value("float64"))),
            "references": Value("int64"),
        }
    )
    figures = staticmethod(choices)


class CorpusPerplexity(Metric):
    """Loss per token, perplexity per token and per word, and bits per byte, of a whole corpus.

    predictions: log-likelihood of each document or row, nats. num_tokens, num_words, num_bytes: of
    each; they may be fractional, and zero words or bytes leave the figure out. Sums are divided
    once. Standard errors take documents as independent.
    """

    inputs = MappingProxyType(
        dict.fromkeys(("predictions", "num_tokens", "num_words", "num_bytes"), Value("float64"))
    )
    figures = staticmethod(perplexity)
