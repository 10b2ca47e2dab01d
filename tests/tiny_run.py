"""A run small enough to train many times in a test: its corpus, tokenizer and recipe on disk."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
import yaml
from accelerate.state import AcceleratorState, GradientState
from tiny_corpus import documents, parquet_bytes

import train_accelerate
from gpt2repro.data.tokens.bpe import train_bpe
from gpt2repro.records.metrics import TIMINGS
from gpt2repro.system.signals import SIGNALS


@contextmanager
def without_a_compiler() -> Iterator[None]:
    """torch.compile on a machine that lacks the compiler it calls."""
    config = torch._inductor.config
    torch._dynamo.reset()
    with config.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}):
        yield
    torch._dynamo.reset()


def write_inputs(directory: Path) -> Path:
    """Write a corpus of 8 units, a tokenizer and a recipe below `directory`; return the recipe."""
    texts = documents(240, max_words=40)
    (directory / "corpus").mkdir()
    (directory / "corpus" / "0.parquet").write_bytes(parquet_bytes(texts, 30))
    train_bpe(texts, 300).save_pretrained(directory / "tokenizer")
    recipe = {
        "exp_name": "tiny",
        "dataset_name": str(directory / "corpus"),
        "dataset_config": None,
        "tokenizer_name": str(directory / "tokenizer"),
        "num_lanes": 4,
        "num_validation_units": 1,
        "validation_tokens": 512,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "sequence_length": 32,
        "batch_tokens": 256,
        "micro_batch_size": 2,
        "num_steps": 12,
        "warmup_steps": 2,
        "max_lr": 1e-2,
        "min_lr": 1e-3,
        "mixed_precision": "no",
        "compile": False,
        "eval_every": 5,
        "sample_every": 0,
        "save_every": 4,
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(recipe: Path, output_dir: Path, *options: str) -> int:
    """Run the training script in this process and return its exit status."""
    with as_if_in_its_own_process():
        arguments = ["--recipe", str(recipe), "--output_dir", str(output_dir), *options]
        return train_accelerate.main(arguments)


@contextmanager
def as_if_in_its_own_process() -> Iterator[None]:
    """Put back what a run changes in the process it runs in."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        reset_accelerate()


@contextmanager
def without_export() -> Iterator[None]:
    """Runs end with their last step: the export takes seconds, and has tests of its own."""
    from gpt2repro.training import finish

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "finish", lambda run: 0)
        yield


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal while the run is reporting `step`."""
    from gpt2repro.training.monitor import Monitor

    report = Monitor.report

    def report_and_stop(self: Monitor, at: int, *rest: Any) -> None:
        report(self, at, *rest)
        if at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Monitor, "report", report_and_stop)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def reset_accelerate() -> None:
    """Let the next run in this process set up its own engine."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The run's metrics without timings."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def losses(output_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(output_dir) if "loss" in line]


def digests(output_dir: Path) -> dict[int, str]:
    return {m["step"]: m["rows_digest"] for m in metrics(output_dir) if "rows_digest" in m}


def tensors(output_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    from safetensors.torch import load_file

    checkpoint = output_dir / "checkpoints" / f"step_{step:08d}"
    return load_file(checkpoint / "model.safetensors") | {
        f"optimizer {name}": tensor
        for name, tensor in load_file(checkpoint / "optimizer.safetensors").items()
    }


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
