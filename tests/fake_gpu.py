"""A CUDA device without CUDA: what a run does on GPUs, where none is.

    python tests/fake_gpu.py train_accelerate.py --recipe ...
    python tests/fake_gpu.py -m pytest -m gpu tests/training

run what stands there, whose `cuda` is the host's memory and whose kernels are the CPU's
(fake_gpu.cpp). As on a real one

- a tensor of the CPU among the GPU's is refused, and so is one too many for the memory;
- memory that nobody has written holds NaN, and random numbers come from a generator of its own;
- what is copied to pinned memory is there after a wait, and not before; what is copied from it must
  not change before that;
- `torch.cuda.set_sync_debug_mode("error")` makes every wait for the device one;
- processes talk to each other as over NCCL (gloo does the work).

What it does not show: kernels, their speed and precision, more than one stream, and compilation for
a GPU: `torch.compile` traces, and runs what it traced. It wants torch's CPU build and g++.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "fake_gpu.cpp"
NAME = "NVIDIA H100 80GB HBM3"  # any that has bfloat16


def missing() -> str | None:
    """Why there can be none here."""
    if shutil.which("g++") is None:
        return "needs g++"
    if not importlib.metadata.version("torch").startswith("2.13."):
        return "is written for torch 2.13"
    if any(torch_directory().glob("lib/libtorch_cuda*")):
        return "needs torch's CPU build"
    return None


def torch_directory() -> Path:
    """Where it is installed; found without importing it."""
    return Path(importlib.util.find_spec("torch").origin).parent


def library() -> Path:
    """Compiled, half a minute, unless it is there for this source and torch."""
    torch_at = torch_directory()
    key = SOURCE.read_bytes() + importlib.metadata.version("torch").encode()
    path = HERE / "__pycache__" / f"fake_gpu-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        includes = [f"-I{torch_at}/include{more}" for more in ("", "/torch/csrc/api/include")]
        libraries = [f"-L{torch_at}/lib", "-ltorch_cpu", "-lc10"]
        command = ["g++", "-std=c++20", "-fPIC", "-shared", *includes, str(SOURCE)]
        subprocess.run([*command, "-o", str(scratch), *libraries], check=True)
        scratch.rename(path)
    return path


def install() -> None:
    """Give this process the device. torch looks for one when it is imported, and not again."""
    assert "torch" not in sys.modules
    torchs = [torch_directory() / "lib" / name for name in ("libc10.so", "libtorch_cpu.so")]
    for each in (*torchs, library()):
        ctypes.CDLL(str(each), mode=ctypes.RTLD_GLOBAL)
    import torch
    import torch._dynamo.device_interface  # before torch seems to have been built with CUDA

    gpu = torch.ops.fake_gpu
    _pretend(torch, gpu)
    _talk_by_gloo(torch)

    def sdpa(*tensors: Any, **how: Any) -> Any:
        return torch.ops.aten._scaled_dot_product_attention_math(*tensors, **how)[0]

    torch.nn.functional.scaled_dot_product_attention = sdpa
    resize, compile_ = torch.UntypedStorage.resize_, torch.compile

    def resize_(storage: Any, size: int) -> Any:
        if storage.device.type != "cuda":
            return resize(storage, size)
        gpu.resize_storage(torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage), size)
        return storage

    torch.UntypedStorage.resize_ = resize_

    def traced(model: Any = None, **kwargs: Any) -> Any:
        return compile_(model, **kwargs | {"backend": "aot_eager", "mode": None, "options": None})

    torch.compile = traced


def _pretend(torch: Any, gpu: Any) -> None:
    """torch.cuda's own functions, for this device."""

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.record()

        def record(self, *_: Any) -> None:
            self.at = gpu.launched()

        def synchronize(self) -> None:
            gpu.wait_until(self.at)

        def wait(self, *_: Any) -> None: ...

    class Stream:
        device = torch.device("cuda", 0)

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: Any) -> None: ...
        def wait_stream(self, *_: Any) -> None: ...
        def wait_event(self, *_: Any) -> None: ...

        def record_event(self, *_: Any) -> Event:
            return Event()

        def synchronize(self) -> None:
            gpu.wait_until(gpu.launched())

    def always(value: Any) -> Any:
        return lambda *_, **__: value

    total = int(os.environ.get("FAKE_GPU_BYTES", 2**28))
    gpu.limit(total)
    properties = SimpleNamespace(
        name=NAME,
        major=9,
        minor=0,
        total_memory=total,
        multi_processor_count=132,
        gcnArchName="",
        uuid="0",
    )
    functions = {
        "is_available": always(True),
        "is_initialized": always(True),
        "_is_compiled": always(True),
        "_lazy_init": always(None),
        "init": always(None),
        "device_count": always(1),
        "current_device": always(0),
        "set_device": always(None),
        "get_device_name": always(NAME),
        "get_device_capability": always((9, 0)),
        "get_device_properties": always(properties),
        "is_bf16_supported": always(True),
        "is_current_stream_capturing": always(False),
        "empty_cache": always(None),
        "set_sync_debug_mode": lambda mode: gpu.may_wait(mode in (0, "default")),
        "memory_allocated": lambda *_: gpu.allocated(),
        "memory_reserved": lambda *_: gpu.allocated(),
        "max_memory_allocated": lambda *_: gpu.peak(),
        "reset_peak_memory_stats": lambda *_: gpu.reset_peak(),
        "mem_get_info": lambda *_: (total - gpu.allocated(), total),
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "stream": lambda stream: stream,
        "synchronize": lambda *_: Stream().synchronize(),
        "get_rng_state": lambda *_: gpu.get_state(),
        "set_rng_state": lambda state, *_: gpu.set_state(state),
        "manual_seed": lambda seed: gpu.seed(seed),
        "manual_seed_all": lambda seed: gpu.seed(seed),
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
        if hasattr(torch.cuda.random, name):
            setattr(torch.cuda.random, name, function)
    torch._C._cuda_init = always(None)
    torch.accelerator.empty_host_cache = always(None)


def _talk_by_gloo(torch: Any) -> None:
    """NCCL's groups."""
    import torch.distributed.distributed_c10d as c10d

    def group(make: Any) -> Any:
        def make_with_gloo(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
            kwargs.pop("device_id", None)
            both = backend if backend == "gloo" else "cpu:gloo,cuda:gloo"
            return make(*args, backend=both, **kwargs)

        return make_with_gloo

    for name in ("init_process_group", "new_group"):
        made = group(getattr(c10d, name))
        for module in (c10d, torch.distributed):
            setattr(module, name, made)
    for module in (c10d, torch.distributed):
        module.is_nccl_available = lambda: True


if __name__ == "__main__":
    install()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[0] = ""
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
