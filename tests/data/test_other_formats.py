"""JSON lines, CSV and text on disk."""

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub, Fault, impatient
from tiny_corpus import (
    documents,
    joined,
    read_all,
    refusal,
    write_lines,
    write_parquet,
)

from gpt2repro import UserError
from gpt2repro.data.corpora import other_formats
from gpt2repro.data.opening import open_corpus

ROOT = Path(__file__).parents[2]
TEXTS = documents(95)


def test_json_lines_csv_and_text_are_read_in_units_of_1000(tmp_path, monkeypatch):
    monkeypatch.setattr(other_formats, "DOCUMENTS_PER_UNIT", 40)
    monkeypatch.setattr(other_formats, "FEWEST_UNITS", 3)
    write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) + "\n")
    rows = pa.table({"text": TEXTS}).to_pandas()
    rows.to_csv(tmp_path / "a.csv", index=False)
    for name in ("a.jsonl", "a.txt", "a.csv"):
        source = open_corpus(tmp_path / name)
        units = read_all(source)
        assert [len(unit) for unit in units] == [40, 40, 15]
        assert joined(source) == TEXTS
        assert source.num_documents.tolist() == [40, 40, 15]


def test_a_unit_ends_at_four_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(other_formats, "FEWEST_UNITS", 1)
    texts = ["long " * 10**6, *["é" * 10**6] * 5, "short"]  # 5 MB, 2 MB each
    write(tmp_path / "0.jsonl", texts)
    assert read_all(open_corpus(tmp_path)) == [texts[:1], texts[1:3], texts[3:5], texts[5:]]


@pytest.mark.parametrize(("num_documents", "num_units"), [(1, 1), (2, 2), (95, 84), (2000, 128)])
def test_small_data_are_cut_into_128_units_or_documents(tmp_path, num_documents, num_units):
    texts = documents(num_documents)
    write_lines(tmp_path / "a.jsonl", texts)
    units = read_all(open_corpus(tmp_path))
    assert [text for unit in units for text in unit] == texts and len(units) == num_units
    sizes = [sum(map(len, unit)) for unit in units]
    assert max(sizes) - min(sizes[:-1], default=0) < 2 * max(map(len, texts))


def test_a_null_or_missing_text_in_json_lines_is_empty(tmp_path):
    lines = ['{"text": "one"}', '{"text": null}', '{"other": 1}', '{"text": "\\u0000 nul"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert joined(open_corpus(tmp_path)) == ["one", "", "", "\0 nul"]


def test_columns_of_json_lines_are_checked_too(tmp_path):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    assert "text_column: local files has no column 'txt'" in refusal(
        tmp_path / "a.jsonl", text_column="txt"
    )
    assert "'n' of local files is int64, not text" in refusal(tmp_path / "a.jsonl", text_column="n")


def test_a_value_that_has_no_type_hides_no_wrong_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "hello", "meta": [1, "a"]}\n')
    assert "has no column 'text'; columns of text: content" in refusal(tmp_path / "a.jsonl")
    message = refusal(tmp_path / "a.jsonl", text_column="meta")
    assert "'meta' of local files is list<item: null>, not text" in message


def test_a_window_that_is_too_large_is_told_with_what_to_do(tmp_path):
    """As `zstd --long=31` makes them: here with one raw block of a byte."""
    frame = b"\x28\xb5\x2f\xfd\x00\xa8" + (1 << 3 | 1).to_bytes(3, "little") + b"a"
    (tmp_path / "a.txt.zst").write_bytes(frame)
    assert "decompress it first: `zstd -d --long=31`" in refusal(tmp_path / "a.txt.zst")


def test_json_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nnot json at all\n')
    assert refusal(tmp_path / "a.jsonl").startswith("dataset_name: no documents can be read from")


# --- Text as it is written, or a line -------------------------------------------------------------


@pytest.fixture(autouse=True)
def prepared(tmp_path_factory, monkeypatch) -> Path:
    """Where the copies go, for each test anew."""
    place = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place))
    return place / "gpt2repro"


