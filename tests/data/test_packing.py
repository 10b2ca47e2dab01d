"""Lanes of documents cut into rows: every document once an epoch, whatever it holds."""

import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from tiny_corpus import ByteEncoder, MemoryCorpus, in_units, read_back
from tiny_streams import OPTIONS, TEXTS, corpus, run, streams

from gpt2repro.data.rows.held_out import validation_set
from gpt2repro.data.rows.order import Plan, Position
from gpt2repro.data.rows.packing import LaneDocuments
from gpt2repro.data.rows.units import UnitReader


@pytest.mark.parametrize("documents_per_unit", [10, 60, 148])
def test_an_epoch_has_every_training_document_exactly_once(documents_per_unit):
    """Also where 5 or 3 units are cut into ranges for 8 lanes (the last unit is a stub)."""
    source = corpus(documents_per_unit=documents_per_unit)
    num_validation = 1
    plan = Plan(source.num_units, num_lanes=8, num_validation_units=num_validation, seed=3)
    reader = UnitReader(source, ByteEncoder())
    seen = [Counter(), Counter()]
    for lane in range(8):
        lane_documents = LaneDocuments(plan, reader, ByteEncoder(), lane, Position(0, 0, 0, 0))
        for segment in lane_documents:
            if segment.position.epoch == 2:
                break
            seen[segment.position.epoch].update(read_back(segment.tokens))
    reader.close()
    trained_on = TEXTS[num_validation * documents_per_unit :]
    assert seen[0] == seen[1] == Counter(trained_on)
    held_out = validation_set(source, ByteEncoder(), sequence_length=32, num_units=num_validation)
    flat = np.concatenate([held_out.rows[:, :-1].ravel(), held_out.rows[-1, -1:]])
    validation = read_back(flat)
    assert validation[:-1] == TEXTS[: len(validation) - 1]  # dataset order, never shuffled
    assert len(validation) == documents_per_unit
    assert not set(validation[:-1]) & set(trained_on)


def test_the_next_unit_is_read_when_half_of_this_one_is_used_up():
    source = MemoryCorpus([["held out"], *[["text"] * 32] * 5])
    plan = Plan(source.num_units, num_lanes=1, num_validation_units=1, seed=0)
    reader = UnitReader(source, ByteEncoder())
    lane = LaneDocuments(plan, reader, ByteEncoder(), 0, Position(0, 0, 0, 0))
    segments = iter(lane)
    for _ in range(16):
        next(segments)
    time.sleep(0.1)
    assert len(source.reads) == 1, "not sooner either: lanes are many, and each holds its units"
    next(segments)
    deadline = time.monotonic() + 10
    while len(source.reads) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    reader.close()
    assert len(source.reads) == 2


def test_units_without_documents_are_passed_over():
    """However many there are in all, and dozens in a row: a lane ends only where all are empty."""
    source = MemoryCorpus([["held out"], *[[]] * 45, ["the only one"]])
    plan = Plan(source.num_units, num_lanes=1, num_validation_units=1, seed=0)
    reader = UnitReader(source, ByteEncoder())
    lane = LaneDocuments(plan, reader, ByteEncoder(), 0, Position(0, 0, 0, 0))
    segments = [*islice(lane, 12)]
    reader.close()
    assert [segment.position.epoch for segment in segments] == [*range(12)]
    assert {read_back(segment.tokens)[0] for segment in segments} == {"the only one"}


def test_any_document_is_carried():
    odd = ["", None, "\0\0 NUL \0", "naïve 中文 😀", "x" * 50_000, " ", "\n" * 99, "plain"] * 8
    source = MemoryCorpus(in_units(["held out " * 9, *odd], 1))
    expected = Counter((text or "").encode() for text in odd)
    plan = Plan(source.num_units, num_lanes=2, num_validation_units=1, seed=0)
    reader = UnitReader(source, ByteEncoder())
    seen: Counter = Counter()
    for lane in range(2):
        for segment in LaneDocuments(plan, reader, ByteEncoder(), lane, Position(0, 0, 0, 0)):
            if segment.position.epoch:
                break
            assert segment.tokens[0] == 256
            assert segment.tokens.dtype == ByteEncoder.dtype, "two bytes a token, not eight"
            seen[bytes(segment.tokens[1:].astype(np.uint8))] += 1
    reader.close()
    assert seen == expected
    options = OPTIONS | {"num_validation_units": 1, "rows_per_step": 8, "num_lanes": 4}
    digests, _, state = run(streams(source=source, **options), 60)
    head, _, state = run(streams(2, source=source, **options), 23)
    assert head + run(streams(4, state, source=source, **options), 37)[0] == digests
