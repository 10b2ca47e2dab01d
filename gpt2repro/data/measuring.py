"""How fast a stream comes, and how long an epoch is, without reading all of it."""

import time

from gpt2repro.data.corpus import Corpus
from gpt2repro.data.encoder import BulkEncoder
from gpt2repro.data.stream import TokenStream


def stored_bytes(corpus: Corpus, units: range) -> int | None:
    """What reading the units moves, compressed; None where the dataset does not tell."""
    sizes = [corpus.num_bytes(unit_index) for unit_index in units]
    return None if None in sizes else sum(filter(None, sizes))


def estimate_tokens(corpus: Corpus, encoder: BulkEncoder, training: range) -> int | None:
    """From the tokens of the first of the units, in proportion to the stored bytes."""
    num_bytes = stored_bytes(corpus, training)
    sample_bytes = corpus.num_bytes(training[0])
    if not (num_bytes and sample_bytes):
        return None
    sample = encoder.encode(corpus.read_unit(training[0]))
    num_tokens = len(sample) + sum(map(len, sample))
    return round(num_tokens * num_bytes / sample_bytes)


def time_stream(stream: TokenStream, step_tokens: int, seconds: float) -> tuple[float, float]:
    """Seconds to the first step, and the tokens a second of the steps after it."""
    began = time.perf_counter()
    next(stream)
    first = time.perf_counter() - began
    began, num_steps = time.perf_counter(), 0
    try:
        while num_steps < 2 or time.perf_counter() - began < seconds:
            next(stream)
            num_steps += 1
    finally:
        stream.close()
    return first, num_steps * step_tokens / (time.perf_counter() - began)
