"""The orders in which other projects' loaders read shards, from beginning to end.

They read in turns: in a turn each of W processes takes the next B rows in its place, and a shard is
left when no whole turn and its last target are left. In `file`, llm.c's order, all processes leave
a shard together. In `build-nanogpt` each looks from its own place, so that the last of them may
leave a turn before the first, and be ahead of them from there on.

`chunk_rows` is their B * W. Lane l of L stands for their process l % W and its micro-batch l // W
of the step, which has R / L rows: with as many processes and rows a micro-batch as they have, each
process has their batches one by one. With any other number a step has the same rows.
"""

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from gpt2repro import UserError
from gpt2repro.data.corpora.shards import Shard, TokenShards, check_ids
from gpt2repro.data.rows.order import Position

BLOCK_TOKENS = 2**19  # of a shard, read at once for all lanes


class Run(NamedTuple):
    """Rows that lie one after the other in a shard."""

    shard: int
    first_row: int
    num_rows: int
    position: Position  # (epoch, shard, the reader's row in it, 0) of the first


class FileOrder:
    """Which rows a step has.

    A reader is what leaves a shard by itself: all processes in `file`, each in `build-nanogpt`. It
    has B' rows of every turn, and its rows are numbered through the shards, and again.
    """

    def __init__(
        self,
        corpus: TokenShards,
        *,
        order: str,
        sequence_length: int,
        rows_per_step: int,
        num_lanes: int,
        chunk_rows: int,
        num_ids: int,
    ) -> None:
        rows_of_lane = rows_per_step // num_lanes
        if order == "file":
            self._num_readers = 1
        else:
            self._num_readers, rest = divmod(chunk_rows, rows_of_lane)
            if rest or not self._num_readers or num_lanes % self._num_readers:
                raise UserError(
                    f"chunk_rows {chunk_rows} (their micro-batch x processes) is not a number of "
                    f"their micro-batches of {rows_of_lane} rows (batch_tokens / sequence_length / "
                    f"num_lanes) that divides num_lanes, {num_lanes}"
                )
        self.sequence_length, self._shards = sequence_length, corpus.training
        self._num_ids, self._content = num_ids, str(corpus.identity.get("content"))
        self._chunk_rows, self._rows_of_lane = chunk_rows, rows_of_lane
        self._rows_of_turn = chunk_rows // self._num_readers
        self._rows_of_step = rows_per_step // self._num_readers
        self._firsts = [self._first_rows(reader) for reader in range(self._num_readers)]

    def _first_rows(self, reader: int) -> list[int]:
        """Of each shard the number of the reader's first row in it, and of all its rows."""
        tokens = self._chunk_rows * self.sequence_length
        place = reader * self._rows_of_turn * self.sequence_length
        turns = [(shard.num_tokens - 1 - place) // tokens for shard in self._shards]
        if min(turns, default=0) < 1:
            raise UserError(
                f"chunk_rows: a shard does not hold {self._chunk_rows} rows of "
                f"{self.sequence_length} tokens and one more; lower it, or batch_tokens"
            )
        return [*accumulate((self._rows_of_turn * count for count in turns), initial=0)]

    def __str__(self) -> str:
        """Whose order it is, for people."""
        if self._num_readers == 1:
            return f"in the order of the files, {self._chunk_rows} rows at a time"
        size = f"{self._num_readers} processes of {self._rows_of_turn} rows each"
        return f"as build-nanogpt reads them in {size}"

    def num_pieces(self, lane: int) -> int:
        return len(self._shards)

    def start(self, lane: int) -> Position:
        return self.run(lane, lane // self._num_readers * self._rows_of_lane).position

    def row(self, lane: int, position: Position) -> int:
        """The number of the row at `position` among those of the lane's reader."""
        firsts = self._firsts[lane % self._num_readers]
        epoch, shard, row, offset = position
        if firsts[shard] + row >= firsts[shard + 1] or offset:
            raise position.beyond("rows of the shard")
        return epoch * firsts[-1] + firsts[shard] + row

    def after_step(self, row: int) -> int:
        """The lane's first row in the next step, after `row` in this one."""
        return row + self._rows_of_step

    def run(self, lane: int, row: int) -> Run:
        """Where the row number `row` of the lane's reader lies, and how many lie behind it."""
        reader = lane % self._num_readers
        firsts = self._firsts[reader]
        epoch, row = divmod(row, firsts[-1])
        shard = bisect_right(firsts, row) - 1
        turn, place = divmod(row - firsts[shard], self._rows_of_turn)
        first = turn * self._chunk_rows + reader * self._rows_of_turn + place
        position = Position(epoch, shard, row - firsts[shard], 0)
        return Run(shard, first, self._rows_of_turn - place, position)

    def rows(self, shard: int, first: int, count: int) -> np.ndarray:
        """(count, T+1) token ids: consecutive rows of a shard."""
        length = self.sequence_length
        begin, end = first * length, (first + count) * length + 1
        numbers = range(begin // BLOCK_TOKENS, (end - 1) // BLOCK_TOKENS + 1)
        blocks = [
            _block(self._shards[shard], number, self._num_ids, self._content) for number in numbers
        ]
        ids = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        ids = ids[begin - numbers[0] * BLOCK_TOKENS : end - numbers[0] * BLOCK_TOKENS]
        return np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length]


@lru_cache(maxsize=4)
def _block(shard: Shard, number: int, num_ids: int, content: str) -> np.ndarray:
    """`content`: of the corpus; shards of the same name may have been written again."""
    ids = shard.read(number * BLOCK_TOKENS, (number + 1) * BLOCK_TOKENS)
    check_ids(ids, num_ids, shard.source.name)
    return ids


class FileRows:
    """A lane's rows in the order of the files; see `mixture.Rows`."""

    def __init__(self, order: FileOrder, lane: int, position: Position) -> None:
        self._order, self._lane = order, lane
        self._row = order.row(lane, position)

    @property
    def position(self) -> Position:
        return self._order.run(self._lane, self._row).position

    def take(self, num_rows: int) -> np.ndarray:
        """(num_rows, T+1) token ids: all that the lane has of a step."""
        parts, left, row = [], num_rows, self._row
        while left:
            run = self._order.run(self._lane, row)
            count = min(left, run.num_rows)
            parts.append(self._order.rows(run.shard, run.first_row, count))
            left, row = left - count, row + count
        self._row = self._order.after_step(self._row)
        return np.concatenate(parts)
