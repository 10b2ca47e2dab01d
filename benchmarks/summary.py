"""`python benchmarks/summary.py` prints the records in results/ as the table of README.md."""

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pairing import ratio_text

from gpt2repro.publishing.card_markdown import markdown_table

RESULTS = Path(__file__).parent / "results"
NAMES = {"theirs": "transformers", "nanogpt": "nanoGPT"}

Row = tuple[str, str, str, str]  # what was measured, ours, what it is compared with, the ratio


def train_step(record: dict[str, Any]) -> Iterator[Row]:
    step = f"124M, {record['arguments']['mode']} {record['arguments']['dtype']} training step"
    if record["arguments"]["same_allocator"]:
        step += ", the same allocator"
    tokens, memory = record["tokens_per_second"], record["peak_memory_bytes"]
    for who, ratio in record["speed_ratio"].items():
        theirs = f"{NAMES[who]}: {tokens[who]:,.0f}"
        yield f"{step}, tokens/s", f"{tokens['ours']:,.0f}", theirs, ratio_text(ratio)
        theirs = f"{NAMES[who]}: {memory[who] / 2**20:,.0f}"
        share = f"{record['memory_ratio'][who]:.3f}"
        yield "its peak memory, MiB", f"{memory['ours'] / 2**20:,.0f}", theirs, share


def generate(record: dict[str, Any]) -> Iterator[Row]:
    caches = {
        "ours": "dynamic cache",
        "ours_static": "compiled static cache",
        "theirs": "transformers, dynamic cache",
        "theirs_static": "transformers, compiled static cache",
    }
    for size, phases in record["batch_sizes"].items():
        for phase, found in phases.items():
            tokens = found["tokens_per_second"]
            for pair, ratio in found["speed_ratio"].items():
                ours, theirs = pair.split("/")
                what = f"124M, {phase}, batch {size}, {caches[ours]}, tokens/s"
                against = f"{caches[theirs]}: {tokens[theirs]:,.1f}"
                yield what, f"{tokens[ours]:,.1f}", against, ratio_text(ratio)


def loop(record: dict[str, Any]) -> Iterator[Row]:
    recipe = record["arguments"]["recipe"]
    if record["arguments"]["rounds"] > 1:  # one is there to begin with, and no measurement
        ratio = f"{ratio_text(record['script_over_bare'])} of its time"
        yield f"recipe {recipe}, the script's step", "", "a bare loop", ratio
    if ratio := record.get("step_beside_saving"):
        theirs = f"{ratio_text(ratio)} of its time"
        yield f"recipe {recipe}, a step beside a checkpoint", "", "a step alone", theirs
    if seconds := record["seconds_to_first_step"]:
        yield f"recipe {recipe}, launch to first step", f"{max(seconds):.1f} s", "", ""


def startup(record: dict[str, Any]) -> Iterator[Row]:
    median = statistics.median
    torch = f"import torch: {median(record['seconds']['import torch']):.2f} s"
    for name, ratio in record["over_import_torch"].items():
        if name != "import torch":
            ours = f"{median(record['seconds'][name]):.2f} s"
            yield f"`{name}` answers", ours, torch, ratio_text(ratio)


def data(record: dict[str, Any]) -> Iterator[Row]:
    speed = record["speed"]
    tokens = speed["tokens_per_cpu_second"]
    ours = f"{tokens['ours']:,}"
    for who, name, ratio in (
        ("raw_tiktoken", "tiktoken alone", speed["ours_over_raw_tiktoken"]),
        ("encode_batch_pipeline", "datasets and tokenizers", speed["ours_over_encode_batch"]),
    ):
        yield "stream, tokens per second of CPU", ours, f"{name}: {tokens[who]:,}", f"{ratio:.2f}"


def scale(record: dict[str, Any]) -> Iterator[Row]:
    num_files, launches = list(record["files"].items())[-1]
    cold, warm = launches["cold"], launches["warm"]
    what = f"{record['processes']} processes open {int(num_files):,} parquet files"
    again = f"a second start: {warm['footer_reads']:,}"
    yield f"{what}, requests for footers", f"{cold['footer_reads']:,}", again, ""
    memory = f"a second start: {warm['mb_first_rows']:.0f}"
    yield "resident of one above its imports, MB", f"{cold['mb_first_rows']:.0f}", memory, ""


def evaluation(record: dict[str, Any]) -> Iterator[Row]:
    rows = record["rows_per_second"]
    what, ours = "124M, rows/s of HellaSwag's shapes", f"{rows['ours']:.2f}"
    for way, name in (("hflm", "lm-evaluation-harness"), ("row_by_row", "row by row")):
        yield what, ours, f"{name}: {rows[way]:.2f}", f"{record[f'speedup_over_{way}']:.2f}"


def kill_resume(record: dict[str, Any]) -> Iterator[Row]:
    equal = "bitwise equal" if record["bitwise_equal"] else "not equal"
    shape = f"{record['recipe']['n_layer']} layers of {record['recipe']['n_embd']}"
    kills = f"{record['num_kills']} x kill -9, {record['num_hits']} in the phase that was meant"
    if record.get("overlapping"):
        kills += ", the next launch already there"
    yield f"{shape}, resumed after {kills}", "", "an undisturbed run", equal


def kill_loops(record: dict[str, Any]) -> Iterator[Row]:
    for loop, name in (("stream_loop", "a bare DDP loop"), ("stream_trainer", "Trainer")):
        runs = [run for run in record["runs"] if run["loop"] == loop]
        kills = sum(run["num_kills"] for run in runs)
        equal = "equal digests" if all(run["equal"] for run in runs) else "not equal"
        what = f"the exact stream in {name}, {len(runs)} kinds of source, {kills} x kill -9"
        yield f"{what}, 1 to 3 processes", "", "runs left alone", equal


# How the names of their records begin.
BENCHMARKS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "train_step": train_step,
    "generate": generate,
    "loop": loop,
    "startup": startup,
    "data": data,
    "scale": scale,
    "evaluation": evaluation,
    "kill_resume": kill_resume,
    "kill_loops": kill_loops,
}


def summary() -> str:
    """A table in Markdown."""
    header = ("what", "ours", "against", "ratio", "on", "record")
    lines: list[tuple[str, ...]] = []
    for name, rows in BENCHMARKS.items():
        for path in sorted(RESULTS.glob(f"{name}*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            hardware = record.get("environment", record)["hardware"]
            where = hardware, f"[{path.stem}](results/{path.name})"
            for row in rows(record):
                lines.append((*row, *where))
                where = "", ""  # said once for a record
    return markdown_table(header, lines)


if __name__ == "__main__":
    print(summary())
