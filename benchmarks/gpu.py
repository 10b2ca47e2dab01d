"""What only a GPU can tell, in three commands; no call of one takes more than nine minutes.

    python benchmarks/gpu.py correct --dataset_name CORPUS --tokenizer_name GPT2_BPE
    python benchmarks/gpu.py fast --nanogpt NANOGPT/model.py
    python benchmarks/gpu.py real --dataset_name CORPUS --tokenizer_name GPT2_BPE

`correct`: the tests marked `gpu`; engines that one GPU can run, on the same rows; resume, export.
`fast`: a training step against transformers and nanoGPT, in every form that might be faster; which
kernels it takes; decoding; the training script against a bare loop at the step time of eight ranks.
`real`: the 124M on a corpus at hand, by AdamW and by Muon, each stopped and resumed.

Each step has a process and a time limit of its own, and its record is in benchmarks/results/gpu/ as
soon as it is done. A step that has one is not repeated, so a command that was cut short goes on: a
call begins no step that may not end within its minutes, and says that it should be repeated. No
network is needed. `--dry_run` walks the same way on a CPU with a tiny model, and measures nothing.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pairing import circumstances, write_json

from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.system.command_line import run

HERE = Path(__file__).resolve().parent
PACKAGES = ("accelerate", "datasets", "evaluate", "pytest", "safetensors", "tiktoken")
HOW_TO_BRING = (
    "Bring wheels (`pip download -d wheels -r requirements.txt pytest`, no torch if the machine "
    "has its own; there `pip install --no-index --find-links wheels ...`), a corpus (a "
    "directory of parquet or text files) and a directory with GPT-2's tokenizer"
)
TINY_STEP = ["--device", "cpu", "--n_layer", "1", "--n_head", "2", "--n_embd", "32"]
TINY_STEP += ["--vocab_size", "99", "--rounds", "1", "--warmups", "1"]
TINY_RUN = ["--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--sequence_length", "32"]
TINY_RUN += ["--batch_tokens", "512", "--num_lanes", "4", "--micro_batch_size", "8"]
TINY_RUN += ["--validation_tokens", "512", "--mixed_precision", "no", "--compile", "false"]
# In steps of few forms each, for each is compiled anew.
VARIANTS = ("less_memory,chunks_4096", "sum_within_product,flash,plain_head", "max_autotune")
OPT_INS = "bf16_residual,fp8_head,bf16_residual+fp8_head"


@dataclass(frozen=True)
class Step:
    """A command whose last argument is where its record goes."""

    name: str
    command: list[str]
    limit: float  # seconds
    overrides: tuple[str, ...] = ()


# --- What each command does -----------------------------------------------------------------------


def correct(options: Namespace) -> Iterator[Step]:
    yield Step("tests", [__file__, "tests"], 300)
    some = ["--engines", "one", "--no_export"] if options.dry_run else []
    yield Step("engines", ["engines.py", *some], 500, tuple(corpus(options)))


def fast(options: Namespace) -> Iterator[Step]:
    nanogpt = ["--nanogpt", options.nanogpt] if options.nanogpt else []
    step = ["train_step.py", *(TINY_STEP if options.dry_run else ["--rounds", "5", "--steps", "5"])]
    if options.dry_run:
        step += ["--mode", "eager", "--sequence_length", "16", "--num_rows", "2"]
        some = "bf16_residual+fp8_head,sdpa_flash_3"  # of which the second cannot run there
        yield Step("step", [*step, "--variants", some, "--profile"], 120)
        decode = ["generate.py", *TINY_STEP, "--prompt", "4", "--new_tokens", "2"]
        yield Step("decode", [*decode, "--batch_sizes", "1", "--no_static"], 120)
        yield Step("loop", ["loop.py", *LOOP_ONCE], 120, tuple(corpus(options)))
        return
    at_16 = [*step, "--num_rows", "16"]
    at_64 = [*step, "--num_rows", "64"]
    yield Step("step_64_rows", [*at_64, *nanogpt], 240)
    yield Step("opt_ins_64_rows", [*at_64, "--against", "", *nanogpt, "--variants", OPT_INS], 300)
    yield Step("step_16_rows", [*at_16, *nanogpt, "--profile"], 240)
    for number, some in enumerate(VARIANTS):
        forms = ["--against", "", "--variants", some]
        yield Step(f"variants_16_rows_{number}", [*at_16, *forms], 300)
    if (rows := micro_batch_size(options)) not in (None, 16, 64):
        yield Step("step_auto_rows", [*step, "--num_rows", str(rows), *nanogpt], 240)
    yield Step("step_xl", [*step, *XL, "--num_rows", "4", "--against", ""], 180)
    yield Step("decode", ["generate.py", "--dtype", "bfloat16", "--rounds", "3"], 240)
    yield Step("loop", ["loop.py", *LOOP, "--recipe", "gpt2"], 240, tuple(corpus(options)))


def real(options: Namespace) -> Iterator[Step]:
    steps = ["--num_steps", "300"]
    size = ["--batch_tokens", "131072", "--num_lanes", "8"]
    if options.dry_run:
        steps, size = ["--num_steps", "4", "--optimizers", "muon"], TINY_RUN
    yield Step("pretrain", ["pretrain.py", *given(options), *steps], 520, tuple(size))


LOOP_ONCE = ["--recipe", "gpt2", "--steps", "1", "--rounds", "1", "--launches", "0"]
LOOP = ["--steps", "5", "--rounds", "10", "--launches", "1", "--saves", "6"]
XL = ["--n_layer", "48", "--n_head", "25", "--n_embd", "1600"]


def given(options: Namespace) -> list[str]:
    names = {"dataset_name": options.dataset_name, "tokenizer_name": options.tokenizer_name}
    return [word for name, value in names.items() for word in (f"--{name}", value)]


def corpus(options: Namespace) -> list[str]:
    """The recipe's fields: the corpus at hand and an eighth of its batch, or a tiny model."""
    eighth = ["--batch_tokens", "65536", "--num_lanes", "8"]
    fields = [*given(options), "--dataset_config", "null"]
    return fields + (TINY_RUN if options.dry_run else eighth)


