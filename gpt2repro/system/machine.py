"""The machine and the versions behind a number: every recorded result carries them."""

import functools
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "tiktoken",
)


def describe(device: str | None = None) -> dict[str, str]:
    """Hardware (see there), Python and package versions, as strings."""
    return {"hardware": hardware(device), "python": platform.python_version()} | {
        package: found for package in PACKAGES if (found := package_version(package))
    }


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware(device: str | None = None) -> str:
    """The accelerators of this host, or its processor and the cores this process may use.

    The processor where there is no accelerator, and where `device` says that it computes. A
    processor comes with the vector instructions that torch found: one name covers machines that
    differ several times in speed.
    """
    on_cpu = device is not None and torch.device(device).type == "cpu"
    if torch.cuda.is_available() and not on_cpu:
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {processor()} ({vector_instructions()})"


def vector_instructions() -> str:
    """Such as AVX2, or AVX512 with bfloat16 where the processor has products of it."""
    flags = first_core().get("flags", "").split()
    bfloat16 = " with bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags) else ""
    return torch.backends.cpu.get_cpu_capability() + bfloat16


def processor() -> str:
    return first_core().get("model name") or platform.processor() or platform.machine()


@functools.cache  # with many cores Linux takes its time, and every checkpoint asks
def first_core() -> dict[str, str]:
    """What Linux says of the first core in /proc/cpuinfo; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    fields = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in fields}