# What looks like something else than text to who guesses types.
GUESSED = ["NA", "null", "nan", "", "007", "1.0", "1e5", "True", "2020-01-01", "inf", "-", " x "]


@pytest.mark.parametrize("texts", [GUESSED, ["2020-01-01"], ["007"], ["NA"], ["True"]])
@pytest.mark.parametrize("name", ["0.csv", "0.tsv", "0.jsonl", "0.json", "0.txt"])
def test_text_is_not_taken_for_something_else(tmp_path, name, texts):
    write(tmp_path / name, texts)
    # An empty line is between texts, where the others have an empty text.
    assert joined(open_corpus(tmp_path / name)) == [t for t in texts if t or name != "0.txt"]


def write(path: Path, texts: list[str], more: str = "") -> None:
    """`texts` in the format of the name; `more` values of a second column first."""
    if path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts], indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        delimiter = "," if path.suffix == ".csv" else "\t"
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, delimiter=delimiter)
            rows.writerows([["text"], *([text] for text in texts)])


def test_a_column_that_is_not_asked_for_may_hold_anything(tmp_path):
    """Its type changes after the first batches, which does not concern the text."""
    lines = [{"text": "a", "n": 1}] * 3 + [{"text": "b", "n": "x"}, {"text": "c", "n": {"m": []}}]
    (tmp_path / "0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert joined(open_corpus(tmp_path / "0.jsonl")) == ["a", "a", "a", "b", "c"]
    agent = {"type": "user", "message": {"role": "user"}, "text": "kept"}
    (tmp_path / "1.jsonl").write_text(json.dumps(agent))
    assert joined(open_corpus(tmp_path / "1.jsonl")) == ["kept"]
    odd = '{"text": "kept", "n": %s, "m": {"text": 1, "text": 2}}' % ("1" * 5000)
    (tmp_path / "2.jsonl").write_text(odd)
    assert joined(open_corpus(tmp_path / "2.jsonl")) == ["kept"]


REFUSED = {
    # Commas that nobody quoted: the rest of the text was cut off, or the wrong column taken.
    "commas.csv": (b"text\nhello, world\n", "line 2", "2 fields under 1 names"),
    "commas_later.csv": (b"n,text\n1,fine\n2,hello, world\n", "line 3", "3 fields under 2 names"),
    "short.csv": (b"n,text\n1,fine\n2\n", "line 3", "1 fields under 2 names"),
    "open_quote.csv": (b'text\n"never closed\n', "unexpected end"),
    "stray_quote.csv": (b'text\n"a" b\n', "line 2"),
    "latin.csv": ("text\nnaïve\n".encode("latin-1"), "line 1", "utf-8"),
    "latin.txt": ("fine\nnaïve\n".encode("latin-1"), "line 1", "utf-8"),
    "latin.jsonl": ('{"text": "naïve"}\n'.encode("latin-1"), "utf-8"),
    "utf16.txt": ("hello\n".encode("utf-16"), "utf-8"),
    "utf16.csv": ("text\nhello\n".encode("utf-16"), "utf-8"),
    "surrogate.jsonl": (b'{"text": "a"}\n{"text": "\\ud83d"}\n', "line 2", "surrogate"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}\n', "line 1", "more than once"),
    "lists.jsonl": (b'{"text": "a"}\n["a", "b"]\n', "line 2", "list"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', "line 2"),
    "deep.jsonl": (b'{"text": ' + b"[" * 10**5, "RecursionError"),
    "cut.txt.gz": (gzip.compress(b"hello\n" * 1000)[:-9], "end-of-stream"),
    "no_gz.txt.gz": (b"hello\n", "gzip"),
    "no_xz.txt.xz": (b"hello\n", "format"),
    "no_zst.txt.zst": (b"hello\n", "line 1"),
    "cut.jsonl.bz2": (bz2.compress(b'{"text": "a"}\n')[:-5], "Truncated"),
    "empty.csv": (b"", "it is empty"),
    "header_only.csv": (b"text\n", "it is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_right_is_one_line(tmp_path, name):
    content, *parts = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    for given in (tmp_path / name, tmp_path):
        message = refusal(given)
        assert message.startswith(f"dataset_name: no documents can be read from {name}")
        assert all(part in message for part in parts), message


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".csv"])
def test_a_text_that_inflates_beyond_all_measure_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(other_formats, "LONGEST_TEXT", 1000)
    content = {
        ".jsonl": '{"text": "a"}\n{"text": "%s"}\n',
        ".json": '[{"text": "a"},\n{"text": "%s"}]',
        ".txt": "a\n%s\n",
        ".csv": 'text\n"%s"\n',
    }[suffix]
    file = tmp_path / f"0{suffix}.gz"
    file.write_bytes(gzip.compress((content % ("b" * 500)).encode()))
    assert joined(open_corpus(file))[-1] == "b" * 500
    file.write_bytes(gzip.compress((content % ("b" * 2000)).encode()))
    assert other_formats.TOO_LONG in refusal(file)
    if suffix == ".csv":  # a field of many lines
        file.write_bytes(gzip.compress((content % ("b\n" * 1000)).encode()))
        assert "field larger than field limit (999)" in refusal(file)


def test_a_document_of_many_lines_is_measured_too(tmp_path, monkeypatch):
    monkeypatch.setattr(other_formats, "LONGEST_TEXT", 1000)
    (tmp_path / "0.txt").write_text("a\n" * 499)
    (tmp_path / "1.txt").write_text("a\n" * 500)
    message = refusal(tmp_path)
    assert "from 1.txt, near line 500: " in message and other_formats.TOO_LONG in message


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "0.csv").write_text("text,n,text\na,1,b\n")
    assert "text_column: 0.csv has 2 columns 'text'" in refusal(tmp_path / "0.csv")
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "0.parquet")
    assert "text_column: 0.parquet has 2 columns 'text'" in refusal(tmp_path / "0.parquet")


