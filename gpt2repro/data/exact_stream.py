"""The token stream for any loop: a dataset for torch that needs neither a recipe nor accelerate.

`TokenStream` gives the rows of whole optimizer steps to our own loop. `ExactStream` opens what it
is named, deals the rows out in micro-batches as models of transformers take them, and speaks the
protocol by which torch's loaders save and restore a dataset: `state_dict`, `load_state_dict`.
"""

import operator
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from gpt2repro import UserError
from gpt2repro.data.dataset import Dataset, held_out_of, named
from gpt2repro.data.opening import open_sources
from gpt2repro.data.rows.order import LaneState
from gpt2repro.data.rows.stream import TokenStream, refuse_different
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.encoder import BulkEncoder

MOST_LANES = 64  # by default; as many processes, at most, can share the stream
STEPS_BACK = 8  # for loops that take batches before they train on them

Batch = dict[str, torch.Tensor]


class ExactStream(IterableDataset):
    """An endless iterable of this process's micro-batches: the same rows however many processes.

    A batch is {"input_ids": (B, T), "shift_labels": (B, T), "labels": (B, T)}, int64. The targets
    are `shift_labels`, the tokens after the inputs, one for each. Models of transformers take
    `labels` as a sign that a loss is wanted, and `shift_labels` in their place; a loop of your own
    ignores `labels`.

    Args:
        dataset_name: a dataset of the Hub, a directory, a file; or a mixture, as a list of what a
            recipe's `datasets` has: [{"name": ..., "weight": 0.7, "epochs": None}, ...].
        config, split, revision, data_files, text_column, document: as `open_corpus` has them; for
            one dataset, each of several has its own.
        tokenizer: a fast tokenizer, or the name of one.
        sequence_length: T.
        rows_per_step: of one optimizer step, over all processes. What a step has depends on this
            and the seed, never on the number of processes or on `micro_batch_size`.
        micro_batch_size: B, rows of a batch; by default all that this process has of a step.
        num_lanes: places at which the dataset is read side by side. Divides `rows_per_step`, and
            the number of processes must divide it. By default the largest such power of two up to
            64 that divides `rows_per_step`.
        order, chunk_rows: "file" reads shards of token ids as other projects do; as in a recipe.
        num_validation_units: units at a dataset's beginning that are kept from training; None is
            none, but for shards whose names say that they are for validation.
        rank, world_size: by default torch.distributed's, else those of torchrun's environment.
        num_reader_threads, token_cache_dir, unit_digests_dir: as in a recipe.

    Attributes:
        step: how many steps were taken, all of their batches.
        digest: of the rows that this process took in its last step; the sum over the processes
            mod 2**64 is the step's, whatever their number.

    Raises:
        UserError: one line that names the argument, as the recipe calls it.
    """

    def __init__(
        self,
        dataset_name: str | Path | Sequence[Mapping[str, Any]],
        *,
        tokenizer: Any,
        sequence_length: int,
        rows_per_step: int,
        micro_batch_size: int | None = None,
        config: str | None = None,
        split: str = "train",
        revision: str | None = None,
        data_files: str | list[str] | None = None,
        text_column: str = "text",
        document: str | None = None,
        seed: int = 1337,
        order: str = "shuffled",
        chunk_rows: int | None = None,
        num_lanes: int | None = None,
        num_validation_units: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        num_reader_threads: int = 4,
        token_cache_dir: str | Path | None = None,
        unit_digests_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        num_validation_units = _whole_or_none("num_validation_units", num_validation_units, least=0)
        self._rows_per_step = _whole("rows_per_step", rows_per_step)
        micro_batch_size = _whole_or_none("micro_batch_size", micro_batch_size)
        largest_power_of_two = self._rows_per_step & -self._rows_per_step
        most_lanes = min(MOST_LANES, largest_power_of_two)
        options: dict[str, Any] = {
            "sequence_length": _whole("sequence_length", sequence_length),
            "rows_per_step": self._rows_per_step,
            "num_lanes": _whole_or_none("num_lanes", num_lanes) or most_lanes,
            "seed": _whole("seed", seed, least=0),
            "order": order,
            "chunk_rows": _whole_or_none("chunk_rows", chunk_rows),
            "num_reader_threads": _whole("num_reader_threads", num_reader_threads),
            "token_cache_dir": token_cache_dir,
            "unit_digests_dir": unit_digests_dir,
        }
        files = [data_files] if isinstance(data_files, str) else data_files
        of_one = {"config": config, "split": split, "revision": revision, "data_files": files}
        of_one |= {"text_column": text_column, "document": document}
        datasets = _datasets(dataset_name, of_one)
        sources = open_sources([held_out_of(each, num_validation_units) for each in datasets])
        self._is_given, (rank, world_size) = rank is not None, _world(rank, world_size)
        options |= {"rank": rank, "world_size": world_size}
        self.stream = TokenStream(sources, _encoder(tokenizer), **options)
        rows = self._rows_per_step // world_size
        self._place, self._rows = (rank, world_size), micro_batch_size or rows
        if rows % self._rows:
            raise UserError(
                f"micro_batch_size {self._rows} does not divide the {rows} rows that each of "
                f"{world_size} processes has of a step"
            )
        self._batches: deque[torch.Tensor] = deque()  # what is left of the step that was begun
        self._begin_at(0)

    def _begin_at(self, step: int) -> None:
        self.step, self.digest = step, 0
        self._lanes_after = {step: self.lanes}  # by number of steps, the last few
        self._batches.clear()

    @property
    def batches_per_step(self) -> int:
        """Of this process: the gradients of as many are accumulated to a step."""
        return self._rows_per_step // self._place[1] // self._rows

    @property
    def lanes(self) -> dict[int, LaneState]:
        """Where the lanes of this process go on."""
        return self.stream.lanes

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise UserError(
                "num_workers: the stream reads ahead in threads of its own, and a worker would "
                "read the same rows once more: DataLoader(stream, batch_size=None, num_workers=0)"
            )
        return iter(self._next, None)  # no generator: it would be over after an error or Ctrl-C

    def _next(self) -> Batch:
        if not self._batches:
            self._check_world()
            rows = next(self.stream)
            self.digest = rows.digest
            self._batches.extend(rows.tokens.split(self._rows))
            self._lanes_after[self.step + 1] = rows.lanes
            self._lanes_after.pop(self.step - STEPS_BACK, None)
        batch = self._batches.popleft()
        self.step += not self._batches
        # Memory of their own: a loop may mask the targets and keep the inputs.
        inputs = batch[:, :-1].clone(memory_format=torch.contiguous_format)
        targets = batch[:, 1:].clone(memory_format=torch.contiguous_format)
        return {"input_ids": inputs, "labels": inputs.clone(), "shift_labels": targets}

    def _check_world(self) -> None:
        """Processes that knew neither each other nor themselves yet would all read the same."""
        if self._is_given or self._place != (0, 1):
            return
        rank, world_size = _world(None, None)
        if world_size > 1:
            raise UserError(
                f"rank, world_size: the stream was made as 0 of 1, this process is {rank} of "
                f"{world_size}: make it after torch.distributed is initialized, or give both"
            )

    def state_dict(
        self, lanes: Mapping[int, LaneState] | None = None, *, step: int | None = None
    ) -> dict[str, Any]:
        """What the next step needs, as plain JSON values; the same on every process.

        Every process calls, between steps: torch.distributed gathers the lanes of all. Without it
        give `lanes`: the `lanes` of all processes in one dict.

        `step`: how many steps were trained on, for a loop that has taken batches beyond them; one
        of the last few.

        Raises:
            UserError: some of a step's batches were taken, others not; or the processes read
                different data.
        """
        self._check_world()
        if step is None and self._batches:
            raise UserError(
                f"state_dict: {len(self._batches)} of the {self.batches_per_step} batches of a "
                "step are still to come: save between steps, or say after which `step`"
            )
        step = self.step if step is None else _whole("step", step, least=0)
        known = [number for number in self._lanes_after if number <= self.step]
        if step not in known:
            raise UserError(f"step {step}: the stream knows {known}")
        if lanes is None:
            lanes = _gathered(self._lanes_after[step], self._place[1], self.stream.identity)
        return {"step": step, "stream": self.stream.state_dict(lanes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, saved by any number of processes.

        Raises:
            UserError: it is damaged, or of another dataset, tokenizer, order; names what differs.
        """
        try:
            step, stream = int(state["step"]), dict(state["stream"])
        except (KeyError, TypeError, ValueError):
            raise UserError("the stream's state is damaged: it is no `state_dict`") from None
        if stream.get("step", step) != step:
            raise UserError("the stream's state is damaged: it is of two steps")
        self.stream.load_state_dict(stream)
        self._begin_at(step)

    def close(self) -> None:
        """End the background threads. Iterating again goes on."""
        self.stream.close()


def _datasets(names: Any, of_one: dict[str, Any]) -> list[Dataset]:
    """What is named: one, whose fields are `of_one`, or several with fields of their own."""
    mixture = [{"name": names, **of_one}] if isinstance(names, str | Path) else names
    if not isinstance(mixture, Sequence):
        raise UserError(f"dataset_name: {names!r} is neither a name nor a list of them")
    return [named(each) for each in mixture]


def _encoder(tokenizer: Any) -> BulkEncoder:
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(str(tokenizer))
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("tokenizer: it takes a fast tokenizer, or the name of one")
    return BulkEncoder(tokenizer)


def _whole(name: str, value: Any, least: int = 1) -> int:
    """What counts something, NumPy's numbers too, as an int that JSON takes."""
    with suppress(TypeError):
        if not isinstance(value, bool) and (number := operator.index(value)) >= least:
            return number
    raise UserError(f"{name}: {value!r} is not allowed; it takes a whole number from {least} on")


def _whole_or_none(name: str, value: Any, least: int = 1) -> int | None:
    return None if value is None else _whole(name, value, least)


def _world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size: as they are given, of torch.distributed, of the environment."""
    if rank is not None and world_size is not None:
        rank, world_size = _whole("rank", rank, least=0), _whole("world_size", world_size)
        if rank >= world_size:
            raise UserError(f"rank {rank} is not in a world of {world_size}: they count from 0")
        return rank, world_size
    if rank is not None or world_size is not None:
        raise UserError("rank and world_size go together")
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    try:
        known = os.environ.get("RANK"), int(os.environ.get("WORLD_SIZE", "1"))
        if known[0] is None and known[1] > 1:
            raise ValueError(f"WORLD_SIZE is {known[1]}, and there is no RANK")
        return int(known[0] or 0), known[1]
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE, of the environment: {error}") from None


def _gathered(
    lanes: dict[int, LaneState], world_size: int, identity: dict[str, Any]
) -> dict[int, LaneState]:
    """The lanes of all processes, which read the same data."""
    if world_size == 1:
        return lanes
    if not dist.is_initialized() or dist.get_world_size() != world_size:
        raise UserError(
            f"state_dict: the lanes of all {world_size} processes are needed, and "
            "torch.distributed does not know them: give them as `lanes`"
        )
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, (lanes, identity))
    refuse_different([identity for _, identity in parts])
    return {lane: state for part, _ in parts for lane, state in part.items()}
