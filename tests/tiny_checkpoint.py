"""A training checkpoint of the smallest GPT-2, after one update."""

from pathlib import Path
from typing import Any

import torch

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.records import checkpoints
from gpt2repro.system import ranks
from modeling_gpt2repro import GPT2ReproForCausalLM


def save_checkpoint(directory: Path, step: int, **state: Any) -> Path:
    """Below `directory`, beside those that are there; no two steps have the same weights."""
    torch.manual_seed(step)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 4, "vocab_size": 5, "n_positions": 3}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return save_now(directory, step, model, optimizer, keep_last=9, **state)


def save_now(
    directory: Path, step: int, model: Any, optimizer: Any, keep_last: int = 1, **state: Any
) -> Path:
    """The checkpoint of any model, written at once; every rank calls."""
    snapshot = checkpoints.take_snapshot(step=step, model=model, optimizer=optimizer, state=state)
    return ranks.on_rank_0(lambda: checkpoints.write(directory, snapshot, keep_last=keep_last))
