"""AdamW (Loshchilov & Hutter 2019) over all parameters, as GPT-3 was trained."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from gpt2repro.recipe_fields import Recipe
from gpt2repro.system import ranks
from gpt2repro.training.optim.groups import parameter_groups


def build(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Matrices and embeddings are decayed; biases and layer norms are not."""
    return AdamW(parameter_groups(model, recipe), **settings(recipe))


def settings(recipe: Recipe) -> dict[str, Any]:
    """What all groups have in common."""
    return {
        "betas": (recipe.adam_beta1, recipe.adam_beta2),
        "eps": recipe.adam_epsilon,
        "cautious": recipe.cautious_weight_decay,
    }


class AdamW(Optimizer):
    """AdamW with torch's fused kernel, and two choices that it lacks.

    With g the gradient of w, t the step from 1:

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        u  = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
        w <- w - lr (u + decay w)

    A group's `second_moment` is what v is: "element" as above; "row", where g^2 is replaced by its
    mean over a row, which for an embedding is a token's; "factored" (Adafactor, Shazeer & Stern
    2018): means over rows r and over columns c, of which v = r c / mean(r).

    `cautious` decays only where the update does not work against it (Chen et al. 2025, Cautious
    Weight Decay): decay w 1[u w >= 0].

    With `found_inf`, 0.0 or 1.0 on the device, torch's optimizers skip an update; so does this.
    State has the parameter's shape and is sharded like it; what is a mean has size 1 where it was
    taken, and is whole on every rank.
    """

    def __init__(self, params: Iterable, **defaults: Any) -> None:
        self.found_inf: Tensor | None = None
        self._is_finite: Tensor | None = None  # on the device: whether this step counts
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None, "closures are not supported"
        self._is_finite = None if self.found_inf is None else self.found_inf == 0
        skips = self.found_inf
        if skips is not None and skips.device.type == "mps" and skips:  # its kernel ignores it
            return
        for group in self.param_groups:
            self._step_of(group)

    def _step_of(self, group: dict) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
            if group["cautious"] and group["weight_decay"]:
                mean = state["exp_avg"].lerp(parameter.grad, 1 - group["betas"][0])
                self._decay(parameter, mean, group)
        if group["second_moment"] != "element":
            for parameter in parameters:
                self._update_by_means(parameter, group)
            return
        states = [self.state[p] for p in parameters]
        for parameter in parameters:
            if "exp_avg_sq" not in self.state[parameter]:
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
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
            weight_decay=0.0 if group["cautious"] else group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            found_inf=self.found_inf,
        )

    def _update_by_means(self, parameter: Tensor, group: dict) -> None:
        """The update of a matrix whose second moment is kept as means over rows and columns."""
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        assert parameter.grad is not None
        if not group["cautious"]:
            self._decay(parameter, parameter, group)
        gradient = self._unless_skipped(parameter.grad, state["exp_avg"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        squares = parameter.grad.square()
        moment = self._mean("row_sq", parameter, ranks.whole(squares.mean(1, True)), beta2)
        if group["second_moment"] == "factored":
            columns = self._mean("column_sq", parameter, ranks.whole(squares.mean(0, True)), beta2)
            moment = moment * columns / moment.mean().clamp(min=1e-30)
        state["step"] += 1.0 if self.found_inf is None else 1 - self.found_inf
        root = (moment / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
        scale = 1 / root / (1 - beta1 ** state["step"])
        scale = self._unless_skipped(scale, torch.zeros_like(scale))
        parameter.sub_(state["exp_avg"] * like(parameter, scale), alpha=group["lr"])

    def _mean(self, key: str, parameter: Tensor, new: Tensor, beta: float) -> Tensor:
        """The running mean `key` of a parameter's state, a step further along `new`."""
        state = self.state[parameter]
        if key not in state:
            state[key] = torch.zeros_like(new)
        return state[key].lerp_(self._unless_skipped(new, state[key]), 1 - beta)

    def _decay(self, parameter: Tensor, update: Tensor, group: dict) -> None:
        """Shrink `parameter`; of a cautious group where `update`, to be subtracted, does so too."""
        rate = group["lr"] * group["weight_decay"]
        if not rate:
            return
        keep: Any = 1 - rate
        if group["cautious"]:  # by signs: a product of values may be lost to underflow
            keep = 1 - rate * (update.sign() * parameter >= 0)
        if self._is_finite is not None:
            keep = torch.where(self._is_finite, keep, 1.0)
        parameter.mul_(keep)

    def _unless_skipped(self, new: Tensor, old: Tensor) -> Tensor:
        return new if self._is_finite is None else new.where(self._is_finite, old)


def like(parameter: Tensor, update: Tensor) -> Tensor:
    """The part of `update`, which every rank has, that belongs to a sharded `parameter`."""
    if not isinstance(parameter, DTensor):
        return update
    place = parameter.device_mesh, parameter.placements
    return distribute_tensor(update.contiguous(), *place, src_data_rank=None)
