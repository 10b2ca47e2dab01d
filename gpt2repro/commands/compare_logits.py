"""The verb `compare-logits`: ours against transformers' GPT-2 on the same weights.

    gpt2repro compare-logits --reference openai-community/gpt2

Exit status 0: every parameter is equal to the bit and the logits agree within the tolerance, in
prefill, in cached decoding and in a left-padded batch; 1: something differs; 2: could not compare.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.publishing.verification import same_bits
from gpt2repro.records.saved_models import find_tokenizer, load_causal_lm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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


def agreement(ours: Tensor, theirs: Tensor, tolerance: float) -> Agreement:
    """Compare logits (N, V)."""
    ours, theirs = ours.double(), theirs.double()
    difference = (ours - theirs).abs()
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    best, their_best = ours.topk(5).indices, theirs.topk(5).indices
    shared = (best[:, :, None] == their_best[:, None, :]).any(-1).double().mean()
    return Agreement(
        max_abs=difference.max().item(),
        mean_abs=difference.mean().item(),
        kl=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        top1=(best[:, 0] == their_best[:, 0]).double().mean().item(),
        top5=shared.item(),
        tolerance=tolerance,
    )


# --- What is computed ---------------------------------------------------------------------------


def probe_ids(model: PreTrainedModel, length: int) -> Tensor:
    """Token ids (2, T), the same in every run; T is `length` or the model's whole context."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(length, model.config.n_positions))
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def prefill(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (2 * T, V) of one pass over all tokens."""
    return model(input_ids=ids).logits.flatten(0, 1)


def cached_decode(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the last tokens, one pass each, on the keys and values of those before."""
    start = max(1, ids.shape[1] - NUM_DECODED)
    outputs = model(input_ids=ids[:, :start], use_cache=True)
    logits = [outputs.logits[:, -1]]
    for column in range(start, ids.shape[1]):
        outputs = model(
            input_ids=ids[:, column : column + 1],
            past_key_values=outputs.past_key_values,
            use_cache=True,
        )
        logits.append(outputs.logits[:, -1])
    return torch.cat(logits)


def left_padded(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits at the real tokens of a batch whose first row is half padding on the left.

    Stock GPT-2 must be told the positions; ours finds them from the mask.
    """
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 2] = 0
    told = {}
    if isinstance(model, GPT2LMHeadModel):
        told["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, **told).logits[mask.bool()]


MODES = {"prefill": prefill, "cached decode": cached_decode, "left-padded batch": left_padded}


@torch.inference_mode()
def compare(ours: Any, theirs: Any, dtype: torch.dtype, length: int) -> dict[str, Agreement]:
    """Both fp32 models in `dtype`, in every mode. They are left in `dtype`."""
    ids = probe_ids(theirs, length)
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
        found[name] = agreement(a, b, tolerance)
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
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"][:, -model.config.n_positions :]
    probabilities, tokens = model(input_ids=ids).logits[0, -1].float().softmax(-1).topk(5)
    return [
        (tokenizer.decode(token), probability)
        for token, probability in zip(tokens.tolist(), probabilities.tolist(), strict=True)
    ]


# --- The verb -----------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="gpt2repro compare-logits", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--reference", required=True, help="GPT-2 weights for transformers' class: Hub id or path")
    add("--model", help="weights for ours (default: the reference's)")
    add("--dtype", choices=DTYPES, default="float32", help="to compute in (default %(default)s)")
    add("--length", type=int, default=128, help="tokens of the probe (default %(default)s)")
    add("--tolerance", type=float, help="largest difference of a logit allowed (default: shown)")
    add("--prompt", default="Hello, I'm a language model,", help="whose next tokens are shown")
    add("--tokenizer", help="Hub id or directory (default: the reference's)")
    add("--json", type=Path, help="write the figures to this file")
    return parser


def main(argv: list[str]) -> int:
    """`gpt2repro compare-logits --reference NAME [--model DIR]`: 0 within the tolerance, else 1."""
    options = build_parser().parse_args(argv)
    if options.length < 2:
        raise UserError(f"--length {options.length}: two tokens at least")
    source = options.model or options.reference
    option = "--model" if options.model else "--reference"
    theirs = load_causal_lm(
        options.reference,
        option="--reference",
        model_class=GPT2LMHeadModel,
        dtype=torch.float32,
    )
    ours = load_causal_lm(source, option=option, dtype=torch.float32)
    differing = differing_parameters(ours, theirs)
    results = compare(ours, theirs, DTYPES[options.dtype], options.length)
    if options.tolerance is not None:
        results = {
            name: Agreement(**asdict(each) | {"tolerance": options.tolerance})
            for name, each in results.items()
        }
    tokens = None
    try:
        tokenizer = find_tokenizer(options.reference, options.tokenizer)
        tokens = [next_tokens(model, tokenizer, options.prompt) for model in (ours, theirs)]
    except UserError as error:
        print(f"no table of next tokens: {error}")
    holds = not differing and all(each.holds for each in results.values())
    show(options, ours, differing, results, tokens)
    if options.json:
        write_json(options, ours, differing, results, tokens, holds)
    print("Equal within the tolerance." if holds else "NOT equal within the tolerance.")
    return 0 if holds else 1


def show(options, ours, differing, results, tokens) -> None:
    num_parameters = ours.num_parameters() / 1e6
    equal = "all equal bit for bit"
    if differing:
        equal = f"{len(differing)} differ, among them {differing[0]}"
    print(
        f"reference   {options.reference}: transformers {transformers.__version__}, GPT2LMHeadModel"
    )
    print(f"ours        {options.model or options.reference}: GPT2ReproForCausalLM")
    print(f"parameters  {num_parameters:.1f} M: {equal}")
    print(f"computed    in {options.dtype}, {options.length} tokens at most\n")
    header = ("", "max |diff|", "mean |diff|", "KL", "top-1", "top-5", "tolerance")
    print("{:<18}{:>11}{:>12}{:>10}{:>8}{:>8}{:>11}".format(*header))
    for name, a in results.items():
        print(
            f"{name:<18}{a.max_abs:>11.2e}{a.mean_abs:>12.2e}{a.kl:>10.1e}{a.top1:>8.1%}"
            f"{a.top5:>8.1%}{a.tolerance:>11.1e}{'' if a.holds else '  <- beyond'}"
        )
    if tokens:
        print(f"\nnext token after {options.prompt!r}\n{'ours':<28}theirs")
        for mine, yours in zip(*tokens, strict=True):
            print("".join(f"{text!r:<18}{p:<10.4f}" for text, p in (mine, yours)).rstrip())
    print()


def write_json(options, ours, differing, results, tokens, holds) -> None:
    content = {
        "reference": options.reference,
        "model": options.model or options.reference,
        "dtype": options.dtype,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "num_parameters": ours.num_parameters(),
        "differing_parameters": differing,
        "modes": {name: asdict(each) for name, each in results.items()},
        "next_tokens": tokens and dict(zip(("ours", "theirs"), tokens, strict=True)),
        "equal": holds,
    }
    try:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {options.json}: {error}") from None