def micro_batch_size(options: Namespace) -> int | None:
    """What `auto` took on this card, if `correct` has run."""
    record = read(options, "engines")
    return record.get("micro_batch_size") if record else None


# --- Running the steps ----------------------------------------------------------------------------


def take(step: Step, options: Namespace) -> bool:
    """Run a step that has no record yet; whether it has a good one now."""
    if record := recorded(step, options):
        print(f"{step.name}: has its record")
        return bool(record.get("holds", True))
    path = options.output / f"{step.name}.json"
    script, *arguments = step.command
    command = [sys.executable, str(HERE / script), *arguments, "--output", str(path)]
    command += ["--", *step.overrides] if step.overrides else []
    print(f"{step.name}: {' '.join(command[1:])}", flush=True)
    path.unlink(missing_ok=True)
    began = time.monotonic()
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if options.dry_run else {})
    status, said = ended(command, environment, step.limit)
    taken = {"seconds": round(time.monotonic() - began, 1), "dry_run": options.dry_run}
    if status or not path.is_file():
        taken |= {"failed": f"status {status}", "said": said[-4000:]}
    print("\n".join(f"    {line}" for line in said.strip().splitlines()[-45:]), flush=True)
    write_json(str(path), (read(options, step.name) or circumstances({})) | {"step": taken})
    return not status


