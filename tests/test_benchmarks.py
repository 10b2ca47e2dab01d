"""The benchmarks measure what they say, tried on models that take no time."""

import json
import math
from pathlib import Path

import pytest
from tiny_run import as_if_in_its_own_process, write_inputs

from gpt2repro import UserError
from gpt2repro.training.run import Run

ROOT = Path(__file__).parent.parent
TINY = ["--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--vocab_size", "99"]
SHORT = ["--rounds", "2", "--warmups", "1", "--device", "cpu"]


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


def test_a_training_step_of_both(tmp_path):
    import train_step

    record = tmp_path / "record.json"
    step = ["--mode", "eager", "--dtype", "fp32", "--sequence_length", "16"]
    train_step.main([*step, *TINY, *SHORT, "--output", str(record)])
    found = json.loads(record.read_text())
    assert {who: len(seconds) for who, seconds in found["seconds"].items()} == {
        "theirs": 2,
        "ours": 2,
    }
    for loss in found["loss"].values():  # untrained, of 99 tokens
        assert loss == pytest.approx(math.log(99), abs=0.1)
    assert found["memory_ratio"]["theirs"] == pytest.approx(
        found["peak_memory_bytes"]["ours"] / found["peak_memory_bytes"]["theirs"]
    )


def test_a_contestant_that_fails_says_why():
    import train_step

    with pytest.raises(RuntimeError, match=r"(?s)theirs: .*divisible by num_heads"):
        train_step.main([*SHORT, *TINY, "--n_head", "3", "--mode", "eager"])


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
    record = tmp_path / "record.json"
    with as_if_in_its_own_process():
        recipe = ["--recipe", str(write_inputs(tmp_path)), "--output", str(record)]
        loop.main(["--steps", "2", "--rounds", "3", "--launches", "0", *recipe])
    # The first turns, of a step that compiles, are not counted.
    assert order == ["script", "bare x 2"] + ["script", "script", "bare x 2"] * 3
    found = json.loads(record.read_text())
    assert [len(found["seconds"][who]) for who in ("script", "bare")] == [3, 3]
    assert found["seconds_to_first_step"] == []
