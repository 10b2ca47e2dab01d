"""Figures with standard errors, and one of them as a metric of the `evaluate` library."""

from collections.abc import Sequence
from dataclasses import dataclass

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


class MultipleChoiceAccuracy(evaluate.Metric):
    """How often the most likely choice is the right one; the first of equals is taken.

    predictions: log-likelihood of each choice, nats. lengths: of each choice, in the unit that
    `acc_norm` divides by (`acc` does not). references: index of the right choice.

    `compute(...)` gives `{name: value, name_stderr: standard error}`. It is built directly, so that
    nothing is fetched. Across processes (`num_process`, `process_id`, `experiment_id`, as evaluate
    has it) the first process computes over the examples of all and the others get None.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._experiment_id, self._round = self.experiment_id, 0

    def _info(self) -> evaluate.MetricInfo:
        doc, numbers = self.__class__.__doc__ or "", SequenceOf(Value("float64"))
        inputs = {"predictions": numbers, "lengths": numbers, "references": Value("int64")}
        return evaluate.MetricInfo(
            description=doc, citation="", inputs_description=doc, features=Features(inputs)
        )

    def _init_writer(self, timeout: float = 1) -> None:
        # evaluate's processes meet over lock files that the experiment names. In a second round
        # under the same name a fast process slips through the locks of the first round and
        # overwrites what is still being read. A name for each round keeps the rounds apart.
        self.info.experiment_id = f"{self._experiment_id}-{self._round}"
        self._round += 1
        super()._init_writer(timeout)

    def _compute(self, **inputs) -> dict[str, float]:
        found = choices(**inputs)
        values = {name: estimate.value for name, estimate in found.items()}
        return values | {f"{name}_stderr": estimate.stderr for name, estimate in found.items()}
