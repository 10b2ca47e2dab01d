"""Where text comes from: a corpus is numbered units of documents, each read by its number.

A *unit* is one row group of a parquet file, on the Hub or on disk: `datasets` says which files a
name, config, split and revision mean, and one ranged read brings the text column's chunk of one row
group, so nothing but text travels and no reader has state. Reads are retried by number.

Other local formats (JSON lines, CSV, text: a line is a document, as `datasets` reads it) go through
its memory-mapped Arrow cache in units of 1,000 documents. Other Hub formats are streamed by
`datasets`, a file being one unit that is held in memory whole: prefer the Hub's own parquet copy,
revision `refs/convert/parquet`.
"""

import hashlib
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpt2repro import UserError
from gpt2repro.system.patience import PassingFault, patiently
from gpt2repro.system.threads import DaemonPool

DOCUMENTS_PER_UNIT = 1000  # of local formats that have no row groups
FOOTER_GUESS_BYTES = 2**16  # the first read of a parquet file's end; a longer footer costs a second
NUM_FOOTER_THREADS = 16
NUM_PARSED_FOOTERS = 16
REQUEST_TIMEOUT_SECONDS = 20.0  # without a byte: then the read is tried again
BUILDER_OF_SUFFIX = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
}


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
    def read_arrow(self, unit: int) -> pa.LargeStringArray:
        """The unit's documents in order; null where the dataset has a null. Thread-safe."""

    def read_unit(self, unit: int) -> list[str]:
        """The unit's documents in order; a null is an empty document."""
        documents = self.read_arrow(unit)
        return [as_text(document) for document in documents]

    def num_documents(self, unit: int) -> int | None:
        """How many documents the unit has; None where only reading it would tell."""
        return None

    def num_bytes(self, unit: int) -> int | None:
        """What reading the unit moves, compressed; None where unknown."""
        return None


def as_bytes(document: pa.LargeStringScalar) -> bytes:
    """A document's UTF-8; a null is empty."""
    buffer = document.as_buffer()
    return b"" if buffer is None else buffer.to_pybytes()


def as_text(document: pa.LargeStringScalar) -> str:
    """A document as `str`; bytes that are no UTF-8 become U+FFFD."""
    return as_bytes(document).decode("utf-8", "replace")


# ----------------------------------------------------------------------------------------- parquet


class Source(Protocol):
    """A file that is read by ranges."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def read(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`."""


@dataclass(frozen=True)
class LocalSource:
    name: str
    path: Path
    size: int

    def read(self, start: int, length: int) -> bytes:
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            content = file.read(length)
        if len(content) != length:
            raise UserError(f"dataset_name: {self.path} ends early: it changed while being read")
        return content


@dataclass(frozen=True)
class HubSource:
    """A file of a Hub repository at one commit. Every read asks for its (signed) address anew."""

    name: str
    repository: str
    revision: str
    size: int

    def read(self, start: int, length: int) -> bytes:
        what = f"read {length:,} bytes of {self.repository}/{self.name}"
        return patiently(lambda: self._read_once(start, length), what)

    def _read_once(self, start: int, length: int) -> bytes:
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repository, self.name, repo_type="dataset", revision=self.revision)
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={start}-{start + length - 1}",
            "Accept-Encoding": "identity",
        }
        request: dict[str, Any] = {"headers": headers, "timeout": REQUEST_TIMEOUT_SECONDS}
        # Streamed, so that a server that ignores the range is hung up on before it sends gigabytes.
        with get_session().stream("GET", url, **request) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            served = response.headers.get("Content-Range", "")
            if response.status_code != 206 or not served.startswith(f"bytes {start}-"):
                raise PassingFault(
                    f"asked for bytes {start}-{start + length - 1}, was served HTTP "
                    f"{response.status_code} {served}".rstrip()
                )
            content = response.read()
        if len(content) != length:
            raise PassingFault(f"asked for {length:,} bytes, {len(content):,} came")
        return content


class _OneChunk:
    """A file object for pyarrow in which only the bytes of one column chunk exist."""

    closed = False

    def __init__(self, source: Source, start: int, length: int) -> None:
        self._source, self._start = source, start
        self._content = memoryview(source.read(start, length))
        self._position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: 0, 1: self._position, 2: self._source.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._content = memoryview(b"")

    def read(self, length: int) -> bytes:
        begin = self._position - self._start
        length = min(length, self._source.size - self._position)
        self._position += length
        if begin >= 0 and begin + length <= len(self._content):
            return bytes(self._content[begin : begin + length])
        return self._source.read(self._start + begin, length)  # a writer that pads its chunks


