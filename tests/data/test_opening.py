"""Names of corpora: what counts as one, its identity, and how bad input is refused."""

import gzip
import itertools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from tiny_corpus import (
    ByteEncoder,
    MemoryCorpus,
    documents,
    joined,
    refusal,
    write_lines,
    write_parquet,
)
from tiny_streams import stream_of

from gpt2repro import UserError
from gpt2repro.data import opening
from gpt2repro.data.corpora import content, other_formats, parquet
from gpt2repro.data.corpora.corpus import Found
from gpt2repro.data.opening import open_corpus
from gpt2repro.data.rows.units import UnitReader

TEXTS = documents(95)
OPTIONS = {"sequence_length": 16, "rows_per_step": 4, "num_lanes": 2, "num_validation_units": 1}
OPTIONS |= {"seed": 1}


@pytest.fixture(autouse=True)
def own_hashes(tmp_path_factory, monkeypatch):
    """Or it would be told that another worker of pytest-xdist is at them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


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
    file = next(tmp_path.rglob("*.*"))
    assert refusal(file, config="nope").startswith("dataset_config: files have none")
    assert refusal(tmp_path, config="a", data_files="*").startswith("dataset_config: files have no")
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


# --- Names that are spelled like something else ---------------------------------------------------

# A name, and a neighbour that it would mean as a pattern.
ODD = {
    "a[1]": "a1",
    "x?": "xy",
    "b*": "bcd",
    ".hidden": "hidden",
    "two words": "two",
    "k=v": "v",
    "a::b": "a",
    "c:d": "c",
    "latest_train": "other",
    "test": "train",
    "__odd__": "odd",
}


@pytest.mark.parametrize("suffix", ["parquet", "txt"])
@pytest.mark.parametrize(("odd", "plain"), ODD.items())
def test_what_exists_is_meant_as_it_is_spelled(tmp_path, monkeypatch, odd, plain, suffix):
    """As a file, a directory, in `data_files` beside it and below it; never its neighbours."""
    write = write_parquet if suffix == "parquet" else write_text
    for name, text in ((odd, "mine"), (plain, "theirs")):
        write(tmp_path / f"{name}.{suffix}", [text])
        write(tmp_path / "in" / name / f"0.{suffix}", [text])
    here = Path("in")
    monkeypatch.chdir(tmp_path)
    assert joined(open_corpus(f"{odd}.{suffix}")) == ["mine"]
    assert joined(open_corpus(here / odd)) == ["mine"]
    assert joined(open_corpus(tmp_path, data_files=f"{odd}.{suffix}")) == ["mine"]
    assert joined(open_corpus(here, data_files=f"{odd}/*.{suffix}")) == ["mine"]
    reader = "parquet" if suffix == "parquet" else "text"
    assert joined(open_corpus(reader, data_files=str(tmp_path / f"{odd}.{suffix}"))) == ["mine"]


def write_text(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n" for text in texts))


def test_a_directory_in_data_files_is_all_in_it(tmp_path):
    write_text(tmp_path / "b*" / "0.txt", ["mine"])
    write_text(tmp_path / "b*" / "deep" / "1.txt", ["mine too"])
    write_text(tmp_path / "bc" / "0.txt", ["theirs"])
    assert joined(open_corpus(tmp_path, data_files=["b*"])) == ["mine\n", "mine too\n"]


def test_an_address_in_a_directorys_name_is_none(tmp_path):
    """ "file://" in a path is a directory "file:" and one in it."""
    write_parquet(tmp_path / "hf:" / "datasets" / "0.parquet", ["mine"])
    assert joined(open_corpus(f"{tmp_path}/hf://datasets")) == ["mine"]


def test_what_does_not_exist_is_a_pattern(tmp_path):
    for name in ("a1", "a2", "b"):
        write_parquet(tmp_path / "d[0]" / f"{name}.parquet", [name])
    assert joined(open_corpus(tmp_path / "d[0]", data_files="a[0-9].parquet")) == ["a1", "a2"]
    assert joined(open_corpus(tmp_path, data_files=["d[0]/b*", "d[0]/a2*"])) == ["b", "a2"]
    assert "no data files" in refusal(tmp_path, data_files="d0/*.parquet")


def test_a_link_is_read_by_its_own_name_or_its_targets(tmp_path):
    write_parquet(tmp_path / "blobs" / "4f2a", ["mine"])
    (tmp_path / "0.parquet").symlink_to("blobs/4f2a")  # as the Hub's cache has it
    assert joined(open_corpus(tmp_path / "0.parquet")) == ["mine"]
    write_text(tmp_path / "2024.txt", ["today"])
    (tmp_path / "latest").symlink_to("2024.txt")
    assert joined(open_corpus(tmp_path / "latest")) == ["today"]
    (tmp_path / "2024.tsv.gz").write_bytes(gzip.compress(b"text\tn\nof a table\t1\n"))
    (tmp_path / "table").symlink_to("2024.tsv.gz")
    assert joined(open_corpus(tmp_path / "table")) == ["of a table"]


def test_a_file_that_is_named_twice_is_read_once(tmp_path, caplog):
    write_text(tmp_path / "d" / "0.txt", ["mine"])
    write_text(tmp_path / "d" / "1.txt", ["yours"])
    (tmp_path / "d" / "again").symlink_to(".")
    for patterns in (["1.txt", "*.txt", "0.txt"], "**/*.txt"):
        texts = joined(open_corpus(tmp_path / "d", data_files=patterns, document="line"))
        assert texts == (["mine", "yours"] if patterns == "**/*.txt" else ["yours", "mine"])
        assert "once is read" in caplog.text
        caplog.clear()


def test_files_in_a_file_and_of_a_file_are_none(tmp_path):
    write_text(tmp_path / "0.txt", ["mine"])
    assert "no data files" in refusal(tmp_path, data_files="0.txt/nothing.txt")
    assert "data_files: " in refusal(tmp_path / "0.txt", data_files="*.txt")
    far = refusal("json", data_files="https://a.b/c.jsonl")
    assert "https://a.b/c.jsonl is no file of this machine: download it" in far
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "dataset_info.json").write_text("{}")
    assert "dataset_name: no data files in" in refusal(tmp_path / "only")


def test_a_splits_name_above_the_directory_means_nothing(tmp_path):
    """`datasets` finds splits by names below what it is given, and only there."""
    write_parquet(tmp_path / "test" / "latest_train" / "texts" / "0.parquet", ["mine"])
    assert joined(open_corpus(tmp_path / "test" / "latest_train" / "texts")) == ["mine"]
    assert joined(open_corpus(tmp_path / "test" / "latest_train")) == ["mine"]


def test_files_without_a_splits_name_beside_others_are_told(tmp_path, caplog):
    write_parquet(tmp_path / "train.parquet", ["mine"])
    write_parquet(tmp_path / "more.parquet", ["left out"])
    assert joined(open_corpus(tmp_path)) == ["mine"]
    assert "1 files" in caplog.text and "more.parquet" in caplog.text
    assert joined(open_corpus(tmp_path, data_files="*.parquet")) == ["left out", "mine"]


def test_linked_directories_are_told_of(tmp_path, caplog):
    """`datasets` does not look into them."""
    (tmp_path / "elsewhere").mkdir()
    write_lines(tmp_path / "elsewhere" / "linked.jsonl", ["linked"])
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    assert "linked directories, data_files finds some: '**'" in refusal(tmp_path / "data")
    write_lines(tmp_path / "data" / "a" / "real.jsonl", ["real"])
    assert joined(open_corpus(tmp_path / "data")) == ["real"]
    assert "linked directories are not looked into, such as 'b' of" in caplog.text
    assert joined(open_corpus(tmp_path / "data", data_files="**")) == ["real", "linked"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.csv.gz", "a.bin", "a.npy"])
def test_pointers_of_git_lfs_are_no_text(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tmp_path / name).write_text(pointer)
    for place in (tmp_path, tmp_path / name):
        assert f"{name} is a git-lfs pointer, not the file: run `git lfs pull`" in refusal(place)


def test_odd_characters_in_files_names(tmp_path):
    names = ["a.txt", "a::b.txt", "b\nc.txt", "d e.txt", "f*.txt", "g#%.txt"]
    for name in names:
        write_text(tmp_path / name, [repr(name)])
    texts = [f"{name!r}\n" for name in names]
    assert joined(open_corpus(tmp_path)) == texts
    assert joined(open_corpus(tmp_path, data_files=names[1:4])) == texts[1:4]


def test_a_directory_of_several_formats_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a"])
    write_text(tmp_path / "b.txt", ["b"])
    write_text(tmp_path / "c.txt", ["c"])
    (tmp_path / "LICENSE.md").write_text("no data")
    message = refusal(tmp_path)
    assert message.startswith("data_files: ") and "several formats (a.parquet, " in message
    assert joined(open_corpus(tmp_path, data_files="*.txt", document="line")) == ["b", "c"]
    assert "several formats" in refusal(tmp_path, data_files=["a.parquet", "b.txt"])


def test_markdown_is_text_where_nothing_else_is_data(tmp_path, caplog):
    """Beside data it says something of them, README.md often also beside plain text."""
    write_text(tmp_path / "README.md", ["about"])
    write_text(tmp_path / "input.txt", ["one", "two"])
    assert joined(open_corpus(tmp_path)) == ["one", "two"], "a file alone is one of lines"
    write_text(tmp_path / "deep" / "notes.md", ["three"])
    texts = ["three\n", "one\ntwo\n"]
    assert sorted(joined(open_corpus(tmp_path))) == sorted([*texts, "about\n"])
    for key in ("configs: []", "license: mit\ndataset_info:\n  size: 1"):
        (tmp_path / "README.md").write_text(f"---\n{key}\n---\nabout\n")
        assert sorted(joined(open_corpus(tmp_path))) == sorted(texts), "a dataset card"
    write_parquet(tmp_path / "0.parquet", ["data"])
    (tmp_path / "input.txt").unlink()
    assert joined(open_corpus(tmp_path)) == ["data"] and not caplog.text
    (tmp_path / "0.parquet").unlink()
    Dataset.from_dict({"text": ["saved"]}).save_to_disk(tmp_path)
    assert joined(open_corpus(tmp_path)) == ["saved"]


def test_markdown_with_a_splits_name(tmp_path, caplog):
    for name in ("train", "test", "README"):
        write_text(tmp_path / f"{name}.md", [name])
    assert joined(open_corpus(tmp_path)) == ["train"]
    assert joined(open_corpus(tmp_path, split="test")) == ["test"] and not caplog.text


def test_dataset_cards(tmp_path):
    """Configurations as in a clone of a Hub repository; what is no YAML is told."""
    write_parquet(tmp_path / "d*" / "en" / "0.parquet", ["hello"])
    write_parquet(tmp_path / "d*" / "de" / "0.parquet", ["hallo"])
    write_parquet(tmp_path / "dd" / "de" / "0.parquet", ["theirs"])
    card = tmp_path / "d*" / "README.md"
    configs = "configs:\n- config_name: en\n  data_files: en/*\n- config_name: de\n"
    card.write_text(f"---\n{configs}  data_files:\n  - split: test\n    path: de/*\n---\n")
    assert joined(open_corpus(tmp_path / "d*", config="en")) == ["hello"]
    assert joined(open_corpus(tmp_path / "d*", config="de", split="test")) == ["hallo"]
    assert refusal(tmp_path / "d*").startswith("dataset_config: ")
    assert refusal(tmp_path / "d*", config="fr").startswith("dataset_config: ")
    for broken in (b"---\nconfigs: [\n---\n", b"---\nname: \xe9\n---\n", b"---\nconfigs: 3\n---\n"):
        card.write_bytes(broken)
        message = refusal(tmp_path / "d*")
        assert message.startswith("dataset_name: ") and "README.md" in message


def test_a_card_names_nothing_outside_of_its_directory(tmp_path):
    write_parquet(tmp_path / "secret.parquet", ["private"])
    write_parquet(tmp_path / "d" / "0.parquet", ["first"])
    write_parquet(tmp_path / "d" / "sub" / "0.parquet", ["second"])
    card = tmp_path / "d" / "README.md"
    beyond = (
        "../*.parquet",
        "sub/../../*",
        f"{tmp_path}/*",
        "http://127.0.0.1:9/x.parquet",
        "file:/etc/hosts",
    )
    for field, name in [*(("data_files", name) for name in beyond), ("data_dir", "..")]:
        card.write_text(f"---\nconfigs:\n- config_name: default\n  {field}: '{name}'\n---\n")
        message = refusal(tmp_path / "d")
        assert message.startswith("dataset_name: the card of ") and name in message
    for files in ("", "  data_files: '*.parquet'\n"):  # both are below it, as `datasets` has it
        card.write_text(f"---\nconfigs:\n- config_name: default\n  data_dir: sub\n{files}---\n")
        assert joined(open_corpus(tmp_path / "d")) == ["second"]
        assert load_dataset(str(tmp_path / "d"), split="train")["text"][:] == ["second"]


def test_formats_that_only_datasets_reads(tmp_path):
    for folder in ("a", "b"):
        directory = tmp_path / folder / "saved[1]"
        Dataset.from_dict({"text": TEXTS, "n": list(range(95))}).save_to_disk(directory)
    source = open_corpus(tmp_path / "a" / "saved[1]")
    assert joined(source) == TEXTS
    assert source.identity == open_corpus(tmp_path / "b" / "saved[1]").identity
    assert "'n' of local files" in refusal(tmp_path / "a" / "saved[1]", text_column="n")


# --- What local files hold ------------------------------------------------------------------------


@pytest.fixture
def records(tmp_path, monkeypatch) -> Path:
    """Where hashes are kept, for this test alone, and of files however young."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "SETTLED_SECONDS", -1)
    return tmp_path / "cache" / "gpt2repro" / "content.json"


