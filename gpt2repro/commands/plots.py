"""`gpt2repro plots`: look at a run's curves and inside its model.

Every picture is written as PNG and as SVG, and its title says what there is to see.
"""

import argparse
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.plots import inspection, parameters
from gpt2repro.plots.curves import (
    Metrics,
    draw_learning_rate_and_gradient_norm,
    draw_losses,
    draw_throughput,
    known_baseline,
    loss_curve,
)
from gpt2repro.plots.style import finding, save, token_labels
from gpt2repro.records import checkpoints
from gpt2repro.records.metrics import read_metrics
from gpt2repro.records.saved_models import find_tokenizer, load_causal_lm

__all__ = ["known_baseline", "loss_curve", "main"]  # the first two are what a run draws with

# Tokens repeat in it, so that heads that look for repetition have something to find.
PROMPT = "The first argument is the name of the file, and the second argument is the name of the"
MAX_PROMPT_TOKENS = 40  # as many labels as fit on an axis
LENS_POSITIONS = 12
NEIGHBOUR_TOKENS = 10

Heads = list[tuple[int, int]]  # (layer, head)


def main(argv: list[str]) -> int:
    """`gpt2repro plots RUN_OR_MODEL [--compare RUN2]`: draw, and print each file's finding."""
    arguments = parse(argv)
    run = read_run(arguments.run_or_model)
    output = Path(arguments.output or default_output(arguments, run))
    if arguments.compare:
        names = (arguments.run_or_model, arguments.compare)
        runs = [found for found in map(read_run, names) if found]
        if len(runs) < 2:
            raise UserError(f"--compare overlays two runs; one of {names} holds no metrics.jsonl")
        write(run_pictures(runs), output)
        return 0
    if run:
        write(run_pictures([run]), output)
    source = model_of(arguments.run_or_model)
    if source is None:
        print(f"{arguments.run_or_model} holds no model yet: its insides are left out")
        return 0
    draw_insides(source, output, prompt=arguments.prompt, heads=arguments.heads)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="gpt2repro plots", description="Look inside a run or a model.")
    parser.add_argument(
        "run_or_model", metavar="RUN_OR_MODEL", help="run or model directory, or Hub id"
    )
    parser.add_argument("--output", metavar="DIR", help="default: RUN/plots, else plots/MODEL")
    parser.add_argument("--prompt", default=PROMPT, help="text that the model reads")
    parser.add_argument(
        "--heads", type=heads, metavar="L.H,...", help="attention heads drawn large, e.g. 0.3,5.1"
    )
    parser.add_argument("--compare", metavar="RUN2", help="overlay the curves of two runs instead")
    return parser.parse_args(argv)


def heads(text: str) -> Heads:
    """`0.3,5.1` -> [(0, 3), (5, 1)], for argparse."""
    if not re.fullmatch(r"\d+\.\d+(,\d+\.\d+)*", text):
        raise argparse.ArgumentTypeError(f"heads are given as LAYER.HEAD,..., not {text!r}")
    places = (place.split(".") for place in text.split(","))
    return [(int(layer), int(head)) for layer, head in places]


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says: the lines of its metrics, and its recipe if there is one."""

    path: Path
    metrics: Metrics
    recipe: dict[str, Any]

    @property
    def name(self) -> str:
        return self.recipe.get("exp_name") or self.path.resolve().name

    @property
    def baseline(self) -> tuple[str, float] | None:
        dataset, tokenizer = self.recipe.get("dataset_name"), self.recipe.get("tokenizer_name")
        return known_baseline(dataset or "", tokenizer or "")


def read_run(name: str) -> RunRecord | None:
    """The run at `name`; None if there is no metrics.jsonl, so that it can only be a model."""
    path = Path(name)
    if not (path / "metrics.jsonl").is_file():
        return None
    recipe = path / "recipe.yaml"
    fields = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None
    return RunRecord(path, read_metrics(path / "metrics.jsonl"), fields or {})


def default_output(arguments: argparse.Namespace, run: RunRecord | None) -> Path:
    name = Path(arguments.run_or_model)
    if run is None:
        return Path("plots") / name.resolve().name
    return name / "plots" / (f"against-{Path(arguments.compare).name}" if arguments.compare else "")


def model_of(name: str) -> str | None:
    """Where the model of `name` is: as it is, or a run's newest checkpoint until it is finished."""
    path = Path(name)
    if not (path / "metrics.jsonl").is_file() or (path / "final" / "config.json").is_file():
        return name
    newest, _ = checkpoints.find_latest(path / "checkpoints")
    return str(newest) if newest else None


