"""Streams of small texts in memory, of all the ranks of a world."""

import json

from tiny_corpus import ByteEncoder, MemoryCorpus, documents, in_units

from gpt2repro.data.rows.mixture import Source
from gpt2repro.data.rows.stream import TokenStream

TEXTS = documents(300)

OPTIONS = {
    "sequence_length": 32,
    "rows_per_step": 16,
    "num_lanes": 8,
    "num_validation_units": 2,
    "seed": 7,
}


def corpus(texts=TEXTS, documents_per_unit=10) -> MemoryCorpus:
    return MemoryCorpus(in_units(texts, documents_per_unit))


def stream_of(source, encoder, *, num_validation_units, **options) -> TokenStream:
    """The stream of one dataset."""
    return TokenStream([Source(source, num_validation_units)], encoder, **options)


def streams(world_size=1, state=None, source=None, **options) -> list[TokenStream]:
    """The streams of one dataset, of all ranks of a world."""
    options = OPTIONS | options
    sources = [Source(source or corpus(), options.pop("num_validation_units"))]
    return streams_of(sources, world_size, state, **options)


def streams_of(sources, world_size=1, state=None, **options) -> list[TokenStream]:
    """The streams of all ranks of a world, from a state if one is given."""
    ranks = [
        TokenStream(sources, ByteEncoder(), **options, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for stream in ranks:
        if state:
            stream.load_state_dict(state)
    return ranks


def run(ranks: list[TokenStream], num_steps: int) -> tuple[list[int], list[set], dict]:
    """Per step the digest and the set of rows over all ranks; the state after the last step."""
    digests, rows, lanes = [], [], {}
    for _ in range(num_steps):
        steps = [next(stream) for stream in ranks]
        digests.append(sum(step.digest for step in steps) % 2**64)
        rows.append({tuple(row) for step in steps for row in step.tokens.tolist()})
        for step in steps:
            lanes |= step.lanes
    state = ranks[0].state_dict(lanes)
    for stream in ranks:
        stream.close()
    return digests, rows, json.loads(json.dumps(state))
