"""The training script: what a run leaves, resumes, stops, incidents, several processes."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import compare_versions
from tiny_gpt2 import tiny_tokenizer
from tiny_language_models import HELLASWAG
from tiny_run import (
    assert_same_tensors,
    digests,
    metrics,
    stop_after,
    tensors,
    train,
    without_export,
    write_inputs,
)

import train_accelerate
from gpt2repro import UserError
from gpt2repro.data.opening import open_corpus
from gpt2repro.data.rows import producer
from gpt2repro.data.rows.held_out import validation_set
from gpt2repro.data.rows.stream import TokenStream
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.encoder import BulkEncoder
from gpt2repro.recipe import load_recipe
from gpt2repro.records import checkpoints, incidents, integrity
from gpt2repro.records.run_directory import RunDirectory
from gpt2repro.speed import cpu_memory
from gpt2repro.speed.compilation import compile_in_place
from gpt2repro.system.signals import SIGNALS
from gpt2repro.training import finish, learner, monitor
from gpt2repro.training import run as run_module
from gpt2repro.training.evaluations import Evaluations
from gpt2repro.training.monitor import Monitor
from gpt2repro.training.run import Run
from gpt2repro.training.tracker import Tracker

ROOT = Path(__file__).parent.parent
MUON = ("--optimizer", "muon", "--batch_multiples", "[[2, 2], [6, 3]]")
MUON += ("--ema_decay", "0.9", "--eval_every", "3")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def no_export(request, monkeypatch):
    """The export has tests of its own; here one test is enough to see it called."""
    if "exports" not in request.keywords:
        monkeypatch.setattr(finish, "finish", lambda run: 0)


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    with without_export():
        assert train(recipe, directory) == 0
    return directory


@pytest.fixture(scope="module")
def by_muon(recipe, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("by_muon") / "run"
    with without_export():
        assert train(recipe, directory, *MUON) == 0
    return directory


def test_while_the_tracker_logs_in_a_signal_ends_the_process(recipe, tmp_path, monkeypatch):
    """It may ask for a key and wait for ever; there is nothing to save yet."""
    before, found = [signal.getsignal(number) for number in SIGNALS], []

    def login(*_):
        found.extend(signal.getsignal(number) for number in SIGNALS)
        raise UserError("no key")

    monkeypatch.setattr(Tracker, "log_in", login)
    with pytest.raises(UserError, match="no key"):
        train(recipe, tmp_path / "run")
    assert found == before


# --- What a run leaves ----------------------------------------------------------------------------


def test_metrics_have_the_promised_fields(uninterrupted):
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [*range(13)]
    promised = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu"}
    promised |= {"data_wait_fraction", "save_seconds", "rows_digest"}
    for line in lines[:-1]:
        assert promised <= line.keys()
        assert line["tokens"] == 256 * (line["step"] + 1)
        assert line["peak_memory_gib"] > 0.01
        assert len(line["rows_digest"]) == 16 and int(line["rows_digest"], 16) >= 0
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 5, 10, 12]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    assert [line["step"] for line in lines[:-1] if line["save_seconds"]] == [4, 8]


def test_bits_per_byte_are_of_the_text_that_was_scored(uninterrupted):
    recipe = load_recipe(["--recipe", str(uninterrupted / "recipe.yaml")])
    encoder = BulkEncoder(load_tokenizer(recipe.tokenizer_name))
    units = {"num_units": 1, "max_tokens": recipe.validation_tokens}
    corpus = open_corpus(recipe.dataset_name)
    held_out = validation_set(corpus, encoder, sequence_length=32, **units)
    for line in metrics(uninterrupted):
        if "val_loss" in line:
            assert line["val_tokens"] == held_out.rows[:, 1:].size
            bits = line["val_loss"] / math.log(2) * line["val_tokens"] / held_out.num_bytes.sum()
            assert line["val_bits_per_byte"] == pytest.approx(bits)


def test_between_the_lines_that_are_due_are_those_that_say_more(
    recipe, tmp_path, monkeypatch, capsys
):
    """Steps of an evaluation or a spike, and no others; validation that takes long is told once."""
    z_scores = iter([0.0, 0.0, 6.0, *[0.0] * 9])
    monkeypatch.setattr(monitor.SpikeDetector, "z_score", lambda self, loss: next(z_scores))
    validate = Evaluations._validate

    def slowly(self, step):
        figures, self.validation_seconds = validate(self, step), 99.0
        return figures

    monkeypatch.setattr(Evaluations, "_validate", slowly)
    assert train(recipe, tmp_path, "--log_every", "4") == 0
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [0, 2, 4, 5, 8, 10, 12]
    assert [line.get("loss_z_score") for line in lines] == [None, 6.0, *[None] * 5]
    said = capsys.readouterr().out
    assert re.search(r"step 2: loss [\d.]+ is 6.0 standard deviations above its recent mean", said)
    assert said.count("A validation takes 99 s, the steps between two of them 0 s: raise ev") == 1


def test_the_resolved_recipe_reproduces_the_run(uninterrupted, tmp_path):
    saved = yaml.safe_load((uninterrupted / "recipe.yaml").read_text())
    assert None not in (saved["num_steps"], saved["output_dir"], saved["exp_name"])
    assert train(uninterrupted / "recipe.yaml", tmp_path / "again") == 0
    assert metrics(tmp_path / "again") == metrics(uninterrupted)


@pytest.mark.exports
def test_the_whole_path_to_a_model_that_writes(recipe, tmp_path, capsys):
    assert train(recipe, tmp_path / "run", "--num_steps", "2", "--sample_prompt", "<1> of") == 0
    final = tmp_path / "run" / "final"
    names = {"model.safetensors", "config.json", "generation_config.json", "README.md"}
    names |= {"modeling_gpt2repro.py", "configuration_gpt2repro.py", "tokenizer.json"}
    assert names <= {path.name for path in final.iterdir()}
    auto_map = json.loads((final / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= auto_map.keys()
    assert (tmp_path / "run" / "loss_curve.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "Validation loss" in shown and str(final) in shown and "<1> of" in shown

    assert train(recipe, tmp_path / "run", "--num_steps", "2") == 0
    assert "is finished: 2 of 2 steps" in capsys.readouterr().out


def test_a_run_that_was_killed_while_it_exported_or_pushed_does_both_again(
    recipe, tmp_path, monkeypatch, capsys
):
    """Also where an earlier, shorter run has left its model."""
    run, finished = tmp_path / "run", []
    monkeypatch.setattr(finish, "finish", lambda run: finished.append(run.recipe.num_steps) or 0)
    assert train(recipe, run, "--num_steps", "2") == 0
    (run / "final").mkdir()
    RunDirectory(run).mark_finished(2)
    assert train(recipe, run, "--num_steps", "4") == 0  # as if killed before it was marked
    assert train(recipe, run, "--num_steps", "4") == 0
    assert finished == [2, 4, 4] and "is finished" not in capsys.readouterr().out
    RunDirectory(run).mark_finished(4)
    assert train(recipe, run, "--num_steps", "4") == 0
    assert finished == [2, 4, 4] and "is finished: 4 of 4 steps" in capsys.readouterr().out


# --- Resumes --------------------------------------------------------------------------------------


def test_ctrl_c_saves_and_the_same_command_goes_on(recipe, uninterrupted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, step=6, number=signal.SIGINT)
        assert train(recipe, run) == train_accelerate.EXIT_PREEMPTED
    assert (run / "checkpoints" / "step_00000007" / "COMPLETE").exists()
    assert train(recipe, run) == 0
    assert metrics(run) == metrics(uninterrupted)
    assert_same_tensors(tensors(run, 12), tensors(uninterrupted, 12))


def test_a_signal_within_a_step_leaves_no_trace_of_it(recipe, tmp_path, monkeypatch):
    """Neither in the gradients nor in the random numbers that dropout draws."""
    options = ("--dropout", "0.1", "--num_steps", "6")
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    assert train(recipe, uninterrupted, *options) == 0
    backward, calls, left = Accelerator.backward, itertools.count(1), []

    def stop_at_the_second_of_four(self, loss):
        backward(self, loss)
        if next(calls) == 3 * 4 + 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def leave(self, step):
        left.extend(p.grad for p in self.learner.model.parameters())
        assert not self.directory.preempted.exists()
        save(self, step)

    with monkeypatch.context() as patch:
        save = Run.save
        patch.setattr(Accelerator, "backward", stop_at_the_second_of_four)
        patch.setattr(Run, "save", leave)
        assert train(recipe, run, *options) == train_accelerate.EXIT_PREEMPTED
    assert left and not any(gradient is not None for gradient in left)
    assert (run / "checkpoints" / "step_00000003" / "COMPLETE").exists()
    assert train(recipe, run, *options) == 0
    assert metrics(run) == metrics(uninterrupted)
    assert_same_tensors(tensors(run, 6), tensors(uninterrupted, 6))


def test_a_scheduler_learns_that_all_is_saved_before_the_curve_is_drawn(
    recipe, tmp_path, monkeypatch
):
    """When the others have left, it may end the machine of rank 0."""
    run, marked = tmp_path / "run", []
    stop_after(monkeypatch, step=2)
    monkeypatch.setattr(
        Monitor, "draw_loss_curve", lambda self: marked.append(self.directory.preempted.exists())
    )
    assert train(recipe, run, "--eval_every", "0") == train_accelerate.EXIT_PREEMPTED
    assert marked[-1] and (run / "checkpoints" / "step_00000003" / "COMPLETE").exists()


def test_a_signal_within_an_evaluation_loses_only_that(
    recipe, uninterrupted, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        validate = Evaluations._validate

        def stop_in_evaluation(self, step):
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return validate(self, step)

        patch.setattr(Evaluations, "_validate", stop_in_evaluation)
        assert train(recipe, run) == train_accelerate.EXIT_PREEMPTED
    assert [line["step"] for line in metrics(run)] == [0, 1, 2, 3, 4]
    assert train(recipe, run) == 0
    assert metrics(run) == metrics(uninterrupted)
    assert_same_tensors(tensors(run, 12), tensors(uninterrupted, 12))


def test_a_signal_while_saving_waits_for_the_checkpoint(
    recipe, uninterrupted, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        commit = checkpoints.commit

        def stop_in_commit(scratch, path):
            os.kill(os.getpid(), signal.SIGTERM)
            commit(scratch, path)

        patch.setattr(checkpoints, "commit", stop_in_commit)
        assert train(recipe, run) == train_accelerate.EXIT_PREEMPTED
    assert integrity.is_whole(run / "checkpoints" / "step_00000004")
    assert train(recipe, run) == 0
    assert metrics(run) == metrics(uninterrupted)


def test_a_signal_while_data_is_late(recipe, uninterrupted, tmp_path, monkeypatch):
    """An outage of the data does not keep a run from stopping."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(TokenStream, "wait", lambda self, seconds: os.kill(os.getpid(), 15))
        assert train(recipe, run) == train_accelerate.EXIT_PREEMPTED
    assert (run / "checkpoints" / "step_00000000" / "COMPLETE").exists()
    assert train(recipe, run) == 0
    assert metrics(run) == metrics(uninterrupted)


