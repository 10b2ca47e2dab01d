"""The track: fewest steps to the same validation loss on a stock GPT-2, by one set of rules.

    python benchmarks/track.py run a --minutes 50        # again, until it prints the table
    python benchmarks/track.py summary a
    python benchmarks/track.py repeat benchmarks/results/track/a/rows/muon-150
    python benchmarks/track.py transfer b --points_of a
    python benchmarks/track.py time a                    # of a step, on a quiet machine

Rules
1. A scale fixes architecture, text, tokenizer, batch, the share of the steps that warm up, and what
   is held out. Every run trains by `train_accelerate.train`, on the rows that its seed gives; its
   file has their digest at every step, and a summary refuses runs of a seed that had other rows.
2. A side is an optimizer with three knobs. Each side of a scale gets the same search with the same
   number of points, all listed: most spread evenly over the logarithms of the knobs' ranges, then
   a few at a time (`refined`) over ranges a quarter as wide around the best so far, which may leave
   the first ranges. A best point near an end of them is told: they may be too narrow. The tuning
   seed, 0, is not counted. Sides with AdamW are tuned at N steps, the others at half of them.
3. The target is the upper 95 % bound (Student's t, one side) of the mean of AdamW's validation
   losses after N steps, over at least 8 seeds, rounded up to a thousandth.
4. A side's result is the fewest steps, in fortieths of N, at which the same bound of its own mean
   lies at or below the target. Each length is a run of its own with its whole schedule. From a
   guess (`--guess`) it is lengthened until it reaches the target, or shortened while it does; every
   length that was tried stays in the table, also one that failed. Where the mean of its first four
   seeds is above the target, a length has failed without the others.
5. What is only tried (`--tried`) has no search: one change to plain AdamW or Muon, with its knobs
   and at its fewest steps, on four seeds. Its row says by how much the loss differs on them.
6. `transfer` takes the best points of one scale to another as they are: AdamW's for all the steps,
   every other side's for the share of them that it needed where it was tuned. It sets no target.

Every run is a file of its own, written when it is done. What is killed goes on from its last
checkpoint, or is told to (SIGTERM) when the minutes are over. A file has the whole recipe and the
threads, which is all that `repeat` needs: on the same machine in fp32 its losses must be the same.
"""

import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from pairing import table, write_json

from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.plots.curves import smooth
from gpt2repro.plots.style import PALETTE, legend, new_figure, reference_line, save
from gpt2repro.recipe import load_recipe
from gpt2repro.records.metrics import read_metrics
from gpt2repro.system import atomic, machine, ranks
from gpt2repro.system.command_line import run
from gpt2repro.training.run import open_run
from train_accelerate import EXIT_PREEMPTED, train

TUNING_SEED, FIRST_SEEDS, LEAST_SEEDS = 0, 4, 8
LENGTHS = range(8, 41)  # in fortieths of AdamW's steps
TUNED_AT = 0.5  # of them
WARMUP = 1 / 15
NOT_COUNTED = ("transfer", "more")  # more: points beyond a search, to see what it has missed
NEAR_AN_END = 0.1  # of a range, in its logarithm
DECIDED_BY_DATA = ("num_validation_units", "dataset_revision")  # where a recipe has null
SHAPE = (
    *("model_size", "n_layer", "n_head", "n_embd", "sequence_length", "batch_tokens"),
    *("mixed_precision", "validation_tokens"),
)
# Student's t, 95 % to one side, by degrees of freedom from 1; beyond, the last is a little too wide
T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771)


Knobs = dict[str, tuple[float, float]]  # what a search varies, from where to where
OF_MUON: Knobs = {"muon_lr": (5e-3, 0.1), "max_lr": (1e-3, 0.1), "muon_weight_decay": (1e-2, 1.0)}
# A first search of `a`, with scales of 0.3 to 10, ended at 12 and still fell: it is not counted.
OF_ADAMW: Knobs = {
    **{"max_lr": (1e-4, 1e-2), "embedding_lr_scale": (1.0, 100.0), "weight_decay": (1e-2, 1.0)}
}


class Scale(NamedTuple):
    num_steps: int  # N
    num_points: int  # of a side's search
    refined: tuple[int, ...]  # of them, round by round
    fields: dict[str, Any]
    of_adamw: Knobs = OF_ADAMW


