"""The background thread that encodes and packs a few steps ahead of the training."""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpt2repro.data.rows.mixture import Lane
from gpt2repro.data.rows.order import LaneState
from gpt2repro.data.rows.packing import rows_digest
from gpt2repro.data.rows.units import UnitReader
from gpt2repro.system.threads import PoolClosed

NUM_STEPS_AHEAD = 4
LOOK_EVERY_SECONDS = 0.1  # whether the stream was closed meanwhile


@dataclass(frozen=True)
class StepRows:
    """One process's share of a batch, or of the batches of a step.

    tokens: (rows, T+1) int64, of each batch lane after lane.
    digest: `rows_digest` of these rows; add up the processes' mod 2**64 for the step's.
    lanes: {lane: its state after this step}, of this process's lanes.
    """

    tokens: torch.Tensor
    digest: int
    lanes: dict[int, LaneState]


def joined(batches: Sequence[StepRows]) -> StepRows:
    """Successive batches as the rows of one step."""
    if len(batches) == 1:
        return batches[0]
    tokens = torch.cat([batch.tokens for batch in batches])
    digest = sum(batch.digest for batch in batches) % 2**64
    return StepRows(tokens, digest, batches[-1].lanes)


class Producer:
    """The background thread that encodes and packs a few steps ahead."""

    def __init__(
        self, make_lanes: Callable[[], dict[int, Lane]], readers: Sequence[UnitReader]
    ) -> None:
        self._make_lanes, self._readers = make_lanes, readers
        self._steps: queue.Queue = queue.Queue(maxsize=NUM_STEPS_AHEAD)
        self._next: StepRows | BaseException | None = None  # taken from the queue by `wait`
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="token-stream", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether `get` will answer at once; waits up to `seconds` for that."""
        if self._next is None:
            try:
                self._next = self._steps.get(timeout=seconds)
            except queue.Empty:
                return False
        return True

    def get(self) -> StepRows:
        while not self.wait(LOOK_EVERY_SECONDS):
            if self._stop.is_set():
                raise PoolClosed("the stream was closed meanwhile")
        item, self._next = self._next, None
        assert item is not None
        if isinstance(item, BaseException):
            self._next = item  # whoever asks again is told again
            raise item
        return item

    def close(self) -> None:
        """End the threads. A read that waits out an outage ends by itself later; nobody waits.

        Garbage is collected anywhere, also where a thread holds the lock of the queue: it is left
        alone, and who waits there looks at `_stop` every so often.
        """
        self._stop.set()
        for reader in self._readers:
            reader.close()
        if self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _put(self, item: StepRows | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._steps.put(item, timeout=LOOK_EVERY_SECONDS)
            except queue.Full:
                continue

    def _run(self) -> None:
        try:
            lanes = self._make_lanes()
            while not self._stop.is_set():
                self._put(_step(lanes))
        except PoolClosed:
            pass
        except BaseException as error:  # the consumer's to handle, whatever it is
            self._put(error)


def _step(lanes: dict[int, Lane]) -> StepRows:
    parts, states = [], {}
    for number, lane in lanes.items():
        rows, states[number] = next(lane)
        parts.append(rows)
    rows = np.concatenate(parts)
    return StepRows(torch.from_numpy(rows.astype(np.int64)), rows_digest(rows), states)