def test_a_crash_costs_the_steps_since_the_last_checkpoint(
    recipe, uninterrupted, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        train_step = Run.train_step

        def crash(self, step, rows):
            if len(metrics(run)) == 7:
                raise KeyboardInterrupt
            return train_step(self, step, rows)

        patch.setattr(Run, "train_step", crash)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, run)
    (run / "metrics.jsonl").open("a").write('{"step": 7, "los')  # torn by the crash
    assert train(recipe, run) == 0
    assert metrics(run) == metrics(uninterrupted)
    assert_same_tensors(tensors(run, 12), tensors(uninterrupted, 12))


@pytest.mark.parametrize("error", [UserError("the token has expired"), OSError("a bug")])
def test_data_that_fail_cost_no_step(recipe, uninterrupted, tmp_path, monkeypatch, capsys, error):
    run = tmp_path / "run"
    make_step, steps = producer._step, iter(range(12))

    def fail_at_the_seventh(lanes):
        if next(steps) == 7:
            raise error
        return make_step(lanes)

    with monkeypatch.context() as patch:
        patch.setattr(producer, "_step", fail_at_the_seventh)
        with pytest.raises(type(error), match=str(error)):
            train(recipe, run)
    assert "Stopped at step 7, saved in" in capsys.readouterr().out
    assert not (run / "PREEMPTED").exists(), "a scheduler would come back for ever"
    assert train(recipe, run) == 0
    assert metrics(run) == metrics(uninterrupted)
    assert_same_tensors(tensors(run, 12), tensors(uninterrupted, 12))


