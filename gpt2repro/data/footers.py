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
MEANINGS = ("string", "bytes", "null")

I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12  # types of the compact protocol
EMPTY_STRUCT = b"\0"
UTF8, STRING_TYPE, NULL_TYPE = 0, 1, 11  # ConvertedType; fields of the union LogicalType


class Column(NamedTuple):
    """How a file stores its text column: plain JSON values."""

    name: str
    physical_type: int  # of the enum Type
    is_optional: bool
    meaning: str  # one of MEANINGS
    created_by: str  # pyarrow makes up for what old writers did wrong

    @classmethod
    def of(cls, metadata: pq.FileMetaData, leaf: int) -> "Column":
        """That of the `leaf`-th stored column, which is a column of text."""
        stored = metadata.schema.column(leaf)
        type_ = metadata.schema.to_arrow_schema().field(stored.path).type
        type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
        is_string = type_ in (pa.string(), pa.large_string(), pa.string_view())
        return cls(
            name=stored.path,
            physical_type=PHYSICAL_TYPES.index(stored.physical_type),
            is_optional=stored.max_definition_level > 0,
            meaning="string" if is_string else "null" if type_ == pa.null() else "bytes",
            created_by=metadata.created_by or "",
        )


def footer_of_chunk(
    column: Column, *, num_rows: int, start: int, length: int, uncompressed: int, codec: int
) -> bytes:
    """A file's end as of one that has this column chunk alone, of flat values, and nothing else.

    start, length: where the chunk's pages lie, that of its dictionary included: pages say
        themselves what they are.
    uncompressed: bytes of the pages, decompressed.
    codec: of the enum CompressionCodec.
    """
    name = _string(column.name)
    leaf = {1: (I32, _integer(column.physical_type)), 3: (I32, _integer(column.is_optional))}
    leaf[4] = BINARY, name
    if column.meaning == "string":
        leaf |= {6: (I32, _integer(UTF8)), 10: (STRUCT, _struct({STRING_TYPE: _EMPTY}))}
    elif column.meaning == "null":
        leaf[10] = STRUCT, _struct({NULL_TYPE: _EMPTY})
    root = {4: (BINARY, _string("schema")), 5: (I32, _integer(1))}  # has one child
    meta_data = {
        1: (I32, _integer(column.physical_type)),
        2: (LIST, _list(I32, [])),  # encodings: pages say theirs
        3: (LIST, _list(BINARY, [name])),
        4: (I32, _integer(codec)),
        5: (I64, _integer(num_rows)),
        6: (I64, _integer(uncompressed)),
        7: (I64, _integer(length)),
        9: (I64, _integer(start)),
    }
    chunk = {2: (I64, _integer(0)), 3: (STRUCT, _struct(meta_data))}
    row_group = {
        1: (LIST, _list(STRUCT, [_struct(chunk)])),
        2: (I64, _integer(uncompressed)),
        3: (I64, _integer(num_rows)),
    }
    footer = _struct(
        {
            1: (I32, _integer(2)),  # version
            2: (LIST, _list(STRUCT, [_struct(root), _struct(leaf)])),
            3: (I64, _integer(num_rows)),
            4: (LIST, _list(STRUCT, [_struct(row_group)])),
            6: (BINARY, _string(column.created_by)),
        }
    )
    return footer + len(footer).to_bytes(4, "little") + b"PAR1"


_EMPTY = (STRUCT, EMPTY_STRUCT)


def _varint(number: int) -> bytes:
    content = bytearray()
    while number > 0x7F:
        content.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*content, number])


def _integer(number: int) -> bytes:
    """None is negative here: its zigzag is twice it."""
    return _varint(2 * number)


def _string(text: str) -> bytes:
    content = text.encode()
    return _varint(len(content)) + content


def _list(kind: int, items: list[bytes]) -> bytes:
    """Of fewer than 15 items."""
    return bytes([len(items) << 4 | kind, *b"".join(items)])


def _struct(fields: dict[int, tuple[int, bytes]]) -> bytes:
    """Fields by number, ascending: each says how far its number is from that of the one before."""
    content, before = b"", 0
    for number, (kind, value) in fields.items():
        content += bytes([(number - before) << 4 | kind]) + value
        before = number
    return content + b"\0"
