"""Names of corpora: what counts as one, its identity, and how bad input is refused."""

import json

import pytest
from tiny_corpus import (
    MemoryCorpus,
    documents,
    joined,
    refusal,
    write_lines,
    write_parquet,
)

from gpt2repro.data import opening
from gpt2repro.data.corpus import Found
from gpt2repro.data.opening import open_corpus

TEXTS = documents(95)


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


def test_the_identity_follows_the_content_not_the_place(tmp_path):
    for folder in ("here", "there"):
        write_parquet(tmp_path / folder / "a.parquet", TEXTS)
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


def test_bad_names_are_refused_by_field(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, number=list(range(95)))
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


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_split_is_refused(tmp_path, content):
    write_parquet(tmp_path / "p" / "a.parquet", [])
    assert "has no documents in split 'train'" in refusal(tmp_path / "p")
    (tmp_path / "a.jsonl").write_text(content)
    assert refusal(tmp_path / "a.jsonl").startswith("dataset_name: no documents can be read from")


def test_a_new_format_is_one_line_of_the_table(tmp_path, monkeypatch):
    """It is asked before the general ones, and takes or leaves what was found."""
    write_parquet(tmp_path / "a.parquet", TEXTS)

    def open_joined(found: Found) -> MemoryCorpus | None:
        return MemoryCorpus([found.files]) if found.split == "train" else None

    monkeypatch.setattr(opening, "FORMATS", (open_joined, *opening.FORMATS))
    assert joined(open_corpus(tmp_path)) == [str(tmp_path / "a.parquet")]
    write_parquet(tmp_path / "test.parquet", TEXTS)
    assert joined(open_corpus(tmp_path, split="test")) == TEXTS
