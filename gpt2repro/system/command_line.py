"""What every command line here shares: errors are one line on stderr, and the exit status is 2."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable

from gpt2repro import UserError
from gpt2repro.system.text import printable

EXIT_USAGE = 2
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
RANK_0_SPEAKS_FIRST_SECONDS = 5.0


def underscored(word: str) -> str:
    """`--top-k=5` as `--top_k=5`: in an option's name hyphens and underscores mean the same."""
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return word
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def run(prog: str, main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Call `main(argv)` and return its exit status; see `in_one_line` for errors."""
    try:
        return main(argv)
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        if (expected := in_one_line(error)) is None:
            raise
        status, said = expected
        if status == EXIT_USAGE:
            let_rank_0_speak()
        print(f"{prog}: {said}", file=sys.stderr)
        return status


def let_rank_0_speak() -> None:
    """Usually all ranks have the same to say: rank 0 says it, and the launcher ends the others."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(RANK_0_SPEAKS_FIRST_SECONDS)


def in_one_line(error: BaseException) -> tuple[int, str] | None:
    """Exit status and line for an error that needs no traceback; None for one that does.

    130 for Ctrl-C; 2 for what the user has to mend: a `UserError`, a disk that takes nothing more.
    """
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    full_disk = isinstance(error, OSError) and error.errno in FULL_DISK
    if full_disk or isinstance(error, UserError):
        return EXIT_USAGE, f"error: {printable(' '.join(str(error).split()))}"
    return None
