"""What is behind a result: the machine, the versions, the command and the commit."""

import contextlib
import functools
import math
import os
import platform
import shlex
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from gpt2repro import UserError
from gpt2repro.system import processes

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "tiktoken",
)
SECONDS_FOR_GIT = 10
CONTROL_GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

# --- Machine and versions -------------------------------------------------------------------------


def describe(device: str | None = None) -> dict[str, str]:
    """Hardware (see there), Python and package versions, as strings."""
    return {"hardware": hardware(device), "python": platform.python_version()} | {
        package: found for package in PACKAGES if (found := _package_version(package))
    }


def _package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def num_cores() -> int:
    """Those that this process may use, or whose time its control groups allow it."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    for place in _control_groups("cpu"):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with contextlib.suppress(OSError, ValueError):  # it has none, or its quota is "max"
                said = " ".join((place / file).read_text(encoding="utf-8") for file in files)
                quota, period = map(int, said.split())
                cores = min(cores, math.ceil(quota / period)) if quota > 0 else cores
    return cores


def main_memory() -> int:
    """Bytes that this process may take: the machine's, or what its control groups allow.

    A container has such a limit, and so has a Slurm job; the kernel ends what goes beyond.
    """
    limits = [psutil.virtual_memory().total]
    for place in _control_groups("memory"):
        for file in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # it has none, or its limit is "max"
                limits.append(int((place / file).read_text(encoding="utf-8")))
    return min(limits)


def _control_groups(controller: str) -> list[Path]:
    """Those of this process that may limit what `controller` does, and the ones around them.

    Of version 2 there is one, of version 1 one for each controller.
    """
    try:
        lines = OWN_GROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    places = []
    for _, controllers, name in (line.split(":", 2) for line in lines if line.count(":") > 1):
        if not controllers or controller in controllers.split(","):
            root = CONTROL_GROUPS / controller if controllers else CONTROL_GROUPS
            own = Path(name.lstrip("/"))
            places += [root / each for each in (own, *own.parents)]
    return places


def hardware(device: str | None = None) -> str:
    """The GPUs of this host that this launch uses, or its processor and the cores we may use.

    The processor where there is no accelerator, and where `device` says that it computes. A
    processor comes with the vector instructions that torch found: one name covers machines that
    differ several times in speed.
    """
    kind = torch.device(device).type if device else None
    if kind == "mps":
        return f"the GPU (MPS) of {_processor()}"
    if torch.cuda.is_available() and kind != "cpu":
        return f"{os.environ.get('LOCAL_WORLD_SIZE', 1)} x {torch.cuda.get_device_name()}"
    return f"{num_cores()} cores of {_processor()} ({_vector_instructions()})"


def check_torch(device: torch.device) -> None:
    """Refuse a torch that computes other numbers on this device, and does not say so.

    Before 2.14, on Macs' GPUs: products that sum over more than 32,768, as the gradient below a
    head of GPT-2's vocabulary does (pytorch/pytorch#193487), and causal attention in 16 bits where
    no gradients are asked for (pytorch/pytorch#195910).

    Raises:
        UserError: naming the version to install.
    """
    if device.type == "mps" and torch.__version__ < "2.14":  # a TorchVersion: 2.9 is less
        raise UserError(
            f"torch {torch.__version__} computes wrong numbers on a Mac's GPU without a word: "
            "install torch 2.14 or newer, or keep to the CPU (launch/cpu.yaml, --device cpu)"
        )


def _vector_instructions() -> str:
    """Such as AVX2, or AVX512 with bfloat16 where the processor has products of it."""
    flags = _first_core().get("flags", "").split()
    bfloat16 = " with bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags) else ""
    return torch.backends.cpu.get_cpu_capability() + bfloat16


def _processor() -> str:
    return _first_core().get("model name") or platform.processor() or platform.machine()


@functools.cache  # with many cores Linux takes its time, and every checkpoint asks
def _first_core() -> dict[str, str]:
    """What Linux says of the first core in /proc/cpuinfo; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    fields = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in fields}


# --- Command and commit ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """What to do to get the same again."""

    command: str  # its launcher's options included, quoted for a shell
    commit: str | None  # of the code that runs


def launch(script_argv: list[str]) -> Launch:
    """How this process was started; to be asked at its start, before anybody edits the code."""
    return Launch(launch_command(script_argv), code_commit())


def launch_command(script_argv: list[str]) -> str:
    """How this process was started, its launcher's options included, quoted for a shell.

    A launcher is the parent of what it starts. Without one, or when it is gone, this is
    `python train_accelerate.py` and `script_argv`.
    """
    try:
        launcher = _launcher(psutil.Process(os.getppid()).cmdline())
    except (psutil.Error, OSError):
        launcher = []
    return shlex.join(launcher or ["python", "train_accelerate.py", *script_argv])


def _launcher(words: list[str]) -> list[str]:
    """The command line of a launcher as one types it; empty if `words` are another program's."""
    for place, word in enumerate(words):
        program, rest = Path(word).name, words[place + 1 :]
        if program in ("torchrun", "accelerate-launch"):
            return [program, *rest]
        if program == "accelerate" and rest[:1] == ["launch"]:
            return [program, *rest]
        if word == "-m" and rest[:1] in (["accelerate.commands.launch"], ["torch.distributed.run"]):
            return ["python", "-m", *rest]
    return []


def code_commit() -> str | None:
    """The commit of the checkout that this package lies in, `-dirty` if tracked files differ.

    None where there is no git or no checkout, or where that does not track the package.
    """
    try:
        _git("ls-files", "--error-unmatch", "gpt2repro/__init__.py")
        return _git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    """What git says in the directory that holds this package; an error unless its status is 0."""
    place = Path(__file__).parent.parent.parent
    # It takes no lock: what the user's own git does at this moment shall not fail.
    # A checkout may be another user's, as root's in a container over it; its code runs already.
    command = ["git", "--no-optional-locks", "-c", "safe.directory=*", "-C", str(place), *words]
    found = subprocess.run(
        command,
        env=processes.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS_FOR_GIT,
        check=True,
    )
    return found.stdout.strip()
