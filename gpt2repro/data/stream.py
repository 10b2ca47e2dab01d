"""The token stream: documents -> rows of T+1 token ids, the same rows on any number of processes.

    corpus ──units──> plan ──pieces──> lane_documents ──documents──> lane_rows ──rows──> TokenStream

- The training units (all but the first `num_validation_units`) are permuted anew for every epoch.
  Lane l of L owns every L-th of them and goes on into its own next epoch when they are used up.
- A lane permutes a unit's documents, puts the end-of-text token before each (a document without
  text is that token alone), and cuts the endless result into rows of T+1 tokens, one every T
  tokens: the last token of a row, a target there, is the first input of the next.
- A step takes `rows_per_step / L` rows of every lane. Process r of W owns lanes r, r+W, r+2W, ...:
  which rows a step has depends on neither W nor anything else of the machine.
- A lane's state is the place of its next row's first token: (epoch, piece of the lane in that
  epoch, document in the piece's order, token in the document). It travels with the rows, so that a
  checkpoint holds what was consumed, and not what was read ahead.

With fewer training units than lanes, every unit is cut into ceil(L / units) contiguous ranges of
documents, and "piece" means such a range; else a piece is a unit.
"""

import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpt2repro import UserError
from gpt2repro.data.corpus import Corpus
from gpt2repro.data.encoder import BulkEncoder
from gpt2repro.data.lanes import check_lanes
from gpt2repro.data.order import Plan, Position
from gpt2repro.data.packing import LaneDocuments, lane_rows
from gpt2repro.data.producer import Producer, StepRows
from gpt2repro.data.units import UnitReader

STATE_VERSION = 1

# The recipe's name of what an identity holds, where the two differ.
FIELD_OF = {
    "dataset": "dataset_name",
    "config": "dataset_config",
    "split": "dataset_split",
    "revision": "dataset_revision",
    "files": "the digest of the data files",
    "content": "the hash of what the local files hold",
    "tokenizer": "tokenizer_name's fingerprint",
    "rows_per_step": "rows_per_step (batch_tokens / sequence_length)",
}

Whole = Annotated[int, Field(ge=0)]


class SavedStream(BaseModel):
    """What `TokenStream.state_dict` gives: plain JSON values.

    lanes: of lane 0, 1, ..., the `Position` of its next row.
    """

    model_config = ConfigDict(strict=True)

    version: int
    identity: dict[str, Any]
    lanes: list[Annotated[list[Whole], Field(min_length=4, max_length=4)]]


