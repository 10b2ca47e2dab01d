"""Files and directories that are there whole or not at all.

Each is written under another name beside its place, on the same disk, and renamed: a reader, or a
run that goes on after a crash, never meets half of one. A rename may reach the disk before the data
it names; what must survive a power failure is flushed first (`durable`, fsync(2)).
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gpt2repro.system.text import printable


@contextlib.contextmanager
def new_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A name to write to; when the block ends, that file takes the place of `path`.

    Several writers do not disturb each other: the last one's file stays. If the block raises,
    `path` is as it was.
    """
    scratch = _scratch_of(path)
    try:
        with naming(path):
            yield scratch
            if durable:
                flush(scratch)
            scratch.replace(path)
            if durable:
                flush(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def rehearse(path: Path) -> None:
    """Raise the OSError that `new_file` would meet at `path`; nothing is left there."""
    with naming(path):
        if path.exists() and not path.is_file():  # nor is /dev/null a file to replace
            raise OSError(errno.EINVAL, "not a regular file")
        scratch = _scratch_of(path)
        scratch.touch()
        scratch.unlink()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the disk name `path`: those of writing name no file, those of `scratch` another."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def leftovers(path: Path) -> list[Path]:
    """What writers of the file `path` left that were killed, or still write."""
    return list(path.parent.glob(f"{glob.escape(_begin_of_scratch(path))}*"))


def _scratch_of(path: Path) -> Path:
    """A name beside `path` that no other writer has."""
    return path.with_name(f"{_begin_of_scratch(path)}{os.getpid()}.{uuid.uuid4().hex}")


def _begin_of_scratch(path: Path) -> str:
    """What the scratch names of `path` have in common, short enough for the rest of one."""
    return f".{os.fsdecode(os.fsencode(path.name)[:200])}."


def partial(path: Path) -> Path:
    """A new empty directory `.NAME.partial` beside `path`, for `move_into_place`.

    There is one such name, so that what a killed writer left is found again, and removed here.
    """
    scratch = path.absolute().with_name(f".{path.absolute().name}.partial")
    remove(scratch)
    scratch.mkdir(parents=True)
    return scratch


@contextlib.contextmanager
def own_partial(path: Path) -> Iterator[Path]:
    """As `partial`, of a name that no other writer of `path` has; gone when the block ends.

    What a killed writer left goes too. Whether one still writes, its lock tells, which the kernel
    ends with it; where nothing can be locked, such directories are told and stay.
    """
    path = path.absolute()
    ours = re.compile(rf"\.{re.escape(path.name)}(\.[0-9a-f]{{32}})?\.partial")
    for left in [each for each in path.parent.glob(".*.partial") if ours.fullmatch(each.name)]:
        try:
            with _locked(left):
                remove(left)
        except OSError as error:
            said = f"{left} stays: somebody still writes it, or was killed ({error.strerror})"
            print(printable(said), file=sys.stderr)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    scratch.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.callback(remove, scratch)
        with contextlib.suppress(OSError):
            stack.enter_context(_locked(scratch))
        yield scratch


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory. Raises OSError: somebody else does, or there are none."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def move_into_place(scratch: Path, path: Path) -> None:
    """Flush the directory `scratch` and name it `path`; one that had the name goes afterwards.

    Killed in between, one of the two exists whole: the earlier one as `.NAME.previous`.

    Raises:
        OSError: then the earlier one has its name.
    """
    for each in [*scratch.rglob("*"), scratch]:
        flush(each)
    previous = path.absolute().with_name(f".{path.absolute().name}.previous")
    if path.exists() or path.is_symlink():
        remove(previous)  # else it is the only copy
        path.rename(previous)
    try:
        scratch.rename(path)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            previous.rename(path)
        raise
    flush(path.absolute().parent)
    with contextlib.suppress(PermissionError):  # somebody else's, which that one lay in before
        flush(path.absolute().parent.parent)  # where that one may be as new
    with contextlib.suppress(OSError):
        remove(previous)


def is_at(file: IO[Any], path: Path) -> bool:
    """Whether the open `file` is the one that `path` names now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # ESTALE: another client has replaced it
            return False
        raise


def is_another(now: os.stat_result, found: os.stat_result) -> bool:
    """Whether a file or directory has been put in the place of the one that was `found` there.

    That differs in both: somebody may touch one, and some file systems number it anew.
    """
    return now.st_ino != found.st_ino and now.st_mtime_ns != found.st_mtime_ns


def let_umask_decide(path: Path) -> None:
    """Give a file the mode of a new one: safetensors makes its files for their owner alone."""
    new = _scratch_of(path)
    new.touch()
    try:
        with contextlib.suppress(PermissionError):  # where the file system itself decides
            path.chmod(new.stat().st_mode)
    finally:
        new.unlink()


def link(path: Path, place: Path) -> None:
    """Let `place` be the file `path` too, at no cost where the file system has hard links."""
    try:
        os.link(path, place)
    except OSError:
        shutil.copy(path, place)


def remove(directory: Path) -> None:
    """Remove a directory if it is there; of a symbolic link to one, the link alone."""
    if directory.is_symlink():
        directory.unlink()
    elif directory.is_dir():
        shutil.rmtree(directory)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """fsync a file; or a directory, where the file system does that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
