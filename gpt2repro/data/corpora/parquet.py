"""Parquet: a unit is a row group, and one ranged read brings the text column's chunk of it.

Nothing but text travels, after each file's footer. What can be compared is: pages with their
checksums where they have some; what a footer says with itself, the file and what was decoded. What
does not agree is read again from the Hub, a few times, for it may have broken on its way.
"""

import io
import os
import re
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpt2repro import UserError
from gpt2repro.data.corpora.corpus import (
    Corpus,
    Found,
    check_text_column,
    digest,
    in_a_line,
    large_strings,
)
from gpt2repro.data.corpora.footers import CODECS, Column, footer_of_chunk
from gpt2repro.data.corpora.unit_table import UNIT, UnitTable, kept
from gpt2repro.system import atomic, hub_client, patience
from gpt2repro.system.diagnosis import PassingFault
from gpt2repro.system.threads import DaemonPool

FOOTER_GUESS_BYTES = 2**16  # the first read of the first file's end: more may cost a second
NUM_FOOTER_THREADS = 6  # each holds a footer; they are parsed one at a time
LARGEST_UNIT_BYTES = 2**31  # of a row group's text, decoded
SHA256_DIGITS = 64
ROWS_AT_A_TIME = 64  # decoded before the bytes are counted again; fewer where texts may be long

Result = TypeVar("Result")


def open_parquet(found: Found) -> Corpus | None:
    """Parquet files that can be read by ranges; None for others."""
    listed = sources_of(found) if found.format == "parquet" else None
    return listed and ParquetCorpus(listed[0], found.text_column, listed[1])


def sources_of(found: Found) -> "tuple[list[Source], dict[str, Any]] | None":
    """The files, to be read by ranges, and their identity; None where they are no repository's."""
    if not found.on_hub:
        files = [(Path(file), Path(file).stat()) for file in found.files]
        return [LocalSource(p.name, p, now.st_size, now) for p, now in files], found.identity
    pattern = re.compile(
        r"hf://datasets/(?P<repository>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)", re.DOTALL
    )
    places = [match.groupdict() for file in found.files if (match := pattern.fullmatch(file))]
    if len(places) < len(found.files):
        return None
    listed = _hub_sources(places)
    return [*listed], found.identity | {"content": digest([source.content for source in listed])}


@dataclass(frozen=True)
class LocalSource:
    """A file of this machine.

    found: as it was before its content was hashed; None of one that is named by its content, in
    whose place whoever makes another puts the same.
    """

    name: str
    path: Path
    size: int
    found: os.stat_result | None = None

    def read(self, start: int, length: int) -> bytes:
        with self.path.open("rb") as file:  # buffered: it asks again for what a disk left out
            now = os.fstat(file.fileno())
            file.seek(start)
            content = file.read(length)
        is_another = self.found is not None and atomic.is_another(now, self.found)
        if is_another or now.st_size != self.size or len(content) != length:
            raise UserError(f"dataset_name: {self.path} changed while being read")
        return content


_served: set[str] = set()  # repositories that this process may read: so it is no missing right


