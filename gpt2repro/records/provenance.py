"""Where a model comes from: `provenance.json`, a link in the chain of a run's checkpoints.

It says which rows, in which order, and what weights they made; and it names the SHA-256 of that of
the permanent checkpoint before, so that none can be changed, left out or put elsewhere unnoticed.
It holds nothing that another launch would say differently: a run that was killed, moved and resumed
has the same chain.
"""

import hashlib
import json
import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FILE = "provenance.json"
BRANCH = re.compile(r"step(\d{8})")
NO_ROWS = "0" * 64  # the cumulative digest before the first row

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Others' records are read and shown: no field holds any text.
Branch = Annotated[str, Field(pattern=r"^step[0-9]{8}$")]
WeightFile = Annotated[str, Field(pattern=r"^[a-z0-9_-]+\.safetensors$")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-z-]+$")]
RowsDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


def branch_of(step: int) -> str:
    """What the permanent checkpoint of `step` is called on the Hub."""
    return f"step{step:08d}"


def with_step(cumulative: str, step: int, rows_digest: str) -> str:
    """The cumulative digest when the rows of `step` are added to those before."""
    return hashlib.sha256(f"{cumulative} {step} {rows_digest}\n".encode()).hexdigest()


class Point(BaseModel):
    """A step, and the digest of all rows before it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    step: Annotated[int, Field(ge=0)] = 0
    rows_digest: Sha256 = NO_ROWS


class Record(BaseModel):
    """What `provenance.json` holds.

    branch: what the checkpoint is published as; None if it is not permanent.
    tokens: trained on.
    weights: SHA-256 of each weight file.
    rows_digest: of all rows so far, see `with_step`.
    begin: where `digests` begin: at the permanent checkpoint before.
    digests: of each step since then its `rows_digest`, as metrics.jsonl has it.
    commit: of the code that trained it.
    previous: SHA-256 of the provenance.json of the permanent checkpoint before.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    branch: Branch | None
    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    weights: dict[WeightFile, Sha256]
    rows_digest: Sha256
    begin: Point
    digests: list[RowsDigest]
    commit: Commit | None
    previous: Sha256 | None

    def content(self) -> bytes:
        return json.dumps(self.model_dump(), indent=1).encode() + b"\n"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content()).hexdigest()

    def digest_of_rows(self) -> str:
        """`rows_digest` as it follows from `begin` and `digests`."""
        digest = self.begin.rows_digest
        for step, rows_digest in enumerate(self.digests, self.begin.step):
            digest = with_step(digest, step, rows_digest)
        return digest


def parsed(content: bytes) -> Record | None:
    """The record that a file holds; None if that is none."""
    try:
        return Record.model_validate_json(content)
    except ValidationError:
        return None


class Chain(BaseModel):
    """What a running training adds to the chain; a checkpoint holds it. Fields as in `Record`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    rows_digest: Sha256 = NO_ROWS
    begin: Point = Point()
    digests: list[RowsDigest] = []
    previous: Sha256 | None = None

    @property
    def step(self) -> int:
        return self.begin.step + len(self.digests)

    def add(self, rows_digest: str, *, remember: bool) -> None:
        """The rows of the next step. `remember`: there are permanent checkpoints to be linked."""
        self.rows_digest = with_step(self.rows_digest, self.step, rows_digest)
        self.digests.append(rows_digest)
        if not remember and self.previous is None:
            self.begin_here()

    def begin_here(self) -> None:
        """What comes now is told from here on."""
        self.begin, self.digests = Point(step=self.step, rows_digest=self.rows_digest), []

    def link(self, saved: Record | None) -> None:
        """What a checkpoint was saved with is told, if it is permanent: go on from there."""
        if saved is not None and saved.branch is not None:
            self.digests = self.digests[saved.step - self.begin.step :]
            self.begin = Point(step=saved.step, rows_digest=saved.rows_digest)
            self.previous = saved.sha256

    def record(
        self, *, permanent: bool, tokens: int, weights: dict[str, str], commit: str | None
    ) -> Record:
        return Record(
            branch=branch_of(self.step) if permanent else None,
            step=self.step,
            tokens=tokens,
            weights=weights,
            rows_digest=self.rows_digest,
            begin=self.begin,
            digests=self.digests,
            commit=commit,
            previous=self.previous,
        )
