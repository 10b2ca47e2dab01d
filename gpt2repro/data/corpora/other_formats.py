"""Formats without row groups.

Local files (JSON lines, CSV, text: a document is a file of several, a line of one) are read once
from end to end and kept as parquet in the cache of `datasets`: 1,000 documents to a row group, or
some 4 MB, and fewer where the text is small. They are read here because `datasets` guesses types: a
text column that holds dates, numbers or "NA" comes back as other text.
Other Hub formats are streamed by `datasets`, a file being one unit that is held in memory whole:
prefer the Hub's own parquet copy, revision `refs/convert/parquet`.
"""

import csv
import gzip
import io
import itertools
import json
import logging
import lzma
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpt2repro import UserError
from gpt2repro.data.corpora.content import content_hashes, one_at_a_time, stamps
from gpt2repro.data.corpora.corpus import Corpus, Found, check_text_column, digest, in_a_line
from gpt2repro.data.corpora.local_files import LOCAL, suffixes_of
from gpt2repro.data.corpora.parquet import LocalSource, ParquetCorpus
from gpt2repro.system import atomic
from gpt2repro.system.patience import patiently

logger = logging.getLogger(__name__)

DOCUMENTS_PER_UNIT = 1000  # at most, of local formats that have no row groups
BYTES_PER_UNIT = 4 * 10**6  # of text; the document in which they are reached is the last
FEWEST_UNITS = 128  # else they are cut smaller, down to a document each
VERSION = 2  # of how local files are read: another reads them again
COMPRESSED_BYTES = 2**16  # decompressed at a time
LONGEST_TEXT = 2**31  # characters, of a line or document; a file of kilobytes may inflate to more
TOO_LONG = f"it is longer than {LONGEST_TEXT:,} characters: cut it, and an array into JSON lines"
WORTH_A_LINE_BYTES = 10**9  # of files to be read: twenty seconds and more

Texts = Iterator[str | None]


def open_prepared(found: Found) -> Corpus | None:
    """Local files that are read from end to end; None for others."""
    if found.builder is not None:
        return None
    names, before = [Path(file).name for file in found.files], stamps(found.files)
    content = digest(content_hashes(found.files))
    if found.format == "text":
        document = found.document or ("file" if len(names) > 1 else "line")
        cut = {"document": document}
        found = replace(found, document=document, identity=found.identity | cut)
    how: list[Any] = [VERSION, DOCUMENTS_PER_UNIT, BYTES_PER_UNIT, FEWEST_UNITS]
    how += [found.format, found.text_column, found.document]

    def is_same() -> bool:
        return stamps(found.files) == before or digest(content_hashes(found.files)) == content

    path = _prepare(found, f"{digest([content, names, how])}.parquet", is_same)
    corpus = ParquetCorpus([LocalSource(str(path), path, path.stat().st_size)], "text", {})
    assert corpus.num_documents is not None  # parquet tells
    if not corpus.num_documents.any():
        raise UserError(f"dataset_name: no documents can be read from {names[0]}: it is empty")
    corpus.copy_of = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} files more"
    corpus.identity = found.identity | {
        "files": digest([names, corpus.num_documents.tolist()]),  # other units are another order
        "content": content,
        "text_column": found.text_column,
    }
    return corpus


def open_streamed(found: Found) -> Corpus:
    """Whatever `datasets` can stream."""
    if found.format == "csv":
        found.builder.config.keep_default_na = False  # "NA" is a text
    dataset = patiently(
        lambda: found.builder.as_streaming_dataset(split=found.split),
        f"open {found.files[0]}",
        reaches_hub=found.on_hub,
    )
    names = found.files if found.on_hub else [Path(file).name for file in found.files]
    identity = found.identity | {"files": digest(names)}
    return StreamedCorpus(dataset, found.text_column, identity)


def _prepare(found: Found, name: str, is_same: Callable[[], bool]) -> Path:
    """The local files as one parquet file, made if it lacks. `is_same`: what was hashed is there.

    Otherwise it would stand under the hash of another text.
    """
    from datasets import config

    place = Path(config.HF_DATASETS_CACHE) / "gpt2repro"
    with one_at_a_time(place / f"{name}.lock"):
        if _is_whole(place / name):
            return place / name
        num_bytes = sum(Path(file).stat().st_size for file in found.files)
        if num_bytes > WORTH_A_LINE_BYTES:
            logger.warning("reading %.0f GB of text into %s, once", num_bytes / 1e9, place)
        try:
            place.mkdir(parents=True, exist_ok=True)
            for left in atomic.leftovers(place / name):  # under the lock nobody writes it
                left.unlink()
            _write(found, place / name, is_same)
        except OSError as error:
            logger.warning(
                "HF_DATASETS_CACHE: %s cannot be written (%s): the data are read again by every "
                "process, into %s, which goes with it",
                *(place, error, _scratch().name),
            )
            place = Path(_scratch().name)
            with in_a_line("HF_DATASETS_CACHE or TMPDIR: no place for a copy of the data"):
                _write(found, place / name, is_same)
    return place / name