def test_a_process_alone_is_told_what_to_change(recipe, tmp_path, monkeypatch):
    def too_large(self, step, rows):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Run, "train_step", too_large)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        train(recipe, tmp_path)
    assert any("gradient_checkpointing" in note for note in raised.value.__notes__)


def test_the_statuses_are_those_that_schedulers_were_told():
    """docs/training.md; 75 is EX_TEMPFAIL, upon which slurm.sh requeues."""
    assert (train_accelerate.EXIT_DIVERGED, train_accelerate.EXIT_PREEMPTED) == (3, 75)


def test_data_that_fail_at_once_leave_no_checkpoint(recipe, tmp_path, monkeypatch):
    def fail(lanes):
        raise UserError("the token has expired")

    monkeypatch.setattr(producer, "_step", fail)
    with pytest.raises(UserError, match="expired"):
        train(recipe, tmp_path / "run")
    assert not [*(tmp_path / "run" / "checkpoints").glob("step_*")]


def test_a_run_whose_directory_vanishes_ends_with_what_can_be_saved(
    recipe, uninterrupted, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        train_step = Run.train_step

        def vanish(self, step, rows):
            if step == 6:
                run.rename(tmp_path / "elsewhere")
            return train_step(self, step, rows)

        patch.setattr(Run, "train_step", vanish)
        with pytest.raises(UserError, match="was removed or moved while it was written"):
            train(recipe, run)
    assert "Stopped at step 7, saved in" in capsys.readouterr().out
    assert train(recipe, run) == 0
    assert metrics(run) == metrics(uninterrupted)
    assert_same_tensors(tensors(run, 12), tensors(uninterrupted, 12))


@pytest.mark.parametrize("step", [4, 12])
def test_one_that_vanishes_while_a_checkpoint_is_copied_is_saved_again(
    recipe, uninterrupted, tmp_path, monkeypatch, step
):
    run, moved, copy = tmp_path / "run", tmp_path / "elsewhere", checkpoints.take_snapshot

    def vanish(**options):
        if options["step"] == step and not moved.exists():
            run.rename(moved)
        return copy(**options)

    monkeypatch.setattr(checkpoints, "take_snapshot", vanish)
    if step < 12:
        with pytest.raises(UserError, match="was removed or moved while it was written"):
            train(recipe, run)
    assert train(recipe, run) == 0
    assert metrics(run) == metrics(uninterrupted)
    assert_same_tensors(tensors(run, 12), tensors(uninterrupted, 12))


def test_nothing_is_saved_where_another_process_writes(recipe, tmp_path, monkeypatch):
    run, train_step, others = tmp_path / "run", Run.train_step, []

    def vanish(self, step, rows):
        if step == 6:
            run.rename(tmp_path / "elsewhere")
            others.append(RunDirectory(run))
            others[0].open(0, "exp_name: another\n")
        return train_step(self, step, rows)

    monkeypatch.setattr(Run, "train_step", vanish)
    with pytest.raises(UserError, match="is being written by another process"):
        train(recipe, run)
    assert (run / "metrics.jsonl").read_text() == "" and not (run / "checkpoints").exists()
    others[0].close()


def test_lines_that_were_lost_are_told_when_a_run_goes_on(recipe, tmp_path, capsys):
    """As a disk leaves a file whose end it had not written."""
    run = tmp_path / "run"
    assert train(recipe, run, "--num_steps", "4") == 0
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]) + "\0" * 99 + "\n")
    capsys.readouterr()
    assert train(recipe, run) == 0
    assert "has lost 2 lines (line 3 cannot be read)" in capsys.readouterr().out
    assert sorted(digests(run)) == [0, 1, *range(4, 12)]
    assert train(recipe, run, "--num_steps", "14") == 0
    assert "has lost" not in capsys.readouterr().out


