"""The Markdown of a card: its sections, which are replaced by their titles, tables and code."""

import re
from collections.abc import Sequence

# Sections, as the template names them.
LOADING, TRAINING, BENCHMARKS = "How to load it", "Training", "Benchmarks"
PROVENANCE, VERIFICATION = "Provenance", "Verification"


def with_section(card: str, title: str, text: str, before: str | None = None) -> str:
    """Replace the text of the section `title`, or insert it `before` another or at the end."""
    section = f"## {title}\n\n{text}\n\n"
    if span := section_span(card, title):
        before_it, rest = card[: span[0]], card[span[1] :]
        while span := section_span(rest, title):  # there is one of a title
            rest = rest[: span[0]] + rest[span[1] :]
        card = before_it + section + rest
    elif before and (span := section_span(card, before)):
        card = card[: span[0]] + section + card[span[0] :]
    else:
        card = f"{card.rstrip()}\n\n{section}"
    return card.rstrip() + "\n"


def section_span(card: str, title: str) -> tuple[int, int] | None:
    """Where the section `title` begins and ends; a line in a fenced block is no heading."""
    opened, begin, here = "", None, 0
    for line in card.split("\n"):
        ticks = re.match("`+|~+|", line)[0]  # type: ignore[index]
        if opened:
            opened = "" if ticks.startswith(opened) and line.strip() == ticks else opened
        elif len(ticks) >= 3:
            opened = ticks
        elif line.startswith("## ") and begin is not None:
            return begin, here
        elif line == f"## {title}":
            begin = here
        here += len(line) + 1
    return None if begin is None else (begin, len(card))


def recipe_block(card: str) -> str | None:
    """The YAML of the run's recipe, if the card has one."""
    block = re.search(r"^(`{3,})yaml\n(.*?)\n\1$", card, re.M | re.S)
    return block[2] if block else None


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as the lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(text: str) -> str:
    """A bar would begin the next cell, a line end the next row."""
    return " ".join(text.replace("|", "/").split())


def code(text: str) -> str:
    """`text` as code within a line (CommonMark 6.1)."""
    return f"{fence(text)} {text} {fence(text)}" if "`" in text else f"`{text}`"


def fence(*texts: str) -> str:
    """Backticks for a block that holds the texts: more than any of them has in a row."""
    longest = max((len(run) for text in texts for run in re.findall("`+", text)), default=0)
    return "`" * max(3, longest + 1)
