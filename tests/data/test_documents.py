"""Counting an epoch's tokens, shared by the processes."""

from tiny_corpus import ByteEncoder
from tiny_streams import TEXTS, corpus

from gpt2repro.data.rows.documents import count_epoch_tokens


def test_count_epoch_tokens_adds_up_over_processes():
    calls = []
    expected = sum(len(text) + 1 for text in TEXTS[20:])
    options = {"num_validation_units": 2}
    whole = count_epoch_tokens(corpus(), ByteEncoder(), **options, on_unit=calls.append)
    parts = [
        count_epoch_tokens(corpus(), ByteEncoder(), **options, rank=rank, world_size=3)
        for rank in range(3)
    ]
    assert whole == sum(parts) == expected
    assert calls == [1] * 28
