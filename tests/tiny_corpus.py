"""Small deterministic texts, a corpus in memory and an encoder whose tokens are bytes."""

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2repro import UserError
from gpt2repro.data.corpora.corpus import Corpus
from gpt2repro.data.opening import open_corpus

WORDS = ["the", "of", "and", "to", "in", "a", "is", "was", "which", "on", "that", "by", "with"]


def documents(num_documents: int, *, seed: int = 0, max_words: int = 60) -> list[str]:
    """Texts of 3 .. max_words words, each beginning with its own number: "<17> of the ..."."""
    rng = random.Random(seed)
    return [
        " ".join([f"<{number}>", *rng.choices(WORDS, k=rng.randint(3, max_words))])
        for number in range(num_documents)
    ]


def parquet_bytes(texts: Sequence[str | None], rows_per_group: int, **columns: list) -> bytes:
    """A parquet file of a text column, others first, in row groups."""
    table = pa.table(columns | {"text": pa.array(texts, pa.string())})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=rows_per_group)
    return buffer.getvalue()


def write_parquet(
    path: Path, texts: Sequence[str | None], rows_per_group: int = 10, **columns: list
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(parquet_bytes(texts, rows_per_group, **columns))


def write_lines(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))


def read_all(source: Corpus) -> list[list[str]]:
    return [source.read_unit(unit_index) for unit_index in range(source.num_units)]


def joined(source: Corpus) -> list[str]:
    return [text for unit in read_all(source) for text in unit]


def refusal(*arguments, **options) -> str:
    """What `open_corpus` answers to what it does not open: one line."""
    with pytest.raises(UserError) as raised:
        open_corpus(*arguments, **options)
    message = str(raised.value)
    assert "\n" not in message.strip()
    return message


class Bytes:
    """A parquet file in memory."""

    name = "a.parquet"

    def __init__(self, content: bytes) -> None:
        self.content, self.size = content, len(content)

    def read(self, start: int, length: int) -> bytes:
        return self.content[start : start + length]


class MemoryCorpus(Corpus):
    """Units given as lists; counts its reads."""

    def __init__(self, units: Sequence[Sequence[str | None]], name: str = "memory") -> None:
        self.units = units
        self.num_units = len(units)
        self.identity = {"dataset": name, "revision": None}
        self.num_documents = np.array([*map(len, units)])
        self.reads: list[int] = []

    def read_arrow(self, unit_index: int) -> pa.LargeStringArray:
        self.reads.append(unit_index)
        return pa.array(self.units[unit_index], pa.large_string())


def in_units(texts: Sequence[str | None], documents_per_unit: int) -> list[Sequence[str | None]]:
    return [
        texts[begin : begin + documents_per_unit]
        for begin in range(0, len(texts), documents_per_unit)
    ]


class ByteEncoder:
    """Token ids are UTF-8 bytes, end of text is 256: rows can be read back without a tokenizer."""

    eot_id = 256
    dtype = np.dtype(np.uint16)
    fingerprint = "bytes"
    bytes_of_ids = np.array([1] * 256 + [0])

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]


def read_back(tokens: np.ndarray) -> list[str]:
    """The documents in a run of byte tokens that begins with an end-of-text token."""
    assert tokens[0] == ByteEncoder.eot_id
    starts = np.flatnonzero(tokens == ByteEncoder.eot_id)
    pieces = np.split(tokens, starts[1:])
    return [bytes(piece[1:].astype(np.uint8)).decode("utf-8", "replace") for piece in pieces]