@dataclass(frozen=True)
class HubSource:
    """A file of a Hub repository at one commit. Every read asks for its (signed) address anew.

    content: the hash that the listing tells: SHA-256 of a large file, else Git's of its blob.

    By hand, because `HfFileSystem` takes what a server sends for the range it asked for, also where
    the answer is not 206: a whole file read as a part of it.
    """

    name: str
    repository: str
    revision: str
    size: int
    content: str = ""

    def read(self, start: int, length: int) -> bytes:
        if not length:
            return b""  # there is no such range
        return patience.patiently(
            lambda: self._read_once(start, length),
            f"read {length:,} bytes of {self.repository}/{self.name} (dataset_name)",
            attempt_seconds=hub_client.longest_seconds(length),
            passes_on=False,
        )

    def _read_once(self, start: int, length: int) -> bytes:
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repository, self.name, repo_type="dataset", revision=self.revision)
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={start}-{start + length - 1}",
            "Accept-Encoding": "identity",
        }
        request: dict[str, Any] = {
            "headers": headers,
            "timeout": hub_client.REQUEST_TIMEOUT_SECONDS,
        }
        wanted = rf"bytes {start}-{start + length - 1}/({self.size}|\*)"
        content = bytearray()
        # Streamed, so that a server that ignores the range is hung up on before it sends gigabytes.
        with get_session().stream("GET", url, **request) as response:
            if response.status_code >= 400:
                response.read()
            # The Hub itself answers at /resolve/, also for a repository that was renamed.
            by_storage = response.history and "/resolve/" not in response.url.path
            if response.status_code == 403 and by_storage and self.repository in _served:
                raise PassingFault("HTTP 403 of the storage behind the Hub")
            hf_raise_for_status(response)
            self._check_unchanged([*response.history, response])
            served = response.headers.get("Content-Range", "")
            encoding = response.headers.get("Content-Encoding", "identity").lower()
            right = re.fullmatch(wanted, served, re.IGNORECASE) and encoding in ("", "identity")
            if response.status_code != 206 or not right:
                raise PassingFault(
                    f"asked for bytes {start}-{start + length - 1} of {self.size}, was served HTTP "
                    f"{response.status_code} {served} {encoding}"
                )
            for part in response.iter_raw():
                content += part
                if len(content) > length:  # no server is believed when it ends
                    break
        if len(content) != length:
            raise PassingFault(f"asked for {length:,} bytes, {len(content):,} came")
        _served.add(self.repository)
        return bytes(content)

    def _check_unchanged(self, answers: Sequence[Any]) -> None:
        """Refuse another content than was listed, if the Hub says that it is one.

        Of a large file it tells the hash before it redirects. What the storage there calls its ETag
        may be a hash of something else, and on a mirror the SHA-1 of the file, which Git's is not.
        """
        tags = [answer.headers.get("X-Linked-ETag", "") for answer in answers]
        if len(answers) == 1 and len(self.content) == SHA256_DIGITS:
            tags.append(answers[0].headers.get("ETag", ""))
        told = next(filter(None, tags), "").strip('"')
        is_hash = re.fullmatch("[0-9a-f]+", told) and len(told) == len(self.content)
        if is_hash and told != self.content:
            raise UserError(
                f"dataset_revision: {self.repository}/{self.name} changed under its commit "
                f"{self.revision}: listed as {self.content}, served as {told}"
            )


Source = LocalSource | HubSource  # a file that is read by ranges


def _whole(source: Source, call: Callable[[], Result], what: str) -> Result:
    """`call()`, which reads and checks: again if it fails on the Hub's bytes, one line on ours."""
    if isinstance(source, HubSource):
        return patience.patiently(call, f"{what} (dataset_name)", passes_on=False)
    with in_a_line(f"dataset_name: cannot {what}"):
        return call()


