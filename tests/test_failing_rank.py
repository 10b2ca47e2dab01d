"""One of two ranks fails: all end within a minute, one says why, and the same command goes on.

Four launches of one run fail, each in another way; the fifth ends it. See failing_rank.py.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_run import metrics, write_inputs

from gpt2repro.system.failure import GOES_ON, OUT_OF_MEMORY
from gpt2repro.training.engine import LONGEST_WAIT_SECONDS, LOOP_WAIT_SECONDS

ROOT = Path(__file__).parent.parent
SECONDS_TO_END = 60
NUM_STEPS = 16  # saved every fourth


@dataclass(frozen=True)
class Ended:
    """What a launch printed, and when it and all its processes had ended."""

    status: int
    log: str
    at: float

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(told) for told in re.findall(r"^EVENT (.*)$", self.log, re.M)]

    def moment(self, event: str) -> float:
        return next(told["at"] for told in self.events if told["event"] == event)


def launch(recipe: Path, output: Path, *fault: object) -> Ended:
    """`accelerate launch`, with one of the FAULTS, its rank and its step, or none."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "launch" / "cpu2.yaml")]
    command += [str(Path(__file__).with_name("failing_rank.py")), "--recipe", str(recipe)]
    command += ["--output_dir", str(output), "--num_steps", str(NUM_STEPS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= dict(zip(("FAULT", "FAULT_RANK", "FAULT_STEP"), map(str, fault), strict=False))
    log = output.with_name("launch.log")
    with log.open("w") as file:
        launcher = psutil.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            launcher.wait(timeout=180)
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            pytest.fail(f"a launch hangs:\n{log.read_text()}")
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in (*launcher.children(recursive=True), launcher):
                    process.kill()
    ended = Ended(launcher.returncode, log.read_text(), time.time())
    assert not any(psutil.pid_exists(told["pid"]) for told in ended.events), ended.log
    return ended


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("failing") / "run"


@pytest.fixture(scope="module")
def launches(run) -> dict[str, Ended]:
    recipe = write_inputs(run.parent)
    return {
        "exception": launch(recipe, run, "exception", 1, 5),
        "out of memory": launch(recipe, run, "out of memory", 0, 9),
        "killed": launch(recipe, run, "killed", 1, 13),
        "data": launch(recipe, run, "data", 1, 13),
        "none": launch(recipe, run),
    }


@pytest.mark.parametrize(
    ("fault", "num_tracebacks", "message", "exit_code"),
    [
        ("exception", 1, "rank 1 of 2 failed: its error is above. ", 1),
        ("out of memory", 1, f"rank 0 of 2 ran out of memory. {OUT_OF_MEMORY} ", 1),
        ("killed", 0, "rank 0 of 2 lost another (Connection ", -9),
    ],
)
def test_all_end_at_once_and_one_says_why(launches, fault, num_tracebacks, message, exit_code):
    ended = launches[fault]
    assert ended.status == 1
    assert ended.at - ended.moment("fault") < SECONDS_TO_END
    ours, _, launchers = ended.log.partition(" failed (exitcode: ")
    (failed,) = {told["rank"] for told in ended.events if told["event"] == "fault"}
    assert re.search(rf"rank +: {failed} .*\n +exitcode +: {exit_code} ", launchers), launchers
    assert ours.count("Traceback") == num_tracebacks, ended.log
    assert ours.count(f"\ntrain_accelerate.py: {message}") == 1, ended.log
    assert ours.count("train_accelerate.py: ") == ours.count(GOES_ON) == 1, ended.log


def test_data_that_fail_on_one_rank_cost_no_step(launches, run):
    ended = launches["data"]
    assert ended.status == 1  # the launcher's; each rank has 2
    assert ended.log.count("Traceback") == ended.log.count("torch/distributed/run.py")
    assert "Stopped at step 14, saved in" in ended.log
    assert ended.log.count("the token has expired") == 1, ended.log
    assert "exitcode  : 2 " in ended.log


def test_the_same_command_goes_on(launches, run):
    steps = {"out of memory": 4, "killed": 8, "data": 12, "none": 14}
    for fault, step in steps.items():
        assert f"going on from its step {step}." in launches[fault].log
    assert launches["none"].status == 0, launches["none"].log
    assert [line["step"] for line in metrics(run)] == [*range(NUM_STEPS + 1)]


def test_rank_0_publishes_alone_however_long_it_takes(launches):
    """The other has left by then, with status 0."""
    ended = launches["none"]
    left = {told["rank"]: told for told in ended.events if told["event"] == "left"}
    assert left[0]["status"] == left[1]["status"] == 0
    assert left[1]["at"] < ended.moment("published") < left[0]["at"]


def test_ranks_wait_long_for_one_that_works_alone_and_less_within_the_loop(launches):
    """The first step of a launch compiles; rank 0 writes the checkpoint of step 4 alone."""
    for fault, first in {"exception": 0, "out of memory": 4}.items():
        waits = {
            told.get("step", told["event"]): told["wait_seconds"]
            for told in launches[fault].events
            if "wait_seconds" in told
        }
        assert waits[first] == waits["save"] == LONGEST_WAIT_SECONDS
        assert waits[first + 1] == waits[first + 5] == LOOP_WAIT_SECONDS
