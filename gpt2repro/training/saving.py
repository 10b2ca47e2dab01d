"""Checkpoints of a running training: copied at their step, written beside the steps that follow."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gpt2repro import UserError
from gpt2repro.publishing.background import BackgroundPush
from gpt2repro.recipe_fields import ResolvedRecipe
from gpt2repro.records import checkpoints
from gpt2repro.records.provenance import Chain, Record, branch_of
from gpt2repro.records.run_directory import RunDirectory
from gpt2repro.system import ranks
from gpt2repro.training.learner import Learner


class Written(NamedTuple):
    """What became of a checkpoint; nothing is known of it but on rank 0."""

    path: Path | None = None
    record: Record | None = None
    problem: str | None = None

    def check(self) -> None:
        if self.problem is not None:
            raise UserError(self.problem)


@dataclass
class Checkpoints:
    """Saves, one at a time, and hands on to the Hub what the recipe wants there."""

    directory: RunDirectory
    recipe: ResolvedRecipe
    newest: Path | None  # on rank 0: where this launch goes on, then what it has written last
    first_step: int  # of this launch
    saved_step: int  # of the newest checkpoint that is as it should be, -1 without one
    chain: Chain  # on rank 0
    push: BackgroundPush | None  # on the main process, if the recipe asks
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    in_flight: bool = False  # until `wait`
    _written: Future[Written] | None = None  # on rank 0

    def save(
        self, step: int, learner: Learner, state: dict[str, Any], *, stable: bool = False
    ) -> None:
        """Copy the state before `step`, and let it be written; every rank calls, after `wait`.

        `stable`: also where it is kept until a longer run's cooldown begins.
        """
        assert not self.in_flight, "what waits to be written takes as much memory again"
        snapshot = checkpoints.take_snapshot(
            step=step, model=learner.model, optimizer=learner.optimizer, state=state
        )
        self.saved_step, self.in_flight = step, True
        if ranks.rank() == 0:
            self._written = self._writer.submit(self._write, snapshot, stable=stable)

    def _write(self, snapshot: checkpoints.Snapshot, *, stable: bool) -> Written:
        place, keep_last = self.directory.checkpoints, self.recipe.keep_last
        try:
            if stable:
                stable_place = self.directory.stable
                checkpoints.write(stable_place, snapshot, keep_last=1, keep_permanent=False)
            path = checkpoints.write(place, snapshot, keep_last=keep_last)
            record = checkpoints.record_of(path)
        except (UserError, OSError, ValueError) as error:  # the latter of one that has vanished
            return Written(problem=str(error))  # an error would hold the snapshot
        strategy, permanent = self.recipe.hub_strategy, snapshot.state["permanent"]
        if self.push is not None and (strategy == "all" or permanent) and strategy != "final":
            branch = branch_of(snapshot.step) if permanent else None
            self.push.submit(path, f"Step {snapshot.step}", branch)
        return Written(path, record)

    def is_done(self) -> bool:
        """Whether nothing is being written, on this rank."""
        return self._written is None or self._written.done()

    def check(self) -> None:
        """Raise, on rank 0, what is known by now to have kept a checkpoint from being written."""
        if self._written is not None and self.is_done():
            self._written.result().check()

    def wait(self) -> None:
        """Until nothing is being written any more; every rank calls.

        Raises:
            UserError: a checkpoint could not be written, on every rank.
        """
        if not self.in_flight:
            return
        written, self.in_flight = self._written.result() if self._written else Written(), False
        self._written = None
        try:
            ranks.on_rank_0(written.check)
        except UserError:
            self.saved_step = -1
            raise
        if written.path is not None:
            self.newest = written.path
            self.chain.link(written.record)

    def close(self) -> None:
        """End the writer, when it has written what it was given."""
        self._writer.shutdown()
