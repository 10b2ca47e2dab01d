"""The token stream: documents -> rows of T+1 token ids, the same rows on any number of processes.

    corpus ──units──> Plan ──pieces──> LaneDocuments ──documents──> LaneRows ──rows──> TokenStream

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
- Of several datasets every lane reads all, each as if it were alone; mixture.py says which of them
  a row comes from.

With fewer training units than lanes, every unit is cut into ceil(L / units) contiguous ranges of
documents, and "piece" means such a range; else a piece is a unit.
"""

import copy
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpt2repro import UserError
from gpt2repro.data.corpora.shards import TokenShards, check_encoder
from gpt2repro.data.rows.file_order import FileOrder, FileRows
from gpt2repro.data.rows.lanes import check_lanes
from gpt2repro.data.rows.mixture import Ended, Lane, Mixture, Rows, Source
from gpt2repro.data.rows.order import LaneState, Plan, Position
from gpt2repro.data.rows.packing import LaneDocuments, LaneRows
from gpt2repro.data.rows.producer import Producer, StepRows
from gpt2repro.data.rows.units import UnitReader
from gpt2repro.data.tokens.encoder import BulkEncoder
from gpt2repro.system.text import wrong_fields

ORDERS = ("shuffled", "file", "build-nanogpt")

# The recipe's name of what an identity holds, where the two differ.
FIELD_OF = {
    "dataset": "dataset_name",
    "config": "dataset_config",
    "split": "dataset_split",
    "revision": "dataset_revision",
    "files": "the digest of the data files",
    "content": "the hash of what the files hold",
    "tokenizer": "tokenizer_name's fingerprint",
    "rows_per_step": "rows_per_step (batch_tokens / sequence_length)",
}

Whole = Annotated[int, Field(ge=0)]
Place = Annotated[list[Whole], Field(min_length=4, max_length=4)]


class SavedStream(BaseModel):
    """What `TokenStream.state_dict` gives: plain JSON values.

    step: optimizer steps whose rows were taken.
    lanes: of lane 0, 1, ..., the `Position` of its next row in each dataset.
    """

    model_config = ConfigDict(strict=True)

    version: Literal[2]
    identity: dict[str, Any]
    step: Whole
    lanes: list[list[Place]]

    def states(self) -> list[LaneState]:
        """Of lane 0, 1, ..."""
        return [LaneState(self.step, tuple(Position(*at) for at in lane)) for lane in self.lanes]


