"""Shards of token ids, as llm.c, modded-nanogpt, build-nanogpt and `gpt2repro tokenize` write them.

A `.bin` begins with 256 int32 (magic 20240520, version 1, number of tokens), or is bare, as
nanoGPT's; ids are uint16. A `.npy` is NumPy's array of one dimension. Documents lie one after the
other, each after an end-of-text token, and a shard may end within one.

Beside shards of ours lies a manifest.json: their tokenizer is known, and another one is refused.

A shard whose name says `val` is held out: its units come first. A unit is the documents that begin
in about a million tokens.
"""

import io
import os
import re
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from gpt2repro import UserError
from gpt2repro.data.corpora.content import content_hashes
from gpt2repro.data.corpora.corpus import Corpus, Found, TokenArrays, digest, in_a_line
from gpt2repro.data.corpora.local_files import TOKENS, is_shard
from gpt2repro.data.corpora.manifest import NAME, Manifest, read_manifest
from gpt2repro.data.corpora.parquet import Source, sources_of
from gpt2repro.data.tokens.encoder import BulkEncoder

MAGIC, VERSION = 20240520, 1
HEADER = np.dtype("<i4"), 256
FEW = 8  # hardly a text has every second id below it; the upper halves of ids of 32 bits are
UNIT_TOKENS = 2**20
LOOK_AHEAD_TOKENS = 2**14  # for the end of a unit's last document; doubled until it is found
HELD_OUT = re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])", re.IGNORECASE)


class Shard(NamedTuple):
    """Where the ids of a file lie."""

    source: Source
    offset: int  # in bytes
    num_tokens: int
    dtype: np.dtype

    @property
    def is_held_out(self) -> bool:
        return bool(HELD_OUT.search(Path(self.source.name).stem))

    def read(self, begin: int, end: int) -> np.ndarray:
        """The ids `begin` to `end`, or to the shard's end."""
        size, end = self.dtype.itemsize, min(end, self.num_tokens)
        if begin >= end:
            return np.zeros(0, self.dtype)
        with in_a_line("dataset_name"):
            content = self.source.read(self.offset + size * begin, size * (end - begin))
        return np.frombuffer(content, self.dtype)


def open_shards(found: Found) -> Corpus | None:
    """Files of token ids; None for others."""
    listed = sources_of(found) if found.format == TOKENS else None
    if not listed:
        return None
    encoded_by = {} if found.on_hub else _encoded_by(found.files)
    shards = [_shard(source) for source in listed[0]]
    _check_directories([*map(PurePath, found.files)], shards)
    return TokenShards(shards, listed[1] | encoded_by)


def _check_directories(paths: list[PurePath], shards: list[Shard]) -> None:
    """Refuse to train on what a directory, below what all have in common, says is held out."""
    base = os.path.commonpath([path.parent for path in paths])
    for path, shard in zip(paths, shards, strict=True):
        directory = str(path.parent.relative_to(base))
        if HELD_OUT.search(directory) and not shard.is_held_out:
            raise UserError(
                f"data_files: {directory}/{path.name} would be trained on, as its own name does "
                f"not say `val`: name the files of one directory, or call it val_{path.name}"
            )


def _encoded_by(files: list[str]) -> dict[str, str]:
    """The tokenizer's fingerprint, as manifests beside the files tell it; empty without any."""
    found: dict[str, str] = {}
    for directory in dict.fromkeys(Path(file).parent for file in files):
        if manifest := read_manifest(directory):
            if not manifest.complete:
                raise UserError(
                    f"dataset_name: the shards in {directory} are not complete: go on with "
                    "gpt2repro tokenize"
                )
            if found.setdefault("encoded_by", manifest.tokenizer) != manifest.tokenizer:
                raise UserError(f"data_files: the shards in {directory} are of another tokenizer")
            _check_files(directory, manifest)
    return found


def _check_files(directory: Path, manifest: Manifest) -> None:
    """Refuse a copy that is not whole: what is not there would be missed nowhere else."""
    listed = {shard.name: shard.blake2b for shard in manifest.shards}
    there = [file for file in directory.iterdir() if is_shard(file)]
    hashes = content_hashes([*map(str, there)])
    found = {file.name: blake2b for file, blake2b in zip(there, hashes, strict=True)}
    for name in sorted(listed.keys() | found):
        if listed.get(name) != found.get(name):
            what = "is another file" if name in listed and name in found else "is in one of them"
            raise UserError(
                f"dataset_name: {directory} and its {NAME} do not agree: {name} {what}; copy the "
                f"directory again (or remove {NAME}, to train on what is there)"
            )


def check_encoder(corpus: Corpus, encoder: BulkEncoder) -> None:
    """Refuse shards that a manifest says another tokenizer made."""
    encoded_by = corpus.identity.get("encoded_by", encoder.fingerprint)
    if encoded_by != encoder.fingerprint:
        raise UserError(
            "tokenizer_name: the shards were written with another tokenizer, says their "
            f"manifest.json (fingerprint {encoded_by}, not {encoder.fingerprint})"
        )


