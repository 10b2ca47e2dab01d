"""What every unit held when it was first read, so that a later pass notices another text.

One file for each dataset: a line for each unit, its number and BLAKE2b of its documents. Processes
append lines, each in one write; a line that was cut off counts as missing.
"""

import hashlib
import logging
import re
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpt2repro import UserError
from gpt2repro.data.corpora.corpus import Corpus, digest

logger = logging.getLogger(__name__)

LINE = re.compile(rb"^(\d+) ([0-9a-f]{32})$", re.MULTILINE)


class UnitDigests:
    """The digests of a dataset's units in a directory, recorded and compared."""

    def __init__(self, directory: Path, corpus: Corpus) -> None:
        # What the Hub lists for a commit is no part of its name: it is among what may change.
        of_hub = {"content"} if corpus.identity.get("revision") else set()
        identity = {k: v for k, v in corpus.identity.items() if k not in of_hub}
        self._corpus, self._lock, self._writable = corpus, threading.Lock(), True
        self._path = directory / f"{digest(sorted(identity.items()))}.units"
        self._known: dict[int, str] = {}
        self._num_read = 0  # bytes of the file
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+", buffering=0) as file:
                if file.tell() and not self._path.read_bytes().endswith(b"\n"):
                    file.write(b"\n")  # after a line that was cut off
            self._read_on()
        except OSError as error:
            raise UserError(f"unit_digests_dir: cannot use {directory}: {error}") from error

    def _read_on(self) -> None:
        """What was appended since, by any process; of a unit the first line counts."""
        with self._path.open("rb") as file:
            file.seek(self._num_read)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._num_read += len(whole)
        for unit, found in LINE.findall(whole):
            self._known.setdefault(int(unit), found.decode())

    def check(self, unit_index: int, documents: pa.LargeStringArray) -> None:
        """Record what the unit holds, or compare it with what it held.

        Raises:
            UserError: it held something else.
        """
        found = digest_of(documents)
        with self._lock:
            known = self._known.get(unit_index) or self._record(unit_index, found)
        if known != found:
            raise UserError(
                f"dataset_name: {self._corpus.where(unit_index)} holds another text than when it "
                f"was first read ({found}, not {known}, as {self._path} has it); if it is meant "
                "to, give another unit_digests_dir"
            )

    def _record(self, unit_index: int, found: str) -> str:
        """What is known of a unit now. A full disk costs the record, not the run."""
        if not self._writable:
            return found
        try:
            self._read_on()
            if unit_index not in self._known:
                with self._path.open("ab", buffering=0) as file:
                    # The line's end first: another's may have been cut off by a full disk.
                    file.write(f"\n{unit_index} {found}\n".encode())
                self._read_on()
        except OSError as error:
            self._writable = False
            logger.warning("unit_digests_dir: cannot write (%s); going on without", error)
        return self._known.get(unit_index, found)


def digest_of(documents: pa.LargeStringArray) -> str:
    """BLAKE2b of the lengths of all documents in bytes, then of the bytes; a null is empty."""
    lengths = pc.fill_null(pc.binary_length(documents), 0).to_numpy(zero_copy_only=False)
    state = hashlib.blake2b(np.ascontiguousarray(lengths, "<i8").data, digest_size=16)
    texts = pc.drop_null(documents)
    if len(texts):
        offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset :][: len(texts) + 1]
        begin, end = int(offsets[0]), int(offsets[-1])
        state.update(texts.buffers()[2].slice(begin, end - begin) if begin < end else b"")
    return state.hexdigest()
