"""`gpt2repro plots`: look at a run's curves and inside its model.

Every picture is written as PNG and as SVG, and its title says what there is to see.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser, named
from gpt2repro.system import atomic

# Tokens repeat in it, so that heads that look for repetition have something to find.
PROMPT = "The first argument is the name of the file, and the second argument is the name of the"
MAX_PROMPT_TOKENS = 40  # as many labels as fit on an axis
NEIGHBOUR_TOKENS = 10

Heads = list[tuple[int, int]]  # (layer, head)


def main(argv: list[str]) -> int:
    """`gpt2repro plots RUN_OR_MODEL [--compare RUN2]`: draw, and print each file's finding."""
    arguments = _parse(argv)
    from gpt2repro.plots.gallery import overlaid, read_run, run_pictures

    write_page = _page_writer() if arguments.html else None
    names = [name for name in (arguments.run_or_model, arguments.compare) if name]
    records = [found for found in map(read_run, names) if found]
    if arguments.compare and len(records) < 2:
        raise UserError(f"--compare overlays two runs; one of {names} holds no metrics.jsonl")
    output = Path(arguments.output or _default_output(arguments, bool(records)))
    pictures: dict[str, Any] = {}
    runs, neighbours = None, ""
    if records:
        runs = overlaid(records)
        if not runs.of_one_text:
            print("The runs validate on different texts: those losses are left out")
        pictures |= _write(run_pictures(runs), output)
    source = None if arguments.compare else _model_of(arguments.run_or_model)
    if source:
        insides, neighbours = _draw_insides(
            source, output, arguments.tokenizer, prompt=arguments.prompt, heads=arguments.heads
        )
        pictures |= insides
    elif not arguments.compare:
        print(f"{arguments.run_or_model} holds no model yet: its insides are left out")
    if write_page:
        facts = [] if arguments.compare else _facts(records, source)
        with _writing_to(output):
            write_page(
                output / "page.html",
                title=" and ".join(record.name for record in records) or arguments.run_or_model,
                facts=facts,
                runs=runs,
                pictures=pictures,
                neighbours=neighbours,
            )
        print(f"{output / 'page.html'}  All of it on one page, which needs no other file")
    return 0


def _page_writer() -> Any:
    try:
        from gpt2repro.plots.page import write_page
    except ModuleNotFoundError as error:
        raise UserError(f"--html needs {error.name}: `pip install bokeh`") from None
    return write_page


def _facts(records: list[Any], source: str | None) -> list[tuple[str, str]]:
    """What the card says of the training: the model's own, or of a run so far."""
    from gpt2repro.publishing.card import facts, model_card
    from gpt2repro.publishing.redaction import redacted
    from gpt2repro.recipe_fields import FIELDS

    # The checkpoints of a run, which has not ended or was made longer, have no card.
    if source and (readme := Path(source) / "README.md").is_file():
        return facts(redacted(readme.read_text("utf-8", "replace")))
    for record in records:
        if FIELDS.keys() <= record.recipe.keys():  # else of another version, or edited
            card = model_card(name=record.name, recipe=record.recipe, metrics=record.metrics)
            return facts(redacted(card))
    return []


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="gpt2repro plots", description="Look inside a run or a model.")
    parser.add_argument(
        "run_or_model", type=named, metavar="RUN_OR_MODEL", help="run or model directory, or Hub id"
    )
    add = parser.add_argument
    add("--output", type=named, metavar="DIR", help="default: RUN/plots, else plots/MODEL")
    add("--tokenizer", type=named, help="Hub id or directory (default: the model's)")
    parser.add_argument("--prompt", help=f"text that the model reads (default: {PROMPT!r})")
    parser.add_argument(
        "--heads", type=_heads, metavar="L.H,...", help="attention heads drawn large, e.g. 0.3,5.1"
    )
    parser.add_argument(
        "--compare", type=named, metavar="RUN2", help="overlay the curves of two runs instead"
    )
    parser.add_argument(
        "--html", action="store_true", help="also all of it on one page, DIR/page.html"
    )
    arguments = parser.parse_args(argv)
    for option in ("prompt", "heads", "tokenizer"):
        if arguments.compare and getattr(arguments, option) is not None:
            raise UserError(f"--{option}: with --compare no model is looked into; leave it out")
    arguments.prompt = PROMPT if arguments.prompt is None else arguments.prompt
    return arguments


