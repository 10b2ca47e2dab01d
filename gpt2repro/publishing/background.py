"""Uploads beside a running training, which they never disturb."""

import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from transformers import PreTrainedTokenizerFast

from gpt2repro.publishing.contents import SHIPPED_CODE, read_json
from gpt2repro.publishing.upload import to_publish, upload
from gpt2repro.system.text import printable


@dataclass(frozen=True)
class _Submission:
    directory: Path  # what was submitted
    snapshot: Path  # what is uploaded: hard links to it
    message: str


class BackgroundPush:
    """Uploads directories one after the other beside a running training, which it never disturbs.

        push = BackgroundPush("me/gpt2")
        push.submit(directory, "Step 500")     # returns at once
        for problem in push.finish(600): print(problem)

    A submission is held by hard links, so that pruning or replacing the directory does no harm. One
    that waits is superseded by the next: after an outage the newest is uploaded, not all of them. A
    checkpoint is completed by the model's code and the `tokenizer`, so that it loads from the Hub.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool = False,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        self.url: str | None = None  # of the last upload that succeeded
        self._repo_id, self._private, self._tokenizer = repo_id, private, tokenizer
        self._problems: list[str] = []
        self._waiting: _Submission | None = None
        self._current: _Submission | None = None
        self._finishing = False
        self._changed = threading.Condition()
        disable_progress_bars()  # they would draw over the training's
        self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
        self._thread.start()

    def submit(self, directory: Path, message: str) -> None:
        """Upload `directory` when the worker is free; never raises."""
        with self._changed:
            in_use = [each.snapshot for each in (self._current, self._waiting) if each]
            try:
                held = _snapshot(directory, in_use)
                _complete(held, self._tokenizer)
                submission = _Submission(directory, held, message)
            except Exception as error:  # whatever it is, the training goes on
                self._problems.append(
                    f"{directory} could not be prepared for the push: {printable(str(error))}"
                )
                return
            if self._waiting:
                shutil.rmtree(self._waiting.snapshot, ignore_errors=True)
            self._waiting = submission
            self._changed.notify()

    def finish(self, timeout: float | None = None) -> list[str]:
        """Wait up to `timeout` seconds for what was submitted; one line for each problem."""
        with self._changed:
            self._finishing = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            left = self._waiting or self._current
            late = [_advice(left, self._repo_id, f"was not done after {timeout} s")] if left else []
            return self._problems + late

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._finishing)
                self._current, self._waiting = self._waiting, None
            if self._current is None:
                return
            problem = self._push(self._current)
            with self._changed:
                shutil.rmtree(self._current.snapshot, ignore_errors=True)
                self._current = None
                self._problems += [problem] if problem else []

    def _push(self, submission: _Submission) -> str | None:
        """Upload one submission; returns the problem, if there was one."""
        try:
            self.url = upload(
                submission.snapshot,
                self._repo_id,
                message=submission.message,
                private=self._private,
            )
        except Exception as error:  # a push must never end a run
            reason = printable(" ".join(str(error).split()))[:300]
            return _advice(submission, self._repo_id, f"failed: {reason}")
        return None


def _advice(submission: _Submission, repo_id: str, what: str) -> str:
    return (
        f"the push of {submission.directory} ({submission.message}) to {repo_id} {what}. Nothing "
        f"is lost: `gpt2repro push --model DIR --repo {repo_id}` uploads it"
    )


def _snapshot(directory: Path, in_use: list[Path]) -> Path:
    """Hard links to the files of `directory`, beside it: they outlive its removal at no cost.

    Snapshots that are not `in_use` were left by a killed run and go.
    """
    for left in directory.absolute().parent.glob(".pushing-*"):
        if left not in in_use:
            shutil.rmtree(left, ignore_errors=True)
    files = to_publish(directory)
    place = Path(tempfile.mkdtemp(prefix=".pushing-", dir=directory.absolute().parent))
    for path in files:
        try:
            os.link(path, place / path.name)
        except OSError:  # a file system without hard links
            shutil.copy(path, place / path.name)
    return place


def _complete(directory: Path, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Add what `from_pretrained` needs and a training checkpoint lacks."""
    if read_json(directory / "config.json").get("model_type") == "gpt2repro":
        for source in SHIPPED_CODE.values():
            if not (directory / source.name).exists():
                shutil.copy(source, directory)
    if tokenizer is not None and not (directory / "tokenizer.json").exists():
        tokenizer.save_pretrained(directory)
