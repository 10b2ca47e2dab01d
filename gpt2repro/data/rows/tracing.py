"""From rows back to documents: what a step's rows hold, and which steps saw a document."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gpt2repro import UserError
from gpt2repro.data.rows.file_order import FileOrder
from gpt2repro.data.rows.mixture import Lane
from gpt2repro.data.rows.order import LaneState, Plan, Position
from gpt2repro.data.rows.packing import LaneDocuments, LaneRows, Segment
from gpt2repro.data.rows.stream import TokenStream
from gpt2repro.data.rows.units import UnitReader


class Stretch(NamedTuple):
    """Tokens of one document in a row.

    first_token: of the document's, of which number 0 is the end-of-text token before it.
    """

    document: int
    unit: int
    first_token: int
    tokens: np.ndarray


class TracedRow(NamedTuple):
    """A row of a step: which lane gave it, from which source, and what it holds."""

    lane: int
    source: int
    tokens: np.ndarray  # (T+1,)
    stretches: list[Stretch]


class _TracedRows(LaneRows):
    """A lane in one source, that remembers what its rows hold."""

    def __init__(self, lane: int, source: int, *rest: Any) -> None:
        super().__init__(*rest)
        self._lane, self._source = lane, source
        self.rows: deque[TracedRow] = deque()

    def take(self, num_rows: int) -> np.ndarray:
        held = [*self._hold(num_rows)]
        rows = super().take(num_rows)
        for number, row in enumerate(rows):
            stretches = _stretches(held, number * self._sequence_length, len(row))
            self.rows.append(TracedRow(self._lane, self._source, row, stretches))
        return rows


def _stretches(segments: list[Segment], begin: int, length: int) -> list[Stretch]:
    """`length` tokens from `begin` on."""
    parts, at = [], 0
    for segment in segments:
        first, last = max(begin - at, 0), min(begin + length - at, len(segment.tokens))
        if first < last:
            number = segment.position.offset + first
            tokens = segment.tokens[first:last]
            parts.append(Stretch(segment.document, segment.unit, number, tokens))
        at += len(segment.tokens)
    return parts


def trace(stream: TokenStream, lanes: Mapping[int, LaneState]) -> Iterator[TracedRow]:
    """The rows that `lanes` give next, in the order of `StepRows.tokens`; reads their units."""
    num_rows = stream.identity["rows_per_step"] // stream.identity["num_lanes"]
    length, encoder = stream.identity["sequence_length"], stream.encoder
    plans = _plans_of_documents(stream)
    readers = [UnitReader(source.corpus, encoder) for source in stream.sources]

    def part(lane: int, n: int, start: Position) -> _TracedRows:
        documents = LaneDocuments(plans[n], readers[n], encoder, lane, start)
        return _TracedRows(lane, n, documents, length, start)

    try:
        for lane, state in lanes.items():
            parts = [part(lane, n, start) for n, start in enumerate(state.positions)]
            slots = slice(lane * num_rows, (lane + 1) * num_rows)
            rows = Lane([*parts], stream.sources, stream.mixture, slots, state.step)
            next(rows)
            for n in rows.chosen.tolist():
                yield parts[n].rows.popleft()
    finally:
        for reader in readers:
            reader.close()


def _plans_of_documents(stream: TokenStream) -> list[Plan]:
    plans = [plan for plan in stream.plans if not isinstance(plan, FileOrder)]
    if len(plans) < len(stream.plans):
        raise UserError("order: rows are traced to documents in the order shuffled only")
    return plans


class Place(NamedTuple):
    """A document of one of the sources."""

    source: int
    unit: int
    document: int


def find_documents(
    stream: TokenStream, matches: Callable[[str], bool], texts_of: Callable[[int, int], list[str]]
) -> Iterator[Place]:
    """The documents whose text `matches`, of all units that are trained on, in one pass.

    `texts_of(source, unit)` are the texts of a unit.
    """
    for n, source in enumerate(stream.sources):
        for unit in source.training_units:
            for document, text in enumerate(texts_of(n, unit)):
                if matches(text):
                    yield Place(n, unit, document)


class Sightings:
    """Which of the steps that go by have tokens of some documents."""

    def __init__(self, stream: TokenStream, places: Mapping[Place, int]) -> None:
        """`places`: the documents, with the number of documents of their units."""
        self._plans, self._places = _plans_of_documents(stream), places
        self._seed = stream.identity["seed"]
        self._known: dict[tuple[int, int], dict[tuple[int, int, int], list[Place]]] = {}

    def _of_epoch(self, source: int, epoch: int) -> dict[tuple[int, int, int], list[Place]]:
        """(lane, piece, document in its order) -> documents that lie there in an epoch."""
        if (source, epoch) not in self._known:
            found: dict[tuple[int, int, int], list[Place]] = {}
            for place, size in self._places.items():
                if place.source == source:
                    for lane, index, piece in self._plans[source].places(place.unit, epoch):
                        order = piece.document_order(size, self._seed, epoch)
                        for at in np.flatnonzero(order == place.document):
                            found.setdefault((lane, index, int(at)), []).append(place)
            self._known[source, epoch] = found
        return self._known[source, epoch]

    def of_step(
        self, before: Mapping[int, LaneState], after: Mapping[int, LaneState]
    ) -> list[tuple[int, Place]]:
        """(lane, document) of those of which the step between two states has tokens."""
        seen = []
        for lane, state in before.items():
            for n, (first, last) in enumerate(
                zip(state.positions, after[lane].positions, strict=True)
            ):
                if first == last:
                    continue
                for epoch in range(first.epoch, last.epoch + 1):
                    for (where, piece, document), places in self._of_epoch(n, epoch).items():
                        at = (epoch, piece, document)
                        # Where the next row begins with a document, these end with its first token.
                        begun = at < last[:3] or (at == last[:3] and last.offset > 0)
                        if where == lane and first[:3] <= at and begun:
                            seen += [(lane, place) for place in places]
        return seen


def consumed(stream: TokenStream, lanes: Mapping[int, LaneState]) -> list[dict[str, Any]]:
    """All that was read until `lanes`: for each source, lane and epoch the pieces, the last begun.

    A piece is [unit, part, of how many parts]; of the one that was begun as many documents as
    `documents`, in the order of the stream, and `tokens` of the next one were given.
    """
    plans, found = _plans_of_documents(stream), []
    for n, plan in enumerate(plans):
        for lane, state in sorted(lanes.items()):
            at = state.positions[n]
            for epoch in range(at.epoch + 1):
                whole = plan.num_pieces(lane) if epoch < at.epoch else at.piece
                pieces = [list(plan.piece(lane, epoch, index)) for index in range(whole)]
                entry: dict[str, Any] = {"source": n, "lane": lane, "epoch": epoch, "whole": pieces}
                if epoch == at.epoch and (at.document or at.offset):
                    piece = list(plan.piece(lane, epoch, at.piece))
                    entry["begun"] = {"piece": piece, "documents": at.document, "tokens": at.offset}
                if pieces or "begun" in entry:
                    found.append(entry)
    return found
