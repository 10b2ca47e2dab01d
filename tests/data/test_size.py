"""How much text there is, from a sample; how much of it is held out."""

import numpy as np
import pytest
from tiny_corpus import ByteEncoder, MemoryCorpus, documents, in_units, write_parquet

from gpt2repro.data.corpora import size
from gpt2repro.data.corpora.size import (
    estimate_tokens,
    in_words,
    tokens_per_byte,
    units_to_hold_out,
)
from gpt2repro.data.opening import open_corpus


class Sized(MemoryCorpus):
    """A unit is stored in as many bytes as it has tokens of bytes, of which a rate is 1."""

    def __init__(self, units: list[list[str]]) -> None:
        super().__init__(units)
        self.num_bytes = np.array([sum(len(t.encode()) + 1 for t in texts) for texts in units])


TEXTS = documents(2000)
SIZED = Sized(in_units(TEXTS, 20))


def test_tokens_are_estimated_from_a_sample(tmp_path, monkeypatch):
    assert tokens_per_byte(SIZED, ByteEncoder()) == 1
    write_parquet(tmp_path / "0.parquet", TEXTS, rows_per_group=20)
    corpus = open_corpus(tmp_path)
    true = sum(len(text) + 1 for text in TEXTS)
    for characters in (10**6, 3000):  # the whole of eight units; a part of one
        monkeypatch.setattr(size, "SAMPLE_CHARACTERS", characters)
        rate = tokens_per_byte(corpus, ByteEncoder())
        assert estimate_tokens(corpus, range(100), rate) == pytest.approx(true, rel=0.1)
    assert estimate_tokens(corpus, range(0), rate) == 0


def test_the_sample_is_small(monkeypatch):
    """However large its units and texts are, or however many."""
    monkeypatch.setattr(size, "SAMPLE_CHARACTERS", 1000)
    corpus, encoded = Sized([["é" * 10**6, "b" * 10**6]] * 30), []
    monkeypatch.setattr(ByteEncoder, "encode", lambda self, texts: encoded.extend(texts) or texts)
    tokens_per_byte(corpus, ByteEncoder())
    assert encoded == ["é" * 1000] and corpus.reads == [0]
    corpus = Sized([["a"]] * 30)
    tokens_per_byte(corpus, ByteEncoder())
    assert corpus.reads == [0, 4, 8, 12, 16, 20, 24, 28]


@pytest.mark.parametrize(("num_tokens", "num_units"), [(1, 1), (700, 1), (5000, 3), (10**9, 10)])
def test_what_is_held_out_is_enough_and_at_most_a_tenth(num_tokens, num_units):
    assert units_to_hold_out(SIZED, num_tokens, 1.0) == num_units
    fewer, as_many = (estimate_tokens(SIZED, range(num_units - less), 1.0) for less in (1, 0))
    assert fewer < num_tokens and (num_tokens <= as_many or num_units == 10)
    assert units_to_hold_out(Sized(in_units(TEXTS, 1000)), num_tokens, 1.0) == 1


def test_where_a_dataset_tells_no_sizes_one_unit_is_held_out():
    corpus = MemoryCorpus(in_units(TEXTS, 20))
    assert tokens_per_byte(corpus, ByteEncoder()) is None and corpus.reads == []
    assert estimate_tokens(corpus, range(9), 1.0) is None
    assert units_to_hold_out(corpus, 10**9, None) == 1


def test_sizes_in_words(monkeypatch):
    assert in_words(SIZED, range(2), 118_313) == "40 documents, about 120,000 tokens"
    assert in_words(SIZED, range(100), 1_234_567) == "2,000 documents, about 1.2 M tokens"
    assert in_words(SIZED, range(1), None) == "20 documents"
    assert in_words(SIZED, range(0), 0) == "nothing"
    monkeypatch.setattr(SIZED, "num_documents", None)
    assert in_words(SIZED, range(3), None) == "3 units"
