"""The token stream: documents -> rows of T+1 token ids, the same rows on any number of processes.

    corpus ──units──> plan ──pieces──> lane_documents ──documents──> lane_rows ──rows──> TokenStream

- The training units (all but the first `num_validation_units`) are permuted anew for every epoch.
  Lane l of L owns every L-th of them and goes on into its own next epoch when they are used up.
- A lane permutes a unit's documents, puts the end-of-text token before each (a document without
  text is that token alone), and cuts the endless result into rows of T+1 tokens, one every T
  tokens: the last token of a row, a target there, is the first input of the next.
- A step takes `rows_per_step / L` rows of every lane. Process r of W owns lanes r, r+W, r+2W, ...:
  which rows a step has depends on neither W nor anything else of the machine.
- A lane's state is the place of its next row's first token: (epoch, piece of the lane in that
  epoch, document in the piece's order, token in the document). It travels with the rows, so that a
  checkpoint holds what was consumed, and not what was read ahead.

With fewer training units than lanes, every unit is cut into ceil(L / units) contiguous ranges of
documents, and "piece" means such a range; else a piece is a unit.
"""

import hashlib
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gpt2repro import UserError
from gpt2repro.data.corpus import Corpus
from gpt2repro.data.tokenizer import BulkEncoder
from gpt2repro.data.units import TextUnit, TokenUnit, UnitReader
from gpt2repro.system.threads import PoolClosed

NUM_STEPS_AHEAD = 4
DOCUMENTS_PER_ENCODE = 8  # encoded at a time, so that the first step does not wait for whole units
MAX_EMPTY_EPOCHS = 100
TOKENS_WORTH_READING_AHEAD = 2**20  # about a unit of FineWeb-Edu
STATE_VERSION = 1

# The recipe's name of what an identity holds, where the two differ.
FIELD_OF = {
    "dataset": "dataset_name",
    "config": "dataset_config",
    "split": "dataset_split",
    "revision": "dataset_revision",
    "files": "the digest of the data files",
    "tokenizer": "tokenizer_name's fingerprint",
    "rows_per_step": "rows_per_step (batch_tokens / sequence_length)",
}


class Position(NamedTuple):
    """Where a lane's next row begins."""

    epoch: int
    piece: int
    document: int
    offset: int


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


class Piece(NamedTuple):
    """Part `part` of `num_parts` contiguous ranges of a unit's documents."""

    unit: int
    part: int
    num_parts: int

    def document_order(self, num_documents: int, seed: int, epoch: int) -> np.ndarray:
        begin = num_documents * self.part // self.num_parts
        end = num_documents * (self.part + 1) // self.num_parts
        return begin + permutation(end - begin, "documents", seed, epoch, self.unit, self.part)


