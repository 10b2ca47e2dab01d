"""Whole units in dataset order, document after document: for validation, and for counting."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from gpt2repro.data.corpora.corpus import Corpus
from gpt2repro.data.rows.units import DOCUMENTS_PER_ENCODE, TextUnit, TokenUnit, UnitReader
from gpt2repro.data.tokens.encoder import BulkEncoder


def units_in_order(
    reader: UnitReader, units: range, num_ahead: int
) -> Iterator[TextUnit | TokenUnit]:
    """The units in dataset order, `num_ahead` of them under way."""
    futures: deque[Future] = deque()
    upcoming = iter(units)
    while True:
        while len(futures) < num_ahead and (unit_index := next(upcoming, None)) is not None:
            futures.append(reader.submit(unit_index))
        if not futures:
            return
        yield futures.popleft().result()


def documents_in_order(
    reader: UnitReader, units: range, num_ahead: int
) -> Iterator[tuple[list[np.ndarray], int]]:
    """The documents of `units` in dataset order, a few at a time, with their UTF-8 bytes."""
    for unit in units_in_order(reader, units, num_ahead):
        for begin in range(0, len(unit), DOCUMENTS_PER_ENCODE):
            yield unit.encode(range(begin, min(len(unit), begin + DOCUMENTS_PER_ENCODE)))


def count_epoch_tokens(
    corpus: Corpus,
    encoder: BulkEncoder,
    num_validation_units: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_reader_threads: int = 4,
    token_cache_dir: str | Path | None = None,
    unit_digests_dir: str | Path | None = None,
    on_unit: Callable[[int], object] | None = None,
) -> int:
    """How many tokens one epoch has, end-of-text tokens included, by reading all of it.

    Process `rank` counts every `world_size`-th unit: add up the processes' counts.
    `on_unit(1)` is called after each of them.
    """
    units = range(num_validation_units + rank, corpus.num_units, world_size)
    reader = UnitReader(
        corpus,
        encoder,
        num_threads=num_reader_threads,
        token_cache_dir=token_cache_dir,
        unit_digests_dir=unit_digests_dir,
        encode_whole_units=True,
    )
    try:
        num_tokens = 0
        for unit in units_in_order(reader, units, num_reader_threads):
            assert isinstance(unit, TokenUnit)
            num_tokens += len(unit) + len(unit.tokens)
            if on_unit:
                on_unit(1)
        return num_tokens
    finally:
        reader.close()
