"""The exact stream in loops that are not ours: transformers' Trainer, and torch's own DDP."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub, Fault, impatient
from safetensors.torch import load_file
from tiny_run import write_inputs

from gpt2repro.data import ExactStream

ROOT = Path(__file__).parent.parent
TRAINER, LOOP = ROOT / "examples" / "stream_trainer.py", ROOT / "examples" / "stream_loop.py"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    """The options that name a text and a model small enough for a test."""
    directory = tmp_path_factory.mktemp("texts")
    write_inputs(directory)
    options = ["--dataset_name", directory / "corpus", "--tokenizer", directory / "tokenizer"]
    options += ["--sequence_length", 32, "--rows_per_step", 24, "--micro_batch_size", 4]
    return [*map(str, options), "--width", "32"]


def torchrun(num_processes: int, script: Path, *options: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(num_processes), str(script), *options]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.sweep
def test_trainer_goes_on_at_the_next_row_under_two_processes(texts, tmp_path, monkeypatch):
    options = [*texts, "--num_layers", "1", "--max_steps", "4", "--save_steps", "2", "--output"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    monkeypatch.setattr(sys, "argv", [str(TRAINER), *options, str(whole)])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runpy.run_path(str(TRAINER), run_name="__main__")
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    (parts / "checkpoint-3").mkdir()  # a kill left it half written
    torchrun(2, TRAINER, *options, str(parts))

    states, weights = [], []
    for run in (whole, parts):
        states.append(json.loads((run / "checkpoint-4" / "stream.json").read_text()))
        weights.append(load_file(run / "checkpoint-4" / "model.safetensors"))
    assert states[0] == states[1] and states[0]["step"] == 4
    for name, tensor in weights[0].items():
        # Two processes add the same float32 gradients in another order, twice, at a rate of 6e-4.
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize("loop", ["stream_loop", "stream_trainer"])
def test_two_kills_change_no_row_of_a_mixture(tmp_path, monkeypatch, loop):
    """The benchmark of this name does six on each kind of source; its record is in results."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import kill_loops

    source = kill_loops.write_sources(tmp_path / "inputs")["a mixture of three"]
    found = kill_loops.measure(loop, source, num_kills=2, seed=0, directory=tmp_path)
    assert found["equal"] and found["num_kills"] == len(found["kills"]) == 2


@pytest.mark.parametrize("script", [LOOP, TRAINER], ids=["loop", "trainer"])
def test_a_hub_that_misbehaves_changes_no_row(texts, tmp_path, monkeypatch, capfd, script):
    """Every answer with text goes wrong first, in one of seven ways."""
    stream = ExactStream(texts[1], tokenizer=texts[3], sequence_length=32, rows_per_step=24)
    expected = [f"{stream.digest:016x}" for _ in islice(stream, 6)]
    stream.close()
    last = {LOOP: ["--output", str(tmp_path / "run.pt"), "--num_steps", "6"]}
    last[TRAINER] = ["--output", str(tmp_path / "run"), "--num_layers", "1", "--max_steps", "6"]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in ({"ACCELERATE_USE_CPU": "true"} | (alone if script == LOOP else {})).items():
        monkeypatch.setenv(name, value)
    kinds = ["status:503", "reset", "short", "status:429", "ignore_range", "flood", "status:403"]
    files = {path.name: path.read_bytes() for path in Path(texts[1]).iterdir()}
    impatient(monkeypatch)
    with FakeHub() as hub:
        hub.add("datasets", "someone/data", files)
        hub.use_in_process(monkeypatch)
        hub.faults += [Fault(kind, r"\.parquet$", skip=n) for n, kind in enumerate(kinds)]
        words = [*texts[:1], "someone/data", *texts[2:], *last[script]]
        monkeypatch.setattr(sys, "argv", [str(script), *words])
        runpy.run_path(str(script), run_name="__main__")
        assert sum(fault.num_hits for fault in hub.faults) == len(kinds)
    assert re.findall(r"\brows (\w{16})$", capfd.readouterr().out, re.M) == expected


def test_the_record_says_six_kills_of_each_and_equal_digests():
    record = json.loads((ROOT / "benchmarks" / "results" / "kill_loops.json").read_text())
    assert record["equal"] and record["num_kills"] == 36 and len(record["runs"]) == 6
    for run in record["runs"]:
        assert run["equal"] and len({kill["processes"] for kill in run["kills"]}) > 1
        assert run["epochs"][-1][0] > 0, "every lane has begun anew"


def test_a_bare_loop_has_the_same_rows_under_one_process_and_then_three(
    texts, tmp_path, monkeypatch, capfd
):
    options = [*texts, "--num_lanes", "24", "--output", str(tmp_path / "run.pt"), "--num_steps"]
    monkeypatch.setattr(sys, "argv", [str(LOOP), *options, "3"])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(LOOP), run_name="__main__")
    for name in alone:
        monkeypatch.delenv(name)
    told = capfd.readouterr().out + torchrun(3, LOOP, *options, "5")
    digests = re.findall(r"^step \d+: loss \d+\.\d+, rows (\w{16})$", told, re.M)

    stream = ExactStream(
        texts[1], tokenizer=texts[3], sequence_length=32, rows_per_step=24, num_lanes=24
    )
    expected = [f"{stream.digest:016x}" for _ in islice(stream, 5)]
    stream.close()
    assert digests == expected and len(set(expected)) == 5
