"""The verb `average`: the mean of several models' weights, as one verified model.

    gpt2repro average runs/gpt2/checkpoints/step_* --output OUT

They are read one after the other, and added up in float64.
"""

import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser, named, path

# What decides, with the shapes that follow from it, what weights mean.
ARCHITECTURE = (
    *("n_layer", "n_head", "n_embd", "n_inner", "vocab_size", "n_positions", "tie_word_embeddings"),
    *("activation_function", "layer_norm_epsilon"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
)


def main(argv: list[str]) -> int:
    """`gpt2repro average MODEL MODEL ... --output OUT`."""
    options = _parse(argv)
    from gpt2repro.publishing.card import model_card
    from gpt2repro.publishing.export import export
    from gpt2repro.publishing.licence import licence_of
    from gpt2repro.records.saved_models import locate
    from gpt2repro.system import machine

    models = [locate(name, "MODEL") for name in options.models]
    if options.output.resolve() in [Path(name).resolve() for name in models]:
        raise UserError(f"--output {options.output} is one of the models; give another directory")
    model, tokenizer = _average(models, options.decay, options.tokenizer)
    which = "mean" if options.decay is None else f"moving average, of decay {options.decay},"
    licences = {licence_of(name, "MODEL") for name in models}
    card = model_card(
        name=options.output.resolve().name,
        num_parameters=model.num_parameters(),
        command=shlex.join(["gpt2repro", "average", *argv]),
        commit=machine.code_commit(),
        averaged=f"the {which} of those of {len(options.models)} models, which the command names",
        licence=licences.pop() if len(licences) == 1 else None,
    )
    verification = export(model, tokenizer, options.output, format=options.format, card=card)
    print(f"{options.output}: verified")
    for line in verification.lines():
        print(f"  {line}")
    return 0


def _average(names: list[str], decay: float | None, given: str | None) -> tuple[Any, Any]:
    """The models' mean, or what a moving average has come to after the last; and their tokenizer.

    Raises:
        UserError: one cannot be loaded, or its weights mean something else than the first one's.
    """
    import torch

    from gpt2repro.records.saved_models import find_tokenizer, load_causal_lm

    for number, name in enumerate(names, 1):
        model = load_causal_lm(name, option="MODEL", dtype=torch.float32)
        tokenizer = find_tokenizer(name, given, option="MODEL")
        kind = {field: getattr(model.config, field) for field in ARCHITECTURE}
        kind["n_inner"] = model.config.n_inner or 4 * model.config.n_embd
        kind["tokenizer"] = tokenizer.get_vocab()
        if number == 1:
            average, kind_of_first = model.double(), kind
            continue
        if other := [field for field, value in kind.items() if value != kind_of_first[field]]:
            raise UserError(f"MODEL {name} has another {other[0]} than {names[0]}")
        rate = 1 / number if decay is None else 1 - decay
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight.double(), rate)
    return average.float(), tokenizer


def _parse(argv: list[str]) -> Namespace:
    parser = OneLineParser(prog="gpt2repro average", description=__doc__)
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", type=named, help="two or more, as `export` takes one")
    add("--output", required=True, type=path, help="directory to write")
    add("--decay", type=float, help="of a moving average in the order given (default: a mean)")
    add("--format", choices=("gpt2repro", "gpt2"), default="gpt2repro")
    add("--tokenizer", type=named, help="Hub id or directory (default: the models' own)")
    options = parser.parse_args(argv)
    if len(options.models) < 2:
        raise UserError("MODEL: an average needs two at least")
    if options.decay is not None and not 0 <= options.decay < 1:
        raise UserError(f"--decay {options.decay} is out of range: from 0 to below 1")
    return options