def change_in_the_middle(path: Path) -> None:
    """Letters of the text, but not its length, nor the file's ends, nor its times."""
    before = path.stat()
    whole = path.read_bytes()
    middle = whole.index(b"of", len(whole) // 2)
    path.write_bytes(whole[:middle] + b"OF" + whole[middle + 2 :])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["0.parquet", "0.jsonl", "0.txt", "0.csv"])
def test_a_change_in_the_middle_of_a_file_is_another_identity(tmp_path, records, name):
    path = tmp_path / "texts" / name
    path.parent.mkdir()
    texts = documents(4000, max_words=20)
    if name == "0.parquet":
        table = pa.table({"text": texts})
        pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=1000)
    elif name == "0.csv":
        pa.table({"text": texts}).to_pandas().to_csv(path, index=False)
    else:
        write_lines(path, texts) if name == "0.jsonl" else write_text(path, texts)
    first = open_corpus(path.parent)
    state = stream_of(first, ByteEncoder(), **OPTIONS).state_dict()
    change_in_the_middle(path)
    second = open_corpus(path.parent)
    assert "OF" in " ".join(joined(second))
    assert {key for key in first.identity if first.identity[key] != second.identity[key]} == {
        "content"
    }
    with pytest.raises(UserError, match="the hash of what the files hold was"):
        stream_of(second, ByteEncoder(), **OPTIONS).load_state_dict(state)


