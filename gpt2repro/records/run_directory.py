"""The directory of a run: its files, who may write them, and where a new launch goes on.

runs/<exp_name>/
    recipe.yaml  metrics.jsonl  launches.jsonl  tracker.json  loss_curve.png  checkpoints/
    incidents/  final/  final-ema/  FINISHED
"""

import errno
import fcntl
import json
import re
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from gpt2repro import UserError
from gpt2repro.records import checkpoints, hub_checkpoints
from gpt2repro.records.metrics import read_lines, rewind_metrics
from gpt2repro.system import atomic
from gpt2repro.system.diagnosis import PASSING_ERRNO
from gpt2repro.system.text import printable

LOCK = ".lock"
FINISHED = "FINISHED"
# What schedulers, desktops and file systems put into a directory before or beside a run; and hidden
# files of ours, such as those of a launch that was killed before its first file was whole.
NOT_A_RUNS = re.compile(
    r"\.(?!git$).*|Thumbs\.db|desktop\.ini|lost\+found|__pycache__"
    r"|.+\.(log|out|err|pid|sh|slurm|sbatch)"
)
# What some file systems of clusters answer, which have no locks.
ENOTSUPP = 524  # the kernel's own, which leaks through some network file systems
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, ENOTSUPP)
# How long a launch waits for one that was told to stop: it finishes its step and saves.
PATIENCE_SECONDS = 60.0


class Launch(BaseModel):
    """A line of launches.jsonl: where a launch began, and when."""

    model_config = ConfigDict(strict=True)

    step: int = Field(ge=0)
    date: str


