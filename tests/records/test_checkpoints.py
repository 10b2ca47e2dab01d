"""Checkpoints: atomic, marked, pruned, whole under sharding, and never a pickle."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from power_failure import Disk
from safetensors import safe_open
from tiny_checkpoint import save_checkpoint, save_now

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro import UserError
from gpt2repro.recipe import load_recipe
from gpt2repro.records import checkpoints, integrity
from gpt2repro.system import atomic
from gpt2repro.training.optim.averaging import averaged, has_average
from gpt2repro.training.optim.registry import build_optimizer
from modeling_gpt2repro import GPT2ReproForCausalLM


def make(optimizer: str = "adamw", **overrides):
    torch.manual_seed(0)
    # Odd, so that two ranks have shards of unequal sizes.
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 51, "n_positions": 9}
    settings |= {"bos_token_id": 0, "eos_token_id": 0, **overrides}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**settings))
    return model, build_optimizer(
        model, load_recipe(["--optimizer", *optimizer.split(), "--max_lr", "1e-2"])
    )


def train(model, optimizer, steps: range) -> float:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 50, (4, 8), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def save(directory: Path, model, optimizer, step: int = 1, keep_last: int = 2) -> Path:
    return save_now(directory, step, model, optimizer, keep_last, note="mine")


@pytest.mark.parametrize("optimizer", ["adamw", "muon --ema_decay 0.9"])
@pytest.mark.parametrize("tied", [True, False])
def test_training_goes_on_bitwise(tmp_path, optimizer, tied):
    model, opt = make(optimizer, tie_word_embeddings=tied)
    train(model, opt, range(3))
    path = save(tmp_path, model, opt, step=3)
    expected = train(model, opt, range(3, 6))
    fresh, fresh_opt = make(optimizer, tie_word_embeddings=tied)
    assert checkpoints.read_state(path) == {"note": "mine", "step": 3}
    checkpoints.load(path, model=fresh, optimizer=fresh_opt)
    assert train(fresh, fresh_opt, range(3, 6)) == expected
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in opt.state[p].items():
            assert torch.equal(value, fresh_opt.state[q][key]), key


def test_random_numbers_go_on_where_they_were(tmp_path):
    """Of a model with dropout, say."""
    model, optimizer = make()
    torch.manual_seed(5)
    torch.rand(3)
    path = save(tmp_path, model, optimizer)
    expected = torch.rand(4)
    torch.manual_seed(0)
    checkpoints.load(path, model=model, optimizer=optimizer)
    assert torch.equal(torch.rand(4), expected)


def test_a_gpu_that_is_not_in_use_is_left_alone(tmp_path, monkeypatch):
    """Asked for its generator or its stream, torch would open it, which may be full."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", mock.Mock(side_effect=RuntimeError("is full")))
    model, optimizer = make()
    path = save(tmp_path, model, optimizer)
    checkpoints.load(path, model=model, optimizer=optimizer)
    assert checkpoints.get_random_state().keys() == {"cpu"}


def test_pruning_leaves_copies_alone(tmp_path):
    """Whole checkpoints, but not under a name of ours: somebody keeps them."""
    model, optimizer = make()
    first = save(tmp_path, model, optimizer)
    copy = first.rename(tmp_path / f"{first.name}.best")
    for step in (2, 3):
        save(tmp_path, model, optimizer, step=step, keep_last=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {copy.name, "step_00000003"}


def test_a_checkpoint_is_a_model_directory_without_pickles(tmp_path):
    model, optimizer = make()
    path = save(tmp_path, model, optimizer)
    assert {file.suffix for file in path.iterdir()} <= {".safetensors", ".json", ".py", ""}
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}, "other loaders ask for it"
        assert {*file.keys()} == {name for name, _ in model.named_parameters()}
    theirs, report = GPT2ReproForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values())
    ids = torch.arange(8)[None]
    assert torch.equal(theirs(ids).logits, model.eval()(ids).logits)


def test_the_umask_decides_who_may_read_a_checkpoint(tmp_path):
    before = os.umask(0o027)
    try:
        path = save_checkpoint(tmp_path, 1)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o640"}


