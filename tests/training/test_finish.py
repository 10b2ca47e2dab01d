"""The end of a run: whether a scheduler should come back, and what is shown after the export."""

from types import SimpleNamespace

import pytest
from tiny_run import train, write_inputs

from gpt2repro.records.run_directory import FINISHED
from gpt2repro.training import finish
from gpt2repro.training.finish import _paragraph


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("--once upon a time", "error: --model"),  # taken for text, and not for an option
        ("a\x00b", "embedded null byte"),
    ],
)
def test_a_sample_that_cannot_be_written_is_not_the_runs_failure(prompt, why, tmp_path):
    run = SimpleNamespace(
        directory=SimpleNamespace(final=tmp_path / "final"),
        recipe=SimpleNamespace(sample_prompt=prompt, seed=1),
    )
    said = _paragraph(run)
    assert said.startswith("(no sample: ") and why in said


@pytest.mark.parametrize("outcome", ["done", "to be pushed again", "failed"])
def test_killed_while_it_exports_a_run_is_to_be_requeued(tmp_path, monkeypatch, outcome):
    """Until then, and no longer."""
    recipe, run, marked = write_inputs(tmp_path), tmp_path / "run", []

    def publish(of, models):
        marked.append((run / "PREEMPTED").exists())
        if outcome == "failed":
            raise ZeroDivisionError("a bug")
        return outcome == "done"

    monkeypatch.setattr(finish, "_publish", publish)
    if outcome == "failed":
        with pytest.raises(ZeroDivisionError):
            train(recipe, run, "--num_steps", "2")
    else:
        assert train(recipe, run, "--num_steps", "2") == 0
    assert marked == [True] and not (run / "PREEMPTED").exists()
    assert (run / FINISHED).exists() == (outcome == "done")
