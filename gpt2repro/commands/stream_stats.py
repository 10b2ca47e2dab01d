"""What a recipe's data stream would do, and whether this machine keeps up with it.

    gpt2repro stream-stats --recipe gpt2 --num_processes 8 --tokens_per_second 1500000

Opens the dataset, says how it is shared out, then streams as process 0 of the launch for a while.
Exit status 1 if a stated rate is not reached.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.data.corpus import Corpus
from gpt2repro.data.stream import TokenStream
from gpt2repro.data.tokenizer import BulkEncoder, bulk_encoder
from gpt2repro.recipe import Recipe, load_recipe
from gpt2repro.training import parts


@dataclass(frozen=True)
class Stats:
    """The stream's figures; None where the dataset does not tell without being read."""

    units: int
    training_units: int
    lanes_per_process: int
    pieces_per_lane: (
        float  # of an epoch; a piece is a unit, or part of one if lanes outnumber units
    )
    epoch_megabytes: float | None  # of text columns as stored, what an epoch moves
    epoch_tokens_estimate: int | None
    epochs_of_the_run_estimate: float | None
    requests_per_epoch: int
    tokens_per_step: int
    first_step_seconds: float
    tokens_per_second: float  # of one process, this machine as loaded as it is
    needed_tokens_per_second: float | None  # of one process

    @property
    def keeps_up(self) -> bool:
        return (self.needed_tokens_per_second or 0) <= self.tokens_per_second


def main(argv: list[str]) -> int:
    parser = OneLineParser(
        prog="gpt2repro stream-stats",
        description=__doc__,
        epilog="Every other option is the recipe's: --recipe FILE and --FIELD VALUE.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--num_processes", type=int, default=1, help="of the launch to plan for")
    parser.add_argument("--tokens_per_second", type=float, help="what the whole launch trains on")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to stream")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.num_processes < 1:
        raise UserError(f"--num_processes: {arguments.num_processes} is less than one")
    stats = measure(
        load_recipe(rest), arguments.num_processes, arguments.seconds, arguments.tokens_per_second
    )
    print(table(stats))
    if arguments.output:
        arguments.output.write_text(json.dumps(asdict(stats), indent=2) + "\n")
    return 0 if stats.keeps_up else 1


def measure(
    recipe: Recipe, num_processes: int, seconds: float, tokens_per_second: float | None
) -> Stats:
    """Open what the recipe names and stream it as process 0 of `num_processes` for `seconds`."""
    encoder = bulk_encoder(parts.open_tokenizer(recipe))
    corpus = parts.open_dataset(recipe)
    stream = parts.open_stream(recipe, corpus, encoder, 0, num_processes)
    training = range(recipe.num_validation_units, corpus.num_units)
    sizes = [corpus.num_bytes(unit) for unit in training]
    num_bytes = None if None in sizes else sum(filter(None, sizes))
    epoch_tokens = estimate_epoch_tokens(corpus, encoder, training, num_bytes)
    run_tokens = recipe.batch_tokens * recipe.num_steps if recipe.num_steps else None
    first, rate = time_stream(stream, recipe.batch_tokens // num_processes, seconds)
    num_pieces = len(training) * -(-recipe.num_lanes // len(training))
    return Stats(
        units=corpus.num_units,
        training_units=len(training),
        lanes_per_process=recipe.num_lanes // num_processes,
        pieces_per_lane=round(num_pieces / recipe.num_lanes, 2),
        epoch_megabytes=None if num_bytes is None else round(num_bytes / 1e6, 1),
        epoch_tokens_estimate=epoch_tokens,
        epochs_of_the_run_estimate=(
            round(run_tokens / epoch_tokens, 3) if run_tokens and epoch_tokens else None
        ),
        requests_per_epoch=num_pieces,
        tokens_per_step=recipe.batch_tokens,
        first_step_seconds=round(first, 2),
        tokens_per_second=round(rate),
        needed_tokens_per_second=tokens_per_second and tokens_per_second / num_processes,
    )


def estimate_epoch_tokens(
    corpus: Corpus, encoder: BulkEncoder, training: range, num_bytes: int | None
) -> int | None:
    """From the tokens of the first training unit, in proportion to the stored bytes."""
    sample_bytes = corpus.num_bytes(training[0])
    if not (num_bytes and sample_bytes):
        return None
    sample = encoder.encode(corpus.read_unit(training[0]))
    num_tokens = len(sample) + sum(map(len, sample))
    return round(num_tokens * num_bytes / sample_bytes)


def time_stream(stream: TokenStream, step_tokens: int, seconds: float) -> tuple[float, float]:
    """Seconds to the first step, and the tokens a second of the steps after it."""
    began = time.perf_counter()
    next(stream)
    first = time.perf_counter() - began
    began, num_steps = time.perf_counter(), 0
    try:
        while num_steps < 2 or time.perf_counter() - began < seconds:
            next(stream)
            num_steps += 1
    finally:
        stream.close()
    return first, num_steps * step_tokens / (time.perf_counter() - began)


def table(stats: Stats) -> str:
    lines = []
    for name, value in asdict(stats).items():
        words = "unknown" if value is None else f"{value:,}"
        if not (name == "needed_tokens_per_second" and value is None):
            lines.append(f"{name.replace('_', ' '):<28}{words:>18}")
    if stats.needed_tokens_per_second:
        share = stats.tokens_per_second / stats.needed_tokens_per_second
        verdict = "keeps up" if stats.keeps_up else "does NOT keep up"
        lines.append(f"{verdict}: {share:.2f} times the rate that each process needs")
    return "\n".join(lines)