# Whatever a recipe says, which may have its figures from here; a side may say otherwise.
PLAIN = {
    **{"schedule": "cosine", "cooldown_fraction": 0.2, "matrix_cooldown_fraction": "null"},
    **{"muon_lr": 0.02, "muon_weight_decay": 0.0, "min_lr": 0.0},
    **{"muon_momentum_warmup_steps": 0, "embedding_lr_scale": 1.0},
    **{"eval_every": 0, "sample_every": 0, "resume": "auto"},
}
OF_B = {
    **{"recipe": "demo", "dataset_name": "../shared/data/books"},
    **{"n_layer": 12, "n_head": 4, "n_embd": 256, "micro_batch_size": 32},
    **PLAIN,
}
OF_B4 = {
    **{"sequence_length": 512, "batch_tokens": 16384, "validation_tokens": 262144},
    "mixed_precision": "bf16",
}
SCALES = {
    # 3 x 192 on the prose that Python carries, with the demo's own BPE
    "a": Scale(300, 24, (4, 4), {"recipe": "demo", "micro_batch_size": 16, **PLAIN}),
    # 10.6 M parameters on books by the demo's BPE. AdamW's best point at `b4` was outside of its
    # ranges: here they are around it.
    "b": Scale(
        160,
        12,
        (2, 2),
        OF_B | {"batch_tokens": 8192, "validation_tokens": 65536},
        OF_ADAMW | {"max_lr": (5e-5, 5e-3), "embedding_lr_scale": (3.0, 300.0)},
    ),
    # twice its context and three times its tokens, in bf16: begun, and too much for two cores
    "b4": Scale(244, 18, (2,) * 5, OF_B | OF_B4),
    # the reproduction's first quarter, on GPUs: see --launcher
    "c": Scale(4768, 18, (2,) * 5, {"recipe": "gpt2", "save_every": 250, **PLAIN}),
}

POWERCOOL = {"schedule": "power", "cooldown_fraction": 0.5, "matrix_cooldown_fraction": 0.8}
MUONS: dict[str, dict[str, Any]] = {
    "muon": {},
    "muon-linear": {"schedule": "linear"},
    "muon-power": POWERCOOL,
    "muon-cautious": {"cautious_weight_decay": True},
    "muon-scheduled": {"scheduled_weight_decay": True},
    "muon-row": {"embedding_second_moment": "row"},
    "muon-factored": {"embedding_second_moment": "factored"},
    "muon-heads": {"muon_heads": True},
    "normuon": {"muon_normalize": True},
    "muon-momentum": {"muon_momentum_warmup_steps": 50},
    "muon-bare-embedding": {"embedding_weight_decay": 0.0},
    "muon-slow-embedding": {"embedding_lr_scale": 0.5},
    "muon-fast-embedding": {"embedding_lr_scale": 2.0},
    "muon-fast-vectors": {"vector_lr_scale": 3.0},
    # what helped, together
    "muon-linear-momentum": {"schedule": "linear", "muon_momentum_warmup_steps": 50},
    "muon-together": {
        **{"schedule": "linear", "muon_momentum_warmup_steps": 50, "embedding_lr_scale": 2.0}
    },
}
ADAMWS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw-linear": {"schedule": "linear"},
    "adamw-power": {"schedule": "power", "cooldown_fraction": 0.5},
    "adamw-cautious": {"cautious_weight_decay": True},
    "adamw-row": {"embedding_second_moment": "row"},
    # Muon's vectors and positions have another rate than its matrices: would that help AdamW?
    "adamw-fast-vectors": {"vector_lr_scale": 3.0},
    "adamw-fast-positions": {"position_lr_scale": 10.0},
    "adamw-bare-embedding": {"embedding_weight_decay": 0.0},
}
SIDES: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": "adamw", **more} for name, more in ADAMWS.items()},
    **{name: {"optimizer": "muon", **more} for name, more in MUONS.items()},
}


class TimeIsOver(Exception):
    """The minutes that were given; what was begun has been saved."""


# --- One run --------------------------------------------------------------------------------------


