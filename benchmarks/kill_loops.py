"""kill -9 loops that are not ours again and again: each step has the rows that it always has.

    python benchmarks/kill_loops.py --output benchmarks/results/kill_loops.json

The tutorials of the exact stream, examples/stream_loop.py (DistributedDataParallel) and
examples/stream_trainer.py (transformers' Trainer), train a tiny GPT-2 on the CPU on texts that
kill_resume.py draws: one dataset, a mixture of three of which the second ends, shards of token ids.
Each is left alone once, under one process. Then it gets SIGKILL at random moments, in the start or
some steps after it, and the same command begins again under another number of processes, until it
has finished. All digests that the launches told are compared, those of steps made twice too, and
the stream's last state. Exit status 1 if anything differs.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from kill_resume import ROOT, write_inputs

from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.encoder import BulkEncoder
from gpt2repro.system import machine

LOOPS = {"stream_loop": ["--num_steps"], "stream_trainer": ["--num_layers", "1", "--max_steps"]}
STEPS_PER_KILL, SAVE_STEPS = 16, 4
LAUNCH_SECONDS = 300  # longer than any launch takes; then something hangs


def write_sources(directory: Path) -> dict[str, list[str]]:
    """What to train on, below `directory`: the options that name it, by kind."""
    texts = pq.read_table(write_inputs(directory, 1).parent / "texts.parquet")["text"].to_pylist()
    mixture: list[dict[str, Any]] = [{"weight": 2}, {"epochs": 1}, {}]
    for each, begin, end in zip(mixture, (0, 200, 230), (200, 230, 270), strict=True):
        each["name"] = str(directory / f"{begin}.parquet")
        pq.write_table(pa.table({"text": texts[begin:end]}), each["name"], row_group_size=10)
    encoder = BulkEncoder(load_tokenizer(str(directory / "tokenizer")))
    (directory / "shards").mkdir()
    for name, begin, end in (("val_0", 0, 20), ("train_1", 20, 100), ("train_2", 100, 200)):
        documents = encoder.encode(texts[begin:end])
        ids = np.concatenate([part for each in documents for part in ([encoder.eot_id], each)])
        header = np.array([20240520, 1, len(ids), *[0] * 253], np.int32).tobytes()
        shard = directory / "shards" / f"{name}.bin"
        shard.write_bytes(header + ids.astype(np.uint16).tobytes())
    return {
        "one dataset": ["--dataset_name", mixture[0]["name"]],
        "a mixture of three": ["--datasets", json.dumps(mixture)],
        "shards of token ids": ["--dataset_name", str(directory / "shards")],
    }


class Launch:
    """As torchrun launches it, but all processes in one group: torchrun gives each its own."""

    def __init__(self, command: list[str], world_size: int, log: Path) -> None:
        self.log, self.began = log, time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(world_size)}
        settings |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} | ports
        self.processes: list[subprocess.Popen] = []
        for rank in range(world_size):
            environment = os.environ | settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            group = self.processes[0].pid if self.processes else 0
            files = (log.with_suffix(f".{rank}.{name}") for name in ("out", "err"))
            with next(files).open("wb") as out, next(files).open("wb") as err:
                process = subprocess.Popen(
                    command, stdout=out, stderr=err, env=environment, process_group=group
                )
            self.processes.append(process)

    def steps(self) -> list[tuple[int, str]]:
        """Each step's number and digest, as far as they are told."""
        found = re.findall(r"^step (\d+): .*rows (\w{16})\n", self.told("out"), re.M)
        return [(int(step), rows) for step, rows in found]

    def told(self, by: str) -> str:
        return self.log.with_suffix(f".0.{by}").read_text()

    def lasts(self, num_steps: float = float("inf"), seconds: float = 0.0) -> bool:
        """Wait for as many steps, then as long; False if all processes ended well before."""
        while len(self.steps()) < num_steps or (seconds := seconds - 0.005) > 0:
            statuses = [process.poll() for process in self.processes]
            if not any(statuses) and None not in statuses:
                return False
            if any(statuses) or time.monotonic() - self.began > LAUNCH_SECONDS:
                self.kill()
                raise RuntimeError(f"processes left with {statuses}: {self.told('err')}")
            time.sleep(0.005)
        return True

    def kill(self) -> None:
        os.killpg(self.processes[0].pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


def measure(loop: str, source: list[str], num_kills: int, seed: int, directory: Path) -> dict:
    """Both runs of a loop on a source, and how they compare."""
    num_steps, draw, place = STEPS_PER_KILL * num_kills, random.Random(seed), tempfile.mkdtemp
    command = [sys.executable, str(ROOT / "examples" / f"{loop}.py"), *source, "--width", "32"]
    command += ["--tokenizer", str(directory / "inputs" / "tokenizer"), "--sequence_length", "32"]
    command += ["--rows_per_step", "24", "--num_lanes", "24", "--micro_batch_size", "4"]
    command += ["--save_steps", str(SAVE_STEPS), *LOOPS[loop], str(num_steps), "--output"]
    whole, output = Path(place(dir=directory)), Path(place(dir=directory))
    alone = Launch([*command, str(whole / "run")], 1, whole / "log")
    assert alone.lasts(1), "no step was told"
    start_up = time.monotonic() - alone.began
    assert not alone.lasts()
    kills, told, world_size, ended = [], [], 1, False
    while not ended:
        world_size = draw.choice([size for size in (1, 2, 3) if size != world_size])
        launch = Launch([*command, str(output / "run")], world_size, output / f"log{len(kills)}")
        steps = draw.randrange(3 * SAVE_STEPS)  # before the kill; none: it falls into the start
        seconds = draw.random() * (0.1 if steps else start_up)
        ended = not (launch.lasts(steps, seconds) if len(kills) < num_kills else launch.lasts())
        if not ended:
            launch.kill()
            reached = max((step for step, _ in launch.steps()), default=None)
            kills.append({"processes": world_size, "last_step": reached})
        told += launch.steps()
    expected = dict(alone.steps())
    state, theirs = (final_state(each / "run", num_steps) for each in (output, whole))
    same = len(expected) == num_steps and set(told) == {*expected.items()} and state == theirs
    epochs = [[place[0] for place in part] for part in zip(*state["stream"]["lanes"], strict=True)]
    return {
        "num_steps": num_steps,
        "num_kills": len(kills),
        "num_steps_made_twice": len(told) - len(expected),
        "epochs": [[min(each), max(each)] for each in epochs],
        "equal": same,
        "kills": kills,
    }


def final_state(output: Path, num_steps: int) -> dict[str, Any]:
    """The stream's, where the example has saved it."""
    if output.is_file():
        return torch.load(output, weights_only=True)["stream"]
    return json.loads((output / f"checkpoint-{num_steps}" / "stream.json").read_text())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="kill_loops.py", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=6, help="of each; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default %(default)s")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options, runs = parser.parse_args(argv), []
    with tempfile.TemporaryDirectory(prefix="kill_loops_") as directory:
        for kind, source in write_sources(Path(directory, "inputs")).items():
            for loop in LOOPS:
                seed = options.seed + len(runs)
                found = measure(loop, source, options.kills, seed, Path(directory))
                runs.append({"loop": loop, "source": kind} | found)
                print(runs[-1], flush=True)
    result: dict[str, Any] = {"num_kills": sum(each["num_kills"] for each in runs)}
    result |= {"equal": all(each["equal"] for each in runs), "runs": runs, "seed": options.seed}
    result |= {"environment": machine.describe(), "date": time.strftime("%Y-%m-%d")}
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['num_kills']} kills: {'equal' if result['equal'] else 'DIFFERENT'} digests")
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
