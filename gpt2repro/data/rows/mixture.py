"""Several datasets in one stream: which of them a row comes from, by weights in tokens.

Every lane reads every dataset, with a position in each. All rows are equally long, so a weight in
tokens is a share of rows: each row of a step gets a point of [0, 1), evenly spread over the step,
shuffled, and shifted from step to step; cut at the weights, the points say which dataset it is.
So the choice is a pure function of seed, step and the row's place, on any number of processes, and
a step's share of a dataset is its weight to within a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Protocol

import numpy as np

from gpt2repro.data.corpora.corpus import Corpus
from gpt2repro.data.rows.order import LaneState, Position, permutation

# Multiples of the golden ratio's fraction spread evenly over [0, 1) however many are taken.
GOLDEN = 0x9E3779B9
ONE = 2**32
THE_DATASET = "the dataset"  # the label of the only one


@dataclass(frozen=True)
class Source:
    """A dataset of a stream.

    Args:
        num_validation_units: units at its beginning that are never trained on.
        weight: of its tokens, in proportion to the other sources' weights.
        epochs: passes over it, after which the others have its share, in proportion to theirs;
            None repeats it as long as the stream is read. A row that begins in the last of them is
            a lane's last.
        label: what messages call it.
        tokens_per_byte: of its text as stored, about; see size.py.
    """

    corpus: Corpus
    num_validation_units: int = 0
    weight: Fraction = Fraction(1)
    epochs: int | None = None
    label: str = THE_DATASET
    tokens_per_byte: float | None = None

    @property
    def training_units(self) -> range:
        return range(self.num_validation_units, self.corpus.num_units)

    def goes_on(self, lane: LaneState, index: int) -> bool:
        """Whether the lane, in which this is source number `index`, has rows of it left."""
        return self.epochs is None or lane.positions[index].epoch < self.epochs


def tokens_of_each(
    sources: Sequence[Source], sizes: Sequence[float | None], num_tokens: float
) -> list[float]:
    """Of so many tokens of a run those of each source; `sizes` has how many a pass over one is.

    What a source leaves that ends is the others', in proportion to their weights.
    """
    limits = [
        source.epochs * size if source.epochs and size else math.inf
        for source, size in zip(sources, sizes, strict=True)
    ]
    given, going_on = [0.0] * len(sources), {*range(len(sources))}
    while going_on:
        total = sum(sources[n].weight for n in going_on)
        shares = {n: num_tokens * float(sources[n].weight / total) for n in going_on}
        ended = {n for n, share in shares.items() if share >= limits[n]}
        for n in ended or going_on:
            given[n] = min(shares[n], limits[n])
        going_on = going_on - ended if ended else set()
        num_tokens -= sum(limits[n] for n in ended)
    return given


class Mixture:
    """Which source each row of a step comes from."""

    def __init__(self, sources: Sequence[Source], *, rows_per_step: int, seed: int) -> None:
        self._sources, self._num_rows, self._seed = sources, rows_per_step, seed
        self._points: tuple[int, np.ndarray] = (-1, np.zeros(0))  # of the step asked for last

    def choose(self, lane: LaneState, rows: slice) -> np.ndarray:
        """Indices of the sources of the lane's next rows, which lie at `rows` in the step."""
        if len(self._sources) == 1:
            return np.zeros(rows.stop - rows.start, np.int64)
        weights = [
            source.weight if source.goes_on(lane, index) else Fraction(0)
            for index, source in enumerate(self._sources)
        ]
        # A point p / (ONE * num_rows) lies below a cut c where p < c * ONE * num_rows.
        scale, total = ONE * self._num_rows, sum(weights)
        cuts = [-(-scale * below // total) for below in accumulate(weights)]
        return np.searchsorted(np.array(cuts), self._points_of(lane.step)[rows], side="right")

    def _points_of(self, step: int) -> np.ndarray:
        """(rows_per_step,) int64: each row's point times ONE * rows_per_step."""
        if self._points[0] != step:
            spread = permutation(self._num_rows, "sources", self._seed, step)
            self._points = step, spread * ONE + step * GOLDEN % ONE
        return self._points[1]


class Rows(Protocol):
    """A lane in one source."""

    @property
    def position(self) -> Position:
        """Where its next row begins."""

    def take(self, num_rows: int) -> np.ndarray:
        """Its next (num_rows, T+1) token ids."""


@dataclass(frozen=True)
class Ended:
    """A lane in a source of which it has no rows left."""

    position: Position

    def take(self, num_rows: int) -> np.ndarray:
        raise AssertionError("no row is taken from a source that has ended")


class Lane:
    """A lane in all sources: an endless iterator over its rows of each step and its next state.

    Attributes:
        chosen: (rows,) the sources of the rows of the last step.
    """

    def __init__(
        self, parts: list[Rows], sources: Sequence[Source], mixture: Mixture, rows: slice, step: int
    ) -> None:
        self._parts, self._sources, self._mixture, self._rows = parts, sources, mixture, rows
        self._step, self.chosen = step, np.zeros(0, np.int64)

    @property
    def _state(self) -> LaneState:
        return LaneState(self._step, tuple(part.position for part in self._parts))

    def __next__(self) -> tuple[np.ndarray, LaneState]:
        """(rows, T+1) token ids, and where the lane goes on after them."""
        parts, state = self._parts, self._state
        ending = [n for n, s in enumerate(self._sources) if s.epochs and s.goes_on(state, n)]
        if ending:  # one of them may end with any row
            slots = range(self._rows.start, self._rows.stop)
            taken = [self._take_one(slice(slot, slot + 1)) for slot in slots]
            self.chosen = np.concatenate([chosen for chosen, _ in taken])
            rows = np.concatenate([row for _, row in taken])
        else:
            self.chosen = self._mixture.choose(state, self._rows)
            numbers, counts = np.unique(self.chosen, return_counts=True)
            of_sources = [parts[n].take(k) for n, k in zip(numbers, counts.tolist(), strict=True)]
            # They come source by source; back to the order of the step.
            order = np.argsort(np.argsort(self.chosen, kind="stable"))
            rows = np.concatenate(of_sources)[order]
        self._step += 1
        state = self._state
        for n in ending:
            if not self._sources[n].goes_on(state, n):
                parts[n] = Ended(parts[n].position)  # what it has read ahead goes
        return rows, state

    def _take_one(self, slot: slice) -> tuple[np.ndarray, np.ndarray]:
        chosen = self._mixture.choose(self._state, slot)
        return chosen, self._parts[int(chosen[0])].take(1)