def test_a_broken_checkpoint_is_passed_over(recipe, uninterrupted, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(recipe, run, "--num_steps", "8") == 0
    newest = run / "checkpoints" / "step_00000008" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 64
    newest.write_bytes(content)
    capsys.readouterr()
    assert train(recipe, run) == 0
    shown = capsys.readouterr().out
    assert "step_00000008 is passed over: optimizer.safetensors was changed or damaged" in shown
    assert "going on from its step 4" in shown
    assert digests(run) == digests(uninterrupted)


def test_muon_resumes_bitwise(recipe, by_muon, tmp_path, monkeypatch):
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        stop_after(patch, step=4)
        assert train(recipe, parts, *MUON) == train_accelerate.EXIT_PREEMPTED
    assert train(recipe, parts, *MUON) == 0
    assert_same_tensors(tensors(parts, 12), tensors(by_muon, 12))


def test_dropout_resumes_bitwise(recipe, tmp_path, monkeypatch):
    """The random number generator is part of the state, and evaluations leave it alone."""
    options = ("--dropout", "0.1", "--sample_every", "3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(recipe, whole, *options) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, step=4)
        assert train(recipe, parts, *options) == train_accelerate.EXIT_PREEMPTED
    assert train(recipe, parts, *options) == 0
    assert_same_tensors(tensors(parts, 12), tensors(whole, 12))


def test_the_same_command_goes_on_when_it_names_a_checkpoint(
    recipe, uninterrupted, tmp_path, monkeypatch
):
    """Back to step 4 by path, which leaves a line; interrupted, and the same command again."""
    run = tmp_path / "run"
    assert train(recipe, run, "--keep_last", "9") == 0
    back = ("--resume", str(run / "checkpoints" / "step_00000004"))
    with monkeypatch.context() as patch:
        stop_after(patch, step=5)
        assert train(recipe, run, *back) == train_accelerate.EXIT_PREEMPTED
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000006", "superseded"]
    assert train(recipe, run, *back) == 0
    assert metrics(run) == metrics(uninterrupted)
    assert_same_tensors(tensors(run, 12), tensors(uninterrupted, 12))


def test_other_weights_to_start_from(recipe, uninterrupted, tmp_path):
    """A new run on them: their loss at step 0, and the recipe's dropout, whatever their own was."""
    weights = str(uninterrupted / "checkpoints" / "step_00000012")
    run = tmp_path / "run"
    assert train(recipe, run, "--init_from", weights, "--dropout", "0.5", "--num_steps", "2") == 0
    first, second = metrics(run)[:2]
    assert first["val_loss"] == metrics(uninterrupted)[-1]["val_loss"]
    assert first["loss"] > metrics(uninterrupted)[11]["loss"]  # dropped out
    config = json.loads((run / "checkpoints" / "step_00000002" / "config.json").read_text())
    assert config["resid_pdrop"] == config["embd_pdrop"] == config["attn_pdrop"] == 0.5
    assert second["rows_digest"] == digests(uninterrupted)[1]


def test_what_a_resume_may_not_change(recipe, tmp_path):
    run = tmp_path / "run"
    assert train(recipe, run, "--num_steps", "4") == 0
    before = metrics(run)
    for option, named in {
        ("--optimizer", "muon"): "optimizer",
        ("--sequence_length", "64"): "sequence_length",
        ("--num_validation_units", "2"): "num_validation_units",
    }.items():
        with pytest.raises(UserError, match=named):
            train(recipe, run, *option)
    assert metrics(run) == before


def test_a_resume_says_what_changed(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(recipe, run, "--num_steps", "4") == 0
    capsys.readouterr()
    assert train(recipe, run, "--max_lr", "5e-3") == 0
    shown = capsys.readouterr().out
    assert "max_lr was 0.01 until here and is 0.005 now" in shown
    assert "num_steps was 4 until here and is 12 now" in shown


@pytest.mark.parametrize("emulated", [True, False])
def test_emulated_bf16_is_told_before_hours_are_spent_on_it(
    emulated, recipe, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(monitor, "emulates_bf16", lambda _: emulated)
    assert train(recipe, tmp_path / "run", "--num_steps", "1", "--mixed_precision", "bf16") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert ("this CPU emulates bf16, many times slower: set mixed_precision to no" in shown) is (
        emulated
    )


# --- Equivalences ---------------------------------------------------------------------------------


def test_accumulation_is_the_large_batch(recipe, uninterrupted, tmp_path):
    """`1 x 8` and `4 x 2` rows per step: the same rows and, up to float summation, losses."""
    for size in (1, 8):
        run = tmp_path / str(size)
        assert train(recipe, run, "--micro_batch_size", str(size)) == 0
        assert digests(run) == digests(uninterrupted)
        ours = [line["loss"] for line in metrics(run)[:-1]]
        theirs = [line["loss"] for line in metrics(uninterrupted)[:-1]]
        # fp32 sums in another order, amplified by 12 steps at a high learning rate
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_recomputing_activations_changes_nothing(recipe, uninterrupted, tmp_path):
    run = tmp_path / "run"
    assert train(recipe, run, "--gradient_checkpointing") == 0
    assert metrics(run) == metrics(uninterrupted)


def test_hellaswag_in_the_loop_leaves_training_alone(recipe, tmp_path, capsys):
    long = ("--sequence_length", "64", "--batch_tokens", "512", "--num_steps", "6")
    tasks = ("--eval_tasks", "hellaswag_completion", "--hellaswag_file", str(HELLASWAG))
    plain, scored = tmp_path / "plain", tmp_path / "scored"
    assert train(recipe, plain, *long) == 0
    assert train(recipe, scored, *long, *tasks, "--eval_tasks_every", "4") == 0
    assert_same_tensors(tensors(scored, 6), tensors(plain, 6))
    figures = {m["step"]: m for m in metrics(scored) if any("hellaswag" in key for key in m)}
    assert [*figures] == [4, 6]
    for name in ("completion_acc", "completion_acc_norm"):
        assert 0 <= figures[6][f"hellaswag/{name}"] <= 1
        assert figures[6][f"hellaswag/{name}_stderr"] >= 0
    assert "step 4: hellaswag/completion_acc" in capsys.readouterr().out


def test_compiled_training_evaluates_and_samples(recipe, tmp_path, monkeypatch, capsys):
    """Everything a run does besides training, on a compiled model."""
    # Inductor's own code, slow to make, is in tests/training/test_engines.py.
    graphs_only = partial(compile_in_place, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(learner, "compile_in_place", graphs_only)
    options = ("--eval_every", "2", "--sample_every", "2", "--num_steps", "4", "--n_layer", "1")
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    assert train(recipe, eager, *options) == 0
    capsys.readouterr()
    assert train(recipe, compiled, *options, "--compile") == 0
    ours, theirs = metrics(compiled), metrics(eager)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for name in ("loss", "val_loss"):  # fused kernels round at other places
        ours_, theirs_ = ([m[name] for m in each if name in m] for each in (ours, theirs))
        torch.testing.assert_close(ours_, theirs_, rtol=1e-3, atol=0)
    prompt = yaml.safe_load((compiled / "recipe.yaml").read_text())["sample_prompt"]
    assert f"step 2: {prompt}" in capsys.readouterr().out
    samples = {line["step"]: line["sample"] for line in ours if "sample" in line}
    assert samples.keys() == {2} and samples[2].startswith(prompt)
    assert tensors(compiled, 4).keys() == tensors(eager, 4).keys()  # no prefix of the compiler's


def test_epochs_are_counted_in_steps(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(recipe, run, "--num_epochs", "1", "--eval_every", "0") == 0
    told = capsys.readouterr().out  # three lanes of four have two units, one has one
    assert "The lanes have unequal parts of the text: of an epoch's tokens 11% are" in told
    saved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert saved["num_epochs"] is None and saved["num_steps"] == len(metrics(run)) - 1 > 12
    (run / "final").mkdir()
    RunDirectory(run).mark_finished(saved["num_steps"])  # as the export would have
    assert train(recipe, run, "--num_epochs", "1", "--eval_every", "0") == 0
    assert "is finished" in capsys.readouterr().out


# --- Incidents ------------------------------------------------------------------------------------


def break_steps(monkeypatch, broken: set[int]) -> None:
    """Make the gradients of some steps infinite."""
    train_step = Run.train_step

    def train_broken_step(self, step, rows):
        if step not in broken:
            return train_step(self, step, rows)
        parameter = next(self.learner.model.parameters())
        handle = parameter.register_hook(lambda gradient: gradient * float("inf"))
        try:
            return train_step(self, step, rows)
        finally:
            handle.remove()

    monkeypatch.setattr(Run, "train_step", train_broken_step)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_non_finite_gradient_skips_the_update_and_keeps_the_rows(
    recipe, tmp_path, monkeypatch, optimizer
):
    run = tmp_path / "run"
    break_steps(monkeypatch, {3, 6})
    options = ("--save_every", "1", "--keep_last", "20", "--optimizer", optimizer)
    assert train(recipe, run, *options, "--muon_weight_decay", "0.1", "--ema_decay", "0.9") == 0
    kept = sorted(path.name for path in (run / "incidents").iterdir())
    assert kept == ["step_00000003_rank_0.json", "step_00000006_rank_0.json"]
    incident = json.loads((run / "incidents" / kept[0]).read_text())
    assert incident["rows_digest"] == digests(run)[3] and len(incident["texts"]) == 8
    before, after = (
        {k: v for k, v in tensors(run, step).items() if "rng" not in k} for step in (3, 4)
    )
    assert_same_tensors(before, after)
    line = metrics(run)[3]
    assert line["grad_norm"] is None  # JSON has no infinity


def test_a_disk_that_takes_no_rows_ends_no_run(recipe, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    break_steps(monkeypatch, {1})
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(incidents.IncidentLog, "record", mock.Mock(side_effect=full))
    assert train(recipe, run, "--num_steps", "3") == 0
    shown = capsys.readouterr().out
    assert "update skipped, its rows could not be kept: [Errno 28] No space" in shown
    assert [line["step"] for line in metrics(run)] == [0, 1, 2, 3]


def test_rank_0_keeps_the_rows_of_all(tmp_path):
    """The others may have no such directory, on another machine."""
    log = incidents.IncidentLog(tmp_path / "incidents")
    rows = [torch.full((2, 5), rank) for rank in range(2)]
    figures = {"loss": math.nan, "grad_norm": 1.0, "rows_digest": "00"}
    log.record(rows, step=7, tokenizer=tiny_tokenizer(), **figures)
    for rank in range(2):
        file = tmp_path / "incidents" / f"step_00000007_rank_{rank}.json"
        assert json.loads(file.read_text())["rows"] == rows[rank].tolist()


def test_told_a_step_late_as_on_gpus_all_is_the_same(
    recipe, uninterrupted, tmp_path, monkeypatch, capsys
):
    """Also what is told last before a checkpoint, a stop, the end and a divergence."""
    monkeypatch.setattr(monitor, "DEVICES_BEHIND", ("cpu",))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, step=6)
        assert train(recipe, run) == train_accelerate.EXIT_PREEMPTED
    assert metrics(run) == metrics(uninterrupted)[:7]
    assert train(recipe, run) == 0
    assert metrics(run) == metrics(uninterrupted)
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    rates = [line["tokens_per_second"] for line in lines if "loss" in line]
    assert len(rates) == 12 and all(rates)  # a step's tokens belong to the time of the same step
    break_steps(monkeypatch, {2, 3, 4, 5, 6})
    diverged = tmp_path / "diverged"
    assert train(recipe, diverged) == train_accelerate.EXIT_DIVERGED
    assert [line["loss"] is not None for line in metrics(diverged)] == [True] * 8
    assert "not finite in 5 steps in a row" in capsys.readouterr().out


def test_five_in_a_row_stop_the_run_with_advice(recipe, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    break_steps(monkeypatch, {5, 6, 7, 8, 9})
    assert train(recipe, run) == train_accelerate.EXIT_DIVERGED
    assert len(list((run / "incidents").iterdir())) == incidents.MAX_IN_A_ROW
    assert "Lower max_lr" in capsys.readouterr().out
    assert (run / "checkpoints" / "step_00000004" / "COMPLETE").exists()


# --- Several processes ----------------------------------------------------------------------------


def launch(recipe: Path, output_dir: Path, *options: str, config: str = "cpu2.yaml"):
    """`accelerate launch` as a user types it."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    command = [*launcher, "--config_file", str(ROOT / "launch" / config)]
    command += ["--main_process_port", "0"]  # a free one: others may be launching here too
    command += [str(ROOT / "train_accelerate.py"), "--recipe", str(recipe)]
    command += ["--output_dir", str(output_dir), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.exports
def test_two_processes_train_on_the_same_rows(recipe, by_muon, tmp_path):
    """Two gloo processes that share Muon's work, export included; then one goes on alone.

    Steps take one batch, two, three.
    """
    run = tmp_path / "run"
    result = launch(recipe, run, "--num_steps", "8", "--sample_every", "4", *MUON)
    assert result.returncode == 0, result.stderr
    assert digests(run) == {s: d for s, d in digests(by_muon).items() if s < 8}
    assert (run / "final" / "model.safetensors").exists()

    for name in ("loss", "val_loss_ema"):
        lines = (metrics(each)[:4] for each in (run, by_muon))
        ours, theirs = ([line[name] for line in each if name in line] for each in lines)
        assert ours and ours == pytest.approx(theirs, abs=1e-4)  # gradients sum in another order
    saved = str(run / "checkpoints" / "step_00000004")
    assert train(recipe, run, *MUON, "--resume", saved) == 0
    assert digests(run) == digests(by_muon)


def test_freed_memory_is_kept_once_a_step_has_compiled(recipe, tmp_path, monkeypatch):
    happened = []

    def note(module, name):
        original = getattr(module, name)

        def noting(*args):
            happened.append(name)
            return original(*args)

        monkeypatch.setattr(module, name, noting)

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    note(cpu_memory, "keep_freed_memory")
    note(run_module, "train_step")
    of_a_run = ["train_step", "keep_freed_memory", "train_step"]
    assert train(recipe, tmp_path / "run", "--num_steps", "2") == 0
    assert train(recipe, tmp_path / "run", "--num_steps", "4") == 0  # resumed: compiled again
    assert happened == 2 * of_a_run


@pytest.mark.sweep
@pytest.mark.skipif(
    compare_versions("accelerate", "<", "1.13"),
    reason="its processes find each other without a GPU",
)
def test_processes_that_do_not_see_each_other_are_refused(recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    config = tmp_path / "blind.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\n"
        "num_machines: 1\nmixed_precision: 'no'\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "none")  # "" asks for the CPU
    result = launch(recipe, run, config=str(config))
    assert result.returncode != 0
    assert "error: 2 processes were launched but each sees only itself" in result.stderr
    assert not run.exists()