def test_only_the_newest_valid_ones_are_kept(tmp_path):
    model, optimizer = make()
    for step in range(1, 5):
        save(tmp_path, model, optimizer, step)
    (tmp_path / ".step_00000009.partial").mkdir()  # what a kill -9 leaves
    save(tmp_path, model, optimizer, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004", "step_00000005"]


def test_what_cannot_be_removed_ends_no_run(tmp_path, monkeypatch):
    """On network file systems a directory may be busy for a while."""
    model, optimizer = make()
    first = save(tmp_path, model, optimizer, 1)

    def busy(path, *_, **__):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)

    monkeypatch.setattr(os, "rmdir", busy)
    second = save(tmp_path, model, optimizer, 2, keep_last=1)
    assert integrity.is_whole(second) and first.with_name(f".{first.name}.old").exists()
    monkeypatch.setattr(checkpoints, "save_file", busy)  # the disk too, and then what it left
    with pytest.raises(UserError, match=r"step_00000003 could not be written .*busy"):
        save(tmp_path, model, optimizer, 3, keep_last=1)
    monkeypatch.undo()
    save(tmp_path, model, optimizer, 4, keep_last=1)
    names = {path.name for path in tmp_path.iterdir() if any(path.iterdir())}
    assert names == {"step_00000004"}, "what was busy is an empty directory"


def test_going_back_twice_keeps_what_was_set_aside_the_first_time(tmp_path):
    model, optimizer = make()
    save(tmp_path, model, optimizer, 1)
    for name in ("step_00000002", "step_00000002.2"):
        save(tmp_path, model, optimizer, 2)
        checkpoints.supersede(tmp_path, 1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "superseded"]
        assert checkpoints.read_state(tmp_path / "superseded" / name)["step"] == 2
    assert len([*(tmp_path / "superseded").iterdir()]) == 2


def test_a_copy_that_somebody_keeps_is_no_later_checkpoint(tmp_path):
    model, optimizer = make()
    step = save(tmp_path, model, optimizer, 1)
    shutil.copytree(step, tmp_path / "step_00000001.best")
    checkpoints.supersede(tmp_path, 1)
    assert checkpoints.newer(tmp_path, 1) == []
    assert integrity.is_whole(tmp_path / "step_00000001.best")


