"""How many steps does Muon need to AdamW's final validation loss? Both tuned alike, several seeds.

    python benchmarks/muon.py                                        # the demo's corpus
    python benchmarks/muon.py --dataset_name DIR --output FILE       # another, the demo's tokenizer

The demo's model and batch. AdamW trains for N steps. Muon trains for fractions of N, each with its
own whole schedule, and the fraction at which it would reach AdamW's loss is interpolated between
the two that enclose it. The learning rates of both are chosen from grids of four points, on a seed
that is not counted; the report holds them all. Losses do not depend on how busy the machine is, so
this may run beside other work. They are kept beside the report as they come: started again, it goes
on.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from datetime import date
from pathlib import Path

from gpt2repro.recipe import load_recipe
from gpt2repro.records.metrics import read_metrics
from gpt2repro.system import machine
from gpt2repro.training.run import open_run
from train_accelerate import train

ADAMW_GRID = [{"max_lr": lr} for lr in (7.5e-4, 1.5e-3, 3e-3, 6e-3)]
MUON_GRID = [
    {"muon_lr": muon_lr, "max_lr": max_lr}
    for muon_lr, max_lr in itertools.product((0.02, 0.04), (4e-3, 8e-3))
]
FRACTIONS = [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0]
FIRST_FRACTION = 0.4  # tried first, and where Muon is tuned
TUNING_SEED = 0


def final_loss(options: argparse.Namespace, **fields) -> float:
    """Validation loss at the end of a run with these fields; trained only if not yet known."""
    if options.dataset_name:
        fields |= {"dataset_name": options.dataset_name}
    known = json.loads(options.kept.read_text()) if options.kept.exists() else {}
    run_key = json.dumps(fields, sort_keys=True)
    if run_key not in known:
        known[run_key] = trained_loss(**fields)
        options.kept.parent.mkdir(parents=True, exist_ok=True)
        options.kept.write_text(json.dumps(known, indent=2))
    return known[run_key]


def trained_loss(**fields) -> float:
    """Train the demo recipe with these fields, from nothing."""
    fixed = {"eval_every": 0, "save_every": 0, "sample_every": 0, "min_lr": 0.0}
    with tempfile.TemporaryDirectory() as directory:
        argv = ["--recipe", "demo", "--output_dir", f"{directory}/run"]
        for name, value in (fixed | fields).items():
            argv += [f"--{name}", str(value)]
        with open_run(load_recipe(argv), argv) as run:
            train(run)
        loss = read_metrics(Path(directory) / "run" / "metrics.jsonl")[-1]["val_loss"]
    print(f"{loss:.4f}  {fields}", flush=True)
    return loss


def tune(options, optimizer: str, grid: list[dict], num_steps: int) -> tuple[dict, list]:
    """The best point of the grid on the tuning seed, and all of them with their losses."""
    losses = [
        final_loss(options, optimizer=optimizer, num_steps=num_steps, seed=TUNING_SEED, **point)
        for point in grid
    ]
    tried = [{**point, "val_loss": loss} for point, loss in zip(grid, losses, strict=True)]
    return grid[losses.index(min(losses))], tried


def fraction_needed(options, best: dict, seed: int, target: float) -> tuple[float, dict]:
    """The fraction of N at which Muon's final loss meets `target`, and the losses it took."""
    losses: dict[float, float] = {}

    def loss_at(index: int) -> float:
        fraction = FRACTIONS[index]
        if fraction not in losses:
            steps = round(fraction * options.num_steps)
            losses[fraction] = final_loss(
                options, optimizer="muon", num_steps=steps, seed=seed, **best
            )
        return losses[fraction]

    index = FRACTIONS.index(FIRST_FRACTION)
    while loss_at(index) > target and index < len(FRACTIONS) - 1:
        index += 1
    while index > 0 and loss_at(index - 1) <= target:
        index -= 1
    if losses[FRACTIONS[index]] > target:
        return float("inf"), losses
    if index == 0:
        return FRACTIONS[0], losses
    low, high = FRACTIONS[index - 1], FRACTIONS[index]
    share = (losses[low] - target) / (losses[low] - losses[high])
    return low + share * (high - low), losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_steps", type=int, default=240, help="N, AdamW's steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--dataset_name", help="a corpus other than the demo's")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/muon.json"))
    options = parser.parse_args()
    options.kept = options.output.with_suffix(".losses.json")

    adamw, adamw_tried = tune(options, "adamw", ADAMW_GRID, options.num_steps)
    muon, muon_tried = tune(options, "muon", MUON_GRID, round(FIRST_FRACTION * options.num_steps))
    runs = []
    for seed in options.seeds:
        target = final_loss(
            options, optimizer="adamw", num_steps=options.num_steps, seed=seed, **adamw
        )
        fraction, losses = fraction_needed(options, muon, seed, target)
        runs.append({"seed": seed, "adamw": target, "fraction": fraction, "muon": losses})
        print(f"seed {seed}: AdamW {target:.4f} in {options.num_steps}, Muon needs {fraction:.3f}")
    fractions = [run["fraction"] for run in runs]
    report = {
        "date": date.today().isoformat(),
        **machine.describe(),
        "corpus": options.dataset_name or "python-docs",
        "num_steps": options.num_steps,
        "adamw": {"best": adamw, "tried": adamw_tried},
        "muon": {"best": muon, "tried": muon_tried},
        "runs": runs,
        "mean_fraction": statistics.mean(fractions),
        "stdev_of_fractions": statistics.stdev(fractions) if len(fractions) > 1 else None,
    }
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    options.kept.unlink()
    print(f"Muon needs {report['mean_fraction']:.3f} of AdamW's steps ({options.output})")


if __name__ == "__main__":
    main()