@pytest.mark.parametrize("name", ["0.jsonl", "0.json", "0.csv", "0.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    """In every file, not in the first alone."""
    for file in (tmp_path / name, tmp_path / f"1{Path(name).suffix}"):
        write(file, ["hello", "naïve"])
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    document = "line" if name == "0.txt" else None
    assert joined(open_corpus(tmp_path, document=document)) == ["hello", "naïve"] * 2


def test_a_document_is_a_file_of_several_or_a_line_of_one(tmp_path, prepared):
    contents = [b"\xef\xbb\xbfone\r\n\r\n  two \n", b"", b" \n", b"three"]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.txt").write_bytes(content)
    (tmp_path / "4.md.gz").write_bytes(gzip.compress(b"# four\n"))
    files, lines = ["one\n\n  two \n", " \n", "three", "# four\n"], ["one", "  two "]
    several = open_corpus(tmp_path)
    assert joined(several) == joined(open_corpus(tmp_path, document="file")) == files
    cut = open_corpus(tmp_path, document="line")
    assert joined(cut) == [*lines, "three", "# four"]
    assert (several.identity["document"], cut.identity["document"]) == ("file", "line")
    assert joined(open_corpus(tmp_path / "0.txt")) == lines
    assert joined(open_corpus(tmp_path / "0.txt", document="file")) == files[:1]
    assert "no documents can be read" in refusal(tmp_path / "1.txt", document="file")


COMPRESSED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
    "": bytes,
}


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".TXT", ".JsonL"])
def test_formats_by_name(tmp_path, suffix, compression):
    """As a file, in a directory, in `data_files`, upper case too."""
    texts = [*TEXTS[:5], "tab\tand, comma"] if suffix == ".csv" else TEXTS[:6]
    kind = {".ndjson": ".jsonl"}.get(suffix, suffix).lower()
    write(tmp_path / f"plain{kind}", texts)
    content = (tmp_path / f"plain{kind}").read_bytes()
    name = f"0{suffix}{compression.upper() if suffix.isupper() else compression}"
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_bytes(COMPRESSED[compression](content))
    assert joined(open_corpus(tmp_path / "texts" / name)) == texts
    assert joined(open_corpus(tmp_path / "texts")) == texts
    assert joined(open_corpus(tmp_path, data_files=f"texts/{name}")) == texts
    assert joined(open_corpus(tmp_path, data_files="texts/*")) == texts


def test_several_members_of_a_compressed_file_are_all_read(tmp_path):
    """`cat a.gz b.gz > c.gz` is a file too."""
    for compression, compress in COMPRESSED.items():
        padding = bytes(8) if compression == ".xz" else b""
        members = compress(b"one\n") + padding + compress(b"two\n") + padding
        (tmp_path / f"0.txt{compression}").write_bytes(members)
        assert joined(open_corpus(tmp_path / f"0.txt{compression}")) == ["one", "two"]


@pytest.mark.parametrize("suffix", [".bz2", ".xz", ".gz", ".zst"])
def test_a_member_that_is_damaged_is_no_end(tmp_path, suffix):
    """Python's own readers of some take it for one: a torn copy would be half a text."""
    one, two = (COMPRESSED[suffix](text) for text in (b"one\n", b"two\n"))
    for rest in (b"X" + two[1:], bytes(len(two)), two[:-5]):
        (tmp_path / f"0.txt{suffix}").write_bytes(one + rest)
        if suffix in (".gz", ".xz") and not any(rest):
            assert joined(open_corpus(tmp_path / f"0.txt{suffix}")) == ["one"]  # they are padding
            continue
        assert "no documents can be read from 0.txt" in refusal(tmp_path / f"0.txt{suffix}")


def test_what_changes_between_hash_and_copy_is_not_kept(tmp_path, prepared, monkeypatch):
    """It would stand under the hash of another text, for good."""
    (tmp_path / "0.txt").write_text("one\n")
    hashes = other_formats.content_hashes

    def and_then_it_grows(files):
        found = hashes(files)
        with (tmp_path / "0.txt").open("a") as file:
            file.write("two\n")
        return found

    monkeypatch.setattr(other_formats, "content_hashes", and_then_it_grows)
    assert "changed while it was read" in refusal(tmp_path / "0.txt")
    assert not [*prepared.rglob("*.parquet")]


def test_long_documents(tmp_path):
    """Longer than what any library reads at a time."""
    texts = ["long " * 10**6, 'quoted "\n, ' * 10**5]
    for name in ("0.jsonl", "0.csv"):
        write(tmp_path / name, texts)
        assert joined(open_corpus(tmp_path / name)) == texts
    write(tmp_path / "0.txt", texts[:1])
    assert joined(open_corpus(tmp_path / "0.txt")) == texts[:1]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt", "parquet"])
def test_empty_files_among_others(tmp_path, suffix):
    for name, texts in (("0", []), ("1", ["a", "b"]), ("2", []), ("3", ["c"])):
        if suffix == "parquet":
            write_parquet(tmp_path / f"{name}.parquet", texts)
        elif texts:
            write(tmp_path / f"{name}.{suffix}", texts)
        else:
            (tmp_path / f"{name}.{suffix}").touch()
    document = "line" if suffix == "txt" else None
    assert joined(open_corpus(tmp_path, document=document)) == ["a", "b", "c"]


STRINGS = ["plain", "naïve", None, "", "plain"]
TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view()]
TEXT_TYPES += [pa.binary(), pa.large_binary(), pa.binary_view()]
TEXT_TYPES += [pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_texts_of_every_arrow_type(tmp_path, kind):
    table = pa.table({"text": pa.array(STRINGS).cast(pa.large_string()).cast(kind)})
    pq.write_table(table, tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": pa.nulls(2)}), tmp_path / "1.parquet")
    expected = [text or "" for text in STRINGS]
    assert joined(open_corpus(tmp_path)) == [*expected, "", ""], "a shard of nulls has no type"


def test_other_arrow_types_are_refused(tmp_path):
    columns = {
        "lists": pa.array([["a"]]),
        "numbers": pa.array([1]),
        "dates": pa.array([0], pa.date32()),
        "records": pa.array([{"a": "b"}]),
        "coded": pa.array([7]).dictionary_encode(),
        "bytes": pa.array([b"\xff\xfe"]),
    }
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    for name in list(columns)[:-1]:
        assert f"text_column: column {name!r} of 0.parquet is" in refusal(
            tmp_path, text_column=name
        )
    with pytest.raises(UserError, match=r"cannot read row group 0 of 0\.parquet: .*UTF8"):
        open_corpus(tmp_path, text_column="bytes").read_unit(0)


def test_a_text_that_says_na_on_the_hub(monkeypatch):
    with FakeHub() as hub:
        hub.use_in_process(monkeypatch)
        hub.add("datasets", "someone/tables", {"0.csv": b"n,text\n1,NA\n2,null\n3,a\n"})
        assert joined(open_corpus("someone/tables")) == ["NA", "null", "a"]


@pytest.mark.parametrize("form", ["csv", "txt", "jsonl"])
@pytest.mark.parametrize("kind", ["ignore_range", "answer"])
@pytest.mark.parametrize("skip", [0, 1])
def test_a_part_of_a_file_on_the_hub_that_is_another(monkeypatch, form, kind, skip):
    """The whole file, or a proxy's page; at once 5 MiB of the file are asked for."""
    impatient(monkeypatch)
    texts = [f"{n} {'x' * 10_000}" for n in range(1200)]
    lines = {"csv": ["text", *texts], "txt": texts}.get(
        form, [json.dumps({"text": x}) for x in texts]
    )
    with FakeHub() as hub:
        hub.use_in_process(monkeypatch)
        hub.add("datasets", f"me/{kind}{skip}", {f"0.{form}": "\n".join(lines).encode()})
        fault = Fault(kind, rf"0\.{form}$", skip=skip, answer=(200, b"<html>"))
        hub.faults.append(fault)
        assert joined(open_corpus(f"me/{kind}{skip}")) == texts
        assert fault.num_hits == 1


# --- The copy in the cache of `datasets` ----------------------------------------------------------


def test_files_are_read_once(tmp_path, prepared, monkeypatch):
    write_lines(tmp_path / "0.jsonl", TEXTS)
    first = open_corpus(tmp_path / "0.jsonl")
    monkeypatch.setattr(other_formats, "_write", lambda *_: pytest.fail("read again"))
    again = open_corpus(tmp_path / "0.jsonl")
    assert joined(again) == joined(first) == TEXTS and again.identity == first.identity
    assert [file.suffix for file in prepared.iterdir()].count(".parquet") == 1


@pytest.mark.parametrize("damage", [b"", b"PAR1", None])
def test_a_copy_that_is_not_whole_is_made_again(tmp_path, prepared, damage):
    write_lines(tmp_path / "0.jsonl", TEXTS)
    open_corpus(tmp_path / "0.jsonl")
    [copy] = prepared.glob("*.parquet")
    copy.write_bytes(copy.read_bytes()[:-30] if damage is None else damage)
    assert joined(open_corpus(tmp_path / "0.jsonl")) == TEXTS


def test_a_flipped_bit_in_the_copy_is_never_other_text(tmp_path, prepared, monkeypatch):
    monkeypatch.setattr(other_formats, "FEWEST_UNITS", 1)
    write_lines(tmp_path / "0.jsonl", TEXTS)
    open_corpus(tmp_path / "0.jsonl")
    [copy] = prepared.glob("*.parquet")
    whole = copy.read_bytes()
    for place in range(4, len(whole) - 300, 97):
        copy.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            assert joined(open_corpus(tmp_path / "0.jsonl")) == TEXTS
        except UserError as error:
            assert str(copy) in str(error)
            assert "a copy of 0.jsonl: delete it, and the next start makes it" in str(error)


def test_processes_of_a_machine_make_the_copy_once(tmp_path, monkeypatch):
    write_lines(tmp_path / "0.jsonl", TEXTS)
    made, real = [], other_formats._write

    def slow(*arguments):
        made.append(1)
        time.sleep(0.2)
        real(*arguments)

    monkeypatch.setattr(other_formats, "_write", slow)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: joined(open_corpus(tmp_path / "0.jsonl")), range(4)))
    assert found == [TEXTS] * 4 and len(made) == 1


READ_ALL = """
import sys
from gpt2repro.data.opening import open_corpus
for name in sys.argv[1:]:
    corpus = open_corpus(name)
    print([text for unit in range(corpus.num_units) for text in corpus.read_unit(unit)])
"""


@pytest.mark.parametrize(
    "variables", [("HF_HOME", "XDG_CACHE_HOME"), ("HF_DATASETS_CACHE", "HOME")]
)
def test_local_data_need_no_cache(tmp_path, variables):
    """Neither a home nor Hugging Face's: parquet says nothing, the others where they go instead."""
    names = ["0.parquet", "0.jsonl"]
    write_parquet(tmp_path / names[0], TEXTS)
    write_lines(tmp_path / names[1], TEXTS)
    (tmp_path / "file").touch()  # where no directory can be made, not even by root
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    environment |= dict.fromkeys(variables, str(tmp_path / "file"))
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, *names],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == f"{TEXTS}\n" * 2, done.stderr
    assert done.stderr.count("cannot be written") == 1 and "HF_DATASETS_CACHE" in done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == [*sorted(names), "file"]


