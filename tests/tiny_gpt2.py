"""A random GPT-2 of 0.1 M parameters with its own byte-level BPE, and the Hub's spelling of it."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.data.tokens.bpe import train_bpe
from modeling_gpt2repro import GPT2ReproForCausalLM

TEXTS = ["This function returns the first of its arguments. It's true 100%.\n\n    and more " * 20]


@cache
def tiny_tokenizer():
    return train_bpe(TEXTS, 300)


def tiny_model(**overrides) -> GPT2ReproForCausalLM:
    """Random weights with a spread at which logits differ and activations are far from linear."""
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = {"vocab_size": len(tokenizer), "initializer_range": 0.2}
    return GPT2ReproForCausalLM(GPT2ReproConfig(**shape | ids | config | overrides)).eval()


def save_official(model: GPT2ReproForCausalLM, directory: Path) -> Path:
    """`model` as `openai-community/gpt2` is stored: no prefix, a causal mask in every layer."""
    directory.mkdir()
    tensors = {
        name.removeprefix("transformer."): parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
    }
    n = model.config.n_positions
    for layer in range(model.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(n, n).tril()[None, None]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_ctx": n,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
    }
    kept = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon")
    config |= {key: getattr(model.config, key) for key in kept}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
