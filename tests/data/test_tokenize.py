"""Shards that `tokenize` writes: what they hold, going on after a stop, what is refused."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_corpus import ByteEncoder, MemoryCorpus, documents, in_units, refusal
from tiny_shards import tokens_of, write_bin
from tiny_streams import run, stream_of

from gpt2repro import UserError
from gpt2repro.data.corpora import shards
from gpt2repro.data.corpora.manifest import read_manifest
from gpt2repro.data.opening import open_corpus
from gpt2repro.data.rows.held_out import validation_set
from gpt2repro.data.tokenize import begin, write_shards

TEXTS = [*documents(200, max_words=20), "", "<200> é", "", *documents(40, seed=1), ""]
T = 8
ORDERED = {"sequence_length": T, "rows_per_step": 4, "num_lanes": 4, "seed": 3}


def tokenize(directory: Path, corpus=None, encoder=None, on_unit=lambda _: None, **options):
    """Units of ten documents, three of them held out."""
    directory.mkdir(exist_ok=True)
    corpus, encoder = corpus or MemoryCorpus(in_units(TEXTS, 10)), encoder or ByteEncoder()
    given = {"num_validation_units": 3, "format": "bin", "shard_tokens": 2500} | options
    manifest = begin(directory, corpus, encoder, **given)
    write_shards(directory, manifest, corpus, encoder, num_threads=2, on_unit=on_unit)
    return manifest


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def parts(tokens: np.ndarray) -> list[np.ndarray]:
    return [tokens[begin : begin + 2500] for begin in range(0, len(tokens), 2500)]


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
@pytest.mark.parametrize("held_out", [3, 0])
def test_shards_are_the_documents_in_order(tmp_path, suffix, held_out):
    """Byte by byte as NumPy's `save` and llm.c's `write_datafile` write them."""
    options = {"format": suffix[1:], "num_validation_units": held_out}
    manifest = tokenize(tmp_path / "ours", **options)
    held, trained = tokens_of(["", *TEXTS[: 10 * held_out]])[1:], TEXTS[10 * held_out :]
    expected = {f"tokens_val_000000{suffix}": held} if held_out else {}
    for number, part in enumerate(parts(tokens_of(trained)), 1):
        expected[f"tokens_train_{number:06d}{suffix}"] = part
    (tmp_path / "theirs").mkdir()
    for name, part in expected.items():
        path = tmp_path / "theirs" / name
        np.save(path, part) if suffix == ".npy" else write_bin(path, part)
    ours, theirs = content(tmp_path / "ours"), content(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() | {"manifest.json"} and len(theirs) > 3
    for shard in manifest.shards:
        assert ours[shard.name] == theirs[shard.name]
        assert shard.blake2b == hashlib.blake2b(ours[shard.name], digest_size=16).hexdigest()
        assert shard.tokens == len(expected[shard.name])
    assert manifest == read_manifest(tmp_path / "ours") and manifest.complete


def test_the_first_shard_to_train_on_is_number_one(tmp_path):
    """Also where the units to be held out have no documents."""
    manifest = tokenize(tmp_path, MemoryCorpus([[], ["abc"]]), num_validation_units=1)
    assert [shard.name for shard in manifest.shards] == ["tokens_train_000001.bin"]


def test_wide_ids(tmp_path):
    class WideEncoder(ByteEncoder):
        dtype = np.dtype(np.uint32)

    tokenize(tmp_path, encoder=WideEncoder(), format="npy")
    ids = np.load(tmp_path / "tokens_train_000001.npy")
    assert ids.dtype == np.uint32 and ids.tolist() == tokens_of(TEXTS[30:])[:2500].tolist()
    assert open_corpus(tmp_path).read_tokens(1, WideEncoder())[0].dtype == np.uint32
    with pytest.raises(UserError, match="--format: bin has ids of 16 bits"):
        tokenize(tmp_path, encoder=WideEncoder())


def test_rows_in_file_order_are_the_documents_in_dataset_order(tmp_path):
    tokenize(tmp_path)
    corpus, expected = open_corpus(tmp_path), []
    for part in parts(tokens_of(TEXTS[30:])):
        for first in range(0, len(part) - 4 * T, 4 * T):  # turns of 4 rows that are whole
            expected.append({tuple(part[at : at + T + 1]) for at in range(first, first + 4 * T, T)})
    options = ORDERED | {"num_validation_units": corpus.num_held_out_units}
    ordered, shuffled = (
        run([stream_of(corpus, ByteEncoder(), **options, order=order)], len(expected))[1]
        for order in ("file", "shuffled")
    )
    assert ordered == expected != shuffled


def test_a_document_longer_than_shards_is_read_whole(tmp_path, monkeypatch):
    """A shard within it has no end-of-text token; shards of others would be refused for that."""
    monkeypatch.setattr(shards, "UNIT_TOKENS", 1000)
    texts = ["a", "b" * 7000, "c"]
    tokenize(tmp_path, MemoryCorpus([texts]), num_validation_units=0)
    corpus = open_corpus(tmp_path)
    units = [corpus.read_tokens(n, ByteEncoder())[0] for n in range(corpus.num_units)]
    assert bytes(np.concatenate(units).astype(np.uint8)).decode() == "".join(texts)


def test_a_stop_anywhere_loses_the_shard_in_work(tmp_path):
    tokenize(tmp_path / "at once")
    expected = content(tmp_path / "at once")
    for last in (0, 2, 3, 11, 24):  # units that are written
        directory, done, corpus = tmp_path / str(last), [], MemoryCorpus(in_units(TEXTS, 10))

        def on_unit(_, last=last, done=done, corpus=corpus) -> None:
            if len(done) == last:
                raise KeyboardInterrupt
            done.append(1)
            assert len(corpus.reads) <= len(done) + 4  # ahead: two threads, twice

        with pytest.raises(KeyboardInterrupt):
            tokenize(directory, corpus, on_unit=on_unit)
        manifest = read_manifest(directory)
        files = {shard.name: (directory / shard.name).stat() for shard in manifest.shards}
        assert content(directory).keys() == files.keys() | {"manifest.json"}
        assert not manifest.complete
        assert last <= 3 or len(tokens_of(TEXTS[: 10 * last])) - manifest.num_tokens <= 2500
        tokenize(directory)
        assert content(directory) == expected
        for name, before in files.items():  # not written again
            assert (directory / name).stat().st_ino == before.st_ino


KILLED = """
import os, sys
from pathlib import Path
from test_tokenize import tokenize
units = iter(range(1, 12))
tokenize(Path(sys.argv[1]), on_unit=lambda _: next(units, None) or os.kill(os.getpid(), 9))
"""


def test_killed_while_it_writes(tmp_path):
    tokenize(tmp_path / "at once")
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == -signal.SIGKILL
    left = content(tmp_path / "killed")
    assert "tokens_train_000001.bin" in left and any(name.startswith(".tokens_") for name in left)
    assert "are not complete: go on with gpt2repro tokenize" in refusal(tmp_path / "killed")

    tokenize(tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "at once")


@pytest.mark.parametrize("name", ["tokens_val_000000.bin", "tokens_train_000002.bin"])
def test_a_copy_that_is_not_whole_is_refused(tmp_path, name):
    """Nothing else would miss the rest of the text, or what is held out."""
    tokenize(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    assert f"do not agree: {name} is in one of them" in refusal(tmp_path)
    (tmp_path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"do not agree: {name} is another file" in refusal(tmp_path)
    (tmp_path / name).write_bytes(content)
    for more in ("more.BIN", "more.bin"):
        (tmp_path / more).write_bytes(content)
        assert f"do not agree: {more} is in one of them" in refusal(tmp_path)
        (tmp_path / more).unlink()
    (tmp_path / "manifest.json").unlink()
    assert open_corpus(tmp_path).num_units


class OtherEncoder(ByteEncoder):
    fingerprint = "other bytes"


def test_shards_of_something_else_are_not_gone_on_with(tmp_path):
    tokenize(tmp_path)
    before, other = content(tmp_path), MemoryCorpus(in_units(TEXTS, 10))
    other.identity["revision"] = "c0ffee"
    for options, said in (
        ({"encoder": OtherEncoder()}, "another tokenizer_name's fingerprint: 'bytes', now 'other"),
        ({"format": "npy"}, "another format: 'bin', now 'npy'"),
        ({"shard_tokens": 3000}, "another shard_tokens: 2500, now 3000"),
        ({"num_validation_units": 2}, "another num_validation_units: 3, now 2"),
        ({"corpus": other}, "another dataset_revision: None, now 'c0ffee'"),
    ):
        with pytest.raises(UserError, match=said):
            tokenize(tmp_path, **options)
    assert content(tmp_path) == before


def test_files_that_are_not_those_of_the_manifest_are_refused(tmp_path):
    def refused(said: str) -> None:
        with pytest.raises(UserError, match=said):
            tokenize(tmp_path)

    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    refused("manifest.json is none of ours: give an empty directory")
    (tmp_path / "manifest.json").rename(tmp_path / "a.bin")
    refused("a.bin is none of ours")
    (tmp_path / "a.bin").unlink()
    tokenize(tmp_path)
    with pytest.raises(UserError, match="dataset_name: it holds token ids already"):
        tokenize(tmp_path / "again", open_corpus(tmp_path))
    shard = tmp_path / "tokens_train_000002.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"zz")
    refused("000002.bin is gone or not the file that manifest.json lists")
    shard.unlink()
    refused("000002.bin is gone or not the file that manifest.json lists")
    (tmp_path / "manifest.json").write_text('{"written_by": "gpt2repro tokenize"}')
    refused("manifest.json is damaged: ValidationError")
    assert "manifest.json is damaged: ValidationError" in refusal(tmp_path)


def test_another_tokenizer_is_refused_in_every_order(tmp_path):
    tokenize(tmp_path)
    corpus, said = open_corpus(tmp_path), "tokenizer_name: the shards were written with another"
    assert corpus.identity["encoded_by"] == "bytes"
    for order in ("shuffled", "file"):
        with pytest.raises(UserError, match=said):
            stream_of(corpus, OtherEncoder(), **ORDERED, num_validation_units=1, order=order)
    with pytest.raises(UserError, match=said):
        validation_set(corpus, OtherEncoder(), sequence_length=T, num_units=1)
