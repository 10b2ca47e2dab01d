"""What is marked `gpu`, where there is none, and what two GPUs would do: see fake_gpu.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import fake_gpu
import pytest
from tiny_run import digests, free_port, losses, train, without_export, write_inputs

ROOT = Path(__file__).resolve().parent.parent
FAKE = str(ROOT / "tests" / "fake_gpu.py")
# The others are of kernels, and how fast they are.
OF_ANY_DEVICE = "runs_on_gpus or skips_an_update or micro_batch_that_is_found"
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.skipif(fake_gpu.missing() is not None, reason=fake_gpu.missing() or "")


def test_what_is_marked_gpu():
    command = [sys.executable, FAKE, "-m", "pytest", "-q", "-m", "gpu", "-k", OF_ANY_DEVICE]
    files = ["tests/speed/test_on_gpus.py", "tests/training/test_runs_on_gpus.py"]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    passed = re.search(r"\n(\d+) passed, \d+ deselected", result.stdout)
    assert passed and int(passed[1]) >= 7, "none of them was skipped"


def launch(config: str, recipe: Path, run: Path, *options: str) -> str:
    """What two processes say, of one GPU each, as if `accelerate launch` had two machines."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "launch" / config)]
    command += ["--main_process_port", str(free_port())]
    command += ["--num_processes", "2", "--num_machines", "2", "--main_process_ip", "127.0.0.1"]
    script = [FAKE, str(ROOT / "train_accelerate.py"), "--recipe", str(recipe)]
    machines = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank), *script, "--output_dir", str(run), *options],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said[0][-5000:]
    return said[0]


@pytest.mark.sweep
@pytest.mark.exports
def test_two_gpus_by_ddp_then_sharded_then_one_cpu(tmp_path):
    """The launch files as they are, compiled, in bfloat16; each goes on from the one before."""
    recipe = write_inputs(tmp_path)
    run, alone = tmp_path / "run", tmp_path / "alone"
    options = ["--optimizer", "muon", "--ema_decay", "0.9", "--sample_every", "4"]
    options += ["--min_lr", "1e-2"]  # max_lr: a constant, whatever num_steps is
    on_gpu = [*options, "--mixed_precision", "bf16", "--compile", "true"]
    said = launch("ddp.yaml", recipe, run, *on_gpu, "--num_steps", "4")
    assert "2 processes, DDP, bf16, compiled, on 1 x NVIDIA" in said
    said = launch("fsdp2.yaml", recipe, run, *on_gpu, "--num_steps", "8")
    assert "2 processes, FSDP2, bf16, compiled" in said and "going on from its step 4" in said
    with without_export():
        assert train(recipe, run, *options) == 0
        assert train(recipe, alone, *options) == 0
    assert digests(run) == digests(alone) and len(digests(alone)) == 12
    assert losses(run) == pytest.approx(losses(alone), rel=2**-6)  # bfloat16 has 8 bits
