"""GPT-2 124M on a corpus at hand, with AdamW and with Muon, each stopped once and resumed.

    python benchmarks/pretrain.py --dataset_name BOOKS --tokenizer_name GPT2_BPE --num_steps 400 \\
        --output benchmarks/results/books.json -- --batch_tokens 131072 --num_lanes 8

For a machine with a GPU that is there for minutes: what a run of recipes/gpt2.yaml looks like,
beside one of recipes/gpt2-muon.yaml on the same rows (`--optimizers` names one alone). Each is told
to stop (SIGTERM) half way and started again by the same command. Fields after `--` override both
recipes. The report has every run's curves, tokens/s, MFU, peak memory and where it was resumed;
pictures lie beside it.
"""

import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pairing import circumstances, table, write_json

from gpt2repro import UserError
from gpt2repro.commands import plots
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.recipe import load_recipe
from gpt2repro.records.metrics import read_metrics
from gpt2repro.system.command_line import run
from train_accelerate import EXIT_PREEMPTED

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {"adamw": "gpt2", "muon": "gpt2-muon"}
LOOK_SECONDS = 0.2


def trained(output: Path, fields: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """One run, stopped half way and resumed; what its metrics say."""
    command = [sys.executable, str(ROOT / "train_accelerate.py"), "--output_dir", str(output)]
    for name, value in fields.items():
        command += [f"--{name}", str(value)]
    began = time.monotonic()
    launch([*command, *overrides], output, EXIT_PREEMPTED, stop_at=fields["num_steps"] // 2)
    resumed_at = read_metrics(output / "metrics.jsonl")[-1]["step"] + 1
    launch([*command, *overrides], output, 0)
    seconds = time.monotonic() - began

    metrics = read_metrics(output / "metrics.jsonl")
    losses = [(line["step"], line["loss"]) for line in metrics if line.get("loss") is not None]
    steps = [step for step, _ in losses]
    assert steps == sorted(set(steps)), f"{output}: a step was logged twice, or out of order"
    validation = {line["step"]: line["val_loss"] for line in metrics if "val_loss" in line}
    utilization = [line["mfu"] for line in metrics if line.get("mfu") is not None]
    return {
        "resumed_at": resumed_at,
        "seconds": seconds,
        "losses": dict(losses),
        "validation_losses": validation,
        "final_validation_loss": validation[max(validation)],
        "tokens_per_second": statistics.median(
            line["tokens_per_second"] for line in metrics if line.get("tokens_per_second")
        ),
        "mfu": statistics.median(utilization) if utilization else None,
        "data_wait_fraction": statistics.median(
            line["data_wait_fraction"] for line in metrics if "data_wait_fraction" in line
        ),
        "micro_batch_size": load_recipe(["--recipe", str(output / "recipe.yaml")]).micro_batch_size,
        "peak_memory_gib": max(line.get("peak_memory_gib", 0) for line in metrics),
    }


def launch(command: list[str], output: Path, status: int, stop_at: int | None = None) -> None:
    """Run a training command to its end, or to `stop_at` steps; it must end with `status`."""
    log_path = output.parent / f"{output.name}.log"
    with log_path.open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                time.sleep(LOOK_SECONDS)
                if stop_at is None:
                    continue
                lines = read_metrics(output / "metrics.jsonl")
                if lines and lines[-1]["step"] >= stop_at:
                    process.send_signal(signal.SIGTERM)
                    stop_at = None
        finally:
            process.kill()
            process.wait()
    if process.returncode != status:
        end = log_path.read_text()[-2000:]
        raise UserError(f"the run ended with status {process.returncode}, not {status}:\n{end}")


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="benchmarks/pretrain.py", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--tokenizer_name", default="openai-community/gpt2")
    parser.add_argument("--num_steps", type=int, required=True)
    parser.add_argument("--optimizers", nargs="+", choices=RECIPES, default=[*RECIPES])
    parser.add_argument("--output", required=True, help="JSON; pictures get its name")
    parser.add_argument("overrides", nargs="*", help="of the recipes, after --")
    arguments = parser.parse_args(argv)

    num_steps, overrides = arguments.num_steps, arguments.overrides
    fields = {
        "dataset_name": arguments.dataset_name,
        "dataset_config": "null",
        "tokenizer_name": arguments.tokenizer_name,
        "num_validation_units": 1,
        "num_steps": num_steps,
        "warmup_steps": num_steps // 20,
        "eval_every": max(1, num_steps // 10),
        "sample_every": 0,
        "save_every": 0,
    }
    around = circumstances({"num_steps": num_steps, "overrides": overrides})
    with tempfile.TemporaryDirectory() as directory:
        outputs = {name: Path(directory) / name for name in arguments.optimizers}
        runs = {
            name: trained(output, {"recipe": RECIPES[name]} | fields, overrides)
            for name, output in outputs.items()
        }
        first, *others = map(str, outputs.values())
        compared = ["--compare", *others] if others else []
        plots.main([first, *compared, "--output", str(Path(arguments.output).with_suffix(""))])
    rows = [
        [
            name,
            f"{found['final_validation_loss']:.4f}",
            f"{found['tokens_per_second']:,.0f}",
            "-" if found["mfu"] is None else f"{found['mfu']:.1%}",
            f"{found['peak_memory_gib']:.1f}",
            f"{found['data_wait_fraction']:.1%}",
            str(found["resumed_at"]),
        ]
        for name, found in runs.items()
    ]
    header = ["", "validation loss", "tokens/s", "MFU", "peak GiB", "waited", "resumed at step"]
    print(table(header, rows))
    write_json(arguments.output, {"benchmark": "pretrain", **around, "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(run("benchmarks/pretrain.py", main, sys.argv[1:]))