@dataclass(frozen=True)
class Start:
    """Where a launch begins: `step` 0 without a checkpoint, else what the checkpoint recorded."""

    path: Path | None
    state: dict[str, Any]
    note: str  # what the user should know

    @property
    def step(self) -> int:
        return self.state.get("step", 0)

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe of the launch that saved the checkpoint; empty without one."""
        return self.state.get("recipe", {})


def run_of(model: Path) -> Path:
    """The run that a checkpoint belongs to, also one that was set aside."""
    model = model.resolve()
    found = [each.parent for each in model.parents if each.name == "checkpoints"]
    return found[0] if found else model.parent.parent


def saved_recipe(run: Path) -> dict[str, Any]:
    """The fields of a run's recipe.yaml as they were saved; {} where there is none.

    Raises:
        UserError: the file cannot be read.
    """
    path = run / "recipe.yaml"
    if not path.is_file():
        return {}
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # of a damaged file yaml raises whatever it meets
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} cannot be read: it is no mapping of fields to values")
    return fields


def finished_step(run: Path) -> int | None:
    """The step that a run's `final/` is of, once nothing was left to do there; else None."""
    try:
        return int((run / FINISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_resumes(run: Path) -> list[int]:
    """The steps at which later launches went on, as launches.jsonl has them."""
    steps: list[int] = []
    for line in read_lines(run / "launches.jsonl", Launch)[0]:
        steps = [step for step in steps if step < line["step"]]  # the others were left
        steps += [line["step"]] if line["step"] else []
    return steps


class RunDirectory:
    """The paths of a run's files, and what may be done with them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"
        self.launches = path / "launches.jsonl"
        self.tracker = path / "tracker.json"
        self.loss_curve = path / "loss_curve.png"
        self.checkpoints = path / "checkpoints"
        self.stable = self.checkpoints / "stable"  # from before a cooldown, for a longer run
        self.arrivals = path / ".hub"  # what comes from the Hub, until the run is opened
        self.incidents = path / "incidents"
        self.final = path / "final"
        self.average = path / "final-ema"  # of the weights, where it is better on held-out text
        self.preempted = path / "PREEMPTED"
        # Its step: `final/` is of it, and was pushed if asked. 0: of a line that was left.
        self.finished = path / FINISHED
        self._lock: IO[str] | None = None
        self._writes = False  # this process does, be the lock in its hand or lost
        # Of launches.jsonl, whose next line is another launch's; None: nobody has looked yet.
        self._launches_bytes: int | None = None

    def find_start(self, resume: str) -> Start:
        """Find the checkpoint to go on from; nothing is written but what comes from the Hub.

        From here on no other launch may write: a checkpoint that came later would be lost.

        Args:
            resume: `auto`, `never`, a checkpoint directory, or `hub:` and a name there.

        Raises:
            UserError: the directory is not a run's, or another process writes it; `never` and there
                is one; no such checkpoint; or its own newest one cannot be read now.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir {self.path} is a file; give a directory")
        try:
            if (self.path / LOCK).is_file():  # else nobody has written here yet
                self._keep_others_out(PATIENCE_SECONDS)
            self._launches_bytes = self._count_launches_bytes()
            for directory in (self.checkpoints, self.stable):
                if self._lock is not None:
                    checkpoints.put_back(directory)
            names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        except OSError as error:
            raise UserError(f"output_dir {self.path} cannot be read: {error}") from None
        exists = not all(NOT_A_RUNS.fullmatch(name) for name in names)
        if exists and not self.recipe.exists():
            other = min(name for name in names if not NOT_A_RUNS.fullmatch(name))
            raise UserError(
                f"output_dir {self.path} holds files of something else ({printable(other)}); "
                "give a new or empty one"
            )
        if resume == "never" and exists:
            raise UserError(
                f"{self.path} holds a run and --resume never forbids to touch it; "
                "give another exp_name, or --resume auto to go on"
            )
        path, broken = checkpoints.find_latest(self.checkpoints)
        state = checkpoints.state_of(path) if path else {}
        if resume not in ("auto", "never") and resume != state.get("recipe", {}).get("resume"):
            if resume.startswith(hub_checkpoints.PREFIX):
                path = self._fetch(resume)
                return Start(path, checkpoints.state_of(path), f"Resuming from {resume}.")
            path = Path(resume)
            return Start(path, checkpoints.read_state(path), f"Resuming from {path}.")
        notes = [f"{each.name} is passed over: {why}." for each, why in broken.items()]
        if path is None:
            if exists:
                notes.append(f"{self.path} has no valid checkpoint: starting at step 0.")
            return Start(None, {}, " ".join(notes))
        notes.append(f"{self.path} exists: going on from its step {state['step']}.")
        return Start(path, state, " ".join([*notes, self._loss_of_lines(state)]).strip())

    def _fetch(self, resume: str) -> Path:
        try:
            self.arrivals.mkdir(parents=True, exist_ok=True)
            self._keep_others_out(PATIENCE_SECONDS)
            return hub_checkpoints.fetch(resume, self.arrivals)
        except OSError as error:
            raise UserError(f"output_dir {self.path} cannot be written: {error}") from None

    def taken_in(self, start: Path | None) -> Path | None:
        """Where the checkpoint `start` lies once the run is opened."""
        came = start is not None and start.parent == self.arrivals
        return self.checkpoints / start.name if came and start else start

    def _take_in(self, step: int) -> None:
        """What came from the Hub becomes the run's own."""
        came = checkpoints.checkpoint_path(self.arrivals, step)
        self.checkpoints.mkdir(exist_ok=True)
        atomic.move_into_place(came, self.checkpoints / came.name)
        metrics = self.arrivals / hub_checkpoints.STATE_FOLDER / hub_checkpoints.METRICS
        if metrics.exists() and not self.metrics.exists():
            metrics.rename(self.metrics)

    def _loss_of_lines(self, state: dict[str, Any]) -> str:
        """What metrics.jsonl lacks of the lines that the checkpoint knew of, in words."""
        records, bad = read_lines(self.metrics)
        num_there = sum(record["step"] < state["step"] for record in records)
        num_lost = state.get("metrics_lines", 0) - num_there
        damaged = f" (line {bad[0]} cannot be read)" if bad else ""
        if num_lost <= 0 and not bad:
            return ""
        return f"{self.metrics.name} has lost {max(num_lost, len(bad))} lines{damaged}."

    def open(self, first_step: int, recipe: str, start: Path | None = None) -> list[dict[str, Any]]:
        """Create or claim the directory and return the metrics before `first_step`.

        `recipe` is the text of its recipe.yaml, `start` the checkpoint that is gone on from.

        Later steps that it knows of are of a line that is left here: their metrics are cut off,
        their checkpoints set aside in `checkpoints/superseded/`.

        Raises:
            UserError: another process writes this run, or the directory cannot be written.
        """
        try:
            for each in (self.path, *self.path.parents):
                if each.is_symlink() and not each.exists():
                    raise UserError(
                        f"output_dir {self.path}: {each} is a link to {each.readlink()}, which is "
                        "not there: make it, or mount its disk"
                    )
            self.path.mkdir(parents=True, exist_ok=True)
            self._writes = True
            self._keep_others_out(patience=0.0)
            for file in (self.recipe, self.metrics, self.tracker):
                for left in atomic.leftovers(file):
                    left.unlink()  # nobody else writes them
            self._write_recipe(recipe)
            self.preempted.unlink(missing_ok=True)
            if (finished_step(self.path) or 0) > first_step:
                self.mark_finished(0)
            for directory in (self.stable, self.checkpoints):
                checkpoints.supersede(directory, first_step)
            if self.taken_in(start) != start:
                self._take_in(first_step)
            shutil.rmtree(self.arrivals, ignore_errors=True)
            self._record_launch(first_step)
            return rewind_metrics(self.metrics, first_step)
        except OSError as error:
            raise UserError(f"output_dir {self.path} cannot be written: {error}") from None

    def _write_recipe(self, recipe: str) -> None:
        with atomic.new_file(self.recipe, durable=True) as scratch:
            scratch.write_text(recipe, encoding="utf-8")

    def _record_launch(self, first_step: int) -> None:
        line = {"step": first_step, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        with atomic.naming(self.launches), self.launches.open("ab+") as file:
            file.seek(max(0, file.tell() - 1))
            ended = file.read() in (b"", b"\n")  # else a loss of power cut the last line off
            file.write(b"\n" * (not ended) + json.dumps(line).encode() + b"\n")
            self._launches_bytes = file.tell()

    def mark_finished(self, step: int) -> None:
        """The run is at its end, and nothing is left to do."""
        with atomic.new_file(self.finished, durable=True) as scratch:
            scratch.write_text(f"{step}\n", encoding="utf-8")

    def is_finished(self, step: int) -> bool:
        """Whether a run of `step` steps has nothing left to do here."""
        return finished_step(self.finished.parent) == step and self.final.is_dir()

    def check_still_there(self) -> None:
        """Raise `UserError` if somebody has removed or moved the run that this process writes.

        Or has taken its lock for a stale one, and begun to write it as well. What a file system of
        a network fails to answer now, it is asked for again before the next batch.
        """
        if self._writes and not self._is_there():
            raise UserError(
                f"{self.path} was removed or moved while it was written; what was left to save is "
                "there again, and the same command goes on from it"
            )
        self._hold_lock()

    def _hold_lock(self) -> None:
        """Take it again, if it is there no more."""
        try:
            if self._lock is not None and not atomic.is_at(self._lock, self.path / LOCK):
                self._drop_lock()
            if self._writes:
                self._keep_others_out(patience=0.0)
        except OSError as error:
            if error.errno not in PASSING_ERRNO:
                raise

    def _is_there(self) -> bool:
        """Whether the run is; what cannot be asked now is."""
        try:
            self.recipe.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            if error.errno not in PASSING_ERRNO:
                raise
        return True

    def restore(self, recipe: str) -> bool:
        """If it was removed, make the directory anew, so that a checkpoint in it is a run's.

        Returns whether it was.

        Raises:
            UserError: another process writes there, or has since this one opened it.
        """
        is_lost = self._writes and not self._is_there()
        if is_lost:
            self._drop_lock()
            self._launches_bytes = 0
            self.path.mkdir(parents=True, exist_ok=True)
        self._hold_lock()
        if is_lost:
            self._write_recipe(recipe)
        return is_lost

    def _keep_others_out(self, patience: float) -> None:
        """Be the one process that may write, if need be after waiting for another to leave.

        Raises:
            UserError: it does not leave; or another launch began here since this one has looked.
        """
        if self._lock is not None:
            return
        lock = (self.path / LOCK).open("a")
        give_up, waiting = time.monotonic() + patience, False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel ends it with us
                if atomic.is_at(lock, self.path / LOCK):
                    break
                lock.close()  # while we waited it was removed: others lock the one that is there
                lock = (self.path / LOCK).open("a")
            except BlockingIOError:
                said = f"{self.path} is being written by another process"
                if time.monotonic() >= give_up:
                    raise UserError(f"{said}; stop it or give another exp_name") from None
                if not waiting:
                    print(f"{said}: waiting {patience:.0f} s for its end", flush=True)
                waiting = True
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                said = f"{self.path} cannot be locked here ({error.strerror})"
                print(f"{said}: see to it that no other launch writes it", flush=True)
                break
        if self._launches_bytes not in (None, self._count_launches_bytes()):
            lock.close()
            raise UserError(
                f"{self.path}: another launch has been here since this one began, which changes "
                "nothing there; the same command goes on from what it left"
            )
        self._lock = lock

    def _count_launches_bytes(self) -> int:
        try:
            return self.launches.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def close(self) -> None:
        """Let others write."""
        self._writes = False
        self._drop_lock()

    def _drop_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
