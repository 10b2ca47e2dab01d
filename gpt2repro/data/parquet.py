"""Parquet: a unit is a row group, and one ranged read brings the text column's chunk of it.

Nothing but text travels, after each file's footer.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpt2repro import UserError
from gpt2repro.data.corpus import (
    Corpus,
    Found,
    check_text_column,
    digest,
    in_a_line,
    large_strings,
)
from gpt2repro.system import patience
from gpt2repro.system.threads import DaemonPool

FOOTER_GUESS_BYTES = 2**16  # the first read of a parquet file's end; a longer footer costs a second
NUM_FOOTER_THREADS = 16
NUM_PARSED_FOOTERS = 16


def open_parquet(found: Found) -> Corpus | None:
    """Parquet files that can be read by ranges; None for others."""
    if found.format != "parquet":
        return None
    sources: list[Source]
    if found.on_hub:
        pattern = re.compile(
            r"hf://datasets/(?P<repository>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)", re.DOTALL
        )
        places = [match.groupdict() for file in found.files if (match := pattern.fullmatch(file))]
        if len(places) < len(found.files):
            return None
        sources = [*_hub_sources(places)]
    else:
        paths = [Path(file) for file in found.files]
        sources = [LocalSource(path.name, path, path.stat().st_size) for path in paths]
    return ParquetCorpus(sources, found.text_column, found.identity)


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
    """A file of a Hub repository at one commit. Every read asks for its (signed) address anew.

    By hand, because `HfFileSystem` takes what a server sends for the range it asked for, also where
    the answer is not 206: a whole file read as a part of it.
    """

    name: str
    repository: str
    revision: str
    size: int

    def read(self, start: int, length: int) -> bytes:
        what = f"read {length:,} bytes of {self.repository}/{self.name}"
        return patience.patiently(lambda: self._read_once(start, length), what)

    def _read_once(self, start: int, length: int) -> bytes:
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repository, self.name, repo_type="dataset", revision=self.revision)
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={start}-{start + length - 1}",
            "Accept-Encoding": "identity",
        }
        request: dict[str, Any] = {"headers": headers, "timeout": patience.REQUEST_TIMEOUT_SECONDS}
        # Streamed, so that a server that ignores the range is hung up on before it sends gigabytes.
        with get_session().stream("GET", url, **request) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            served = response.headers.get("Content-Range", "")
            if response.status_code != 206 or not served.startswith(f"bytes {start}-"):
                raise patience.PassingFault(
                    f"asked for bytes {start}-{start + length - 1}, was served HTTP "
                    f"{response.status_code} {served}".rstrip()
                )
            content = response.read()
        if len(content) != length:
            raise patience.PassingFault(f"asked for {length:,} bytes, {len(content):,} came")
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
        files = digest([names, digest(self._units.tolist())])
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
        check_text_column(schema.to_arrow_schema(), self._text_column, name)
        paths = [schema.column(index).path for index in range(len(schema))]
        leaf = paths.index(self._text_column)
        units = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            chunk = group.column(leaf)
            start = min(chunk.data_page_offset, chunk.dictionary_page_offset or 2**62)
            units.append(_Unit(file, number, group.num_rows, start, chunk.total_compressed_size))
        return units

    def _unit(self, unit_index: int) -> _Unit:
        return _Unit(*self._units[unit_index].tolist())

    def read_arrow(self, unit_index: int) -> pa.LargeStringArray:
        place = self._unit(unit_index)
        source = self._sources[place.file]
        what = f"read row group {place.row_group} of {source.name}"
        with in_a_line(f"dataset_name: cannot {what}"):
            if isinstance(source, HubSource):
                return patience.patiently(lambda: self._decode(place), what)
            return self._decode(place)

    def _decode(self, place: _Unit) -> pa.LargeStringArray:
        chunk = _OneChunk(self._sources[place.file], place.start, place.length)
        column = self._text_column
        metadata = self._metadata(place.file)
        try:
            options = {"pre_buffer": False, "page_checksum_verification": True}
            with pq.ParquetFile(chunk, metadata=metadata, **options) as file:
                table = file.read_row_group(place.row_group, columns=[column], use_threads=False)
        except OSError as error:  # what pyarrow makes of a broken page header
            raise pa.ArrowInvalid(str(error)) from error
        return large_strings(table.column(column))

    def num_documents(self, unit_index: int) -> int:
        return self._unit(unit_index).num_rows

    def num_bytes(self, unit_index: int) -> int:
        return self._unit(unit_index).length


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


def _hub_sources(files: list[dict[str, str]]) -> list[HubSource]:
    """The files with their sizes, which a directory listing tells."""
    sizes: dict[tuple[str, str], int] = {}
    parents = {
        (f["repository"], f["revision"], str(PurePosixPath(f["path"]).parent)) for f in files
    }
    for repository, revision, parent in sorted(parents):
        folder = None if parent == "." else parent
        listing = patience.patiently(
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
