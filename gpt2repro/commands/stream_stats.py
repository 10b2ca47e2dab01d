"""What a recipe's data stream would do, and whether this machine keeps up with it.

    gpt2repro stream-stats --recipe gpt2 --num_processes 8 --tokens_per_second 1500000

Opens the dataset, says how it is shared out, then streams as process 0 of the launch for a while.
Exit status 1 if a stated rate is not reached.
"""

import argparse
import json
import math
import time
from typing import TYPE_CHECKING, Any

from gpt2repro import UserError
from gpt2repro.commands.parser import MOST_PROCESSES, make_room, path, recipe_parser
from gpt2repro.recipe import load_recipe
from gpt2repro.recipe_fields import Recipe
from gpt2repro.system import atomic

if TYPE_CHECKING:
    from gpt2repro.data.rows.stream import TokenStream

Stats = dict[str, Any]  # figures by name; None where the dataset does not tell without being read


def main(argv: list[str]) -> int:
    """Print the figures; exit status 1 if the stated rate is not reached."""
    recipe, options = _parse(argv)
    make_room(options.output)
    stats = _measure(recipe, options.num_processes, options.seconds, options.tokens_per_second)
    print(_table(stats))
    if options.output:
        with atomic.new_file(options.output) as scratch:
            scratch.write_text(json.dumps(stats, indent=2) + "\n")
    return 0 if _keeps_up(stats) else 1


def _parse(argv: list[str]) -> tuple[Recipe, argparse.Namespace]:
    parser = recipe_parser("stream-stats", __doc__)
    parser.add_argument("--num_processes", type=int, default=1, help="of the launch to plan for")
    parser.add_argument("--tokens_per_second", type=float, help="what the whole launch trains on")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to stream")
    parser.add_argument("--output", type=path, help="write the figures to this JSON file")
    options, rest = parser.parse_known_args(argv)
    if not 1 <= options.num_processes <= MOST_PROCESSES:
        raise UserError(f"--num_processes: {options.num_processes} is not 1 to {MOST_PROCESSES:,}")
    for name in ("tokens_per_second", "seconds"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name} {value} is out of range")
    return load_recipe(rest), options


def _measure(
    recipe: Recipe, num_processes: int, seconds: float, tokens_per_second: float | None
) -> Stats:
    """Open what the recipe names and stream it as process 0 of `num_processes` for `seconds`."""
    from gpt2repro.data.corpora import size
    from gpt2repro.data.tokens.encoder import BulkEncoder
    from gpt2repro.training import inputs

    encoder = BulkEncoder(inputs.open_tokenizer(recipe))
    sources = inputs.open_datasets(recipe, encoder)
    if len(sources) > 1:
        raise UserError("datasets: stream-stats counts one; name it with --dataset_name")
    corpus = sources[0].corpus
    stream = inputs.open_stream(recipe, sources, encoder, 0, num_processes)
    training = sources[0].training_units
    num_bytes = corpus.total_bytes(training)
    epoch_tokens = size.estimate_tokens(corpus, training, sources[0].tokens_per_byte)
    run_tokens = recipe.tokens_before(recipe.num_steps) if recipe.num_steps else None
    first, rate = _time_stream(stream, recipe.batch_tokens // num_processes, seconds)
    num_pieces = len(training) * -(-recipe.num_lanes // len(training))
    return {
        "units": corpus.num_units,
        "training_units": len(training),
        "lanes_per_process": recipe.num_lanes // num_processes,
        # Of an epoch; a piece is a unit, or part of one if lanes outnumber units.
        "pieces_per_lane": round(num_pieces / recipe.num_lanes, 2),
        # Of text columns as stored: what an epoch moves.
        "epoch_megabytes": None if num_bytes is None else round(num_bytes / 1e6, 1),
        "epoch_tokens_estimate": epoch_tokens,
        "epochs_of_the_run_estimate": (
            round(run_tokens / epoch_tokens, 3) if run_tokens and epoch_tokens else None
        ),
        "requests_per_epoch": num_pieces,
        "tokens_per_batch": recipe.batch_tokens,
        "first_step_seconds": round(first, 2),
        # Of one process, this machine as loaded as it is.
        "tokens_per_second": round(rate),
        "needed_tokens_per_second": tokens_per_second and tokens_per_second / num_processes,
    }


def _time_stream(stream: "TokenStream", step_tokens: int, seconds: float) -> tuple[float, float]:
    """Seconds to the first step, and the tokens a second of the steps after it."""
    began, num_steps = time.perf_counter(), 0
    try:
        next(stream)
        first = time.perf_counter() - began
        began = time.perf_counter()
        while num_steps < 2 or time.perf_counter() - began < seconds:
            next(stream)
            num_steps += 1
    finally:
        stream.close()
    return first, num_steps * step_tokens / (time.perf_counter() - began)


def _keeps_up(stats: Stats) -> bool:
    return (stats["needed_tokens_per_second"] or 0) <= stats["tokens_per_second"]


def _table(stats: Stats) -> str:
    lines = []
    for name, value in stats.items():
        words = "unknown" if value is None else f"{value:,}"
        if not (name == "needed_tokens_per_second" and value is None):
            lines.append(f"{name.replace('_', ' '):<28}{words:>18}")
    if needed := stats["needed_tokens_per_second"]:
        share = stats["tokens_per_second"] / needed
        verdict = "keeps up" if _keeps_up(stats) else "does NOT keep up"
        lines.append(f"{verdict}: {share:.2f} times the rate that each process needs")
    return "\n".join(lines)
