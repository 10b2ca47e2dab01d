"""A tiny random GPT-2 twice: as this repository writes it and as transformers does."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from configuration_gpt2repro import GPT2ReproConfig
from modeling_gpt2repro import GPT2ReproForCausalLM

SHAPE = {
    "vocab_size": 99,
    "n_positions": 48,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 98,
    "eos_token_id": 98,
    # One kernel on both sides. `gelu_new` is seven in transformers, with a rounding after each.
    "activation_function": "gelu_pytorch_tanh",
    # At 0.02 a tiny model's logits are all but equal; at 0.2 a wrong weight shows.
    "initializer_range": 0.2,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def ours_and_theirs(**overrides) -> tuple[GPT2ReproForCausalLM, GPT2LMHeadModel]:
    """The same weights in both, in evaluation mode."""
    torch.manual_seed(0)
    ours = GPT2ReproForCausalLM(GPT2ReproConfig(**{**SHAPE, **overrides})).eval()
    theirs = GPT2LMHeadModel(GPT2Config(**{**SHAPE, **NO_DROPOUT, **overrides})).eval()
    for parameter in ours.parameters():  # biases and LayerNorms too, which start at 0 and 1
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def random_ids(rows: int, length: int, seed: int = 1) -> torch.LongTensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SHAPE["vocab_size"] - 1, (rows, length), generator=generator)
