"""`accelerate launch` for real, on a Hub: the same rows under 1, 2 and 1 + 1 processes; signals.

One run lives through several launches, each ended in another way, and is then compared with a run
that was never stopped. Every launch costs seconds, so each shows several things.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from fake_hub import FakeHub
from tiny_run import digests, free_port, metrics, stop_after, train, write_inputs

import train_accelerate
from gpt2repro.records import checkpoints

ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 180  # for a busy machine; on a quiet one every wait is a few seconds
NUM_EXPECTED = 120  # steps; about twice as many as the launches do together
CARD = b"""---
configs:
- config_name: tiny
  data_files: tiny/*
---
"""


@pytest.fixture(scope="module")
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def recipe(hub, tmp_path_factory) -> Path:
    """The tiny run with dataset and tokenizer on the Hub, and more steps than any launch does."""
    directory = tmp_path_factory.mktemp("inputs")
    path = write_inputs(directory)
    texts = (directory / "corpus" / "0.parquet").read_bytes()
    hub.add("datasets", "someone/texts", {"README.md": CARD, "tiny/0.parquet": texts})
    tokenizer = {file.name: file.read_bytes() for file in (directory / "tokenizer").iterdir()}
    hub.add("models", "someone/tokenizer", tokenizer)
    values = yaml.safe_load(path.read_text())
    values |= {"dataset_name": "someone/texts", "dataset_config": "tiny"}
    values |= {"tokenizer_name": "someone/tokenizer", "num_steps": 2000}
    # Slow training, so that rounding (sums over other numbers of processes) stays rounding.
    values |= {"max_lr": 1e-3, "eval_every": 40, "save_every": 8}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def expected(hub, recipe, tmp_path_factory) -> Path:
    """The first steps of the run by one process that is never stopped before."""
    directory = tmp_path_factory.mktemp("expected") / "run"
    with pytest.MonkeyPatch.context() as patch:
        hub.use_in_process(patch)
        stop_after(patch, step=NUM_EXPECTED - 1)
        assert train(recipe, directory) == train_accelerate.EXIT_PREEMPTED
    return directory


class Launch:
    """`accelerate launch` of the run in `output`, as a user types it."""

    def __init__(
        self, hub: FakeHub, recipe: Path, output: Path, *options: str, **environment: str
    ) -> None:
        self.output = output
        self.workers: list[psutil.Process] = []
        self.log = output.with_name(f"launch_{time.monotonic_ns()}.log")
        command = [*self.launcher(*options), "--recipe", str(recipe), "--output_dir", str(output)]
        environment = os.environ | hub.env | {"OMP_NUM_THREADS": "1"} | environment
        with self.log.open("w") as log:
            self.process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def launcher(self, *options: str) -> list[str]:
        command = [sys.executable, "-m", "accelerate.commands.launch", *options]
        return [*command, str(ROOT / "train_accelerate.py")]

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.workers, self.process):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"no {what}:\n{self.log.read_text()}"
            time.sleep(0.02)

    def train_to(self, step: int) -> dict[int, psutil.Process]:
        """The training processes by rank, once `step` has been logged."""

        def there() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return last_step(self.output) >= step

        self.wait_for(there, f"step {step}")
        self.workers = self.process.children(recursive=True)
        return {int(worker.environ().get("RANK", 0)): worker for worker in self.workers}

    def ended(self) -> int:
        """The launcher's exit status, once it and its processes are gone."""
        self.wait_for(lambda: self.process.poll() is not None, "end of the launcher")
        self.wait_for(lambda: all(map(has_ended, self.workers)), "end of the processes")
        return self.process.poll()


def has_ended(process: psutil.Process) -> bool:
    """Also if nobody is there to reap it."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def last_step(output: Path) -> int:
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else -1


def assert_saved_at_once(launch: Launch) -> None:
    """The stop cost nothing: the newest checkpoint is where the metrics end."""
    output = launch.output
    path, broken = checkpoints.find_latest(output / "checkpoints")
    assert path and not broken
    assert checkpoints.read_state(path)["step"] == last_step(output) + 1
    assert (output / "PREEMPTED").exists()
    said = launch.log.read_text()
    assert said.count("Stopped at step") == 1 and "The same command goes on" in said


def test_a_run_through_launches_of_every_kind(hub, recipe, expected, tmp_path):
    run = tmp_path / "run"
    one = ("--config_file", str(ROOT / "launch" / "cpu.yaml"))
    two = ("--config_file", str(ROOT / "launch" / "cpu2.yaml"), "--main_process_port", "0")

    # Two processes; the launcher passes SIGTERM on.
    with Launch(hub, recipe, run, *two) as launch:
        launch.train_to(10)
        launch.process.send_signal(signal.SIGTERM)
        assert launch.ended() != 0
        assert_saved_at_once(launch)
    path, _ = checkpoints.find_latest(run / "checkpoints")
    assert path and checkpoints.read_state(path)["world_size"] == 2

    # One process goes on; the launcher dies of a signal, the process gets to know and saves.
    with Launch(hub, recipe, run, *one) as launch:
        launch.train_to(last_step(run) + 5)
        launch.process.send_signal(signal.SIGUSR1)
        assert launch.ended() == -signal.SIGUSR1
        assert_saved_at_once(launch)

    # Two machines; a process of the second is told to stop, and both agree.
    machines = (*two, "--num_machines", "2", "--num_processes", "2")
    machines += ("--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()))
    with (
        Launch(hub, recipe, run, *machines, "--machine_rank", "0") as first,
        Launch(hub, recipe, run, *machines, "--machine_rank", "1") as second,
    ):
        ranks = first.train_to(last_step(run) + 5) | second.train_to(0)
        assert ranks.keys() == {0, 1}
        ranks[1].send_signal(signal.SIGTERM)
        assert first.ended() != 0 and second.ended() != 0
        assert_saved_at_once(first)
        for launch in (first, second):
            assert f"exitcode  : {train_accelerate.EXIT_PREEMPTED}" in launch.log.read_text()

    reached = last_step(run)
    assert 10 + 2 * 5 <= reached < NUM_EXPECTED
    steps = range(reached + 1)
    theirs = digests(expected)
    assert digests(run) == {step: theirs[step] for step in steps}
    ours = [line["loss"] for line in metrics(run)]
    undisturbed = [line["loss"] for line in metrics(expected)[: len(ours)]]
    # fp32 sums in another order, over a few hundred steps
    torch.testing.assert_close(ours, undisturbed, rtol=1e-3, atol=0)


# --- Slurm ----------------------------------------------------------------------------------------


class SlurmJob(Launch):
    """launch/slurm.sh, where `srun` and `scontrol` are scripts of ours."""

    def launcher(self, *options: str) -> list[str]:
        return ["bash", str(ROOT / "launch" / "slurm.sh"), *options]


@pytest.mark.sweep
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_stops_a_run_that_saves_and_comes_back_if_it_was_warned(
    hub, recipe, tmp_path, number
):
    """A signal goes to every process of the step, as Slurm sends it: shell, launcher and ranks."""
    programs, run = tmp_path / "bin", tmp_path / "run"
    programs.mkdir()
    for name, line in {
        "srun": 'shift; exec "$@"',
        "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" > {tmp_path}/queue',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{line}\n")
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ACCELERATE_USE_CPU": "true",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "this",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_GPUS_ON_NODE": "2",
        "MAIN_PORT": str(free_port()),
    }
    with SlurmJob(hub, recipe, run, **environment) as job:
        job.train_to(5)
        for process in job.workers:
            process.send_signal(number)
        warned = number == signal.SIGUSR1
        assert job.ended() == (0 if warned else 143), job.log.read_text()
        assert_saved_at_once(job)
        queue = tmp_path / "queue"
        assert (queue.read_text() if queue.exists() else "") == ("requeue 7\n" if warned else "")
        assert not warned or f"exitcode  : {train_accelerate.EXIT_PREEMPTED}" in job.log.read_text()
