"""The verb `export`: write a run, a checkpoint or official files as a verified model.

    gpt2repro export --model runs/gpt2 --format gpt2 --output OUT

Two forms of the same tensors under the same names. `gpt2repro`, the native one, carries both model
files as remote code. `gpt2` has a stock configuration instead, for tools that run no remote code.
"""

import sys
from argparse import Namespace
from pathlib import Path

from gpt2repro.commands.parser import DTYPES, OneLineParser, named, path
from gpt2repro.system.text import printable


def main(argv: list[str]) -> int:
    """`gpt2repro export --model DIR --format gpt2|gpt2repro --output OUT`."""
    options = _parse(argv)
    import torch

    from gpt2repro.publishing.card import model_card
    from gpt2repro.publishing.export import MAX_SHARD_SIZE, export
    from gpt2repro.publishing.licence import licence_of
    from gpt2repro.records.saved_models import find_tokenizer, load_causal_lm, locate

    source = locate(options.model)  # once: both are of one model, also of a run that goes on
    card, figures = _beside(Path(source))
    name = options.output.resolve().name
    verification = export(
        load_causal_lm(source),
        find_tokenizer(source, options.tokenizer),
        options.output,
        format=options.format,
        dtype=getattr(torch, DTYPES[options.dtype]) if options.dtype else None,
        max_shard_size=options.max_shard_size or MAX_SHARD_SIZE,
        card=card or model_card(name=name, licence=licence_of(source, "--model")),
        figures=figures,
    )
    print(f"{options.output}: verified")
    for line in verification.lines():
        print(f"  {line}")
    return 0


def _beside(source: Path) -> tuple[str | None, list[Path]]:
    """Card, and pictures and LICENSE, of the model's directory; links lead who knows where.

    The Hub's cache consists of links: a model is read from there, what describes it is left out.
    """
    from gpt2repro.publishing.contents import EDITABLE

    card, figures = source / "README.md", [*sorted(source.glob("*.png")), source / "LICENSE"]
    odd = [path for path in figures if not EDITABLE.fullmatch(path.name)]
    linked = [path for path in (card, *figures) if path.is_symlink()]
    for why, paths in (("symbolic links", linked), ("pictures of other names than a-b_c.png", odd)):
        if paths:
            names = printable(", ".join(path.name for path in paths))
            print(f"gpt2repro export: left out, as {why}: {names}", file=sys.stderr)
    text = card.read_text("utf-8", "replace") if card.is_file() and card not in linked else None
    return text, [figure for figure in figures if figure not in (*linked, *odd)]


def _parse(argv: list[str]) -> Namespace:
    parser = OneLineParser(prog="gpt2repro export", description=__doc__)
    add = parser.add_argument
    add(
        "--model",
        type=named,
        required=True,
        help="a run, an export, a checkpoint, a GPT-2 directory or Hub id",
    )
    add("--output", required=True, type=path, help="directory to write")
    add("--format", choices=("gpt2repro", "gpt2"), default="gpt2repro")
    add("--dtype", choices=DTYPES, help="of the tensors (default: as they are)")
    add("--max_shard_size", help="split larger models (default 5GB)")
    add("--tokenizer", type=named, help="Hub id or directory (default: the model's own)")
    return parser.parse_args(argv)