def test_a_removal_that_is_killed_leaves_nothing_for_good(tmp_path, monkeypatch):
    """Half a checkpoint under its own name would be in nobody's list."""
    model, optimizer = make()
    save(tmp_path, model, optimizer, 1)

    def killed(path, **_):
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, model, optimizer, 2, keep_last=1)
    monkeypatch.undo()
    save(tmp_path, model, optimizer, 3, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_the_newest_valid_one_is_found(tmp_path):
    model, optimizer = make()
    good, bad = (save(tmp_path, model, optimizer, step) for step in (1, 2))
    assert checkpoints.find_latest(tmp_path) == (bad, {})
    (bad / "COMPLETE").unlink()
    assert checkpoints.find_latest(tmp_path) == (good, {bad: "it has no COMPLETE marker"})
    with pytest.raises(UserError, match="--resume auto takes the newest valid"):
        checkpoints.read_state(bad)


def test_nothing_there(tmp_path):
    assert checkpoints.find_latest(tmp_path / "nowhere") == (None, {})
    with pytest.raises(UserError, match="no such checkpoint directory"):
        checkpoints.read_state(tmp_path / "nowhere")


def test_a_full_disk_leaves_the_earlier_ones(tmp_path, monkeypatch):
    model, optimizer = make()
    good = save(tmp_path, model, optimizer, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*keep fewer \(keep_last"):
        save(tmp_path, model, optimizer, 2)
    assert [*tmp_path.iterdir()] == [good] and integrity.find_problem(good) is None


def test_an_interrupted_write_is_never_valid(tmp_path, monkeypatch):
    """Cut the writer off before each of its file operations: nothing half-made has the name."""
    model, optimizer = make()
    good = save(tmp_path, model, optimizer, 1)
    operations = [(checkpoints, "save_file"), (checkpoints, "commit")]
    operations += [(atomic, "flush"), (atomic, "partial"), (atomic, "move_into_place")]
    for module, name in operations:
        with monkeypatch.context() as patch:

            def die(*args, **kwargs):
                raise KeyboardInterrupt

            patch.setattr(module, name, die)
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, model, optimizer, 2)
        assert checkpoints.find_latest(tmp_path) == (good, {})
    assert integrity.find_problem(save(tmp_path, model, optimizer, 2)) is None


def test_a_checkpoint_survives_a_power_failure(tmp_path, monkeypatch):
    """All of it is on the disk before it has the name; those it replaces are pruned afterwards."""
    disk = Disk(monkeypatch)
    model, optimizer = make()
    for step in (1, 2):
        path = save(tmp_path, model, optimizer, step, keep_last=1)
        assert disk.lost(path) == set()
    assert disk.names[tmp_path] == {"step_00000001", "step_00000002"}
    assert [*tmp_path.iterdir()] == [path]


def test_another_architecture_is_named(tmp_path):
    path = save(tmp_path, *make())
    for overrides, message in (
        ({"n_embd": 32}, "another architecture: .* is .* in the checkpoint, .* in the model"),
        ({"n_layer": 3}, "h.2.* is only in the model"),
        ({"n_layer": 1}, "h.1.* is only in the checkpoint"),
    ):
        model, optimizer = make(**overrides)
        with pytest.raises(UserError, match=message):
            checkpoints.load(path, model=model, optimizer=optimizer)


def test_garbage_is_an_error_and_not_a_model(tmp_path):
    path = save(tmp_path, *make())
    (path / "model.safetensors").write_bytes(b"\x80" * 1000)
    model, optimizer = make()
    with pytest.raises(UserError, match="cannot be read"):
        checkpoints.load(path, model=model, optimizer=optimizer)


# --- Sharded, in two gloo processes ---------------------------------------------------------------


# Means over rows and columns, which are whole on every rank, and decay by the signs of both.
EVERY_CHOICE = "muon --muon_normalize --muon_heads --cautious_weight_decay"
EVERY_CHOICE += " --embedding_second_moment factored --muon_weight_decay 0.1 --ema_decay 0.9"


def two_processes(mode: str, optimizer: str, directory: Path) -> dict:
    script = Path(__file__).with_name("sharded_training.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), mode, optimizer, str(directory)]
    paths = [str(script.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads((directory / "report.json").read_text())


# EVERY_CHOICE is muon and, for the other parameters, adamw too, with all that they may do besides.
PLAIN = [pytest.param(name, marks=pytest.mark.sweep) for name in ("adamw", "muon")]


@pytest.mark.parametrize("optimizer", [*PLAIN, EVERY_CHOICE])
def test_sharded_training_saves_resumes_and_exports_like_one_process(tmp_path, optimizer):
    """FSDP2 over gloo: clip, save, resume sharded, resume unsharded; one process is the oracle."""
    report = two_processes("fsdp2", optimizer, tmp_path)
    model, opt = make(optimizer)
    losses, norms = [], []
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 50, (4, 8), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    # Sharding sums gradients in another order; six steps amplify the fp32 rounding.
    torch.testing.assert_close(report["losses"], losses, rtol=1e-3, atol=0)
    torch.testing.assert_close(report["norms"], norms, rtol=5e-3, atol=0)
    assert report["resumed"] == report["losses"][3:]
    assert report["differences"] == [], "what is saved after an evaluation is what it was before"

    unsharded, unsharded_opt = make(optimizer)
    path = checkpoints.checkpoint_path(tmp_path / "checkpoints", 3)
    checkpoints.load(path, model=unsharded, optimizer=unsharded_opt)
    resumed = []
    for step in range(3, 6):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 50, (4, 8), generator=generator)
        loss = unsharded(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unsharded.parameters(), 1.0)
        unsharded_opt.step()
        unsharded_opt.zero_grad()
        resumed.append(loss.item())
    torch.testing.assert_close(resumed, losses[3:], rtol=1e-3, atol=0)

    of_weights, of_average, again = report["evaluated"]
    assert of_weights == again and has_average(opt) == (of_average != of_weights)
    for oracle, its_optimizer in ((model, opt), (unsharded, unsharded_opt)):
        with averaged(oracle, its_optimizer), torch.no_grad():
            ids = torch.arange(32).view(4, 8)
            assert of_average == pytest.approx(oracle(ids, labels=ids).loss.item(), rel=1e-3)