class TokenShards(Corpus):
    """Units of documents that are token ids already.

    Attributes:
        training: the shards that are not held out.
    """

    def __init__(self, shards: list[Shard], identity: dict[str, Any]) -> None:
        held_out = [shard for shard in shards if shard.is_held_out]
        self.training = [shard for shard in shards if not shard.is_held_out]
        units, others = (
            [(s, begin) for s in some for begin in range(0, s.num_tokens, UNIT_TOKENS)]
            for some in (held_out, self.training)
        )
        self._units = units + others
        self.num_units, self.num_held_out_units = len(self._units), len(units)
        # But for what the first and last documents of a unit have in other units.
        sizes = [(min(UNIT_TOKENS, s.num_tokens - b), s.dtype.itemsize) for s, b in self._units]
        self.num_bytes = np.array(sizes, dtype=np.int64).reshape(-1, 2).prod(axis=1)
        self.tokens_per_byte = 1 / shards[0].dtype.itemsize
        files = digest([[shard.source.name, shard.num_tokens] for shard in shards])
        self.identity = identity | {"files": files}

    def read_arrow(self, unit_index: int) -> pa.LargeStringArray:
        raise UserError(f"dataset_name: {self._units[unit_index][0].source.name} holds no text")

    def where(self, unit_index: int) -> str:
        shard, begin = self._units[unit_index]
        return f"{Path(shard.source.name).name}, from token {begin}"

    def read_tokens(self, unit_index: int, encoder: BulkEncoder) -> TokenArrays:
        check_encoder(self, encoder)
        shard, begin = self._units[unit_index]
        ids = shard.read(begin, begin + UNIT_TOKENS)
        inside, begins = len(ids), np.flatnonzero(ids == encoder.eot_id)
        is_known = "encoded_by" in self.identity
        if not len(begins) and begin == 0 and not is_known:
            raise UserError(
                f"tokenizer_name: the first {inside:,} tokens of {shard.source.name} have no "
                f"{encoder.eot_id}, with which a text of this tokenizer begins"
            )
        if begin == 0 and 0 not in begins[:1]:  # what is left of a document of the shard before
            begins = np.concatenate([[-1], begins])
        ahead = LOOK_AHEAD_TOKENS
        while len(begins):  # until the last of these documents has ended
            more = shard.read(begin + len(ids), begin + len(ids) + ahead)
            ends = np.flatnonzero(more == encoder.eot_id)[:1]
            ids = np.concatenate([ids, more[: ends[0]] if len(ends) else more])
            if len(ends) or not len(more):
                break
            ahead *= 2
        return _unit(ids, begins, encoder, shard.source.name)


def check_ids(ids: np.ndarray, num_ids: int, name: str) -> None:
    """Refuse what is no token of the tokenizer.

    Raises:
        UserError: naming one, and the file.
    """
    if len(ids) and (ids.max() >= num_ids or ids.min() < 0):
        wrong = ids.max() if ids.max() >= num_ids else ids.min()
        raise UserError(
            f"tokenizer_name: {name} has the token {wrong}, this tokenizer only {num_ids:,}"
        )


def _unit(ids: np.ndarray, begins: np.ndarray, encoder: BulkEncoder, name: str) -> TokenArrays:
    """The documents of `ids` that begin after an end-of-text token at `begins`."""
    check_ids(ids, len(encoder.bytes_of_ids), name)
    bounds = np.append(begins, len(ids))
    ends = np.cumsum(np.diff(bounds) - 1)
    ids = ids[bounds[0] + 1 :] if len(begins) else ids[:0]
    ids = ids[ids != encoder.eot_id].astype(encoder.dtype)
    num_bytes = np.concatenate([[0], np.cumsum(encoder.bytes_of_ids[ids])])
    return ids, ends, np.diff(num_bytes[np.concatenate([[0], ends])])


def _shard(source: Source) -> Shard:
    """A file's header, read."""
    head = source.read(0, min(source.size, 4096))
    shard = (_npy if Path(source.name).suffix.lower() == ".npy" else _bin)(source, head)
    if not shard.num_tokens:
        raise UserError(f"dataset_name: {source.name} holds no tokens")
    if source.size != shard.offset + shard.num_tokens * shard.dtype.itemsize:
        raise UserError(
            f"dataset_name: {source.name} should hold {shard.num_tokens:,} tokens, and its size "
            f"says otherwise: it is cut off, or damaged"
        )
    return shard


def _npy(source: Source, head: bytes) -> Shard:
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, _, dtype = read(stream)
    except (ValueError, AttributeError) as error:
        raise UserError(f"dataset_name: {source.name} is no array of NumPy: {error}") from None
    if len(shape) != 1 or dtype.kind not in "ui":
        raise UserError(
            f"dataset_name: {source.name} is an array {shape} of {dtype}, not a row of token ids"
        )
    return Shard(source, stream.tell(), shape[0], dtype)


def _bin(source: Source, head: bytes) -> Shard:
    dtype, length = HEADER
    header = np.frombuffer(head[: len(head) // dtype.itemsize * dtype.itemsize], dtype)[:length]
    # A header is zeros but for its first numbers. Bare ids are not.
    if len(header) < length or np.any(header[8:]):
        ids = np.frombuffer(head[: len(head) // 4 * 4], "<u2").reshape(-1, 2)
        if len(ids) >= FEW and ids[:, 1].max() < FEW <= ids[:, 0].max():
            raise UserError(
                f"dataset_name: {source.name} looks like ids of 32 bits or more; without a header "
                "a .bin has 16: write uint16, or an .npy, which says what it holds"
            )
        return Shard(source, 0, source.size // 2, np.dtype("<u2"))
    magic, version, num_tokens = map(int, header[:3])
    if (magic, version) != (MAGIC, VERSION):
        raise UserError(
            f"dataset_name: {source.name} has magic {magic} and version {version}; those of "
            f"GPT-2's token ids are {MAGIC} and {VERSION}"
        )
    return Shard(source, header.nbytes, num_tokens, np.dtype("<u2"))