class _Unit(NamedTuple):
    """A row group's place: which file, which of its row groups, and the text column's chunk."""

    file: int
    row_group: int
    num_rows: int
    start: int
    length: int


class ParquetCorpus(Corpus):
    """Units are row groups, numbered through the files in dataset order."""

    def __init__(
        self, sources: Sequence[Source], text_column: str, identity: dict[str, Any]
    ) -> None:
        self._sources = sources
        self._text_column = text_column
        pool = DaemonPool(min(NUM_FOOTER_THREADS, len(sources)), "footer-reader")
        try:
            # Parsed they take six times the room, which 2,400 files of FineWeb-Edu would notice.
            self._footers: list[bytes] = pool.map(_read_footer, sources)
        finally:
            pool.close(0)
        self._metadata = lru_cache(NUM_PARSED_FOOTERS)(self._parse_footer)
        units = [unit for file in range(len(sources)) for unit in self._units_of(file)]
        self._units = np.array(units, np.int64).reshape(-1, len(_Unit._fields))
        self.num_units = len(units)
        names = [source.name for source in sources]
        files = _digest([names, _digest(self._units.tolist())])
        self.identity = identity | {"files": files, "text_column": text_column}

    def _parse_footer(self, file: int) -> pq.FileMetaData:
        try:
            return pq.read_metadata(pa.BufferReader(zlib.decompress(self._footers[file])))
        except (pa.ArrowInvalid, OSError) as error:
            name, reason = self._sources[file].name, str(error).strip()
            raise UserError(f"dataset_name: {name} has a broken footer: {reason}") from error

    def _units_of(self, file: int) -> list[_Unit]:
        metadata, name = self._metadata(file), self._sources[file].name
        schema = metadata.schema
        types = {field.name: field.type for field in schema.to_arrow_schema()}
        _check_text_column(types, self._text_column, name)
        paths = [schema.column(index).path for index in range(len(schema))]
        leaf = paths.index(self._text_column)
        units = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            chunk = group.column(leaf)
            start = min(chunk.data_page_offset, chunk.dictionary_page_offset or 2**62)
            units.append(_Unit(file, number, group.num_rows, start, chunk.total_compressed_size))
        return units

    def _unit(self, unit: int) -> _Unit:
        return _Unit(*self._units[unit].tolist())

    def read_arrow(self, unit: int) -> pa.LargeStringArray:
        place = self._unit(unit)
        source = self._sources[place.file]
        what = f"read row group {place.row_group} of {source.name}"
        if isinstance(source, HubSource):
            return patiently(lambda: self._decode(place), what)
        try:
            return self._decode(place)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"dataset_name: cannot {what}: {error}") from error

    def _decode(self, place: _Unit) -> pa.LargeStringArray:
        chunk = _OneChunk(self._sources[place.file], place.start, place.length)
        column = self._text_column
        metadata = self._metadata(place.file)
        try:
            with pq.ParquetFile(chunk, metadata=metadata, pre_buffer=False) as file:
                table = file.read_row_group(place.row_group, columns=[column], use_threads=False)
        except OSError as error:  # what pyarrow makes of a broken page header
            raise pa.ArrowInvalid(str(error)) from error
        return _large_strings(table.column(column))

    def num_documents(self, unit: int) -> int:
        return self._unit(unit).num_rows

    def num_bytes(self, unit: int) -> int:
        return self._unit(unit).length


def _read_footer(source: Source) -> bytes:
    """A parquet file's footer, compressed: one read, two if it is longer than the guess."""
    end = source.size
    if end < 12:
        raise UserError(f"dataset_name: {source.name} is no parquet file ({end} bytes)")
    guess = min(end, FOOTER_GUESS_BYTES)
    tail = source.read(end - guess, guess)
    if tail[-4:] != b"PAR1":
        raise UserError(f"dataset_name: {source.name} is no parquet file (or is encrypted)")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > end:
        raise UserError(f"dataset_name: {source.name} has a broken parquet footer")
    if length > guess:
        tail = source.read(end - length, length - guess) + tail
    return zlib.compress(tail[-length:], level=1)


