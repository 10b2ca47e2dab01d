"""Parquet on disk: what its units hold, and how broken files are refused."""

import gc
import io
import itertools
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from tiny_corpus import (
    documents,
    joined,
    parquet_bytes,
    read_all,
    refusal,
    write_parquet,
)

from gpt2repro import UserError
from gpt2repro.data.corpora import parquet
from gpt2repro.data.corpora.footers import CODECS, Column, footer_of_chunk
from gpt2repro.data.opening import open_corpus

TEXTS = documents(95)


def test_units_are_row_groups_in_dataset_order(tmp_path):
    write_parquet(tmp_path / "train-00000.parquet", TEXTS[:50], id=list(range(50)))
    write_parquet(tmp_path / "train-00001.parquet", TEXTS[50:], 20, id=list(range(45)))
    source = open_corpus(tmp_path)
    units = read_all(source)
    assert [len(unit) for unit in units] == [10] * 5 + [20, 20, 5]
    assert source.num_documents.tolist() == [len(unit) for unit in units]
    theirs = load_dataset(str(tmp_path), split="train", streaming=True)
    assert joined(source) == [row["text"] for row in theirs] == TEXTS


def test_no_footer_outlives_its_reading(tmp_path):
    """Not even until Python looks for cycles: 2,400 of them were hundreds of megabytes."""
    write_parquet(tmp_path / "a.parquet", TEXTS)
    gc.collect()
    gc.disable()
    try:
        corpus = open_corpus(tmp_path)
        alive = [each for each in gc.get_objects() if isinstance(each, pq.FileMetaData)]
    finally:
        gc.enable()
    assert corpus.num_units > 1 and not alive


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), "dictionary"])
def test_every_way_to_write_a_text_column(tmp_path, compression, type_):
    texts = [None, "", "a\0b", "naïve 中文 😀", *TEXTS]
    column = pa.array(texts, pa.string() if type_ == "dictionary" else type_)
    if type_ == "dictionary":
        column = column.dictionary_encode()
    other = pa.array(np.arange(len(texts)))
    table = pa.table({"before": other, "text": column, "after": other})
    options = {"compression": compression, "row_group_size": 30, "data_page_size": 200}
    pq.write_table(table, tmp_path / "a.parquet", **options)
    source = open_corpus(tmp_path)
    assert joined(source) == ["", *texts[1:]]


def test_bytes_that_are_no_utf8_become_replacement_characters(tmp_path):
    """Arrow does not check what a writer calls a string."""
    data = b"good" + b"b\xffd" + "é".encode()
    offsets = np.array([0, 4, 7, 9], np.int32)
    column = pa.StringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(data))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert open_corpus(tmp_path).read_unit(0) == ["good", "b\ufffdd", "é"]


def test_a_unit_is_read_without_its_other_columns(tmp_path, monkeypatch):
    heavy = [bytes(1000).hex() + str(i) for i in range(95)]
    write_parquet(tmp_path / "a.parquet", TEXTS, aaa=heavy)
    source = open_corpus(tmp_path)
    reads = []
    read = parquet.LocalSource.read
    monkeypatch.setattr(
        parquet.LocalSource, "read", lambda *args: (reads.append(args[2]), read(*args))[1]
    )
    source.read_unit(4)
    assert reads == [source.num_bytes[4]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"PAR1",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-8] + b"\xff\xff\xff\x7fPAR1",
        lambda content: content[:-300] + bytes(292) + content[-8:],
    ],
    ids=["empty", "stub", "truncated", "footer length", "footer"],
)
def test_a_broken_file_is_refused_by_name(tmp_path, damage):
    (tmp_path / "a.parquet").write_bytes(damage(parquet_bytes(TEXTS, 10)))
    message = refusal(tmp_path)
    assert re.match(r"dataset_name: cannot read the footer of a\.parquet: ", message)


def test_a_broken_page_is_refused_when_it_is_read(tmp_path):
    content = bytearray(parquet_bytes(TEXTS, 10))
    source = open_corpus(_written(tmp_path / "a.parquet", content))
    start = int(source._units[3]["start"])
    content[start : start + 60] = b"\xff" * 60
    _written(tmp_path / "a.parquet", content)
    with pytest.raises(UserError, match=r"dataset_name: cannot read row group 3 of a\.parquet"):
        source.read_unit(3)
    assert source.read_unit(4) == TEXTS[40:50]


def test_a_file_that_shrinks_is_refused_when_it_is_read(tmp_path):
    content = parquet_bytes(TEXTS, 10)
    source = open_corpus(_written(tmp_path / "a.parquet", content))
    _written(tmp_path / "a.parquet", content[:1000])
    with pytest.raises(UserError, match="changed while being read"):
        source.read_unit(9)


def test_another_file_of_the_same_size_is_refused_when_it_is_read(tmp_path):
    """Its text would go into a cache of tokens under the hash of the first."""
    path = _written(tmp_path / "a.parquet", checked(TEXTS, compression="none"))
    corpus = open_corpus(path)
    os.utime(path, ns=(0, 0))  # somebody touches it
    assert corpus.read_unit(0) == TEXTS[:10]
    other = [text[::-1] for text in TEXTS]
    _written(tmp_path / "b", checked(other, compression="none")).replace(path)
    with pytest.raises(UserError, match="changed while being read"):
        corpus.read_unit(0)