def ended(command: list[str], environment: dict[str, str], limit: float) -> tuple[int | str, str]:
    """A command's status and what it said; with all its processes it is ended at the limit."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=limit)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        # Also those that have left its process group: launchers end theirs on a SIGTERM.
        for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, None)):
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                said, _ = process.communicate(timeout=patience)
                break
        return f"none within {limit:.0f} s", said


def recorded(step: Step, options: Namespace) -> dict[str, Any] | None:
    """The record of a step that did not fail."""
    record = read(options, step.name)
    return None if record is None or "failed" in record["step"] else record


def read(options: Namespace, name: str) -> dict[str, Any] | None:
    path = options.output / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def gpu_tests(argv: list[str]) -> int:
    """The tests marked `gpu`, counted; where there is no GPU all of them are skipped."""
    *_, output = argv
    report = Path(output).with_suffix(".xml")
    files = sorted({str(f) for f in (HERE.parent / "tests").rglob("test_*.py") if is_marked(f)})
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}", *files]
    status = subprocess.run(command, cwd=HERE.parent, check=False).returncode
    import xml.etree.ElementTree as ElementTree

    suite = ElementTree.parse(report).getroot()[0].attrib
    report.unlink()
    counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
    write_json(output, {"benchmark": "tests", **circumstances({}), **counts})
    return status


def is_marked(file: Path) -> bool:
    return "pytest.mark.gpu" in file.read_text(encoding="utf-8")


# --- What follows from it -------------------------------------------------------------------------

# What is to be reached on one H100, 124M, bf16, compiled: (record, against, at least).
GOALS = (
    ("step_64_rows", "ours", "nanogpt", 1.05),
    ("opt_ins_64_rows", "bf16_residual+fp8_head", "nanogpt", 1.15),
)
WORTH = 1.01  # a form becomes the default if it is a percent faster in three rounds of four


def decisions(options: Namespace) -> Iterator[str]:
    numbered = [f"variants_16_rows_{number}" for number in range(len(VARIANTS))]
    for name in ("step", "opt_ins_64_rows", *numbered):
        found = read(options, name) or {}
        for who, ratio in found.get("speed_ratio", {}).items():
            faster = 1 / ratio["quartile_3"] > WORTH  # the ratio says how ours is, not the form
            if who not in ("theirs", "nanogpt"):
                verdict = "take it" if faster else "leave it"
                memory = 1 / found["memory_ratio"][who]
                yield (
                    f"{name}: {who} is {1 / ratio['median']:.3f} times as fast, "
                    f"with {memory:.2f} of the memory: {verdict}"
                )
    for name, who, other, least in GOALS:
        tokens = (read(options, name) or {}).get("tokens_per_second", {})
        if who in tokens and other in tokens:
            reached = tokens[who] / tokens[other]
            verdict = "reached" if reached >= least else "not reached"
            yield f"{name}: {who} is {reached:.3f} times as fast as {other}; {least}: {verdict}"
    step = (read(options, "step_64_rows") or {}).get("mfu", {}).get("ours")
    if step is not None:
        verdict = "reached" if step >= 0.45 else "not reached"
        yield f"step_64_rows: MFU {step:.1%}; 45 %: {verdict}"

    if beside := (read(options, "loop") or {}).get("step_beside_saving"):
        verdict = "reached" if beside["median"] <= 1.02 else "not reached"
        yield f"loop: beside a checkpoint a step takes {beside['median']:.3f}; 1.02: {verdict}"
    for who, found in (read(options, "pretrain") or {}).get("runs", {}).items():
        yield (
            f"pretrain: by {who} auto took {found['micro_batch_size']} rows; peak "
            f"{found['peak_memory_gib']:.1f} GiB, MFU {found['mfu'] or 0:.1%}, "
            f"waited {found['data_wait_fraction']:.1%} for data"
        )


def check(options: Namespace) -> None:
    """Say at once what is missing, not after minutes."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"missing packages: {', '.join(missing)}. {HOW_TO_BRING}")
    if options.dry_run:
        options.dataset_name = options.tokenizer_name = "python-docs"
        return
    if not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device; --dry_run walks the same way on a CPU")
    for name in ("dataset_name", "tokenizer_name"):
        value = getattr(options, name)
        if value != "python-docs" and not Path(value).exists():
            raise UserError(f"--{name} {value}: no such directory. {HOW_TO_BRING}")
    if options.nanogpt and not Path(options.nanogpt).is_file():
        raise UserError(f"--nanogpt {options.nanogpt}: no such file; give nanoGPT's model.py")


COMMANDS = {"correct": correct, "fast": fast, "real": real}


def parse(argv: list[str] | None = None) -> Namespace:
    parser = OneLineParser(prog="benchmarks/gpu.py", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--dataset_name", default="python-docs", help="corpus: files or directory")
    parser.add_argument("--tokenizer_name", default="python-docs", help="directory of GPT-2's")
    parser.add_argument("--nanogpt", metavar="PATH", help="nanoGPT's model.py, to compare with")
    parser.add_argument("--minutes", type=float, default=9.0, help="of one call (default 9)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gpu")
    parser.add_argument("--dry_run", action="store_true", help="tiny, on a CPU")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    if argv[:1] == ["tests"]:
        return gpu_tests(argv)
    options = parse(argv)
    check(options)
    options.output.mkdir(parents=True, exist_ok=True)
    began, good = time.monotonic(), []
    for step in COMMANDS[options.command](options):
        left = 60 * options.minutes - (time.monotonic() - began)
        if good and left < step.limit and not recorded(step, options):
            print(f"{step.name}: not begun, it may take {step.limit:.0f} s. Repeat the command.")
            good.append(False)
            break
        good.append(take(step, options))
    for line in decisions(options):
        print(line)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(run("benchmarks/gpu.py", main, sys.argv[1:]))