def test_no_place_for_a_copy_at_all_is_a_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    write_lines(tmp_path / "0.jsonl", TEXTS)
    monkeypatch.setattr("pathlib.Path.replace", full)
    assert refusal(tmp_path / "0.jsonl").startswith("HF_DATASETS_CACHE or TMPDIR: no place")


def test_much_to_read_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(other_formats, "WORTH_A_LINE_BYTES", 100)
    write_lines(tmp_path / "0.jsonl", TEXTS)
    open_corpus(tmp_path / "0.jsonl")
    open_corpus(tmp_path / "0.jsonl")
    assert caplog.text.count("GB of text into") == 1


# --- Whatever a library raises --------------------------------------------------------------------


class Surprise(Exception):
    """What nobody expects."""


def surprise(*_, **__):
    raise Surprise("of a kind\nthat nobody expects")


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("datasets.data_files.get_data_patterns", "."),
        ("datasets.load_dataset_builder", "saved"),
        ("pyarrow.parquet.ParquetWriter", "0.jsonl"),
        ("pyarrow.parquet.read_metadata", "0.parquet"),
        ("pyarrow.parquet.read_metadata", "0.jsonl"),
        ("csv.reader", "0.csv"),
    ],
)
def test_whatever_a_library_raises_is_one_line(tmp_path, monkeypatch, place, name):
    write_lines(tmp_path / "0.jsonl", TEXTS)
    write(tmp_path / "0.csv", TEXTS)
    write_parquet(tmp_path / "0.parquet", TEXTS)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "0.arrow").touch()
    monkeypatch.setattr(place, surprise)
    message = refusal(tmp_path / name)
    assert "Surprise of a kind that nobody expects" in message and ": " in message
    monkeypatch.setattr(place, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        list(open_corpus(tmp_path / name).read_unit(0))


def test_reading_a_unit_is_one_line_too(tmp_path, monkeypatch):
    write_parquet(tmp_path / "0.parquet", TEXTS)
    source = open_corpus(tmp_path / "0.parquet")
    monkeypatch.setattr(pq, "ParquetFile", surprise)
    with pytest.raises(UserError, match=r"cannot read row group 0 of .* Surprise"):
        source.read_unit(0)


def test_a_unit_is_told_by_the_files_and_not_by_their_copy(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"What {name} says.")
    assert open_corpus(tmp_path).where(1) == "a.txt and 1 files more, unit 1"
    assert open_corpus(tmp_path / "a.txt").where(0) == "a.txt, unit 0"
