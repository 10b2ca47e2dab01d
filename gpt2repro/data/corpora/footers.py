"""Parquet footers: what decoding a column chunk needs of one, and a footer for that chunk alone.

A real footer describes every chunk of every column: 2 MB in FineWeb-Edu, of which a unit needs a
few numbers. With these, pyarrow decodes the chunk by a footer that names no other. Structures,
field numbers and enums are those of parquet-format's parquet.thrift; bytes are written as the
compact protocol of Apache Thrift has them.
"""

from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

PHYSICAL_TYPES = ("BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE", "BYTE_ARRAY")
# pyarrow's names in the order of the enum CompressionCodec: what it calls LZ4 is LZ4_RAW, and it
# has no name for the older LZ4.
CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "UNKNOWN", "ZSTD", "LZ4")
LOGICAL_TYPES = {"string": 1, "null": 11}  # fields of the union LogicalType; bytes have none

I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12  # types of the compact protocol
Value = tuple[int, bytes]  # a type and what follows it


class Column(NamedTuple):
    """How a file stores its text column: plain JSON values."""

    name: str
    physical_type: int  # of the enum Type
    is_optional: bool
    meaning: str  # "string", "bytes" or "null"
    created_by: str  # pyarrow makes up for what old writers did wrong

    @classmethod
    def of(cls, schema: pq.ParquetSchema, leaf: int, created_by: str) -> "Column":
        """That of the `leaf`-th stored column, which is a column of text."""
        stored = schema.column(leaf)
        type_ = schema.to_arrow_schema().field(stored.path).type
        type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
        is_string = type_ in (pa.string(), pa.large_string(), pa.string_view())
        return cls(
            name=stored.path,
            physical_type=PHYSICAL_TYPES.index(stored.physical_type),
            is_optional=stored.max_definition_level > 0,
            meaning="string" if is_string else "null" if type_ == pa.null() else "bytes",
            created_by=created_by,
        )


def footer_of_chunk(
    column: Column, num_rows: int, length: int, uncompressed: int, codec: int
) -> bytes:
    """The end of a parquet file that begins with this column chunk, of flat values, as all it has.

    length: of its pages, the dictionary's included: each says itself what it is.
    uncompressed: bytes of the pages, decompressed.
    codec: of the enum CompressionCodec.
    """
    name, type_ = _string(column.name), _i32(column.physical_type)
    root = {4: _string("schema"), 5: _i32(1)}  # has one child
    leaf = {1: type_, 3: _i32(column.is_optional), 4: name}
    if column.meaning in LOGICAL_TYPES:
        leaf[10] = _struct({LOGICAL_TYPES[column.meaning]: _struct({})})
    described = {1: type_, 2: _list(I32), 3: _list(BINARY, name), 4: _i32(codec)}
    described |= {5: _i64(num_rows), 6: _i64(uncompressed), 7: _i64(length), 9: _i64(0)}
    chunk = _struct({2: _i64(0), 3: _struct(described)})
    row_group = {1: _list(STRUCT, chunk), 2: _i64(uncompressed), 3: _i64(num_rows)}
    footer = {1: _i32(2), 2: _list(STRUCT, _struct(root), _struct(leaf)), 3: _i64(num_rows)}
    footer |= {4: _list(STRUCT, _struct(row_group)), 6: _string(column.created_by)}
    _, content = _struct(footer)
    return content + len(content).to_bytes(4, "little") + b"PAR1"


def _varint(number: int) -> bytes:
    content = bytearray()
    while number > 0x7F:
        content.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*content, number])


# The zigzag of a number that is not negative is twice it.
def _i32(number: int) -> Value:
    return I32, _varint(2 * number)


def _i64(number: int) -> Value:
    return I64, _varint(2 * number)


def _string(text: str) -> Value:
    return BINARY, _varint(len(text.encode())) + text.encode()


def _list(kind: int, *items: Value) -> Value:
    """Of fewer than 15 items."""
    return LIST, bytes([len(items) << 4 | kind]) + b"".join(content for _, content in items)


def _struct(fields: dict[int, Value]) -> Value:
    """Fields by number, ascending: each says how far its number is from that of the one before."""
    content, before = b"", 0
    for number, (kind, value) in fields.items():
        content += bytes([number - before << 4 | kind]) + value
        before = number
    return STRUCT, content + b"\0"
