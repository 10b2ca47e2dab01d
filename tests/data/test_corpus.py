"""Corpora on disk: what counts as one, what its units hold, and how bad input is refused."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from tiny_corpus import documents, parquet_bytes

from gpt2repro import UserError
from gpt2repro.data import corpus
from gpt2repro.data.corpus import open_corpus

TEXTS = documents(95)


def read_all(source) -> list[list[str]]:
    return [source.read_unit(unit) for unit in range(source.num_units)]


def joined(source) -> list[str]:
    return [text for unit in read_all(source) for text in unit]


def write_parquet(path, texts=TEXTS, rows_per_group=10, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(parquet_bytes(texts, rows_per_group, **columns))


def test_units_are_row_groups_in_dataset_order(tmp_path):
    write_parquet(tmp_path / "train-00000.parquet", TEXTS[:50], id=list(range(50)))
    write_parquet(tmp_path / "train-00001.parquet", TEXTS[50:], 20, id=list(range(45)))
    source = open_corpus(tmp_path)
    units = read_all(source)
    assert [len(unit) for unit in units] == [10] * 5 + [20, 20, 5]
    assert [source.num_documents(unit) for unit in range(8)] == [len(unit) for unit in units]
    theirs = load_dataset(str(tmp_path), split="train", streaming=True)
    assert joined(source) == [row["text"] for row in theirs] == TEXTS


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
    write_parquet(tmp_path / "a.parquet", aaa=heavy)
    source = open_corpus(tmp_path)
    reads = []
    read = corpus.LocalSource.read
    monkeypatch.setattr(
        corpus.LocalSource, "read", lambda *args: (reads.append(args[2]), read(*args))[1]
    )
    source.read_unit(4)
    assert reads == [source.num_bytes(4)]


def test_other_text_columns_and_data_files(tmp_path):
    write_parquet(tmp_path / "x" / "a.parquet", TEXTS[:20], content=[t.upper() for t in TEXTS[:20]])
    write_parquet(tmp_path / "y" / "b.parquet", TEXTS[20:40])
    source = open_corpus(tmp_path, data_files="x/*.parquet", text_column="content")
    assert joined(source) == [text.upper() for text in TEXTS[:20]]
    one = open_corpus(tmp_path / "y" / "b.parquet")
    assert joined(one) == TEXTS[20:40]
    named = open_corpus("parquet", data_files=[str(tmp_path / "y" / "b.parquet")])
    assert named.identity == one.identity


def test_splits_are_those_of_datasets(tmp_path):
    write_parquet(tmp_path / "train.parquet", TEXTS[:20])
    write_parquet(tmp_path / "test.parquet", TEXTS[20:])
    assert joined(open_corpus(tmp_path)) == TEXTS[:20]
    assert joined(open_corpus(tmp_path, split="test")) == TEXTS[20:]


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))


def test_json_lines_csv_and_text_are_read_in_units_of_1000(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "DOCUMENTS_PER_UNIT", 40)
    write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) + "\n")
    rows = pa.table({"text": TEXTS}).to_pandas()
    rows.to_csv(tmp_path / "a.csv", index=False)
    for name in ("a.jsonl", "a.txt", "a.csv"):
        source = open_corpus(tmp_path / name)
        units = read_all(source)
        assert [len(unit) for unit in units] == [40, 40, 15]
        assert joined(source) == TEXTS
        assert [source.num_documents(unit) for unit in range(3)] == [40, 40, 15]


def test_a_null_or_missing_text_in_json_lines_is_empty(tmp_path):
    lines = ['{"text": "one"}', '{"text": null}', '{"other": 1}', '{"text": "\\u0000 nul"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert open_corpus(tmp_path).read_unit(0) == ["one", "", "", "\0 nul"]


def test_the_identity_follows_the_content_not_the_place(tmp_path):
    for folder in ("here", "there"):
        write_parquet(tmp_path / folder / "a.parquet")
        write_lines(tmp_path / folder / "b.jsonl", TEXTS)
    write_parquet(tmp_path / "changed" / "a.parquet", TEXTS[::-1])
    write_lines(tmp_path / "changed" / "b.jsonl", TEXTS[::-1])
    for name in ("a.parquet", "b.jsonl"):
        here, there, changed = (
            open_corpus(tmp_path / folder / name).identity
            for folder in ("here", "there", "changed")
        )
        assert here == there != changed
        assert json.loads(json.dumps(here)) == here


# -------------------------------------------------------------------------------------- refusals


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as raised:
        open_corpus(*arguments, **options)
    return str(raised.value)


def test_bad_names_are_refused_by_field(tmp_path):
    write_parquet(tmp_path / "a.parquet", number=list(range(95)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.docx").touch()
    message = refusal(tmp_path, text_column="txt")
    assert message == "text_column: a.parquet has no column 'txt'; columns of text: text"
    assert "text_column: column 'number' of a.parquet is int64" in refusal(
        tmp_path, text_column="number"
    )
    assert refusal(tmp_path, split="test").startswith("dataset_split: ")
    assert refusal(tmp_path, config="nope").startswith("dataset_config: ")
    assert refusal(tmp_path, data_files="*.jsonl").startswith("data_files: ")
    assert refusal(tmp_path / "empty").startswith("dataset_name: ")
    assert "neither a local directory nor a Hub name" in refusal(tmp_path / "nowhere")
    assert refusal(tmp_path / "notes.docx").startswith("dataset_name: ")
    assert refusal("parquet").startswith("data_files: ")


def test_columns_of_json_lines_are_checked_too(tmp_path):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    assert "text_column: local files has no column 'txt'" in refusal(
        tmp_path / "a.jsonl", text_column="txt"
    )
    assert "'n' of local files is int64, not text" in refusal(tmp_path / "a.jsonl", text_column="n")


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_split_is_refused(tmp_path, content):
    write_parquet(tmp_path / "p" / "a.parquet", [])
    assert "has no documents in split 'train'" in refusal(tmp_path / "p")
    (tmp_path / "a.jsonl").write_text(content)
    assert refusal(tmp_path / "a.jsonl").startswith("dataset_name: no documents can be read from")


def test_json_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nnot json at all\n')
    assert refusal(tmp_path / "a.jsonl").startswith("dataset_name: no documents can be read from")


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
    assert message.startswith("dataset_name: a.parquet") and "\n" not in message


def test_a_broken_page_is_refused_when_it_is_read(tmp_path):
    content = bytearray(parquet_bytes(TEXTS, 10))
    source = open_corpus(_written(tmp_path / "a.parquet", content))
    start = source._unit(3).start
    content[start : start + 60] = b"\xff" * 60
    _written(tmp_path / "a.parquet", content)
    with pytest.raises(UserError, match=r"dataset_name: cannot read row group 3 of a\.parquet"):
        source.read_unit(3)
    assert source.read_unit(4) == TEXTS[40:50]


def test_a_file_that_shrinks_is_refused_when_it_is_read(tmp_path):
    content = parquet_bytes(TEXTS, 10)
    source = open_corpus(_written(tmp_path / "a.parquet", content))
    _written(tmp_path / "a.parquet", content[:1000])
    with pytest.raises(UserError, match="ends early"):
        source.read_unit(9)


def _written(path, content):
    path.write_bytes(content)
    return path


def test_a_reader_may_stray_beyond_its_chunk(tmp_path):
    """Some writers' chunks are read with padding: such a read goes to the file."""
    path = _written(tmp_path / "a", bytes(range(100)))
    chunk = corpus._OneChunk(corpus.LocalSource("a", path, 100), 40, 20)
    chunk.seek(50)
    assert chunk.read(20) == bytes(range(50, 70)) and chunk.tell() == 70
    chunk.seek(-4, io.SEEK_END)
    assert chunk.read(50) == bytes(range(96, 100))
