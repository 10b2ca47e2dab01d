"""What a run says about itself: metrics.jsonl, trackers, the progress bar, throughput and MFU."""

import json
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

# Dense bf16 tensor-core peak in FLOP/s, from the vendors' data sheets (without sparsity). The first
# name that occurs in torch.cuda.get_device_name() counts, so longer names come first.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def flops_per_token(num_parameters: int, n_layer: int, n_embd: int, sequence_length: int) -> float:
    """FLOPs of one training token, forward and backward: `6 N + 12 L d T`.

    N counts the parameters that multiply an activation: all but the position table (the token
    table counts, as it is the output projection too). `12 L d T` are the attention products,
    counted whole although causal attention needs half. Recomputation is not counted. This is the
    convention of PaLM (Chowdhery et al. 2022, appendix B) and nanoGPT, so that MFU figures compare.
    """
    return 6 * num_parameters + 12 * n_layer * n_embd * sequence_length


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None where none is published, as for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


class Throughput:
    """Tokens per second, MFU and the share of time spent waiting for data, since the last reading.

    MFU (model FLOPs utilization) is `tokens/s * FLOPs per token / (devices * peak FLOP/s)`.
    """

    def __init__(self, flops_per_token: float, peak: float | None, num_devices: int) -> None:
        self.flops_per_token = flops_per_token
        self.peak = peak
        self.num_devices = num_devices
        self.restart()

    def restart(self) -> None:
        """Start counting anew: what came before (an evaluation, a checkpoint) is not training."""
        self.tokens, self.seconds, self.waited = 0, 0.0, 0.0

    def add(self, tokens: int, seconds: float, waited: float) -> None:
        self.tokens += tokens
        self.seconds += seconds
        self.waited += waited

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def read(self) -> dict[str, float | None]:
        rate = self.tokens_per_second
        mfu = rate * self.flops_per_token / (self.num_devices * self.peak) if self.peak else None
        waited = min(1.0, self.waited / self.seconds) if self.seconds else 0.0
        self.restart()
        return {
            "tokens_per_second": rate,
            "mfu": mfu,
            "data_wait_fraction": waited,
        }


def peak_memory_gib(device: torch.device) -> float:
    """This process's highest use so far, in GiB: of its GPU, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes_per_unit = 1 if sys.platform == "linux" else 1 / 1024  # macOS counts bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * kilobytes_per_unit / 2**20


class MetricsLog:
    """`metrics.jsonl`: one JSON object per logged step, on the main process.

    Each line is flushed as it is written: the file can be watched, and a killed run loses nothing.
    A run that resumes at step s first removes the lines of s and later steps, which come again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        # JSON knows no NaN: a non-finite loss is written as null, and its incident says more.
        clean = {k: None if is_nonfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(clean) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def is_nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line torn by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def rewind_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep only the lines before `step`, atomically, and return them."""
    kept = [record for record in read_metrics(path) if record["step"] < step]
    scratch = path.with_suffix(".partial")
    scratch.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    scratch.replace(path)
    return kept


class SpikeDetector:
    """How many standard deviations a loss lies above the mean of the last `window` losses."""

    def __init__(self, losses: Iterable[float] = (), window: int = 128, least: int = 32) -> None:
        self.losses: deque[float] = deque(losses, maxlen=window)
        self.least = least  # fewer losses say nothing about their spread

    def z_score(self, loss: float) -> float:
        """Score `loss` against those before it, then remember it; 0 while too few are known."""
        score = 0.0
        if len(self.losses) >= self.least:
            mean = sum(self.losses) / len(self.losses)
            variance = sum((x - mean) ** 2 for x in self.losses) / (len(self.losses) - 1)
            score = (loss - mean) / math.sqrt(variance) if variance else 0.0
        self.losses.append(loss)
        return score


class Progress:
    """The main process's progress bar: step, loss, tokens/s and time left; notes go above it."""

    def __init__(self, *, first_step: int, num_steps: int, enabled: bool) -> None:
        self.enabled = enabled
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not enabled,
            smoothing=0.1,
            mininterval=0.5 if sys.stderr.isatty() else 60.0,  # a log file wants few lines
        )

    def update(self, *, loss: float, tokens_per_second: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tok/s", refresh=False)
        self.bar.update()

    def note(self, text: str) -> None:
        """Print a line above the bar, on the main process only."""
        if self.enabled:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()


class Stopwatch:
    """Seconds since the last `lap`."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return seconds
