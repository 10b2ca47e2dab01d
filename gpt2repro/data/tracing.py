"""From rows back to documents: what a step's rows hold, and which steps saw a document."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gpt2repro import UserError
from gpt2repro.data.file_order import FileOrder
from gpt2repro.data.order import LaneState, Plan, Position
from gpt2repro.data.packing import LaneDocuments
from gpt2repro.data.stream import TokenStream
from gpt2repro.data.units import UnitReader


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


def trace(stream: TokenStream, lanes: Mapping[int, LaneState]) -> Iterator[TracedRow]:
    """The rows that `lanes` give next, in the order of `StepRows.tokens`; reads their units."""
    num_rows = stream.identity["rows_per_step"] // stream.identity["num_lanes"]
    length = stream.identity["sequence_length"]
    plans = _plans_of_documents(stream)
    readers = [UnitReader(source.corpus, stream.encoder) for source in stream.sources]
    try:
        for lane, state in lanes.items():
            chosen = stream.mixture.choose(state, slice(lane * num_rows, (lane + 1) * num_rows))
            rows = []
            for n, (plan, reader) in enumerate(zip(plans, readers, strict=True)):
                start = state.positions[n]
                if count_of := int(np.sum(chosen == n)):
                    documents = LaneDocuments(plan, reader, stream.encoder, lane, start)
                    flat = _stretches(documents, start, count_of * length + 1)
                    rows.append([_row(lane, n, flat, k * length, length) for k in range(count_of)])
                else:
                    rows.append([])
            for n in chosen:
                yield rows[n].pop(0)
    finally:
        for reader in readers:
            reader.close()


def _plans_of_documents(stream: TokenStream) -> list[Plan]:
    plans = [plan for plan in stream.plans if not isinstance(plan, FileOrder)]
    if len(plans) < len(stream.plans):
        raise UserError("order: rows are traced to documents in the order shuffled only")
    return plans


def _stretches(documents: LaneDocuments, start: Position, num_tokens: int) -> list[Stretch]:
    """The lane's documents from `start` on, as many as have `num_tokens`."""
    found: list[Stretch] = []
    for segment in documents:
        first = segment.position.offset
        found.append(Stretch(segment.document, segment.unit, first, segment.tokens))
        num_tokens -= len(segment.tokens)
        if num_tokens <= 0:
            break
    return found


def _row(lane: int, source: int, flat: list[Stretch], begin: int, length: int) -> TracedRow:
    """The T+1 tokens from `begin` on of the documents of `flat`."""
    parts, at = [], 0
    for stretch in flat:
        first, last = max(begin - at, 0), min(begin + length + 1 - at, len(stretch.tokens))
        if first < last:
            tokens = stretch.tokens[first:last]
            parts.append(stretch._replace(first_token=stretch.first_token + first, tokens=tokens))
        at += len(stretch.tokens)
    return TracedRow(lane, source, np.concatenate([part.tokens for part in parts]), parts)


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
        for unit in range(source.num_validation_units, source.corpus.num_units):
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
