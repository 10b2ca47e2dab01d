"""Shards of token ids: read in our order, and in that of the projects that write them."""

import re
from pathlib import Path

import numpy as np
import pytest
from fake_hub import FakeHub
from tiny_corpus import ByteEncoder, documents, joined, read_back, refusal, write_parquet
from tiny_shards import Loader, tokens_of, write_bin
from tiny_streams import run, streams_of

from gpt2repro import UserError
from gpt2repro.data import opening
from gpt2repro.data.corpora import shards
from gpt2repro.data.corpora.local_files import find_local
from gpt2repro.data.opening import open_corpus
from gpt2repro.data.rows import file_order
from gpt2repro.data.rows.held_out import validation_set
from gpt2repro.data.rows.mixture import Source
from gpt2repro.data.rows.stream import TokenStream

TEXTS = documents(400, max_words=30)
T = 8


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(shards, "UNIT_TOKENS", 1000)
    monkeypatch.setattr(shards, "LOOK_AHEAD_TOKENS", 4)


def write(directory, lengths=(9000, 7003, 5000), suffix=".bin", name="edufineweb") -> list:
    """Shards of the texts, a held-out one first; returns what those to train on hold."""
    directory.mkdir(exist_ok=True)
    tokens, parts = tokens_of(TEXTS), []
    for number, begin in enumerate(np.cumsum([0, *lengths[:-1]])):
        part = tokens[begin : begin + lengths[number]]
        assert len(part) == lengths[number]
        path = directory / f"{name}_{'train' if number else 'val'}_{number:06d}{suffix}"
        if suffix == ".npy":
            np.save(path, part)
        elif suffix == ".bin":
            write_bin(path, part)
        parts.append(part)
    return parts


def streams(corpus, world_size=1, state=None, **options) -> list[TokenStream]:
    given = {"sequence_length": T, "rows_per_step": 16, "num_lanes": 8, "seed": 3} | options
    return streams_of([Source(corpus, corpus.num_held_out_units)], world_size, state, **given)


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_units_are_the_documents_of_the_shards(tmp_path, small_units, suffix):
    """Each once, in order, also where one goes beyond its unit; the rest of one begins a shard."""
    parts = write(tmp_path, suffix=suffix)
    corpus = open_corpus(tmp_path)
    assert corpus.num_units == 9 + 8 + 5 and corpus.num_held_out_units == 9
    found = []
    for unit in range(corpus.num_units):
        ids, ends, num_bytes = corpus.read_tokens(unit, ByteEncoder())
        pieces = np.split(ids, ends[:-1]) if len(ends) else []
        assert [len(piece) for piece in pieces] == num_bytes.tolist()
        found += [bytes(piece.astype(np.uint8)).decode() for piece in pieces]
    expected = []
    for part in parts:
        rest, *whole = np.split(part, np.flatnonzero(part == 256))
        expected += [bytes(rest.astype(np.uint8)).decode()] if len(rest) else []
        expected += [text for piece in whole for text in read_back(piece)]
    assert found == expected


def test_one_document_longer_than_units(tmp_path, small_units):
    write_bin(tmp_path / "a.bin", tokens_of(["a" * 3500, "b", "", "c" * 20]))
    corpus = open_corpus(tmp_path)
    units = [corpus.read_tokens(unit, ByteEncoder())[1] for unit in range(corpus.num_units)]
    assert [ends.tolist() for ends in units] == [[3500], [], [], [1, 1, 21]]


def test_our_order_is_that_of_their_texts(tmp_path, small_units):
    """Every document once an epoch, on any number of processes; the held-out shard never."""
    write(tmp_path)
    corpus = open_corpus(tmp_path)
    digests, rows, _ = run(streams(corpus), 200)
    head, _, state = run(streams(corpus, 2), 77)
    middle, _, state = run(streams(corpus, 8, state), 50)
    assert head + middle + run(streams(corpus, 4, state), 73)[0] == digests
    held_out = validation_set(corpus, ByteEncoder(), sequence_length=T, num_units=9)
    assert held_out.rows[0].tolist() == tokens_of(TEXTS)[: T + 1].tolist()
    assert (held_out.num_bytes == np.sum(held_out.rows[:, 1:] != 256, axis=1)).all()
    in_val, in_training = numbers(held_out.rows), numbers(row for step in rows for row in step)
    assert in_val and len(in_training) > 100 and max(in_val) < min(in_training)


