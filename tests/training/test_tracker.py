"""A run that was stopped, killed, moved or sent back is one run for a tracker: each step once.

The last tests need the trackers themselves (`pip install -e ".[trackers]"`), write to temporary
directories and use no network; where one is not installed they are counted as skipped. The others
have a stand-in for accelerate's side of one.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import LoggerType
from tiny_run import metrics, reset_accelerate, train, write_inputs

from gpt2repro import recipe as recipes
from gpt2repro.training import finish
from gpt2repro.training.monitor import Monitor
from gpt2repro.training.tracker import Tracker, TrackerRun

KEPT = ("--keep_last", "9", "--eval_every", "0", "--sample_every", "5")
Steps = list[tuple[int, float]]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(finish, "_publish", lambda *_: None)
    return write_inputs(tmp_path)


class Killed(Exception):
    pass


def train_until(step: int, *arguments: Any) -> None:
    """As if killed when it has told of `step`; a checkpoint of step 4 is there, none later."""

    def report_and_die(self, at, *rest):
        report(self, at, *rest)
        if at == step:
            raise Killed

    report = Monitor.report
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Monitor, "report", report_and_die)
        train(*arguments)


def losses(run: Path) -> Steps:
    return [(line["step"], line["loss"]) for line in metrics(run) if "loss" in line]


# --- With a stand-in ------------------------------------------------------------------------------


class Service:
    """What a tracker keeps: its runs by id, each with its name and the lines it was told."""

    name = "wandb"

    def __init__(self) -> None:
        self.runs: dict[str, tuple[str, list[tuple[int, dict[str, Any]]]]] = {}
        self.fails, self.finished, self.tracker = False, 0, None

    def init_trackers(self, accelerator, _project, config, init_kwargs) -> None:
        how = init_kwargs["wandb"]
        assert how["group"] == "tiny" and how["resume"] == "allow" and config["max_lr"]
        self._lines = self.runs.setdefault(how["id"], (how.get("name", ""), []))[1]
        accelerator.trackers = [self]

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.fails:
            raise ConnectionError("no route to host")
        self._lines.append((step, values))

    def finish(self) -> None:
        self.finished += 1
        if self.fails:
            raise ConnectionError("no route to host")

    def told(self) -> dict[str, Steps]:
        """Each run's losses, by its name."""
        return {
            name: [(step, values["loss"]) for step, values in lines if "loss" in values]
            for name, lines in self.runs.values()
        }


@pytest.fixture
def service(monkeypatch) -> Service:
    service = Service()
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    monkeypatch.setattr(
        Accelerator, "init_trackers", lambda *given, **more: service.init_trackers(*given, **more)
    )
    return service


TOLD = ("--report_to", "wandb", "--keep_last", "9", "--eval_every", "0")


def test_a_run_that_is_killed_and_goes_on_is_told_once(recipe, tmp_path, service):
    run = tmp_path / "run"
    train_until(2, recipe, run, *TOLD)  # before there is any checkpoint
    train_until(6, recipe, run, *TOLD)
    assert train(recipe, run, *TOLD) == 0
    assert service.told() == {"tiny": losses(run)} and len(losses(run)) == 12
    (tracker_id,) = service.runs
    saved = json.loads((run / "checkpoints" / "step_00000012" / "state.json").read_text())
    assert saved["tracker"] == json.loads((run / "tracker.json").read_text())
    assert saved["tracker"] == {"report_to": "wandb", "id": tracker_id, "name": "tiny"}
    assert service.finished == 3
    assert train(recipe, run, *TOLD, "--num_steps", "14", "--max_lr", "1e-3") == 0
    assert [*service.told()] == ["tiny"]  # a longer run, after its end
    steps = [step for step, _ in service.runs[tracker_id][1]]
    assert steps == [*range(15)]


@pytest.mark.parametrize("way", ["another rate", "an earlier checkpoint"])
def test_what_comes_otherwise_is_another_run_with_all_that_was_before(
    recipe, tmp_path, service, way
):
    run = tmp_path / "run"
    train_until(6, recipe, run, *TOLD, "--save_every", "2")
    before = losses(run)
    back = ("--resume", str(run / "checkpoints" / "step_00000004"))
    other = ("--max_lr", "5e-3") if way == "another rate" else back
    train_until(7, recipe, run, *TOLD, "--save_every", "100", *other)
    assert train(recipe, run, *TOLD, "--save_every", "100", *other) == 0
    at = "00000006" if way == "another rate" else "00000004"
    told = service.told()
    if way == "another rate":  # step 6 told the same as what comes
        assert told == {"tiny": losses(run)}
        return
    assert told == {"tiny": before, f"tiny-from-{at}": losses(run)}
