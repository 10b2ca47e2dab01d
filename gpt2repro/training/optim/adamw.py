"""AdamW (Loshchilov & Hutter 2019) over all parameters, as GPT-3 was trained."""

import torch
from torch import nn

from gpt2repro.recipe import Recipe
from gpt2repro.training.optim.groups import parameter_groups


def build(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Matrices and embeddings are decayed; biases and layer norms are not."""
    return torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay),
        lr=recipe.max_lr,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True,  # skips an update by `found_inf`, on the device
    )
