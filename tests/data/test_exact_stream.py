"""The stream outside our own loop: its rows, its state, torch's DataLoader."""

import copy
import json
import multiprocessing
import pickle
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_hub import FakeHub, Fault, impatient
from tiny_corpus import documents, parquet_bytes, read_all, write_lines
from tiny_run import write_inputs
from tiny_shards import write_bin
from tiny_streams import stream_of
from torch import distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from gpt2repro import UserError
from gpt2repro.data import ExactStream
from gpt2repro.data.corpora import shards
from gpt2repro.data.opening import open_corpus
from gpt2repro.data.rows.stream import TokenStream
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.encoder import BulkEncoder

ROWS, T = 24, 32
Batches = Iterable[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    write_inputs(directory)
    return directory


@pytest.fixture
def make(inputs):
    """Streams over the same text; all are closed."""
    made: list[ExactStream] = []

    def make(**options) -> ExactStream:
        given = {"tokenizer": str(inputs / "tokenizer"), "sequence_length": T, "seed": 7}
        given |= {"rows_per_step": ROWS, "num_lanes": ROWS, "num_validation_units": 1}
        given |= {"dataset_name": inputs / "corpus"}
        made.append(ExactStream(**given | options))
        return made[-1]

    yield make
    for stream in made:
        stream.close()


def world(make, size: int, state: dict | None = None, **options) -> list[ExactStream]:
    streams = [make(rank=rank, world_size=size, **options) for rank in range(size)]
    for stream in streams:
        if state:
            stream.load_state_dict(state)
    return streams


def steps(streams: list[ExactStream], number: int) -> tuple[list[int], dict]:
    """The digest of each step over all processes; the state after the last."""
    digests = []
    iterators = [iter(stream) for stream in streams]
    for _ in range(number):
        for stream, batches in zip(streams, iterators, strict=True):
            for _ in range(stream.batches_per_step):
                next(batches)
        digests.append(sum(stream.digest for stream in streams) % 2**64)
    lanes = {lane: place for stream in streams for lane, place in stream.lanes.items()}
    return digests, json.loads(json.dumps(streams[0].state_dict(lanes)))


def test_its_rows_are_those_of_our_own_loop(make, inputs):
    theirs = stream_of(
        open_corpus(inputs / "corpus"),
        BulkEncoder(load_tokenizer(str(inputs / "tokenizer"))),
        sequence_length=T,
        rows_per_step=ROWS,
        num_lanes=ROWS,
        num_validation_units=1,
        seed=7,
    )
    ours = make()
    for step, (rows, batch) in enumerate(zip(islice(theirs, 5), ours, strict=False), 1):
        assert torch.equal(batch["input_ids"], rows.tokens[:, :-1])
        assert torch.equal(batch["shift_labels"], rows.tokens[:, 1:])
        assert (ours.digest, ours.step) == (rows.digest, step)
    theirs.close()


def three_sources(inputs: Path, directory: Path) -> list[dict]:
    """The second ends with its second epoch, the third begins anew."""
    ends, repeats = directory / "ends.jsonl", directory / "repeats.jsonl"
    write_lines(ends, documents(30, seed=1))
    write_lines(repeats, documents(40, seed=2))
    first = {"name": str(inputs / "corpus"), "weight": 2, "num_validation_units": 1}
    return [first, {"name": str(ends), "epochs": 2}, {"name": str(repeats)}]


def write_shards(inputs: Path, directory: Path) -> Path:
    """The same texts as token ids; the first shard is held out."""
    encoder, texts = BulkEncoder(load_tokenizer(str(inputs / "tokenizer"))), documents(240)
    for name, begin, end in (("val_0", 0, 30), ("train_1", 30, 90), ("train_2", 90, 240)):
        ids = [
            part for each in encoder.encode(texts[begin:end]) for part in ([encoder.eot_id], each)
        ]
        write_bin(directory / f"{name}.bin", np.concatenate(ids))
    return directory


@pytest.fixture(params=["one dataset", "a mixture of three", "shards"])
def source(request, inputs, tmp_path, monkeypatch) -> dict:
    """What an ExactStream is to read."""
    monkeypatch.setattr(shards, "UNIT_TOKENS", 1000)
    if request.param == "one dataset":
        return {"dataset_name": inputs / "corpus", "num_validation_units": 1}
    write = three_sources if request.param == "a mixture of three" else write_shards
    return {"dataset_name": write(inputs, tmp_path), "num_validation_units": None}


def in_turns(make, **source) -> tuple[list[int], dict]:
    """40 steps, each world going on from the state of the one before."""
    found, state = [], None
    for size, number in ((1, 4), (8, 7), (2, 8), (3, 21)):
        digests, state = steps(world(make, size, state, **source, micro_batch_size=1), number)
        found += digests
    return found, state


def test_one_then_eight_then_two_then_three_processes(make, source):
    """Across an epoch's end of each source."""
    expected, at_the_end = steps(world(make, 1, **source), 40)
    assert in_turns(make, **source) == (expected, at_the_end)
    epochs = np.array([[place[0] for place in lane] for lane in at_the_end["stream"]["lanes"]])
    assert epochs.max(axis=0).min() > 0, epochs
    if isinstance(source["dataset_name"], list):
        assert epochs[:, 1].min() == 2, "ended on every lane"


@pytest.mark.parametrize("source", ["a mixture of three", "shards"], indirect=True)
def test_the_same_while_a_hub_that_has_it_misbehaves(make, source, monkeypatch):
    """Of the mixture it has the first."""
    expected, _ = steps(world(make, 1, **source), 40)
    if isinstance(named := source["dataset_name"], list):
        there = {"dataset_name": [named[0] | {"name": "someone/data"}, *named[1:]]}
        named = named[0]["name"]
    else:
        there = {"dataset_name": "someone/data", "data_files": "*.bin"}
    files = {path.name: path.read_bytes() for path in Path(named).iterdir()}
    kinds = ["status:503", "reset", "short", "status:429", "ignore_range", "flood", "status:403"]
    impatient(monkeypatch)
    with FakeHub() as hub:
        hub.add("datasets", "someone/data", files)
        hub.use_in_process(monkeypatch)
        hub.faults += [Fault(kind, r"\.(parquet|bin)$", skip=n) for n, kind in enumerate(kinds * 2)]
        assert in_turns(make, **source | there)[0] == expected
        assert sum(fault.num_hits for fault in hub.faults) > 10


def test_micro_batches_are_the_steps_rows_in_order(make):
    whole, parts = make(), make(micro_batch_size=4)
    assert parts.batches_per_step == 6
    rows = list(islice(parts, 6))
    assert {batch["input_ids"].shape for batch in rows} == {(4, T)}
    together = torch.cat([batch["input_ids"] for batch in rows])
    assert torch.equal(together, next(iter(whole))["input_ids"])
    next(iter(parts))
    with pytest.raises(UserError, match="5 of the 6 batches of a step are still to come"):
        parts.state_dict()


def test_a_loop_that_has_taken_more_than_it_trained_on_says_so(make):
    """As Lightning does, which looks a batch ahead where there is no length."""
    stream, other = make(micro_batch_size=4), make()
    _, state = steps([other], 2)
    list(islice(stream, 2 * 6 + 5))
    assert stream.state_dict(step=2) == state
    goes_on = make()
    goes_on.load_state_dict(stream.state_dict(step=2))
    assert steps([goes_on], 3)[0] == steps([other], 3)[0]
    assert goes_on.state_dict(step=2) == state
    with pytest.raises(UserError, match=r"step 1: the stream knows \[2, 3, 4, 5\]"):
        goes_on.state_dict(step=1)
    with pytest.raises(UserError, match=r"step 3: the stream knows \[0, 1, 2\]"):
        stream.state_dict(step=3)  # it has begun


def test_a_batch_is_the_loops_to_change(make):
    for size in (1, 2):
        batch = next(iter(make(micro_batch_size=size)))
        same = next(iter(make(micro_batch_size=size)))
        for name in ("shift_labels", "labels"):
            batch[name].fill_(-100)
        assert torch.equal(batch["input_ids"], same["input_ids"])


def test_after_an_error_the_stream_is_not_over(make, monkeypatch):
    expected = steps([make()], 2)[0]
    stream = make()
    batches = iter(stream)
    next(batches)
    with monkeypatch.context() as patch:
        patch.setattr(TokenStream, "__next__", lambda _: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                next(batches)
    next(batches)
    assert stream.digest == expected[1] and stream.step == 2


def test_a_loader_of_torch_gives_the_same_and_its_workers_are_refused(make):
    assert isinstance(make(), IterableDataset)
    loader = DataLoader(make(), batch_size=None)
    for ours, theirs in zip(islice(make(), 4), loader, strict=False):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    batches = iter(DataLoader(make(), batch_size=None, num_workers=1))
    with pytest.raises(UserError, match=r"num_workers.* DataLoader\(stream, batch_size=None, n"):
        next(batches)
    batches._shutdown_workers()  # left to the garbage collector it waits 5 s


@pytest.mark.parametrize("order", ["shuffled", "file"])
def test_a_copy_goes_on_by_itself(make, inputs, tmp_path, order):
    """A worker that is spawned is sent one, and answers as one that is forked."""
    how = {"order": order, "num_validation_units": None}
    how |= {"dataset_name": write_shards(inputs, tmp_path)} if order == "file" else {}
    stream = make(**how)
    next(iter(stream))
    expected = next(islice(make(**how), 1, 2))["input_ids"]
    for copied in (pickle.loads(pickle.dumps(stream)), copy.deepcopy(stream)):
        assert torch.equal(next(iter(copied))["input_ids"], expected)
        copied.close()


def test_numbers_of_numpy_are_numbers(make):
    stream = make(seed=np.int64(3), rank=np.int64(0), world_size=np.int32(1))
    assert json.loads(json.dumps(stream.state_dict())) == make(seed=3).state_dict()


def test_a_state_of_two_steps_is_refused(make):
    stream = make()
    state = stream.state_dict()
    with pytest.raises(UserError, match="damaged: it is of two steps"):
        stream.load_state_dict(state | {"step": 77})
    with pytest.raises(UserError, match=r"damaged: step: [^\n]*$"):
        stream.load_state_dict({"step": -1, "stream": state["stream"] | {"step": -1}})


def test_the_processes_are_those_of_the_launcher(make, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sorted(make().lanes) == list(range(1, ROWS, 2))
    with pytest.raises(UserError, match="lanes of all 2 processes are needed"):
        make().state_dict()
    with pytest.raises(UserError, match="rank and world_size go together"):
        make(rank=1)
    monkeypatch.delenv("RANK")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, and there is no RANK"):
        make()


def test_a_stream_that_was_made_before_the_processes_knew_themselves_is_refused(make, monkeypatch):
    stream = make()
    next(iter(stream))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for use in (lambda: next(iter(stream)), stream.state_dict):
        with pytest.raises(
            UserError, match="was made as 0 of 1, this process is 1 of 2: make it af"
        ):
            use()
    assert steps([make(rank=0, world_size=2), make()], 3)[0] == steps(world(make, 1), 3)[0]


def test_processes_of_other_data_are_noticed_where_a_state_is_made(make, monkeypatch):
    streams = world(make, 2)
    streams[1] = make(rank=1, world_size=2, seed=8)

    def gather(parts: list, mine: Any) -> None:
        parts[:] = [mine, (streams[1].lanes, streams[1].stream.identity)]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(UserError, match=r"processes of this launch see different data \(seed\)"):
        streams[0].state_dict()


def test_what_is_given_reaches_the_stream(make, tmp_path):
    (tmp_path / "texts").mkdir()
    lines = "".join(json.dumps({"words": text}) + "\n" for text in documents(90))
    (tmp_path / "texts" / "test.jsonl").write_text(lines)
    given = {"dataset_name": tmp_path / "texts", "split": "test", "text_column": "words"}
    places = {"token_cache_dir": tmp_path / "tokens", "unit_digests_dir": tmp_path / "digests"}
    stream, plain = make(**given, **places), make(**given)
    assert steps([stream], 10)[0] == steps([plain], 10)[0]
    assert [*(tmp_path / "tokens").rglob("*.tokens")] and [*(tmp_path / "digests").rglob("*.units")]
    known = str([*range(2, 11)])
    with pytest.raises(UserError, match=re.escape(f"step 1: the stream knows {known}")):
        stream.state_dict(step=1)
    (tmp_path / "shards").mkdir()
    write_bin(tmp_path / "shards" / "train_0.bin", np.arange(256))
    with pytest.raises(UserError, match="chunk_rows: a shard does not hold 999 rows"):
        make(dataset_name=tmp_path / "shards", order="file", chunk_rows=999, num_validation_units=0)


@pytest.mark.parametrize(("document", "count"), [("line", 2), ("file", 1)])
def test_what_a_document_is_reaches_the_stream(make, tmp_path, document, count):
    (tmp_path / "a.txt").write_text("one line\nand another")
    given = {"num_validation_units": 0, "num_lanes": 1}
    stream = make(dataset_name=tmp_path / "a.txt", document=document, **given)
    [source] = stream.stream.sources
    assert sum(map(len, read_all(source.corpus))) == count


def test_a_commit_reaches_the_stream(make, monkeypatch):
    with FakeHub() as hub:
        hub.use_in_process(monkeypatch)
        texts = hub.add("datasets", "me/texts", {"0.parquet": parquet_bytes(documents(90), 30)})
        first = texts.resolve("main")
        texts.commit({"0.parquet": parquet_bytes(documents(90)[::-1], 30)})
        streams = [make(dataset_name="me/texts", revision=each) for each in (first, None)]
        one, other = (steps([stream], 2)[0] for stream in streams)
    assert one != other


def test_a_state_that_is_written_into_changes_no_stream(make):
    """torch.distributed.checkpoint does so before it calls `load_state_dict`."""
    stream = make()
    state = stream.state_dict()
    state["stream"]["identity"]["seed"] = 99
    with pytest.raises(UserError, match="seed was 99 in the checkpoint and is 7 now"):
        stream.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_stream_that_was_looked_at_goes_on_in_a_fork(make):
    expected = steps([make()], 9)[0]
    stream = make()
    next(iter(stream))
    mine, theirs = multiprocessing.Pipe()

    def go_on() -> None:
        theirs.send(steps([stream], 8)[0])
        stream.close()
        theirs.send("closed")

    process = multiprocessing.get_context("fork").Process(target=go_on)
    process.start()
    try:
        for sent in (expected[1:], "closed"):
            assert mine.poll(60), "it waits for threads that it does not have"
            assert mine.recv() == sent
    finally:
        process.kill()
        process.join()
    assert steps([stream], 8)[0] == expected[1:], "here, too"


def test_shards_that_are_written_again_are_read_again(make, inputs, tmp_path):
    how = {"order": "file", "num_validation_units": None}
    how |= {"dataset_name": write_shards(inputs, tmp_path)}
    first = next(iter(make(**how)))["input_ids"]
    file = tmp_path / "train_1.bin"
    content = bytearray(file.read_bytes())
    content[1064:1084] = b"\x05\x00" * 10
    file.write_bytes(content)
    again = next(iter(make(**how)))["input_ids"]
    assert not torch.equal(first, again) and (again == 5).sum() >= 9


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"micro_batch_size": 5}, "micro_batch_size 5 does not divide the 24 rows"),
        ({"num_lanes": 5}, "num_lanes 5 does not divide"),
        ({"rank": 0, "world_size": 5}, "not divisible by the 5 processes"),
        ({"num_validation_units": 99}, "num_validation_units"),
        ({"tokenizer": "/nowhere"}, "tokenizer"),
        ({"tokenizer": None}, "tokenizer: it takes a fast tokenizer"),
        ({"tokenizer": "x" * 300}, "tokenizer_name: too long for a file's name"),
        ({"rank": 5, "world_size": 2}, "rank 5 is not in a world of 2"),
        ({"rank": 0, "world_size": 0}, "world_size: 0 is not allowed"),
        *(
            ({name: value}, f"{name}: {value!r} is not allowed; it takes a whole number from 1 on")
            for name in (
                *("sequence_length", "rows_per_step", "micro_batch_size"),
                *("num_lanes", "num_reader_threads"),
            )
            for value in (0, -2, 1.5)
        ),
        *(
            ({name: value, **more}, f"{name}: .* is not allowed; it takes a whole number")
            for name, more in (
                *(("num_validation_units", {}), ("seed", {})),
                *(("rank", {"world_size": 2}), ("world_size", {"rank": 0})),
            )
            for value in (-1, 1.0, "2", True)
        ),
        ({"chunk_rows": 0}, "chunk_rows: 0 is not allowed"),
        ({"dataset_name": None}, "dataset_name: None is neither a name nor a list"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_argument(make, options, named):
    with pytest.raises(UserError, match=named):
        make(**options)


def test_a_mixture_is_named_as_in_a_recipe(inputs, make, tmp_path):
    """Null takes the argument's number; paths are names; what is no entry is told."""
    write_lines(tmp_path / "other.jsonl", documents(40, seed=2))
    two = [{"name": inputs / "corpus", "num_validation_units": None, "weight": 3}]
    two += [{"name": str(tmp_path / "other.jsonl"), "num_validation_units": 3}]
    options = {"tokenizer": str(inputs / "tokenizer"), "sequence_length": T, "rows_per_step": ROWS}
    stream = ExactStream(two, **options, num_validation_units=2)
    datasets = stream.stream.identity["datasets"]
    assert [each["num_validation_units"] for each in datasets] == [2, 3]
    assert [each["weight"] for each in datasets] == ["3/4", "1/4"]
    next(iter(stream))
    stream.close()
    nameless = [{"name": None}]
    for wrong, message in (
        (["a"], "'a' is no mapping"),
        ([], "datasets: there is none"),
        (nameless, "datasets: name"),
    ):
        with pytest.raises(UserError, match=message):
            ExactStream(wrong, **options)
    with pytest.raises(UserError, match="the stream's state is damaged"):
        make().load_state_dict({"step": 1, "stream": None})


def test_a_state_of_another_stream_is_refused(make):
    _, state = steps([make()], 1)
    with pytest.raises(UserError, match="seed was 7 in the checkpoint and is 8 now"):
        make(seed=8).load_state_dict(state)
    for damaged in ({}, {"step": 1}, {"step": "x", "stream": {}}, []):
        with pytest.raises(UserError, match="state is damaged"):
            make().load_state_dict(damaged)
    broken = {"step": 1, "stream": state["stream"] | {"lanes": []}}
    with pytest.raises(UserError, match="state is damaged"):
        make().load_state_dict(broken)


def test_lanes_by_default_are_what_divides(make):
    for rows, lanes in ((512, 64), (480, 32), (12, 4), (7, 1)):
        assert len(make(rows_per_step=rows, num_lanes=None).lanes) == lanes
