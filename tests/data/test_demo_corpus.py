"""The demo's corpus: prose from Python itself, in FineWeb-Edu's columns, complete or not there."""

import hashlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gpt2repro import UserError
from gpt2repro.data import demo_corpus
from gpt2repro.data.opening import open_corpus
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.encoder import BulkEncoder
from gpt2repro.system import atomic

FINEWEB_EDU_COLUMNS = [
    *("text", "id", "dump", "url", "file_path"),
    *("language", "language_score", "token_count", "score", "int_score"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return demo_corpus.prepare(tmp_path_factory.mktemp("cache") / "demo")


def test_it_is_about_two_million_characters_of_prose(directory):
    table = pq.read_table(directory / "train.parquet")
    assert table.column_names == FINEWEB_EDU_COLUMNS
    texts = table.column("text").to_pylist()
    assert 3000 < len(texts) == len(set(texts))
    assert 1.5e6 < sum(map(len, texts)) < 6e6
    letters = sum(
        character.isalpha() or character.isspace() for text in texts for character in text
    )
    assert letters / sum(map(len, texts)) > 0.8
    sources = table.column("file_path").to_pylist()
    assert any("pydoc_data" in source for source in sources)
    folders = {folder for source in sources for folder in Path(source).parts[:-1]}
    assert not folders & {"test", "tests", "site-packages", "idlelib"}


def test_it_is_an_ordinary_dataset_with_an_ordinary_tokenizer(directory):
    corpus = open_corpus(str(directory))
    assert corpus.num_units > 20  # enough for the demo's 4 + 16 units
    tokenizer = load_tokenizer(directory / "tokenizer")
    assert len(tokenizer) == demo_corpus.VOCAB_SIZE and tokenizer.eos_token == "<|endoftext|>"
    encoder = BulkEncoder(tokenizer)
    assert encoder.uses_tiktoken
    [text, *_] = corpus.read_unit(0)
    [ids] = encoder.encode([text])
    assert tokenizer.decode(ids) == text
    counts = pq.read_table(directory / "train.parquet").column("token_count").to_pylist()
    assert counts[0] == len(ids)


def test_the_order_is_that_of_hashes(directory):
    """The same on every machine with this Python, and mixed: validation is a fair sample."""
    texts = pq.read_table(directory / "train.parquet").column("text").to_pylist()
    hashes = [hashlib.sha256(text.encode()).digest() for text in texts]
    assert hashes == sorted(hashes)


def test_its_name_opens_it(few_documents, tmp_path, monkeypatch, caplog):
    """With the identity that checkpoints hold: that of a directory, without a config."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    corpus = open_corpus("python-docs", config="of another dataset")
    [directory] = (tmp_path / "gpt2repro").glob("python-docs-3.*")
    assert corpus.identity == open_corpus(directory).identity
    assert corpus.identity["dataset"] == "local files" and corpus.identity["config"] is None
    theirs = load_tokenizer(directory / "tokenizer")
    assert load_tokenizer("python-docs").get_vocab() == theirs.get_vocab()
    assert not caplog.text, "its tokenizer is no data that was left out"


@pytest.fixture
def few_documents(monkeypatch):
    documents = [
        (f"lib.py#{n}", f"Document number {n} of a very small library.") for n in range(50)
    ]
    monkeypatch.setattr(demo_corpus, "_read_documents", lambda: iter(documents))
    return documents


def test_what_is_there_is_not_made_again(few_documents, tmp_path, monkeypatch):
    made = demo_corpus.prepare(tmp_path / "demo")
    monkeypatch.setattr(demo_corpus, "_read_documents", lambda: pytest.fail("made again"))
    assert demo_corpus.prepare(tmp_path / "demo") == made
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_an_interrupted_making_leaves_nothing(few_documents, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(demo_corpus, "_write_parquet", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            demo_corpus.prepare(tmp_path / "demo")
    assert not list(tmp_path.iterdir())
    assert (demo_corpus.prepare(tmp_path / "demo") / "train.parquet").exists()


def test_a_faster_process_wins(few_documents, tmp_path, monkeypatch):
    """Two launches at once: the second finds the first one's result when it wants to rename.

    Which stays where it is, as somebody may read it.
    """
    write_parquet, theirs = demo_corpus._write_parquet, []

    def overtaken(*arguments) -> None:
        write_parquet(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(demo_corpus, "_write_parquet", write_parquet)
            theirs.append(demo_corpus.prepare(tmp_path / "demo").stat().st_ino)

    monkeypatch.setattr(demo_corpus, "_write_parquet", overtaken)
    made = demo_corpus.prepare(tmp_path / "demo")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert theirs == [made.stat().st_ino]
    assert len(pq.read_table(made / "train.parquet")) == 50


def test_a_cache_that_cannot_be_written_is_named(tmp_path, few_documents):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        demo_corpus.prepare(tmp_path / "file" / "demo")


@pytest.mark.parametrize("name", ["train.parquet", "tokenizer/tokenizer.json", demo_corpus.SUMS])
@pytest.mark.parametrize("damage", ["emptied", "cut", "flipped", "gone"])
def test_what_is_not_whole_is_made_again(few_documents, tmp_path, name, damage):
    """After a loss of power, say: it is not torn for ever."""
    made = demo_corpus.prepare(tmp_path / "demo")
    good = {file: file.read_bytes() for file in made.rglob("*") if file.is_file()}
    content = good[made / name]
    if damage == "gone":
        (made / name).unlink()
    else:
        flipped = content[:70] + bytes([content[70] ^ 1]) + content[71:]
        (made / name).write_bytes({"emptied": b"", "cut": content[:-9], "flipped": flipped}[damage])
    assert demo_corpus.prepare(tmp_path / "demo") == made
    assert {file: file.read_bytes() for file in made.rglob("*") if file.is_file()} == good
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_it_is_on_the_disk_before_it_has_its_name(few_documents, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(atomic, "flush", lambda path: flushed.append((path.name, place.exists())))
    place = tmp_path / "demo"
    demo_corpus.prepare(place)
    before = {name for name, named in flushed if not named}
    assert {"train.parquet", "tokenizer.json", "tokenizer", demo_corpus.SUMS, "demo"} <= before
    assert (tmp_path.name, True) in flushed


def test_without_a_home_it_asks_for_a_place(few_documents, monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="XDG_CACHE_HOME names another place"):
        demo_corpus.prepare()
