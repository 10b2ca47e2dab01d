"""What the training script costs beyond its arithmetic: its steps against those of a bare loop.

    python benchmarks/loop.py --output benchmarks/results/loop.json
    python benchmarks/loop.py --output benchmarks/results/loop_124m.json \
        --recipe gpt2 --steps 1 --rounds 10 --launches 0 -- \
        --dataset_name python-docs --dataset_config null --num_lanes 2 --batch_tokens 2048 \
        --micro_batch_size 2 --mixed_precision bf16 --compile true

Both train the recipe's model (the demo's by default; what follows `--` overrides the recipe) with
the same optimizer on rows of the same shape, in alternation, some steps a turn. The bare loop has
its rows in memory and does nothing but forward, backward, clipping and the update. The script's
steps also stream and tokenize, digest their rows, reduce, ask for signals, and write metrics.
Evaluations, samples and checkpoints have intervals and prices of their own and are left out.

Then the time from launch to the first step done, of the demo as `make demo` starts it.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from pairing import (
    Contestant,
    Turn,
    alternate,
    circumstances,
    paired_ratio,
    ratio_text,
    spread,
    write_json,
)

from gpt2repro.cli import OneLineParser, run
from gpt2repro.metrics import Progress
from gpt2repro.run import Run, prepare
from train_accelerate import train

ENDLESS = 1_000_000


class Gate(Progress):
    """A progress bar that lets the run go on by so many steps at a time."""

    def __init__(self) -> None:
        super().__init__(first_step=0, num_steps=ENDLESS, enabled=False)
        self.allowed, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def update(self, **figures: float) -> None:
        self.done.release()
        self.allowed.acquire()

    def let_pass(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.allowed.release()
            self.done.acquire()


def build(who: str, arguments: list[str], num_steps: int) -> Turn:
    """A contestant: `num_steps` steps a turn of the script's own loop, or of a bare one."""
    never = ["--eval_every", "0", "--num_validation_units", "0", "--sample_every", "0"]
    never += ["--save_every", "0", "--num_steps", str(ENDLESS)]
    prepared = prepare([*arguments, *never])
    if who == "script":
        gate = prepared.progress = Gate()
        threading.Thread(target=train, args=(prepared,), daemon=True).start()
        gate.done.acquire()  # the first step is done

        def turn() -> None:
            gate.let_pass(num_steps)

    else:
        rows = next(prepared.stream).tokens.to(prepared.accelerator.device)

        def turn() -> None:
            bare_steps(prepared, rows, num_steps)

    return turn


def bare_steps(run: Run, rows: torch.Tensor, num_steps: int) -> None:
    """What a training loop cannot do without."""
    recipe, model, optimizer, accelerator = run.recipe, run.model, run.optimizer, run.accelerator
    for _ in range(num_steps):
        for micro_batch in rows.split(recipe.micro_batch_size):
            inputs, targets = micro_batch[:, :-1].contiguous(), micro_batch[:, 1:].contiguous()
            with accelerator.accumulate(model):
                loss = model(input_ids=inputs, shift_labels=targets, skip_logits=True).loss
                accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()


def seconds_to_first_step() -> float:
    """From `accelerate launch` to the first line of metrics.jsonl, the demo's corpus at hand."""
    with tempfile.TemporaryDirectory() as directory:
        metrics = Path(directory) / "run" / "metrics.jsonl"
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", "launch/cpu.yaml"]
        command += ["--num_cpu_threads_per_process", str(torch.get_num_threads())]
        command += ["train_accelerate.py", "--recipe", "demo", "--output_dir", str(metrics.parent)]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not (metrics.is_file() and metrics.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
                time.sleep(0.05)
            return time.perf_counter() - began
        finally:
            process.terminate()  # its training process ends with it
            process.wait()


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="benchmarks/loop.py", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="a turn")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--launches", type=int, default=3, help="timed to their first step")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--output", help="JSON")
    parser.add_argument("overrides", nargs="*", help="of the recipe, after --")
    arguments = parser.parse_args(argv)

    # The script's loop runs in a thread here: glibc must not give that a small heap of its own.
    os.environ["MALLOC_ARENA_MAX"] = "1"
    around = circumstances(vars(arguments))
    with tempfile.TemporaryDirectory() as directory:
        contestants = []
        for who in ("bare", "script"):
            recipe = ["--recipe", arguments.recipe, *arguments.overrides]
            recipe += ["--output_dir", f"{directory}/{who}"]
            settings = {"who": who, "arguments": recipe, "num_steps": arguments.steps}
            contestants.append(Contestant(who, build, **settings))
        turns = alternate(contestants, num_rounds=arguments.rounds, num_warmups=1)
        for contestant in contestants:
            contestant.close()
    seconds = {who: [turn["seconds"] for turn in turns[who]] for who in turns}
    ratio = paired_ratio(seconds["script"], seconds["bare"])
    first_steps = [seconds_to_first_step() for _ in range(arguments.launches)]
    step = spread(seconds["bare"])["median"] / arguments.steps
    print(f"bare step {step:.3f} s; the script takes {ratio_text(ratio)} times as long")
    if first_steps:
        print("launch to first step: " + ", ".join(f"{each:.1f} s" for each in first_steps))
    results: dict[str, Any] = {
        "seconds": seconds,
        "script_over_bare": ratio,
        "seconds_to_first_step": first_steps,
    }
    write_json(arguments.output, {"benchmark": "loop", **around, **results})
    return 0


if __name__ == "__main__":
    sys.exit(run("benchmarks/loop.py", main, sys.argv[1:]))
