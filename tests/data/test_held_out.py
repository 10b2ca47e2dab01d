"""Held-out rows: the first units, in dataset order."""

import pytest
from tiny_corpus import ByteEncoder
from tiny_streams import TEXTS, corpus

from gpt2repro import UserError
from gpt2repro.data.held_out import validation_set


def test_validation_set_is_the_first_units_in_order():
    held_out = validation_set(corpus(), ByteEncoder(), sequence_length=32, num_units=3)
    expected = [token for text in TEXTS[:30] for token in (256, *text.encode())]
    num_rows = (len(expected) - 1) // 32
    theirs = [expected[32 * i : 32 * i + 33] for i in range(num_rows)]
    assert held_out.rows.tolist() == theirs
    assert held_out.num_tokens == len(expected)
    assert held_out.num_bytes == len("".join(TEXTS[:30]))


def test_validation_reading_stops_at_max_tokens():
    source = corpus()
    held_out = validation_set(
        source, ByteEncoder(), sequence_length=32, num_units=20, max_tokens=200
    )
    whole = validation_set(corpus(), ByteEncoder(), sequence_length=32, num_units=20)
    assert held_out.rows.shape == (200 // 32, 33)
    assert (held_out.rows == whole.rows[:6]).all()
    assert source.reads == [0]
    assert held_out.num_tokens > 200  # of what was encoded, as are its bytes


@pytest.mark.parametrize(
    ("num_units", "named"),
    [(31, "31 of the dataset's 30"), (0, "0 of"), (1, "do not fill one row")],
)
def test_an_impossible_validation_set_is_refused(num_units, named):
    with pytest.raises(UserError, match=f"num_validation_units: .*{named}"):
        validation_set(corpus(), ByteEncoder(), sequence_length=10_000, num_units=num_units)
