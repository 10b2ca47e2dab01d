"""What is written to a file is what its units give back, whatever the text; or one line.

Documents of any characters, in every local format, compression and type of text.
"""

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_corpus import read_all

from gpt2repro import UserError
from gpt2repro.data.corpora import other_formats
from gpt2repro.data.opening import open_corpus

DOCUMENTS_PER_UNIT = 3  # as small as the examples
ODD = st.sampled_from(
    ["", ",", '"', '"",', "\n", "\r", "\0", "\ufeff", "\u2028", "NA", "0", "[", "{"]
)
TEXT = st.one_of(ODD, st.text(), st.lists(ODD).map("".join))
MAYBE = st.one_of(st.none(), TEXT)
BROKEN = st.one_of(MAYBE, st.text(st.characters(exclude_categories=())))  # surrogates too


@pytest.fixture(autouse=True, scope="module")
def caches(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("caches"))
        patch.setenv("XDG_CACHE_HOME", place)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place)
        patch.setattr(other_formats, "DOCUMENTS_PER_UNIT", DOCUMENTS_PER_UNIT)
        patch.setattr(other_formats, "FEWEST_UNITS", 1)
        yield


def documents():
    return st.lists(MAYBE, min_size=1, max_size=12)


def units_of(name: str, content: bytes) -> list[list[str]]:
    """What a file of this name and content is read as."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / name).write_bytes(content)
        corpus = open_corpus(directory)
        units = read_all(corpus)
        assert corpus.num_documents.tolist() == list(map(len, units))
        return units


def in_units(texts: list[str | None], size: int) -> list[list[str]]:
    filled = [text or "" for text in texts]
    return [filled[begin : begin + size] for begin in range(0, len(filled), size)]


def check(name: str, content: bytes, texts: list[str | None], zipped: bool) -> None:
    if zipped:
        name, content = f"{name}.gz", gzip.compress(content, 1)
    assert units_of(name, content) == in_units(texts, DOCUMENTS_PER_UNIT)


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()]
KINDS += [pa.dictionary(pa.int32(), pa.string())]


@given(
    texts=documents(),
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 13),
    compression=st.sampled_from(["none", "snappy", "gzip", "zstd", "brotli", "lz4"]),
    version=st.sampled_from(["1.0", "2.0"]),
    checksums=st.booleans(),
)
def test_parquet(texts, kind, rows, compression, version, checksums):
    buffer = io.BytesIO()
    column = pa.array(texts, pa.large_string()).cast(kind)
    options = {"data_page_version": version, "write_page_checksum": checksums}
    table = pa.table({"n": range(len(texts)), "text": column})
    pq.write_table(table, buffer, row_group_size=rows, compression=compression, **options)
    assert units_of("0.parquet", buffer.getvalue()) == in_units(texts, rows)


@given(
    texts=st.lists(BROKEN, min_size=1, max_size=12),
    ascii_only=st.booleans(),
    array=st.booleans(),
    mark=st.booleans(),
    zipped=st.booleans(),
)
def test_json(texts, ascii_only, array, mark, zipped):
    rows = [{"text": text, "n": index} for index, text in enumerate(texts)]
    if array:
        written = json.dumps(rows, ensure_ascii=ascii_only, indent=1)
    else:
        written = "".join(f"{json.dumps(row, ensure_ascii=ascii_only)}\n" for row in rows)
    content = written.encode("utf-8-sig" if mark else "utf-8", "surrogatepass")
    try:
        # Escapes of both halves of a pair are one character, as for every reader of JSON.
        both = "utf-16" if ascii_only else "utf-8"
        meant = [text and text.encode(both, "surrogatepass").decode(both) for text in texts]
    except UnicodeDecodeError:  # half a pair, which is no text
        with pytest.raises(UserError, match=r"^dataset_name: no documents can be read from 0\.js"):
            check("0.jsonl", content, texts, zipped)
        return
    check("0.jsonl", content, meant, zipped)


@given(
    texts=documents(),
    columns=st.sampled_from([["text"], ["n", "text"], ["text", "n"]]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    ends=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
    tabs=st.booleans(),
    zipped=st.booleans(),
)
def test_csv(texts, columns, quoting, ends, mark, tabs, zipped):
    if "\r" in "".join(text or "" for text in texts):
        quoting = csv.QUOTE_ALL  # Python 3.11 leaves it bare, where it is an end of a line
    written = io.StringIO(newline="")
    delimiter = "\t" if tabs else ","
    writer = csv.writer(written, quoting=quoting, lineterminator=ends, delimiter=delimiter)
    writer.writerow(columns)
    for index, text in enumerate(texts):
        writer.writerow([{"text": text, "n": index}[column] for column in columns])
    content = written.getvalue().encode("utf-8-sig" if mark else "utf-8")
    check("0.tsv" if tabs else "0.csv", content, texts, zipped)


@given(
    texts=st.lists(TEXT, min_size=1, max_size=12),
    ends=st.sampled_from(["\n", "\r\n"]),
    zipped=st.booleans(),
)
def test_text(texts, ends, zipped):
    """A line is a document; a byte-order mark is written first, for a text may begin with one."""
    texts = [text.replace("\n", "").replace("\r", "") for text in texts]
    content = "".join(f"{text}{ends}" for text in texts).encode("utf-8-sig")
    filled = [text for text in texts if text.strip()]
    with nullcontext() if filled else pytest.raises(UserError, match="it is empty"):
        check("0.txt", content, filled, zipped)


@given(
    name=st.sampled_from(["0.jsonl", "0.csv", "0.tsv", "0.txt", "0.parquet", "0.json", "0.csv.gz"]),
    content=st.binary(max_size=60),
)
def test_any_bytes_are_documents_or_one_line(name, content):
    try:
        units_of(name, content)
    except UserError as error:
        assert "\n" not in str(error) and str(error).partition(":")[0] in (
            *("dataset_name", "dataset_split", "text_column", "data_files"),
        )
