"""What every command line here shares: errors are one line on stderr, and the exit status is 2."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable

from gpt2repro import UserError

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
    """Call `main(argv)` and return its exit status.

    A `UserError`, and a disk that takes nothing more, become one line and status 2.
    """
    try:
        return main(argv)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in FULL_DISK:
            raise
        if os.environ.get("RANK", "0") != "0":
            # Usually all have the same to say: rank 0 speaks, and the launcher ends the others.
            time.sleep(RANK_0_SPEAKS_FIRST_SECONDS)
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
