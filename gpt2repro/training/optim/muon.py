"""Muon (Jordan et al. 2024) on the hidden matrices, AdamW on the rest."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from gpt2repro.recipe import Recipe
from gpt2repro.system import ranks
from gpt2repro.training.optim.groups import parameter_groups
from gpt2repro.training.schedule import set_lr


def build(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Matrices have a learning rate and a decay of their own."""
    groups = parameter_groups(model, recipe.weight_decay)
    for group in groups:
        if group["name"] in MuonAdamW.MATRICES:
            group["lr_scale"] = recipe.muon_lr / recipe.max_lr
            group["weight_decay"] = recipe.muon_weight_decay
    optimizer = MuonAdamW(
        groups,
        lr=recipe.max_lr,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        momentum=recipe.muon_momentum,
        compiled=recipe.compile and next(model.parameters()).is_cuda,
    )
    set_lr(optimizer, recipe.max_lr)
    return optimizer


class MuonAdamW(Optimizer):
    """Muon on the groups `qkv` and `matrices`, AdamW on the others, as one optimizer.

    One optimizer rather than two keeps clipping, checkpoints, FSDP and the learning rate free of
    special cases. The updates are those of `torch.optim.Muon` and `torch.optim.AdamW`; of the first
    this has a form of its own, because torch's multiplies in bfloat16 everywhere, which most CPUs
    emulate: an update of a model of 4 x 256 took 10 seconds on one.

    GPT-2 stores a projection as (in, out), and the query, key and value projections side by side in
    one (n_embd, 3 n_embd) matrix. Muon orthogonalizes a map, so it is handed each of the three maps
    on its own, transposed to (out, in), the layout its step size is defined for.

    Orthogonalizing is most of the work. Ranks share it: each takes its part of the maps and sends
    the result to all, so that all make the same update, bit for bit.

    With `found_inf`, 0.0 or 1.0 on the device, torch's optimizers skip an update; so does this.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """

    MATRICES = ("qkv", "matrices")

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        compiled: bool = False,
    ) -> None:
        self.found_inf: Tensor | None = None
        # One compiled form for each shape: there are four.
        self._orthogonalize = (
            torch.compile(orthogonalize, dynamic=False) if compiled else orthogonalize
        )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "weight_decay": 0.0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            (self._muon_step if group["name"] in self.MATRICES else self._adamw_step)(group)

    def _muon_step(self, group: dict) -> None:
        """One update; all layers' maps of one shape are orthogonalized at once."""
        maps = 3 if group["name"] == "qkv" else 1
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for parameters in by_shape.values():
            ahead = [ranks.whole(self._look_ahead(p, group)) for p in parameters]
            stacked = torch.cat([a.T.unflatten(0, (maps, -1)) for a in ahead])
            updates = ranks.share(self._orthogonalize, stacked)
            # A tall map has more outputs than directions to fill them from: keep their size.
            rows_per_column = max(1.0, updates.shape[1] / updates.shape[2])
            decay = updates.new_full((), 1 - group["lr"] * group["weight_decay"])
            if self.found_inf is not None:
                updates = updates * (1 - self.found_inf)
                decay = decay.where(self.found_inf == 0, 1.0)
            for parameter, update in zip(parameters, updates.split(maps), strict=True):
                parameter.mul_(decay)
                own = like(parameter, update.flatten(0, 1).T)
                parameter.sub_(own, alpha=group["lr"] * rows_per_column**0.5)

    def _look_ahead(self, parameter: Tensor, group: dict) -> Tensor:
        """The mean of past gradients, a step further along the present one, as Nesterov does."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean, momentum = state["momentum_buffer"], group["momentum"]
        if self.found_inf is not None:  # then the mean stays what it is
            gradient = gradient.where(self.found_inf == 0, mean)
        mean.lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)

    def _adamw_step(self, group: dict) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[p] for p in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            found_inf=self.found_inf,
        )


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steepest at 0, to need 5 steps only


def orthogonalize(maps: Tensor) -> Tensor:
    """U Vᵀ, nearly, for each matrix U S Vᵀ in `maps` (N, out, in), by Newton-Schulz.

    X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X leaves U and V alone and sends every singular value s in
    (0, 1] to a s + b s³ + c s⁵. Five times, and all but the smallest lie between 0.7 and 1.2, which
    serves as well as exactly 1. GPUs multiply in bfloat16, whose rounding is smaller than that.
    """
    a, b, c = NEWTON_SCHULZ
    tall = maps.shape[1] > maps.shape[2]
    wide = maps.mT if tall else maps  # has the smaller Gram matrix
    dtype = torch.bfloat16 if maps.is_cuda else torch.float32
    x = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(maps.dtype)


def like(parameter: Tensor, update: Tensor) -> Tensor:
    """The part of `update`, which every rank has, that belongs to a sharded `parameter`."""
    if not isinstance(parameter, DTensor):
        return update
    place = parameter.device_mesh, parameter.placements
    return distribute_tensor(update.contiguous(), *place, src_data_rank=None)
