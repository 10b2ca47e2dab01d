"""What every command line here shares: errors are one line on stderr, and the exit status is 2."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from gpt2repro import UserError

EXIT_USAGE = 2


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` that answers bad arguments with one line instead of a page of usage."""

    def __init__(self, *args, **kwargs) -> None:
        kwargs.setdefault("allow_abbrev", False)  # an abbreviation today is an ambiguity tomorrow
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def run(prog: str, main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Call `main(argv)` and return its exit status; a `UserError` becomes one line and status 2."""
    try:
        return main(argv)
    except UserError as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
