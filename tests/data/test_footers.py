"""A unit decoded by a footer of its own against the same row group by the file's footer."""

import io
import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_corpus import documents

from gpt2repro import UserError
from gpt2repro.data.corpus import large_strings
from gpt2repro.data.footers import CODECS, Column, footer_of_chunk
from gpt2repro.data.parquet import ParquetCorpus

TEXTS = ["", "a\0b", "naïve 中文 😀", *documents(30), *["again and again"] * 9]
DICTIONARY = pa.dictionary(pa.int32(), pa.string())
TYPES = {
    **{str(type_): type_ for type_ in (pa.string(), pa.large_string(), pa.string_view())},
    **{str(type_): type_ for type_ in (pa.binary(), pa.large_binary(), pa.binary_view())},
    **{"dictionary": DICTIONARY, "null": pa.null()},
}


class Bytes:
    name = "a.parquet"

    def __init__(self, content: bytes) -> None:
        self.content, self.size = content, len(content)

    def read(self, start: int, length: int) -> bytes:
        return self.content[start : start + length]


def column_of(type_: pa.DataType, optional: bool) -> pa.Array:
    if type_ == pa.null():
        return pa.nulls(60)
    texts = [None if optional and n % 7 == 3 else text for n, text in enumerate(TEXTS)]
    array = pa.array(texts)
    return array.dictionary_encode() if type_ == DICTIONARY else array.cast(type_)


def written(array: pa.Array, optional: bool = True, **options) -> bytes:
    """The column among others, in groups of 13 rows; the third group is empty."""
    fields = [pa.field("id", pa.int64()), pa.field("text", array.type, nullable=optional)]
    ids = pa.array(range(len(array)))
    table = pa.table([ids, array], pa.schema([*fields])).append_column("after", ids.cast("string"))
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, **options) as writer:
        writer.write_table(table.slice(0, 26), 13)
        writer.write_table(table.slice(0, 0))
        writer.write_table(table.slice(26), 13)
    return buffer.getvalue()


def assert_ours_are_theirs(content: bytes) -> None:
    ours = ParquetCorpus([Bytes(content)], "text", {})
    theirs = pq.ParquetFile(io.BytesIO(content))
    assert ours.num_units == theirs.num_row_groups >= 3
    for unit in range(ours.num_units):
        column = theirs.read_row_group(unit, columns=["text"])["text"]
        assert ours.read_arrow(unit).equals(large_strings(column)), unit


CASES = [
    (name, optional, options)
    for name, optional in itertools.product(TYPES, (True, False))
    for options in (
        {},
        {"use_dictionary": False, "data_page_version": "2.0", "compression": "zstd"},
        {"data_page_version": "2.0", "store_schema": False, "dictionary_pagesize_limit": 100},
        {"data_page_size": 50, "write_batch_size": 3, "write_page_index": True},
    )
    if optional or name != "null"
]


@pytest.mark.parametrize(("name", "optional", "options"), CASES)
def test_types_and_pages(name, optional, options):
    content = written(column_of(TYPES[name], optional), optional, **options)
    assert_ours_are_theirs(content)


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_codecs(codec, version):
    options = {"compression": codec, "data_page_version": version, "write_page_checksum": True}
    assert_ours_are_theirs(written(pa.array(TEXTS * 9), **options))


ENCODINGS = ("PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(encoding):
    options = {"use_dictionary": ["after"], "column_encoding": {"text": encoding}}
    assert_ours_are_theirs(written(pa.array(TEXTS), **options))


def footer_like(codec: str, created_by: str) -> bytes:
    """A file of one chunk with a footer of ours."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), buffer, compression="lz4", use_dictionary=False)
    content, metadata = buffer.getvalue(), pq.read_metadata(buffer)
    chunk = metadata.row_group(0).column(0)
    column = Column.of(metadata, 0)._replace(created_by=created_by)
    length = int.from_bytes(content[-8:-4], "little") + 8
    return content[:-length] + footer_of_chunk(
        column,
        num_rows=len(TEXTS),
        start=chunk.data_page_offset,
        length=chunk.total_compressed_size,
        uncompressed=chunk.total_uncompressed_size,
        codec=CODECS.index(codec),
    )


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
    content = written(pa.array(TEXTS), compression="lz4")
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    # Field 4 of the chunk's metadata, after its path: 7 is LZ4_RAW, zigzag 14.
    places = [
        place
        for place in range(footer, len(content))
        if content[place:].startswith(b"\x18\x04text\x15\x0e")
    ]
    place = places[group] + 7
    broken = content[:place] + b"\x7e" + content[place + 1 :]
    with pytest.raises(UserError, match=r"cannot read the footer of a\.parquet: .*codec"):
        ParquetCorpus([Bytes(broken)], "text", {})
