"""How far two models with the same weights agree: parameters to the bit, logits to a tolerance."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

from gpt2repro import UserError
from gpt2repro.data.tokens.token_ids import ids_to_continue
from gpt2repro.publishing.verification import same_bits
from gpt2repro.records.saved_models import check_ids
from modeling_gpt2repro import CACHE

# fp32 rounding is relative: 1e-5 of the largest logit, and the 1e-4 that a small model's logits
# (up to 10) make of it. The two differ in rounding only: stock spells GELU in seven operations.
RELATIVE_TOLERANCE, SMALLEST_TOLERANCE = 1e-5, 1e-4
# Two right bf16 computations each lie about d from the exact logits, so within 2 d of each other; d
# is measured on the reference. 3 d leaves room for a largest error that happens to be larger.
BF16_NOISE_MULTIPLE = 3
NUM_DECODED = 16


@dataclass(frozen=True)
class Agreement:
    """How two sets of logits for the same positions differ."""

    max_abs: float
    mean_abs: float
    kl: float  # nats, mean over positions, of ours from theirs
    top1: float  # share of positions with the same likeliest token
    top5: float  # share of the five likeliest tokens that both have
    tolerance: float  # for max_abs

    @property
    def holds(self) -> bool:
        return self.max_abs <= self.tolerance  # False for NaN, too


def _agreement(ours: Tensor, theirs: Tensor, tolerance: float) -> Agreement:
    """Compare logits (N, V)."""
    ours, theirs = ours.double(), theirs.double()
    difference = (ours - theirs).abs()
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    best, their_best = ours.topk(5).indices, theirs.topk(5).indices
    shared = (best[:, :, None] == their_best[:, None, :]).any(-1).double().mean()
    known = 1.0 if difference.isfinite().all() else float("nan")  # NaN has no likeliest token
    return Agreement(
        max_abs=difference.max().item(),
        mean_abs=difference.mean().item(),
        kl=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        top1=known * (best[:, 0] == their_best[:, 0]).double().mean().item(),
        top5=known * shared.item(),
        tolerance=tolerance,
    )


def _probe_ids(model: PreTrainedModel, length: int) -> Tensor:
    """Token ids (2, T), the same in every run; T is `length` or the model's whole context."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(length, model.config.n_positions))
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def _prefill(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (2 * T, V) of one pass over all tokens."""
    return model(input_ids=ids).logits.flatten(0, 1)


def _cached_decode(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the last tokens, one pass each, on the keys and values of those before."""
    start = max(1, ids.shape[1] - NUM_DECODED)
    outputs = model(input_ids=ids[:, :start], use_cache=True)
    logits = [outputs.logits[:, -1]]
    for column in range(start, ids.shape[1]):
        cache = {CACHE: outputs[CACHE]}
        outputs = model(input_ids=ids[:, column : column + 1], use_cache=True, **cache)
        logits.append(outputs.logits[:, -1])
    return torch.cat(logits)


def _left_padded(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits at the real tokens of a batch whose first row is half padding on the left.

    Stock GPT-2 must be told the positions; ours finds them from the mask.
    """
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 2] = 0
    told = {}
    if isinstance(model, GPT2LMHeadModel):
        told["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, **told).logits[mask.bool()]


MODES = {"prefill": _prefill, "cached decode": _cached_decode, "left-padded batch": _left_padded}


@torch.inference_mode()
def compare(ours: Any, theirs: Any, dtype: torch.dtype, length: int) -> dict[str, Agreement]:
    """Both fp32 models in `dtype`, in every mode. They are left in `dtype`."""
    ids = _probe_ids(theirs, length)
    exact = {name: mode(theirs, ids).float() for name, mode in MODES.items()}
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    found = {}
    for name, mode in MODES.items():
        a, b = mode(ours, ids).float(), mode(theirs, ids).float()
        if dtype == torch.float32:
            largest = exact[name].abs().max().item()
            tolerance = max(SMALLEST_TOLERANCE, RELATIVE_TOLERANCE * largest)
        else:
            tolerance = BF16_NOISE_MULTIPLE * (b - exact[name]).abs().max().item()
        found[name] = _agreement(a, b, tolerance)
    return found


def differing_parameters(ours: PreTrainedModel, theirs: PreTrainedModel) -> list[str]:
    """Names of parameters that are not the same bits.

    Raises:
        UserError: the two have not the same parameters to compare.
    """
    mine, yours = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for name in sorted(mine.keys() | yours.keys()):
        shapes = [tuple(each[name].shape) if name in each else None for each in (mine, yours)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"--model and --reference are of different architectures: {name} is {shapes[0]} "
                f"and {shapes[1]}"
            )
    return [name for name in mine if not same_bits(mine[name].detach(), yours[name].detach())]


@torch.inference_mode()
def next_tokens(model: PreTrainedModel, tokenizer, prompt: str) -> list[tuple[str, float]]:
    """The five likeliest continuations of `prompt`, as text, with their probabilities."""
    ids = torch.tensor(ids_to_continue(tokenizer, [prompt]))[:, -model.config.n_positions :]
    check_ids(ids[0].tolist(), model)
    probabilities, tokens = model(input_ids=ids).logits[0, -1].float().softmax(-1).topk(5)
    return [
        (tokenizer.decode(token), probability)
        for token, probability in zip(tokens.tolist(), probabilities.tolist(), strict=True)
    ]
