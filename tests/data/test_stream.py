"""The stream's contract: the same rows on any number of processes, resumed at exactly the next."""

import itertools
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_corpus import ByteEncoder, MemoryCorpus, in_units, read_back
from tiny_streams import OPTIONS, TEXTS, corpus, run, stream_of, streams

from gpt2repro import UserError
from gpt2repro.data.corpora.content import one_at_a_time
from gpt2repro.data.rows.lanes import check_lanes
from gpt2repro.data.rows.order import LaneState, Position, permutation
from gpt2repro.data.rows.packing import rows_digest
from gpt2repro.data.rows.producer import Producer
from gpt2repro.system.threads import PoolClosed


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


def test_the_share_of_an_epoch_that_was_read():
    """Of a lane with 4 pieces that has read one epoch and two of them; the others wait."""
    [stream] = streams()
    lanes = {0: LaneState(0, (Position(1, 2, 0, 0),)), 4: LaneState(0, (Position(0, 0, 9, 9),))}
    assert [stream.plans[0].num_pieces(lane) for lane in (0, 4)] == [4, 3]
    assert stream.epochs(lanes) == {"epoch": 0.75}
    stream.close()


def test_resume_past_the_end_of_an_epoch():
    digests, _, state = run(streams(), 300)
    assert min(epoch for [(epoch, *_)] in state["lanes"]) >= 2
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
    assert [tuple(lane) for [lane] in state["lanes"]] == [at for _, (at,) in step.lanes.values()]
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


def test_rows_join_up_into_whole_documents():
    [stream] = streams(rows_per_step=8, num_lanes=1)
    rows = torch.cat([next(stream).tokens for _ in range(40)]).numpy()
    stream.close()
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    texts = read_back(np.concatenate([rows[:, :-1].ravel(), rows[-1, -1:]]))
    assert set(texts[:-1]) <= set(TEXTS[20:])


def test_the_stream_is_fixed_for_ever():
    texts = [f"document {number} " + "word " * (7 * number % 41) for number in range(300)]
    [stream] = streams(source=corpus(texts))
    digests = [next(stream).digest for _ in range(3)]
    stream.close()
    assert digests == [6898002224932357292, 3346672184704291190, 8943150677258474528]


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


# Of 28 units of 10 documents of 3 tokens, lane 3 of 8 has four: the last place of each kind.
LAST = {"pieces": [0, 3, 0, 0], "documents": [0, 0, 9, 0], "tokens": [0, 0, 0, 2]}


@pytest.mark.parametrize("part", LAST)
def test_a_position_that_the_data_do_not_have_is_refused(part):
    source = corpus(["ab"] * 300)
    _, _, state = run(streams(source=source), 1)
    state["lanes"][3] = [LAST[part]]
    run(streams(state=state, source=source), 1)
    state["lanes"][3] = [[n + (n > 0) for n in LAST[part]]]
    with pytest.raises(UserError, match=f"position is beyond the .*{part}.*earlier checkpoint"):
        run(streams(state=state, source=source), 1)


def test_a_position_beyond_the_only_document_of_a_unit_is_refused():
    one_each = {"source": corpus(["ab"] * 10, 1), "num_lanes": 1}
    _, _, state = run(streams(**one_each), 1)
    with pytest.raises(UserError, match="position is beyond the documents"):
        run(streams(state=state | {"lanes": [[[0, 0, 1, 0]]]}, **one_each), 1)


def test_a_row_that_ends_with_a_document_goes_on_at_the_next_one():
    """Of documents of 4 tokens: the place after each row of 4 is the beginning of one."""
    source = corpus(["abc"] * 30)
    options = {"sequence_length": 4, "rows_per_step": 1, "num_lanes": 1, "source": source}
    [stream] = streams(**options)
    places = [tuple(next(stream).lanes[0].positions[0]) for _ in range(11)]
    stream.close()
    assert places == [*((0, 0, n, 0) for n in range(1, 10)), (1, 0, 0, 0), (1, 0, 1, 0)]


@pytest.mark.parametrize(
    "change",
    [
        {"lanes": []},
        {"lanes": [[[0, 0, 0, 0]]] * 9},
        {"lanes": [[[0, 0, 0, 0]] * 2] * 8},
        {"lanes": [[[0, 0, 0, -1]]] * 8},
        {"lanes": [[[0, 0, 0]]] * 8},
        {"lanes": None},
        {"step": -1},
        {"identity": None},
        {"version": None},
        {"version": 3},
    ],
)
def test_a_damaged_state_is_refused(change):
    _, _, state = run(streams(), 1)
    with pytest.raises(UserError, match="the checkpoint's stream state is damaged"):
        streams(state=state | change)