def numbers(rows) -> set[int]:
    """Of the documents that begin in these rows, whose texts begin with them."""
    texts = (bytes(token % 256 for token in row) for row in rows)
    return {int(number) for text in texts for number in re.findall(rb"\0<(\d+)>", text)}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("B", "W", "accumulation"), [(4, 1, 4), (4, 2, 2), (2, 4, 2), (4, 4, 1)])
def test_batches_are_those_of_their_loader(tmp_path, monkeypatch, B, W, accumulation, together):
    """Rank by rank and micro-batch by micro-batch, through blocks', shards' and epochs' ends.

    With 4 processes of 4 rows the last ones leave the first shard a turn before the first ones.
    """
    monkeypatch.setattr(file_order, "BLOCK_TOKENS", 50)
    parts = write(tmp_path, suffix=".npy", lengths=(9000, 7003 + 32 * together, 4001))[1:]
    corpus, order = open_corpus(tmp_path), "file" if together else "build-nanogpt"
    options = {"num_lanes": 16 // B, "order": order, "chunk_rows": B * W}
    ours = streams(corpus, W, **options)
    theirs = [Loader(parts, B, T, rank, W, together) for rank in range(W)]
    expected = []
    for _ in range(120):
        step = []
        for stream, loader in zip(ours, theirs, strict=True):
            batches = [next(loader) for _ in range(accumulation)]
            assert next(stream).tokens.tolist() == np.concatenate(batches).tolist()
            step += batches
        expected.append(sorted(np.concatenate(step).tolist()))
    for stream in ours:
        stream.close()
    # On any other number of processes a step has the same rows, also after a stop.
    head, _, state = run(streams(corpus, len(theirs), **options), 51)
    _, rows, _ = run(streams(corpus, 16 // B, state, **options), 69)
    assert [sorted(map(list, step)) for step in rows] == [
        sorted(map(list, {tuple(row) for row in step})) for step in expected[51:]
    ]
    assert head == run(streams(corpus, **options), 51)[0]


def test_processes_of_build_nanogpt_drift_apart(tmp_path):
    """Which is why there are two orders: their rows differ although nothing else does."""
    write(tmp_path, lengths=(9000, 7003, 4001))
    corpus = open_corpus(tmp_path)
    options = {"num_lanes": 4, "chunk_rows": 16}
    together, _, _ = run(streams(corpus, order="file", **options), 60)
    apart, _, _ = run(streams(corpus, order="build-nanogpt", **options), 60)
    assert "4 processes of 4 rows" in str(
        streams(corpus, order="build-nanogpt", **options)[0].plans[0]
    )
    differ = [step for step in range(60) if together[step] != apart[step]]
    assert differ and differ[0] == (7003 - 1) // (16 * T) - 1 and together[:53] == apart[:53]


def test_shards_of_the_hub_are_read_by_ranges(tmp_path, monkeypatch, small_units):
    write(tmp_path)
    files = {f"data/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
    with FakeHub() as hub:
        hub.add("datasets", "someone/tokens", files | {"README.md": b"# Tokens"})
        hub.use_in_process(monkeypatch)
        corpus = open_corpus("someone/tokens", data_files="data/*.bin")
        assert corpus.identity["revision"] and corpus.identity["content"]
        for order in ("shuffled", "file"):
            theirs = run(streams(open_corpus(tmp_path), order=order), 30)[0]
            assert run(streams(corpus, order=order), 30)[0] == theirs
        assert all(request.range for request in hub.requests(r"\.bin$"))
        with pytest.raises(UserError, match=r"data_files: no data files in someone/tokens: \*.npy"):
            open_corpus("someone/tokens", data_files="*.npy")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.bin", ["a_train.bin", "a_val.bin"]),
        ("**/*.bin", ["a_train.bin", "a_val.bin", "more/b_train.bin"]),
        ("more/*.bin", ["more/b_train.bin"]),
        ("?_[!v]*.bin", ["a_train.bin"]),
        ("**.bin", ["a_train.bin", "a_val.bin"]),
        ("./more//*.bin", ["more/b_train.bin"]),
    ],
)
def test_patterns_mean_on_the_hub_what_they_mean_here(tmp_path, monkeypatch, pattern, names):
    write(tmp_path)
    content = next(tmp_path.glob("*train*")).read_bytes()
    every = dict.fromkeys(["a_train.bin", "a_val.bin", "more/b_train.bin"], content)
    with FakeHub() as hub:
        hub.add("datasets", "someone/tokens", every)
        hub.use_in_process(monkeypatch)
        files = opening._shards_on_hub("someone/tokens", "main", pattern)
    assert [file.partition("@main/")[2] for file in files.files] == names
    for name in every:
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_bytes(content)
    found = find_local(str(tmp_path / "here"), config=None, split="train", data_files=pattern)
    assert [str(Path(file).relative_to(tmp_path / "here")) for file in found.files] == names


def test_what_a_directory_alone_says_is_held_out_is_not_trained_on(tmp_path):
    for name in ("val/000.npy", "train/000.npy", "train/001.npy"):
        (path := tmp_path / "valley" / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(path, tokens_of(TEXTS)[:2000].astype(np.uint16))
    assert "val/000.npy would be trained on" in refusal(
        tmp_path / "valley" / "val", data_files="**/*.npy"
    )
    alone = open_corpus(tmp_path / "valley" / "val" / "val")
    assert alone.num_held_out_units == 0, "nothing else is there to train on"


def test_bare_ids_are_read_too(tmp_path):
    """nanoGPT's train.bin and val.bin."""
    tokens = tokens_of(TEXTS)
    tokens[:3000].tofile(tmp_path / "val.bin")
    tokens[3000:].tofile(tmp_path / "train.bin")
    corpus = open_corpus(tmp_path)
    assert corpus.num_held_out_units == 1 and corpus.num_units == 2
    ids, ends, _ = corpus.read_tokens(0, ByteEncoder())
    assert bytes(ids[: ends[0]].astype(np.uint8)).decode() == TEXTS[0]


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_bare_ids_of_more_bits_are_refused(tmp_path, dtype):
    """Megatron's, LitData's and whoever wrote an array as it was: every second id would be 0."""
    tokens_of(TEXTS).astype(dtype).tofile(tmp_path / "train.bin")
    assert "train.bin looks like ids of 32 bits or more" in refusal(tmp_path)
    large = tokens_of(TEXTS).astype(dtype) + 2**16 * (np.arange(len(tokens_of(TEXTS))) % 2 > 0)
    large.astype(dtype).tofile(tmp_path / "train.bin")  # of a vocabulary beyond 16 bits
    assert "looks like ids of 32 bits" in refusal(tmp_path)


def header(*numbers: int) -> bytes:
    return np.array([*numbers, *[0] * (256 - len(numbers))], np.int32).tobytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", header(20240801, 7, 4) + bytes(16), "has magic 20240801 and version 7"),
        ("a.bin", header(20240520, 2, 4) + bytes(8), "has magic 20240520 and version 2"),
        ("a.bin", header(20240520, 1, 5) + bytes(8), "should hold 5 tokens, and its size"),
        ("a.bin", header(20240520, 1, 0), "holds no tokens"),
        ("a.bin", b"", "holds no tokens"),
        ("a.bin", b"123", "should hold 1 tokens, and its size"),
        ("a.npy", b"123", "is no array of NumPy"),
        ("a.npy", b"\x93NUMPY\x09\x00", "is no array of NumPy"),
    ],
)
def test_what_is_no_shard_is_refused_in_a_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path)


