"""A unit decoded by a footer of its own against the same row group by the file's footer."""

import io
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_corpus import Bytes, documents

from gpt2repro import UserError
from gpt2repro.data.corpora.corpus import large_strings
from gpt2repro.data.corpora.footers import CODECS, Column, footer_of_chunk
from gpt2repro.data.corpora.parquet import ParquetCorpus

TEXTS = ["", "a\0b", "naïve 中文 😀", *documents(30), *["again and again"] * 9]
DICTIONARY = pa.dictionary(pa.int32(), pa.string())
TYPES = [pa.string(), pa.large_string(), pa.string_view(), DICTIONARY, pa.null()]
TYPES += [pa.binary(), pa.large_binary(), pa.binary_view()]


def written(type_: pa.DataType, optional: bool = True, **options) -> bytes:
    """A column of texts among others, in groups of 13 rows; the third group is empty."""
    texts = [None if optional and n % 7 == 3 else text for n, text in enumerate(TEXTS)]
    array = pa.array(texts)
    if type_ == pa.null():
        array = pa.nulls(len(texts))
    elif type_ == DICTIONARY:
        array = array.dictionary_encode()
    ids = pa.array(range(len(texts)))
    fields = [pa.field("id", pa.int64()), pa.field("text", type_, nullable=optional)]
    table = pa.table([ids, array.cast(type_)], pa.schema(fields)).append_column("after", ids)
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, **options) as writer:
        for rows in (table.slice(0, 26), table.slice(0, 0), table.slice(26)):
            writer.write_table(rows, 13)
    return buffer.getvalue()


def assert_ours_are_theirs(content: bytes) -> None:
    ours = ParquetCorpus([Bytes(content)], "text", {})
    theirs = pq.ParquetFile(io.BytesIO(content))
    assert ours.num_units == theirs.num_row_groups >= 4
    for unit in range(ours.num_units):
        column = theirs.read_row_group(unit, columns=["text"])["text"]
        assert ours.read_arrow(unit).equals(large_strings(column)), unit


PAGES = (
    {},
    {"use_dictionary": False, "data_page_version": "2.0", "compression": "zstd"},
    {"data_page_version": "2.0", "store_schema": False, "dictionary_pagesize_limit": 100},
    {"data_page_size": 50, "write_batch_size": 3, "write_page_index": True},
)


@pytest.mark.parametrize("options", PAGES)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_types_and_pages(type_, optional, options):
    assert_ours_are_theirs(written(type_, optional or type_ == pa.null(), **options))


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_codecs_and_encodings(codec, encoding, version):
    options = {"compression": codec, "data_page_version": version, "write_page_checksum": True}
    options |= {"use_dictionary": ["after"], "column_encoding": {"text": encoding}}
    assert_ours_are_theirs(written(pa.string(), **options))


def footer_like(codec: str, created_by: str) -> bytes:
    """A file of one chunk with a footer of ours."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), buffer, compression="lz4", use_dictionary=False)
    content, metadata = buffer.getvalue(), pq.read_metadata(buffer)
    chunk = metadata.row_group(0).column(0)
    column = Column.of(metadata.schema, 0, created_by)
    start, length = chunk.data_page_offset, chunk.total_compressed_size
    sizes = length, chunk.total_uncompressed_size
    footer = footer_of_chunk(column, len(TEXTS), *sizes, CODECS.index(codec))
    return content[start : start + length] + footer


@pytest.mark.parametrize("created_by", ["", "parquet-mr version 1.2.8", "é version 1"])
def test_a_footer_of_ours_is_a_footer(created_by):
    """Of older LZ4 too, and of writers whose chunks pyarrow reads with padding."""
    for codec in ("LZ4", "UNKNOWN"):
        content = footer_like(codec, created_by)
        assert pq.read_metadata(io.BytesIO(content)).created_by == created_by
        corpus = ParquetCorpus([Bytes(content)], "text", {})
        assert corpus._columns[0].created_by == created_by
        assert corpus.read_unit(0) == TEXTS


@pytest.mark.parametrize("group", [0, 2, 4])
def test_a_codec_that_nobody_knows_is_refused_in_a_line(group):
    """pyarrow 26 ends a process that asks for its name."""
    content = written(pa.string(), compression="lz4")
    # Field 4 of a chunk's metadata comes after its path: LZ4_RAW is 7, of which the zigzag is 14.
    place = [match.end() for match in re.finditer(rb"\x18\x04text\x15(?=\x0e)", content)][group]
    broken = content[:place] + b"\x7e" + content[place + 1 :]
    with pytest.raises(UserError, match=r"cannot read the footer of a\.parquet: .*codec"):
        ParquetCorpus([Bytes(broken)], "text", {})


def test_a_nested_column_of_the_same_name_is_refused():
    inner = pa.StructArray.from_arrays([pa.array(["other"])], ["b"])
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": inner, "a.b": ["mine"]}), buffer)
    with pytest.raises(UserError, match=r"^text_column: a\.parquet stores two columns as 'a\.b'$"):
        ParquetCorpus([Bytes(buffer.getvalue())], "a.b", {})
