"""How the verbs read their arguments: in one line each way, before anything large is imported."""

import argparse
import sys
from typing import NoReturn

from gpt2repro import UserError
from gpt2repro.system.command_line import underscored

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
        raise UserError(f"{message} (see `{self.prog} --help`)")
