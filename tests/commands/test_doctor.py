"""The doctor: a line for each check, a field for each failure, and nothing written."""

import json
import shutil
from argparse import Namespace
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from tiny_checkpoint import save_checkpoint
from tiny_language_models import HELLASWAG
from tiny_run import without_a_compiler, write_inputs
from torch.torch_version import TorchVersion

from gpt2repro import UserError
from gpt2repro.commands import doctor
from gpt2repro.recipe import load_recipe
from gpt2repro.records import integrity
from gpt2repro.speed import low_precision
from gpt2repro.training import engine, examination
from gpt2repro.training.examination import FAILURE, OK, WARNING, Examination
from gpt2repro.training.learner import check_device
from gpt2repro.training.optim.groups import MATRICES, parameter_groups

CHECKS = ["batch", "precision", "tokenizer", "dataset", "model", "attention", "training", "data"]
CHECKS += ["disk", "hub", "time"]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def hurry(monkeypatch, tmp_path):
    monkeypatch.setattr(examination, "STREAM_SECONDS", 0.1)
    monkeypatch.setattr(examination, "STEP_SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)


def examine(capsys, recipe: Path, *options: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit status, and {check: (verdict, what it says)}."""
    status = doctor.main(["--recipe", str(recipe), *options])
    said = {}
    for line in capsys.readouterr().out.splitlines():
        verdict, _, rest = line.strip().partition("  ")
        if verdict in (OK, WARNING, FAILURE):
            name, _, text = rest.partition(" ")
            said[name] = (verdict, text.strip())
    return status, said


def test_a_healthy_run(recipe, capsys, tmp_path):
    status, said = examine(capsys, recipe)
    assert status == 0 and [*said] == CHECKS
    assert {verdict for verdict, _ in said.values()} == {OK}
    assert said["batch"][1] == "256 tokens = 4 x 2 rows a process"
    assert "8 units" in said["dataset"][1] and "300 tokens" in said["tokenizer"][1]
    assert "about 1 minute for 3,072 tokens (an estimate)" in said["time"][1]
    assert "cpu with 2 rows" in said["training"][1] and "GiB of weights" in said["model"][1]
    assert not list(tmp_path.iterdir())


def test_benchmarks_are_opened_where_there_are_some(recipe, capsys):
    options = ["--eval_tasks", "hellaswag_completion", "--hellaswag_file"]
    _, said = examine(capsys, recipe, *options, "/nowhere")
    assert said["benchmarks"][0] == FAILURE
    assert "hellaswag_file /nowhere" in said["benchmarks"][1]
    longer = ["--sequence_length", "64", "--batch_tokens", "512"]
    _, said = examine(capsys, recipe, *options, str(HELLASWAG), *longer)
    assert said["benchmarks"][1].startswith("hellaswag_completion: ")


@pytest.mark.parametrize(
    ("options", "check", "field"),
    [
        (("--num_processes", "3"), "batch", "num_lanes"),
        (("--micro_batch_size", "3"), "batch", "micro_batch_size"),
        (("--num_processes=2", "--micro_batch_size=8"), "batch", "micro_batch_size"),
        (("--tokenizer_name", "./nowhere"), "tokenizer", "tokenizer_name"),
        (("--dataset_name", "./nowhere"), "dataset", "dataset_name"),
        (("--text_column", "content"), "dataset", "text_column"),
        (("--n_head", "3"), "model", "n_head"),
        (("--num_validation_units", "8"), "data", "num_validation_units"),
        (("--push_to_hub", "--hub_model_id", "mine"), "hub", "hub_model_id"),
    ],
)
def test_a_failure_names_the_field(recipe, capsys, options, check, field):
    status, said = examine(capsys, recipe, *options)
    assert status == 1
    assert [*said] == CHECKS  # one failure does not hide the next
    failed = {name for name, (verdict, _) in said.items() if verdict == FAILURE}
    assert check in failed <= {check, "data"}  # the stream deals the lanes too
    assert field in said[check][1]


def test_a_columns_name_does_nothing_to_the_terminal(recipe, capsys, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"a\x1b[2J": "b"}))
    status, said = examine(capsys, recipe, "--dataset_name", str(tmp_path / "a.jsonl"))
    assert status == 1 and "columns of text: a\\x1b[2J" in said["dataset"][1]


def test_a_disk_that_is_too_small(recipe, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 9 * 10**5, 10**5))
    status, said = examine(capsys, recipe)
    assert status == 1 and said["disk"][0] == FAILURE
    assert "keep_last" in said["disk"][1] and "output_dir" in said["disk"][1]
    # What a run that goes on has saved already is not needed again.
    run = load_recipe(["--recipe", str(recipe), "--output_dir", str(tmp_path)]).run_dir
    for place, step in (("checkpoints", 4), ("checkpoints/stable", 8)):
        saved = save_checkpoint(run / place, step)
        (saved / "more").write_bytes(bytes(10**7))
        status, said = examine(capsys, recipe, "--output_dir", str(tmp_path))
        assert status == 0 and said["disk"][0] == OK and " there, " in said["disk"][1]
        (saved / integrity.STATE).write_text(json.dumps({"step": step, "permanent": True}))
        status, said = examine(capsys, recipe, "--output_dir", str(tmp_path))
        assert status == 1, "it is not of those that are kept"


@pytest.mark.parametrize(
    ("options", "num_pushed"),
    [
        (("--hub_strategy", "final", "--keep_steps", "log"), 0),
        (("--hub_strategy", "permanent", "--keep_steps", "log"), 6),  # 0, 1, 2, 4, 8, 12
        (("--hub_strategy", "all", "--save_every", "4", "--keep_steps", "[4,8]"), 3),  # and 12
        (("--hub_strategy", "all", "--save_every", "6", "--schedule", "wsd"), 3),  # 6, 10, 12
        (("--hub_strategy", "all", "--save_every", "5"), 3),  # 5, 10, 12
        (("--hub_strategy", "all", "--save_every", "0"), 1),
        (("--hub_strategy", "all", "--save_every", "2", "--keep_every", "3"), 8),  # not 1, 5, 7, 11
        (("--hub_strategy", "all", "--num_epochs", "1", "--num_steps", "null"), 0),  # not known yet
    ],
)
def test_what_checkpoints_will_take_on_the_hub_is_said(recipe, monkeypatch, options, num_pushed):
    monkeypatch.setattr(examination, "check_hub_rights", lambda *_, **__: True)
    monkeypatch.setattr(examination, "_state_bytes", lambda *_: 3 * 2**30)
    to_hub = ("--push_to_hub", "--hub_model_id", "me/run")
    with_state = () if "final" in options else ("--hub_state",)
    for more, gib in (((), num_pushed), (with_state, 3 * num_pushed)):
        exam = Examination(
            load_recipe(["--recipe", str(recipe), *to_hub, *options, *more]), 1, None
        )
        exam.model = Namespace(num_parameters=lambda: 2**28)
        verdict, text = exam._hub()
        assert verdict == OK and text.startswith("may write to me/run")
        assert (f"up to {num_pushed} checkpoint" in text) == (num_pushed > 0)
        assert (f" will take {gib}.0 GiB" in text) == (num_pushed > 0)


def test_a_checkpoint_needs_main_memory(recipe, monkeypatch):
    exam = Examination(load_recipe(["--recipe", str(recipe), "--ema_decay", "0.9"]), 1, None)
    exam._tokenizer()
    exam._model()
    num_tensors = len([*exam.model.parameters()])
    # Weights, average, two moments; the number of updates of each tensor.
    memory = Namespace(available=36_096 * 16 + 4 * num_tensors, total=2**40)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert exam._model()[0] == OK
    memory.available -= 1
    verdict, text = exam._model()
    assert verdict == WARNING and "main memory for checkpoints, but" in text


def test_for_a_gpu_copies_are_pinned_in_powers_of_two():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(4, 4, bias=False))
    # A matrix of nine takes 16, a bias of three takes 4, a matrix of 16 what it has.
    assert examination._pinned_share(model) == (16 + 4 + 16) / (9 + 3 + 16)


def test_permanent_checkpoints_are_counted(recipe, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2**38))

    def disk(*options: str) -> tuple[str, str]:
        exam = Examination(load_recipe(["--recipe", str(recipe), *options]), 1, None)
        exam._tokenizer(), exam._model()
        return exam._disk()

    assert "permanent checkpoints" not in disk()[1]
    verdict, text = disk("--keep_steps", "log", "--keep_every", "5", "--num_steps", "1000000")
    # 36,096 parameters, 12 bytes each; 0, 1, 2, 4 and 200,000 of them
    assert verdict == OK and "80.7 GiB needed (80.7 of them for 200,004 permanent" in text
    verdict, text = disk("--keep_every", "1", "--num_steps", "99999999")
    assert verdict == FAILURE and text.endswith("or keep fewer steps for good")
    verdict, text = disk("--keep_every", "5", "--num_epochs", "1")
    assert verdict == WARNING and "num_epochs does not say yet how many" in text


def test_data_that_cannot_keep_up(recipe, capsys, monkeypatch):
    monkeypatch.setattr(examination, "_training_rate", lambda *_: 1e12)
    status, said = examine(capsys, recipe)
    assert status == 1 and said["data"][0] == FAILURE
    assert "num_reader_threads" in said["data"][1] and "token_cache_dir" in said["data"][1]


def test_a_micro_batch_that_does_not_fit(recipe, capsys, monkeypatch):
    monkeypatch.setattr(
        examination, "_training_rate", mock.Mock(side_effect=torch.OutOfMemoryError)
    )
    status, said = examine(capsys, recipe)
    assert status == 1 and said["data"][0] == OK  # the checks after it are made
    verdict, text = said["training"]
    assert verdict == FAILURE and "out of memory with 2 rows at once" in text
    assert "micro_batch_size" in text and "gradient_checkpointing" in text


@pytest.mark.parametrize(
    ("most", "gains", "found", "tries"),
    [
        (4, 8, (400.0, 4), [2, 4, 8]),
        (8, 2, (200.0, 2), [2, 4]),
        (8, 8, (800.0, 8), [2, 4, 8]),
    ],
)
def test_a_gpu_is_timed_with_as_many_rows_as_it_gains_by(
    recipe, monkeypatch, most, gains, found, tries
):
    """Of 8 rows a step: up to `most` fit, and more than `gains` are no faster."""
    exam = Examination(load_recipe(["--recipe", str(recipe), "--micro_batch_size", "auto"]), 1)
    exam.device, tried = torch.device("cuda"), []

    def rate(model, recipe, rows, device):
        tried.append(rows)
        if rows > most:
            raise torch.OutOfMemoryError
        return min(rows, gains) * 100.0

    monkeypatch.setattr(examination, "_training_rate", rate)
    assert exam._with_more_rows(torch.nn.Identity(), 100.0, 1) == found and tried == tries
    exam.recipe = exam.recipe.model_copy(update={"micro_batch_size": 2})
    assert exam._with_more_rows(torch.nn.Identity(), 100.0, 2) == (100.0, 2) and tried == tries


@pytest.mark.parametrize(
    ("capability", "kernels"), [((8, 0), set()), ((9, 0), {"3", "4"}), ((10, 0), {"4"})]
)
def test_a_kernel_that_a_gpu_has_not_is_told_before_the_run(
    recipe, monkeypatch, capability, kernels
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for number in ("3", "4"):
        name = f"sdpa_flash_{number}"
        given = load_recipe(["--recipe", str(recipe)])
        given = given.model_copy(update={"attn_implementation": name})
        if number in kernels:
            check_device(given, torch.device("cuda"))
            continue
        with pytest.raises(UserError, match=f"attn_implementation {name}: this device has no"):
            check_device(given, torch.device("cuda"))


@pytest.mark.parametrize("version", ["2.12.1", "2.13.0a0+nv1", "2.13.0"])
def test_masks_that_a_gpu_may_not_find_again_are_refused(recipe, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    words = ["--recipe", str(recipe), "--gradient_checkpointing", "--compile", "--dropout", "0.1"]
    all_three = load_recipe(words)
    check_device(all_three, torch.device("cpu"))
    for without in ("dropout", "compile", "gradient_checkpointing"):
        check_device(all_three.model_copy(update={without: 0}), torch.device("cuda"))
    refused = pytest.raises(UserError, match="leave one of the three out")
    with nullcontext() if version == "2.12.1" else refused:
        check_device(all_three, torch.device("cuda"))


def test_a_cpu_that_emulates_bf16_is_worth_a_warning(recipe, capsys, monkeypatch):
    for fast, verdict in ((True, OK), (False, WARNING)):
        monkeypatch.setattr(examination, "emulates_bf16", lambda _, fast=fast: not fast)
        status, said = examine(capsys, recipe, "--mixed_precision", "bf16")
        assert status == 0 and said["precision"][0] == verdict
    assert "mixed_precision to no" in said["precision"][1]


@pytest.mark.parametrize(("ratio", "emulated"), [(0.5, False), (1.5, False), (9.0, True)])
def test_a_cpu_emulates_bf16_where_its_products_are_far_slower(monkeypatch, ratio, emulated):
    taken = iter([ratio, 1.0])  # of bf16 first
    monkeypatch.setattr(low_precision.timeit, "repeat", lambda *_, **__: [next(taken)])
    assert low_precision.emulates_bf16(torch.device("cpu")) is emulated
    assert not low_precision.emulates_bf16(torch.device("cuda"))  # without a product


def test_a_gpu_that_emulates_bf16_is_no_gpu_for_it(recipe, monkeypatch):
    """A T4 or V100: `doctor` says so, and the run does not begin."""
    monkeypatch.setattr(
        low_precision.torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation,
    )
    assert not low_precision.has_bf16(torch.device("cuda"))
    assert low_precision.has_bf16(torch.device("cpu"))
    monkeypatch.setattr(engine, "has_bf16", lambda _: False)
    with pytest.raises(UserError, match="mixed_precision bf16: this GPU only emulates it"):
        engine.start_engine(load_recipe(["--recipe", str(recipe), "--mixed_precision", "bf16"]))


def test_the_micro_batch_is_timed_that_training_would_take(recipe, capsys, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    _, said = examine(capsys, recipe, "--micro_batch_size", "auto")
    assert "cpu with 8 rows" in said["training"][1]  # all that a step has
    assert "the machine is busy" in said["training"][1]


def test_money(recipe, capsys, monkeypatch):
    monkeypatch.setattr(examination, "_training_rate", lambda *_: 3072 / 7200 / 2)  # two hours
    _, said = examine(capsys, recipe, "--num_processes", "2", "--price", "2.5")
    assert said["time"][1] == (
        "about 2.0 hours for 3,072 tokens, 10.00 at 2.5 an hour and cpu (an estimate)"
    )
    with pytest.raises(UserError, match="--price nan: it takes what an hour"):
        examine(capsys, recipe, "--price", "nan")


def test_epochs_have_no_estimate(recipe, capsys):
    status, said = examine(capsys, recipe, "--num_epochs", "1")
    assert status == 0 and said["time"][0] == WARNING


@pytest.mark.parametrize("number", ["0", "two", "-1", "", "1" + "0" * 400])
def test_a_bad_number_of_processes_is_refused(number):
    with pytest.raises(UserError, match="--num_processes"):
        doctor.main(["--recipe", "demo", "--num_processes", number])


def test_a_compiler_is_tried_where_the_recipe_wants_one(recipe, capsys):
    status, said = examine(capsys, recipe, "--compile", "true")
    assert status == 0 and said["compiler"] == (OK, "torch.compile works")
    with without_a_compiler():
        status, said = examine(capsys, recipe, "--compile", "true")
    assert status != 0 and said["compiler"][0] == FAILURE
    assert "no-such-compiler" in said["compiler"][1] and "compile to false" in said["compiler"][1]


@pytest.mark.parametrize(
    ("optimizer", "num_kept"),
    [
        (["--optimizer", "adamw"], lambda kind: 2),
        (["--optimizer", "muon"], lambda kind: 1 if kind in MATRICES else 2),
        (["--optimizer", "muon", "--ema_decay", "0.9"], lambda kind: 2 + (kind not in MATRICES)),
    ],
)
def test_the_optimizers_state_is_counted_by_kind_of_parameter(recipe, optimizer, num_kept):
    read = load_recipe(["--recipe", str(recipe), *optimizer])
    exam = Examination(read, 1, torch.device("cpu"))
    exam._tokenizer(), exam._model()
    expected, groups = 0, parameter_groups(exam.model, read)
    for group in groups:
        for parameter in group["params"]:
            expected += 4 * parameter.numel() * (1 + num_kept(group["name"]))
            expected += 4 * (num_kept(group["name"]) - bool(read.ema_decay) == 2)  # its step
    assert examination._state_bytes(exam.model, read) == expected