def test_arrays_of_another_shape_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4), np.uint16))
    assert "is an array (3, 4) of uint16, not a row of token ids" in refusal(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros(3))
    assert "of float64, not a row of token ids" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([65] * 50, "the first 50 tokens of a.bin have no 256"),
        ([256, 1000], "a.bin has the token 1000, this tokenizer only 257"),
    ],
)
def test_another_tokenizer_is_noticed(tmp_path, ids, message):
    write_bin(tmp_path / "a.bin", np.array(ids))
    with pytest.raises(UserError, match=message):
        open_corpus(tmp_path).read_tokens(0, ByteEncoder())


@pytest.mark.parametrize("ids", [[256, 1000], [256, -5]])
@pytest.mark.parametrize("order", ["shuffled", "file"])
def test_no_order_gives_what_is_no_token(tmp_path, ids, order):
    """A GPU would end the process without a word."""
    np.save(tmp_path / "a.npy", np.array(ids * 200, np.int32))
    with pytest.raises(UserError, match=r"tokenizer_name: a\.npy has the token (1000|-5)"):
        run(streams(open_corpus(tmp_path), order=order), 1)


@pytest.mark.parametrize("name", ["README.md", "readme.MD", "manifest_of_them.json", "._x_val.bin"])
def test_what_lies_beside_shards_changes_nothing(tmp_path, name):
    write(tmp_path)
    before = open_corpus(tmp_path)
    (tmp_path / name).write_text("{}")
    (tmp_path / "meta.pkl").write_bytes(b"")
    after = open_corpus(tmp_path)
    assert after.num_held_out_units == before.num_held_out_units > 0
    assert after.identity == before.identity
    assert "has no split 'validation'" in refusal(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_rows": 2000}, "chunk_rows: a shard does not hold 2000 rows of 8 tokens"),
        ({"order": "build-nanogpt", "chunk_rows": 3}, "chunk_rows 3 .* of 2 rows"),
        ({"order": "build-nanogpt", "chunk_rows": 6}, "chunk_rows 6 .* divides num_lanes, 8"),
    ],
)
def test_turns_that_cannot_be(tmp_path, options, message):
    write(tmp_path)
    with pytest.raises(UserError, match=message):
        streams(open_corpus(tmp_path), **{"order": "file"} | options)


