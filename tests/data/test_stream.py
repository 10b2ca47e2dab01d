"""The stream's contract: the same rows on any number of processes, resumed at exactly the next."""

import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_corpus import ByteEncoder, MemoryCorpus, documents, in_units, read_back

from gpt2repro import UserError
from gpt2repro.data.stream import (
    LaneDocuments,
    Plan,
    Position,
    TokenStream,
    count_epoch_tokens,
    permutation,
    rows_digest,
    validation_set,
)
from gpt2repro.data.units import UnitReader

TEXTS = documents(300)
OPTIONS = {
    "sequence_length": 32,
    "rows_per_step": 16,
    "num_lanes": 8,
    "num_validation_units": 2,
    "seed": 7,
}


def corpus(texts=TEXTS, documents_per_unit=10) -> MemoryCorpus:
    return MemoryCorpus(in_units(texts, documents_per_unit))


def streams(world_size=1, state=None, source=None, **options) -> list[TokenStream]:
    """The streams of all ranks of a world."""
    source = source or corpus()
    ranks = [
        TokenStream(source, ByteEncoder(), **OPTIONS | options, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for stream in ranks:
        if state:
            stream.load_state_dict(state)
    return ranks


def run(ranks: list[TokenStream], num_steps: int) -> tuple[list[int], list[set], dict]:
    """Per step the digest and the set of rows over all ranks; the state after the last step."""
    digests, rows, lanes = [], [], {}
    for _ in range(num_steps):
        steps = [next(stream) for stream in ranks]
        digests.append(sum(step.digest for step in steps) % 2**64)
        rows.append({tuple(row) for step in steps for row in step.tokens.tolist()})
        for step in steps:
            lanes |= step.lanes
    state = ranks[0].state_dict(lanes)
    for stream in ranks:
        stream.close()
    return digests, rows, json.loads(json.dumps(state))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_reader_threads", [1, 5])
def test_rows_of_a_step_do_not_depend_on_processes_or_threads(world_size, num_reader_threads):
    theirs = run(streams(), 20)
    ours = run(streams(world_size, num_reader_threads=num_reader_threads), 20)
    assert ours == theirs
    assert len(theirs[1][0]) == OPTIONS["rows_per_step"]


def test_digest_adds_up_over_any_micro_batches():
    [stream] = streams()
    step = next(stream)
    stream.close()
    assert step.tokens.shape == (16, 33) and step.tokens.dtype == torch.int64
    for micro_batch in (1, 2, 4, 8, 16):
        parts = [rows_digest(part.numpy()) for part in step.tokens.split(micro_batch)]
        assert sum(parts) % 2**64 == step.digest


def test_resume_at_every_step_twice_over_with_changed_worlds():
    digests, rows, _ = run(streams(), 44)
    for stop in range(1, 41):
        first, second = (1, 2, 4, 8)[stop % 4], (8, 1, 2, 4, 2)[stop % 5]
        head, head_rows, state = run(streams(first), stop)
        middle, middle_rows, state = run(streams(second, state), 2)
        tail, tail_rows, _ = run(streams(1, state), 2)
        assert head + middle + tail == digests[: stop + 4]
        assert head_rows + middle_rows + tail_rows == rows[: stop + 4]


def test_resume_past_the_end_of_an_epoch():
    digests, _, state = run(streams(), 300)
    assert min(epoch for epoch, *_ in state["lanes"]) >= 2
    head, _, state = run(streams(2), 250)
    tail, _, _ = run(streams(4, state), 50)
    assert head + tail == digests


def test_the_state_is_of_consumed_rows_not_of_prefetched_ones():
    [stream] = streams()
    step = next(stream)
    time.sleep(0.3)  # the producer is steps ahead by now
    state = stream.state_dict()
    expected = next(stream).digest
    stream.close()
    assert [tuple(lane) for lane in state["lanes"]] == list(step.lanes.values())
    assert run(streams(4, state), 1)[0] == [expected]


def test_lane_zero_equals_a_naive_recomputation():
    source = corpus()
    length, num_lanes = OPTIONS["sequence_length"], OPTIONS["num_lanes"]
    tokens: list[int] = []
    for epoch in range(3):
        units = permutation(28, "units", OPTIONS["seed"], epoch)[::num_lanes] + 2
        for unit in units:
            order = permutation(10, "documents", OPTIONS["seed"], epoch, unit, 0)
            for document in order:
                tokens += [256, *source.units[unit][document].encode()]
    [stream] = streams(source=source)
    rows = torch.cat([next(stream).tokens[:2] for _ in range(50)]).tolist()  # lane 0 comes first
    stream.close()
    assert rows == [tokens[length * i : length * i + length + 1] for i in range(100)]


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


def test_rows_join_up_into_whole_documents():
    [stream] = streams(rows_per_step=8, num_lanes=1)
    rows = torch.cat([next(stream).tokens for _ in range(40)]).numpy()
    stream.close()
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    texts = read_back(np.concatenate([rows[:, :-1].ravel(), rows[-1, -1:]]))
    assert set(texts[:-1]) <= set(TEXTS[20:])


def test_permutations_are_fixed_for_ever():
    """Literal values: were they to change, no checkpoint would resume on its rows."""
    assert permutation(10, "units", 1, 0).tolist() == [4, 9, 5, 8, 1, 6, 3, 7, 0, 2]
    assert sorted(permutation(1000, "units", 1, 1)) == list(range(1000))
    assert permutation(0, "documents", 1, 0, 5, 0).tolist() == []


def test_the_stream_is_fixed_for_ever():
    texts = [f"document {number} " + "word " * (7 * number % 41) for number in range(300)]
    [stream] = streams(source=corpus(texts))
    digests = [next(stream).digest for _ in range(3)]
    stream.close()
    assert digests == [6898002224932357292, 3346672184704291190, 8943150677258474528]


def test_epochs_and_seeds_differ():
    first, again = permutation(100, "units", 1, 0), permutation(100, "units", 1, 1)
    other = permutation(100, "units", 2, 0)
    assert (first != again).any() and (first != other).any()
    assert run(streams(seed=8), 1)[0] != run(streams(seed=7), 1)[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sequence_length": 16}, "sequence_length was 32 .* is 16"),
        ({"rows_per_step": 32}, r"rows_per_step \(batch_tokens .* was 16 .* is 32"),
        ({"num_lanes": 4}, "num_lanes was 8 .* is 4"),
        ({"num_validation_units": 1}, "num_validation_units was 2 .* is 1"),
        ({"seed": 1}, "seed was 7 .* is 1"),
        (
            {"source": MemoryCorpus(in_units(TEXTS, 10), "other")},
            "dataset_name was 'memory' .* 'other'",
        ),
    ],
)
def test_resuming_another_stream_is_refused_by_the_field_that_differs(change, named):
    _, _, state = run(streams(), 1)
    with pytest.raises(UserError, match=named):
        streams(1, state, **change)


def test_another_tokenizer_is_refused():
    _, _, state = run(streams(), 1)
    encoder = ByteEncoder()
    encoder.fingerprint = "else"
    stream = TokenStream(corpus(), encoder, **OPTIONS)
    with pytest.raises(UserError, match="tokenizer_name's fingerprint was 'bytes'"):
        stream.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_lanes": 5}, r"num_lanes: 5 must .* these fit: 1, 2, 4, 8, 16$"),
        ({"num_lanes": 32}, "num_lanes: 32 must"),
        ({"num_lanes": 0}, "num_lanes: 0 must"),
        ({"num_lanes": 2, "world_size": 4}, r"4 processes .* these fit: 4, 8, 16$"),
        ({"world_size": 3}, "batch_tokens: 16 rows .* 3 processes"),
        ({"num_validation_units": 30}, "num_validation_units: 30 of the dataset's 30 units"),
        ({"rows_per_step": 512, "num_lanes": 512}, "num_lanes: 512 lanes .* 280 documents"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(options, named):
    with pytest.raises(UserError, match=named):
        TokenStream(corpus(), ByteEncoder(), **OPTIONS | options)


def test_lanes_without_documents_are_refused_and_do_not_spin():
    """Every document is in the validation unit, and no count says so beforehand."""
    source = MemoryCorpus([["a", "b"], []])
    source.num_documents = lambda unit: None
    options = OPTIONS | {"num_validation_units": 1}
    stream = TokenStream(source, ByteEncoder(), **options)
    with pytest.raises(UserError, match=r"num_lanes: lane \d finds no documents"):
        next(stream)
    stream.close()


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
            seen[bytes(segment.tokens[1:].astype(np.uint8))] += 1
    reader.close()
    assert seen == expected
    options = OPTIONS | {"num_validation_units": 1, "rows_per_step": 8, "num_lanes": 4}
    digests, _, state = run(streams(source=source, **options), 60)
    head, _, state = run(streams(2, source=source, **options), 23)
    assert head + run(streams(4, state, source=source, **options), 37)[0] == digests


def test_an_error_in_the_background_reaches_the_consumer_every_time():
    source = corpus()
    source.read_arrow = lambda unit: 1 / 0
    [stream] = streams(source=source)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            next(stream)
    stream.close()


def test_close_ends_the_threads_and_the_stream_can_go_on():
    before = threading.active_count()
    [stream] = streams()
    digests = [next(stream).digest for _ in range(3)]
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before
    digests += [next(stream).digest for _ in range(3)]
    stream.close()
    stream.close()
    assert digests == run(streams(), 6)[0]


def test_a_stream_that_is_let_go_ends_its_threads():
    before = threading.active_count()
    next(streams()[0])
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


CRASH = """
import sys; sys.path[:0] = {path!r}
from test_stream import *
source = corpus()
slow = threading.Event()
read = source.read_arrow
def stuck(unit):
    if unit == 20:
        slow.wait(60)
    return read(unit)
source.read_arrow = stuck
[stream] = streams(source=source, num_lanes=1)
next(stream)
raise SystemExit(7)
"""


def test_a_crash_does_not_hang_on_a_read_under_way():
    code = CRASH.format(path=[p for p in sys.path if p])
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
    assert time.monotonic() - began < 45


def test_wait_seconds_counts_the_time_spent_waiting():
    source = corpus()
    read = source.read_arrow
    source.read_arrow = lambda unit: (time.sleep(0.2), read(unit))[1]
    [stream] = streams(source=source, num_lanes=1, num_reader_threads=1)
    next(stream)
    stream.close()
    assert 0.2 <= stream.wait_seconds < 5


# --------------------------------------------------------------------------------------- validation


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


def test_count_epoch_tokens_adds_up_over_processes():
    calls = []
    expected = sum(len(text) + 1 for text in TEXTS[20:])
    options = {"num_validation_units": 2}
    whole = count_epoch_tokens(
        corpus(), ByteEncoder(), **options, progress=lambda *done: calls.append(done)
    )
    parts = [
        count_epoch_tokens(corpus(), ByteEncoder(), **options, rank=rank, world_size=3)
        for rank in range(3)
    ]
    assert whole == sum(parts) == expected
    assert calls[-1] == (28, 28)


# -------------------------------------------------------------------------------------- token cache


def test_the_cache_serves_the_same_rows_without_reading(tmp_path):
    theirs = run(streams(), 300)[0]
    first = corpus()
    assert run(streams(source=first, token_cache_dir=tmp_path), 300)[0] == theirs
    assert sorted(set(first.reads)) == list(range(2, 30))
    second = corpus()
    assert run(streams(2, source=second, token_cache_dir=tmp_path), 300)[0] == theirs
    assert second.reads == []
    assert not list(tmp_path.rglob(".*"))  # no partial files


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


def test_another_tokenizer_or_revision_never_meets_an_old_entry(tmp_path):
    run(streams(token_cache_dir=tmp_path), 3)
    other = MemoryCorpus(in_units(TEXTS, 10), "other")
    run(streams(source=other, token_cache_dir=tmp_path), 3)
    assert other.reads
    encoder = ByteEncoder()
    encoder.fingerprint = "else"
    third = corpus()
    next(stream := TokenStream(third, encoder, **OPTIONS, token_cache_dir=tmp_path))
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

    ours = TokenStream(corpus(), WideEncoder(), **OPTIONS, token_cache_dir=tmp_path)
    [theirs] = streams()
    expected = next(theirs).tokens + 70_000
    expected[expected == 70_256] = 99_999
    assert (next(ours).tokens == expected).all()
    ours.close()
    theirs.close()
