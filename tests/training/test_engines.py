"""The whole script on two processes, sharded or compiled: trained, saved, resumed, exported."""

import contextlib
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from tiny_language_models import HELLASWAG
from tiny_run import assert_same_tensors, digests, metrics, tensors, train, write_inputs
from torch.torch_version import TorchVersion

from gpt2repro import UserError
from gpt2repro.recipe import load_recipe
from gpt2repro.training import finish
from gpt2repro.training.engine import check_engine, start_engine

ROOT = Path(__file__).parents[2]
# Dynamo gives up at 8 variants of one piece of code: more blocks than that, all of one kind.
MANY_BLOCKS = ("--n_layer", "10", "--sequence_length", "64", "--batch_tokens", "512")
STEPS = ("--num_steps", "4", "--eval_every", "2", "--save_every", "2", "--keep_last", "9")
AVERAGE = ("--ema_decay", "0.9")
BESIDES = ("--sample_every", "2", "--eval_tasks", "hellaswag_completion")
BESIDES += ("--hellaswag_file", str(HELLASWAG))


@pytest.fixture(scope="module", autouse=True)
def no_export():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "finish", lambda run: 0)
        yield


def trained(recipe: Path, output_dir: Path, *options: str, **variables: str) -> dict[str, int]:
    """Two processes on an ENGINE; what Dynamo counted in the first."""
    script = Path(__file__).with_name("engine_over_gloo.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), "--recipe", str(recipe), "--output_dir", str(output_dir), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.search(r"^dynamo (.*)$", done.stdout, re.M)
    assert counted, done.stdout + done.stderr
    return json.loads(counted[1])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    """One process in float32."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(recipe, run, *MANY_BLOCKS, *STEPS, *AVERAGE) == 0
    return run


@pytest.mark.sweep
@pytest.mark.parametrize("average", [(), AVERAGE], ids=["alone", "averaged"])
def test_compiled_bf16_is_one_process_to_rounding_and_never_gives_up_compiling(
    recipe, alone, tmp_path, average
):
    run = tmp_path / "run"
    options = (*MANY_BLOCKS, *STEPS, *average, *BESIDES, "--mixed_precision", "bf16", "--compile")
    stats = trained(recipe, run, *options, ENGINE="fsdp2")
    assert digests(run) == digests(alone)
    ours, theirs = metrics(run), metrics(alone)
    for name in ("loss", "val_loss", *["val_loss_ema"] * bool(average)):
        # In bf16 numbers between 4 and 8 are multiples of 1/32, and means of 2**n of them of less.
        assert any(line[name] * 1024 % 1 for line in ours if name in line)
        pairs = zip(ours, theirs, strict=True)
        for mine, other in ((a[name], b[name]) for a, b in pairs if name in a):
            # bf16 knows weights and activations to 2**-9; a mean over 512 tokens does better.
            assert mine == pytest.approx(other, abs=0.02)
    # Forward and backward of a block in training, its forward in evaluation, and at most as many
    # variants as there are lengths: far from one a block.
    assert stats["unique_graphs"] <= 8
    # Evaluated last, after which FSDP2 holds the outermost parameters in bf16.
    exported, saved = load_file(run / "final" / "model.safetensors"), tensors(run, 4)
    assert_same_tensors(exported, {name: saved[name] for name in exported})


@pytest.mark.sweep
def test_float32_resumes_from_any_step_and_under_one_process(recipe, alone, tmp_path):
    run = tmp_path / "run"
    options = (*MANY_BLOCKS, *STEPS[2:], *AVERAGE, "--num_steps", "3")
    trained(recipe, run, *options, ENGINE="fsdp2", WITHOUT_EXPORT="1")
    saved = run / "checkpoints" / "step_00000002"
    assert train(recipe, run, *MANY_BLOCKS, *STEPS, *AVERAGE, "--resume", str(saved)) == 0
    assert digests(run) == digests(alone)
    expected = tensors(alone, 4)
    for name, tensor in tensors(run, 4).items():
        if not name.startswith("optimizer rng"):
            # Gradients are summed in another order, and Adam makes much of a small difference.
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ({"fsdp_version": 1}, "fsdp_version 1: set it to 2"),
        ({"activation_checkpointing": True}, "activation_checkpointing: set the recipe's gradient"),
        ({"cpu_offload": True}, "fsdp_offload_params: set it to false"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP"}, "policy SIZE_BASED_WRAP: set it to TRANSFORMER"),
        ({"tp": True}, "parallelism_config: only data parallel"),
        ({"kind": DistributedType.MEGATRON_LM}, "distributed_type MEGATRON_LM: use DDP or FSDP2"),
        ({}, ""),
    ],
)
def test_engines_that_would_save_what_nobody_can_load_are_refused(option, part):
    """On the plugins of accelerate, which wants a GPU for more of them."""
    kind, tp = option.pop("kind", DistributedType.FSDP), option.pop("tp", False)
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2} | option)
    state = Namespace(fsdp_plugin=plugin, dynamo_plugin=Accelerator(cpu=True).state.dynamo_plugin)
    parallel = Namespace(tp_enabled=tp)
    accelerator = Namespace(state=state, distributed_type=kind, parallelism_config=parallel)
    with pytest.raises(UserError, match=part) if part else contextlib.nullcontext():
        check_engine(accelerator)


@pytest.mark.parametrize(
    ("version", "refused"), [("2.13.0", True), ("2.9.1", True), ("2.14.0", False)]
)
def test_a_macs_gpu_is_taken_with_a_torch_that_is_right_there(monkeypatch, version, refused):
    monkeypatch.setattr(Accelerator, "device", torch.device("mps"))
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    said = pytest.raises(UserError, match=r"a Mac's GPU .* install torch 2\.14")
    with said if refused else contextlib.nullcontext():
        start_engine(load_recipe(["--recipe", "demo"]))


@pytest.mark.sweep
def test_ddp_compiles_once_and_computes_what_one_process_does(recipe, alone, tmp_path):
    run = tmp_path / "run"
    options = (*MANY_BLOCKS, *STEPS, *AVERAGE, "--compile")
    variables = {"ENGINE": "ddp", "BACKEND": "aot_eager", "WITHOUT_EXPORT": "1"}
    stats = trained(recipe, run, *options, **variables)
    assert digests(run) == digests(alone)
    for mine, other in zip(metrics(run), metrics(alone), strict=True):
        names = mine.keys() & {"loss", "grad_norm", "val_loss", "val_loss_ema"}
        # Gradients are summed in another order, and products fused.
        assert [mine[n] for n in names] == pytest.approx([other[n] for n in names], rel=1e-4)
    # Training and evaluation, and the loss's own code: nothing again in later steps.
    assert stats["unique_graphs"] <= 4
