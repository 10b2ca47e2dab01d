"""Tokenized units on disk: they serve the same rows, and no fault of theirs costs a run."""

import os
import re
import time

import numpy as np
import pytest
from tiny_corpus import ByteEncoder, MemoryCorpus, in_units
from tiny_streams import OPTIONS, TEXTS, corpus, run, stream_of, streams

from gpt2repro import UserError


def test_the_cache_serves_the_same_rows_without_reading(tmp_path):
    theirs = run(streams(), 300)[0]
    first = corpus()
    assert run(streams(source=first, token_cache_dir=tmp_path), 300)[0] == theirs
    assert sorted(set(first.reads)) == list(range(2, 30))
    second = corpus()
    assert run(streams(2, source=second, token_cache_dir=tmp_path), 300)[0] == theirs
    assert second.reads == []
    assert not list(tmp_path.rglob(".*"))  # no partial files


def test_what_killed_writers_left_is_removed_when_it_is_old(tmp_path):
    run(streams(token_cache_dir=tmp_path), 3)
    entry = next(tmp_path.rglob("*.tokens"))
    old, new = (entry.with_name(f".{entry.name}.{n}.0123abc") for n in (1, 2))
    for left in (old, new):
        left.write_bytes(b"half")
    os.utime(old, (time.time() - 10**6,) * 2)
    run(streams(token_cache_dir=tmp_path), 3)
    assert not old.exists() and new.exists(), "a writer may still be at work"


def test_a_unit_without_documents_is_kept_too(tmp_path):
    first, second = (MemoryCorpus([["one two"] * 9, [], ["three"] * 9]) for _ in range(2))
    options = {"token_cache_dir": tmp_path, "num_lanes": 1, "num_validation_units": 0}
    ours = run(streams(source=first, **options), 4)[0]
    assert sorted(set(first.reads)) == [0, 1, 2]
    assert run(streams(source=second, **options), 4)[0] == ours
    assert second.reads == []


def test_a_corrupt_cache_entry_is_read_again(tmp_path, caplog):
    run(streams(token_cache_dir=tmp_path), 100)
    entries = sorted(tmp_path.rglob("*.tokens"))
    entries[0].write_bytes(entries[0].read_bytes()[:-1] + b"?")
    entries[1].write_bytes(b"")
    entries[2].write_bytes(entries[2].read_bytes()[:100])
    again = corpus()
    assert run(streams(source=again, token_cache_dir=tmp_path), 100)[0] == run(streams(), 100)[0]
    assert sorted(set(again.reads)) == [int(entry.stem) for entry in entries[:3]]
    assert len(re.findall("is corrupt", caplog.text)) == 3
    last = corpus()
    run(streams(source=last, token_cache_dir=tmp_path), 100)
    assert last.reads == []


def test_a_unit_that_lanes_share_is_read_once():
    source = MemoryCorpus([["held out"], [f"text {n}" for n in range(64)]])
    stream = stream_of(source, ByteEncoder(), **OPTIONS | {"num_validation_units": 1})
    next(stream)
    stream.close()
    assert source.reads == [1]


def test_another_tokenizer_or_revision_never_meets_an_old_entry(tmp_path):
    run(streams(token_cache_dir=tmp_path), 3)
    other = MemoryCorpus(in_units(TEXTS, 10), "other")
    run(streams(source=other, token_cache_dir=tmp_path), 3)
    assert other.reads
    encoder = ByteEncoder()
    encoder.fingerprint = "else"
    third = corpus()
    next(stream := stream_of(third, encoder, **OPTIONS, token_cache_dir=tmp_path))
    stream.close()
    assert third.reads


def test_a_full_disk_costs_the_cache_not_the_run(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    assert run(streams(token_cache_dir=tmp_path), 50)[0] == run(streams(), 50)[0]
    assert caplog.text.count("No space left") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cache_directory_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="token_cache_dir"):
        [stream] = streams(token_cache_dir=tmp_path / "file")
        next(stream)


def test_large_vocabularies_keep_their_ids(tmp_path):
    class WideEncoder(ByteEncoder):
        eot_id = 99_999
        dtype = np.dtype(np.uint32)

        def encode(self, texts):
            return [ids + 70_000 for ids in super().encode(texts)]

    ours = stream_of(corpus(), WideEncoder(), **OPTIONS, token_cache_dir=tmp_path)
    [theirs] = streams()
    expected = next(theirs).tokens + 70_000
    expected[expected == 70_256] = 99_999
    assert (next(ours).tokens == expected).all()
    ours.close()
    theirs.close()
