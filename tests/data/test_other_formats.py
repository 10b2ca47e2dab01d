"""JSON lines, CSV and text on disk."""

import pyarrow as pa
from tiny_corpus import (
    documents,
    joined,
    read_all,
    refusal,
    write_lines,
)

from gpt2repro.data import other_formats
from gpt2repro.data.opening import open_corpus

TEXTS = documents(95)


def test_json_lines_csv_and_text_are_read_in_units_of_1000(tmp_path, monkeypatch):
    monkeypatch.setattr(other_formats, "DOCUMENTS_PER_UNIT", 40)
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


def test_columns_of_json_lines_are_checked_too(tmp_path):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    assert "text_column: local files has no column 'txt'" in refusal(
        tmp_path / "a.jsonl", text_column="txt"
    )
    assert "'n' of local files is int64, not text" in refusal(tmp_path / "a.jsonl", text_column="n")


def test_json_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nnot json at all\n')
    assert refusal(tmp_path / "a.jsonl").startswith("dataset_name: no documents can be read from")