class TokenStream:
    """An endless iterator over this process's `StepRows`, one an optimizer step.

    Args:
        sources, encoder: what is read and what encodes it.
        sequence_length: T; rows have T+1 tokens.
        rows_per_step: rows of one optimizer step over all processes.
        num_lanes: a multiple of `world_size` that divides `rows_per_step`.
        seed: of every permutation.
        order: "shuffled"; or "file", "build-nanogpt": one dataset of shards of token ids, in the
            order of other projects, see file_order.py.
        chunk_rows: for those; None is `rows_per_step`.
        rank, world_size: which lanes are this process's.
        num_reader_threads: that fetch units ahead, of each source.
        token_cache_dir: keep tokenized units there; later passes and outages read the disk.
        unit_digests_dir: keep a digest of every unit's text there, and refuse another text.

    Raises:
        UserError: naming the recipe's field.

    Attributes:
        sources, encoder: as given.
        plans, mixture: the order within each source, and which source a row comes from.
        identity: what decides the rows, as plain JSON values.
        wait_seconds: spent waiting for rows.

    An error of a background thread is raised by the next `next()`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: BulkEncoder,
        *,
        sequence_length: int,
        rows_per_step: int,
        num_lanes: int,
        seed: int,
        order: str = "shuffled",
        chunk_rows: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_reader_threads: int = 4,
        token_cache_dir: str | Path | None = None,
        unit_digests_dir: str | Path | None = None,
    ) -> None:
        assert 0 <= rank < world_size and sequence_length > 0
        check_lanes(num_lanes, rows_per_step=rows_per_step, world_size=world_size)
        if order not in ORDERS:
            raise UserError(f"order: {order!r} is none of {', '.join(ORDERS)}")
        for source in sources:
            _check_units(source, num_lanes)
            check_encoder(source.corpus, encoder)
        if not sources:
            raise UserError("datasets: there is none")
        _check_overlap(sources)
        if all(source.epochs for source in sources):
            raise UserError("datasets: each of them ends (epochs); leave one without, that goes on")
        self.identity: dict[str, Any] = {
            **_identity(sources),
            "tokenizer": encoder.fingerprint,
            "sequence_length": sequence_length,
            "rows_per_step": rows_per_step,
            "num_lanes": num_lanes,
            "seed": seed,
        }
        if order != "shuffled":
            self.identity |= {"order": order, "chunk_rows": chunk_rows or rows_per_step}
        self.wait_seconds = 0.0  # spent in next(), waiting for rows
        self.sources, self.encoder = sources, encoder
        self.plans = [self._plan(source) for source in sources]
        self.mixture = Mixture(sources, rows_per_step=rows_per_step, seed=seed)
        self._reader_options: dict[str, Any] = {
            "num_threads": num_reader_threads,
            "token_cache_dir": token_cache_dir,
            "unit_digests_dir": unit_digests_dir,
        }
        self._lanes = {
            lane: LaneState(0, tuple(plan.start(lane) for plan in self.plans))
            for lane in range(rank, num_lanes, world_size)
        }
        self._producer: Producer | None = None
        self._finalizer: weakref.finalize | None = None
        self._process = os.getpid()

    def _plan(self, source: Source) -> Plan | FileOrder:
        has, num_lanes = self.identity, self.identity["num_lanes"]
        if "order" not in has:
            return Plan(
                source.corpus.num_units,
                num_lanes=num_lanes,
                num_validation_units=source.num_validation_units,
                seed=has["seed"],
            )
        if len(self.sources) > 1 or not isinstance(source.corpus, TokenShards):
            raise UserError(
                f"order: {has['order']} is one of shards of token ids (.bin, .npy), of one dataset"
            )
        if source.num_validation_units != source.corpus.num_held_out_units:
            raise UserError(
                f"num_validation_units: order: {has['order']} holds out whole shards, by `val` in "
                "their names, or none; set it to null or 0"
            )
        return FileOrder(
            source.corpus,
            order=has["order"],
            sequence_length=has["sequence_length"],
            rows_per_step=has["rows_per_step"],
            num_lanes=num_lanes,
            chunk_rows=has["chunk_rows"],
            num_ids=len(self.encoder.bytes_of_ids),
        )

    @property
    def lanes(self) -> dict[int, LaneState]:
        """Where this process's lanes go on: `StepRows.lanes` of the last step, or the start."""
        return dict(self._lanes)

    def __iter__(self) -> "TokenStream":
        return self

    def __next__(self) -> StepRows:
        with self._waiting() as producer:
            step = producer.get()
        self._lanes = step.lanes
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
        self._leave_what_was_forked()
        if self._producer is None:
            self._start()
        assert self._producer is not None
        try:
            yield self._producer
        finally:
            self.wait_seconds += time.perf_counter() - began

    def _start(self) -> None:
        readers = [
            UnitReader(source.corpus, self.encoder, **self._reader_options)
            for source in self.sources
        ]
        # None of what follows may hold the stream itself, which ends the thread when it is dropped.
        lanes, plans, sources = self.lanes, self.plans, self.sources
        mixture, encoder = self.mixture, self.encoder
        sequence_length = self.identity["sequence_length"]
        num_rows = self.identity["rows_per_step"] // self.identity["num_lanes"]

        def part(source: int, lane: int, state: LaneState) -> Rows:
            plan, start = plans[source], state.positions[source]
            if not sources[source].goes_on(state, source):
                return Ended(start)
            if isinstance(plan, FileOrder):
                return FileRows(plan, lane, start)
            documents = LaneDocuments(plan, readers[source], encoder, lane, start)
            return LaneRows(documents, sequence_length, start)

        def make_lanes() -> dict[int, Lane]:
            parts = {
                lane: [part(n, lane, state) for n in range(len(plans))]
                for lane, state in lanes.items()
            }
            rows = {lane: slice(lane * num_rows, (lane + 1) * num_rows) for lane in lanes}
            return {
                lane: Lane(parts[lane], sources, mixture, rows[lane], state.step)
                for lane, state in lanes.items()
            }

        self._producer, self._process = Producer(make_lanes, readers), os.getpid()
        # Also at exit: a thread that comes back from native code to a dying interpreter aborts it.
        self._finalizer = weakref.finalize(self, self._producer.close)

    def epochs(self, lanes: Mapping[int, LaneState]) -> dict[str, float]:
        """How often each dataset was read when `lanes` were where they are: 1.5 is once and a half.

        By name of a figure: `epoch`, or of several datasets `epoch/datasets[0]` and so on.
        """
        read = [
            sum(
                lane.positions[n].epoch + lane.positions[n].piece / plan.num_pieces(number)
                for number, lane in lanes.items()
            )
            for n, plan in enumerate(self.plans)
        ]
        names = [f"/datasets[{n}]" if len(read) > 1 else "" for n in range(len(read))]
        each = zip(names, read, strict=True)
        return {f"epoch{name}": round(total / len(lanes), 4) for name, total in each}

    def close(self) -> None:
        """End the background threads; the stream can go on from where it was."""
        self._leave_what_was_forked()
        if self._finalizer is not None:
            self._finalizer()
        self._producer = self._finalizer = None

    def _leave_what_was_forked(self) -> None:
        """In a fork of the process that began to read: threads do not follow it, their locks do."""
        if self._finalizer is not None and self._process != os.getpid():
            self._finalizer.detach()
            self._producer = self._finalizer = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has threads of its own, and goes on where this one is."""
        return self.__dict__ | {"_producer": None, "_finalizer": None}

    def state_dict(self, lanes: Mapping[int, LaneState] | None = None) -> dict[str, Any]:
        """The stream's state as plain JSON values.

        `lanes`: `StepRows.lanes` of the last consumed step, of all processes; by default this
        process's own, which is everything if it is the only one.
        """
        if lanes is None:
            lanes = self._lanes
        num_lanes = self.identity["num_lanes"]
        assert sorted(lanes) == list(range(num_lanes)), "the state needs the lanes of every process"
        [step] = {lane.step for lane in lanes.values()}
        places = [[list(map(int, at)) for at in lanes[n].positions] for n in range(num_lanes)]
        # A copy: torch.distributed.checkpoint loads into what it is given, before it asks us.
        identity = copy.deepcopy(self.identity)
        return {"version": 2, "identity": identity, "step": step, "lanes": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, saved by any number of processes.

        Raises:
            UserError: the saved stream was another; names what differs.
        """
        try:
            saved = SavedStream.model_validate(state)
        except ValidationError as error:
            wrong = wrong_fields(error, 3)
            raise UserError(f"the checkpoint's stream state is damaged: {wrong}") from None
        _check_identity(flat(saved.identity), flat(self.identity))
        states = saved.states()
        whole = all(len(state.positions) == len(self.plans) for state in states)
        if len(states) != self.identity["num_lanes"] or not whole:
            raise UserError("the checkpoint's stream state is damaged: it has not all lanes")
        for lane in self._lanes:
            for plan, position in zip(self.plans, states[lane].positions, strict=True):
                if position.piece >= plan.num_pieces(lane):
                    raise position.beyond(f"pieces of lane {lane}")
        self.close()
        self._lanes = {lane: states[lane] for lane in self._lanes}


