"""How much text a dataset has, without reading all of it: documents are counted, tokens estimated.

The tokens of a sample stand for all, in proportion to the bytes in which text is stored. Where a
dataset tells its sizes only by being read, nothing is known (None).
"""

import numpy as np

from gpt2repro.data.corpora.corpus import Corpus
from gpt2repro.data.tokens.encoder import BulkEncoder
from gpt2repro.system.text import count_of, in_short

SAMPLE_CHARACTERS = 10**6  # to encode: tenths of a second
SAMPLE_UNITS = 8  # to read, at most: on the Hub each is a request


def tokens_per_byte(corpus: Corpus, encoder: BulkEncoder) -> float | None:
    """Tokens, those that end texts among them, to a byte as stored.

    Of units from all over, until they have a million characters.
    """
    if corpus.tokens_per_byte is not None:
        return corpus.tokens_per_byte
    num_tokens, num_bytes, room = 0.0, 0, SAMPLE_CHARACTERS
    for unit_index in range(0, corpus.num_units, -(-corpus.num_units // SAMPLE_UNITS)):
        if corpus.num_bytes is None or room <= 0:
            break
        sample, length, taken = [], 0, 0
        for text in corpus.read_unit(unit_index):
            length += len(text) + 1
            if taken < room:
                sample.append(text[: room - taken])
                taken += len(sample[-1]) + 1
        if sample:
            counted = len(sample) + sum(map(len, encoder.encode(sample)))
            num_tokens += counted * length / taken
            num_bytes += int(corpus.num_bytes[unit_index])
            room -= taken
    return num_tokens / num_bytes if num_bytes else None


def estimate_tokens(corpus: Corpus, units: range, rate: float | None) -> int | None:
    """Tokens of the units, at `tokens_per_byte`."""
    num_bytes = corpus.total_bytes(units)
    return None if num_bytes is None or rate is None else round(rate * num_bytes)


def units_to_hold_out(corpus: Corpus, num_tokens: int, rate: float | None) -> int:
    """As many from the beginning as hold about `num_tokens`: at least one, at most a tenth."""
    most = max(1, corpus.num_units // 10)
    if rate is None or corpus.num_bytes is None:
        return 1
    sizes = np.cumsum(corpus.num_bytes[: most - 1], dtype=np.int64)
    return 1 + int(np.sum(rate * sizes < num_tokens))


def in_words(corpus: Corpus, units: range, num_tokens: int | None) -> str:
    """`900 documents, about 1.1 M tokens`, as far as it is known."""
    if not units:
        return "nothing"
    num_documents = corpus.total_documents(units)
    parts = [] if num_documents is None else [count_of(num_documents, "document")]
    if num_tokens is not None:  # an estimate, to two digits
        rounded = num_tokens if num_tokens >= 10**6 else int(float(f"{num_tokens:.2g}"))
        parts.append(f"about {in_short(rounded)} tokens")
    return ", ".join(parts) or count_of(len(units), "unit")
