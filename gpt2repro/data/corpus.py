"""Where text comes from: a corpus is numbered units of documents, each read by its number.

A *unit* is one row group of a parquet file, on the Hub or on disk (parquet.py), or as many
documents of another format (other_formats.py). No reader has state: reads are retried by number.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from gpt2repro import UserError


class Corpus(ABC):
    """Numbered units of documents.

    Attributes:
        num_units: how many; numbers are 0 .. num_units - 1 in dataset order.
        identity: what was opened (dataset, config, split, revision, a digest of the files, the text
            column), as plain JSON values. Equal identities give equal units.
    """

    num_units: int
    identity: dict[str, Any]

    @abstractmethod
    def read_arrow(self, unit_index: int) -> pa.LargeStringArray:
        """The unit's documents in order; null where the dataset has a null. Thread-safe."""

    def read_unit(self, unit_index: int) -> list[str]:
        """The unit's documents in order; a null is an empty document."""
        documents = self.read_arrow(unit_index)
        return [_as_text(document) for document in documents]

    def num_documents(self, unit_index: int) -> int | None:
        """How many documents the unit has; None where only reading it would tell."""
        return None

    def num_bytes(self, unit_index: int) -> int | None:
        """What reading the unit moves, compressed; None where unknown."""
        return None


def as_bytes(document: pa.LargeStringScalar) -> bytes:
    """A document's UTF-8; a null is empty."""
    buffer = document.as_buffer()
    return b"" if buffer is None else buffer.to_pybytes()


def _as_text(document: pa.LargeStringScalar) -> str:
    """A document as `str`; bytes that are no UTF-8 become U+FFFD."""
    return as_bytes(document).decode("utf-8", "replace")


@dataclass(frozen=True)
class Found:
    """The files that `datasets` found under a name, before anything of them is read."""

    name: str  # as the user gave it
    builder: Any  # of `datasets`
    files: list[str]
    split: str
    text_column: str
    identity: dict[str, Any]
    on_hub: bool


def check_text_column(types: dict[str, pa.DataType], text_column: str, where: str) -> None:
    """Refuse a column that is missing or no text.

    Raises:
        UserError: naming `text_column` and the columns of text in `where`.
    """
    texts = [name for name, type_ in types.items() if _is_text(type_)]
    if text_column not in types:
        raise UserError(
            f"text_column: {where} has no column {text_column!r}; columns of text: "
            f"{', '.join(texts) or 'none'}"
        )
    if text_column not in texts:
        raise UserError(
            f"text_column: column {text_column!r} of {where} is {types[text_column]}, not text; "
            f"columns of text: {', '.join(texts) or 'none'}"
        )


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return pa.types.is_string(type_) or pa.types.is_large_string(type_)


def large_strings(column: pa.ChunkedArray) -> pa.LargeStringArray:
    """A column of any text type, dictionaries included, in one piece."""
    chunks = [chunk.cast(pa.large_string()) for chunk in column.chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], pa.large_string())


def digest(content: Any) -> str:
    """A hash of plain JSON values, for `identity`."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