# --- What can be compared is --------------------------------------------------------------------


def checked(texts, **options):
    """A file whose pages have checksums, in row groups of ten."""
    buffer = io.BytesIO()
    options = {"row_group_size": 10, "write_page_checksum": True} | options
    pq.write_table(pa.table({"text": texts}), buffer, **options)
    return buffer.getvalue()


def opened(path):
    source = parquet.LocalSource(path.name, path, path.stat().st_size)
    return parquet.ParquetCorpus([source], "text", {})


@pytest.mark.parametrize("use_dictionary", [False, True], ids=["page", "dictionary page"])
def test_a_bit_of_a_text_that_flips_fails_the_checksum(tmp_path, use_dictionary):
    content = checked(TEXTS, use_dictionary=use_dictionary, compression="none")
    content = flipped(content, content.index(b"<34>") + 1, 0)
    corpus = opened(_written(tmp_path / "a.parquet", content))
    with pytest.raises(UserError, match=r"^dataset_name: cannot read row group 3 of a.*CRC"):
        corpus.read_unit(3)
    assert corpus.read_unit(2) == TEXTS[20:30] and corpus.read_unit(4) == TEXTS[40:50]


def test_a_footer_that_says_other_numbers_of_rows_is_refused(tmp_path):
    """Of its groups or in all: found among all bits that can flip."""
    content = checked(TEXTS[:30])

    def told(content):
        footer = pq.read_metadata(io.BytesIO(content))
        groups = range(footer.num_row_groups)
        return footer.num_rows, [footer.row_group(index).num_rows for index in groups]

    num_refused = 0
    for place, bit in itertools.product(footer_of(content), range(8)):
        other = flipped(content, place, bit)
        try:
            lies = told(other) != told(content)
        except (OSError, ValueError, pa.ArrowException):
            continue
        if lies:
            num_refused += 1
            with pytest.raises(UserError, match=r"^dataset_name: cannot read the footer of a\."):
                joined(opened(_written(tmp_path / "a.parquet", other)))
    assert num_refused >= 4


def test_a_bit_of_a_footer_that_flips_changes_no_text(tmp_path):
    """Of every third byte, and of the schema: there pyarrow 26 ended the process."""
    content = checked(TEXTS[:30])
    footer = footer_of(content)
    places = {(place, place % 8) for place in footer[::3]}
    for place, bit in sorted(places | {*itertools.product(footer[:32], range(8))}):
        path = _written(tmp_path / "a.parquet", flipped(content, place, bit))
        try:
            assert joined(opened(path)) == TEXTS[:30]
        except UserError as error:
            assert re.match(r"(dataset_name|text_column): [^\n]+$", str(error))


def footer_of(content):
    return range(len(content) - 8 - int.from_bytes(content[-8:-4], "little"), len(content))


def flipped(content, place, bit):
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_a_row_group_too_large_to_be_held_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "LARGEST_UNIT_BYTES", 100_000)
    texts = [f"{n}" * 500 for n in range(300)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    assert re.match(
        r"dataset_name: .*a\.parquet: ArrowInvalid row group 0 has \d{3},\d{3} bytes of text; no "
        r"more than 100,000 are read at once: write smaller row groups",
        refusal(tmp_path),
    )


def test_a_little_dictionary_does_not_become_gigabytes(tmp_path, monkeypatch):
    """One text of a megabyte, four thousand times: the footer says nothing of their sum."""
    monkeypatch.setattr(parquet, "LARGEST_UNIT_BYTES", 2**26)
    column = pa.DictionaryArray.from_arrays(np.zeros(4000, np.int32), ["word " * 200_000])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 200_000
    corpus = opened(tmp_path / "a.parquet")
    sizes = []
    large_strings = parquet.pc.binary_length
    monkeypatch.setattr(
        parquet.pc,
        "binary_length",
        lambda part: (sizes.append(part.nbytes), large_strings(part))[1],
    )
    with pytest.raises(UserError, match="more than 67,108,864 bytes of text: write smaller row"):
        corpus.read_unit(0)
    assert sum(sizes) < 2 * 2**26


def _written(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("version", ["1.2.8", "1.2.9"])
def test_chunks_of_old_writers_are_longer_than_they_say(tmp_path, version):
    """By the header of their dictionary; pyarrow knows in which versions."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), buffer, compression="none")
    metadata = pq.read_metadata(buffer)
    chunk = metadata.row_group(0).column(0)
    start, length = chunk.dictionary_page_offset, chunk.total_compressed_size
    column = Column.of(metadata.schema, 0, f"parquet-mr version {version}")
    told = length - 15, chunk.total_uncompressed_size, CODECS.index("UNCOMPRESSED")
    pages = buffer.getvalue()[start : start + length]
    footer = footer_of_chunk(column, len(TEXTS), *told)
    corpus = open_corpus(_written(tmp_path / "a.parquet", pages + footer))
    if version == "1.2.8":
        assert corpus.read_unit(0) == TEXTS
    else:
        with pytest.raises(UserError, match="cannot read row group 0"):
            corpus.read_unit(0)