def test_other_units_are_another_identity(tmp_path, monkeypatch):
    """Documents are permuted within units: a run that went on would have other rows."""
    write_lines(tmp_path / "a.jsonl", TEXTS)
    state = stream_of(open_corpus(tmp_path), ByteEncoder(), **OPTIONS).state_dict()
    monkeypatch.setattr(other_formats, "FEWEST_UNITS", 20)
    with pytest.raises(UserError, match="the digest of the data files was"):
        stream_of(open_corpus(tmp_path), ByteEncoder(), **OPTIONS).load_state_dict(state)


def test_cached_tokens_are_those_of_the_files_as_they_are(tmp_path, records):
    path = tmp_path / "texts" / "0.parquet"
    path.parent.mkdir()
    for spelled in ("first", "other"):
        table = pa.table({"text": [spelled] * 10})
        pq.write_table(table, path, compression="none", use_dictionary=False)
        reader = UnitReader(open_corpus(path), ByteEncoder(), token_cache_dir=tmp_path / "tokens")
        [ids], _ = reader.submit(0).result().encode([3])
        assert bytes(ids.astype("uint8")).decode() == spelled
        reader.close()


def test_a_file_is_hashed_once(tmp_path, records, monkeypatch):
    write_parquet(tmp_path / "texts" / "0.parquet", TEXTS)
    first = open_corpus(tmp_path / "texts").identity
    hashed = []
    monkeypatch.setattr(content, "_hash", lambda file, key: hashed.append(file) or "?")
    assert open_corpus(tmp_path / "texts").identity == first and not hashed
    for broken in ("", "[1]", '{"a', "{}"):
        records.write_text(broken)
        open_corpus(tmp_path / "texts")
        assert len(hashed) == 1, "the record is lost, and made again"
        open_corpus(tmp_path / "texts")
        assert len(hashed) == 1
        hashed.clear()