class Plan:
    """Which pieces a lane reads, and in what order: a pure function of its four numbers."""

    def __init__(
        self, num_units: int, *, num_lanes: int, num_validation_units: int, seed: int
    ) -> None:
        self.num_lanes, self.seed = num_lanes, seed
        self._first_unit = num_validation_units
        self.num_training_units = num_units - num_validation_units
        self.num_parts = -(-num_lanes // self.num_training_units)
        self._order = lru_cache(maxsize=4)(self._order_of_epoch)

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        return permutation(self.num_training_units * self.num_parts, "units", self.seed, epoch)

    def pieces(self, lane: int, epoch: int) -> list[Piece]:
        """The lane's pieces of an epoch, in reading order; at least one."""
        return [
            Piece(
                self._first_unit + int(n) // self.num_parts, int(n) % self.num_parts, self.num_parts
            )
            for n in self._order(epoch)[lane :: self.num_lanes]
        ]


class Segment(NamedTuple):
    """A document's tokens, its end-of-text token first, from `position.offset` onwards."""

    position: Position
    tokens: np.ndarray


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
            pieces = self._plan.pieces(self._lane, epoch)
            for index in range(piece, len(pieces)):
                yield epoch, index, pieces[index]
            epoch, piece = epoch + 1, 0

    def _read_ahead(self) -> tuple[int, int, Piece, Future]:
        epoch, index, piece = next(self._pieces)
        return epoch, index, piece, self._reader.submit(piece.unit)

    def __iter__(self) -> Iterator[Segment]:
        document, offset = self._start.document, self._start.offset
        num_empty = 0
        while True:
            epoch, index, piece, future = self._next
            unit = future.result()
            order = piece.document_order(len(unit), self._plan.seed, epoch)
            num_empty = 0 if len(order) else num_empty + 1
            if num_empty > MAX_EMPTY_EPOCHS:
                raise UserError(
                    f"num_lanes: lane {self._lane} finds no documents; take fewer lanes"
                )
            yield from self._segments(unit, order, Position(epoch, index, document, offset))
            document = offset = 0

    def _segments(
        self, unit: TextUnit | TokenUnit, order: np.ndarray, start: Position
    ) -> Iterator[Segment]:
        asked = False
        for begin in range(start.document, max(len(order), 1), DOCUMENTS_PER_ENCODE):
            if not asked and 2 * begin >= len(order):
                self._next, asked = self._read_ahead(), True
            encoded, _ = unit.encode(order[begin : begin + DOCUMENTS_PER_ENCODE])
            for document, ids in enumerate(encoded, begin):
                tokens = np.empty(len(ids) + 1, ids.dtype)
                tokens[0], tokens[1:] = self._end_of_text, ids
                offset = start.offset if document == start.document else 0
                position = Position(start.epoch, start.piece, document, offset)
                yield Segment(position, tokens[offset:])
        if not asked:
            self._next = self._read_ahead()


def lane_rows(
    segments: Iterator[Segment], num_rows: int, sequence_length: int
) -> Iterator[tuple[np.ndarray, Position]]:
    """Pack segments: yields (num_rows, T+1) token ids and the position of the row after them."""
    stride = num_rows * sequence_length
    held: deque[Segment] = deque()
    num_held = 0
    while True:
        while num_held <= stride:  # one more than the stride: the last row's last target
            held.append(next(segments))
            num_held += len(held[-1].tokens)
        flat = np.concatenate([segment.tokens for segment in held])[: stride + 1]
        rows = np.lib.stride_tricks.sliding_window_view(flat, sequence_length + 1)
        drop = stride
        while drop >= len(held[0].tokens):
            drop -= len(held.popleft().tokens)
        position, tokens = held.popleft()
        held.appendleft(Segment(position._replace(offset=position.offset + drop), tokens[drop:]))
        num_held -= stride
        yield rows[::sequence_length], held[0].position


def rows_digest(rows: np.ndarray) -> int:
    """Sum over rows, mod 2**64, of an 8-byte BLAKE2b of each row's ids as little-endian int32.

    A sum, so that it depends on neither the order of the rows nor who holds them.
    """
    rows = np.ascontiguousarray(rows, dtype="<i4")
    hashes = (hashlib.blake2b(row.data, digest_size=8).digest() for row in rows)
    return sum(int.from_bytes(value, "little") for value in hashes) % 2**64


@dataclass(frozen=True)
class StepRows:
    """One process's share of one optimizer step.

    tokens: (rows_per_step / world_size, T+1) int64, lane after lane.
    digest: `rows_digest` of these rows; add up the processes' mod 2**64 for the step's.
    lanes: {lane: position of the lane's next row after this step}, of this process's lanes.
    """

    tokens: torch.Tensor
    digest: int
    lanes: dict[int, Position]


class _Producer:
    """The background thread that encodes and packs a few steps ahead."""

    def __init__(self, make_lanes: Callable[[], dict[int, Iterator]], reader: UnitReader) -> None:
        self._make_lanes, self._reader = make_lanes, reader
        self._steps: queue.Queue = queue.Queue(maxsize=NUM_STEPS_AHEAD)
        self._next: StepRows | BaseException | None = None  # taken from the queue by `wait`
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="token-stream", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether `get` will answer at once; waits up to `seconds` for that."""
        if self._next is None:
            try:
                self._next = self._steps.get(timeout=seconds)
            except queue.Empty:
                return False
        return True

    def get(self) -> StepRows:
        item = self._steps.get() if self._next is None else self._next
        if isinstance(item, BaseException):
            self._next = item  # whoever asks again is told again
            raise item
        self._next = None
        return item

    def close(self) -> None:
        """End the threads. A read that waits out an outage ends by itself later; nobody waits."""
        self._stop.set()
        self._reader.close()
        while not self._steps.empty():  # wakes a thread that waits for room
            self._steps.get_nowait()
        if self._thread is not threading.current_thread():  # garbage is collected anywhere
            self._thread.join(5.0)

    def _put(self, item: StepRows | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._steps.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _run(self) -> None:
        try:
            lanes = self._make_lanes()
            while not self._stop.is_set():
                self._put(_step(lanes))
        except PoolClosed:
            pass
        except BaseException as error:  # the consumer's to handle, whatever it is
            self._put(error)


def _step(lanes: dict[int, Iterator[tuple[np.ndarray, Position]]]) -> StepRows:
    parts, positions = [], {}
    for lane, rows_and_position in lanes.items():
        rows, positions[lane] = next(rows_and_position)
        parts.append(rows)
    rows = np.concatenate(parts)
    return StepRows(torch.from_numpy(rows.astype(np.int64)), rows_digest(rows), positions)


class TokenStream:
    """An endless iterator over this process's `StepRows`, one an optimizer step.

    Args:
        corpus, encoder: what is read and what encodes it.
        sequence_length: T; rows have T+1 tokens.
        rows_per_step: rows of one optimizer step over all processes.
        num_lanes: a multiple of `world_size` that divides `rows_per_step`.
        num_validation_units: units at the corpus's beginning that are never trained on.
        seed: of every permutation.
        rank, world_size: which lanes are this process's.
        token_cache_dir: keep tokenized units there; later passes and outages read the disk.

    Raises `UserError` that names the recipe's field. An error of a background thread is raised by
    the next `next()`.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: BulkEncoder,
        *,
        sequence_length: int,
        rows_per_step: int,
        num_lanes: int,
        num_validation_units: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_reader_threads: int = 4,
        token_cache_dir: str | Path | None = None,
    ) -> None:
        assert 0 <= rank < world_size and sequence_length > 0
        _check_lanes(num_lanes, rows_per_step, world_size)
        _check_units(corpus, num_lanes, num_validation_units)
        self.identity: dict[str, Any] = corpus.identity | {
            "tokenizer": encoder.fingerprint,
            "sequence_length": sequence_length,
            "rows_per_step": rows_per_step,
            "num_lanes": num_lanes,
            "num_validation_units": num_validation_units,
            "seed": seed,
        }
        self.wait_seconds = 0.0  # spent in next(), waiting for rows
        self._corpus, self._encoder = corpus, encoder
        self._plan = Plan(
            corpus.num_units,
            num_lanes=num_lanes,
            num_validation_units=num_validation_units,
            seed=seed,
        )
        self._reader_options: dict[str, Any] = {
            "num_threads": num_reader_threads,
            "token_cache_dir": token_cache_dir,
        }
        self._positions = {
            lane: Position(0, 0, 0, 0) for lane in range(rank, num_lanes, world_size)
        }
        self._producer: _Producer | None = None
        self._finalizer: weakref.finalize | None = None

    @property
    def lanes(self) -> dict[int, Position]:
        """Where this process's lanes go on: `StepRows.lanes` of the last step, or the start."""
        return dict(self._positions)

    def __iter__(self) -> "TokenStream":
        return self

    def __next__(self) -> StepRows:
        with self._waiting() as producer:
            step = producer.get()
        self._positions = step.lanes
        return step

    def wait(self, seconds: float) -> bool:
        """Whether the next step is at hand; waits up to `seconds` for it.

        For a caller that has something else to look at during an outage, such as signals.
        """
        with self._waiting() as producer:
            return producer.wait(seconds)

    @contextmanager
    def _waiting(self) -> Iterator[_Producer]:
        began = time.perf_counter()
        if self._producer is None:
            self._start()
        assert self._producer is not None
        try:
            yield self._producer
        finally:
            self.wait_seconds += time.perf_counter() - began

    def _start(self) -> None:
        reader = UnitReader(self._corpus, self._encoder, **self._reader_options)
        num_rows = self.identity["rows_per_step"] // self.identity["num_lanes"]
        plan, encoder, positions = self._plan, self._encoder, dict(self._positions)
        sequence_length = self.identity["sequence_length"]

        def make_lanes() -> dict[int, Iterator]:
            documents = {
                lane: LaneDocuments(plan, reader, encoder, lane, position)
                for lane, position in positions.items()
            }
            return {
                lane: lane_rows(iter(segments), num_rows, sequence_length)
                for lane, segments in documents.items()
            }

        self._producer = _Producer(make_lanes, reader)
        # Also at exit: a thread that comes back from native code to a dying interpreter aborts it.
        self._finalizer = weakref.finalize(self, self._producer.close)

    def close(self) -> None:
        """End the background threads; the stream can go on from where it was."""
        if self._finalizer is not None:
            self._finalizer()
        self._producer = self._finalizer = None

    def state_dict(self, lanes: Mapping[int, Sequence[int]] | None = None) -> dict[str, Any]:
        """The stream's state as plain JSON values.

        `lanes`: `StepRows.lanes` of the last consumed step, of all processes; by default this
        process's own, which is everything if it is the only one.
        """
        if lanes is None:
            lanes = self._positions
        num_lanes = self.identity["num_lanes"]
        assert sorted(lanes) == list(range(num_lanes)), "the state needs the lanes of every process"
        return {
            "version": STATE_VERSION,
            "identity": self.identity,
            "lanes": [list(map(int, lanes[lane])) for lane in range(num_lanes)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, saved by any number of processes.

        Raises `UserError` that names what differs between this stream and the one that was saved.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError(f"the checkpoint's stream state has version {state.get('version')!r}")
        saved = state["identity"]
        for name in [*self.identity, *saved]:
            then, now = saved.get(name), self.identity.get(name)
            if then != now:
                field = FIELD_OF.get(name, name)
                raise UserError(
                    f"cannot resume the data stream: {field} was {then!r} in the checkpoint and is "
                    f"{now!r} now: set it back, or give another exp_name to start a new run"
                )
        self.close()
        self._positions = {lane: Position(*state["lanes"][lane]) for lane in self._positions}


def _check_lanes(num_lanes: int, rows_per_step: int, world_size: int) -> None:
    if num_lanes > 0 and num_lanes % world_size == 0 and rows_per_step % num_lanes == 0:
        return
    fitting = [
        n for n in range(world_size, rows_per_step + 1, world_size) if rows_per_step % n == 0
    ]
    if not fitting:
        raise UserError(
            f"batch_tokens: {rows_per_step} rows a step cannot be shared by {world_size} processes"
        )
    raise UserError(
        f"num_lanes: {num_lanes} must be a multiple of the {world_size} processes and divide the "
        f"{rows_per_step} rows of a step; these fit: {', '.join(map(str, fitting))}"
    )


def _check_units(corpus: Corpus, num_lanes: int, num_validation_units: int) -> None:
    num_training_units = corpus.num_units - num_validation_units
    if num_validation_units < 0 or num_training_units < 1:
        raise UserError(
            f"num_validation_units: {num_validation_units} of the dataset's {corpus.num_units} "
            "units leave none to train on"
        )
    if num_training_units >= num_lanes:
        return
    num_documents = 0
    for unit in range(num_validation_units, corpus.num_units):
        if (count := corpus.num_documents(unit)) is None:
            return  # a lane without documents is told when it is read
        num_documents += count
    if num_documents < num_lanes:
        raise UserError(
            f"num_lanes: {num_lanes} lanes are more than the {num_documents} documents to train on"
        )


# -------------------------------------------------------------------------------------- validation


@dataclass(frozen=True)
class ValidationSet:
    """Held-out rows in dataset order.

    rows: (N, T+1) token ids, the last of a row being the first of the next; never shuffled.
    num_tokens, num_bytes: of all the encoded text, end-of-text tokens counted as tokens, so that
    bits per byte = (nats per token / ln 2) * num_tokens / num_bytes.
    """

    rows: np.ndarray
    num_tokens: int
    num_bytes: int


def _documents_in_order(
    reader: UnitReader, units: range, num_ahead: int
) -> Iterator[tuple[list[np.ndarray], int]]:
    """The documents of `units` in dataset order, a few at a time, with their UTF-8 bytes."""
    futures: deque[Future] = deque()
    upcoming = iter(units)
    while True:
        while len(futures) < num_ahead and (number := next(upcoming, None)) is not None:
            futures.append(reader.submit(number))
        if not futures:
            return
        unit = futures.popleft().result()
        for begin in range(0, len(unit), DOCUMENTS_PER_ENCODE):
            yield unit.encode(range(begin, min(len(unit), begin + DOCUMENTS_PER_ENCODE)))


def validation_set(
    corpus: Corpus,
    encoder: BulkEncoder,
    *,
    sequence_length: int,
    num_units: int,
    max_tokens: int | None = None,
    num_reader_threads: int = 4,
    token_cache_dir: str | Path | None = None,
) -> ValidationSet:
    """The first `num_units` units as one stream of documents, cut into rows of T+1.

    At most `max_tokens` tokens are predicted; reading stops as soon as there are enough.
    """
    if not 0 < num_units <= corpus.num_units:
        raise UserError(
            f"num_validation_units: {num_units} of the dataset's {corpus.num_units} units"
        )
    num_ahead = num_reader_threads
    if max_tokens is not None:
        num_ahead = min(num_ahead, 1 + max_tokens // TOKENS_WORTH_READING_AHEAD)
    reader = UnitReader(
        corpus,
        encoder,
        num_threads=num_reader_threads,
        token_cache_dir=token_cache_dir,
        encode_whole_units=num_ahead > 1,
    )
    end_of_text = np.array([encoder.eot_id], dtype=encoder.dtype)
    held, num_tokens, num_bytes = [], 0, 0
    try:
        for documents, size in _documents_in_order(reader, range(num_units), num_ahead):
            held += [part for ids in documents for part in (end_of_text, ids)]
            num_tokens += len(documents) + sum(map(len, documents))
            num_bytes += size
            if max_tokens is not None and num_tokens > max_tokens:
                break
    finally:
        reader.close()
    if num_bytes == 0:
        raise UserError("text_column: the validation units hold no text, only empty documents")
    usable = num_tokens - 1 if max_tokens is None else min(num_tokens - 1, max_tokens)
    num_rows = usable // sequence_length
    if num_rows < 1:
        raise UserError(
            f"num_validation_units: the {num_tokens} validation tokens do not fill one row of "
            f"{sequence_length} + 1"
        )
    flat = np.concatenate(held)[: num_rows * sequence_length + 1]
    rows = np.lib.stride_tricks.sliding_window_view(flat, sequence_length + 1)[::sequence_length]
    return ValidationSet(np.ascontiguousarray(rows), num_tokens, num_bytes)


def count_epoch_tokens(
    corpus: Corpus,
    encoder: BulkEncoder,
    num_validation_units: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_reader_threads: int = 4,
    token_cache_dir: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """How many tokens one epoch has, end-of-text tokens included, by reading all of it.

    Process `rank` counts every `world_size`-th unit: add up the processes' counts.
    `progress(units done, units in all)` is called after each unit.
    """
    units = range(num_validation_units + rank, corpus.num_units, world_size)
    reader = UnitReader(
        corpus,
        encoder,
        num_threads=num_reader_threads,
        token_cache_dir=token_cache_dir,
        encode_whole_units=True,
    )
    try:
        num_tokens = 0
        for done, number in enumerate(units, 1):
            for documents, _ in _documents_in_order(reader, range(number, number + 1), 1):
                num_tokens += len(documents) + sum(map(len, documents))
            if progress:
                progress(done, len(units))
        return num_tokens
    finally:
        reader.close()