class _NoBytes(io.BytesIO):
    """What pyarrow takes for a file of `size` bytes, and finds ended wherever it reads."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def seek(self, offset: int, whence: int = 0) -> int:
        return super().seek(offset + (self._size if whence == 2 else 0))


class ParquetCorpus(Corpus):
    """Units are row groups, numbered through the files in dataset order.

    copy_of: what people call the dataset, where the files are a copy that was made of it.
    """

    copy_of: str | None = None

    def __init__(
        self, sources: Sequence[Source], text_column: str, identity: dict[str, Any]
    ) -> None:
        self._sources = sources
        remote = [astuple(source) for source in sources if isinstance(source, HubSource)]
        make = partial(_read_table, sources, text_column)
        table = kept([text_column, remote], make) if len(remote) == len(sources) else make()
        self._columns, self._units = table.columns, table.units
        self.num_units = len(table.units)
        self.num_documents, self.num_bytes = table.units["num_rows"], table.units["length"]
        self.identity = identity | {"files": table.digest, "text_column": text_column}

    def read_arrow(self, unit_index: int) -> pa.LargeStringArray:
        file, row_group, *place = self._units[unit_index].tolist()
        source, column = self._sources[file], self._columns[file]
        what = f"read row group {row_group} of {source.name}"
        if self.copy_of:
            what += f" (a copy of {self.copy_of}: delete it, and the next start makes it again)"
        return _whole(source, lambda: _decode(source, column, place), what)

    def where(self, unit_index: int) -> str:
        if self.copy_of:
            return f"{self.copy_of}, unit {unit_index}"
        file, row_group, *_ = self._units[unit_index].tolist()
        return f"{Path(self._sources[file].name).name}, row group {row_group}"


def _decode(source: Source, column: Column, place: list[int]) -> pa.LargeStringArray:
    """A unit's documents, their bytes counted as they come: a little file may hold much.

    The footer says how much text is stored. A dictionary's entry may come many times.
    place: of `UNIT`, what comes after the row group's number.
    """
    num_rows, start, length, uncompressed, codec = place
    metadata = _parse(footer_of_chunk(column, num_rows, length, uncompressed, codec))
    at_a_time = min(ROWS_AT_A_TIME, LARGEST_UNIT_BYTES // max(uncompressed, 1))
    # Of old versions of parquet-mr a length leaves a header out; pyarrow knows of which, and reads
    # up to 100 bytes more.
    spare = 100 * column.created_by.startswith("parquet-mr")
    content = source.read(start, min(length + spare, source.size - start))
    options: dict[str, Any] = {"pre_buffer": False, "page_checksum_verification": True}
    parts, num_bytes = [], 0
    with pq.ParquetFile(pa.BufferReader(content), metadata=metadata, **options) as file:
        for batch in file.iter_batches(at_a_time, use_threads=False):
            parts.append(batch.column(0).cast(pa.large_string()))
            num_bytes += pc.sum(pc.binary_length(parts[-1])).as_py() or 0
            if num_bytes > LARGEST_UNIT_BYTES:
                limit = f"{LARGEST_UNIT_BYTES:,} bytes of text"
                raise pa.ArrowInvalid(f"it has more than {limit}: write smaller row groups")
    documents = large_strings(pa.chunked_array(parts, pa.large_string()))
    if len(documents) != num_rows:
        raise pa.ArrowInvalid(f"it has {len(documents):,} rows, not {num_rows:,}")
    return documents


def _read_table(sources: Sequence[Source], text_column: str) -> UnitTable:
    lengths: deque[int] = deque(maxlen=NUM_FOOTER_THREADS)
    parsing = threading.Lock()

    def read(file: int) -> tuple[Column, np.ndarray]:
        source = sources[file]

        def once() -> tuple[Column, np.ndarray]:
            footer = _read_footer(source, lengths)
            with parsing:  # parsed, a footer takes six times the room
                return _units_of(file, _parse(footer), text_column, source)

        return _whole(source, once, f"read the footer of {source.name}")

    files = range(len(sources))
    pool = DaemonPool(min(NUM_FOOTER_THREADS, len(sources)), "footer-reader")
    try:
        # The first by itself: it says how long the others may be.
        opened = [*map(read, files[:1]), *pool.map(read, files[1:])]
    finally:
        pool.close(0)
    columns = [column for column, _ in opened]
    units = np.concatenate([np.zeros(0, UNIT), *(of_file for _, of_file in opened)])
    del opened  # as much again, while the table is hashed and written
    return UnitTable.of([source.name for source in sources], columns, units)


def _units_of(
    file: int, metadata: pq.FileMetaData, text_column: str, source: Source
) -> tuple[Column, np.ndarray]:
    # `metadata.schema` is kept within it, a cycle: megabytes a file, until Python looks for such.
    schema = pq.ParquetSchema(metadata)
    check_text_column(schema.to_arrow_schema(), text_column, source.name)
    _check_chunks(metadata, text_column, source)
    paths = [schema.column(leaf).path for leaf in range(len(schema))]
    leaf = paths.index(text_column)
    if text_column in paths[leaf + 1 :]:  # "a.b" beside an "a" that has a "b"
        raise UserError(f"text_column: {source.name} stores two columns as {text_column!r}")
    units = np.zeros(metadata.num_row_groups, UNIT)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunk = group.column(leaf)
        start = min(chunk.data_page_offset, chunk.dictionary_page_offset or 2**62)
        length, uncompressed = chunk.total_compressed_size, chunk.total_uncompressed_size
        unit = (file, number, group.num_rows, start, length)
        inside = 0 <= start <= start + length <= source.size
        if not inside or chunk.num_values != group.num_rows:
            raise pa.ArrowInvalid(f"it contradicts itself or the file's size: {unit}")
        if not 0 <= uncompressed <= LARGEST_UNIT_BYTES:
            raise pa.ArrowInvalid(
                f"row group {number} has {uncompressed:,} bytes of text; no "
                f"more than {LARGEST_UNIT_BYTES:,} are read at once: write smaller row groups"
            )
        units[number] = (*unit, uncompressed, CODECS.index(chunk.compression))
    if sum(units["num_rows"].tolist()) != metadata.num_rows:
        raise pa.ArrowInvalid(f"its row groups do not have {metadata.num_rows:,} rows")
    return Column.of(schema, leaf, metadata.created_by or ""), units


def _read_footer(source: Source, lengths: deque[int]) -> memoryview:
    """A parquet file's footer: one read, two if it is longer than the last of `lengths` suggest."""
    end = source.size
    if end < 12:
        raise pa.ArrowInvalid(f"it is no parquet file ({end} bytes)")
    guess = min(end, max([FOOTER_GUESS_BYTES, *(length * 9 // 8 for length in lengths.copy())]))
    tail = source.read(end - guess, guess)
    if tail[-4:] != b"PAR1":
        raise pa.ArrowInvalid("it is no parquet file (or is encrypted)")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > end:
        raise pa.ArrowInvalid("it is longer than the file")
    if length > guess:
        tail = source.read(end - length, length - guess) + tail
    lengths.append(length)
    return memoryview(tail)[-length:]


def _parse(footer: bytes | memoryview) -> pq.FileMetaData:
    return pq.read_metadata(pa.BufferReader(footer))


def _check_chunks(metadata: pq.FileMetaData, column: str, source: Source) -> None:
    """Let pyarrow open all chunks of a column as it does to read them: all without a page.

    A chunk or codec that it does not understand is an error there. `RowGroupMetaData.column` of the
    same chunk would end the process.
    """
    groups = list(range(metadata.num_row_groups))
    options = {"pre_buffer": False, "buffer_size": 1}
    with pq.ParquetFile(_NoBytes(source.size), metadata=metadata, **options) as file:
        next(file.iter_batches(1, row_groups=groups, columns=[column], use_threads=False), None)


def _hub_sources(files: list[dict[str, str]]) -> list[HubSource]:
    """The files with their sizes and hashes, which a directory listing tells."""
    folders = defaultdict(list)
    for f in files:
        parent = str(PurePosixPath(f["path"]).parent)
        folders[f["repository"], f["revision"], parent].append(f["path"])
    found: dict[tuple[str, str], HubSource] = {}
    for (repository, revision, parent), paths in sorted(folders.items()):
        folder = None if parent == "." else parent
        listed = patience.patiently(
            partial(_list, repository, folder, revision, paths),
            f"list the files of {repository} (dataset_name)",
            attempt_seconds=patience.LONGEST_QUESTION_SECONDS,
            passes_on=False,
        )
        found |= {(repository, source.name): source for source in listed}
    return [found[f["repository"], f["path"]] for f in files]


def _list(repository: str, folder: str | None, revision: str, paths: list[str]) -> list[HubSource]:
    from huggingface_hub import HfApi

    entries = HfApi().list_repo_tree(repository, folder, revision=revision, repo_type="dataset")
    listed: dict[str, Any] = {entry.path: entry for entry in entries}
    sources = []
    for path in paths:
        size = getattr(listed[path], "size", None)
        if type(size) is not int or size < 0:
            raise ValueError(f"{path} has the size {size!r} in the listing")
        content = listed[path].lfs.sha256 if listed[path].lfs else listed[path].blob_id
        sources.append(HubSource(path, repository, revision, size, str(content)))
    return sources