class TokenStream:
    """An endless iterator over this process's `StepRows`, one an optimizer step.

    Args:
        corpus, encoder: what is read and what encodes it.
        sequence_length: T; rows have T+1 tokens.
        rows_per_step: rows of one optimizer step over all processes.
        num_lanes: a multiple of `world_size` that divides `rows_per_step`.
        num_validation_units: units at the corpus's beginning that are never trained on.
        seed: of every permutation.
        rank, world_size: which lanes are this process's.
        token_cache_dir: keep tokenized units there; later passes and outages read the disk.

    Raises:
        UserError: naming the recipe's field.

    An error of a background thread is raised by the next `next()`.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: BulkEncoder,
        *,
        sequence_length: int,
        rows_per_step: int,
        num_lanes: int,
        num_validation_units: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_reader_threads: int = 4,
        token_cache_dir: str | Path | None = None,
    ) -> None:
        assert 0 <= rank < world_size and sequence_length > 0
        check_lanes(num_lanes, rows_per_step=rows_per_step, world_size=world_size)
        _check_units(corpus, num_lanes, num_validation_units)
        self.identity: dict[str, Any] = corpus.identity | {
            "tokenizer": encoder.fingerprint,
            "sequence_length": sequence_length,
            "rows_per_step": rows_per_step,
            "num_lanes": num_lanes,
            "num_validation_units": num_validation_units,
            "seed": seed,
        }
        self.wait_seconds = 0.0  # spent in next(), waiting for rows
        self._corpus, self._encoder = corpus, encoder
        self._plan = Plan(
            corpus.num_units,
            num_lanes=num_lanes,
            num_validation_units=num_validation_units,
            seed=seed,
        )
        self._reader_options: dict[str, Any] = {
            "num_threads": num_reader_threads,
            "token_cache_dir": token_cache_dir,
        }
        self._positions = {
            lane: Position(0, 0, 0, 0) for lane in range(rank, num_lanes, world_size)
        }
        self._producer: Producer | None = None
        self._finalizer: weakref.finalize | None = None

    @property
    def lanes(self) -> dict[int, Position]:
        """Where this process's lanes go on: `StepRows.lanes` of the last step, or the start."""
        return dict(self._positions)

    def __iter__(self) -> "TokenStream":
        return self

    def __next__(self) -> StepRows:
        with self._waiting() as producer:
            step = producer.get()
        self._positions = step.lanes
        return step

    def wait(self, seconds: float) -> bool:
        """Whether the next step is at hand; waits up to `seconds` for it.

        For a caller that has something else to look at during an outage, such as signals.
        """
        with self._waiting() as producer:
            return producer.wait(seconds)

    @contextmanager
    def _waiting(self) -> Iterator[Producer]:
        began = time.perf_counter()
        if self._producer is None:
            self._start()
        assert self._producer is not None
        try:
            yield self._producer
        finally:
            self.wait_seconds += time.perf_counter() - began

    def _start(self) -> None:
        reader = UnitReader(self._corpus, self._encoder, **self._reader_options)
        num_rows = self.identity["rows_per_step"] // self.identity["num_lanes"]
        plan, encoder, positions = self._plan, self._encoder, dict(self._positions)
        sequence_length = self.identity["sequence_length"]

        def make_lanes() -> dict[int, Iterator]:
            documents = {
                lane: LaneDocuments(plan, reader, encoder, lane, position)
                for lane, position in positions.items()
            }
            return {
                lane: lane_rows(iter(segments), num_rows, sequence_length)
                for lane, segments in documents.items()
            }

        self._producer = Producer(make_lanes, reader)
        # Also at exit: a thread that comes back from native code to a dying interpreter aborts it.
        self._finalizer = weakref.finalize(self, self._producer.close)

    def close(self) -> None:
        """End the background threads; the stream can go on from where it was."""
        if self._finalizer is not None:
            self._finalizer()
        self._producer = self._finalizer = None

    def state_dict(self, lanes: Mapping[int, Sequence[int]] | None = None) -> dict[str, Any]:
        """The stream's state as plain JSON values.

        `lanes`: `StepRows.lanes` of the last consumed step, of all processes; by default this
        process's own, which is everything if it is the only one.
        """
        if lanes is None:
            lanes = self._positions
        num_lanes = self.identity["num_lanes"]
        assert sorted(lanes) == list(range(num_lanes)), "the state needs the lanes of every process"
        return {
            "version": STATE_VERSION,
            "identity": self.identity,
            "lanes": [list(map(int, lanes[lane])) for lane in range(num_lanes)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, saved by any number of processes.

        Raises:
            UserError: the saved stream was another; names what differs.
        """
        try:
            saved = SavedStream.model_validate(state)
        except ValidationError as error:
            raise UserError(f"the checkpoint's stream state is damaged: {error}") from None
        if saved.version != STATE_VERSION:
            raise UserError(f"the checkpoint's stream state has version {saved.version}")
        for name in [*self.identity, *saved.identity]:
            then, now = saved.identity.get(name), self.identity.get(name)
            if then != now and (name, then) != ("content", None):  # from before it was hashed
                field = FIELD_OF.get(name, name)
                raise UserError(
                    f"cannot resume the data stream: {field} was {then!r} in the checkpoint and is "
                    f"{now!r} now: set it back, or give another exp_name to start a new run"
                )
        if len(saved.lanes) != self.identity["num_lanes"]:
            raise UserError("the checkpoint's stream state is damaged: it has not all lanes")
        positions = {lane: Position(*saved.lanes[lane]) for lane in self._positions}
        for lane, position in positions.items():
            if position.piece >= len(self._plan.pieces(lane, position.epoch)):
                raise position.beyond(f"pieces of lane {lane}")
        self.close()
        self._positions = positions


def _check_units(corpus: Corpus, num_lanes: int, num_validation_units: int) -> None:
    num_training_units = corpus.num_units - num_validation_units
    if num_validation_units < 0 or num_training_units < 1:
        raise UserError(
            f"num_validation_units: {num_validation_units} of the dataset's {corpus.num_units} "
            "units leave none to train on"
        )
    if num_training_units >= num_lanes:
        return
    num_documents = 0
    for unit_index in range(num_validation_units, corpus.num_units):
        if (count := corpus.num_documents(unit_index)) is None:
            return  # a lane without documents is told when it is read
        num_documents += count
    if num_documents < num_lanes:
        raise UserError(
            f"num_lanes: {num_lanes} lanes are more than the {num_documents} documents to train on"
        )
