"""One process, DDP of one and FSDP2 of one on the same rows; then a resume and an export.

    python benchmarks/engines.py --output benchmarks/results/gpu/engines.json -- \\
        --dataset_name CORPUS --dataset_config null --tokenizer_name GPT2_BPE

A few steps of the training script on each engine that one device can be given, with validations and
samples between them. Their losses must agree, and nothing may be compiled after the second step.
The first one is then resumed from its middle: on a CPU bit for bit, on a GPU to what is reported
here. Fields after `--` override recipes/gpt2.yaml.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from pairing import circumstances, table, write_json
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.recipe import load_recipe
from gpt2repro.records.metrics import read_metrics
from gpt2repro.system import ranks
from gpt2repro.system.command_line import run
from gpt2repro.training.finish import finish
from gpt2repro.training.monitor import Monitor
from gpt2repro.training.run import open_run
from train_accelerate import train

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1"]
LAUNCHERS = {
    "one": [sys.executable],
    "ddp": TORCHRUN,
    "fsdp2": [*ACCELERATE, "--config_file", str(ROOT / "launch" / "fsdp2.yaml")],
}
STEPS, MIDDLE = 8, 4
FIELDS = {"num_steps": STEPS, "warmup_steps": 2, "save_every": MIDDLE, "keep_last": 2}
FIELDS |= {"eval_every": 2, "sample_every": 2, "num_validation_units": 1}
FIELDS |= {"validation_tokens": 131072}
# Losses lie between 5 and 11, which bfloat16 knows to 2**-6; a mean over many tokens, better.
LARGEST_DIFFERENCE = 0.02


class Counting(Monitor):
    """Also says how many graphs Dynamo has compiled by the end of each step."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.graphs: list[int] = []

    def report(self, *step: Any) -> None:
        super().report(*step)
        self.graphs.append(counters["stats"]["unique_graphs"])


def worker(argv: list[str]) -> int:
    """One process of one engine: the training script, and what its monitor has counted."""
    with open_run(load_recipe(argv), argv, Counting) as opened:
        status = train(opened)
        if not status and "EXPORTS" in os.environ:
            status = finish(opened)
    assert isinstance(opened.monitor, Counting)
    counted = opened.directory.metrics.parent / "graphs.json"
    counted.write_text(json.dumps(opened.monitor.graphs))
    ranks.leave_group()
    return status


def trained(engine: str, output: Path, overrides: list[str], **variables: str) -> dict[str, Any]:
    """What a run says of itself."""
    command = [*LAUNCHERS[engine], __file__, "--worker", "--output_dir", str(output), *overrides]
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        raise UserError(f"{engine} ended with status {done.returncode}:\n{said}")
    lines = read_metrics(output / "metrics.jsonl")
    return {
        "losses": [line["loss"] for line in lines if line.get("loss") is not None],
        "validation_losses": [line["val_loss"] for line in lines if "val_loss" in line],
        "digests": [line["rows_digest"] for line in lines if "rows_digest" in line],
        "peak_memory_gib": max(line.get("peak_memory_gib", 0.0) for line in lines),
        "graphs": json.loads((output / "graphs.json").read_text()),
    }


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors")


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    names = ("losses", "validation_losses")
    return max(abs(a - b) for n in names for a, b in zip(ours[n], theirs[n], strict=True))


def resumed(first: dict[str, Any], output: Path, overrides: list[str]) -> dict[str, Any]:
    """The run in `output` once more from its middle, against what it was at `first`."""
    before = weights(output)
    middle = output / "checkpoints" / f"step_{MIDDLE:08d}"
    again = trained("one", output, [*overrides, "--resume", str(middle)])
    after = weights(output)
    differences = [(after[n].float() - before[n].float()).abs().max().item() for n in before]
    return {
        "same_rows": again["digests"] == first["digests"],
        "weights_bitwise_equal": not any(differences),
        "largest_difference_of_a_weight": max(differences),
    }


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="benchmarks/engines.py", description=__doc__.split("\n")[0])
    # On CPUs accelerate has no FSDP: tests/training/test_engines.py takes it there.
    possible = list(LAUNCHERS) if torch.cuda.is_available() else ["one", "ddp"]
    parser.add_argument("--engines", nargs="+", choices=LAUNCHERS, default=possible)
    parser.add_argument("--no_export", action="store_true", help="leave the export out")
    parser.add_argument("--output", help="JSON")
    parser.add_argument("overrides", nargs="*", help="of the recipe, after --")
    arguments = parser.parse_args(argv)

    ours = {f"--{name}": str(value) for name, value in FIELDS.items()}
    fields = [w for pair in ours.items() if pair[0] not in arguments.overrides for w in pair]
    overrides = [*fields, *arguments.overrides]
    around = circumstances(vars(arguments))
    with tempfile.TemporaryDirectory() as directory:
        engines = arguments.engines
        outputs = {engine: Path(directory) / engine for engine in engines}
        found = {each: trained(each, at, overrides) for each, at in outputs.items()}
        resume = resumed(found["one"], outputs["one"], overrides)
        if not arguments.no_export:
            trained("one", outputs["one"], overrides, EXPORTS="1")
        micro_batch_size = load_recipe(
            ["--recipe", str(outputs["one"] / "recipe.yaml")]
        ).micro_batch_size
    differences = {each: largest_difference(found["one"], found[each]) for each in engines}
    late = {each: found[each]["graphs"][-1] - found[each]["graphs"][1] for each in engines}
    same_rows = all(each["digests"] == found["one"]["digests"] for each in found.values())
    holds = (
        same_rows
        and resume["same_rows"]
        and max(differences.values()) <= LARGEST_DIFFERENCE
        and not any(late.values())
    )
    rows = [
        [each, f"{differences[each]:.4f}", str(late[each]), f"{found[each]['peak_memory_gib']:.2f}"]
        for each in engines
    ]
    print(table(["", "largest difference of a loss", "graphs after step 1", "peak GiB"], rows))
    print(f"resumed: {resume}")
    print("All holds." if holds else "NOT as it should be.")
    results = {"engines": found, "largest_difference": differences, "graphs_after_step_1": late}
    results |= {"resume": resume, "micro_batch_size": micro_batch_size, "holds": holds}
    write_json(arguments.output, {"benchmark": "engines", **around, **results})
    return 0 if holds else 1


if __name__ == "__main__":
    is_worker = sys.argv[1:2] == ["--worker"]
    sys.exit(run("benchmarks/engines.py", worker if is_worker else main, sys.argv[1 + is_worker :]))
