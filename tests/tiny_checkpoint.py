"""A training checkpoint of the smallest GPT-2, after one update."""

from pathlib import Path
from typing import Any

import torch

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.records import checkpoints
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
    return checkpoints.save(
        directory, step=step, model=model, optimizer=optimizer, state=state, keep_last=9
    )