def train_one(recipe_file: Path, directory: Path, output: Path) -> None:
    """Train what `recipe_file` says in `directory`, or go on there; when done, write `output`."""
    argv = ["--recipe", str(recipe_file), "--output_dir", str(directory)]
    given = load_recipe(argv)
    with open_run(given, argv) as opened:
        if train(opened) == EXIT_PREEMPTED:
            return
        of_this_machine = {"output_dir": None, "dataset_name": given.dataset_name}
        recipe = opened.recipe.model_dump() | of_this_machine
    if ranks.rank() != 0:
        return
    lines = read_metrics(directory / "metrics.jsonl")
    steps = [line for line in lines if "rows_digest" in line]
    rates = [line["tokens_per_second"] for line in steps if line.get("tokens_per_second")]
    record = {
        "val_loss": lines[-1].get("val_loss"),  # null: it diverged
        "losses": [line["loss"] for line in steps],
        "rows_digests": [line["rows_digest"] for line in steps],
        "seconds_per_step": recipe["batch_tokens"] / statistics.median(rates) if rates else None,
        "threads": torch.get_num_threads(),
        "commit": machine.launch(argv).commit,
        "environment": machine.describe(),
        "recipe": recipe,
    }
    with atomic.new_file(output) as scratch:
        scratch.write_text(json.dumps(record) + "\n", encoding="utf-8")


def start_one(fields: dict[str, Any], output: Path, options: Namespace) -> dict[str, Any]:
    """The record of `train_one` in a process of its own, or that of an earlier one.

    Raises:
        TimeIsOver: before it was done; it has been told to save.
        UserError: it failed, or the record is of another run.
    """
    work = options.output / "work" / "-".join(output.with_suffix("").parts[-4:])
    if output.exists():
        check_same(fields, read(output)["recipe"], output)
    else:
        if (left := options.deadline - time.monotonic()) <= 0:
            raise TimeIsOver
        for directory in (work, output.parent):
            directory.mkdir(parents=True, exist_ok=True)
        recipe_file = work / "recipe.yaml"
        if recipe_file.exists():
            check_same(fields, yaml.safe_load(recipe_file.read_text(encoding="utf-8")), work)
        recipe_file.write_text(yaml.safe_dump(fields), encoding="utf-8")
        words = map(str, ("one", recipe_file, work / "run", output))
        # The second says that it has a launcher, with which it saves and ends.
        ours = {"OMP_NUM_THREADS": str(options.threads), "ACCELERATE_MIXED_PRECISION": "no"}
        with (work / "log").open("a") as log:
            process = subprocess.Popen(
                [*options.launcher, __file__, *words], stdout=log, stderr=log, env=os.environ | ours
            )
            try:
                process.wait(left)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
        if not output.exists():
            if time.monotonic() >= options.deadline:
                raise TimeIsOver
            said = (work / "log").read_text(errors="replace").strip().rpartition("\n")[2]
            raise UserError(f"a run failed or was stopped: {said[-300:]} ({work / 'log'})")
        shutil.rmtree(work, ignore_errors=True)
        print(f"{output}: {read(output)['val_loss']}", flush=True)
    return read(output)


def check_same(fields: dict[str, Any], known: dict[str, Any], where: Path) -> None:
    for name in (fields.keys() & known.keys()) - {"output_dir"}:
        left_to_the_data = fields[name] is None and name in DECIDED_BY_DATA
        if fields[name] != known[name] and not left_to_the_data:
            now = f"it has {name} {known[name]}, and is to have {fields[name]}"
            raise UserError(f"{where} is of another run: {now}; move it away")