def _heads(text: str) -> Heads:
    """`0.3,5.1` -> [(0, 3), (5, 1)], for argparse."""
    if not re.fullmatch(r"\d+\.\d+(,\d+\.\d+)*", text):
        raise argparse.ArgumentTypeError(f"heads are given as LAYER.HEAD,..., not {text!r}")
    places = (place.split(".") for place in text.split(","))
    return [(int(layer), int(head)) for layer, head in places]


def _default_output(arguments: argparse.Namespace, is_run: bool) -> Path:
    from gpt2repro.records.run_directory import run_of

    name = Path(arguments.run_or_model)
    if not is_run:  # every run has a final/
        model = name.resolve()
        runs = [r for r in (model.parent, run_of(model)) if (r / "recipe.yaml").is_file()]
        return Path("plots") / "-".join([*(run.name for run in runs[:1]), model.name])
    return name / "plots" / (f"against-{Path(arguments.compare).name}" if arguments.compare else "")


def _model_of(name: str) -> str | None:
    """Where the model of `name` is: as it is, or a run's newest checkpoint until it is finished."""
    from gpt2repro.records.saved_models import locate

    if not (Path(name) / "metrics.jsonl").is_file():
        return locate(name, "RUN_OR_MODEL")
    with suppress(UserError):
        return locate(name)
    return None


@contextmanager
def _writing_to(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error}") from None


def _write(pictures: Iterable[tuple[str, Any]], output: Path) -> dict[str, Any]:
    """Save each picture, print its path and its finding, and return them by name."""
    from gpt2repro.plots.style import finding, save

    drawn = {}
    for name, figure in pictures:
        with _writing_to(output):
            png, _ = save(figure, output / name)
        print(f"{png}  {finding(figure)}", flush=True)
        drawn[name] = figure
    return drawn


def _draw_insides(
    name: str, output: Path, tokenizer_name: str | None, *, prompt: str, heads: Heads | None
) -> tuple[dict[str, Any], str]:
    """Everything that a model shows while it reads `prompt`: pictures, and a table of tokens."""
    import torch

    from gpt2repro.data.tokens.token_ids import ids_to_continue
    from gpt2repro.plots import parameters
    from gpt2repro.plots.gallery import Reading, model_pictures
    from gpt2repro.records.saved_models import check_ids, find_tokenizer, load_causal_lm

    model = load_causal_lm(name, option="RUN_OR_MODEL", dtype=torch.float32)
    if broken := [name for name, each in model.named_parameters() if not each.isfinite().all()]:
        raise UserError(f"RUN_OR_MODEL: {len(broken)} tensors are not finite, such as {broken[0]}")
    tokenizer = find_tokenizer(name, tokenizer_name, option="RUN_OR_MODEL")
    ids = torch.tensor(ids_to_continue(tokenizer, [prompt])[0])
    check_ids(ids.tolist(), model)
    ids = ids[: min(MAX_PROMPT_TOKENS, model.config.n_positions)]
    if len(ids) < 2:
        raise UserError("--prompt must be at least two tokens long")
    with torch.no_grad():
        if not model(ids[None], use_cache=False).logits.isfinite().all():
            raise UserError("RUN_OR_MODEL: what it computes of this --prompt is not finite")
    _check_heads(heads, model.config.n_layer, model.config.n_head)
    pictures = _write(model_pictures(Reading(model, tokenizer, ids, heads)), output)
    tokens = list(dict.fromkeys(ids.tolist()))[:NEIGHBOUR_TOKENS]
    neighbours = parameters.token_neighbours(model, tokens)
    table = parameters.neighbours_table(neighbours, tokens, tokenizer)
    path = output / "token_neighbours.md"
    with _writing_to(output), atomic.new_file(path) as scratch:
        scratch.write_text(table, encoding="utf-8")
    print(f"{path}  Nearest token embeddings, by cosine similarity\n\n{table}", end="")
    return pictures, table


def _check_heads(heads: Heads | None, n_layer: int, n_head: int) -> None:
    for layer, head in heads or []:
        if not (0 <= layer < n_layer and 0 <= head < n_head):
            raise UserError(
                f"--heads {layer}.{head}: the model has layers 0 to {n_layer - 1} "
                f"with heads 0 to {n_head - 1}"
            )