def _check_text_column(types: dict[str, pa.DataType], text_column: str, where: str) -> None:
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


def _large_strings(column: pa.ChunkedArray) -> pa.LargeStringArray:
    chunks = [chunk.cast(pa.large_string()) for chunk in column.chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], pa.large_string())


# ----------------------------------------------------------------------------------- other formats


class ArrowCorpus(Corpus):
    """A local dataset of another format, prepared by `datasets`: units of 1,000 documents."""

    def __init__(self, dataset, text_column: str, identity: dict[str, Any]) -> None:
        types = {field.name: field.type for field in dataset.features.arrow_schema}
        _check_text_column(types, text_column, identity["dataset"])
        self._dataset = dataset.select_columns([text_column]).with_format("arrow")
        self._text_column = text_column
        self.num_units = -(-len(dataset) // DOCUMENTS_PER_UNIT)
        self.identity = identity | {"num_documents": len(dataset), "text_column": text_column}

    def read_arrow(self, unit: int) -> pa.LargeStringArray:
        begin = unit * DOCUMENTS_PER_UNIT
        table = self._dataset[begin : begin + self.num_documents(unit)]
        return _large_strings(table.column(self._text_column))

    def num_documents(self, unit: int) -> int:
        return min(DOCUMENTS_PER_UNIT, len(self._dataset) - unit * DOCUMENTS_PER_UNIT)


class StreamedCorpus(Corpus):
    """Any Hub dataset that `datasets` can stream: a unit is one of its shards (a file), whole."""

    def __init__(self, dataset, text_column: str, identity: dict[str, Any]) -> None:
        where = identity["dataset"]
        features = patiently(lambda: dataset._resolve_features().features, f"read {where}")
        types = {field.name: field.type for field in features.arrow_schema}
        _check_text_column(types, text_column, where)
        self._dataset = dataset.select_columns([text_column])
        self._text_column = text_column
        self.num_units = dataset.num_shards
        self.identity = identity | {"text_column": text_column}

    def read_arrow(self, unit: int) -> pa.LargeStringArray:
        def read() -> pa.LargeStringArray:
            shard = self._dataset.shard(self.num_units, unit, contiguous=True)
            return pa.array([row[self._text_column] for row in shard], pa.large_string())

        return patiently(read, f"read file {unit} of {self.identity['dataset']}")


# ----------------------------------------------------------------------------------------- opening


def open_corpus(
    dataset_name: str | Path,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    data_files: str | list[str] | None = None,
    text_column: str = "text",
    if_unreachable: str = "",
) -> Corpus:
    """Open a dataset of the Hub, a local directory or a local file.

    `config`, `split`, `revision` and `data_files` mean what they mean to `datasets.load_dataset`.
    A Hub revision is pinned to its commit, which `identity["revision"]` tells.
    `if_unreachable` is advice for a machine without a network, appended to that error.

    Raises `UserError` that names the recipe's field.
    """
    name = str(dataset_name)
    arguments = _local_arguments(name, data_files)
    identity: dict[str, Any] = {"dataset": "local files", "config": config, "split": split}
    on_hub = arguments is None
    if on_hub:
        revision = patiently(
            lambda: _commit(name, revision),
            f"look up the dataset {name!r} (dataset_name)",
            if_unreachable=if_unreachable,
        )
        arguments = {"path": name, "data_files": data_files, "revision": revision}
        identity["dataset"] = name
        identity["revision"] = revision
    assert arguments is not None
    builder = _load_builder(arguments | {"name": config}, name, on_hub, if_unreachable)
    identity["config"] = builder.config.name if on_hub else config
    files = _files_of_split(builder, split, name)
    corpus = _open_files(builder, files, split, text_column, identity, on_hub)
    if all(corpus.num_documents(unit) == 0 for unit in range(corpus.num_units)):
        raise UserError(f"dataset_split: {name} has no documents in split {split!r}")
    return corpus


def _local_arguments(name: str, data_files: Any) -> dict[str, Any] | None:
    """`load_dataset_builder`'s arguments for what is on this machine; None for a Hub name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return {"path": str(path.resolve()), "data_files": data_files}
    if path.is_file():
        builder = BUILDER_OF_SUFFIX.get(path.suffix.lower())
        if builder is None:
            known = ", ".join(BUILDER_OF_SUFFIX)
            raise UserError(f"dataset_name: {name} is none of {known}")
        return {"path": builder, "data_files": str(path.resolve())}
    if name in BUILDER_OF_SUFFIX.values():
        if not data_files:
            raise UserError(f"data_files: say which files the {name!r} reader is to read")
        return {"path": name, "data_files": data_files}
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"dataset_name: {name} is neither a local directory nor a Hub name")
    return None


def _commit(name: str, revision: str | None) -> str:
    """The commit that a branch, tag or abbreviated hash stands for now."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        commit = (
            HfApi()
            .dataset_info(name, revision=revision, expand=["sha"], timeout=REQUEST_TIMEOUT_SECONDS)
            .sha
        )
    except GatedRepoError as error:
        raise UserError(
            f"dataset_name: {name} is gated: accept its terms on the Hub and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"dataset_name: no dataset {name!r} on the Hub or in a local directory (a private one "
            "needs HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"dataset_revision: {name} has no revision {revision!r}") from error
    assert commit
    return commit


def _load_builder(arguments: dict[str, Any], name: str, on_hub: bool, if_unreachable: str):
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    def load():
        return load_dataset_builder(**arguments)

    try:
        if not on_hub:
            return load()
        what = f"resolve the files of {name} (dataset_name)"
        return patiently(load, what, if_unreachable=if_unreachable)
    except (FileNotFoundError, DatasetNotFoundError) as error:
        knob = "data_files" if arguments["data_files"] else "dataset_name"
        raise UserError(f"{knob}: no data files in {name}: {error}") from error
    except ValueError as error:
        knob = "dataset_config" if "onfig" in str(error) else "dataset_name"
        raise UserError(f"{knob}: {name}: {error}") from error


def _files_of_split(builder, split: str, name: str) -> list[str]:
    files = builder.config.data_files or {}
    if split not in files:
        known = ", ".join(map(str, files)) or "none"
        raise UserError(f"dataset_split: {name} has no split {split!r}; it has: {known}")
    return list(files[split])


def _open_files(
    builder, files: list[str], split: str, text_column: str, identity: dict, on_hub: bool
) -> Corpus:
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    is_parquet = isinstance(builder.config, ParquetConfig)
    if not on_hub:
        if is_parquet:
            sources = [_local_source(Path(file)) for file in files]
            return ParquetCorpus(sources, text_column, identity)
        identity["files"] = _digest([_fingerprint(Path(file)) for file in files])
        return ArrowCorpus(_prepare(builder, split, files), text_column, identity)
    pattern = re.compile(r"hf://datasets/(?P<repository>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)")
    places = [match.groupdict() for file in files if (match := pattern.fullmatch(file))]
    if is_parquet and len(places) == len(files):
        return ParquetCorpus(_hub_sources(places), text_column, identity)
    identity["files"] = _digest(files)
    dataset = patiently(lambda: builder.as_streaming_dataset(split=split), f"open {files[0]}")
    return StreamedCorpus(dataset, text_column, identity)


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


def _local_source(path: Path) -> LocalSource:
    return LocalSource(path.name, path, path.stat().st_size)


def _hub_sources(files: list[dict[str, str]]) -> list[HubSource]:
    """The files with their sizes, which a directory listing tells."""
    sizes: dict[tuple[str, str], int] = {}
    parents = {
        (f["repository"], f["revision"], str(PurePosixPath(f["path"]).parent)) for f in files
    }
    for repository, revision, parent in sorted(parents):
        folder = None if parent == "." else parent
        listing = patiently(
            partial(_list_folder, repository, folder, revision),
            f"list the files of {repository}",
        )
        sizes |= {(repository, entry.path): getattr(entry, "size", 0) for entry in listing}
    return [
        HubSource(f["path"], f["repository"], f["revision"], sizes[f["repository"], f["path"]])
        for f in files
    ]


def _list_folder(repository: str, folder: str | None, revision: str) -> list[Any]:
    from huggingface_hub import HfApi

    return list(HfApi().list_repo_tree(repository, folder, revision=revision, repo_type="dataset"))


def _fingerprint(path: Path) -> tuple[str, int, str]:
    """Name, size and both ends of a local file: tells files apart, and is cheap for any size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(2**16)
        file.seek(max(0, size - 2**16))
        ends += file.read()
    return path.name, size, hashlib.blake2b(ends, digest_size=16).hexdigest()


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