def start_all(jobs: list[tuple[dict[str, Any], Path]], options: Namespace) -> list[float]:
    """The jobs' validation losses, infinite where one diverged."""
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(start_one, *each, options) for each in jobs]
        try:
            return [loss_of(future.result()) for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure; else nothing is left


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def loss_of(record: dict[str, Any]) -> float:
    return math.inf if record["val_loss"] is None else record["val_loss"]


# --- The search -----------------------------------------------------------------------------------


def spread_evenly(knobs: Knobs, count: int, first: int = 0) -> list[dict[str, float]]:
    """`count` points over the logarithms of the ranges, from the `first`; 0 is in the middle.

    The n-th is 1/2 + n (1/g, 1/g^2, ...) modulo 1, with g^(d+1) = g + 1 for d knobs (Roberts 2018,
    "The unreasonable effectiveness of quasirandom sequences").
    """
    g = 1.5
    for _ in range(50):
        g = (1 + g) ** (1 / (len(knobs) + 1))
    return [
        {
            name: float(f"{low * (high / low) ** ((0.5 + n / g**power) % 1):.3g}")
            for power, (name, (low, high)) in enumerate(knobs.items(), 1)
        }
        for n in range(first, first + count)
    ]


def around(point: dict[str, float], knobs: Knobs) -> Knobs:
    """Ranges a quarter as wide in logarithms, with `point` in the middle."""
    reach = {name: (high / low) ** (1 / 8) for name, (low, high) in knobs.items()}
    return {name: (value / reach[name], value * reach[name]) for name, value in point.items()}


def job(side: str, point: dict[str, float], steps: int, seed: int, options: Namespace) -> dict:
    """Every field of a run's recipe."""
    data = {"dataset_name": options.dataset_name} if options.dataset_name else {}
    length = {"num_steps": steps, "warmup_steps": round(WARMUP * steps), "seed": seed}
    fields = {**SCALES[options.scale].fields, **SIDES[side], **point, **length, **data}
    return load_recipe([f"--{name}={value}" for name, value in fields.items()]).model_dump()


def jobs_of(
    side: str, point: dict[str, float], steps: int, kind: str, options: Namespace
) -> list[tuple[dict[str, Any], Path]]:
    """A row's runs, one a seed, and their files."""
    directory = options.output / options.scale / kind / f"{side}-{steps}"
    seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + options.seeds)
    return [(job(side, point, steps, n, options), directory / f"{n}.json") for n in seeds]


def tune(side: str, options: Namespace) -> dict[str, float]:
    """The best of the side's points."""
    scale, knobs = SCALES[options.scale], knobs_of(side, options.scale)
    steps = round(scale.num_steps * (1 if plain(side) == "adamw" else TUNED_AT))
    directory = options.output / options.scale / "tuning" / side
    points, begin = spread_evenly(knobs, scale.num_points - sum(scale.refined)), 1

    def best() -> dict[str, float]:
        jobs = [job(side, point, steps, TUNING_SEED, options) for point in points]
        jobs = [(it, directory / f"{n:02}.json") for n, it in enumerate(jobs)]
        losses = start_all(jobs, options)
        return points[losses.index(min(losses))]

    for count in scale.refined:
        points += spread_evenly(around(best(), knobs), count, begin)
        begin += count
    return best()


def plain(side: str) -> str:
    """The side that another is a change to."""
    return SIDES[side]["optimizer"]


def knobs_of(side: str, scale: str) -> Knobs:
    return SCALES[scale].of_adamw if plain(side) == "adamw" else OF_MUON


# --- The race -------------------------------------------------------------------------------------


def upper_bound(losses: list[float]) -> float:
    """Of the mean, 95 % to one side."""
    if math.inf in losses or len(losses) < 2:
        return math.inf
    t = T95[min(len(losses) - 1, len(T95)) - 1]
    return statistics.mean(losses) + t * statistics.stdev(losses) / len(losses) ** 0.5


def target_of(losses: list[float]) -> float:
    if len(losses) < LEAST_SEEDS or math.inf in losses:
        raise UserError(
            f"AdamW sets no target: it takes {LEAST_SEEDS} seeds, of which none may diverge, and "
            f"has {len(losses)} with {losses.count(math.inf)} that did"
        )
    return math.ceil(upper_bound(losses) * 1000) / 1000


def run_scale(options: Namespace) -> None:
    """All of it: AdamW's tuning and target; of every side its tuning, then its fewest steps."""
    num_steps, target = SCALES[options.scale].num_steps, math.inf
    if options.seeds < LEAST_SEEDS:
        raise UserError(f"--seeds {options.seeds}: a target takes {LEAST_SEEDS} at least")
    for changed in options.tried:
        if plain(changed) not in ("adamw", *options.sides):
            raise UserError(
                f"--tried {changed}: add {plain(changed)}, which it changes, to --sides"
            )

    def race(side: str, point: dict[str, float], steps: int) -> list[float]:
        jobs = jobs_of(side, point, steps, "rows", options)
        first = start_all(jobs[:FIRST_SEEDS], options)
        return first if statistics.mean(first) > target else start_all(jobs, options)

    def reaches(side: str, point: dict[str, float], steps: int) -> bool:
        return upper_bound(race(side, point, steps)) <= target

    for side in dict.fromkeys(["adamw", *options.sides]):
        best, fewest = tune(side, options), num_steps
        if side == "adamw":
            target = target_of(race(side, best, num_steps))
        else:
            fewest = fewest_steps(num_steps, options.guess, partial(reaches, side, best))
        for changed in options.tried:
            if plain(changed) == side:
                jobs = jobs_of(changed, best, fewest, "tried", options)  # as a side: other knobs
                start_all(jobs[:FIRST_SEEDS], options)
    summarize(options)


