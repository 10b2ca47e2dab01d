"""Figures with standard errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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


def nanmean(values: ArrayLike) -> Estimate:
    """The mean of those that are a number; the others are examples too, without influence."""
    values = np.asarray(values, dtype=np.float64)
    counts = ~np.isnan(values)
    if not counts.any():
        return mean(values)
    value = float(values[counts].mean())
    return Estimate(value, np.where(counts, values - value, 0) / counts.mean())


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Sum over sum, each example (a row, a document) a cluster: the usual ratio estimator."""
    numerators, denominators = np.asarray(numerators), np.asarray(denominators)
    value = float(numerators.sum() / denominators.sum())
    return Estimate(value, (numerators - value * denominators) / denominators.mean())


def weighted(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """A weighted mean of figures that have no example in common; the weights add up to one.

    The examples of each are a sample of their own, and of a single one the error is not known.
    """
    counts = np.array([len(each.influence) for each in estimates], dtype=float)
    n = counts.sum()
    # The spread of each is estimated from its own examples: divided by one less than they are.
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = weights * np.sqrt(counts / (counts - 1) * (n - 1) / n) * n / counts
    influences = [
        (each.influence - each.influence.mean()) * (scale if np.isfinite(scale) else np.nan)
        for each, scale in zip(estimates, scales, strict=True)
    ]
    value = sum(w * each.value for each, w in zip(estimates, weights, strict=True))
    return Estimate(value, np.concatenate(influences))


def choices(
    predictions: Sequence[ArrayLike], lengths: Sequence[ArrayLike], references: Sequence[int]
) -> dict[str, Estimate]:
    """`acc` and `acc_norm`, with their standard errors."""
    rows = list(zip(predictions, lengths, references, strict=True))
    norm = [np.argmax(np.divide(scores, length)) == label for scores, length, label in rows]
    return {
        "acc": mean([np.argmax(scores) == label for scores, _, label in rows]),
        "acc_norm": mean(norm),
    }


def perplexity(
    predictions: ArrayLike, num_tokens: ArrayLike, num_bytes: ArrayLike
) -> dict[str, Estimate]:
    """`loss`, `token_perplexity` and, where there are bytes, `bits_per_byte`, from nats."""
    nats = -np.asarray(predictions)
    loss = ratio(nats, num_tokens)
    found = {"loss": loss, "token_perplexity": loss.exp()}
    if np.any(num_bytes):
        found["bits_per_byte"] = ratio(nats, num_bytes) * (1 / math.log(2))
    return found
