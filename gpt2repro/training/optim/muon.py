"""Muon (Jordan et al. 2024) on the hidden matrices, AdamW on the rest."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from gpt2repro.recipe_fields import Recipe
from gpt2repro.speed.low_precision import has_bf16
from gpt2repro.system import ranks
from gpt2repro.training.optim.adamw import AdamW, like, settings
from gpt2repro.training.optim.groups import MATRICES, parameter_groups


def build(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Matrices have a learning rate and a decay of their own."""
    config: Any = model.config
    groups = parameter_groups(model, recipe)
    for group in groups:
        group["maps"] = 1
        if group["name"] == "qkv":
            group["maps"] = 3 * (config.n_head if recipe.muon_heads else 1)
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    return MuonAdamW(
        groups,
        compiled=recipe.compile and on_gpu,
        dtype=torch.bfloat16 if on_gpu and has_bf16(device) else torch.float32,
        momentum=recipe.muon_momentum,
        normalized=recipe.muon_normalize,
        **settings(recipe),
    )


class MuonAdamW(AdamW):
    """Muon on the groups `qkv` and `matrices`, AdamW on the others, as one optimizer.

    One optimizer rather than two keeps clipping, checkpoints, FSDP and the learning rate free of
    special cases. The updates are those of `torch.optim.Muon` and `torch.optim.AdamW`; of the first
    this has a form of its own, because torch's multiplies in bfloat16 everywhere, which most CPUs
    emulate: an update of a model of 4 x 256 took 10 seconds on one.

    With g the gradient of a map w of (out, in) and k its momentum:

        m <- k m + (1 - k) g          o = orthogonalize(k m + (1 - k) g)
        w <- w - lr (sqrt(max(1, out / in)) o + decay w)

    GPT-2 stores a projection as (in, out), and the query, key and value projections side by side in
    one (n_embd, 3 n_embd) matrix. Muon orthogonalizes a map, so it is handed each of the three maps
    on its own, or with `maps` of 3 n_head each head's, transposed to (out, in), the layout its step
    size is defined for.

    `normalized` is NorMuon (Li et al. 2025): each output's row of o is divided by the root of a
    running mean of its squares. Where the paper then fixes the update's size at 0.2 sqrt(out in),
    this gives it back the size it had, so that rates mean the same with and without:

        v <- b2 v + (1 - b2) mean of o^2 over a row
        n  = o / (sqrt(v) + eps)      o <- n |o| / |n|

    Orthogonalizing is most of the work. Ranks share it: each takes its part of the maps and sends
    the result to all, so that all make the same update, bit for bit.

    Sources: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Li et al. 2025,
    "NorMuon", arXiv 2510.05491.
    """

    def __init__(
        self,
        params: Iterable,
        *,
        compiled: bool = False,
        dtype: torch.dtype = torch.float32,
        **defaults: Any,
    ) -> None:
        """`dtype`: what maps are orthogonalized in."""
        # One compiled form for each shape: there are four.
        function = torch.compile(orthogonalize, dynamic=False) if compiled else orthogonalize
        self._orthogonalize = partial(function, dtype=dtype)
        super().__init__(params, **defaults)

    def _step_of(self, group: dict) -> None:
        (self._muon_step if group["name"] in MATRICES else super()._step_of)(group)

    def _muon_step(self, group: dict) -> None:
        """One update; all layers' maps of one shape are orthogonalized at once."""
        maps = group["maps"]
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for parameters in by_shape.values():
            ahead = [ranks.whole(self._look_ahead(p, group)) for p in parameters]
            stacked = torch.cat([a.T.unflatten(0, (maps, -1)) for a in ahead])
            updates = ranks.share(self._orthogonalize, stacked).to(stacked.dtype)
            updates = self._unless_skipped(updates, torch.zeros_like(updates))
            # A tall map has more outputs than directions to fill them from: keep their size.
            rows_per_column = max(1.0, updates.shape[1] / updates.shape[2])
            for parameter, update in zip(parameters, updates.split(maps), strict=True):
                if group["normalized"]:
                    update = self._normalize(update, parameter, group)
                own = like(parameter, update.flatten(0, 1).T)
                self._decay(parameter, own, group)
                parameter.sub_(own, alpha=group["lr"] * rows_per_column**0.5)

    def _look_ahead(self, parameter: Tensor, group: dict) -> Tensor:
        """The mean of past gradients, a step further along the present one, as Nesterov does."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean, momentum = state["momentum_buffer"], group["momentum"]
        gradient = self._unless_skipped(gradient, mean)  # then the mean stays what it is
        mean.lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)

    def _normalize(self, update: Tensor, parameter: Tensor, group: dict) -> Tensor:
        """`update`, (maps, out, in), with rows of one size as far as past steps tell it."""
        squares = update.square().mean(2).view(1, -1)
        moment = self._mean("row_sq", parameter, squares, group["betas"][1])
        rows = update / (moment.view(len(update), -1, 1).sqrt() + group["eps"])
        sizes = [each.norm(dim=(1, 2), keepdim=True) for each in (update, rows)]
        return rows * (sizes[0] / sizes[1].clamp(min=1e-30))  # of a skipped update it is 0


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steepest at 0, to need 5 steps only


def orthogonalize(maps: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U Vᵀ, nearly, for each matrix U S Vᵀ in `maps` (N, out, in), by Newton-Schulz.

    X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X leaves U and V alone and sends every singular value s in
    (0, 1] to a s + b s³ + c s⁵. Five times, and all but the smallest lie between 0.7 and 1.2, which
    serves as well as exactly 1. GPUs multiply in bfloat16 where they have it, whose rounding is
    smaller than that, and the result stays of this `dtype`: ranks have less to send.
    """
    a, b, c = NEWTON_SCHULZ
    tall = maps.shape[1] > maps.shape[2]
    wide = maps.mT if tall else maps  # has the smaller Gram matrix
    x = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