def test_records_of_hashes_are_those_of_the_newest_files(tmp_path, records, monkeypatch):
    """And at least of all that one dataset has, or it would be hashed at every start."""
    monkeypatch.setattr(content, "NUM_RECORDS", 2)
    for name in ("a", "b", "c"):
        write_parquet(tmp_path / name / "0.parquet", TEXTS)
        open_corpus(tmp_path / name)
    known = [key.split()[-1] for key in json.loads(records.read_text())]
    assert known == [str(tmp_path / name / "0.parquet") for name in ("b", "c")]
    for number in range(3):
        write_parquet(tmp_path / "d" / f"{number}.parquet", TEXTS)
    first = open_corpus(tmp_path / "d").identity
    monkeypatch.setattr(content, "_hash", lambda file, key: pytest.fail("hashed again"))
    assert open_corpus(tmp_path / "d").identity == first


def test_young_files_are_hashed_again(tmp_path, records, monkeypatch):
    """One that changes within a tick of the clock keeps its times."""
    monkeypatch.setattr(content, "SETTLED_SECONDS", 60)
    write_parquet(tmp_path / "texts" / "0.parquet", TEXTS)
    open_corpus(tmp_path / "texts")
    assert json.loads(records.read_text()) == {}


def test_who_stops_while_files_are_hashed_keeps_what_was_done(tmp_path, records, monkeypatch):
    for number in range(5):
        write_parquet(tmp_path / "texts" / f"{number}.parquet", TEXTS)
    monkeypatch.setattr(content, "AT_A_TIME", 2)
    digest, stops = content._digest, [True]

    def stopped(file: Path) -> str:
        if stops and file.name == "4.parquet":
            raise KeyboardInterrupt
        return digest(file)

    monkeypatch.setattr(content, "_digest", stopped)
    with pytest.raises(KeyboardInterrupt):
        open_corpus(tmp_path / "texts")
    assert len(json.loads(records.read_text())) == 4
    stops.clear()
    open_corpus(tmp_path / "texts")
    assert len(json.loads(records.read_text())) == 5