def _check_overlap(sources: Sequence[Source]) -> None:
    """Refuse to train on what another entry of the same dataset holds out."""
    for one, other in combinations(sources, 2):
        held_out = one.num_validation_units, other.num_validation_units
        if one.corpus.identity == other.corpus.identity and len(set(held_out)) > 1:
            raise UserError(
                f"datasets: {one.label} and {other.label} are the same data, and hold out "
                f"{held_out[0]} and {held_out[1]} units: give both one num_validation_units"
            )


def _identity(sources: Sequence[Source]) -> dict[str, Any]:
    """What is read: of one dataset its fields, of several a list of them with their weights."""
    each = [
        source.corpus.identity | {"num_validation_units": source.num_validation_units}
        for source in sources
    ]
    if len(sources) == 1:
        return each[0]
    total = sum(source.weight for source in sources)
    mixed = [{"weight": str(source.weight / total), "epochs": source.epochs} for source in sources]
    return {"datasets": [one | how for one, how in zip(each, mixed, strict=True)]}


def flat(identity: dict[str, Any]) -> dict[str, Any]:
    """`identity` with a field of the n-th dataset as datasets[n].FIELD."""
    rest = dict(identity)
    datasets = rest.pop("datasets", [])
    flat = {
        f"datasets[{n}].{name}": value
        for n, dataset in enumerate(datasets)
        for name, value in dataset.items()
    }
    return {"datasets": len(datasets) or 1} | flat | rest


def refuse_different(identities: Sequence[dict[str, Any]]) -> None:
    """Refuse processes whose streams are others than rank 0's: machines with files of their own."""
    first, *others = map(flat, identities)
    if differing := {key for each in others for key in first if each.get(key) != first[key]}:
        raise UserError(
            f"the processes of this launch see different data ({', '.join(sorted(differing))}): "
            "every machine needs the same files and tokenizer, or a dataset_revision that stays"
        )


def _check_identity(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse another stream than the one that was saved."""
    for name in [*current, *saved]:
        then, now = saved.get(name), current.get(name)
        place, _, field = name.rpartition(".")
        shown = FIELD_OF.get(field, field)
        if place:  # of a mixture, whose entries have no `dataset_` before their fields
            shown = f"{shown.removeprefix('dataset_')} of {place}"
        if then != now:
            raise UserError(
                f"cannot resume the data stream: {shown} was {then!r} in the checkpoint and is "
                f"{now!r} now: set it back, or start anew (a run does under another exp_name)"
            )


def _check_units(source: Source, num_lanes: int) -> None:
    corpus, num_validation_units = source.corpus, source.num_validation_units
    num_training_units = corpus.num_units - num_validation_units
    if corpus.num_held_out_units not in (0, num_validation_units):
        raise UserError(
            f"num_validation_units: the files of {source.label} say by their names what is held "
            f"out ({corpus.num_held_out_units} units); set it to null"
        )
    if num_validation_units < 0 or num_training_units < 1:
        raise UserError(
            f"num_validation_units: {num_validation_units} of {source.label}'s {corpus.num_units} "
            "units leave none to train on"
        )
    if num_training_units >= num_lanes:
        return
    num_documents = corpus.total_documents(source.training_units)
    # Where none is known, a lane without documents is told when it is read.
    if num_documents is not None and num_documents < num_lanes:
        raise UserError(
            f"num_lanes: {num_lanes} lanes are more than the {num_documents} documents to train on "
            f"of {source.label}"
        )
