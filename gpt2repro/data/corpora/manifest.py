"""What `gpt2repro tokenize` keeps beside its shards: of what they are made, and how far it got."""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from gpt2repro.data.corpora.corpus import in_a_line
from gpt2repro.system import atomic

NAME = "manifest.json"
WRITTEN_BY: Final = "gpt2repro tokenize"

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

    made_of: the corpus's identity, and other fields of the recipe and options of the verb.
    tokenizer: the encoder's fingerprint.
    """

    model_config = ConfigDict(extra="forbid")

    written_by: Literal["gpt2repro tokenize"] = WRITTEN_BY
    version: Literal[1] = 1
    made_of: dict[str, Any]
    tokenizer: str
    complete: bool = False
    shards: list[WrittenShard] = []

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def next(self) -> Place:
        """Where the next shard begins."""
        return self.shards[-1].next if self.shards else Place(0, 0, 0)

    def save(self, directory: Path) -> None:
        with atomic.new_file(directory / NAME, durable=True) as scratch:
            scratch.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest | None:
    """The directory's; None where it has none that is ours.

    Raises:
        UserError: it is damaged.
    """
    if not (directory / NAME).is_file():
        return None
    with in_a_line(f"{directory / NAME} is damaged"):
        content = json.loads((directory / NAME).read_bytes())
        is_ours = isinstance(content, dict) and content.get("written_by") == WRITTEN_BY
        return Manifest.model_validate(content) if is_ours else None