def test_another_tokenizer_is_refused():
    _, _, state = run(streams(), 1)
    encoder = ByteEncoder()
    encoder.fingerprint = "else"
    stream = stream_of(corpus(), encoder, **OPTIONS)
    with pytest.raises(UserError, match="tokenizer_name's fingerprint was 'bytes'"):
        stream.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_lanes": 5}, r"num_lanes 5 does not divide the 16 rows .* these would: 1, 2, 4, 8$"),
        ({"num_lanes": 32}, "num_lanes 32 does not divide the 16 rows"),
        ({"num_lanes": 3}, r"num_lanes 3 does not divide the 16 rows .* these would: 1, 2, 4$"),
        ({"num_lanes": 0}, r"num_lanes 0 does not divide the 16 rows .* these would: 1, 2$"),
        ({"num_lanes": 2, "world_size": 4}, r"2 is not .* launch 1, 2 .* num_lanes to 4, 8, 16$"),
        (
            {"world_size": 3},
            "the 3 processes .* launch 1, 2, 4, 8 processes, or change num_lanes and batch_tok",
        ),
        ({"num_validation_units": 30}, "num_validation_units: 30 of the dataset's 30 units"),
        ({"rows_per_step": 512, "num_lanes": 512}, "num_lanes: 512 lanes .* 280 documents"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(options, named):
    with pytest.raises(UserError, match=named):
        stream_of(corpus(), ByteEncoder(), **OPTIONS | options)


@pytest.mark.parametrize(
    ("units", "num_validation_units"),
    [
        ([["a"], ["b"], ["c"], ["d"]], 0),
        ([["held out"], ["a", "b", "c", "d"]], 1),  # a document a lane
        ([["held out"], ["a"], ["b", "c"], [], ["d"]], 1),  # a unit a lane, whatever it holds
        ([["held out"], ["a"], ["b"], [], ["d"]], 1),
    ],
)
def test_what_just_fits_is_taken(units, num_validation_units):
    options = {"num_lanes": 4, "num_validation_units": num_validation_units}
    [stream] = streams(source=MemoryCorpus(units), **options)
    tokens = set(next(stream).tokens.flatten().tolist())
    stream.close()
    trained_on = units[num_validation_units:]
    assert tokens == {256, *map(ord, itertools.chain(*trained_on))}


def test_lanes_without_documents_are_refused_and_do_not_spin():
    """Every document is in the validation unit, and no count says so beforehand."""
    source = MemoryCorpus([["a", "b"], []])
    source.num_documents = None
    options = OPTIONS | {"num_validation_units": 1}
    stream = stream_of(source, ByteEncoder(), **options)
    with pytest.raises(UserError, match=r"num_lanes: lane \d finds no documents"):
        next(stream)
    stream.close()


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
import sys, threading; sys.path[:0] = {path!r}
from tiny_streams import corpus, streams
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
    assert stream.wait_seconds == 0
    next(stream)
    stream.close()
    assert 0.2 <= stream.wait_seconds < 5


def test_waiting_for_the_next_step_takes_nothing_from_it():
    source = corpus()
    read, may_read = source.read_arrow, threading.Event()
    source.read_arrow = lambda unit: (may_read.wait(60), read(unit))[1]
    [stream] = streams(source=source)
    assert not stream.wait(0.01)
    may_read.set()
    assert stream.wait(60) and stream.wait(0)
    digests = [next(stream).digest for _ in range(2)]
    stream.close()
    assert digests == run(streams(), 2)[0]


def test_a_stream_that_is_closed_wakes_who_waits_for_it():
    source, may_read = corpus(), threading.Event()
    read = source.read_arrow
    source.read_arrow = lambda unit: (may_read.wait(60), read(unit))[1]
    [stream] = streams(source=source)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(next, stream)
        while stream._producer is None:
            time.sleep(0.01)
        stream.close()
        may_read.set()
        with pytest.raises(PoolClosed):
            waiting.result(10)
    digests = [next(stream).digest for _ in range(2)]
    stream.close()
    assert digests == run(streams(), 2)[0]


def test_a_producer_is_closed_wherever_garbage_is_collected():
    """In its own thread too, while that holds the lock of the queue."""
    begun, ended = threading.Event(), threading.Event()

    def make_lanes() -> dict:
        begun.wait(10)
        with producer._steps.mutex:
            producer.close()
        ended.set()
        return {}

    producer = Producer(make_lanes, [])
    begun.set()
    assert ended.wait(10)


def test_who_waits_for_another_process_says_so(tmp_path, caplog):
    held = threading.Event()

    def hold() -> None:
        with one_at_a_time(tmp_path / "a.lock"):
            held.set()
            for _ in range(1000):
                if "waiting for another process, which holds" in caplog.text:
                    break
                time.sleep(0.01)

    with ThreadPoolExecutor() as pool:
        holding = pool.submit(hold)
        assert held.wait(10)
        with one_at_a_time(tmp_path / "a.lock"):
            holding.result(10)
    assert str(tmp_path / "a.lock") in caplog.text


def test_rows_of_one_token_and_its_successor():
    [stream] = streams(sequence_length=1, rows_per_step=2, num_lanes=1)
    first, second = next(stream).tokens, next(stream).tokens
    stream.close()
    assert first.shape == second.shape == (2, 2)
    assert first[0, 0] == 256 and first[0, 1] == first[1, 0] and first[1, 1] == second[0, 0]


def test_one_process_has_all_lanes_unless_it_is_told_of_others():
    check_lanes(3, rows_per_step=9)
    stream = stream_of(corpus(), ByteEncoder(), **OPTIONS)
    assert [*stream.lanes] == [*range(8)]
