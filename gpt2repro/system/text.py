"""Text from elsewhere, made fit to be shown: file names, answers of servers, a model's words."""

import re

# Controls but tab and line end, among them ESC, with which a terminal can be made to do things;
# line ends that only some programs know; marks that reorder what is read; bytes that are no UTF-8.
UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    r"|\r(?!\n)"
)


def printable(text: str) -> str:
    r"""`text` with what is no text in it spelled out: ESC is `\x1b`. Tabs and line ends stay."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