def fewest_steps(num_steps: int, guess: float, reaches: Callable[[int], bool]) -> int:
    """The shortest length that reaches the target, or the longest; longer ones are taken to."""
    lengths = [round(n / 40 * num_steps) for n in LENGTHS]
    at = LENGTHS.index(round(40 * guess))
    while not reaches(lengths[at]) and at + 1 < len(lengths):
        at += 1
    while at > 0 and reaches(lengths[at - 1]):
        at -= 1
    return lengths[at]


# --- Answers --------------------------------------------------------------------------------------


def summarize(options: Namespace) -> None:
    """Print the table of a scale and write it beside the runs, with every point that was tried."""
    directory, num_steps = options.output / options.scale, SCALES[options.scale].num_steps
    runs: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for path in sorted(directory.glob("*/*/*.json")):
        record, (kind, name) = read(path), path.parts[-3:-1]
        if kind in NOT_COUNTED:
            continue
        side = name if kind == "tuning" else name.rpartition("-")[0]
        runs.setdefault((kind, side, record["recipe"]["num_steps"]), []).append(record)
    check_rules([record for records in runs.values() for record in records])
    adamw = runs.get(("rows", "adamw", num_steps), [])
    target = target_of([*map(loss_of, adamw)])
    rows, points = [], {}
    for (kind, side, steps), records in sorted(runs.items(), key=lambda each: each[0]):
        if kind == "tuning":
            knobs = knobs_of(side, options.scale)
            points[side] = [
                {name: each["recipe"][name] for name in knobs} | {"val_loss": each["val_loss"]}
                for each in records
            ]
            tell_edges(side, knobs, min(records, key=loss_of)["recipe"])
            continue
        bound = upper_bound([*map(loss_of, records)])
        more = {
            "tuned": kind == "rows",
            "upper_bound": None if bound == math.inf else bound,
            "counts": len(records) >= LEAST_SEEDS and bound <= target,
            "against_plain": difference(records, runs.get(("rows", plain(side), steps), [])),
        }
        rows.append(row_of(side, records, adamw) | more)
    show(rows)
    print(f"target {target:.3f}; seconds of a step, as busy as the machine was, in AdamW's")
    report = {"target": target, "rows": rows, "points": points}
    write_json(str(directory.with_suffix(".summary.json")), report)
    shown_runs = {row["side"]: runs["rows", row["side"], row["steps"]] for row in shortest(rows)}
    save(draw(shown_runs, target), directory.with_suffix(".svg"))


def row_of(side: str, records: list[dict[str, Any]], adamw: list[dict[str, Any]]) -> dict[str, Any]:
    """What a table says of runs that differ in their seeds, beside AdamW's."""
    losses, steps = [*map(loss_of, records)], records[0]["recipe"]["num_steps"]
    return {
        "side": side,
        "steps": steps,
        "of_adamws_steps": steps / adamw[0]["recipe"]["num_steps"],
        "losses": [each["val_loss"] for each in records],
        "mean": None if math.inf in losses else statistics.mean(losses),
        "against_adamw": difference(records, adamw),
        "seconds_of_adamws": seconds(records) / seconds(adamw),
        "hardware": sorted({str(each["environment"].get("hardware")) for each in records}),
    }


def show(rows: list[dict[str, Any]]) -> None:
    header = [name for name in rows[0] if name != "hardware"]
    print(table(header, [[shown(name, row[name]) for name in header] for row in rows]))


