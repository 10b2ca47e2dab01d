"""The learning rate as a pure function of the step."""

import math

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
