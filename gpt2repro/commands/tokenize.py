"""Write a recipe's texts as shards of token ids, which llm.c and build-nanogpt read too.

    gpt2repro tokenize --recipe gpt2 --output shards
    python train_accelerate.py --recipe gpt2 --dataset_name shards

Documents are in dataset order; what the recipe holds out is a shard of its own. Stopped by whatever
means, the same command goes on after the last whole shard.
"""

import argparse
import time

from gpt2repro import UserError
from gpt2repro.commands.parser import make_room, path, recipe_parser
from gpt2repro.recipe import load_recipe
from gpt2repro.recipe_fields import Recipe

RANGES = {"shard_tokens": (1000, 2**31 - 1), "num_threads": (1, 1024)}  # a header counts in int32


def main(argv: list[str]) -> int:
    """Write what is not yet there."""
    recipe, options = _parse(argv)
    lock = options.output / ".lock"
    make_room(lock)
    from gpt2repro.data.corpora.content import one_at_a_time

    with one_at_a_time(lock):
        _tokenize(recipe, options)
    return 0


def _parse(argv: list[str]) -> tuple[Recipe, argparse.Namespace]:
    parser = recipe_parser("tokenize", __doc__)
    parser.add_argument("--output", type=path, required=True, help="the directory of the shards")
    parser.add_argument("--shard_tokens", type=int, default=10**8, help="of all but the last")
    parser.add_argument(
        "--format", choices=["bin", "npy"], default="bin", help="llm.c's, or build-nanogpt's"
    )
    parser.add_argument("--num_threads", type=int, help="that encode; default: one a core")
    options, rest = parser.parse_known_args(argv)
    for name, (least, most) in RANGES.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name}: {str(value)[:20]} is not {least:,} to {most:,}")
    return load_recipe(rest), options


def _tokenize(recipe: Recipe, options: argparse.Namespace) -> None:
    from gpt2repro.data import tokenize
    from gpt2repro.data.tokens.encoder import BulkEncoder
    from gpt2repro.system import machine
    from gpt2repro.training import inputs
    from gpt2repro.training.progress import phase

    encoder = BulkEncoder(inputs.open_tokenizer(recipe))
    sources = inputs.open_datasets(recipe, encoder)
    if len(sources) > 1:
        raise UserError("datasets: tokenize writes one; name it with --dataset_name")
    corpus, num_validation_units = sources[0].corpus, sources[0].num_validation_units
    how = {"format": options.format, "shard_tokens": options.shard_tokens}
    how |= {"num_validation_units": num_validation_units}
    manifest = tokenize.begin(options.output, corpus, encoder, **how)

    def say(what: str) -> None:
        there = f"{len(manifest.shards)} shards of {manifest.num_tokens:,} tokens"
        print(f"{there} in {options.output}: {what}", flush=True)

    if manifest.complete:
        say("complete, there is nothing to do")
        return
    if manifest.shards:
        say("going on")
    began, before = time.perf_counter(), manifest.num_tokens
    with phase("tokenizing", corpus.num_units - manifest.next.unit, enabled=True) as on_unit:
        tokenize.write_shards(
            options.output,
            manifest,
            corpus,
            encoder,
            num_threads=options.num_threads or machine.num_cores(),
            on_unit=on_unit,
            token_cache_dir=recipe.token_cache_dir,
            unit_digests_dir=recipe.unit_digests_dir,
        )
    rate = (manifest.num_tokens - before) / (time.perf_counter() - began)
    say(f"complete, {rate:,.0f} tokens/s")