def test_a_damaged_position_is_no_other_row(tmp_path):
    write(tmp_path)
    corpus = open_corpus(tmp_path)
    _, _, state = run(streams(corpus, order="file"), 3)
    state["lanes"][3][0][2] = 10**6
    with pytest.raises(UserError, match="stream position is beyond the rows of the shard"):
        run(streams(corpus, state=state, order="file"), 1)


def test_an_order_of_files_is_that_of_one_dataset_of_shards(tmp_path):
    write(tmp_path / "shards")
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    corpus, text = open_corpus(tmp_path / "shards"), Source(open_corpus(tmp_path / "a.txt"))
    given = {"sequence_length": T, "rows_per_step": 16, "num_lanes": 8, "seed": 3, "order": "file"}
    shard = Source(corpus, corpus.num_held_out_units)
    for sources in ([text], [shard, shard]):
        with pytest.raises(UserError, match="order: file is one of shards of token ids"):
            TokenStream(sources, ByteEncoder(), **given)
    with pytest.raises(UserError, match="order: 'files' is none of shuffled, file, build-nanogpt"):
        TokenStream([shard], ByteEncoder(), **given | {"order": "files"})
    with pytest.raises(UserError, match="say by their names what is held out"):
        TokenStream([Source(corpus, 3)], ByteEncoder(), **given)


def test_shards_above_texts_are_named(tmp_path):
    np.save(tmp_path / "labels.npy", np.arange(4000))
    write_parquet(tmp_path / "data" / "train-0.parquet", TEXTS[:20])
    said = refusal(tmp_path)
    assert said.startswith("data_files: ") and "(labels.npy)" in said
    assert "(data/train-0.parquet): name those that are meant" in said
    assert joined(open_corpus(tmp_path, data_files="data/*")) == TEXTS[:20]
    assert isinstance(open_corpus(tmp_path, data_files="*.npy"), shards.TokenShards)
    (tmp_path / "data" / "train-0.parquet").rename(tmp_path / ".train-0.parquet")
    (tmp_path / "data" / "notes.md").write_text("what it is")
    assert isinstance(open_corpus(tmp_path), shards.TokenShards)
    assert refusal(tmp_path, config="x").startswith("dataset_config: files have none")
