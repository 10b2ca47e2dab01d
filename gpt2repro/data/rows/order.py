"""Which documents a lane reads, and in what order: pure functions of seed, lane and epoch."""

import hashlib
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from gpt2repro import UserError


class Position(NamedTuple):
    """Where a lane's next row begins."""

    epoch: int
    piece: int
    document: int
    offset: int

    def beyond(self, what: str) -> UserError:
        """The error for a position that the data do not have."""
        return UserError(
            f"the checkpoint's stream position is beyond the {what}: {tuple(self)} (epoch, piece, "
            "document, token); go on from an earlier checkpoint with --resume DIRECTORY"
        )


def permutation(size: int, *key: int | str) -> np.ndarray:
    """A permutation of range(size) that is a pure function of `key`, for ever.

    NumPy promises no stream of its generators across versions, so each index is ranked by
    SplitMix64 (Steele, Lea and Flood 2014) of the key's hash: integer arithmetic and a stable sort.
    """
    text = "/".join(map(str, key)).encode()
    state = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    steps = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = np.uint64(state) + steps
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


class LaneState(NamedTuple):
    """What a lane has given, and where it goes on.

    step: optimizer steps that its rows were given for.
    positions: of its next row, one in each dataset of the stream.
    """

    step: int
    positions: tuple[Position, ...]


class Piece(NamedTuple):
    """Part `part` of `num_parts` contiguous ranges of a unit's documents."""

    unit_index: int
    part: int
    num_parts: int

    def document_order(self, num_documents: int, seed: int, epoch: int) -> np.ndarray:
        begin = num_documents * self.part // self.num_parts
        end = num_documents * (self.part + 1) // self.num_parts
        return begin + permutation(
            end - begin, "documents", seed, epoch, self.unit_index, self.part
        )


class Plan:
    """Which pieces a lane reads, and in what order: a pure function of its four numbers."""

    def __init__(
        self, num_units: int, *, num_lanes: int, num_validation_units: int, seed: int
    ) -> None:
        self._num_lanes, self.seed = num_lanes, seed
        self._first_unit = num_validation_units
        self._num_training_units = num_units - num_validation_units
        self._num_parts = -(-num_lanes // self._num_training_units)
        self._order = lru_cache(maxsize=4)(self._order_of_epoch)

    def __reduce__(self) -> tuple:
        """A copy has a cache of its own, which could not be sent to another process."""
        numbers = {"num_validation_units": self._first_unit, "seed": self.seed}
        num_units = self._first_unit + self._num_training_units
        return partial(Plan, num_units, num_lanes=self._num_lanes, **numbers), ()

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        return permutation(self._num_training_units * self._num_parts, "units", self.seed, epoch)

    def start(self, lane: int) -> Position:
        """Where the lane's first row begins."""
        return Position(0, 0, 0, 0)

    def num_pieces(self, lane: int) -> int:
        """How many pieces the lane reads in every epoch; at least one."""
        return len(range(lane, self._num_training_units * self._num_parts, self._num_lanes))

    def unread_share(self) -> float:
        """Of the pieces, what lanes with more than the mean of them leave when that is read.

        Others have begun their next epoch by then. 0 where every lane has as many.
        """
        each = [self.num_pieces(lane) for lane in range(self._num_lanes)]
        mean = sum(each) / len(each)
        return sum(max(0.0, n - mean) for n in each) / sum(each)

    def piece(self, lane: int, epoch: int, index: int) -> Piece:
        """The lane's piece number `index` of an epoch, in reading order."""
        number = int(self._order(epoch)[lane + index * self._num_lanes])
        unit, part = divmod(number, self._num_parts)
        return Piece(self._first_unit + unit, part, self._num_parts)

    def places(self, unit_index: int, epoch: int) -> list[tuple[int, int, Piece]]:
        """Where a unit is read in an epoch: lanes, and numbers and pieces in their order."""
        unit = unit_index - self._first_unit
        numbers = range(unit * self._num_parts, (unit + 1) * self._num_parts)
        found = [int(at) for at in np.flatnonzero(np.isin(self._order(epoch), [*numbers]))]
        places = [(at % self._num_lanes, at // self._num_lanes) for at in found if unit >= 0]
        return [(lane, index, self.piece(lane, epoch, index)) for lane, index in places]
