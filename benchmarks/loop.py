"""What the training script costs beyond its arithmetic: its steps against those of a bare loop.

    python benchmarks/loop.py --output benchmarks/results/loop.json
    python benchmarks/loop.py --output benchmarks/results/loop_124m.json \
        --recipe gpt2 --steps 1 --launches 0 -- \
        --dataset_name python-docs --dataset_config null --num_lanes 2 --batch_tokens 2048 \
        --micro_batch_size 2 --mixed_precision bf16 --compile true

    python benchmarks/loop.py --output benchmarks/results/loop_124m_saving.json \
        --recipe gpt2 --rounds 1 --steps 1 --launches 0 --saves 10 -- \
        --dataset_name python-docs --dataset_config null --num_lanes 1 --batch_tokens 128 \
        --micro_batch_size 1 --sequence_length 128 --mixed_precision no --compile false

Steps of the script's own loop and of a bare one take turns within one run: two processes of the
same loop differ by a percent, which is what this is about. The bare loop has its rows in memory and
does nothing but forward, backward, clipping and the update. The script's steps also stream and
tokenize, digest their rows, reduce, ask for signals, and write metrics. Evaluations, samples and
checkpoints have intervals and prices of their own and are left out.

With --saves, then: bare steps while a checkpoint is written beside them, against as many after it.

Then the time from launch to the first step done, of the demo as `make demo` starts it; where there
is a GPU, as `accelerate launch --num_processes 1` does.
"""

import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pairing import (
    circumstances,
    paired_ratio,
    ratio_text,
    show_progress,
    spread,
    synchronize,
    write_json,
)

from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.recipe import load_recipe
from gpt2repro.system.command_line import run
from gpt2repro.training.learner import Learner
from gpt2repro.training.monitor import Monitor
from gpt2repro.training.run import Run, open_run
from train_accelerate import train

NOTHING_BUT_STEPS = ["--eval_every", "0", "--num_validation_units", "0", "--sample_every", "0"]
NOTHING_BUT_STEPS += ["--save_every", "0", "--num_steps", "1000000"]


class Enough(Exception):
    """All rounds are done: the run ends here, without a checkpoint."""


class Alternation(Monitor):
    """The run's monitor: after so many steps of the script it takes as many bare ones."""

    def __init__(self, *parts: Any, num_steps: int, num_rounds: int) -> None:
        super().__init__(*parts)
        self.progress.close()
        self.num_steps, self.num_rounds = num_steps, num_rounds
        self.rows = next(self.inputs.stream).tokens.to(self.learner.accelerator.device)
        self.seconds: dict[str, list[float]] = {"script": [], "bare": []}
        self.steps_left = 1  # of the script's turn; the first step compiles and is not counted
        self.began: float | None = None

    def report(self, *step: Any) -> None:
        """Called by the script at the end of each of its steps."""
        super().report(*step)
        self.steps_left -= 1
        if self.steps_left:
            return
        ended = clock()
        bare_steps(self.learner, self.rows, self.num_steps)
        now = clock()
        if self.began is not None:
            self.seconds["script"].append(ended - self.began)
            self.seconds["bare"].append(now - ended)
        show_progress(f"round {len(self.seconds['bare'])} of {self.num_rounds}")
        if len(self.seconds["bare"]) == self.num_rounds:
            show_progress("")
            raise Enough
        self.steps_left, self.began = self.num_steps, clock()


def clock() -> float:
    synchronize()
    return time.perf_counter()


def bare_steps(learner: Learner, rows: torch.Tensor, num_steps: int) -> None:
    """What a training loop cannot do without."""
    accelerator, model, optimizer = learner.accelerator, learner.model, learner.optimizer
    for _ in range(num_steps):
        for micro_batch in rows.split(learner.micro_batch_size):
            inputs, targets = micro_batch[:, :-1].contiguous(), micro_batch[:, 1:].contiguous()
            with accelerator.accumulate(model):
                loss = model(input_ids=inputs, shift_labels=targets, skip_logits=True).loss
                accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), learner.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()


def beside_saves(opened: Run, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of copying a checkpoint, and of steps while it is written and when it is there."""
    seconds: dict[str, list[float]] = {"copying": [], "beside": [], "alone": []}
    saves, learner, rows = opened.checkpoints, opened.learner, opened.monitor.rows
    for n in range(num_rounds):
        show_progress(f"save {n + 1} of {num_rounds}")
        began = clock()
        saves.save(n, learner, {"permanent": False})
        copied = clock()
        num_steps, ended = 0, copied
        while not saves.is_done():
            num_steps, ended = num_steps + 1, clock()  # the one before was wholly beside it
            bare_steps(learner, rows, 1)
        saves.wait()
        if num_steps < 2:
            raise UserError("a step takes longer than a checkpoint: take a smaller batch_tokens")
        ahead = clock()
        bare_steps(learner, rows, num_steps - 1)
        seconds["copying"].append(copied - began)
        seconds["beside"].append((ended - copied) / (num_steps - 1))
        seconds["alone"].append((clock() - ahead) / (num_steps - 1))
    show_progress("")
    return seconds


def seconds_to_first_step() -> float:
    """From `accelerate launch` to the first line of metrics.jsonl, the demo's corpus at hand."""
    with tempfile.TemporaryDirectory() as directory:
        metrics = Path(directory) / "run" / "metrics.jsonl"
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        if torch.cuda.is_available():
            command += ["--num_processes", "1"]
        else:
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
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--launches", type=int, default=3, help="timed to their first step")
    parser.add_argument("--saves", type=int, default=0, help="rounds of steps beside a checkpoint")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--output", help="JSON")
    parser.add_argument("overrides", nargs="*", help="of the recipe, after --")
    arguments = parser.parse_args(argv)

    around = circumstances(vars(arguments))
    with tempfile.TemporaryDirectory() as directory:
        overrides = ["--recipe", arguments.recipe, *arguments.overrides, *NOTHING_BUT_STEPS]
        argv = [*overrides, "--output_dir", directory]
        turns = partial(Alternation, num_steps=arguments.steps, num_rounds=arguments.rounds)
        with open_run(load_recipe(argv), argv, turns) as opened:
            with suppress(Enough):
                train(opened)
            saving = beside_saves(opened, arguments.saves)
    seconds = opened.monitor.seconds
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
    if arguments.saves:
        results["saving"] = saving
        results["step_beside_saving"] = paired_ratio(saving["beside"], saving["alone"])
        print(f"beside a checkpoint a step takes {ratio_text(results['step_beside_saving'])} times")
    write_json(arguments.output, {"benchmark": "loop", **around, **results})
    return 0


if __name__ == "__main__":
    sys.exit(run("benchmarks/loop.py", main, sys.argv[1:]))
