"""A sampled continuation during training, on any engine, that leaves no trace in the run."""

from typing import Any

import torch
from torch import nn

from gpt2repro.records.checkpoints import innermost


def sample_text(model: nn.Module, tokenizer, prompt: str, *, num_tokens: int, seed: int) -> str:
    """Continue `prompt` by `num_tokens` sampled tokens and return both as text.

    Every rank must call: a sharded model gathers its parameters from all of them. The length is
    fixed so that all ranks run the same number of forward passes. The compiled code is left alone
    (lengths vary), and so is the state of the random number generators.
    """
    inner: Any = innermost(model)
    device = next(inner.parameters()).device
    prompt_ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    room = inner.config.n_positions - prompt_ids.shape[1]
    num_tokens = min(num_tokens, room)
    if num_tokens < 1:
        return prompt
    was_training = inner.training
    inner.eval()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(seed)
        ids = inner.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            do_sample=True,
            top_k=50,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=tokenizer.eos_token_id,
        )
    inner.train(was_training)
    return tokenizer.decode(ids[0])
