"""Checkpoints for good: saved at exactly the steps that the recipe names, and never pruned."""

from pathlib import Path

import pytest
from tiny_run import digests, tensors, train, write_inputs

from gpt2repro.records import checkpoints
from gpt2repro.training import finish


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Exports have tests of their own."""
    monkeypatch.setattr(finish, "_publish", lambda *_: None)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


FEW = ("--keep_last", "1", "--save_every", "0", "--eval_every", "0")


def steps(run: Path, place: str = "checkpoints") -> list[int]:
    return [int(path.name[5:]) for path in sorted((run / place).glob("step_*"))]


def kept(run: Path) -> list[int]:
    paths = sorted((run / "checkpoints").glob("step_*"))
    return [int(p.name[5:]) for p in paths if checkpoints.read_state(p)["permanent"]]


def test_log_spaced_ones_are_saved_and_stay_through_stops_rollbacks_and_other_recipes(
    recipe, tmp_path
):
    run = tmp_path / "run"
    assert train(recipe, run, *FEW, "--keep_steps", "log", "--keep_every", "5") == 0
    assert steps(run) == [0, 1, 2, 4, 5, 10, 12] and kept(run) == [0, 1, 2, 4, 5, 10]
    plain = tmp_path / "plain"
    assert train(recipe, plain, *FEW) == 0
    assert steps(plain) == [12] and kept(plain) == []
    assert digests(run) == digests(plain)
    ours, theirs = tensors(run, 12), tensors(plain, 12)
    assert all(ours[name].equal(theirs[name]) for name in theirs)  # saving at step 0 draws nothing

    # Back to step 4, with other steps: 4 itself was permanent and stays, 5 and 10 are another line.
    back = ("--resume", str(run / "checkpoints" / "step_00000004"))
    assert train(recipe, run, *FEW, *back, "--num_steps", "9", "--keep_steps", "7") == 0
    assert steps(run) == [0, 1, 2, 4, 7, 9] and kept(run) == [0, 1, 2, 4, 7]
    assert steps(run, "checkpoints/superseded") == [5, 10, 12]

    # The step where a launch goes on becomes permanent if its recipe names it.
    assert train(recipe, run, *FEW, "--num_steps", "11", "--keep_steps", "9,10") == 0
    assert steps(run) == [0, 1, 2, 4, 7, 9, 10, 11] and kept(run) == [0, 1, 2, 4, 7, 9, 10]


def test_epochs_are_counted_as_ever(recipe, tmp_path):
    options = ("--num_epochs", "1", "--batch_tokens", "1024", "--keep_every", "3")
    assert train(recipe, tmp_path / "run", *FEW, *options) == 0
    last = steps(tmp_path / "run")[-1]
    assert last > 3 and kept(tmp_path / "run") == [*range(3, last + 1, 3)]
