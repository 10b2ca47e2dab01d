"""Uploads beside a running training, which they never disturb."""

import copy
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.utils import disable_progress_bars
from transformers import PreTrainedTokenizerFast

from gpt2repro.publishing.branches import is_published, set_aside
from gpt2repro.publishing.export import stage
from gpt2repro.publishing.upload import NOT_PUBLISHED, to_publish, upload
from gpt2repro.records import checkpoints, integrity
from gpt2repro.records.hub_checkpoints import METRICS, STATE_FOLDER, read_record
from gpt2repro.records.provenance import Record
from gpt2repro.system import atomic
from gpt2repro.system.hub import read_tree
from gpt2repro.system.patience import patiently
from gpt2repro.system.text import printable


class Told(NamedTuple):
    """What a run says of a checkpoint: a card, and the lines of metrics.jsonl until there."""

    card: str
    metrics: str


@dataclass(frozen=True)
class Checkpoints:
    """How checkpoints are published.

    tokenizer, format: of what others load, see `export`.
    with_state: what a run needs to go on goes with them.
    tell: of a step.
    """

    tokenizer: PreTrainedTokenizerFast
    format: str
    with_state: bool
    tell: Callable[[int], Told]


@dataclass(frozen=True)
class _Submission:
    directory: Path  # what was submitted
    snapshot: Path  # what is uploaded: hard links to it
    message: str
    branch: str | None  # of a permanent checkpoint