def test_a_file_of_the_future_is_hashed_once(tmp_path, records):
    """As of an archive from a machine with another clock."""
    write_parquet(tmp_path / "0.parquet", TEXTS)
    os.utime(tmp_path / "0.parquet", (time.time() + 10**6,) * 2)
    open_corpus(tmp_path / "0.parquet")
    assert len(json.loads(records.read_text())) == 1


def test_processes_of_a_machine_hash_once(tmp_path, records, monkeypatch):
    write_parquet(tmp_path / "0.parquet", TEXTS)
    files = [str(tmp_path / "0.parquet")]
    hashed, real = [], content._hash

    def slow(file, key):
        hashed.append(file)
        time.sleep(0.2)
        return real(file, key)

    monkeypatch.setattr(content, "_hash", slow)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: content.content_hashes(files), range(4)))
    assert len(hashed) == 1 and all(each == found[0] for each in found)


@pytest.mark.parametrize("home", ["a file", "nothing"])
def test_without_a_place_for_records_files_are_hashed_each_time(tmp_path, monkeypatch, home):
    write_parquet(tmp_path / "0.parquet", TEXTS)
    expected = open_corpus(tmp_path / "0.parquet").identity
    (tmp_path / "file").touch()
    if home == "a file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert open_corpus(tmp_path / "0.parquet").identity == expected


