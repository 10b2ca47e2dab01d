"""metrics.jsonl: valid lines, there at once, and cut back to where a run goes on."""

import errno
import json
import math
import os

import pytest

from gpt2repro.records.metrics import (
    MetricsLog,
    comparable,
    read_lines,
    read_metrics,
    rewind_metrics,
)
from gpt2repro.system import command_line


def test_lines_are_valid_json_and_there_at_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 0, "loss": float("nan"), "grad_norm": math.inf, "rows_digest": "00"})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 0, "loss": None, "grad_norm": None, "rows_digest": "00"}
    log.close()


def test_lines_are_counted(tmp_path):
    """A checkpoint tells a launch how many there must be."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.num_lines == 0
    for step in range(3):
        log.write({"step": step})
    assert log.num_lines == 3
    log.close()
    log = MetricsLog(tmp_path / "metrics.jsonl", num_lines=3)
    log.write({"step": 3})
    assert log.num_lines == 4 == len(read_metrics(log.path))
    log.close()


def test_lines_after_another_file_took_its_place_are_not_lost(tmp_path):
    """As `sed -i` or an editor puts one there."""
    log, path = MetricsLog(tmp_path / "metrics.jsonl"), tmp_path / "metrics.jsonl"
    log.write({"step": 0, "loss": 1.0})
    (tmp_path / "copy").write_bytes(path.read_bytes())
    (tmp_path / "copy").replace(path)
    log.write({"step": 1, "loss": 1.0})
    log.make_durable()
    log.write({"step": 2, "loss": 1.0})
    log.make_durable()
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2]
    assert len(path.read_text().splitlines()) == log.num_lines == 3
    log.close()


def test_a_disk_that_is_full_when_they_are_put_back_keeps_what_is_there(tmp_path, monkeypatch):
    log, path = MetricsLog(tmp_path / "metrics.jsonl"), tmp_path / "metrics.jsonl"
    log.write({"step": 0, "loss": 1.0})
    (tmp_path / "copy").write_bytes(path.read_bytes())
    (tmp_path / "copy").replace(path)
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr("pathlib.Path.write_text", lambda *_, **__: (_ for _ in ()).throw(full))
        with pytest.raises(OSError, match="No space left"):
            log.make_durable()
    log.write({"step": 1, "loss": 1.0})
    assert [line["step"] for line in read_metrics(path)] == [0]
    log.make_durable()
    assert [line["step"] for line in read_metrics(path)] == [0, 1]
    log.close()


def test_a_disk_that_fails_at_a_checkpoint_names_the_file(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")

    def fails(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=str(log.path)):
        log.make_durable()
    log.close()


def test_losses_compare_that_are_of_as_much_text_as_the_last():
    lines = [
        {"step": 0, "val_loss": 9.0, "val_tokens": 512},
        {"step": 1, "loss": 8.0},
        {"step": 2, "val_loss": 8.0, "val_tokens": 1024},
        {"step": 3, "val_loss": float("nan"), "val_tokens": 512},
        {"step": 4, "val_loss": 7.0, "val_tokens": 1024},
        {"step": 5, "val_loss": None},
    ]
    assert [line["step"] for line in comparable(lines)] == [2, 4]
    assert comparable(lines[1:2]) == []
    of_before = [{"step": 0, "val_loss": 9.0}, {"step": 5, "val_loss": 8.0}]  # earlier versions
    assert comparable(of_before) == of_before


def test_going_back_cuts_later_lines_and_torn_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert rewind_metrics(path, 0) == [] and path.read_text() == ""
    lines = [f'{{"step": {step}, "loss": {step}.5}}\n' for step in range(6)]
    path.write_text("".join(lines) + '{"step": 6, "lo')
    assert [line["step"] for line in read_metrics(path)] == [*range(6)]
    assert [line["step"] for line in rewind_metrics(path, 4)] == [0, 1, 2, 3]
    assert path.read_text() == "".join(lines[:4])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert read_metrics(tmp_path / "nowhere.jsonl") == []


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\0" * 30,
        b"{}",
        b"[1]",
        b'{"step": 2, "lo',
        b'{"step": "2"}',
        b'{"step": -1}',
        b'{"step": true}',
        b'{"step": 2, "loss": "low"}',
        b'{"step": 2, "loss": NaN}',
        b'{"step": 2, "lr": [1]}',
        b'{"step": 2}\xff',
        b'{"step": 2, "loss": 1.5}{"step": 3}',
    ],
)
def test_a_line_that_cannot_be_read_is_told_and_drops_no_other(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "rows_digest": "a"}\n' + line + b'\n{"step": 4, "loss": null}')
    records, bad = read_lines(path)
    assert ([record["step"] for record in records], bad) == ([0, 4], [2])


def test_a_full_disk_names_the_file_and_the_remedy(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    log = MetricsLog(path)

    def train(argv: list[str]) -> int:
        try:
            log.write({"step": 0})
        finally:
            log.close()
        return 0

    assert command_line.run("prog", train, []) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"No space left on device: '{path}': free space there" in said
