"""What `gpt2repro tokenize` keeps beside its shards: of what they are made, and how far it got.

`manifest.json` is replaced as a whole after every shard. Whoever reads the directory learns from it
which tokenizer the ids are of, and whether all of them are there.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from gpt2repro import UserError
from gpt2repro.data.content import content_hashes
from gpt2repro.data.corpus import in_a_line
from gpt2repro.system import atomic

NAME = "manifest.json"
WRITTEN_BY: Final = "gpt2repro tokenize"

Format = Literal["bin", "npy"]
Whole = Annotated[int, Field(ge=0)]


class Place(NamedTuple):
    """A token of a corpus; token 0 of a document is the end-of-text token before it."""

    unit: Whole
    document: Whole
    token: Whole


class WrittenShard(BaseModel):
    """A file, its tokens, the BLAKE2b of all its bytes, and where the shard after it begins."""

    name: str
    tokens: Whole
    blake2b: str
    next: Place


class Manifest(BaseModel):
    """What decides what the shards hold, and those that are whole.

    dataset: the corpus's identity, and `num_validation_units`.
    tokenizer: the encoder's fingerprint.
    """

    model_config = ConfigDict(extra="forbid")

    written_by: Literal["gpt2repro tokenize"] = WRITTEN_BY
    version: Literal[1] = 1
    dataset: dict[str, Any]
    tokenizer: str
    format: Format
    shard_tokens: int
    complete: bool = False
    shards: list[WrittenShard] = []

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def next(self) -> Place:
        """Where the next shard begins."""
        return self.shards[-1].next if self.shards else Place(0, 0, 0)

    def made_of(self) -> dict[str, Any]:
        """By the names of the recipe's fields and the verb's options, as far as these have them."""
        names = {"tokenizer": self.tokenizer, "--format": self.format}
        return self.dataset | names | {"--shard_tokens": self.shard_tokens}

    def save(self, directory: Path) -> None:
        with atomic.new_file(directory / NAME, durable=True) as scratch:
            scratch.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def check_files(self, directory: Path) -> None:
        """Read what was written.

        Raises:
            UserError: a file is not there, or not the one that was written.
        """
        files = [directory / shard.name for shard in self.shards]
        there = [str(file) for file in files if file.is_file()]
        hashes = dict(zip(there, content_hashes(there), strict=True)) if there else {}
        for file, shard in zip(files, self.shards, strict=True):
            if hashes.get(str(file)) != shard.blake2b:
                raise UserError(
                    f"--output: {file} is {'another file' if str(file) in hashes else 'gone'} and "
                    f"not the one that {NAME} lists: put it back, or begin in an empty directory"
                )


def read_manifest(directory: Path) -> Manifest | None:
    """The directory's; None where it has none that is ours.

    Raises:
        UserError: it is damaged.
    """
    if not (directory / NAME).is_file():
        return None
    with in_a_line(f"{directory / NAME} is damaged"):
        content = json.loads((directory / NAME).read_bytes())
        if not isinstance(content, dict) or content.get("written_by") != WRITTEN_BY:
            return None
        return Manifest.model_validate(content)
