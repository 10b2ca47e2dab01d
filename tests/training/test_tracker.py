"""A run that was stopped, went back and on is one run for the tracker: each step once."""

import pytest
from tiny_run import metrics, train, write_inputs

from gpt2repro.training import finish

events = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
)


def test_tensorboard_has_each_step_once_after_going_back(tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "_publish", lambda *_: None)
    recipe, run = write_inputs(tmp_path), tmp_path / "run"
    options = ("--report_to", "tensorboard", "--eval_every", "0", "--keep_last", "9")
    assert train(recipe, run, *options, "--num_steps", "8") == 0
    back = ("--resume", str(run / "checkpoints" / "step_00000004"), "--max_lr", "5e-3")
    assert train(recipe, run, *options, *back, "--sample_every", "5") == 0
    directories = {path.parent for path in run.rglob("events.out.*")}
    assert len(directories) == 2  # the figures, and the settings of the first launch
    found = events.EventAccumulator(str(run / "gpt2repro"))
    found.Reload()
    losses = {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}
    scalars = [(each.step, each.value) for each in found.Scalars("loss")]
    assert [step for step, _ in scalars] == [*losses] == [*range(12)]
    assert [value for _, value in scalars] == pytest.approx([*losses.values()])
    assert found.Tags()["tensors"], "samples are texts there"
