"""A corpus as shards of token ids: encoded by several threads, written by one, in dataset order.

The held-out units are `tokens_val_000000`, whatever its length. The others are cut to
`tokens_train_000001` and so on, all but the last of exactly as many tokens as asked for; a document
may begin in one and end in the next, as in the shards of llm.c and build-nanogpt.

A shard gets its name when it is whole, then its line in the manifest: whatever ends the program,
only the shard in work is lost.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt2repro import UserError
from gpt2repro.data.corpora.content import content_hashes
from gpt2repro.data.corpora.corpus import Corpus
from gpt2repro.data.corpora.local_files import is_shard
from gpt2repro.data.corpora.manifest import NAME, Manifest, Place, WrittenShard, read_manifest
from gpt2repro.data.corpora.shards import HEADER, MAGIC, VERSION, TokenShards
from gpt2repro.data.rows.documents import units_in_order
from gpt2repro.data.rows.stream import FIELD_OF
from gpt2repro.data.rows.units import TextUnit, TokenUnit, UnitReader
from gpt2repro.data.tokens.encoder import BulkEncoder
from gpt2repro.system import atomic


def begin(directory: Path, corpus: Corpus, encoder: BulkEncoder, **how: Any) -> Manifest:
    """The manifest of a directory that exists: a new one, or that of shards to go on after.

    `how`: num_validation_units, format ("bin", "npy") and shard_tokens.

    Raises:
        UserError: it is of other shards, files are not those that it lists, or these cannot be.
    """
    if isinstance(corpus, TokenShards):
        raise UserError("dataset_name: it holds token ids already")
    if how["format"] == "bin" and encoder.dtype.itemsize > 2:
        raise UserError(
            "--format: bin has ids of 16 bits, and tokenizer_name more than 65,536; take npy"
        )
    new = Manifest(made_of=corpus.identity | how, tokenizer=encoder.fingerprint)
    if (found := read_manifest(directory)) is None:
        for file in sorted(directory.iterdir()):
            if is_shard(file) or file.name == NAME:
                raise UserError(f"--output: {file} is none of ours: give an empty directory")
        new.save(directory)
        return new
    was, now = ({**each.made_of, "tokenizer": each.tokenizer} for each in (found, new))
    for name in [*now, *was]:
        if was.get(name) != now.get(name):
            raise UserError(
                f"--output: the shards in {directory} were begun with another "
                f"{FIELD_OF.get(name, name)}: {was.get(name)!r}, now {now.get(name)!r}; set it "
                "back, or give an empty directory"
            )
    listed = {str(directory / shard.name): shard.blake2b for shard in found.shards}
    there = [file for file in listed if Path(file).is_file()]
    hashes = dict(zip(there, content_hashes(there, "--output"), strict=True))
    for name, blake2b in listed.items():
        if hashes.get(name) != blake2b:
            raise UserError(
                f"--output: {name} is gone or not the file that {NAME} lists: put it back, or "
                "give an empty directory"
            )
    return found


def write_shards(
    directory: Path,
    manifest: Manifest,
    corpus: Corpus,
    encoder: BulkEncoder,
    *,
    num_threads: int,
    on_unit: Callable[[int], object] = lambda _: None,
    **reading: Any,
) -> None:
    """Write what the manifest lacks.

    `on_unit(1)` is called before each unit that is written; `reading`: see `UnitReader`.
    """
    reading |= {"num_threads": num_threads, "encode_whole_units": True}
    reader, start, how = UnitReader(corpus, encoder, **reading), manifest.next, manifest.made_of
    held_out = how["num_validation_units"]

    def units(first: int, end: int) -> Iterator[tuple[int, TextUnit | TokenUnit]]:
        todo = range(max(first, start.unit), end)
        # Twice as many, so that the threads have work while a shard is flushed and hashed.
        for each in zip(todo, units_in_order(reader, todo, 2 * num_threads), strict=True):
            on_unit(1)
            yield each

    splits = ("val", 0, held_out, None), ("train", held_out, corpus.num_units, how["shard_tokens"])
    try:
        for split, first, end, most in splits:
            tokens = _Tokens(units(first, end), start, encoder)
            while not tokens.at_end():
                has_val = any("_val_" in shard.name for shard in manifest.shards)
                number = len(manifest.shards) + (split == "train" and not has_val)  # from 1
                path = directory / f"tokens_{split}_{number:06d}.{how['format']}"
                size = _write(path, tokens, most, encoder.dtype)
                [blake2b] = content_hashes([str(path)], "--output")
                shard: dict[str, Any] = {"name": path.name, "tokens": size, "blake2b": blake2b}
                manifest.shards.append(WrittenShard(**shard, next=tokens.place))
                manifest.save(directory)
        manifest.complete = True
        manifest.save(directory)
    finally:
        reader.close()


class _Tokens:
    """The tokens of numbered units from a place on, an end-of-text token before every document."""

    def __init__(self, units: Iterator, start: Place, encoder: BulkEncoder) -> None:
        self._units, self._start, self._eot_id = units, start, encoder.eot_id
        self._ids, self._at = np.zeros(0, encoder.dtype), 0  # of a unit

    def at_end(self) -> bool:
        """Whether no token is left; else one of them is at hand."""
        while self._at == len(self._ids):
            if (found := next(self._units, None)) is None:
                return True
            self._unit_index, unit = found
            begins = np.concatenate([[0], unit.ends])[:-1].astype(np.int64)
            self._ids, self._at = np.insert(unit.tokens, begins, self._eot_id), 0
            if self._unit_index == self._start.unit and len(begins):
                begins = np.flatnonzero(self._ids == self._eot_id)
                self._at = int(begins[self._start.document]) + self._start.token
        return False

    @property
    def place(self) -> Place:
        """Of the next token."""
        if self._at == len(self._ids):
            return Place(self._unit_index + 1, 0, 0)
        begins = np.flatnonzero(self._ids[: self._at + 1] == self._eot_id)
        return Place(self._unit_index, len(begins) - 1, self._at - int(begins[-1]))

    def take(self, most: int | None) -> np.ndarray:
        """At least one token, if any are left, and not more than `most`; None is no bound."""
        begin = self._at
        self._at = len(self._ids) if most is None else min(begin + most, len(self._ids))
        return self._ids[begin : self._at]


def _write(path: Path, tokens: _Tokens, most: int | None, dtype: np.dtype) -> int:
    """Write a shard of `most` tokens, fewer if no more are left; returns how many."""
    for left in atomic.leftovers(path):
        left.unlink()
    dtype, num_tokens = dtype.newbyteorder("<"), 0
    with atomic.new_file(path, durable=True) as scratch, scratch.open("wb") as file:
        file.write(_head(path.suffix, dtype, 0))
        while num_tokens != most and not tokens.at_end():
            ids = tokens.take(None if most is None else most - num_tokens)
            file.write(ids.astype(dtype, copy=False).data)
            num_tokens += len(ids)
            if path.suffix == ".bin" and num_tokens >= 2**31:  # its header counts in int32
                raise UserError(
                    "num_validation_units: what is held out is one shard, and a .bin holds less "
                    "than 2**31 tokens; hold out fewer units, or take --format npy"
                )
        file.seek(0)
        file.write(_head(path.suffix, dtype, num_tokens))
    return num_tokens


def _head(suffix: str, dtype: np.dtype, num_tokens: int) -> bytes:
    """As long for any number of tokens: NumPy pads its own to 128 bytes."""
    if suffix == ".bin":
        header = np.zeros(HEADER[1], HEADER[0])
        header[:3] = MAGIC, VERSION, num_tokens
        return header.tobytes()
    stream = io.BytesIO()
    array = {"descr": dtype.str, "fortran_order": False, "shape": (num_tokens,)}
    np.lib.format.write_array_header_1_0(stream, array)
    assert stream.tell() == 128
    return stream.getvalue()
