"""Learning rates, and what goes with them, as pure functions of the step."""

import math

from torch.optim.optimizer import Optimizer

from gpt2repro.recipe_fields import Recipe
from gpt2repro.training.optim.groups import MATRICES, matrix_scale

POWER = 1.2  # of the cooldown: modded-nanogpt, track 3, "PowerCool"
FIRST_MOMENTUM = 0.85  # Jordan et al. 2024
COOLING = ("wsd", "power")  # the schedules that end with a cooldown
OF_A_SCHEDULE = ("schedule", "num_steps", "cooldown_fraction", "matrix_cooldown_fraction")
FAR = 0.75  # of max_lr, for a warm-up that meets its cooldown
JUMP = 1.1  # by how much a rate rises from one step to the next, for it to be worth a line


def due(every: int, step: int) -> bool:
    """Whether `step` has what comes every so many steps; 0 is never."""
    return every > 0 and step % every == 0


def lr_at(
    step: int,
    *,
    max_lr: float,
    min_lr: float,
    warmup_steps: int,
    num_steps: int,
    schedule: str = "cosine",
    cooldown_fraction: float = 0.0,
) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then `schedule`.

    With s the step, W `warmup_steps`, N `num_steps`, C = `cooldown_fraction` N in whole steps,
    p = (s - W) / (N - W) and q = min(1, (N - s) / C):

        warm-up  max_lr (s + 1) / W, while s < W
        cosine   min_lr + (max_lr - min_lr) (1 + cos pi p) / 2
        linear   min_lr + (max_lr - min_lr) (1 - p)
        wsd      min_lr + (max_lr - min_lr) q
        power    min_lr + (max_lr - min_lr) q^1.2

    The first step trains at `max_lr / warmup_steps` and the last at just above `min_lr`. Where
    warm-up and cooldown overlap the lower one holds. Sources: cosine as in GPT-3 (Brown et al.
    2020, appendix B) and build-nanogpt; wsd (warm-up, stable, decay) Hu et al. 2024, MiniCPM; power
    from modded-nanogpt, track 3 (whose pull request 292 gives matrices a cooldown of their own).
    """
    if schedule in COOLING:
        cooldown = cooldown_steps(num_steps, cooldown_fraction)
        left = min(1.0, (num_steps - step) / cooldown) if cooldown else 1.0
        share = left**POWER if schedule == "power" else left
    else:
        progress = max(0, step - warmup_steps) / max(1, num_steps - warmup_steps)
        share = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    lr = min(max_lr, min_lr + share * (max_lr - min_lr))  # the sum may round to more
    return min(max_lr * (step + 1) / warmup_steps, lr) if step < warmup_steps else lr


def cooldown_steps(num_steps: int, cooldown_fraction: float) -> int:
    """The last steps of a run, which wsd and power train at less than `max_lr`."""
    return round(cooldown_fraction * num_steps)


def recipe_lr(recipe: Recipe, step: int, *, of_matrices: bool = False) -> float:
    """`lr_at` a step of a recipe whose `num_steps` is known."""
    assert recipe.num_steps is not None
    cooldown = recipe.cooldown_fraction
    if of_matrices and recipe.matrix_cooldown_fraction is not None:
        cooldown = recipe.matrix_cooldown_fraction
    return lr_at(
        step,
        max_lr=recipe.max_lr,
        min_lr=recipe.min_lr,
        warmup_steps=recipe.warmup_steps,
        num_steps=recipe.num_steps,
        schedule=recipe.schedule,
        cooldown_fraction=cooldown,
    )


def stable_until(recipe: Recipe) -> int | None:
    """The step at which a recipe's cooldown begins, that of the matrices if it is earlier.

    None of a schedule without a stable phase, or without a cooldown.
    """
    if recipe.schedule not in COOLING or recipe.num_steps is None:
        return None
    fraction = max(recipe.cooldown_fraction, recipe.matrix_cooldown_fraction or 0.0)
    cooldown = cooldown_steps(recipe.num_steps, fraction)
    return max(0, recipe.num_steps - cooldown) if cooldown else None


def stays(recipe: Recipe, step: int) -> bool:
    """Whether a checkpoint of `step` is kept: for good, or as the end of the stable phase."""
    return recipe.keeps(step) or step == stable_until(recipe)


def is_saved(recipe: Recipe, step: int) -> bool:
    """Whether a checkpoint is due when `step` steps are done; the last one always is."""
    is_due = step > 0 and due(recipe.save_every, step)
    return step == recipe.num_steps or is_due or stays(recipe, step)


def momentum_at(step: int, *, momentum: float, warmup_steps: int) -> float:
    """Muon's momentum: linear from 0.85, or from `momentum` if that is less, to `momentum`.

    Source: Jordan et al. 2024, whose warm-up takes 300 steps.
    """
    first = min(FIRST_MOMENTUM, momentum)
    return momentum - (momentum - first) * max(0.0, 1 - step / warmup_steps if warmup_steps else 0)


def set_rates(optimizer: Optimizer, recipe: Recipe, step: int) -> float:
    """Give every group what holds at `step`; returns the rate that is told, of all but matrices.

    `lr` is the schedule's rate times the group's `lr_scale`. With `scheduled_weight_decay` its
    decay is in proportion to the rate as well, so that a weight loses lr^2 wd / max_lr of itself in
    a step, instead of lr wd.
    """
    rates = [recipe_lr(recipe, step, of_matrices=each) for each in (False, True)]
    for group in optimizer.param_groups:
        lr = rates[group["name"] in MATRICES]
        group["lr"] = lr * group["lr_scale"]
        share = lr / recipe.max_lr if recipe.scheduled_weight_decay else 1.0
        group["weight_decay"] = share * group["peak_weight_decay"]
        group["momentum"] = momentum_at(
            step,
            momentum=recipe.muon_momentum,
            warmup_steps=recipe.muon_momentum_warmup_steps,
        )
    return rates[0]


def jump(recipe: Recipe, before: Recipe, step: int) -> str:
    """In words, that the rate rises at `step`, where a run resumes by another schedule."""
    same = all(getattr(recipe, name) == getattr(before, name) for name in OF_A_SCHEDULE)
    if same or step < recipe.warmup_steps:
        return ""
    by_wsd = " By wsd, and from before its cooldown, it would not."
    if recipe.schedule in COOLING:
        has_cooled = before.schedule in COOLING
        by_wsd = " From before its cooldown (checkpoints/stable) it would not." * has_cooled
    for what, scale in (("", 1.0), (" of the matrices", matrix_scale(recipe))):
        then = scale * recipe_lr(before, step - 1, of_matrices=bool(what))
        now = scale * recipe_lr(recipe, step, of_matrices=bool(what))
        if now > JUMP * then:
            return (
                f"The learning rate{what} rises from {then:.2g} to {now:.2g} here: so "
                f"{recipe.schedule} has it for {recipe.num_steps} steps.{by_wsd}"
            )
    return ""


def endless_warmup(recipe: Recipe) -> str:
    """In words, that a run ends, or cools down, before its warm-up has come far."""
    if recipe.num_steps is None or recipe.warmup_steps == 0:
        return ""
    steps = range(min(recipe.warmup_steps, recipe.num_steps))
    highest = max(recipe_lr(recipe, step) for step in steps[:: len(steps) // 1000 + 1])
    is_short = recipe.num_steps <= recipe.warmup_steps
    if not is_short and highest > FAR * recipe.max_lr:
        return ""
    end = f"within the run's {recipe.num_steps}" if is_short else "before the cooldown"
    return (
        f"The warm-up of {recipe.warmup_steps} steps does not end {end}: lower warmup_steps; the "
        f"rate gets to {highest:.2g}, and max_lr is {recipe.max_lr:.2g}."
    )
