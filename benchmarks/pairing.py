"""What the benchmarks here share: contestants measured in alternation, ratios, a table, JSON.

A machine that others use too is slower one minute than the next, so a time on its own says little.
Contestants therefore take turns, each in a process of its own (one's memory is not the other's),
and what counts is the median over rounds of the ratio within a round.
"""

import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpt2repro.system import machine

NUM_KERNELS = 30  # of a profile

Turn = Callable[[], dict[str, float] | None]


class Contestant:
    """`build(**settings)` in a process of its own; what it returns is called once a turn.

    A turn may return measurements of its own; `seconds`, the time of the whole turn, is added.
    `build` must be importable by name, as it is sent to a fresh interpreter.
    """

    def __init__(self, name: str, build: Callable[..., Turn], **settings: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, build, settings, torch.get_num_threads()), daemon=True
        )
        self.process.start()
        theirs.close()

    def ask(self, request: str) -> Any:
        """Send a request to the process and wait for its answer."""
        self.pipe.send(request)
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name}: the process died, perhaps of memory") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def turn(self) -> dict[str, float]:
        return self.ask("turn")

    def close(self) -> None:
        self.pipe.close()  # the process ends when it finds nobody at the other end
        self.process.join()


@contextmanager
def closing_all(contestants: Sequence[Contestant]) -> Iterator[Sequence[Contestant]]:
    """End their processes, also when one of them has failed."""
    try:
        yield contestants
    finally:
        for contestant in contestants:
            contestant.close()


def serve(pipe, build: Callable[..., Turn], settings: dict[str, Any], num_threads: int) -> None:
    """The contestant's process: build, then answer requests until the pipe is closed."""
    torch.set_num_threads(num_threads)
    turn = None
    try:
        while True:
            request = pipe.recv()
            try:
                turn = turn or build(**settings)
                of_turn = {"turn": timed, "profile": profiled}.get(request)
                pipe.send(of_turn(turn) if of_turn else REQUESTS[request]())
            except Exception:
                pipe.send(traceback.format_exc())
    except EOFError:
        pass


def timed(turn: Turn) -> dict[str, float]:
    synchronize()
    began = time.perf_counter()
    measured = turn() or {}
    synchronize()
    return {"seconds": time.perf_counter() - began, **measured}


def profiled(turn: Turn) -> list[dict[str, Any]]:
    """The kernels of a turn and their share of its time; of a CPU's, the operators."""
    kind = ProfilerActivity.CUDA if on_gpu() else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        turn()
        synchronize()
    by_device = "self_device_time_total" if on_gpu() else "self_cpu_time_total"
    averages = profiler.key_averages()
    total = sum(getattr(each, by_device) for each in averages) or 1.0
    largest = sorted(averages, key=lambda each: -getattr(each, by_device))[:NUM_KERNELS]
    return [
        {"name": each.key, "calls": each.count, "share": getattr(each, by_device) / total}
        for each in largest
    ]


def on_gpu() -> bool:
    """Whether this process computes on a GPU, and not only could."""
    return torch.cuda.is_initialized()


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


# --- Memory ---------------------------------------------------------------------------------------


def reset_peak_memory() -> None:
    """Forget what start-up and compilation needed; not everywhere possible for main memory."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    elif platform.system() == "Linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> float:
    """The highest use since, in bytes: of the GPU's memory, else of this process's main memory."""
    if on_gpu():
        return float(torch.cuda.max_memory_allocated())
    if platform.system() == "Linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found, "Linux says VmHWM"
        return int(found[1]) * 1024.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.0  # macOS counts bytes


REQUESTS: dict[str, Callable[[], Any]] = {
    "reset_peak_memory": reset_peak_memory,
    "peak_memory": peak_memory,
}


# --- Rounds and ratios ----------------------------------------------------------------------------


def alternate(
    contestants: Sequence[Contestant], *, num_rounds: int, num_warmups: int
) -> dict[str, list[dict[str, float]]]:
    """Measurements of every turn, by contestant; who began one round comes last in the next."""
    for contestant in contestants:  # compiles, fills caches, allocates the optimizer's state
        for _ in range(num_warmups):
            contestant.turn()
        contestant.ask("reset_peak_memory")
    turns: dict[str, list[dict[str, float]]] = {c.name: [] for c in contestants}
    for number in range(num_rounds):
        for contestant in contestants[:: -1 if number % 2 else 1]:
            turns[contestant.name].append(contestant.turn())
            show_progress(f"round {number + 1} of {num_rounds}, {contestant.name}")
    show_progress("")
    return turns


def show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    quartiles = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else list(values) * 3
    )
    return {
        "median": statistics.median(values),
        "quartile_1": quartiles[0],
        "quartile_3": quartiles[2],
    }


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """`spread` of over[i] / under[i]: with times, how many times faster the second is."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


# --- Reports --------------------------------------------------------------------------------------


def ratio_text(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['quartile_1']:.3f}-{ratio['quartile_3']:.3f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def circumstances(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a number depends on besides the code; to be asked before measuring adds to the load."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": machine.describe(arguments.get("device")) | gpu_state(),
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "arguments": {k: v for k, v in arguments.items() if k != "output"},
    }


def gpu_state() -> dict[str, str]:
    """Driver, clocks and power limit, as nvidia-smi says, and cuDNN; nothing without a GPU."""
    if not torch.cuda.is_available():
        return {}
    names = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"]
    uuid = str(torch.cuda.get_device_properties(0).uuid).removeprefix("GPU-")
    card = f"--id=GPU-{uuid}"  # by number it may be another than torch's first
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", card]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        state = dict(zip(names, map(str.strip, said.split(",")), strict=True))
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        state = {"nvidia-smi": str(error)}
    return state | {"cudnn": str(torch.backends.cudnn.version())}


def write_json(path: str | None, results: dict[str, Any]) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
