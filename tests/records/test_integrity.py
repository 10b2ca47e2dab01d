"""What is damaged is found before a run goes on from it, and the one before is taken."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_checkpoint

from gpt2repro import UserError
from gpt2repro.records import checkpoints, integrity

STREAM = {"version": 2, "identity": {}, "step": 20, "lanes": [[[0, 0, 0, 0]], [[0, 1, 2, 3]]]}


@pytest.fixture
def run(tmp_path) -> Path:
    """Checkpoints before steps 10 and 20."""
    for step in (10, 20):
        save_checkpoint(tmp_path, step, recipe={"micro_batch_size": 1}, world_size=1, stream=STREAM)
    return tmp_path


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", [*integrity.FILES, integrity.MARKER])
def test_a_flipped_bit_anywhere_is_found(run, file):
    newest, before = run / "step_00000020", run / "step_00000010"
    size = (newest / file).stat().st_size
    for place in range(0, size, max(1, size // 40)):
        flip(newest / file, place)
        found, broken = checkpoints.find_latest(run)
        assert found == before and [*broken] == [newest], place
        with pytest.raises(UserError, match="no complete checkpoint: "):
            checkpoints.read_state(newest)
        flip(newest / file, place)
    assert checkpoints.find_latest(run) == (newest, {})


@pytest.mark.parametrize("file", integrity.FILES)
def test_a_lost_or_shortened_file_is_found(run, file):
    path = run / "step_00000020" / file
    content = path.read_bytes()
    for damage, reason in (
        (lambda: os.truncate(path, 1), f"{file} has another size than the marker lists"),
        (lambda: path.unlink(), f"it lacks {file}"),
        (lambda: path.mkdir(), f"it lacks {file}"),
    ):
        damage()
        assert integrity.find_problem(path.parent) == reason
    path.rmdir()
    path.write_bytes(content)
    assert integrity.find_problem(path.parent) is None


Change = Callable[[dict], None]
TENSORS: list[tuple[str, Change, str]] = [
    (
        integrity.WEIGHTS,
        lambda t: t["transformer.wte.weight"].__setitem__((1, 1), float("nan")),
        "wte.weight holds values that are not finite",
    ),
    (
        integrity.OPTIMIZER,
        lambda t: t["transformer.wpe.weight/exp_avg_sq"].fill_(float("inf")),
        "wpe.weight/exp_avg_sq holds values that are not finite",
    ),
    (
        integrity.OPTIMIZER,
        lambda t: t.pop("transformer.wpe.weight/exp_avg_sq"),
        "optimizer state of transformer.wpe.weight is lacking",
    ),
    (
        integrity.OPTIMIZER,
        lambda t: [t.pop(name) for name in [*t] if "wpe.weight/" in name],
        "optimizer state of transformer.wpe.weight is lacking",
    ),
    (
        integrity.OPTIMIZER,
        lambda t: [t.pop(name) for name in [*t] if "/" in name],
        "optimizer state of .* is lacking",
    ),
    (
        integrity.OPTIMIZER,
        lambda t: t.update({"transformer.h.7.ln_1.weight/exp_avg": torch.zeros(4)}),
        "h.7.ln_1.weight/exp_avg belongs to no parameter",
    ),
    (
        integrity.OPTIMIZER,
        lambda t: t.update({"transformer.wpe.weight/exp_avg": torch.zeros(4)}),
        "wpe.weight/exp_avg belongs to no parameter",
    ),
    (
        integrity.OPTIMIZER,
        lambda t: t.update({"transformer.h.7.ln_1.weight/step": torch.tensor(1.0)}),
        "h.7.ln_1.weight/step belongs to no parameter",
    ),
    (
        integrity.OPTIMIZER,
        lambda t: t.pop("rng.0.cpu"),
        "a random number generator's state is lacking",
    ),
]


@pytest.mark.parametrize(("file", "change", "reason"), TENSORS)
def test_what_was_written_wrong_is_found_although_the_marker_agrees(run, file, change, reason):
    newest = run / "step_00000020"
    tensors = load_file(newest / file)
    change(tensors)
    save_file(tensors, newest / file)
    (newest / integrity.MARKER).unlink()
    integrity.mark(newest)
    with pytest.raises(UserError, match=reason):
        checkpoints.read_state(newest)
    assert checkpoints.find_latest(run)[0] == run / "step_00000010"


STATES: list[tuple[dict, str]] = [
    ({"step": -1}, "state.json: step"),
    ({"step": "20"}, "state.json: step"),
    ({"step": True}, "state.json: step"),
    ({"step": 21}, "it is one of step 21"),
    ({"recipe": []}, "state.json: recipe"),
    ({"world_size": 0}, "state.json: world_size"),
    ({"world_size": 2}, "a random number generator's state is lacking"),
    ({"num_epochs": 1.5}, "state.json: num_epochs"),
    ({"stream": []}, "state.json: stream"),
    ({"stream": {}}, "state.json: stream.version"),
    ({"stream": STREAM | {"lanes": [[[0, 0, 0]]]}}, "state.json: stream.lanes.0"),
    ({"stream": STREAM | {"lanes": [[[0, 0, 0, -1]]]}}, "state.json: stream.lanes.0.0.3"),
    ({"stream": STREAM | {"lanes": [[[0, 0, 0.5, 0]]]}}, "state.json: stream.lanes.0.0.2"),
    ({"stream": STREAM | {"lanes": None}}, "state.json: stream.lanes"),
]


@pytest.mark.parametrize(("change", "reason"), STATES)
def test_a_state_that_makes_no_sense_is_found(run, change, reason):
    newest = run / "step_00000020"
    state = json.loads((newest / integrity.STATE).read_text())
    (newest / integrity.STATE).write_text(json.dumps(state | change))
    (newest / integrity.MARKER).unlink()
    integrity.mark(newest)
    found, broken = checkpoints.find_latest(run)
    assert found == run / "step_00000010" and reason in broken[newest]


@pytest.mark.parametrize("content", ["[]", "null", "{}", "[[[[", '"step"', '{"step": NaN}', "\x00"])
def test_a_state_or_marker_of_another_shape_is_found(run, content):
    newest = run / "step_00000020"
    (newest / integrity.STATE).write_text(content)
    (newest / integrity.MARKER).unlink()
    integrity.mark(newest)
    assert integrity.find_problem(newest)
    (newest / integrity.MARKER).write_text(content)
    assert integrity.find_problem(newest)


@pytest.mark.parametrize(("step", "may_lack"), [(0, True), (5, True), (6, False)])
def test_optimizer_state_may_lack_until_an_update_must_have_been(tmp_path, step, may_lack):
    """Of the first five all may have been skipped; a sixth in a row would have ended the run."""
    path = save_checkpoint(tmp_path, step)
    tensors = load_file(path / integrity.OPTIMIZER)
    save_file({"rng.0.cpu": tensors["rng.0.cpu"]}, path / integrity.OPTIMIZER)
    (path / integrity.MARKER).unlink()
    integrity.mark(path)
    problem = integrity.find_problem(path)
    assert (problem is None) if may_lack else ("is lacking" in problem)


def test_a_checkpoint_under_another_name_is_one(run):
    """Somebody's copy: `--resume DIRECTORY` goes on from it, `auto` does not look at it."""
    copy = (run / "step_00000020").rename(run / "step_00000020.best")
    assert integrity.find_problem(copy) is None and integrity.is_whole(copy)
    assert checkpoints.read_state(copy)["step"] == 20
    assert checkpoints.find_latest(run) == (run / "step_00000010", {})


def test_one_without_a_marker_or_a_file_is_not_whole(run):
    newest, before = run / "step_00000020", run / "step_00000010"
    assert integrity.is_whole(newest) and integrity.is_whole(before)
    (newest / integrity.MARKER).unlink()
    (before / integrity.WEIGHTS).unlink()
    assert not integrity.is_whole(newest) and not integrity.is_whole(before)
