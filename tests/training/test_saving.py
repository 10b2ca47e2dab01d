"""Checkpoints are written beside the training: one at a time, each as it was at its step."""

import errno
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from tiny_run import assert_same_tensors, metrics, tensors, train, without_export, write_inputs

import train_accelerate
from gpt2repro import UserError
from gpt2repro.records import checkpoints, integrity
from gpt2repro.training import run as run_module
from gpt2repro.training.monitor import Monitor
from gpt2repro.training.saving import Checkpoints

LONG = 60.0  # seconds: what waits for so long would wait for ever


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", autouse=True)
def no_export():
    with without_export():
        yield


@pytest.fixture(scope="module")
def waiting(recipe, tmp_path_factory):
    """A run that waited for each of its checkpoints, of steps 4, 8 and 12."""
    run = tmp_path_factory.mktemp("waiting") / "run"
    save = Checkpoints.save

    def save_and_wait(self, *args, **options):
        save(self, *args, **options)
        self.wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_wait)
        assert train(recipe, run, "--keep_last", "9") == 0
    return run


@pytest.fixture
def events(monkeypatch):
    """What happened, in its order: a step that is told, a checkpoint's begin and end on the disk.

    The one of step 4 does not end before the training waits for it.
    """
    happened, awaited = [], threading.Event()
    report, commit, wait = Monitor.report, checkpoints.commit, Checkpoints.wait

    def told(self, step, *rest):
        report(self, step, *rest)
        happened.append(step)

    def committed(scratch, path):
        happened.append(f"{path.name} begins")
        if path.name == "step_00000004":
            assert awaited.wait(LONG)
        commit(scratch, path)
        happened.append(f"{path.name} ends")

    def waited(self):
        if "step_00000004 begins" in happened:
            awaited.set()
        wait(self)

    monkeypatch.setattr(Monitor, "report", told)
    monkeypatch.setattr(checkpoints, "commit", committed)
    monkeypatch.setattr(Checkpoints, "wait", waited)
    return happened


def test_training_goes_on_meanwhile_and_changes_nothing_in_it(recipe, waiting, tmp_path, events):
    assert train(recipe, tmp_path, "--keep_last", "9") == 0
    assert events.index(7) < events.index("step_00000004 ends"), "four steps beside it"
    written = [event for event in events if isinstance(event, str)]
    assert written == [f"step_{n:08d} {what}" for n in (4, 8, 12) for what in ("begins", "ends")]
    for step in (4, 8, 12):
        assert_same_tensors(tensors(tmp_path, step), tensors(waiting, step))
    assert metrics(tmp_path) == metrics(waiting)


def test_the_end_of_a_run_waits_for_it_also_where_it_fails(recipe, tmp_path, monkeypatch):
    """Step 4 is still being written when the run closes: the disk takes its time."""
    closing, commit, close = threading.Event(), checkpoints.commit, Checkpoints.close

    def slow(scratch, path):
        assert closing.wait(LONG)
        time.sleep(0.3)
        commit(scratch, path)

    def break_down(self, step, *rest):
        if step == 6:
            raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Monitor, "report", break_down)
    monkeypatch.setattr(checkpoints, "commit", slow)
    monkeypatch.setattr(Checkpoints, "close", lambda self: (closing.set(), close(self)))
    with pytest.raises(ZeroDivisionError):
        train(recipe, tmp_path)
    assert integrity.find_problem(tmp_path / "checkpoints" / "step_00000004") is None


@pytest.mark.parametrize(
    ("strategy", "pushed"), [("all", [2, 3]), ("permanent", [3]), ("final", [])]
)
def test_which_checkpoints_go_to_the_hub(recipe, tmp_path, monkeypatch, strategy, pushed):
    """That of step 3 is permanent, and has a branch; that of step 2 is not."""
    told = []

    def submit(path, message, branch):
        told.append((path.name, message, branch))

    push = SimpleNamespace(submit=submit, close=lambda *_: None)
    monkeypatch.setattr(run_module, "_open_push", lambda *_: push)
    options = ("--num_steps", "3", "--save_every", "2", "--keep_every", "3")
    assert train(recipe, tmp_path, *options, "--hub_strategy", strategy) == 0
    branches = {2: None, 3: "step00000003"}
    assert told == [(f"step_{n:08d}", f"Step {n}", branches[n]) for n in pushed]


