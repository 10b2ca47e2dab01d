"""Several datasets in one stream: their shares, their epochs, and the contract of one."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from tiny_corpus import ByteEncoder, MemoryCorpus, documents, in_units
from tiny_streams import OPTIONS, run, streams_of

from gpt2repro import UserError
from gpt2repro.data.rows.mixture import Mixture, Source, tokens_of_each
from gpt2repro.data.rows.order import LaneState, Position
from gpt2repro.data.rows.stream import TokenStream

WEIGHTS = (Fraction(6, 10), Fraction(3, 10), Fraction(1, 10))
LETTERS = "abc"
START = LaneState(0, (Position(0, 0, 0, 0),) * 3)
MIXED = {name: value for name, value in OPTIONS.items() if name != "num_validation_units"}


def sources(weights=WEIGHTS, epochs=(None, 2, None), num_validation_units=1) -> list[Source]:
    """Three of 200, 60 and 40 documents, each of one letter; the second ends after 2 epochs."""
    return [
        Source(
            MemoryCorpus(
                in_units([letter * len(text) for text in documents(size, seed=size)], 10), letter
            ),
            num_validation_units,
            weight,
            last,
        )
        for letter, size, weight, last in zip(LETTERS, (200, 60, 40), weights, epochs, strict=True)
    ]


def streams(world_size=1, state=None, **options) -> list[TokenStream]:
    return streams_of(sources(), world_size, state, **MIXED | options)


def letters(rows) -> Counter:
    """Which dataset the rows of a step come from."""
    return Counter(next(chr(token) for token in row if token != 256) for row in rows)


NUM_STEPS = 260


@pytest.fixture(scope="module")
def whole() -> tuple[list[int], list[set], dict]:
    return run(streams(), NUM_STEPS)


def test_rows_do_not_depend_on_the_processes_and_resume_across_the_end_of_a_source(whole):
    """1 -> 8 -> 2 -> 4 processes; the second source ends meanwhile, the third repeats."""
    digests, state, begin = [], None, 0
    for world_size, end in ((1, 3), (8, 40), (2, 171), (4, NUM_STEPS)):
        ranks = streams(world_size, state, num_reader_threads=1 + world_size % 3)
        some, _, state = run(ranks, end - begin)
        digests, begin = digests + some, end
    assert digests == whole[0]
    assert state == whole[2]
    epochs = [[place[0] for place in lane] for lane in state["lanes"]]
    assert {b for _, b, _ in epochs} == {2}, "ended everywhere"
    assert min(c for *_, c in epochs) >= 1, "repeated"


def test_shares_are_the_weights_then_those_of_the_sources_that_go_on(whole):
    shares = [letters(rows) for rows in whole[1]]
    early, late = Counter(), Counter()
    for step in shares[:50]:
        early += step
        # Within a row of the weight; equal rows of a letter are one in the set.
        assert all(step[x] <= 16 * w + 1 for x, w in zip(LETTERS, WEIGHTS, strict=True))
    for step in shares[-50:]:
        late += step
    assert set(early) == set(LETTERS) and set(late) == {"a", "c"}


def test_a_step_has_the_weights_to_within_a_row_and_a_run_to_within_a_few():
    mixture = Mixture(sources(epochs=(None,) * 3), rows_per_step=16, seed=3)
    total = Counter()
    for step in range(1000):
        counted = Counter(mixture.choose(START._replace(step=step), slice(0, 16)).tolist())
        total += counted
        assert all(abs(counted[n] - 16 * weight) < 1 for n, weight in enumerate(WEIGHTS))
    assert all(abs(total[n] - 16_000 * weight) <= 3 for n, weight in enumerate(WEIGHTS))


def test_every_lane_reads_every_source_in_about_its_share():
    """Also where a pattern of period 2 would give a lane one source only."""
    halves = [Source(s.corpus, weight=Fraction(1)) for s in sources()[:2]]
    mixture = Mixture(halves, rows_per_step=16, seed=3)
    counted = Counter()
    for step in range(1000):
        for lane in range(16):
            counted[lane] += int(mixture.choose(LaneState(step, ()), slice(lane, lane + 1))[0])
    assert all(400 < counted[lane] < 600 for lane in range(16))


def test_which_source_a_row_comes_from_is_fixed_for_ever():
    """Literal values: were they to change, no mixture would resume on its rows."""
    mixture = Mixture(sources(), rows_per_step=16, seed=1)
    first = mixture.choose(START, slice(0, 16)).tolist()
    assert first == [0, 0, 0, 0, 1, 2, 0, 0, 0, 1, 1, 0, 1, 0, 1, 0]
    assert mixture.choose(START._replace(step=1000), slice(4, 12)).tolist() == [
        0,
        2,
        1,
        1,
        0,
        1,
        0,
        1,
    ]


def test_a_small_source_gives_its_rows_and_no_more():
    """Also where it is read many times over within one step."""
    small = Source(MemoryCorpus([["s" * 40] * 3]), 0, Fraction(1), 2)
    large = Source(MemoryCorpus(in_units(["l" * 50] * 200, 10)))
    options = {"sequence_length": 8, "rows_per_step": 64, "num_lanes": 1, "seed": 1}
    [stream] = [TokenStream([small, large], ByteEncoder(), **options)]
    _, _, state = run([stream], 1)
    # Two epochs of 3 * 41 tokens, in rows that begin in them.
    assert state["lanes"][0][0][0] == 2
    rows = next(iter([TokenStream([small, large], ByteEncoder(), **options)]))
    tokens = next(rows).tokens
    rows.close()
    assert int((tokens[:, 1:-1] == ord("s")).any(dim=1).sum()) == -(-2 * 3 * 41 // 8)


def test_each_source_reads_as_if_it_were_alone(whole):
    """The rows of a source are a prefix of those of a stream of it alone."""
    mixed = {row for rows in whole[1] for row in rows if chr(max(set(row) - {256})) == "a"}
    [alone] = [TokenStream([sources()[0]], ByteEncoder(), **MIXED)]
    rows = run([alone], NUM_STEPS)[1]
    assert mixed <= set().union(*rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (1, 1, 1)}, r"weight of datasets\[0\] was '3/5' .* is '1/3' now"),
        ({"epochs": (None, 3, None)}, r"epochs of datasets\[1\] was 2 in the checkpoint and is 3"),
        ({"num_validation_units": 2}, r"num_validation_units of datasets\[0\] was 1"),
    ],
)
def test_another_mixture_is_refused(whole, change, message):
    other = {"weights": WEIGHTS, "epochs": (None, 2, None)} | change
    other["weights"] = tuple(map(Fraction, other["weights"]))
    stream = TokenStream(sources(**other), ByteEncoder(), **MIXED)
    with pytest.raises(UserError, match=message):
        stream.load_state_dict(whole[2])
    with pytest.raises(UserError, match="datasets was 3 in the checkpoint and is 1 now"):
        TokenStream(sources()[:1], ByteEncoder(), **MIXED).load_state_dict(whole[2])


def test_what_one_entry_holds_out_another_may_not_train_on():
    twice = [replace(sources()[0], label=f"datasets[{n}]", num_validation_units=n) for n in (0, 1)]
    with pytest.raises(UserError, match=r"datasets\[0\] and datasets\[1\] are the same data"):
        TokenStream(twice, ByteEncoder(), **MIXED)


def test_a_mixture_that_would_end_is_refused():
    with pytest.raises(UserError, match=r"datasets: each of them ends \(epochs\)"):
        TokenStream(sources(epochs=(1, 2, 3)), ByteEncoder(), **MIXED)


@pytest.mark.parametrize(
    ("epochs", "sizes", "num_tokens", "expected"),
    [
        ((None, None, None), (100, 100, 100), 1000, (600, 300, 100)),
        # The second gives 60 of its 300; the others share 940 as 6 to 1.
        ((None, 2, None), (100, 30, 100), 1000, (940 * 6 / 7, 60, 940 / 7)),
        # What the first leaves is too much for the second as well.
        ((1, 4, None), (100, 100, 7), 1000, (100, 400, 500)),
        ((None, 2, None), (None, None, None), 1000, (600, 300, 100)),
        ((1, 1, 1), (10, 10, 10), 1000, (10, 10, 10)),
    ],
)
def test_what_one_leaves_that_ends_is_the_others(epochs, sizes, num_tokens, expected):
    assert tokens_of_each(sources(epochs=epochs), sizes, num_tokens) == pytest.approx(expected)
