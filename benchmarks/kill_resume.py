"""kill -9 a training run again and again: it ends bitwise where an undisturbed one does.

    python benchmarks/kill_resume.py --seed 0 --output benchmarks/results/kill_resume.json

A small GPT-2 is trained on the CPU in fp32, with Muon, dropout, evaluations and samples, on texts
that this script draws: once undisturbed, once by a process group that gets SIGKILL at random
moments, and the same command again each time. The moments fall by turns into six phases: start-up,
training, evaluation, the writing of a checkpoint, the removal of an older one, and (these come
last) the export. Where in its phase a kill falls is drawn; a phase is recognised from outside by
what is on disk, and a kill that came too late for it counts as a kill, but not as a hit. With
`--overlap` the next launch begins at that moment, and the kill comes only when it waits for the run
or has had the time to: two launches at once, in every phase. At the end weights, optimizer state,
random number generators, metrics (without timings) and the exported files of both runs are compared
byte by byte. Exit status 1 if anything differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from gpt2repro.commands.parser import OneLineParser
from gpt2repro.data.tokens.bpe import train_bpe
from gpt2repro.records import checkpoints, integrity
from gpt2repro.records.metrics import TIMINGS, read_metrics
from gpt2repro.system import machine
from gpt2repro.system.command_line import run

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("start-up", "training", "evaluation", "checkpoint", "pruning", "export")
KEEP_LAST = 2
STEPS_PER_KILL = 12  # at least as many steps as kills can cost
STEPS_PER_OVERLAP = 100  # as many as are made while another launch starts
LAUNCH_SECONDS = 900  # longer than any launch takes; then something hangs
SPEED_MARGIN = 0.6  # a launch may be faster than the one that was timed
LOOK_SECONDS = 0.0005  # a checkpoint of this model is written in milliseconds
WORDS = (
    *("the", "of", "and", "to", "in", "a", "is", "was", "which"),
    *("on", "that", "by", "with", "it"),
)


def write_inputs(directory: Path, num_steps: int) -> Path:
    """Texts, a tokenizer and a recipe below `directory`; returns the recipe."""
    draw = random.Random(0)
    texts = [
        " ".join([f"<{number}>", *draw.choices(WORDS, k=draw.randint(5, 200))])
        for number in range(1000)
    ]
    directory.mkdir(parents=True)
    pq.write_table(pa.table({"text": texts}), directory / "texts.parquet", row_group_size=50)
    train_bpe(texts, 320).save_pretrained(directory / "tokenizer")
    recipe = {
        "dataset_name": str(directory / "texts.parquet"),
        "dataset_config": None,
        "tokenizer_name": str(directory / "tokenizer"),
        "num_lanes": 4,
        "num_validation_units": 2,
        "validation_tokens": 8192,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 64,
        "sequence_length": 64,
        "dropout": 0.1,
        "batch_tokens": 512,
        "micro_batch_size": 4,
        "num_steps": num_steps,
        "warmup_steps": 10,
        "max_lr": 4e-3,
        "min_lr": 0.0,
        "optimizer": "muon",
        "mixed_precision": "no",
        "compile": False,
        "eval_every": 10,
        "sample_every": 35,
        "keep_last": KEEP_LAST,
        "save_every": 7,  # not where evaluations are, so that a kill hits one or the other
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@dataclass
class Durations:
    """Seconds that parts of the undisturbed run took; kills are aimed with them."""

    start_up: float
    evaluation: float
    checkpoint: float
    export: float


@dataclass
class Kill:
    """One SIGKILL: where it was aimed (phase, and how far into it), and what it met."""

    phase: str
    fraction: float
    hit: bool = False  # the phase was under way when the process died
    seconds: float = 0.0  # since the launch
    resumed_from: int = 0
    last_step: int = -1  # in metrics.jsonl


def snapshot(directory: Path) -> Path:
    """The code as it is now: an edit during the next minutes is no difference of the runs."""
    for name in ("train_accelerate.py", "configuration_gpt2repro.py", "modeling_gpt2repro.py"):
        directory.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, directory / name)
    for name in ("gpt2repro", "recipes"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


class Launch:
    """The training command in a process group of its own."""

    def __init__(self, code: Path, recipe: Path, output: Path) -> None:
        self.output, self.checkpoints = output, output / "checkpoints"
        self.metrics = output / "metrics.jsonl"
        self.look_again()
        output.parent.mkdir(parents=True, exist_ok=True)
        self.log = (output.parent / f"{output.name}.log").open("ab")
        command = [sys.executable, str(code / "train_accelerate.py")]
        command += ["--recipe", str(recipe), "--output_dir", str(output)]
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command,
            stdout=self.log,
            stderr=self.log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)},
            start_new_session=True,
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def ready(self) -> bool:
        return inode(self.metrics) not in (None, self.rewound_from)

    @property
    def last_step(self) -> int:
        """In metrics.jsonl; the step before the first while this launch has not begun."""
        lines = read_metrics(self.metrics) if self.ready else []
        return lines[-1]["step"] if lines else self.first_step - 1

    def scratch(self) -> set[tuple[int, int]]:
        """The checkpoints that are being written, or were when a process died."""
        found = set()
        for path in self.checkpoints.glob(".step_*.partial"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.add((status.st_ino, status.st_ctime_ns))
        return found

    def writes(self) -> bool:
        return bool(self.scratch() - self.known_scratch)

    def prunes(self) -> bool:
        """Whether a checkpoint is there that will go."""
        return len([*self.checkpoints.glob("step_*")]) > KEEP_LAST

    def look_again(self) -> None:
        """What this launch finds, now that the one before it is gone."""
        # A launch that is ready has rewritten the file.
        self.rewound_from, self.known_scratch = inode(self.metrics), self.scratch()
        latest, _ = checkpoints.find_latest(self.checkpoints)
        self.first_step = int(latest.name.removeprefix("step_")) if latest else 0

    def wait_until(self, condition: Callable[[], Any]) -> bool:
        """Whether `condition` came true while the process lived."""
        while not condition():
            if self.process.poll() is not None:
                return False
            assert self.seconds < LAUNCH_SECONDS, f"a launch hangs; see {self.log.name}"
            time.sleep(LOOK_SECONDS)
        return True

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()

    def finish(self) -> int:
        status = self.process.wait(timeout=LAUNCH_SECONDS)
        self.log.close()
        return status


def inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_birthtime_ns if hasattr(status, "st_birthtime_ns") else 0


def undisturbed(code: Path, recipe: Path, output: Path, settings: dict[str, Any]) -> Durations:
    """Run to the end, and time what later kills are aimed into."""
    launch, num_steps = Launch(code, recipe, output), settings["num_steps"]

    def until(condition: Callable[[], Any]) -> float:
        assert launch.wait_until(condition), f"the run failed; see {launch.log.name}"
        return time.monotonic()

    until(lambda: launch.ready)
    start_up = launch.seconds
    before = until(lambda: launch.last_step >= settings["eval_every"] - 1)
    evaluation = until(lambda: launch.last_step >= settings["eval_every"]) - before
    written = until(lambda: launch.scratch())
    writing = until(lambda: not launch.scratch()) - written
    ended = until(lambda: launch.last_step == num_steps)
    exporting = until((output / "final").exists) - ended
    assert launch.finish() == 0, f"the run failed; see {launch.log.name}"
    return Durations(start_up, evaluation, writing, exporting)


def aim(launch: Launch, kill: Kill, durations: Durations, settings: dict[str, Any]) -> bool:
    """Wait for the moment of `kill`; False if the run ended before it came."""
    eval_every, num_steps = settings["eval_every"], settings["num_steps"]

    def evaluates() -> bool:
        return launch.ready and (launch.last_step + 1) % eval_every == 0 <= launch.last_step

    if kill.phase == "start-up":
        time.sleep(SPEED_MARGIN * kill.fraction * durations.start_up)
        return True
    if kill.phase == "training":
        target = launch.first_step + int(kill.fraction * STEPS_PER_KILL)
        return launch.wait_until(lambda: launch.ready and launch.last_step >= target)
    onset, seconds = {
        "evaluation": (evaluates, durations.evaluation),
        "checkpoint": (launch.writes, durations.checkpoint),
        "pruning": (launch.prunes, 0.0),
        "export": (lambda: launch.last_step == num_steps, durations.export),
    }[kill.phase]
    came = launch.wait_until(onset)
    time.sleep(SPEED_MARGIN * kill.fraction * seconds)
    return came


def was_hit(launch: Launch, kill: Kill, settings: dict[str, Any]) -> bool:
    """Whether what is on disk says that the phase was under way."""
    step = launch.last_step
    if kill.phase == "start-up":
        return not launch.ready
    if kill.phase == "training":
        return launch.ready and step < settings["num_steps"]
    if kill.phase == "evaluation":  # its figures come with the next step's line
        return (step + 1) % settings["eval_every"] == 0
    if kill.phase == "checkpoint":
        return launch.writes()
    if kill.phase == "pruning":
        return launch.prunes()
    return step == settings["num_steps"] and not (launch.output / "final").exists()


def planned(num_kills: int, seed: int) -> list[Kill]:
    """Phases by turns in a random order, exports last; where in a phase is uniform."""
    draw = random.Random(seed)
    phases = [PHASES[index % len(PHASES)] for index in range(num_kills)]
    draw.shuffle(phases)
    phases.sort(key=lambda phase: phase == "export")
    return [Kill(phase, draw.random()) for phase in phases]


def differences(ours: Path, theirs: Path, step: int) -> dict[str, list[str]]:
    """What the two runs do not have in common, by part; all lists are empty if nothing."""

    def differing_files(a: Path, b: Path, left_out: tuple[str, ...]) -> list[str]:
        names = {path.name for each in (a, b) for path in each.iterdir()} - set(left_out)
        return sorted(
            name
            for name in names
            if not (a / name).is_file()
            or not (b / name).is_file()
            or (a / name).read_bytes() != (b / name).read_bytes()
        )

    def lines(output: Path) -> list[dict[str, Any]]:
        records = read_metrics(output / "metrics.jsonl")
        return [{k: v for k, v in each.items() if k not in TIMINGS} for each in records]

    saved = [checkpoints.checkpoint_path(each / "checkpoints", step) for each in (ours, theirs)]
    mine, others = lines(ours), lines(theirs)
    states = [json.loads((path / integrity.STATE).read_bytes()) for path in saved]
    return {
        # state.json names the output_dir, and COMPLETE its size: the stream's state is compared
        "checkpoint": differing_files(*saved, left_out=(integrity.STATE, integrity.MARKER)),
        "stream state": [k for k, v in states[0]["stream"].items() if states[1]["stream"][k] != v],
        "metrics": [f"{len(mine)} and {len(others)} lines"] * (len(mine) != len(others))
        + [f"step {a['step']}" for a, b in zip(mine, others, strict=False) if a != b],
        # the card and the curve tell throughput; SHA256SUMS leaves both out
        "final": differing_files(
            ours / "final", theirs / "final", left_out=("README.md", "loss_curve.png")
        ),
    }


def measure(
    num_kills: int, seed: int, directory: Path, say: Callable[[str], None], overlap: bool = False
) -> dict:
    """Both runs below `directory`, and how they compare."""
    steps_per_kill = STEPS_PER_OVERLAP if overlap else STEPS_PER_KILL
    recipe = write_inputs(directory / "inputs", num_steps=max(40, steps_per_kill * num_kills))
    settings, code = yaml.safe_load(recipe.read_text()), snapshot(directory / "code")
    whole, killed = directory / "undisturbed" / "run", directory / "killed" / "run"
    began = time.monotonic()
    durations = undisturbed(code, recipe, whole, settings)
    say(f"undisturbed: {time.monotonic() - began:.0f} s, {durations}")

    kills = planned(num_kills, seed)
    launch = Launch(code, recipe, killed)
    for number, kill in enumerate(kills, 1):
        came = aim(launch, kill, durations, settings)
        following = None
        if overlap:
            kill.hit = came and was_hit(launch, kill, settings)
            following = Launch(code, recipe, killed)
            time.sleep(durations.start_up)
        launch.kill()
        kill.seconds, kill.resumed_from = round(launch.seconds, 2), launch.first_step
        kill.last_step = launch.last_step
        if following is None:
            kill.hit = came and was_hit(launch, kill, settings)
            following = Launch(code, recipe, killed)
        say(f"kill {number} of {num_kills}: {kill}")
        launch = following
        launch.look_again()
    status = launch.finish()
    say(f"the last launch went on from step {launch.first_step} and left with status {status}")
    found = differences(killed, whole, settings["num_steps"]) if status == 0 else {}
    return {
        "what": "kill -9 at random moments against an undisturbed run, compared byte by byte",
        "seed": seed,
        "num_kills": num_kills,
        "overlapping": overlap,
        "num_hits": sum(kill.hit for kill in kills),
        "hits_by_phase": {
            phase: sum(kill.hit for kill in kills if kill.phase == phase) for phase in PHASES
        },
        "last_status": status,
        "differences": found,
        "bitwise_equal": status == 0 and not any(found.values()),
        "kills": [asdict(kill) for kill in kills],
        "undisturbed_seconds": asdict(durations),
        "recipe": settings,
    }


def main(argv: list[str]) -> int:
    parser = OneLineParser(
        prog="kill_resume.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default %(default)s")
    parser.add_argument("--overlap", action="store_true", help="the next launch begins before")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="kill_resume_") as directory:
        say = lambda text: print(text, flush=True)  # noqa: E731
        result = measure(options.kills, options.seed, Path(directory), say, options.overlap)
    result["environment"] = machine.describe()
    result["date"] = time.strftime("%Y-%m-%d")
    verdict = "bitwise equal" if result["bitwise_equal"] else f"DIFFERENT: {result['differences']}"
    print(f"\n{result['num_kills']} kills, {result['num_hits']} within their phase: {verdict}")
    if options.output:
        del result["recipe"]["dataset_name"], result["recipe"]["tokenizer_name"]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["bitwise_equal"] else 1


if __name__ == "__main__":
    sys.exit(run("kill_resume.py", main, sys.argv[1:]))