@pytest.mark.parametrize("is_full", ["for good", "for a while"])
def test_one_that_cannot_be_written_ends_the_run(recipe, waiting, tmp_path, monkeypatch, is_full):
    """At the next step, and not at the next checkpoint, which may be hours away.

    The chain then has no link to what was to be permanent and is not there.
    """
    commit, report, told = checkpoints.commit, Monitor.report, []

    def full(scratch, path):
        fits = ["step_00000001"] + ["step_00000003"] * (is_full == "for a while")
        if path.name not in fits:
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(scratch, path)

    def wait_for_it(self, step, *rest):
        report(self, step, *rest)
        told.append(step)
        if step == 2:
            assert written.result(LONG).problem

    submit, written = Checkpoints.save, None

    def save(self, *args, **options):
        nonlocal written
        submit(self, *args, **options)
        written = self._written

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "commit", full)
        patch.setattr(Monitor, "report", wait_for_it)
        patch.setattr(Checkpoints, "save", save)
        with pytest.raises(UserError, match=r"No space left on device"):
            train(recipe, tmp_path, "--keep_steps", "[1, 2]")
    assert told == [0, 1, 2]
    first, *rest = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in rest] == ([] if is_full == "for good" else ["step_00000003"])
    for path in rest:
        assert integrity.find_problem(path) is None
        chain = integrity.read_saved_state(path).chain
        assert chain.begin.step == 1 and len(chain.digests) == 2
        assert chain.previous == checkpoints.record_of(first).sha256
    assert train(recipe, tmp_path, "--keep_steps", "[1, 2]") == 0
    assert metrics(tmp_path) == metrics(waiting)


@pytest.mark.parametrize("step", [3, 5])
def test_a_stop_makes_up_for_one_that_could_not_be_written(
    recipe, waiting, tmp_path, monkeypatch, step, capsys
):
    """Of this very step, or of an earlier one; the scheduler comes back."""
    commit, report, stopped, tries = checkpoints.commit, Monitor.report, threading.Event(), []

    def full_at_first(scratch, path):
        tries.append(path.name)
        if len(tries) == 1:
            assert stopped.wait(LONG)
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(scratch, path)

    def told(self, at, *rest):
        report(self, at, *rest)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
            stopped.set()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "commit", full_at_first)
        patch.setattr(Monitor, "report", told)
        assert train(recipe, tmp_path) == train_accelerate.EXIT_PREEMPTED
    assert "step_00000004 could not be written" in " ".join(capsys.readouterr().out.split())
    assert tries == ["step_00000004", f"step_{step + 1:08d}"]
    assert integrity.find_problem(tmp_path / "checkpoints" / tries[1]) is None
    assert train(recipe, tmp_path) == 0
    assert metrics(tmp_path) == metrics(waiting)


def test_one_that_is_due_makes_up_for_the_one_before(recipe, tmp_path, monkeypatch):
    """A disk so slow that the training meets the failure there; then the run ends."""
    commit, wait, awaited = checkpoints.commit, Checkpoints.wait, threading.Event()

    def full_at_first(scratch, path):
        if path.name == "step_00000004":
            assert awaited.wait(LONG)
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(scratch, path)

    def waited(self):
        if self.saved_step == 4:
            awaited.set()
        wait(self)

    monkeypatch.setattr(checkpoints, "commit", full_at_first)
    monkeypatch.setattr(Checkpoints, "wait", waited)
    with pytest.raises(UserError, match="step_00000004 could not be written"):
        train(recipe, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000008"]


def test_the_last_one_is_tried_again(recipe, waiting, tmp_path, monkeypatch):
    commit, tries = checkpoints.commit, []

    def full_at_first(scratch, path):
        tries.append(path.name)
        if tries.count("step_00000012") == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(scratch, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "commit", full_at_first)
        with pytest.raises(UserError, match="step_00000012 could not be written"):
            train(recipe, tmp_path)
    assert_same_tensors(tensors(tmp_path, 12), tensors(waiting, 12))
    assert train(recipe, tmp_path) == 0
    assert metrics(tmp_path) == metrics(waiting)
