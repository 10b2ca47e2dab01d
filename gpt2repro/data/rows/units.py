"""Units read, and if wanted encoded and kept on disk, by a few background threads.

Threads are enough: the network, parquet and both encoders release the GIL.
"""

import contextlib
import hashlib
import io
import json
import logging
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa

from gpt2repro import UserError
from gpt2repro.data.corpora.corpus import Corpus, as_bytes
from gpt2repro.data.rows.unit_digests import UnitDigests
from gpt2repro.data.tokens.encoder import BulkEncoder
from gpt2repro.system import atomic
from gpt2repro.system.threads import DaemonPool

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16
SECONDS_OF_A_WRITER = 24 * 60 * 60  # what is older, its writer has left
DOCUMENTS_PER_ENCODE = 8  # encoded at a time, so that the first step does not wait for whole units

Documents = Sequence[int] | np.ndarray  # numbers of documents within a unit


class TextUnit:
    """A unit as text; documents are encoded when asked for."""

    def __init__(self, documents: pa.LargeStringArray, encoder: BulkEncoder) -> None:
        self._documents = documents
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._documents)

    def encode(self, documents: Documents) -> tuple[list[np.ndarray], int]:
        """The documents' token ids, without the end-of-text token, and their UTF-8 bytes in all."""
        contents = [as_bytes(self._documents[int(document)]) for document in documents]
        texts = [content.decode("utf-8", "replace") for content in contents]
        return self._encoder.encode(texts), sum(map(len, contents))


class TokenUnit:
    """A unit as tokens: `tokens` back to back, cut at `ends`; `num_bytes` of each document."""

    def __init__(self, tokens: np.ndarray, ends: np.ndarray, num_bytes: np.ndarray) -> None:
        self.tokens, self.ends, self.num_bytes = tokens, ends, num_bytes

    @classmethod
    def of(cls, unit: TextUnit, dtype: np.dtype) -> "TokenUnit":
        documents, num_bytes = [], []
        for index in range(len(unit)):
            [ids], size = unit.encode([index])
            documents.append(ids)
            num_bytes.append(size)
        lengths = [len(ids) for ids in documents]
        tokens = np.concatenate([np.zeros(0, dtype), *documents])
        return cls(tokens, np.cumsum(lengths, dtype=np.int64), np.array(num_bytes, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def encode(self, documents: Documents) -> tuple[list[np.ndarray], int]:
        begins = [self.ends[index - 1] if index else 0 for index in documents]
        ends = [self.ends[index] for index in documents]
        ids = [self.tokens[begin:end] for begin, end in zip(begins, ends, strict=True)]
        return ids, int(sum(self.num_bytes[index] for index in documents))


class TokenCache:
    """Tokenized units in a directory, one checksummed file each, written atomically.

    The key is what was opened and what encodes it, so a new revision or tokenizer never meets an
    old entry. A file that fails its checksum counts as missing.
    """

    def __init__(self, directory: Path, corpus: Corpus, encoder: BulkEncoder) -> None:
        key = json.dumps([corpus.identity, encoder.fingerprint], sort_keys=True).encode()
        self._directory = directory / hashlib.blake2b(key, digest_size=DIGEST_BYTES).hexdigest()
        self._writable, self._lock = True, threading.Lock()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"token_cache_dir: cannot create {directory}: {error}") from error
        for left in self._directory.glob(".*.tokens.*"):  # of writers that were killed
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > SECONDS_OF_A_WRITER:
                    left.unlink()

    def _path(self, unit_index: int) -> Path:
        return self._directory / f"{unit_index:07d}.tokens"

    def load(self, unit_index: int) -> TokenUnit | None:
        try:
            content = self._path(unit_index).read_bytes()
        except OSError:
            return None
        checksum, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.blake2b(payload, digest_size=DIGEST_BYTES).digest() != checksum:
            logger.warning(
                "%s is corrupt: reading unit %d again", self._path(unit_index), unit_index
            )
            return None
        buffer = io.BytesIO(payload)
        return TokenUnit(*(np.load(buffer, allow_pickle=False) for _ in range(3)))

    def save(self, unit_index: int, unit: TokenUnit) -> None:
        """Keep a unit. A full disk costs the cache, not the run."""
        buffer = io.BytesIO()
        for array in (unit.tokens, unit.ends, unit.num_bytes):
            np.save(buffer, array, allow_pickle=False)
        payload = buffer.getbuffer()
        with self._lock:
            if not self._writable:
                return
            try:
                with atomic.new_file(self._path(unit_index)) as scratch, scratch.open("wb") as file:
                    file.write(hashlib.blake2b(payload, digest_size=DIGEST_BYTES).digest())
                    file.write(payload)
            except OSError as error:
                self._writable = False
                logger.warning("token_cache_dir: cannot write (%s); going on without", error)


class UnitReader:
    """Reads units ahead of need. A unit whose future someone still holds is not read twice."""

    def __init__(
        self,
        corpus: Corpus,
        encoder: BulkEncoder,
        *,
        num_threads: int = 4,
        token_cache_dir: str | Path | None = None,
        unit_digests_dir: str | Path | None = None,
        encode_whole_units: bool = False,
    ) -> None:
        self._corpus, self._encoder = corpus, encoder
        self._cache = (
            TokenCache(Path(token_cache_dir), corpus, encoder) if token_cache_dir else None
        )
        self._digests = UnitDigests(Path(unit_digests_dir), corpus) if unit_digests_dir else None
        self._encode_whole_units = encode_whole_units
        self._futures: weakref.WeakValueDictionary[int, Future] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._pool = DaemonPool(num_threads, "unit-reader")

    def submit(self, unit_index: int) -> "Future[TextUnit | TokenUnit]":
        with self._lock:  # lanes that share a unit ask for it at the same time
            future = self._futures.get(unit_index)
            if future is None or (future.done() and future.exception()):
                future = self._pool.submit(self._read, unit_index)
                self._futures[unit_index] = future
            return future

    def close(self) -> None:
        self._pool.close()

    def _read(self, unit_index: int) -> TextUnit | TokenUnit:
        if (tokens := self._corpus.read_tokens(unit_index, self._encoder)) is not None:
            return TokenUnit(*tokens)
        if self._cache and (cached := self._cache.load(unit_index)) is not None:
            return cached  # which may be empty
        documents = self._corpus.read_arrow(unit_index)
        if self._digests:
            self._digests.check(unit_index, documents)
        unit = TextUnit(documents, self._encoder)
        if not (self._cache or self._encode_whole_units):
            return unit
        encoded = TokenUnit.of(unit, self._encoder.dtype)
        if self._cache:
            self._cache.save(unit_index, encoded)
        return encoded