def shortest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each side the row that counts and has the fewest steps; `rows` rise in them."""
    counted = [row for row in rows if row["counts"] and row["tuned"]]
    return [*{row["side"]: row for row in reversed(counted)}.values()]


def best_point(summary: dict[str, Any], side: str) -> dict[str, float]:
    point = min(summary["points"][side], key=loss_of)
    return {name: value for name, value in point.items() if name != "val_loss"}


def time_steps(options: Namespace) -> None:
    """Print and write what a step of each tuned side takes in AdamW's: short runs, in turn."""
    summary = read(options.output / f"{options.scale}.summary.json")
    sides, place = [*summary["points"]], options.output / f"{options.scale}.time.json"
    taken: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as directory:
        options.output = Path(directory)
        for turn in range(options.turns):
            for side in sides:
                fields = job(side, best_point(summary, side), options.steps, TUNING_SEED, options)
                file = Path(directory) / "time" / side / f"{turn}.json"
                taken[side].append(start_one(fields, file, options)["seconds_per_step"])
    rows = []
    for side in sides:
        ratios = [own / adamw for own, adamw in zip(taken[side], taken["adamw"], strict=True)]
        found = [statistics.median(ratios), min(ratios), max(ratios)]
        rows.append({"side": side, "seconds": taken[side], "of_adamws": found})
        print(side, "{:.3f} ({:.3f} to {:.3f}) of AdamW's seconds a step".format(*found))
    write_json(str(place), {"rows": rows, "steps": options.steps, **machine.describe()})


def transfer(options: Namespace) -> None:
    """Print and write what the best points of another scale give at this one, untuned."""
    known = read(options.output / f"{options.points_of}.summary.json")
    num_steps = SCALES[options.scale].num_steps
    rows, adamw = [], []
    for there in sorted(shortest(known["rows"]), key=lambda row: -row["steps"]):  # AdamW is first
        side, steps = there["side"], round(there["of_adamws_steps"] * num_steps)
        jobs = jobs_of(side, best_point(known, side), steps, "transfer", options)
        start_all(jobs, options)
        records = [read(file) for _, file in jobs]
        adamw = adamw or records
        check_rules(adamw + records)
        rows.append(row_of(side, records, adamw))
    show(rows)
    write_json(str(options.output / f"{options.scale}.transfer.json"), {"rows": rows})