def test_much_to_hash_is_told(tmp_path, records, monkeypatch, caplog):
    monkeypatch.setattr(content, "WORTH_A_LINE_BYTES", 100)
    write_parquet(tmp_path / "0.parquet", TEXTS)
    open_corpus(tmp_path / "0.parquet")
    open_corpus(tmp_path / "0.parquet")
    assert caplog.text.count("GB of local files, once") == 1


def test_a_stamp_that_moves_without_the_file_is_no_change(tmp_path, records, monkeypatch, caplog):
    """Reading sets the ctime on sshfs; gluster tells that of whichever replica answers."""
    (tmp_path / "0.txt").write_text("one\n")
    key, asked = content._key, itertools.count()

    def moving(file: Path) -> str:
        size, mtime, *_ = key(file).split(" ", 3)
        return f"{size} {mtime} {next(asked)} 1 {file}"

    monkeypatch.setattr(content, "_key", moving)
    assert open_corpus(tmp_path / "0.txt").read_unit(0) == ["one"]

    def growing(file: Path) -> str:
        with file.open("a") as stream:
            stream.write("two\n")
        os.utime(file, ns=(0, 0))
        return f"4 0 {next(asked)} 1 {file}"

    monkeypatch.setattr(content, "_key", growing)
    assert "changed while it was read" in refusal(tmp_path / "0.txt")


def test_a_file_that_changes_while_it_is_hashed_is_refused(tmp_path, records, monkeypatch):
    write_parquet(tmp_path / "0.parquet", TEXTS)
    keys = iter("ab")
    monkeypatch.setattr(content, "_key", lambda file: next(keys))
    assert "changed while it was read" in refusal(tmp_path / "0.parquet")


def test_an_odd_name_on_the_hub_does_not_change_how_all_are_read(tmp_path, monkeypatch):
    """A newline in one file's name had all of them streamed whole, in other units."""
    names = ["a.parquet", "b\nc.parquet", "d #%.parquet"]

    class Listed(parquet.LocalSource):
        content = "its hash"

    def written(files: list[dict[str, str]]) -> list[Listed]:
        for file in files:
            write_parquet(tmp_path / file["path"], [file["path"]])
        places = [tmp_path / file["path"] for file in files]
        return [Listed(p.name, p, p.stat().st_size) for p in places]

    monkeypatch.setattr(parquet, "_hub_sources", written)
    files = [f"hf://datasets/someone/odd@1f/{name}" for name in names]
    source = parquet.open_parquet(Found("", "parquet", None, files, "train", "text", {}, True))
    assert source is not None and joined(source) == names
