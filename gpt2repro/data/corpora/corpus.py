"""Where text comes from: a corpus is numbered units of documents, each read by its number.

A *unit* is one row group of a parquet file, on the Hub or on disk (parquet.py), or as many
documents of another format (other_formats.py). No reader has state: reads are retried by number.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gpt2repro import UserError
from gpt2repro.data.tokens.encoder import BulkEncoder

TokenArrays = tuple[np.ndarray, np.ndarray, np.ndarray]


class Corpus(ABC):
    """Numbered units of documents.

    Attributes:
        num_units: how many; numbers are 0 .. num_units - 1 in dataset order.
        identity: what was opened (dataset, config, split, revision, a digest of the files, of local
            ones also of what they hold, the text column), as plain JSON values. Equal identities
            give equal units.
        num_held_out_units: how many at the beginning are for validation by their files' names.
        num_documents, num_bytes: (num_units,) of integers: how many documents each unit has, and
            what reading it moves, compressed; None where only reading would tell.
        tokens_per_byte: as stored, where that is known without encoding.
    """

    num_units: int
    identity: dict[str, Any]
    num_held_out_units: int = 0
    num_documents: np.ndarray | None = None
    num_bytes: np.ndarray | None = None
    tokens_per_byte: float | None = None

    @abstractmethod
    def read_arrow(self, unit_index: int) -> pa.LargeStringArray:
        """The unit's documents in order; null where the dataset has a null. Thread-safe."""

    def read_unit(self, unit_index: int) -> list[str]:
        """The unit's documents in order; a null is an empty document."""
        # What is no UTF-8 becomes U+FFFD.
        return [as_bytes(each).decode("utf-8", "replace") for each in self.read_arrow(unit_index)]

    def read_tokens(self, unit_index: int, encoder: BulkEncoder) -> TokenArrays | None:
        """The unit's documents as token ids, back to back, where each ends, and its bytes of text.

        None where the corpus holds text. Thread-safe.
        """
        return None

    def where(self, unit_index: int) -> str:
        """The unit's place in the dataset, for people."""
        return f"unit {unit_index}"

    def total_documents(self, units: range) -> int | None:
        """`num_documents` of consecutive units in all."""
        return _total(self.num_documents, units)

    def total_bytes(self, units: range) -> int | None:
        """`num_bytes` of consecutive units in all."""
        return _total(self.num_bytes, units)


def _total(counts: np.ndarray | None, units: range) -> int | None:
    return None if counts is None else int(counts[units.start : units.stop].sum(dtype=np.int64))


def as_bytes(document: pa.LargeStringScalar) -> bytes:
    """A document's UTF-8; a null is empty."""
    buffer = document.as_buffer()
    return b"" if buffer is None else buffer.to_pybytes()


@dataclass(frozen=True)
class Found:
    """The files that `datasets` found under a name, before anything of them is read."""

    name: str  # as the user gave it
    format: str  # "parquet", "json", "csv", "text", or another that `datasets` has a module for
    builder: Any  # of `datasets`; None for local files of the four formats
    files: list[str]
    split: str
    text_column: str
    identity: dict[str, Any]
    on_hub: bool
    document: str | None = None  # of local text: "file" or "line", or as many files as there are


def check_text_column(schema: pa.Schema, text_column: str, where: str) -> None:
    """Refuse a column that is missing, there twice, or no text.

    Raises:
        UserError: naming `text_column` and the columns of text in `where`.
    """
    texts = ", ".join(field.name for field in schema if _is_text(field.type)) or "none"
    fields = [field for field in schema if field.name == text_column]
    if not fields:
        raise UserError(
            f"text_column: {where} has no column {text_column!r}; columns of text: {texts}"
        )
    if len(fields) > 1:
        raise UserError(f"text_column: {where} has {len(fields)} columns {text_column!r}")
    if not _is_text(fields[0].type):
        raise UserError(
            f"text_column: column {text_column!r} of {where} is {fields[0].type}, not text; "
            f"columns of text: {texts}"
        )


def _is_text(type_: pa.DataType) -> bool:
    """Whether it holds text, for some writers as bytes, for some where there is none as null."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    kinds = {pa.string(), pa.large_string(), pa.string_view(), pa.null()}
    return type_ in kinds | {pa.binary(), pa.large_binary(), pa.binary_view()}


def large_strings(column: pa.ChunkedArray) -> pa.LargeStringArray:
    """A column of any text type, dictionaries included, in one piece; bytes must be UTF-8."""
    chunks = [chunk.cast(pa.large_string()) for chunk in column.chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], pa.large_string())


@contextmanager
def in_a_line(what: str | Callable[[], str]) -> Iterator[None]:
    """Around calls of a library that reads foreign files: what it raises becomes one `UserError`.

    `what` names the field to change and says what failed. Files are broken in more ways than
    libraries document. Want of memory is no fault of theirs, and is told elsewhere.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        chain = (error, error.__cause__) if error.__cause__ else (error,)
        reason = " ".join(": ".join(f"{type(each).__name__} {each}" for each in chain).split())
        said = what if isinstance(what, str) else what()
        raise UserError(f"{said}: {reason[:300]}") from error


def digest(content: Any) -> str:
    """A hash of plain JSON values, for `identity`."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