@cache
def _scratch() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="gpt2repro-")


def _is_whole(path: Path) -> bool:
    """Its pages have checksums of their own, for when they are read."""
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return False
    return True


def _write(found: Found, path: Path, is_same: Callable[[], bool]) -> None:
    files = map(Path, found.files)
    documents = itertools.chain.from_iterable(_documents_of(file, found) for file in files)
    with atomic.new_file(path, durable=True) as scratch:
        _write_units(_in_units(documents, BYTES_PER_UNIT), scratch)
        if not is_same():
            raise UserError(f"dataset_name: a file of {found.name} changed while it was read")
        with pq.ParquetFile(scratch) as whole:
            units = range(whole.num_row_groups)
            if len(units) < min(FEWEST_UNITS, whole.metadata.num_rows):
                scratch.unlink()  # still open, and read while the other is written
                columns = partial(map, lambda unit_index: whole.read_row_group(unit_index)["text"])
                num_bytes = sum(map(_num_bytes, columns(units)))
                again = (text.as_py() for column in columns(units) for text in column)
                _write_units(_in_units(again, num_bytes / FEWEST_UNITS), scratch)


def _num_bytes(texts: pa.ChunkedArray) -> int:
    return 4 * len(texts) + (pc.sum(pc.binary_length(texts)).as_py() or 0)  # as parquet has them


def _in_units(documents: Texts, most_bytes: float) -> Iterator[list[str | None]]:
    """`DOCUMENTS_PER_UNIT` at a time, or as many as are about `most_bytes` of text."""
    unit: list[str | None] = []
    num_bytes = 0.0
    for text in documents:
        unit.append(text)
        num_bytes += 4 + len((text or "").encode())  # as `_num_bytes`
        if num_bytes >= most_bytes or len(unit) == DOCUMENTS_PER_UNIT:
            yield unit
            # What is too much counts for the next unit, so that their mean is `most_bytes`.
            unit, num_bytes = [], num_bytes % most_bytes if num_bytes >= most_bytes else 0.0
    if unit:
        yield unit


def _write_units(units: Iterator[list[str | None]], path: Path) -> None:
    schema = pa.schema([("text", pa.large_string())])
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
    with pq.ParquetWriter(path, schema, use_dictionary=False, **options) as writer:
        for unit in units:
            writer.write(pa.table([pa.array(unit, pa.large_string())], schema))


class StreamedCorpus(Corpus):
    """Any Hub dataset that `datasets` can stream: a unit is one of its shards (a file), whole."""

    def __init__(self, dataset, text_column: str, identity: dict[str, Any]) -> None:
        where = identity["dataset"]
        self._on_hub = where != LOCAL
        features = patiently(
            lambda: dataset._resolve_features().features,
            f"read {where}",
            reaches_hub=self._on_hub,
        )
        check_text_column(features.arrow_schema, text_column, where)
        self._dataset = dataset.select_columns([text_column])
        self._text_column = text_column
        self.num_units = dataset.num_shards
        self.identity = identity | {"text_column": text_column}

    def read_arrow(self, unit_index: int) -> pa.LargeStringArray:
        def read() -> pa.LargeStringArray:
            shard = self._dataset.shard(self.num_units, unit_index, contiguous=True)
            return pa.array([row[self._text_column] for row in shard], pa.large_string())

        what = f"read file {unit_index} of {self.identity['dataset']}"
        with in_a_line(f"dataset_name: cannot {what}"):
            return patiently(read, what, reaches_hub=self._on_hub)


# --- Files from end to end ------------------------------------------------------------------------


