"""The machine and the versions behind a number: every recorded result carries them."""

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


def describe() -> dict[str, str]:
    """Hardware, Python and package versions, as strings."""
    return {"hardware": hardware(), "python": platform.python_version()} | {
        package: found for package in PACKAGES if (found := package_version(package))
    }


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware() -> str:
    """The accelerators of this host, or its processor and the cores this process may use.

    A processor comes with the vector instructions that torch found: one name covers machines that
    differ several times in speed.
    """
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {processor()} ({vector_instructions()})"


def vector_instructions() -> str:
    """Such as AVX2, AVX512 or AVX512 with AMX, which multiplies bfloat16."""
    amx = "amx_bf16" in cpuinfo("flags").split()
    return torch.backends.cpu.get_cpu_capability() + (" with AMX" if amx else "")


def processor() -> str:
    return cpuinfo("model name") or platform.processor() or platform.machine()


def cpuinfo(key: str) -> str:
    """What Linux says of the first core under `key`; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(values, "")
