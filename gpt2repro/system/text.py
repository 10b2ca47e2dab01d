"""Text from elsewhere, made fit to be shown: file names, answers of servers, a model's words."""

import re
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

# Controls but tab and line end, among them ESC, with which a terminal can be made to do things;
# line ends that only some programs know; marks that reorder what is read; bytes that are no UTF-8;
# what is no character in XML.
UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
    r"\ufffe\uffff]|\r(?!\n)"
)


def printable(text: str) -> str:
    r"""`text` with what is no text in it spelled out: ESC is `\x1b`. Tabs and line ends stay."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def folded(text: str, indent: int = 2) -> str:
    """`text` on lines that fit the terminal, the later ones indented; as it is in a file."""
    if not sys.stdout.isatty():
        return text
    width = max(40, shutil.get_terminal_size().columns - 1)
    wrapper = textwrap.TextWrapper(
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
    return "\n".join(map(wrapper.fill, text.split("\n")))


def count_of(number: int, thing: str) -> str:
    """`1 process`, `2 processes`, `4 micro-batches`, `1,024 rows`."""
    plural = "es" if thing.endswith(("s", "ch")) else "s"
    return f"{number:,} {thing}{'' if number == 1 else plural}"


def in_short(number: int) -> str:
    """1_228_800 -> 1.2 M, 512 -> 512: as few digits as say it."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= 0.99995 * size:  # what is less would not round to it
            return f"{number / size:,.1f} {letter}"
    return f"{number:,}"


def wrong_fields(error: "ValidationError", most: int | None = None) -> str:
    """Which fields are wrong and why, or the first `most` of them, in a line."""
    return "; ".join(
        f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:most]
    )