class _XzStreams(io.RawIOBase):
    """A .xz file, decompressed to its end: streams, and zeros that pad them.

    By hand: what comes after a whole stream and is none, Python's own reader takes for the end.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._stream = file.open("rb"), lzma.LZMADecompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = b""
        while not content:
            more = b""
            if self._stream.eof:
                more = self._stream.unused_data
                while not (more := more.lstrip(b"\0")):
                    if not (more := self._file.read(COMPRESSED_BYTES)):
                        return 0
                self._stream = lzma.LZMADecompressor()
            elif self._stream.needs_input and not (more := self._file.read(COMPRESSED_BYTES)):
                raise EOFError("it ended before the end-of-stream marker")
            content = self._stream.decompress(more, len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda file: file.open("rb"),
    ".gz": gzip.open,
    ".bz2": lambda file: pa.input_stream(str(file), compression="bz2"),
    ".xz": _XzStreams,
    ".zst": lambda file: pa.input_stream(str(file), compression="zstd"),
}


def _documents_of(file: Path, found: Found) -> Texts:
    """A local file's documents in order; what cannot be read is a `UserError` with its line."""
    read, newline = READERS[found.document or found.format]
    number = 1  # of the line that is read, or looked at

    def lines() -> Iterator[str]:
        nonlocal number
        with io.BufferedReader(OPENERS[suffixes_of(file)[1]](file)) as content:
            try:
                text = io.TextIOWrapper(content, "utf-8-sig", newline=newline)
                while line := text.readline(LONGEST_TEXT):
                    if len(line) >= LONGEST_TEXT:
                        raise ValueError(TOO_LONG)
                    yield line
                    number += 1
            except OSError as error:
                if "too much memory" in str(error):  # of zstd: it was made with `--long`
                    raise ValueError("decompress it first: `zstd -d --long=31`") from error
                raise

    what = f"dataset_name: no documents can be read from {file.name}, near line"
    with in_a_line(lambda: f"{what} {number}"):
        yield from read(lines(), found.text_column, file)


def _joined(lines: Iterable[str]) -> str:
    parts, length = [], 0
    for line in lines:
        parts.append(line)
        length += len(line)
        if length >= LONGEST_TEXT:
            raise ValueError(TOO_LONG)
    return "".join(parts)


def _lines_of_text(lines: Iterator[str], column: str, file: Path) -> Texts:
    check_text_column(pa.schema([("text", pa.string())]), column, file.name)
    return (line.removesuffix("\n") for line in lines if line.strip())


def _whole_text(lines: Iterator[str], column: str, file: Path) -> Texts:
    check_text_column(pa.schema([("text", pa.string())]), column, file.name)
    return filter(None, [_joined(lines)])


def _column_of_csv(lines: Iterator[str], column: str, file: Path) -> Texts:
    csv.field_size_limit(LONGEST_TEXT - 1)  # of the process; the default refuses long documents
    delimiter = "\t" if suffixes_of(file)[0] == ".tsv" else ","
    rows = filter(None, csv.reader(lines, delimiter=delimiter, strict=True))
    header = next(rows, None)
    if header is None:
        return
    check_text_column(pa.schema([(name, pa.string()) for name in header]), column, file.name)
    at = header.index(column)
    for row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{len(row)} fields under {len(header)} names (a text with {delimiter!r} in it "
                "needs quotes)"
            )
        yield row[at]


def _column_of_json(lines: Iterator[str], column: str, file: Path) -> Texts:
    """Objects, one a line, or one array of them. A row without the column is a null."""
    rows = filter(str.strip, lines)
    first = list(itertools.islice(rows, 1))
    decoder = json.JSONDecoder(object_pairs_hook=_Object, parse_int=_number)
    if first and first[0].lstrip().startswith("["):
        objects = decoder.decode(_joined(itertools.chain(first, rows)))
    else:
        objects = map(decoder.decode, itertools.chain(first, rows))
    found, row = False, None
    for row in objects:
        if not isinstance(row, _Object):
            raise ValueError(f"a {type(row).__name__}, not an object with fields")
        if column in row.repeated:
            raise ValueError(f"an object has {column!r} more than once")
        text = row.get(column)
        if not (text is None or isinstance(text, str)):
            check_text_column(_schema_of(row), column, LOCAL)
        if text and not text.isascii():
            text.encode()  # half a surrogate pair, which "\\ud83d" can spell, is no text
        found |= column in row
        yield text
    if row is not None and not found:
        check_text_column(_schema_of(row), column, LOCAL)


def _number(digits: str) -> int | float:
    """Python makes no int of more than 4,300 digits, and Arrow none of more than 19."""
    return int(digits) if len(digits) < 19 else float(digits)


class _Object(dict):
    """A JSON object, and which of its names came more than once."""

    repeated: Collection[str] = ()

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        if len(self) < len(pairs):
            times = Counter(name for name, _ in pairs)
            self.repeated = {name for name in times if times[name] > 1}


def _schema_of(row: dict[str, Any]) -> pa.Schema:
    """Each value by itself: a list of several types is none that Arrow knows, and no text."""
    kinds = {}
    for name, value in row.items():
        try:
            kinds[name] = pa.array([value]).type
        except pa.ArrowException:
            kinds[name] = pa.list_(pa.null())
    return pa.schema(kinds)


READERS: dict[str, tuple[Callable[[Iterator[str], str, Path], Texts], str | None]] = {
    "json": (_column_of_json, "\n"),
    "csv": (_column_of_csv, ""),
    "line": (_lines_of_text, None),
    "file": (_whole_text, None),
}
