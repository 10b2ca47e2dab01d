"""How fast a run is, as a share of what its devices could do, and how much memory it takes."""

import re
import resource
import sys
from typing import Any

import torch

# Dense bf16 tensor-core peak in FLOP/s, from the vendors' data sheets (without sparsity). The first
# name that torch.cuda.get_device_name() has as whole words counts, so longer names come first.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
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
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
# Another chip under the name of one of these, or a share of one.
SLOWER_OR_FASTER = re.compile(r"Laptop|\bMIG\b| (?:D|Ti|SUPER)\b")


def flops_per_token(num_parameters: int, n_layer: int, n_embd: int, sequence_length: int) -> float:
    """FLOPs of one training token, forward and backward: `6 N + 12 L d T`.

    N counts the parameters that multiply an activation: all but the position table (the token
    table counts, as it is the output projection too). `12 L d T` are the attention products,
    counted whole although causal attention needs half. Recomputation is not counted. This is the
    convention of PaLM (Chowdhery et al. 2022, appendix B) and nanoGPT, so that MFU figures compare.
    """
    return 6 * num_parameters + 12 * n_layer * n_embd * sequence_length


def model_flops_per_token(model: Any, sequence_length: int) -> float:
    """`flops_per_token` of a GPT-2, whose position table multiplies nothing."""
    config = model.config
    num_parameters = model.num_parameters() - config.n_positions * config.n_embd
    return flops_per_token(num_parameters, config.n_layer, config.n_embd, sequence_length)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None where none is published, as for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if SLOWER_OR_FASTER.search(name):
        return None
    found = (peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name))
    return next(found, None)


class Throughput:
    """Tokens per second, MFU, the share of time spent waiting for data, and what else training
    waited for, since the last reading.

    MFU (model FLOPs utilization) is `tokens/s * FLOPs per token / (devices * peak FLOP/s)`.
    """

    def __init__(self, flops_per_token: float, peak: float | None, num_devices: int) -> None:
        self.flops_per_token = flops_per_token
        self.peak = peak
        self.num_devices = num_devices
        self.restart()

    def restart(self) -> None:
        self.tokens, self.seconds, self.waited, self.saving = 0, 0.0, 0.0, 0.0

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
        saving = self.saving
        self.restart()
        return {
            "tokens_per_second": rate,
            "mfu": mfu,
            "data_wait_fraction": waited,
            "save_seconds": saving,
        }


def peak_memory_gib(device: torch.device) -> float:
    """This process's highest use so far, in GiB: of its GPU, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes_per_unit = 1 if sys.platform == "linux" else 1 / 1024  # macOS counts bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * kilobytes_per_unit / 2**20
