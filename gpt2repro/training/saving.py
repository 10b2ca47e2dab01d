"""Checkpoints of a running training: copied at their step, written beside the steps that follow."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2repro import UserError
from gpt2repro.publishing.background import BackgroundPush
from gpt2repro.recipe import ResolvedRecipe
from gpt2repro.records import checkpoints
from gpt2repro.records.provenance import Chain, Record, branch_of
from gpt2repro.records.run_directory import RunDirectory
from gpt2repro.system import ranks
from gpt2repro.training.learner import Learner


@dataclass
class Checkpoints:
    """Saves, one at a time, and hands on to the Hub what the recipe wants there."""

    directory: RunDirectory
    recipe: ResolvedRecipe
    newest: Path | None  # on rank 0: where this launch goes on, then what it has written last
    first_step: int  # of this launch
    saved_step: int  # of the newest checkpoint that is as it should be, -1 without one
    chain: Chain
    push: BackgroundPush | None  # on the main process, if the recipe asks
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _written: Future[tuple[Path, Record | None]] | None = None  # on rank 0
    _in_flight: bool = False

    def save(
        self, step: int, learner: Learner, state: dict[str, Any], *, stable: bool = False
    ) -> None:
        """Copy the state before `step`, and let it be written; every rank calls, after `wait`.

        `stable`: also where it is kept until a longer run's cooldown begins.
        """
        assert not self._in_flight, "what waits to be written takes as much memory again"
        snapshot = checkpoints.snapshot(
            step=step, model=learner.model, optimizer=learner.optimizer, state=state
        )
        self.saved_step, self._in_flight = step, True
        if ranks.rank() == 0:
            self._written = self._writer.submit(self._write, snapshot, stable=stable)

    def _write(self, snapshot: checkpoints.Snapshot, *, stable: bool) -> tuple[Path, Record | None]:
        if stable:
            checkpoints.write(self.directory.stable, snapshot, keep_last=1, keep_permanent=False)
        place, keep_last = self.directory.checkpoints, self.recipe.keep_last
        path = checkpoints.write(place, snapshot, keep_last=keep_last)
        strategy, permanent = self.recipe.hub_strategy, snapshot.state["permanent"]
        if self.push is not None and (strategy == "all" or permanent) and strategy != "final":
            branch = branch_of(snapshot.step) if permanent else None
            self.push.submit(path, f"Step {snapshot.step}", branch)
        return path, checkpoints.record_of(path)

    def is_done(self) -> bool:
        """Whether nothing is being written, on this rank."""
        return self._written is None or self._written.done()

    def check(self) -> None:
        """Raise, on rank 0, what is known by now to have kept a checkpoint from being written."""
        if self._written is not None and self.is_done():
            self._written.result()

    def wait(self) -> None:
        """Until nothing is being written any more; every rank calls.

        Raises:
            UserError: a checkpoint could not be written, on every rank.
        """
        if not self._in_flight:
            return
        problem, self._in_flight = None, False
        if self._written is not None:
            try:
                self.newest, record = self._written.result()
                self.chain.link(record)
            except UserError as error:
                problem = str(error)
            self._written = None
        try:
            ranks.agree_on(problem)
        except UserError:
            self.saved_step = -1
            raise

    def close(self) -> None:
        """End the writer, when it has written what it was given."""
        self._writer.shutdown()
