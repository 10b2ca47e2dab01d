"""Held-out rows: the first units in dataset order, which are never trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2repro import UserError
from gpt2repro.data.corpora.corpus import Corpus
from gpt2repro.data.rows.documents import documents_in_order
from gpt2repro.data.rows.units import UnitReader
from gpt2repro.data.tokens.encoder import BulkEncoder

TOKENS_WORTH_READING_AHEAD = 2**20  # about a unit of FineWeb-Edu


@dataclass(frozen=True)
class ValidationSet:
    """Held-out rows in dataset order.

    rows: (N, T+1) token ids, the last of a row being the first of the next; never shuffled.
    num_bytes: (N,) float64, of the UTF-8 that each row's T targets stand for, an end of text none.
        Where a tokenizer leaves something out or changes it, a few documents' bytes are shared out
        among their tokens in proportion.
    """

    rows: np.ndarray
    num_bytes: np.ndarray


def validation_set(
    corpus: Corpus,
    encoder: BulkEncoder,
    *,
    sequence_length: int,
    num_units: int,
    max_tokens: int | None = None,
    num_reader_threads: int = 4,
    token_cache_dir: str | Path | None = None,
    unit_digests_dir: str | Path | None = None,
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
        unit_digests_dir=unit_digests_dir,
        encode_whole_units=num_ahead > 1,
    )
    end_of_text = np.array([encoder.eot_id], dtype=encoder.dtype)
    held, sizes, num_tokens = [], [np.zeros(0)], 0
    try:
        for documents, num_bytes in documents_in_order(reader, range(num_units), num_ahead):
            held.append(np.concatenate([p for ids in documents for p in (end_of_text, ids)]))
            size = encoder.bytes_of_ids[held[-1]]
            size = size if size.any() else held[-1] != encoder.eot_id
            sizes.append(size * (num_bytes / max(1, size.sum())))
            num_tokens += len(size)
            if max_tokens is not None and num_tokens > max_tokens:
                break
    finally:
        reader.close()
    usable = num_tokens - 1 if max_tokens is None else min(num_tokens - 1, max_tokens)
    num_rows = usable // sequence_length
    end, bytes_of_each = num_rows * sequence_length + 1, np.concatenate(sizes)
    if not (bytes_of_each[1:end] if num_rows else bytes_of_each).any():
        raise UserError("text_column: the validation rows hold no text, only empty documents")
    if num_rows < 1:
        raise UserError(
            f"num_validation_units: the {num_tokens} validation tokens do not fill one row of "
            f"{sequence_length} + 1"
        )
    flat = np.concatenate(held)[:end]
    rows = np.lib.stride_tricks.sliding_window_view(flat, sequence_length + 1)[::sequence_length]
    of_rows = bytes_of_each[1:end].reshape(num_rows, sequence_length).sum(axis=1)
    return ValidationSet(np.ascontiguousarray(rows), of_rows)


def together_held_out(parts: Sequence[ValidationSet]) -> ValidationSet:
    """The rows of several datasets, one after the other."""
    return ValidationSet(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.num_bytes for part in parts]),
    )
