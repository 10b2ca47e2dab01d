"""How fast HellaSwag is scored, and how much of the work is padding.

    python benchmarks/evaluation.py --subset 48 --output benchmarks/results/evaluation.json

A randomly initialized 124M GPT-2 scores rows as long as HellaSwag's: a subset of them is timed, in
`rounds` rounds that alternate between our batches, lm-evaluation-harness' own (`HFLM` with the same
batch size, from the same tokens) and build-nanogpt's (the four endings of a row, padded to the
longest of them, with the logits of every position). The padding is that of all
`--num_rows` rows and needs no model; the time for all of them is extrapolated and labelled so.

Without `--hellaswag_file` the lengths are drawn: a third of the rows like video captions (contexts
of 20-60 tokens, endings of 5-25), two thirds like how-to articles (50-110 and 15-50). That is an
assumption about the 10,042 validation rows, not a measurement of them.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2repro.commands.parser import OneLineParser
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.bpe import train_bpe
from gpt2repro.evaluation.likelihoods import Batch, Request, loglikelihoods, plan_batches
from gpt2repro.evaluation.task import read_jsonl
from gpt2repro.evaluation.tasks.hellaswag import HellaSwagCompletion
from gpt2repro.system import machine
from gpt2repro.system.command_line import run

MAX_LENGTH, VOCAB_SIZE, NUM_ENDINGS = 1024, 50257, 4


def drawn_requests(num_rows: int, rng: np.random.Generator) -> list[Request]:
    """Four requests for each row; token values do not matter for speed."""
    requests = []
    for _ in range(num_rows):
        caption = rng.random() < 1 / 3
        context = int(rng.integers(20, 60) if caption else rng.integers(50, 110))
        endings = rng.integers(5, 25, NUM_ENDINGS) if caption else rng.integers(15, 50, NUM_ENDINGS)
        for num_scored in endings.tolist():
            ids = rng.integers(0, VOCAB_SIZE, context + num_scored)
            requests.append(Request(ids, num_scored))
    return requests


def padding(lengths: np.ndarray, batches: list[Batch]) -> float:
    computed = sum(batch.length * len(batch.index) for batch in batches)
    return 1 - float(lengths.sum()) / computed


def row_by_row_padding(lengths: np.ndarray) -> float:
    rows = lengths.reshape(-1, NUM_ENDINGS)
    return 1 - float(rows.sum()) / float(rows.max(axis=1).sum() * NUM_ENDINGS)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(model, requests: list[Request], batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way over the same requests, alternating so that both meet the same load."""

    def ours() -> None:
        loglikelihoods(
            model, requests, max_length=MAX_LENGTH, batch_size=batch_size, trim_logits=True
        )

    def row_by_row() -> None:
        for i in range(0, len(requests), NUM_ENDINGS):
            row = requests[i : i + NUM_ENDINGS]
            loglikelihoods(model, row, max_length=MAX_LENGTH, batch_size=NUM_ENDINGS)

    harness = HFLM(pretrained=model, tokenizer=train_bpe(["a b"], 300), batch_size=batch_size)
    asked = [(("", ""), *map(list, np.split(r.ids, [-r.num_scored]))) for r in requests]

    def hflm() -> None:
        harness._loglikelihood_tokens(asked, disable_tqdm=True)

    loglikelihoods(model, requests[:batch_size], max_length=MAX_LENGTH, batch_size=batch_size)
    ways = {"ours": ours, "hflm": hflm, "row_by_row": row_by_row}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    return seconds


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="benchmarks/evaluation.py", description=__doc__.split("\n")[0])
    parser.add_argument("--num_rows", type=int, default=10_042, help="HellaSwag's validation rows")
    parser.add_argument("--subset", type=int, default=48, help="rows that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hellaswag_file", help="take the lengths of these rows instead")
    parser.add_argument("--tokenizer", default="openai-community/gpt2", help="for that file")
    parser.add_argument("--output", help="JSON")
    arguments = parser.parse_args(argv)

    rng = np.random.default_rng(0)
    if arguments.hellaswag_file:
        rows = read_jsonl(arguments.hellaswag_file, "hellaswag_file")
        tokenizer = load_tokenizer(arguments.tokenizer)
        requests = HellaSwagCompletion(rows, tokenizer, max_length=MAX_LENGTH).requests
    else:
        requests = drawn_requests(arguments.num_rows, rng)
    num_rows = len(requests) // NUM_ENDINGS
    lengths = np.array([len(request.ids) - 1 for request in requests])
    batches = plan_batches(lengths, batch_size=arguments.batch_size, max_length=MAX_LENGTH)

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).to(arguments.device, getattr(torch, arguments.dtype))
    chosen = np.sort(rng.choice(num_rows, min(arguments.subset, num_rows), replace=False))
    subset = [requests[NUM_ENDINGS * row + i] for row in chosen for i in range(NUM_ENDINGS)]
    seconds = measure(model, subset, arguments.batch_size, arguments.rounds)
    median = {way: statistics.median(values) for way, values in seconds.items()}
    tokens = sum(len(request.ids) - 1 for request in subset)
    found = {
        "num_rows": num_rows,
        "num_shapes": len({batch.length for batch in batches}),
        "padding_waste": padding(lengths, batches),
        "padding_waste_row_by_row": row_by_row_padding(lengths),
        "timed_rows": len(chosen),
        "seconds": seconds,
        "rows_per_second": {way: len(chosen) / value for way, value in median.items()},
        **{
            f"speedup_over_{way}": statistics.median(
                b / a for a, b in zip(seconds["ours"], seconds[way], strict=True)
            )
            for way in ("hflm", "row_by_row")
        },
        "extrapolated_seconds_for_all_rows": median["ours"] * float(lengths.sum()) / tokens,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # of a shared machine: trust ratios, not absolutes
        "arguments": vars(arguments) | {"output": None},
        "environment": machine.describe(arguments.device),
    }
    print(json.dumps(found, indent=2))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run("benchmarks/evaluation.py", main, sys.argv[1:]))
