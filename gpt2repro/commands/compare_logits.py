"""The verb `compare-logits`: ours against transformers' GPT-2 on the same weights.

    gpt2repro compare-logits --reference openai-community/gpt2

Exit status 0: every parameter is equal to the bit and the logits agree within the tolerance, in
prefill, in cached decoding and in a left-padded batch; 1: something differs; 2: could not compare.
"""

import json
from argparse import Namespace
from dataclasses import asdict, replace
from typing import Any

from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser, make_room, named, path
from gpt2repro.system import atomic


def main(argv: list[str]) -> int:
    """`gpt2repro compare-logits --reference NAME [--model DIR]`: 0 within the tolerance, else 1."""
    options = _parse(argv)
    make_room(options.json, "--json")
    import torch
    from transformers import GPT2LMHeadModel

    from gpt2repro.publishing.agreement import compare, differing_parameters
    from gpt2repro.records.saved_models import load_causal_lm, locate

    options.reference = locate(options.reference, "--reference")  # one, also of a run that goes on
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
    results = compare(ours, theirs, getattr(torch, options.dtype), options.length)
    if options.tolerance is not None:
        results = {
            name: replace(each, tolerance=options.tolerance) for name, each in results.items()
        }
    tokens = _next_tokens(options, ours, theirs)
    holds = not differing and all(each.holds for each in results.values())
    _show(options, ours, differing, results, tokens)
    if options.json:
        _write_json(options, ours, differing, results, tokens, holds)
    print("Equal within the tolerance." if holds else "NOT equal within the tolerance.")
    return 0 if holds else 1


def _parse(argv: list[str]) -> Namespace:
    parser = OneLineParser(prog="gpt2repro compare-logits", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--reference", type=named, required=True, help="GPT-2 for transformers: Hub id or path")
    add("--model", type=named, help="weights for ours (default: the reference's)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in")
    add("--length", type=int, default=128, help="tokens of the probe (default %(default)s)")
    add("--tolerance", type=float, help="largest difference of a logit allowed (default: shown)")
    add("--prompt", default="Hello, I'm a language model,", help="whose next tokens are shown")
    add("--tokenizer", type=named, help="Hub id or directory (default: the reference's)")
    add("--json", type=path, help="write the figures to this file")
    options = parser.parse_args(argv)
    if options.length < 2:
        raise UserError(f"--length {options.length}: two tokens at least")
    if options.tolerance is not None and not options.tolerance >= 0:
        raise UserError(f"--tolerance {options.tolerance}: a number, at least 0")
    return options


def _next_tokens(options: Namespace, ours, theirs) -> list[list[tuple[str, float]]] | None:
    """Of both models; None, and a line that says why, without a tokenizer."""
    from gpt2repro.publishing.agreement import next_tokens
    from gpt2repro.records.saved_models import find_tokenizer

    try:
        tokenizer = find_tokenizer(options.reference, options.tokenizer, option="--reference")
        return [next_tokens(model, tokenizer, options.prompt) for model in (ours, theirs)]
    except UserError as error:
        print(f"no table of next tokens: {error}")
        return None


def _show(options: Namespace, ours, differing: list[str], results: dict[str, Any], tokens) -> None:
    import transformers

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


def _write_json(options: Namespace, ours, differing, results, tokens, holds: bool) -> None:
    import torch
    import transformers

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
    plain = json.loads(json.dumps(content), parse_constant=lambda _: None)  # JSON has no NaN
    with atomic.new_file(options.json) as scratch:
        scratch.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
