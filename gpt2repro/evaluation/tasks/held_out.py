"""Text that the training data keep out of training."""

import zlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gpt2repro.evaluation.estimates import Estimate, perplexity
from gpt2repro.evaluation.likelihoods import Request, Scores
from gpt2repro.evaluation.task import Task


class Validation(Task):
    """The rows of T+1 tokens that the training data keep out of training; all T are scored."""

    name, prefix, asked = "val", "val/", "row"

    def __init__(self, rows: np.ndarray, num_bytes: ArrayLike = 0.0) -> None:
        """`rows` (N, T+1) integers; `num_bytes` (N,) of the text of their targets, 0 if unknown."""
        self._num_bytes = num_bytes
        self._crc32 = zlib.crc32(np.ascontiguousarray(rows).data)
        super().__init__(rows, None, max_length=rows.shape[1] - 1)

    def identity(self) -> Any:
        return len(self.rows), self._crc32  # another tokenizer cuts the text elsewhere

    def encode(self, tokenizer, examples: list[np.ndarray]) -> list[list[Request]]:
        return [[Request(row, len(row) - 1)] for row in examples]

    def score(self, scores: Scores) -> dict[str, Estimate]:
        num_tokens = np.full(len(self.requests), float(self.max_length))
        return perplexity(scores.log_likelihood, num_tokens, self._num_bytes)