def run_pictures(runs: list[RunRecord]) -> Iterator[tuple[str, Figure]]:
    """File name and figure of each of the curves."""
    curves = {name: run.metrics for name, run in zip(distinct_names(runs), runs, strict=True)}
    # A line that holds for one of two runs only would be read as holding for both.
    baselines = {run.baseline for run in runs}
    baseline = baselines.pop() if len(baselines) == 1 else None
    thresholds = {run.recipe.get("max_grad_norm") for run in runs}
    threshold = thresholds.pop() if len(thresholds) == 1 else None
    yield "loss_curve", draw_losses(curves, baseline=baseline)
    yield "learning_rate", draw_learning_rate_and_gradient_norm(curves, max_grad_norm=threshold)
    yield "throughput", draw_throughput(curves)


def distinct_names(runs: list[RunRecord]) -> list[str]:
    """Nothing for a single run; else names, or directories where two runs have the same name."""
    if len(runs) == 1:
        return [""]
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def write(pictures: Iterable[tuple[str, Figure]], output: Path) -> None:
    """Save each picture and print its path and its finding."""
    for name, figure in pictures:
        try:
            with warnings.catch_warnings():  # a token of a script that the font lacks is a box
                warnings.filterwarnings("ignore", message="Glyph .* missing from font")
                png, _ = save(figure, output / name)
        except OSError as error:
            raise UserError(f"--output {output} cannot be written: {error}") from None
        print(f"{png}  {finding(figure)}", flush=True)


def draw_insides(name: str, output: Path, *, prompt: str, heads: Heads | None) -> None:
    """Everything that one forward and one backward pass over `prompt` show."""
    model = load_causal_lm(name, option="RUN_OR_MODEL", dtype=torch.float32)
    tokenizer = find_tokenizer(name)
    ids = torch.tensor(tokenizer(prompt)["input_ids"])
    ids = ids[: min(MAX_PROMPT_TOKENS, model.config.n_positions)]
    if len(ids) < 2:
        raise UserError("--prompt must be at least two tokens long")
    check_heads(heads, model.config.n_layer, model.config.n_head)
    write(model_pictures(model, tokenizer, ids, heads), output)
    tokens = list(dict.fromkeys(ids.tolist()))[:NEIGHBOUR_TOKENS]
    neighbours = parameters.token_neighbours(model, tokens)
    table = parameters.neighbours_table(neighbours, tokens, tokenizer)
    path = output / "token_neighbours.md"
    path.write_text(table, encoding="utf-8")
    print(f"{path}  Nearest token embeddings, by cosine similarity\n\n{table}", end="")


def check_heads(heads: Heads | None, n_layer: int, n_head: int) -> None:
    for layer, head in heads or []:
        if not (0 <= layer < n_layer and 0 <= head < n_head):
            raise UserError(
                f"--heads {layer}.{head}: the model has layers 0 to {n_layer - 1} "
                f"with heads 0 to {n_head - 1}"
            )


def model_pictures(
    model: Any, tokenizer: Any, ids: torch.Tensor, heads: Heads | None
) -> Iterator[tuple[str, Figure]]:
    """File name and figure of each look inside, as it is drawn."""
    labels = token_labels(tokenizer, ids.tolist())
    attention = inspection.attention_maps(model, ids)
    habits = inspection.attention_habits(attention, ids.tolist())
    yield "attention_maps", inspection.draw_attention_maps(attention, habits)
    heads = heads or inspection.typical_heads(habits)
    yield (
        "attention_heads",
        inspection.draw_attention_heads(attention, habits, labels, heads),
    )
    lens = inspection.logit_lens(model, ids, min(LENS_POSITIONS, len(ids)))
    yield "logit_lens", inspection.draw_logit_lens(lens, labels[-LENS_POSITIONS:], tokenizer)
    similarity = parameters.position_similarity(model)
    yield "position_similarity", parameters.draw_position_similarity(similarity)
    samples = parameters.weight_samples(model)
    yield "weights", parameters.draw_weights(samples, model.config.initializer_range)
    norms = inspection.gradient_norms(model, ids)
    yield "gradient_norms", inspection.draw_gradient_norms(norms)
