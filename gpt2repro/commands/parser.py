"""How the verbs read their arguments: in one line each way, before anything large is imported."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gpt2repro import UserError
from gpt2repro.system import atomic
from gpt2repro.system.command_line import place, underscored

if TYPE_CHECKING:
    import torch

MOST_PROCESSES = 10**6

# What a user may call a torch dtype -> its name there.
DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` that answers bad arguments with one line instead of a page of usage.

    Options are declared with underscores, as recipe fields are spelled; hyphens mean the same.
    """

    def __init__(self, *args, **kwargs) -> None:
        kwargs.setdefault("allow_abbrev", False)  # an abbreviation today is an ambiguity tomorrow
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._declared(word) for word in args], namespace)

    def _declared(self, word: str) -> str:
        """The word as it is declared, if it is; else as it is, so that an error quotes the user."""
        option = underscored(word)
        return option if option.partition("=")[0] in self._option_string_actions else word

    def error(self, message: str) -> NoReturn:
        message = message if len(message) <= 300 else f"{message[:300]} ..."
        raise UserError(f"{message} (see `{self.prog} --help`)")


def recipe_parser(verb: str, description: str | None) -> OneLineParser:
    """A parser for a verb that takes a recipe: what it does not know is left to `load_recipe`."""
    return OneLineParser(
        prog=f"gpt2repro {verb}",
        description=description,
        epilog="Every other option is the recipe's: --recipe FILE and --FIELD VALUE; "
        "`train_accelerate.py --help` lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def named(text: str) -> str:
    """An argparse type: a file, a directory or something on the Hub, `~` expanded."""
    try:
        return place(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} ...: {error}") from None


def path(text: str) -> Path:
    """An argparse type: a file or directory, `~` expanded."""
    return Path(named(text))


def make_room(output: Path | None, option: str = "--output") -> None:
    """Find out before the work whether the file of an option can be written.

    Raises:
        UserError: it cannot.
    """
    if output is None:
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic.rehearse(output)
    except OSError as error:
        raise UserError(f"{option} {output}: {error}") from error


def find_device(name: str | None) -> "torch.device":
    """The device of `--device`, tried; without a name the GPU if there is one.

    Raises:
        UserError: there is none of that name, or it does not compute, as `meta`, or wrongly.
    """
    import torch

    from gpt2repro.system import machine

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # no such word, or no such device
        raise UserError(f"--device {name}: {str(error).splitlines()[0][:120]}") from None
    machine.check_torch(device)
    return device
