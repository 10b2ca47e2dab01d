"""Formats without row groups.

Local files (JSON lines, CSV, text: a line is a document, as `datasets` reads it) go through its
memory-mapped Arrow cache in units of 1,000 documents. Other Hub formats are streamed by `datasets`,
a file being one unit that is held in memory whole: prefer the Hub's own parquet copy, revision
`refs/convert/parquet`.
"""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa

from gpt2repro import UserError
from gpt2repro.data.corpus import Corpus, Found, check_text_column, digest, large_strings
from gpt2repro.system.patience import patiently

DOCUMENTS_PER_UNIT = 1000  # of local formats that have no row groups


def open_prepared(found: Found) -> Corpus | None:
    """Local files; None for those of the Hub."""
    if found.on_hub:
        return None
    files = digest([_fingerprint(Path(file)) for file in found.files])
    dataset = _prepare(found.builder, found.split, found.files)
    return ArrowCorpus(dataset, found.text_column, found.identity | {"files": files})


def open_streamed(found: Found) -> Corpus:
    """Whatever `datasets` can stream."""
    dataset = patiently(
        lambda: found.builder.as_streaming_dataset(split=found.split), f"open {found.files[0]}"
    )
    identity = found.identity | {"files": digest(found.files)}
    return StreamedCorpus(dataset, found.text_column, identity)


class ArrowCorpus(Corpus):
    """A local dataset of another format, prepared by `datasets`: units of 1,000 documents."""

    def __init__(self, dataset, text_column: str, identity: dict[str, Any]) -> None:
        types = {field.name: field.type for field in dataset.features.arrow_schema}
        check_text_column(types, text_column, identity["dataset"])
        self._dataset = dataset.select_columns([text_column]).with_format("arrow")
        self._text_column = text_column
        self.num_units = -(-len(dataset) // DOCUMENTS_PER_UNIT)
        self.identity = identity | {"num_documents": len(dataset), "text_column": text_column}

    def read_arrow(self, unit_index: int) -> pa.LargeStringArray:
        begin = unit_index * DOCUMENTS_PER_UNIT
        table = self._dataset[begin : begin + self.num_documents(unit_index)]
        return large_strings(table.column(self._text_column))

    def num_documents(self, unit_index: int) -> int:
        return min(DOCUMENTS_PER_UNIT, len(self._dataset) - unit_index * DOCUMENTS_PER_UNIT)


class StreamedCorpus(Corpus):
    """Any Hub dataset that `datasets` can stream: a unit is one of its shards (a file), whole."""

    def __init__(self, dataset, text_column: str, identity: dict[str, Any]) -> None:
        where = identity["dataset"]
        features = patiently(lambda: dataset._resolve_features().features, f"read {where}")
        types = {field.name: field.type for field in features.arrow_schema}
        check_text_column(types, text_column, where)
        self._dataset = dataset.select_columns([text_column])
        self._text_column = text_column
        self.num_units = dataset.num_shards
        self.identity = identity | {"text_column": text_column}

    def read_arrow(self, unit_index: int) -> pa.LargeStringArray:
        def read() -> pa.LargeStringArray:
            shard = self._dataset.shard(self.num_units, unit_index, contiguous=True)
            return pa.array([row[self._text_column] for row in shard], pa.large_string())

        return patiently(read, f"read file {unit_index} of {self.identity['dataset']}")


def _prepare(builder, split: str, files: list[str]):
    """Local files that are not parquet as a memory-mapped dataset, made once and cached."""
    from datasets.exceptions import DatasetGenerationError

    try:
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except (StopIteration, ValueError, DatasetGenerationError) as error:
        reason = error.__cause__ or error
        raise UserError(
            f"dataset_name: no documents can be read from {Path(files[0]).name}: "
            f"{type(reason).__name__} {reason}".rstrip()
        ) from error


def _fingerprint(path: Path) -> tuple[str, int, str]:
    """Name, size and both ends of a local file: tells files apart, and is cheap for any size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(2**16)
        file.seek(max(0, size - 2**16))
        ends += file.read()
    return path.name, size, hashlib.blake2b(ends, digest_size=16).hexdigest()
