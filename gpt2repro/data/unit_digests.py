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
from gpt2repro.data.corpus import Corpus, digest

logger = logging.getLogger(__name__)

# What may differ while the units are the same: a listing's hashes are checked by themselves.
NOT_THE_UNITS = ("content",)


class UnitDigests:
    """The digests of a dataset's units in a directory, recorded and compared."""

    def __init__(self, directory: Path, corpus: Corpus) -> None:
        identity = {k: v for k, v in corpus.identity.items() if k not in NOT_THE_UNITS}
        self._corpus, self._lock = corpus, threading.Lock()
        self._path = directory / f"{digest(sorted(identity.items()))}.units"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            content = self._path.read_bytes() if self._path.exists() else b""
        except OSError as error:
            raise UserError(f"unit_digests_dir: cannot use {directory}: {error}") from error
        lines = re.findall(rb"^(\d+) ([0-9a-f]{32})$", content, re.MULTILINE)
        self._known = {int(unit): found.decode() for unit, found in lines}

    def check(self, unit_index: int, documents: pa.LargeStringArray) -> None:
        """Record what the unit holds, or compare it with what it held.

        Raises:
            UserError: it held something else.
        """
        found = digest_of(documents)
        with self._lock:
            known = self._known.get(unit_index)
            if known is None:
                self._known[unit_index] = found
                self._append(f"{unit_index} {found}\n")
        if known not in (None, found):
            raise UserError(
                f"dataset_name: {self._corpus.where(unit_index)} holds another text than when it "
                f"was first read ({found}, not {known}, as {self._path} has it)"
            )

    def _append(self, line: str) -> None:
        """A full disk costs the record, not the run."""
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            logger.warning("unit_digests_dir: cannot write (%s)", error)


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