def difference(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[float] | None:
    """The mean by which our loss is above the others' on the same seeds, its standard error, and
    the upper bound of the mean.

    None where a run diverged: the others would look better than the whole.
    """
    theirs = {each["recipe"]["seed"]: loss_of(each) for each in others}
    pairs = [(loss_of(each), theirs.get(each["recipe"]["seed"])) for each in ours]
    found = [one - other for one, other in pairs if other is not None]
    if ours is others or len(found) < 2 or not all(map(math.isfinite, found)):
        return None
    error = statistics.stdev(found) / len(found) ** 0.5
    return [statistics.mean(found), error, upper_bound(found)]


def draw(sides: dict[str, list[dict[str, Any]]], target: float) -> Figure:
    """Training loss against tokens: mean over seeds, the band of all of them, and the target."""
    figure, axes = new_figure("Tokens to the same validation loss, on a stock GPT-2")
    ax = axes[0, 0]
    for color, (side, records) in zip(PALETTE, sides.items(), strict=False):
        losses = np.array([smooth(np.array(each["losses"])) for each in records])
        tokens = np.arange(1, losses.shape[1] + 1) * records[0]["recipe"]["batch_tokens"]
        label = f"{side}, {len(tokens)} steps, {len(records)} seeds"
        ax.plot(tokens, losses.mean(0), color=color, label=label)
        ax.fill_between(tokens, losses.min(0), losses.max(0), color=color, alpha=0.2, linewidth=0)
        ends = [loss_of(each) for each in records]
        ax.plot([tokens[-1]] * len(ends), ends, "o", color=color, markersize=3)
    reference_line(ax, target, f"target {target:.3f}")
    ax.set(xlabel="training tokens", ylabel="loss (nats per token); dots: validation")
    ax.set_ylim(top=target + 2.5)
    legend(ax)
    return figure


def tell_edges(side: str, knobs: Knobs, best: dict[str, Any]) -> None:
    for name, (low, high) in knobs.items():
        place = math.log(best[name] / low) / math.log(high / low)
        if not NEAR_AN_END <= place <= 1 - NEAR_AN_END:
            where = "near an end of" if 0 <= place <= 1 else "outside"
            print(f"{side}: the best {name}, {best[name]}, is {where} {low} to {high}")


def shown(name: str, value: Any) -> str:
    if name == "losses":
        return f"{len(value)} seeds"
    if isinstance(value, list):
        return "{:+.4f} ± {:.4f} (< {:+.4f})".format(*value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def seconds(records: list[dict[str, Any]]) -> float:
    found = [each["seconds_per_step"] for each in records if each["seconds_per_step"]]
    return statistics.median(found) if found else math.nan


def check_rules(records: list[dict[str, Any]]) -> None:
    """Refuse runs of other models, and runs of one seed that had other rows."""
    rows_of: dict[int, list[str]] = {}
    shapes = {tuple(each["recipe"][name] for name in SHAPE) for each in records}
    if len(shapes) > 1:
        raise UserError(f"these runs are of different models: {', '.join(map(str, shapes))}")
    for record in records:
        seed, rows = record["recipe"]["seed"], record["rows_digests"]
        known = rows_of.setdefault(seed, rows)
        if any(own != other for own, other in zip(rows, known, strict=False)):
            raise UserError(f"runs of seed {seed} had different rows")
        rows_of[seed] = max(rows, known, key=len)


def repeat(options: Namespace) -> int:
    """Train the runs in these files again; 0 if every loss is the same to the last bit."""
    same = True
    files = [f for path in options.paths for f in (sorted(path.glob("*.json")) or [path])]
    for file in files:
        then = read(file)
        fields = then["recipe"]
        if options.dataset_name:
            fields = fields | {"dataset_name": options.dataset_name}
        with tempfile.TemporaryDirectory() as directory:
            options.output, options.threads = Path(directory), then["threads"]
            now = start_one(fields, Path(directory) / "again" / file.name, options)
        pairs = zip(then["losses"], now["losses"], strict=False)
        differing = [step for step, (a, b) in enumerate(pairs) if a != b]
        is_same = all(then[name] == now[name] for name in ("losses", "rows_digests", "val_loss"))
        where = f" from step {differing[0]} on" if differing else ""
        print(f"{file}: {'the same' if is_same else f'other losses{where}'}", flush=True)
        if not is_same and then["environment"] != now["environment"]:
            print(f"  then {then['environment']}\n  now  {now['environment']}")
        same = same and is_same
    return 0 if same else 1


def parse(argv: list[str] | None = None) -> Namespace:
    parser = OneLineParser(prog="benchmarks/track.py", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("run", "summary", "transfer", "time"):
        its = verbs.add_parser(verb)
        its.add_argument("scale", choices=SCALES)
        its.add_argument("--output", type=Path, default=Path("benchmarks/results/track"))
    its = verbs.choices["run"]
    its.add_argument(
        "--sides",
        nargs="+",
        choices=SIDES,
        default=["muon", "muon-power", "muon-linear", "muon-together"],
    )
    its.add_argument("--tried", nargs="+", choices=SIDES, default=[])
    shares = [n / 40 for n in LENGTHS]
    its.add_argument(
        "--guess", type=float, choices=shares, default=0.55, metavar="SHARE", help="see rule 4"
    )
    its = verbs.choices["transfer"]
    its.add_argument("--points_of", required=True, choices=SCALES, help="where they were tuned")
    its = verbs.choices["time"]
    its.add_argument("--turns", type=int, default=4)
    its.add_argument("--steps", type=int, default=20, help="of each turn of a side")
    its.add_argument("--threads", type=int, default=1)
    for its in (verbs.choices["run"], verbs.choices["transfer"]):
        its.add_argument("--seeds", type=int, default=LEAST_SEEDS)
        its.add_argument("--minutes", type=float, default=math.inf, help="then save and end")
        its.add_argument("--jobs", type=int, default=1, help="runs side by side")
        its.add_argument("--threads", type=int, default=1, help="of each")
    its = verbs.add_parser("repeat")
    its.add_argument("paths", type=Path, nargs="+", help="files of runs, or directories of them")
    for each in (verbs.choices["time"], its):
        each.set_defaults(minutes=math.inf)
    for each in (verbs.choices["run"], verbs.choices["transfer"], verbs.choices["time"], its):
        each.add_argument("--dataset_name", help="where the text of the scale is")
        each.add_argument("--launcher", type=shlex.split, default=[sys.executable])
    its = verbs.add_parser("one")
    its.add_argument("paths", type=Path, nargs=3)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    if options.verb == "one":
        train_one(*options.paths)
    elif options.verb == "summary":
        summarize(options)
    else:
        options.deadline = time.monotonic() + 60 * options.minutes
        if options.verb == "repeat":
            return repeat(options)
        try:
            {"run": run_scale, "transfer": transfer, "time": time_steps}[options.verb](options)
        except TimeIsOver:
            print("The time is over; the same command goes on.")
            return EXIT_PREEMPTED
    return 0


if __name__ == "__main__":
    sys.exit(run("benchmarks/track.py", main, sys.argv[1:]))
