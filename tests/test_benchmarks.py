"""The benchmarks measure what they say, tried on models that take no time."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from tiny_run import as_if_in_its_own_process, write_inputs

from gpt2repro import UserError
from gpt2repro.records import checkpoints
from gpt2repro.training.run import Run

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))  # of contestants


def test_a_paired_ratio_is_within_rounds():
    from pairing import paired_ratio

    # The second round was four times slower for both; 1.5, 2 and 2.5 within rounds.
    ratio = paired_ratio([3.0, 16.0, 5.0], [2.0, 8.0, 2.0])
    assert ratio == {"median": 2.0, "quartile_1": 1.75, "quartile_3": 2.25}


def test_who_began_a_round_comes_last_in_the_next():
    from pairing import alternate

    order = []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def turn(self):
            order.append(self.name)
            return {"seconds": 1.0}

        def ask(self, request):
            order.append(request)

    turns = alternate([Recorded("a"), Recorded("b")], num_rounds=2, num_warmups=1)
    assert order == ["a", "reset_peak_memory", "b", "reset_peak_memory", *"abba"]
    assert {name: len(measured) for name, measured in turns.items()} == {"a": 2, "b": 2}


SWEEP = pytest.mark.sweep


@SWEEP
@pytest.mark.parametrize("command", ["correct", "fast", "real"])
def test_what_waits_for_a_gpu_is_walked_on_a_cpu(command, tmp_path, capsys):
    import gpu

    assert gpu.main([command, "--dry_run", "--output", str(tmp_path)]) == 0
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert all("failed" not in record["step"] for record in records.values())
    if command == "correct":
        assert records["tests"]["skipped"] == records["tests"]["tests"] > 0
        assert records["engines"]["resume"]["weights_bitwise_equal"]
    elif command == "fast":
        step = records["step"]
        assert step["loss"].keys() == {"theirs", "ours", "bf16_residual+fp8_head"}
        assert "No module named" in step["failed"]["sdpa_flash_3"]  # it says why
        for loss in step["loss"].values():  # untrained, of 99 tokens
            assert loss == pytest.approx(math.log(99), abs=0.1)
        assert step["memory_ratio"]["theirs"] == pytest.approx(
            step["peak_memory_bytes"]["ours"] / step["peak_memory_bytes"]["theirs"]
        )
        assert step["kernels"] and records.keys() == {"step", "decode", "loop"}
    else:
        assert records["pretrain"]["runs"]["muon"]["resumed_at"] == 3
    capsys.readouterr()
    assert gpu.main([command, "--dry_run", "--output", str(tmp_path)]) == 0
    assert "has its record" in capsys.readouterr().out


def test_a_step_that_hangs_is_ended_and_taken_again(tmp_path, capfd):
    import gpu

    step = gpu.Step("slow", [str(ROOT / "benchmarks" / "gpu.py"), "--help"], limit=0.01)
    options = gpu.Namespace(output=tmp_path, dry_run=True)
    for _ in range(2):
        assert not gpu.take(step, options)
        record = json.loads((tmp_path / "slow.json").read_text())
        assert "none within" in record["step"]["failed"]
    assert "has its record" not in capfd.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_machine_without_a_gpu_is_told_at_once():
    import gpu

    with pytest.raises(UserError, match="no CUDA device; --dry_run"):
        gpu.main(["fast"])


def test_nanogpts_file_must_be_one(tmp_path):
    import train_step

    with pytest.raises(UserError, match=r"give nanoGPT's model\.py"):
        train_step.main(["--nanogpt", str(tmp_path)])


def test_the_script_and_a_bare_loop_take_turns_within_one_run(tmp_path, monkeypatch):
    import loop

    script_step, bare_steps, order = Run.train_step, loop.bare_steps, []

    def recorded_script_step(self, step, rows):
        order.append("script")
        return script_step(self, step, rows)

    def recorded_bare_steps(learner, rows, num_steps):
        weights = [p.detach().clone() for p in learner.model.parameters()]
        bare_steps(learner, rows, num_steps)
        order.append(f"bare x {num_steps}")
        assert rows.shape == (8, 33)  # the tiny run's batch
        pairs = zip(learner.model.parameters(), weights, strict=True)
        assert any((p != w).any() for p, w in pairs)

    monkeypatch.setattr(Run, "train_step", recorded_script_step)
    monkeypatch.setattr(loop, "bare_steps", recorded_bare_steps)
    commit = checkpoints.commit
    monkeypatch.setattr(checkpoints, "commit", lambda *at: (time.sleep(0.3), commit(*at)))
    record = tmp_path / "record.json"
    with as_if_in_its_own_process():
        recipe = ["--recipe", str(write_inputs(tmp_path)), "--output", str(record)]
        loop.main(["--steps", "2", "--rounds", "3", "--launches", "0", "--saves", "1", *recipe])
    # The first turns, of a step that compiles, are not counted.
    turns = ["script", "bare x 2"] + ["script", "script", "bare x 2"] * 3
    assert order[: len(turns)] == turns
    beside = order[len(turns) : -1]
    assert len(beside) > 1 and {*beside} == {"bare x 1"}
    assert order[-1] == f"bare x {len(beside) - 1}", "the last of them ended after the checkpoint"
    found = json.loads(record.read_text())
    assert [len(found["seconds"][who]) for who in ("script", "bare")] == [3, 3]
    assert found["seconds_to_first_step"] == [] and found["step_beside_saving"]["median"] > 0


@SWEEP
def test_eight_processes_read_a_footer_once(tmp_path):
    import scale

    assert scale.main(["--files", "2", "--output", str(tmp_path / "scale.json")]) == 0
    launches = json.loads((tmp_path / "scale.json").read_text())["files"]["2"]
    # The first is longer than anyone guesses, and says how long the second is.
    assert {name: found["footer_reads"] for name, found in launches.items()} == {
        "cold": 3,
        "warm": 0,
        "one_of_many": 0,
    }
