"""The verb `verify`: is a published chain of checkpoints what its run made?

    gpt2repro verify me/run
    gpt2repro verify me/run --revision step00000512
    gpt2repro verify me/run --data [--FIELD VALUE ...]

Every branch is looked at on the Hub: its name, the SHA-256 of its files, its card, that no two hold
the same weights, all the same configuration, tokenizer and code, and that each leads to the one
before. --data also reads the rows again that the card's recipe gives; fields replace the recipe's,
such as the place of a dataset that is a directory (the repository goes first).
"""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.commands.rows import CACHES
from gpt2repro.publishing.card_markdown import recipe_block
from gpt2repro.recipe import load_recipe, parse_arguments
from gpt2repro.recipe_fields import Recipe
from gpt2repro.system.text import printable

if TYPE_CHECKING:
    from gpt2repro.publishing.chain import Problems, Published

PROVED = """\
Weights, rows and cards are those of the records, which name each other. Configuration, tokenizer
and code, which no record names, are those of SHA256SUMS, and alike where one code trained. Training
state, which no record names either, is that of its own COMPLETE."""


def main(argv: list[str]) -> int:
    """Print a line for each branch; exit status 1 if something is wrong."""
    options, fields = _parse(argv)
    from gpt2repro.publishing.chain import find_problems, read_branches

    branches = read_branches(options.repo, options.revision)
    problems = find_problems(branches, whole=options.revision is None)
    asked = branches if options.revision is None else {options.revision: None}
    if options.data and not any(problems.values()):
        _compare_with_data([branches[name] for name in asked], fields, problems)
    for name in sorted({*asked, *problems}, key=lambda name: (name == "main", name)):
        record = branches[name].record if name in branches else None
        for problem in problems[name]:
            print(printable(f"{name:<14} {problem}"))
        if record and not problems[name]:
            weights = ", ".join(sha256[:16] for sha256 in record.weights.values())
            said = f"step {record.step:,}, {record.tokens:,} tokens, weights {weights} ..."
            print(printable(f"{name:<14} right: {said}"))
    wrong = sum(map(bool, problems.values()))
    print(f"\n{wrong} of them wrong." if wrong else f"\n{PROVED}")
    return 1 if wrong else 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OneLineParser(
        prog="gpt2repro verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repo", help="user/name on the Hub")
    parser.add_argument("--revision", help="one branch, such as step00000512, instead of all")
    parser.add_argument("--data", action="store_true", help="read the rows of its steps again")
    if "--data" not in argv:
        return parser.parse_args(argv), []
    options, fields = parser.parse_known_args(argv)
    load_recipe(fields)  # a mistake in them is answered before anything is asked for
    return options, fields


def _recipe_of(card: str, fields: list[str]) -> Recipe:
    """The recipe in a card, with `fields` instead of its own."""
    block = recipe_block(card)
    if block is None:
        raise UserError("--data: the card has no recipe")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "card.yaml"
        here = dict.fromkeys(CACHES)  # are of another machine
        try:
            given = parse_arguments(fields)
            if Path(str(given.get("dataset_name", ""))).expanduser().exists():
                here["dataset_config"] = None  # a copy on this machine has none
            values = {**yaml.safe_load(block), **here, **given}
            file.write_text(yaml.safe_dump(values), encoding="utf-8")
            return load_recipe(["--recipe", str(file)])
        except (yaml.YAMLError, TypeError) as error:
            said = " ".join(str(error).split())
            raise UserError(f"--data: the card's recipe cannot be read: {said}") from None
        except UserError as error:
            said = str(error).replace(f"{file}: ", "")
            raise UserError(f"--data: the card's recipe: {said}") from None


def _compare_with_data(
    branches: "list[Published]", fields: list[str], problems: "Problems"
) -> None:
    """Read the rows again, from the first on, as far as a branch tells of them."""
    from gpt2repro.commands.rows import Reader
    from gpt2repro.records.provenance import NO_ROWS, with_step
    from gpt2repro.training.progress import phase

    recipe = _recipe_of(branches[-1].card, fields)
    records = {branch.name: branch.record for branch in branches if branch.record}
    last = max(record.step for record in records.values())
    # A chain that began after the first step may not know the rows before.
    begins = [record.begin for record in records.values()]
    unknown = max(begin.step * (begin.rows_digest == NO_ROWS) for begin in begins)
    reader = Reader(recipe, is_decided=True)
    rows, so_far = [], [NO_ROWS]
    try:
        with phase("reading the rows again", last, enabled=True) as on_step:
            for step in range(last):
                if step == unknown:
                    so_far[step] = NO_ROWS
                rows.append(f"{reader.take().digest:016x}")
                so_far.append(with_step(so_far[-1], step, rows[-1]))
                on_step(1)
    finally:
        reader.stream.close()
    for name, record in records.items():
        pairs = enumerate(record.digests, record.begin.step)
        others = [step for step, digest in pairs if digest != rows[step]]
        if others:
            problems[name].append(f"was not trained on what the recipe gives at step {others[0]}")
        elif so_far[record.begin.step] != record.begin.rows_digest:
            problems[name].append(f"the recipe gives other rows before step {record.begin.step}")
        if record.tokens != recipe.tokens_before(record.step):
            problems[name].append(f"says {record.tokens:,} tokens, not what the recipe has")
