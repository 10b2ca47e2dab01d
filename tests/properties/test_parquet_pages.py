"""Parquet files that were damaged: the right text, or one line; never other text.

Pages with checksums, and footers, are compared with what can be compared. Pages without checksums
are not protected: damage within a text is another text, of which the documents are counted.
"""

import io
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_corpus import Bytes, documents, read_all

from gpt2repro import UserError
from gpt2repro.data.corpora.parquet import ParquetCorpus

TEXTS = documents(60, max_words=30)
UNITS = [TEXTS[begin : begin + 10] for begin in range(0, 60, 10)]


def written(with_checksums: bool, **options) -> bytes:
    table = pa.table({"id": range(60), "text": [*TEXTS], "other": TEXTS[::-1]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=10, write_page_checksum=with_checksums, **options)
    return buffer.getvalue()


WRITERS = (
    {},
    {"use_dictionary": False},
    {"compression": "none"},
    {"compression": "none", "use_dictionary": False, "store_schema": False},
    {"compression": "zstd", "data_page_version": "2.0"},
    {"compression": "gzip", "data_page_size": 100, "write_page_index": True},
)
FILES = {checked: [written(checked, **options) for options in WRITERS] for checked in (True, False)}


@st.composite
def damaged(draw, files: list[bytes]) -> bytes:
    """One of `files` after one to three accidents, half of them in the footer."""
    content = draw(st.sampled_from(files))
    for _ in range(draw(st.integers(1, 3))):
        in_footer = draw(st.booleans()) and len(content) > 2000
        place = draw(st.integers(len(content) - 2000 if in_footer else 0, max(0, len(content) - 1)))
        before, after = content[:place], content[place:]
        content = draw(
            st.one_of(
                st.integers(0, 7).map(
                    lambda bit, b=before, a=after: b + bytes([a[0] ^ 1 << bit]) + a[1:] if a else b
                ),
                st.binary(max_size=8).map(lambda new, b=before, a=after: b + new + a[len(new) :]),
                st.binary(max_size=8).map(lambda new, b=before, a=after: b + new + a),
                st.integers(1, 600).map(lambda lost, b=before, a=after: b + a[lost:]),
                st.just(before),
            )
        )
    return content


def read(content: bytes) -> list[list[str]] | None:
    """The units of a file; None for one that is refused in one line."""
    try:
        return read_all(ParquetCorpus([Bytes(content)], "text", {}))
    except UserError as error:
        assert re.match(r"(dataset_name|text_column): [^\n]+$", str(error))
        return None


@pytest.mark.parametrize("checked", FILES)
def test_whole_files_are_read(checked):
    assert all(read(content) == UNITS for content in FILES[checked])


@given(content=damaged(FILES[True]))
def test_with_checksums_no_damage_changes_a_text(content):
    assert read(content) in (None, UNITS)


@given(content=damaged(FILES[False]))
def test_without_checksums_no_damage_changes_the_number_of_documents(content):
    units = read(content)
    assert units is None or [len(unit) for unit in units] == [10] * 6
