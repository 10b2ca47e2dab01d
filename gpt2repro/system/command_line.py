"""What every command line here shares: errors are one line on stderr, and the exit status is 2."""

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2repro import UserError
from gpt2repro.system.text import printable

EXIT_FAILED, EXIT_USAGE = 1, 2
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
RANK_0_SPEAKS_FIRST_SECONDS = 5.0
SIGN_OF_LIFE_SECONDS = 1.0


def underscored(word: str) -> str:
    """`--top-k=5` as `--top_k=5`: in an option's name hyphens and underscores mean the same."""
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return word
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def place(name: str) -> str:
    """What a user calls a file, a directory or a thing on the Hub, `~` expanded.

    Raises:
        ValueError: no file can be called so: it is too long, or holds a zero byte.
    """
    path = os.path.expanduser(name)  # noqa: PTH111 (`Path` makes hf:/ of hf://)
    try:
        os.lstat(path)
    except OSError as error:  # most names may be given to what is not there yet
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError("too long for a file's name") from None
    return path


def run(
    prog: str, main: Callable[[list[str]], int], argv: list[str], *, outlives_readers: bool = False
) -> int:
    """Call `main(argv)` and return its exit status; see `in_one_line` for errors.

    What a terminal has no letters for is spelled out. A reader that goes away, as `| head` does,
    ends a verb, and not what is here for more than to be read.
    """
    logging.setLogRecordFactory(_printable_record)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started this has closed it
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        if outlives_readers:
            setattr(sys, name, LastingStream(stream))
    try:
        status = main(argv)
    except BrokenPipeError:  # `... | head` has seen enough
        _take_no_more()
        return 0
    except BaseException as error:
        if (expected := in_one_line(error)) is None:
            if _skips_exit_handlers.is_set():
                sys.excepthook(type(error), error, error.__traceback__)
                os._exit(EXIT_FAILED)
            raise
        status, said = expected
        if status == EXIT_USAGE:
            let_rank_0_speak()
        print(f"{prog}: {said}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _take_no_more()
    except OSError as error:
        _take_no_more()
        if not status:  # else it is told
            status = EXIT_USAGE
            print(f"{prog}: error: {error}", file=sys.stderr)
    if _skips_exit_handlers.is_set():
        os._exit(status)
    return status


def _printable_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """Of this package or of a library: it may tell names and texts of somebody's files."""
    record = logging.LogRecord(*args, **kwargs)
    with contextlib.suppress(Exception):  # of a line that logging will complain about, and go on
        record.msg, record.args = printable(record.getMessage()), None
        if record.exc_info and record.exc_info[0]:
            record.exc_text = printable(logging.Formatter().formatException(record.exc_info))
    return record


_skips_exit_handlers = threading.Event()


def end_without_exit_handlers() -> None:
    """Let `run` end the process itself: a library's exit handler would wait for what hangs.

    Temporary directories stay, too.
    """
    _skips_exit_handlers.set()


def _take_no_more() -> None:
    """Lose what is left to write: at the end the interpreter would fail by it once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class LastingStream:
    """A text stream that outlives its reader: what nobody takes any more is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno not in FULL_DISK:  # a reader does not come back: no buffer would empty
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(text: str) -> None:
    """A line at once, from the main process alone: what takes a while begins."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


_a_bar_is_shown = threading.Event()


@contextmanager
def bar_is_shown() -> Iterator[None]:
    """While a bar tells how far a block is, no seconds are counted over it."""
    _a_bar_is_shown.set()
    try:
        yield
    finally:
        _a_bar_is_shown.clear()


@contextmanager
def underway(text: str, *, in_logs: bool = False) -> Iterator[None]:
    """`say` what the block does; on a terminal its seconds are counted below, as a sign of life.

    A log has no use for that, nor, but for `in_logs`, for the line.
    """
    watched = sys.stdout.isatty()
    if watched or in_logs:
        say(text)
    if not watched or os.environ.get("RANK", "0") != "0":
        yield
        return
    done = threading.Event()

    def count() -> None:
        began = time.monotonic()
        while not done.wait(SIGN_OF_LIFE_SECONDS):
            # The cursor returns: whatever is printed next takes the place.
            if not _a_bar_is_shown.is_set():
                print(f"  {time.monotonic() - began:.0f} s", end="\r", flush=True)

    counter = threading.Thread(target=count, name="seconds", daemon=True)
    counter.start()
    try:
        yield
    finally:
        done.set()
        counter.join()
        print(" " * 8, end="\r", flush=True)


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
    remedy = ""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        remedy = ": free space there, or write to another disk; the same command goes on"
    elif not isinstance(error, UserError):
        return None
    return EXIT_USAGE, f"error: {printable(' '.join(str(error).split()))}{remedy}"
