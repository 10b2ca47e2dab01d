"""Which optimizer a recipe's `optimizer` is: one line each."""

from collections.abc import Callable

from torch import nn
from torch.optim.optimizer import Optimizer

from gpt2repro.recipe_fields import Recipe
from gpt2repro.training.optim import adamw, muon
from gpt2repro.training.optim.averaging import keep_average

OPTIMIZERS: dict[str, Callable[[nn.Module, Recipe], Optimizer]] = {
    "adamw": adamw.build,
    "muon": muon.build,
}


def build_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer, whose groups cover every trainable parameter exactly once."""
    optimizer = OPTIMIZERS[recipe.optimizer](model, recipe)
    if recipe.ema_decay:
        keep_average(optimizer, recipe.ema_decay)
    return optimizer
