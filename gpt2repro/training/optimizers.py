"""Parameter groups, AdamW and Muon, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer


def lr_at(step: int, *, max_lr: float, min_lr: float, warmup_steps: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then half a cosine.

    The first step trains at `max_lr / warmup_steps` and the last at just above `min_lr`, as in
    GPT-3 (Brown et al. 2020, appendix B) and build-nanogpt.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every group `lr` times its own `lr_scale` (1 except for Muon's matrices)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    max_lr: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    muon_lr: float,
    muon_momentum: float,
    muon_weight_decay: float,
) -> Optimizer:
    """AdamW over all parameters (`name="adamw"`), or Muon on the hidden matrices (`name="muon"`).

    Matrices and embeddings are decayed; biases and layer norms are not. The groups cover every
    trainable parameter exactly once.
    """
    settings = [
        {
            "params": parameters,
            "name": kind,
            "weight_decay": 0.0 if kind == "vectors" else weight_decay,
            "lr_scale": 1.0,
        }
        for kind, parameters in parameter_groups(model).items()
        if parameters
    ]
    if name == "adamw":
        fused = {p.device.type for p in model.parameters()} <= {"cpu", "cuda"}
        return torch.optim.AdamW(settings, lr=max_lr, betas=betas, eps=epsilon, fused=fused)
    assert name == "muon", name
    for group in settings:
        if group["name"] in MuonAdamW.MATRICES:
            group |= {"lr_scale": muon_lr / max_lr, "weight_decay": muon_weight_decay}
    optimizer = MuonAdamW(settings, lr=max_lr, betas=betas, eps=epsilon, momentum=muon_momentum)
    set_lr(optimizer, max_lr)
    return optimizer


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by kind: `qkv`, `matrices`, `embeddings`, `vectors`.

    `qkv` are the fused query, key and value projections, `matrices` the other weights of the
    blocks, `vectors` the biases and layer norms. A tied output head is the token embedding and
    appears once; an untied one counts as an embedding.
    """
    embedded = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    groups: dict[str, list[nn.Parameter]] = {
        "qkv": [],
        "matrices": [],
        "embeddings": [],
        "vectors": [],
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            kind = "vectors"
        elif id(parameter) in embedded or name.endswith("lm_head.weight"):
            kind = "embeddings"
        else:
            kind = "qkv" if name.endswith("attn.c_attn.weight") else "matrices"
        groups[kind].append(parameter)
    return groups


class MuonAdamW(Optimizer):
    """Muon on the groups `qkv` and `matrices`, AdamW on the others, as one optimizer.

    One optimizer rather than two keeps clipping, checkpoints, FSDP and the learning rate free of
    special cases. The updates are those of `torch.optim.Muon` and `torch.optim.AdamW`; of the first
    this has a form of its own, because torch's multiplies in bfloat16 everywhere, which most CPUs
    emulate: an update of a model of 4 x 256 took 10 seconds on one.

    GPT-2 stores a projection as (in, out), and the query, key and value projections side by side in
    one (n_embd, 3 n_embd) matrix. Muon orthogonalizes a map, so it is handed each of the three maps
    on its own, transposed to (out, in), the layout its step size is defined for.

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
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "weight_decay": 0.0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            (self.muon_step if group["name"] in self.MATRICES else self.adamw_step)(group)

    def muon_step(self, group: dict) -> None:
        """One update; all layers' maps of one shape are orthogonalized at once."""
        maps = 3 if group["name"] == "qkv" else 1
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for parameters in by_shape.values():
            ahead = [self.look_ahead(p, group["momentum"]) for p in parameters]
            updates = orthogonalize(torch.cat([a.T.unflatten(0, (maps, -1)) for a in ahead]))
            # A tall map has more outputs than directions to fill them from: keep their size.
            rows_per_column = max(1.0, updates.shape[1] / updates.shape[2])
            for parameter, update in zip(parameters, updates.split(maps), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update.flatten(0, 1).T, alpha=group["lr"] * rows_per_column**0.5)

    def look_ahead(self, parameter: Tensor, momentum: float) -> Tensor:
        """The mean of past gradients, a step further along the present one, as Nesterov does."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)

    def adamw_step(self, group: dict) -> None:
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
