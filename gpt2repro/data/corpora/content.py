"""What local files hold, as a hash of all of it: a file that changed is another file.

Hashing 100 GB takes minutes. So what was found is kept in the user's cache, with all that the
system tells about a file, and one process of a machine does it while the others wait for its
record. A cache that cannot be used costs the time.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from gpt2repro.data.corpora.corpus import in_a_line
from gpt2repro.system import atomic
from gpt2repro.system.threads import DaemonPool

logger = logging.getLogger(__name__)

NUM_RECORDS = 10_000  # the newest are kept, and all of a dataset that has more
NUM_THREADS = 8
AT_A_TIME = 64  # files, until what was found is recorded
WORTH_A_LINE_BYTES = 2 * 10**9  # a second or two of hashing
SETTLED_SECONDS = 2  # times are coarse: a younger file could change again and keep them


def cache_directory() -> Path:
    """Where this package may keep what it can make again; it need not exist.

    Raises:
        RuntimeError: this user has no home, and XDG_CACHE_HOME is not set.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2repro"


@contextlib.contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Other processes of this machine wait here for each other; not where nothing can be locked."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(lock.open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("waiting for another process, which holds %s", lock)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def content_hashes(files: list[str], option: str = "dataset_name") -> list[str]:
    """BLAKE2b of each file, in hexadecimal.

    Raises:
        UserError: one cannot be read, or changes meanwhile.
    """
    with in_a_line(option):
        keys = {file: _key(file) for file in map(Path, files)}
        try:
            records = cache_directory() / "content.json"
        except RuntimeError:
            _tell(keys)
            return _hash_all(keys)
        known = _read(records)
        if not known.keys() >= set(keys.values()):
            with one_at_a_time(records.with_suffix(".lock")):
                known = kept = _read(records)
                new = [(file, key) for file, key in keys.items() if key not in known]
                _tell(file for file, _ in new)
                # Some at a time: who stops an hour of it has that hour's hashes.
                for some in (dict(new[n : n + AT_A_TIME]) for n in range(0, len(new), AT_A_TIME)):
                    found = dict(zip(some.values(), _hash_all(some), strict=True))
                    settled = time.time() - SETTLED_SECONDS
                    keep = {some[file] for file in some if file.stat().st_ctime < settled}
                    known, kept = known | found, kept | {key: found[key] for key in keep}
                    others = dict(kept)
                    ours = {key: others.pop(key) for key in keys.values() if key in others}
                    _write(records, others | ours, most=max(NUM_RECORDS, len(ours)))
        return [known[keys[file]] for file in map(Path, files)]


def stamps(files: list[str]) -> list[str]:
    """What tells of each file that it is as it was, without reading it."""
    with in_a_line("dataset_name"):
        return [_key(Path(file)) for file in files]


def _key(file: Path) -> str:
    """What cannot stay the same when the content changes, but for a moment after a change."""
    stat = file.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino} {file.resolve()}"


def _tell(files: Iterable[Path]) -> None:
    num_bytes = sum(file.stat().st_size for file in files)
    if num_bytes > WORTH_A_LINE_BYTES:
        logger.warning("hashing %.0f GB of local files, once", num_bytes / 1e9)


def _hash_all(keys: dict[Path, str]) -> list[str]:
    pool = DaemonPool(min(NUM_THREADS, len(keys)), "hasher")
    try:
        return pool.map(lambda each: _hash(*each), keys.items())
    finally:
        pool.close(0)


def _hash(file: Path, key: str) -> str:
    found = _digest(file)
    # Some file systems (sshfs, gluster) tell another ctime or inode for what stayed as it was.
    now = _key(file)
    if now != key and (now.split()[:2] != key.split()[:2] or _digest(file) != found):
        raise OSError(f"{file} changed while it was read")
    return found


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _read(records: Path) -> dict[str, str]:
    try:
        known = json.loads(records.read_bytes())
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _write(records: Path, known: dict[str, str], most: int) -> None:
    newest = dict(list(known.items())[-most:])
    with contextlib.suppress(OSError), atomic.new_file(records) as scratch:
        scratch.write_text(json.dumps(newest), encoding="utf-8")
