"""Held-out rows: the first units, in dataset order."""

import numpy as np
import pytest
from tiny_corpus import ByteEncoder, MemoryCorpus
from tiny_streams import TEXTS, corpus

from gpt2repro import UserError
from gpt2repro.data.rows.held_out import validation_set


def test_validation_set_is_the_first_units_in_order():
    held_out = validation_set(corpus(), ByteEncoder(), sequence_length=32, num_units=3)
    expected = [token for text in TEXTS[:30] for token in (256, *text.encode())]
    num_rows = (len(expected) - 1) // 32
    theirs = [expected[32 * i : 32 * i + 33] for i in range(num_rows)]
    assert held_out.rows.tolist() == theirs
    # A byte a token, but for ends of text; those of the first token of all are not predicted.
    assert held_out.num_bytes.tolist() == [32 - row[1:].count(256) for row in theirs]
    assert held_out.rows.dtype == ByteEncoder.dtype, "a training set's worth takes 2 bytes a token"


def test_validation_reading_stops_at_max_tokens():
    source = corpus()
    held_out = validation_set(
        source, ByteEncoder(), sequence_length=32, num_units=20, max_tokens=200
    )
    whole = validation_set(corpus(), ByteEncoder(), sequence_length=32, num_units=20)
    assert held_out.rows.shape == (200 // 32, 33)
    assert (held_out.rows == whole.rows[:6]).all()
    assert source.reads == [0]
    assert (held_out.num_bytes == whole.num_bytes[:6]).all(), "of the rows, not of what was read"


class Halved(ByteEncoder):
    """A tokenizer that drops every other byte, as one may that normalizes text."""

    def encode(self, texts):
        return [ids[::2] for ids in super().encode(texts)]


def test_bytes_are_those_of_the_text_also_where_a_tokenizer_drops_some():
    units = MemoryCorpus([["ab" * 8], ["cd" * 8]])
    held_out = validation_set(units, Halved(), sequence_length=3, num_units=2)
    # <end> aaa aaa aa | <end> ccc ccc cc: 8 tokens for 16 bytes
    assert held_out.rows[:, 1:].tolist()[2] == [97, 97, 256]
    assert held_out.num_bytes.tolist() == [6, 6, 4, 6, 6]


def test_rows_of_empty_documents_alone_are_refused():
    """Whatever text comes after them; and whatever is too short for a row is not empty."""
    texts = MemoryCorpus([[""] * 15, ["abc"]])
    how = {"sequence_length": 8, "num_units": 2}
    with pytest.raises(UserError, match="text_column: the validation rows hold no text"):
        validation_set(texts, ByteEncoder(), max_tokens=8, **how)
    with pytest.raises(UserError, match="do not fill one row"):
        validation_set(MemoryCorpus([["a"], ["b"]]), ByteEncoder(), **how)
    assert validation_set(texts, ByteEncoder(), **how).num_bytes.tolist() == [0, 1]  # its a


class Unknowing(ByteEncoder):
    """All that it knows is that there is a word."""

    bytes_of_ids = np.zeros(257, int)


def test_bytes_of_words_that_no_token_spells_are_shared_out():
    held_out = validation_set(
        MemoryCorpus([["abcd"], ["ef"]]), Unknowing(), sequence_length=3, num_units=2
    )
    assert held_out.num_bytes.tolist() == [3, 2]  # abc; d, <end>, e


def rows_of(*texts: str, **how) -> list[list[int]]:
    """Rows of all of a corpus of one text a unit."""
    units = MemoryCorpus([[text] for text in texts])
    return validation_set(units, ByteEncoder(), num_units=len(texts), **how).rows.tolist()


@pytest.mark.parametrize("max_tokens", [None, 8, 9, 2**22])
def test_rows_that_fit_exactly(max_tokens):
    """Of two documents that are nine tokens together, the last is only predicted."""
    texts = ("abc", "defg")
    flat = [256, *b"abc", 256, *b"defg"]
    assert rows_of(*texts, sequence_length=8, max_tokens=max_tokens) == [flat]
    assert rows_of(*texts, sequence_length=4, max_tokens=max_tokens) == [flat[:5], flat[4:]]
    assert len(rows_of(*texts, sequence_length=1, max_tokens=max_tokens)) == 8
    with pytest.raises(UserError, match="the 9 validation tokens do not fill one row of 9"):
        rows_of(*texts, sequence_length=9, max_tokens=max_tokens)


@pytest.mark.parametrize("max_tokens", range(1, 8))
def test_as_many_tokens_are_predicted_as_were_asked_for(max_tokens):
    """Wherever that is in a document: one token more is read."""
    flat = [256, *b"ab", 256, *b"c", 256, *b"def"]
    rows = rows_of("ab", "c", "def", sequence_length=1, max_tokens=max_tokens)
    assert rows == [flat[i : i + 2] for i in range(max_tokens)]


def test_one_letter_is_text():
    assert rows_of("a", sequence_length=1) == [[256, ord("a")]]


def test_validation_tokens_are_kept_where_the_training_ones_are(tmp_path):
    how = {"sequence_length": 32, "num_units": 2, "token_cache_dir": tmp_path}
    first, again = corpus(), corpus()
    rows = validation_set(first, ByteEncoder(), **how).rows
    assert (validation_set(again, ByteEncoder(), **how).rows == rows).all()
    assert (sorted(first.reads), again.reads) == ([0, 1], [])  # by two threads


@pytest.mark.parametrize(
    ("num_units", "named"),
    [(31, "31 of the dataset's 30"), (0, "0 of"), (1, "do not fill one row")],
)
def test_an_impossible_validation_set_is_refused(num_units, named):
    with pytest.raises(UserError, match=f"num_validation_units: .*{named}"):
        validation_set(corpus(), ByteEncoder(), sequence_length=10_000, num_units=num_units)
