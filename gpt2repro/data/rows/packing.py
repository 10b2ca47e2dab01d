"""Documents of a lane one after the other, cut into rows of T+1 token ids."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from gpt2repro import UserError
from gpt2repro.data.rows.order import Piece, Plan, Position
from gpt2repro.data.rows.units import DOCUMENTS_PER_ENCODE, TextUnit, TokenUnit, UnitReader
from gpt2repro.data.tokens.encoder import BulkEncoder

MAX_EMPTY_EPOCHS = 100


class Segment(NamedTuple):
    """A document's tokens, its end-of-text token first, from `position.offset` onwards.

    unit, document: which one it is, as the corpus numbers them.
    """

    position: Position
    tokens: np.ndarray
    unit: int
    document: int


class LaneDocuments:
    """An endless iterator over the documents of a lane, as `Segment`s, from a position onwards.

    Reads its next piece ahead: as soon as it exists, and when half of the current one is used up.
    """

    def __init__(
        self, plan: Plan, reader: UnitReader, encoder: BulkEncoder, lane: int, start: Position
    ) -> None:
        self._plan, self._reader, self._lane = plan, reader, lane
        self._end_of_text = encoder.eot_id
        self._start = start
        self._pieces = self._from(start.epoch, start.piece)
        self._next = self._read_ahead()

    def _from(self, epoch: int, piece: int) -> Iterator[tuple[int, int, Piece]]:
        while True:
            for index in range(piece, self._plan.num_pieces(self._lane)):
                yield epoch, index, self._plan.piece(self._lane, epoch, index)
            epoch, piece = epoch + 1, 0

    def _read_ahead(self) -> tuple[int, int, Piece, Future]:
        epoch, index, piece = next(self._pieces)
        return epoch, index, piece, self._reader.submit(piece.unit_index)

    def __iter__(self) -> Iterator[Segment]:
        document, offset = self._start.document, self._start.offset
        last_filled = self._start.epoch  # the last one in which there was a document
        while True:
            epoch, index, piece, future = self._next
            unit = future.result()
            order = piece.document_order(len(unit), self._plan.seed, epoch)
            last_filled = epoch if len(order) else last_filled
            if epoch - last_filled > MAX_EMPTY_EPOCHS:
                raise UserError(
                    f"num_lanes: lane {self._lane} finds no documents; take fewer lanes"
                )
            start = Position(epoch, index, document, offset)
            yield from self._segments(unit, piece.unit_index, order, start)
            document = offset = 0

    def _segments(
        self, unit: TextUnit | TokenUnit, unit_index: int, order: np.ndarray, start: Position
    ) -> Iterator[Segment]:
        if start.document >= max(len(order), 1):
            raise start.beyond("documents of the piece")
        asked = False
        for begin in range(start.document, max(len(order), 1), DOCUMENTS_PER_ENCODE):
            if not asked and 2 * begin >= len(order):
                self._next, asked = self._read_ahead(), True
            encoded, _ = unit.encode(order[begin : begin + DOCUMENTS_PER_ENCODE])
            for document, ids in enumerate(encoded, begin):
                tokens = np.empty(len(ids) + 1, ids.dtype)
                tokens[0], tokens[1:] = self._end_of_text, ids
                offset = start.offset if document == start.document else 0
                if offset >= len(tokens):
                    raise start.beyond("document's tokens")
                position = Position(start.epoch, start.piece, document, offset)
                yield Segment(position, tokens[offset:], unit_index, int(order[document]))
        if not asked:
            self._next = self._read_ahead()


class LaneRows:
    """The segments of a lane, packed into rows of T+1 ids, one every T tokens.

    Attributes:
        position: where the next row begins.
    """

    def __init__(
        self, segments: Iterable[Segment], sequence_length: int, position: Position
    ) -> None:
        self._segments, self._sequence_length = iter(segments), sequence_length
        self._held: deque[Segment] = deque()
        self._num_held = 0
        self.position = position

    def _hold(self, num_rows: int) -> deque[Segment]:
        """The segments of the next rows, and of one token more: the last row's last target."""
        while self._num_held <= num_rows * self._sequence_length:
            self._held.append(next(self._segments))
            self._num_held += len(self._held[-1].tokens)
        return self._held

    def take(self, num_rows: int) -> np.ndarray:
        """The next (num_rows, T+1) token ids."""
        stride, held = num_rows * self._sequence_length, self._hold(num_rows)
        flat = np.concatenate([segment.tokens for segment in held])[: stride + 1]
        rows = np.lib.stride_tricks.sliding_window_view(flat, self._sequence_length + 1)
        drop = stride
        while drop >= len(held[0].tokens):
            drop -= len(held.popleft().tokens)
        rest = held.popleft()
        self.position = rest.position._replace(offset=rest.position.offset + drop)
        held.appendleft(rest._replace(position=self.position, tokens=rest.tokens[drop:]))
        self._num_held -= stride
        return rows[:: self._sequence_length]


def rows_digest(rows: np.ndarray) -> int:
    """Sum over rows, mod 2**64, of an 8-byte BLAKE2b of each row's ids as little-endian int32.

    A sum, so that it depends on neither the order of the rows nor who holds them.
    """
    rows = np.ascontiguousarray(rows, dtype="<i4")
    hashes = (hashlib.blake2b(row.data, digest_size=8).digest() for row in rows)
    return sum(int.from_bytes(value, "little") for value in hashes) % 2**64
