"""Whole runs on a GPU. Counted as skipped elsewhere, but for a fake one (see ../fake_gpu.py)."""

import pytest
import torch
from tiny_run import losses, metrics, stop_after, train, without_export, write_inputs

import train_accelerate
from gpt2repro.training.run import Run

pytestmark = pytest.mark.gpu
STEPS_TO_SETTLE = 2  # they make the optimizer's state, and let kernels choose themselves


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def no_export():
    with without_export():
        yield


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_step_waits_for_the_device(recipe, tmp_path, monkeypatch, optimizer):
    """Whoever reads a number of it does so a step later: it is never without work."""
    train_step, quiet = Run.train_step, []

    def watched(self, step, rows):
        if step < STEPS_TO_SETTLE:
            return train_step(self, step, rows)
        torch.cuda.set_sync_debug_mode("error")
        try:
            quiet.append(step)
            return train_step(self, step, rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Run, "train_step", watched)
    options = ["--optimizer", optimizer, "--mixed_precision", "bf16", "--ema_decay", "0.9"]
    assert train(recipe, tmp_path / "run", *options, "--sample_every", "5") == 0
    assert quiet == list(range(STEPS_TO_SETTLE, 12))


def test_a_run_has_a_cpus_rows_and_losses(recipe, tmp_path, monkeypatch):
    assert train(recipe, tmp_path / "gpu") == 0
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert train(recipe, tmp_path / "cpu") == 0
    on_gpu, on_cpu = metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu")
    assert len(on_gpu) == len(on_cpu) == 13
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours.get("rows_digest") == theirs.get("rows_digest")
        for name in {"loss", "val_loss", "grad_norm"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=2**-7), name  # TF32 has 10 bits


def test_a_stopped_run_goes_on_with_the_same_random_numbers(recipe, tmp_path, monkeypatch):
    """The device has a generator of its own, for dropout; its sums may have another order."""
    options = ["--dropout", "0.5"]
    assert train(recipe, tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, step=6)
        assert train(recipe, tmp_path / "parts", *options) == train_accelerate.EXIT_PREEMPTED
    assert train(recipe, tmp_path / "parts", *options) == 0
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert len(whole) == 12 and parts == pytest.approx(whole, rel=1e-4)