class BackgroundPush:
    """Uploads directories one after the other beside a running training, which it never disturbs.

        push = BackgroundPush("me/gpt2", checkpoints=how)
        push.submit(directory, "Step 500")     # returns at once
        for problem in push.finish(): print(problem)

    A submission is held by hard links, so that pruning or replacing the directory does no harm. It
    becomes `main`. One that waits is superseded by the next: after an outage the newest is
    uploaded, not all of them. But none with a branch: these are uploaded in their order, each to
    its branch, and to `main` once the Hub has said that the branch holds its bytes. What is there
    already is not sent again.

    Attributes:
        url: of the last upload that succeeded.
        lacks: branches that could not be uploaded.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool = False,
        checkpoints: Checkpoints | None = None,
        going_on_from: int | None = None,
    ) -> None:
        """`going_on_from`: branches of later steps are set aside first."""
        self.url: str | None = None
        self.lacks: list[str] = []
        self._repo_id, self._private, self._how = repo_id, private, checkpoints
        if checkpoints is not None:  # the training may use its own at any time
            self._tokenizer = copy.deepcopy(checkpoints.tokenizer)
        self._going_on_from, self._newest = going_on_from, going_on_from or 0
        self._main: Record | None = None  # what it holds, once the Hub was asked
        self._problems: list[str] = []
        self._waiting: list[_Submission] = []
        self._current: _Submission | None = None
        self._finishing = False
        self._changed = threading.Condition()
        disable_progress_bars()  # they would draw over the training's
        self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
        self._thread.start()

    def submit(self, directory: Path, message: str, branch: str | None = None) -> None:
        """Upload `directory` when the worker is free; never raises."""
        with self._changed:
            in_use = [each.snapshot for each in (self._current, *self._waiting) if each]
            try:
                held = _snapshot(directory, in_use)
            except Exception as error:  # whatever it is, the training goes on
                self._problems.append(
                    f"{directory} could not be prepared for the push: {printable(str(error))}"
                )
                return
            for superseded in [each for each in self._waiting if each.branch is None]:
                self._waiting.remove(superseded)
                shutil.rmtree(superseded.snapshot, ignore_errors=True)
            self._waiting.append(_Submission(directory, held, message, branch))
            self._changed.notify()

    def finish(self) -> list[str]:
        """Wait for what was submitted; one line for each problem."""
        with self._changed:
            self._finishing = True
            self._changed.notify()
        self._thread.join()
        return self._problems

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._finishing)
                self._current = self._waiting.pop(0) if self._waiting else None
            if self._current is None:
                return
            problem = self._push(self._current)
            with self._changed:
                shutil.rmtree(self._current.snapshot, ignore_errors=True)
                if problem:
                    self._problems.append(problem)
                    self.lacks += [self._current.branch] if self._current.branch else []
                self._current = None

    def _push(self, submission: _Submission) -> str | None:
        """Upload one submission; returns the problem, if there was one."""
        try:
            if self._going_on_from is not None:
                step = self._going_on_from
                patiently(lambda: set_aside(self._repo_id, step), f"list {self._repo_id}")
                self._going_on_from = None
            if (submission.snapshot / integrity.MARKER).exists():
                self._push_checkpoint(submission)
            else:
                self._upload(submission.snapshot, submission)
        except Exception as error:  # a push must never end a run
            reason = printable(" ".join(str(error).split()))[:300]
            return _advice(submission, self._repo_id, reason)
        return None

    def _push_checkpoint(self, submission: _Submission) -> None:
        """To its branch if it has one, and then, as the newest, to `main`."""
        how, held, branch = self._how, submission.snapshot, submission.branch
        assert how is not None, "nobody loads it without a tokenizer"
        step, record = integrity.read_saved_state(held).step, checkpoints.record_of(held)
        self._newest = max(self._newest, step)
        to_branch, to_main = branch is not None, True
        if branch and record:
            to_branch, to_main = patiently(
                lambda: self._what_lacks(branch, record), f"look at {branch} of {self._repo_id}"
            )
        if not to_branch and not to_main:
            return
        told, export = how.tell(step), held / "export"
        stage(held, export, self._tokenizer, format=how.format, card=told.card, record=record)
        beside = {}
        if how.with_state:
            (held / METRICS).write_text(told.metrics, encoding="utf-8")
            files = [path for path in sorted(held.iterdir()) if path.is_file()]
            beside = {f"{STATE_FOLDER}/{p.name}": p for p in files if p.name != integrity.WEIGHTS}
        if to_branch:
            self._upload(export, submission, revision=branch, beside=beside)
        if to_main:
            self._upload(export, submission, beside=beside)
            self._main = record

    def _what_lacks(self, branch: str, record: Record) -> tuple[bool, bool]:
        """Whether the branch, and `main`, are still to be made this checkpoint."""
        assert self._how is not None
        there = is_published(self._repo_id, branch, record, with_state=self._how.with_state)
        if self._main is None:  # once, and not for each of a thousand
            tree = read_tree(self._repo_id, "main", may_lack=True)
            self._main = read_record(self._repo_id, "main", tree)
        is_newer = self._main is not None and record.step < self._main.step <= self._newest
        return not there, self._main != record and not is_newer

    def _upload(
        self, directory: Path, submission: _Submission, revision: str | None = None, **more: Any
    ) -> None:
        if revision is None:
            self._main = None
        more |= {"message": submission.message, "private": self._private, "revision": revision}
        self.url = upload(directory, self._repo_id, **more)


def _advice(submission: _Submission, repo_id: str, reason: str) -> str:
    again = f"`gpt2repro push --model DIR --repo {repo_id}` uploads it"
    if submission.branch:
        again = "the same training command pushes it again"
    return (
        f"the push of {submission.directory} ({submission.message}) to {repo_id} failed: {reason}. "
        f"Nothing is lost: {again}"
    )


def _snapshot(directory: Path, in_use: list[Path]) -> Path:
    """Hard links to the files of `directory`, beside it: they outlive its removal at no cost.

    Snapshots that are not `in_use` were left by a killed run and go.
    """
    for left in directory.absolute().parent.glob(".pushing-*"):
        if left not in in_use:
            shutil.rmtree(left, ignore_errors=True)
    files = to_publish(directory)
    files += [path for name in sorted(NOT_PUBLISHED) if (path := directory / name).is_file()]
    place = Path(tempfile.mkdtemp(prefix=".pushing-", dir=directory.absolute().parent))
    for path in files:
        atomic.link(path, place / path.name)
    return place
