"""The units of a dataset's parquet files, with all that reading them needs of the footers.

The footers are read once: the full FineWeb-Edu has 1.4 million row groups in 2,400 files. What is
made of a commit on the Hub is kept in the user's cache, and one process of a machine makes it while
the others wait. A cache that cannot be used costs the time.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2repro.data.corpora.content import cache_directory, one_at_a_time
from gpt2repro.data.corpora.corpus import digest
from gpt2repro.data.corpora.footers import Column
from gpt2repro.system import atomic

logger = logging.getLogger(__name__)

VERSION = 1  # of what is kept: another is made anew
NUM_KEPT = 20  # the newest
CHECKSUM_BYTES = 16
DIGESTED_AT_A_TIME = 2**14  # units, as Python's objects

# file, row_group: their numbers; start, length, uncompressed, codec: as `footer_of_chunk` has them.
PLACE = ["file", "row_group", "num_rows", "start", "length"]
NUMBERS = ["<i4", "<i4", "<i8", "<i8", "<i8", "<i8", "i1"]
UNIT = np.dtype([*zip([*PLACE, "uncompressed", "codec"], NUMBERS, strict=True)])


class UnitTable(NamedTuple):
    """
    columns: of each file, how its text column is stored.
    units: (num_units,) of `UNIT`, in dataset order.
    digest: of the files' names and of their units' places.
    """

    columns: list[Column]
    units: np.ndarray
    digest: str

    @classmethod
    def of(cls, names: list[str], columns: list[Column], units: np.ndarray) -> "UnitTable":
        return cls(columns, units, digest([names, _digest_of_places(units)]))


def _digest_of_places(units: np.ndarray) -> str:
    """`digest` of all places as a list of lists, which would be hundreds of megabytes."""
    hashed = hashlib.blake2b(b"[", digest_size=16)
    for begin in range(0, len(units), DIGESTED_AT_A_TIME):
        places = units[PLACE][begin : begin + DIGESTED_AT_A_TIME].tolist()
        hashed.update((", " * (begin > 0) + json.dumps(places)[1:-1]).encode())
    hashed.update(b"]")
    return hashed.hexdigest()


def kept(key: Any, make: Callable[[], UnitTable]) -> UnitTable:
    """What `make()` returns, kept by `key`: plain JSON values, different for different tables."""
    try:
        place = cache_directory() / "units"
    except RuntimeError:
        return make()
    path = place / f"{digest([VERSION, key])}.units"
    with one_at_a_time(path.with_suffix(".lock")):
        table = _load(path)
        if table is None:
            table = make()
            with contextlib.suppress(OSError):
                _save(path, table)
    return table


def _load(path: Path) -> UnitTable | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    payload = memoryview(content)[CHECKSUM_BYTES:]
    if _checksum(payload) != content[:CHECKSUM_BYTES]:
        logger.warning("%s is damaged: reading the footers again", path)
        return None
    end = content.index(b"\n", CHECKSUM_BYTES)
    header = json.loads(content[CHECKSUM_BYTES:end])
    columns = [Column(*column) for column in header["columns"]]
    return UnitTable(columns, np.frombuffer(content, UNIT, offset=end + 1), header["digest"])


def _save(path: Path, table: UnitTable) -> None:
    header = json.dumps({"columns": table.columns, "digest": table.digest}).encode() + b"\n"
    units = table.units.view(np.uint8).data
    with atomic.new_file(path) as scratch, scratch.open("wb") as file:
        for part in (_checksum(header, units), header, units):
            file.write(part)
    age = {file: file.stat().st_mtime for file in path.parent.iterdir()}
    for old in sorted(age, key=age.__getitem__)[: -2 * NUM_KEPT]:  # a lock beside each
        old.unlink()


def _checksum(*parts: Any) -> bytes:
    hashed = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    for part in parts:
        hashed.update(part)
    return hashed.digest()
