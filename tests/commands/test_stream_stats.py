"""The verb `stream-stats`: figures of a recipe's stream, and a verdict in the exit status."""

import json

import pytest
from tiny_corpus import documents, parquet_bytes

from gpt2repro import UserError
from gpt2repro.commands import stream_stats
from gpt2repro.commands.stream_stats import main
from gpt2repro.data.tokens.bpe import train_bpe
from gpt2repro.data.tokens.encoder import BulkEncoder


@pytest.fixture
def recipe(tmp_path):
    texts = documents(400)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(parquet_bytes(texts, 10))
    train_bpe(texts, 400).save_pretrained(tmp_path / "tokenizer")
    arguments = {
        "recipe": "demo",
        "dataset_name": tmp_path / "data",
        "tokenizer_name": tmp_path / "tokenizer",
        "sequence_length": 64,
        "batch_tokens": 1024,
        "num_lanes": 8,
    }
    return [word for key, value in arguments.items() for word in (f"--{key}", str(value))]


def test_figures_of_a_stream(recipe, tmp_path, capsys):
    output = tmp_path / "stats.json"
    options = ["--num_processes", "4", "--seconds", "0.1", "--output", str(output)]
    assert main([*recipe, *options, "--tokens_per_second", "100"]) == 0
    stats = json.loads(output.read_text())
    assert (stats["units"], stats["training_units"]) == (40, 36)
    assert (stats["lanes_per_process"], stats["pieces_per_lane"]) == (2, 4.5)
    assert stats["requests_per_epoch"] == 36
    assert stats["needed_tokens_per_second"] == 25
    encoder = BulkEncoder(train_bpe(documents(400), 400))
    true = sum(len(ids) + 1 for ids in encoder.encode(documents(400)[40:]))
    assert stats["epoch_tokens_estimate"] == pytest.approx(true, rel=0.3)  # from one unit of ten
    shown = capsys.readouterr().out
    assert "keeps up: " in shown and "training units" in shown


def test_the_rate_is_that_of_the_steps_after_the_first(monkeypatch):
    class Stream:
        def __next__(self):
            return None

        def close(self):
            return None

    times = iter([0.0, 5.0, 5.0, 20.0, 25.0])  # 5 s to the first step, then two in 20 s
    monkeypatch.setattr(stream_stats.time, "perf_counter", lambda: next(times))
    assert stream_stats._time_stream(Stream(), 256, 10.0) == (5.0, 2 * 256 / 20)


def test_a_process_has_its_share_of_a_step(recipe, monkeypatch, tmp_path):
    timed = []
    monkeypatch.setattr(
        stream_stats, "_time_stream", lambda _, tokens, seconds: timed.append(tokens) or (1.0, 2.0)
    )
    assert main([*recipe, "--num_processes", "4"]) == 0
    assert timed == [256]
    two = f"[{{name: {tmp_path / 'data'}, weight: 1}}, {{name: {tmp_path / 'data'}, weight: 1}}]"
    with pytest.raises(UserError, match="datasets: stream-stats counts one"):
        main([*recipe[:2], *recipe[4:], "--datasets", two])


def test_a_rate_that_is_not_reached_is_in_the_exit_status(recipe, capsys):
    assert main([*recipe, "--seconds", "0.1", "--tokens_per_second", "1e12"]) == 1
    assert "does NOT keep up" in capsys.readouterr().out


def test_bad_options_are_refused(recipe):
    with pytest.raises(UserError, match="num_processes: 0"):
        main([*recipe, "--num_processes", "0"])
    for words, said in (
        (["--num_processes", str(10**400)], "num_processes: 1000"),
        (["--seconds", "nan"], "--seconds nan is out of range"),
        (["--seconds", "inf"], "--seconds inf is out of range"),  # it would never end
        (["--tokens_per_second", "-1"], "--tokens_per_second -1.0 is out of range"),
        (["--output", "/dev/null/stats.json"], "--output /dev/null/stats.json"),  # before the work
    ):
        with pytest.raises(UserError, match=said):
            main([*recipe, *words])
    with pytest.raises(UserError, match="--secnds: no such field"):
        main([*recipe, "--secnds", "1"])
