"""From rows back to documents, against what the rows themselves say."""

from fractions import Fraction

import pytest
from tiny_corpus import ByteEncoder, MemoryCorpus, documents, in_units
from tiny_streams import OPTIONS

from gpt2repro.data.rows.mixture import Source
from gpt2repro.data.rows.stream import TokenStream
from gpt2repro.data.rows.tracing import Place, Sightings, consumed, trace

MIXED = {name: value for name, value in OPTIONS.items() if name != "num_validation_units"}
SIZES = (240, 90)


def texts(n: int) -> list[list[str]]:
    """Documents of source n, each with its own number in front; some are empty."""
    made = documents(SIZES[n], seed=n, max_words=25)
    return in_units([text if at % 17 else "" for at, text in enumerate(made)], 10)


@pytest.fixture(params=[1, 2], ids=["one", "mixture"])
def stream(request):
    weights = (Fraction(2), Fraction(1))
    sources = [Source(MemoryCorpus(texts(n)), 1, weights[n]) for n in range(request.param)]
    made = TokenStream(sources, ByteEncoder(), **MIXED)
    yield made
    made.close()


def test_rows_are_made_of_the_documents_that_are_told(stream):
    """Through two epochs: the same tokens, each where it stands in its document."""
    for step in range(260):
        lanes = stream.lanes
        given = next(stream).tokens.tolist()
        if step % 13:
            continue
        traced = list(trace(stream, lanes))
        assert [row.tokens.tolist() for row in traced] == given
        assert [row.lane for row in traced] == [lane for lane in range(8) for _ in range(2)]
        for row in traced:
            for part in row.stretches:
                text = texts(row.source)[part.unit][part.document]
                whole = [256, *text.encode()]
                assert part.tokens.tolist() == whole[part.first_token :][: len(part.tokens)]
    assert min(lane.positions[0].epoch for lane in stream.lanes.values()) >= 1


def test_sightings_are_those_of_the_rows(stream):
    """But for a document of which a step has the first token alone, as its last target."""
    places = [Place(n, unit, 3) for n in range(len(stream.sources)) for unit in (2, 5, 8)]
    sightings = Sightings(stream, dict.fromkeys(places, 10))
    told, seen, only_begun = set(), set(), set()
    for step in range(130):
        before = stream.lanes
        next(stream)
        told |= {(step, place) for _, place in sightings.of_step(before, stream.lanes)}
        for row in trace(stream, before):
            for part in row.stretches:
                place = Place(row.source, part.unit, part.document)
                if place in places:
                    is_begun = part.first_token == 0 and len(part.tokens) == 1
                    (only_begun if is_begun else seen).add((step, place))
    assert seen <= told <= seen | only_begun
    assert {place for _, place in told} == {*places}


def test_what_was_read_is_what_was_given(stream):
    """The documents of the pieces are those whose tokens were given, no more and no fewer."""
    num_tokens = 0
    for _ in range(150):
        num_tokens += next(stream).tokens[:, :-1].numel()
    counted = 0
    for entry in consumed(stream, stream.lanes):
        units = texts(entry["source"])

        def lengths(piece, epoch=entry["epoch"], units=units):
            plan = stream.plans[0]
            unit, part, parts = piece
            order = type(plan.piece(0, 0, 0))(unit, part, parts).document_order(
                len(units[unit]), plan.seed, epoch
            )
            return [1 + len(units[unit][at].encode()) for at in order]

        counted += sum(sum(lengths(piece)) for piece in entry["whole"])
        if begun := entry.get("begun"):
            counted += sum(lengths(begun["piece"])[: begun["documents"]]) + begun["tokens"]
    assert counted == num_tokens
