"""What the data stream costs: speed on one core, resuming, Hub traffic, memory.

    python benchmarks/data.py --output benchmarks/results/data.json

- Speed: read, encode and pack, against raw `tiktoken.encode_ordinary` on the same texts and against
  the same work built on `tokenizers.encode_batch`, all on one core, in rounds that alternate.
  Tokens per second of CPU time, since other programs share the machine; medians and their ratios.
- Resume: seconds to the first batch from states at growing distances into the data.
- Traffic: requests and bytes that a fake Hub on loopback serves during most of an epoch.
- Memory: the resident size along `--memory_tokens` tokens.

By default the corpus is the demo's, made from the standard library's documentation, with its
4,096-token BPE; its short documents are joined to about 1,000 tokens, which FineWeb-Edu's have: the
cost of a document does not depend on its length. `--data` takes a parquet file or directory as it
is, `--tokenizer` what `from_pretrained` takes.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pytest import MonkeyPatch

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for everyone
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fake_hub import FakeHub

from gpt2repro.commands.parser import OneLineParser
from gpt2repro.data import demo_corpus
from gpt2repro.data.corpora.corpus import Corpus
from gpt2repro.data.opening import open_corpus
from gpt2repro.data.rows.mixture import Source
from gpt2repro.data.rows.packing import rows_digest
from gpt2repro.data.rows.stream import TokenStream
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.encoder import BulkEncoder
from gpt2repro.system import machine
from gpt2repro.system.command_line import run

SEQUENCE_LENGTH, ROWS_PER_STEP, NUM_LANES = 1024, 64, 16
STREAM = {
    "sequence_length": SEQUENCE_LENGTH,
    "rows_per_step": ROWS_PER_STEP,
    "num_lanes": NUM_LANES,
    "seed": 1,
    "num_reader_threads": 2,
}
DOCUMENT_CHARACTERS = 4000
STEP_TOKENS = SEQUENCE_LENGTH * ROWS_PER_STEP
DATASET = "benchmark/texts"


def parse_arguments(argv: list[str]) -> Namespace:
    parser = OneLineParser(prog="data.py", description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="a parquet file or directory with a text column")
    parser.add_argument("--tokenizer", help="Hub id or directory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round_tokens", type=int, default=2_000_000)
    parser.add_argument("--memory_tokens", type=int, default=50_000_000)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(argv)


# --- speed ----------------------------------------------------------------------------------------


def raw_tiktoken(encoder: BulkEncoder, texts: list[str]) -> int:
    assert encoder._tiktoken is not None, "--tokenizer: not a GPT-2 style byte-level BPE"
    return sum(len(encoder._tiktoken.encode_ordinary(text)) for text in texts)


def on_encode_batch(corpus: Corpus, encoder: BulkEncoder, num_tokens: int) -> int:
    """The usual pipeline: read a unit, encode it as a batch, concatenate, cut into rows."""
    tokens = np.zeros(0, np.int64)
    done, unit = 0, 0
    while done < num_tokens:
        texts = corpus.read_unit(unit % corpus.num_units)
        batch = encoder._fast.encode_batch(texts, add_special_tokens=False)
        parts = [part for e in batch for part in ([encoder.eot_id], e.ids)]
        tokens = np.concatenate([tokens, *parts])
        num_rows = (len(tokens) - 1) // SEQUENCE_LENGTH
        cut = tokens[: num_rows * SEQUENCE_LENGTH + 1]
        rows = np.lib.stride_tricks.sliding_window_view(cut, SEQUENCE_LENGTH + 1)
        rows_digest(rows[::SEQUENCE_LENGTH])
        tokens = tokens[num_rows * SEQUENCE_LENGTH :]
        done, unit = done + num_rows * SEQUENCE_LENGTH, unit + 1
    return done


def ours(stream: TokenStream, num_tokens: int) -> int:
    """A running stream, which is as far ahead after the steps as it was before them."""
    num_steps = -(-num_tokens // STEP_TOKENS)
    for _ in range(num_steps):
        next(stream)
    return num_steps * STEP_TOKENS


def per_cpu_second(call, *arguments: Any) -> float:
    began = time.process_time()
    return call(*arguments) / (time.process_time() - began)


def measure_speed(corpus: Corpus, encoder: BulkEncoder, rounds: int, num_tokens: int) -> dict:
    texts: list[str] = []
    for unit in range(corpus.num_units):
        texts += corpus.read_unit(unit)
        if sum(map(len, texts)) > 5 * num_tokens:
            break
    seen: dict[str, list[float]] = {"raw_tiktoken": [], "encode_batch_pipeline": [], "ours": []}
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    for _ in range(rounds):
        seen["raw_tiktoken"].append(per_cpu_second(raw_tiktoken, encoder, texts))
        stream = TokenStream([Source(corpus, 1)], encoder, **STREAM)
        ours(stream, 8 * STEP_TOKENS)
        seen["ours"].append(per_cpu_second(ours, stream, num_tokens))
        stream.close()
        seen["encode_batch_pipeline"].append(
            per_cpu_second(on_encode_batch, corpus, encoder, num_tokens // 4)
        )
    os.sched_setaffinity(0, cores)
    medians = {name: statistics.median(values) for name, values in seen.items()}
    return {
        "tokens_per_cpu_second": {name: round(value) for name, value in medians.items()},
        "ours_over_raw_tiktoken": round(medians["ours"] / medians["raw_tiktoken"], 3),
        "ours_over_encode_batch": round(medians["ours"] / medians["encode_batch_pipeline"], 2),
        "rounds": rounds,
    }


# --- memory and resume ----------------------------------------------------------------------------


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def measure_memory(corpus: Corpus, encoder: BulkEncoder, num_tokens: int) -> tuple[dict, list]:
    """The resident size along the way, and states at tenths of it."""
    stream = TokenStream([Source(corpus, 1)], encoder, **STREAM)
    num_steps = max(20, num_tokens // STEP_TOKENS)
    sizes, states = [], [stream.state_dict()]
    began = time.perf_counter()
    for step in range(num_steps):
        next(stream)
        if step % (num_steps // 20) == 0:
            sizes.append(resident_mb())
        if step % (num_steps // 4) == 0:
            states.append(stream.state_dict())
    seconds = time.perf_counter() - began
    stream.close()
    middle = len(sizes) // 2
    report = {
        "tokens": num_steps * STEP_TOKENS,
        "epochs": states[-1]["lanes"][0][0][0],
        "resident_mb_first_half_max": round(max(sizes[:middle])),
        "resident_mb_second_half_max": round(max(sizes[middle:])),
        "growth": round(max(sizes[middle:]) / max(sizes[:middle]) - 1, 3),
        "wall_tokens_per_second_all_cores": round(num_steps * STEP_TOKENS / seconds),
        "equals_one_hour_at_tokens_per_second": round(num_steps * STEP_TOKENS / 3600),
    }
    return report, states


def measure_resume(corpus: Corpus, encoder: BulkEncoder, states: list, rounds: int) -> dict:
    seconds: list[list[float]] = [[] for _ in states]
    for _ in range(rounds):
        for index, state in enumerate(states):
            stream = TokenStream([Source(corpus, 1)], encoder, **STREAM)
            began = time.perf_counter()
            stream.load_state_dict(state)
            next(stream)
            seconds[index].append(time.perf_counter() - began)
            stream.close()
    medians = [statistics.median(values) for values in seconds]
    return {
        "first_batch_seconds_from_the_start": round(medians[0], 3),
        "first_batch_seconds_later_in_the_data": [round(value, 3) for value in medians[1:]],
        "latest_over_first": round(medians[-1] / medians[0], 2),
    }


# --- traffic --------------------------------------------------------------------------------------


def measure_traffic(files: list[Path], encoder: BulkEncoder) -> dict:
    """Most of an epoch, in which no unit is due twice; on few lanes, for a small corpus."""
    with FakeHub() as hub, MonkeyPatch.context() as patch:
        contents = {path.name: path.read_bytes() for path in files}
        hub.add("datasets", DATASET, contents)
        hub.use_in_process(patch)
        corpus = open_corpus(DATASET)
        at_start = list(hub.log)
        small = {"sequence_length": 256, "rows_per_step": 4, "num_lanes": 4}
        stream = TokenStream([Source(corpus, 1)], encoder, **STREAM | small)
        num_pieces = (corpus.num_units - 1) // small["num_lanes"]
        furthest = 0
        while furthest < num_pieces - 3:
            step = next(stream)
            furthest = max(p.epoch * num_pieces + p.piece for _, (p,) in step.lanes.values())
        stream.close()
    reads = hub.log[len(at_start) :]
    chunks = {  # what the text of each unit measures
        (corpus._sources[file].name, f"bytes={start}-{start + length - 1}"): length
        for file, start, length in corpus._units[["file", "start", "length"]].tolist()
    }
    units = {(read.path.rpartition("/")[2], read.range) for read in reads}
    text_bytes = sum(chunks[unit] for unit in units)
    num_bytes = sum(request.num_bytes for request in hub.log)  # footers and listings too
    return {
        "files": len(files),
        "requests_at_start": len(at_start),
        "units_read": len(units),
        "requests_per_unit": round(len(reads) / len(units), 3),
        "bytes_over_text_column_bytes": round(num_bytes / text_bytes, 3),
        "text_column_share_of_the_files": round(
            int(corpus.num_bytes.sum()) / sum(map(len, contents.values())),
            3,
        ),
    }


def write_joined_demo(path: Path) -> None:
    """The demo's documents, several to one, in row groups of 10."""
    demo = open_corpus(demo_corpus.prepare() / "train.parquet")
    texts, parts = [], []
    for unit in range(demo.num_units):
        for text in demo.read_unit(unit):
            parts.append(text)
            if sum(map(len, parts)) > DOCUMENT_CHARACTERS:
                texts.append("\n\n".join(parts))
                parts = []
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10)


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    tokenizer = arguments.tokenizer or demo_corpus.prepare() / "tokenizer"
    encoder = BulkEncoder(load_tokenizer(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(arguments.data or Path(folder) / "demo.parquet")
        if not arguments.data:
            write_joined_demo(data)
        files = sorted(data.glob("*.parquet")) if data.is_dir() else [data]
        corpus = open_corpus(data)
        memory, states = measure_memory(corpus, encoder, arguments.memory_tokens)
        report = {
            "date": datetime.now(UTC).date().isoformat(),
            **machine.describe("cpu"),
            "corpus": {
                "files": [path.name for path in files],
                "units": corpus.num_units,
                "vocab_size": encoder._fast.get_vocab_size(),
            },
            "speed": measure_speed(corpus, encoder, arguments.rounds, arguments.round_tokens),
            "resume": measure_resume(corpus, encoder, states, arguments.rounds),
            "traffic": measure_traffic(files, encoder),
            "memory": memory,
        }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run("data.py", main, sys.argv[1:]))
