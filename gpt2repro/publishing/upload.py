"""Upload an export to the Hub: verified first, patient with faults, also during training.

An interrupted upload is taken up by running it again: the Hub says which whole files it already has
(a large model is several), and nothing is visible there before the one commit at the end.
"""

import argparse
import functools
import inspect
import os
import re
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars
from transformers import PreTrainedTokenizerFast

import configuration_gpt2repro
import modeling_gpt2repro
from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.publishing import model_card
from gpt2repro.publishing.verification import read_json, verify
from gpt2repro.records import checkpoints
from gpt2repro.records.saved_models import locate
from gpt2repro.system.patience import GIVE_UP_AFTER_SECONDS, patiently

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A checkpoint's files that nobody loads a model from.
NOT_PUBLISHED = {"optimizer.safetensors", "state.json", checkpoints.MARKER}
# Left over from an earlier push in another form or number of shards, they would be loaded instead.
STALE = re.compile(r".*\.(safetensors|bin)|.*\.index\.json|(modeling|configuration)_gpt2repro\.py")


# --- Rights -------------------------------------------------------------------------------------


def check_hub_rights(
    repo_id: str, *, private: bool = False, option: str = "--hub_model_id"
) -> bool:
    """Make sure that uploads to `repo_id` will be accepted, creating the repository if need be.

    Returns whether it existed before.

    Raises:
        UserError: no token, no right to write there, a public repository where a private one is
            wanted, or the Hub cannot be reached. The message says what to do.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise UserError(f"{option} {repo_id}: give it as user/name")
    if get_token() is None:
        raise UserError(
            f"{option} {repo_id}: no Hub token found; run `hf auth login` or set HF_TOKEN to a "
            f"token with write access ({TOKENS_PAGE})"
        )
    return patiently(
        lambda: explained(lambda: claim(repo_id, private), repo_id),
        f"check the rights to {repo_id}",
        if_unreachable="; without it, push later with `gpt2repro push`",
    )


def claim(repo_id: str, private: bool) -> bool:
    """Create `repo_id` or find that it may be written to."""
    api = HfApi()
    role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            f"{repo_id}: the Hub token may only read; make one that may write at {TOKENS_PAGE}"
        )
    existed = api.repo_exists(repo_id)
    api.create_repo(repo_id, private=private, exist_ok=True)
    api.auth_check(repo_id, write=True)  # creating is silent about somebody else's repository
    if private and existed and not api.model_info(repo_id).private:
        raise UserError(
            f"{repo_id} exists and is public, but a private one was asked for; make it private in "
            "its settings on the Hub, or give another name"
        )
    return existed


def explained(call, repo_id: str):
    """`call()`; what the Hub refuses becomes one line that says what to do."""
    try:
        return call()
    except HfHubHTTPError as error:
        status = error.response.status_code
        if not str(error.response.request.url).startswith(constants.ENDPOINT):
            raise  # the storage behind it, whose links expire
        if status == 401:
            raise UserError(
                f"{repo_id}: the Hub does not accept the token, or hides the repository from it; "
                f"run `hf auth login` with a token that may write ({TOKENS_PAGE})"
            ) from error
        if status in (403, 404):
            owner = repo_id.partition("/")[0]
            raise UserError(
                f"{repo_id}: the Hub token has no right to write there; give a repository of your "
                f"own, or a token with write access to {owner!r} ({TOKENS_PAGE})"
            ) from error
        raise


# --- Uploading ----------------------------------------------------------------------------------


def upload(
    directory: Path,
    repo_id: str,
    *,
    message: str,
    private: bool = False,
    revision: str | None = None,
    give_up_after_seconds: float = GIVE_UP_AFTER_SECONDS,
) -> str:
    """Commit the files of `directory` to `repo_id` (created if absent), patiently; returns its URL.

    The card that is uploaded shows how to load from `repo_id`; the one on disk stays. Weight files
    of an earlier push that this one does not have are removed in the same commit.

    Raises:
        UserError: the Hub refused, or could not be reached for `give_up_after_seconds`.
    """

    def attempt() -> str:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = to_publish(directory)
        additions = [CommitOperationAdd(path.name, published(path, repo_id)) for path in files]
        names = {addition.path_in_repo for addition in additions}
        there = api.list_repo_files(repo_id, revision=revision)
        stale = [name for name in there if STALE.fullmatch(name) and name not in names]
        commit = api.create_commit(
            repo_id,
            [*additions, *map(CommitOperationDelete, stale)],
            commit_message=message,
            revision=revision,
        )
        return commit.oid

    patiently(
        lambda: explained(attempt, repo_id),
        f"push to {repo_id}",
        give_up_after_seconds=give_up_after_seconds,
    )
    at = f"/tree/{revision}" if revision else ""
    return f"{constants.ENDPOINT}/{repo_id}{at}"


def to_publish(directory: Path) -> list[Path]:
    return [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name not in NOT_PUBLISHED
    ]


def published(path: Path, repo_id: str) -> str | bytes:
    """The file's path, or the card's text with `repo_id` in its examples."""
    if path.name != "README.md":
        return str(path)
    form = read_json(path.with_name("config.json"))["model_type"]
    examples = model_card.loading(repo_id, form)
    card = path.read_text(encoding="utf-8")
    return model_card.with_section(card, model_card.LOADING, examples).encode()


# --- In the background --------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
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
        revision: str | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        give_up_after_seconds: float = GIVE_UP_AFTER_SECONDS,
    ) -> None:
        self.repo_id = repo_id
        self.tokenizer = tokenizer
        self.url: str | None = None  # of the last upload that succeeded
        self._upload = functools.partial(
            upload,
            repo_id=repo_id,
            private=private,
            revision=revision,
            give_up_after_seconds=give_up_after_seconds,
        )
        self._problems: list[str] = []
        self._waiting: Submission | None = None
        self._current: Submission | None = None
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
                held = snapshot(directory, in_use)
                complete(held, self.tokenizer)
                submission = Submission(directory, held, message)
            except Exception as error:  # whatever it is, the training goes on
                self._problems.append(f"{directory} could not be prepared for the push: {error}")
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
            late = [advice(left, self.repo_id, f"was not done after {timeout} s")] if left else []
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

    def _push(self, submission: Submission) -> str | None:
        """Upload one submission; returns the problem, if there was one."""
        try:
            self.url = self._upload(submission.snapshot, message=submission.message)
        except Exception as error:  # a push must never end a run
            reason = " ".join(str(error).split())[:300]
            return advice(submission, self.repo_id, f"failed: {reason}")
        return None


def advice(submission: Submission, repo_id: str, what: str) -> str:
    return (
        f"the push of {submission.directory} ({submission.message}) to {repo_id} {what}. Nothing "
        f"is lost: `gpt2repro push --model DIR --repo {repo_id}` uploads it"
    )


def snapshot(directory: Path, in_use: list[Path]) -> Path:
    """Hard links to the files of `directory`, beside it: they outlive its removal at no cost.

    Snapshots that are not `in_use` were left by a killed run and go.
    """
    for left in directory.absolute().parent.glob(".pushing-*"):
        if left not in in_use:
            shutil.rmtree(left, ignore_errors=True)
    place = Path(tempfile.mkdtemp(prefix=".pushing-", dir=directory.absolute().parent))
    for path in to_publish(directory):
        try:
            os.link(path, place / path.name)
        except OSError:  # a file system without hard links
            shutil.copy(path, place / path.name)
    return place


def complete(directory: Path, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Add what `from_pretrained` needs and a training checkpoint lacks."""
    if read_json(directory / "config.json").get("model_type") == "gpt2repro":
        for module in (configuration_gpt2repro, modeling_gpt2repro):
            source = Path(inspect.getfile(module))
            if not (directory / source.name).exists():
                shutil.copy(source, directory)
    if tokenizer is not None and not (directory / "tokenizer.json").exists():
        tokenizer.save_pretrained(directory)


# --- The verb -----------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="gpt2repro push", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a run's final/ or what `export` wrote")
    parser.add_argument("--repo", required=True, help="user/name on the Hub")
    parser.add_argument("--private", action="store_true", help="create the repository private")
    parser.add_argument("--revision", help="branch to commit to, created if absent (default main)")
    parser.add_argument("--message", default="Upload model", help="of the commit")
    parser.add_argument(
        "--evaluation", type=Path, help="JSON of `gpt2repro evaluate --output`, for the card"
    )
    return parser


def main(argv: list[str]) -> int:
    """`gpt2repro push --model DIR --repo me/name [--private] [--revision]`."""
    options = build_parser().parse_args(argv)
    directory = Path(locate(options.model))
    if not directory.is_dir():
        raise UserError(f"--model {options.model}: give a directory")
    if (directory / checkpoints.MARKER).is_file():
        raise UserError(
            f"--model {directory} is a training checkpoint; write a model from it first: "
            f"gpt2repro export --model {directory} --output OUT"
        )
    for line in verify(directory).lines():
        print(f"  {line}")
    if options.evaluation:
        add_evaluation(directory / "README.md", options.evaluation, options.repo)
    existed = check_hub_rights(options.repo, private=options.private, option="--repo")
    files = to_publish(directory)
    size = sum(path.stat().st_size for path in files) / 1e6
    print(
        f"Pushing {len(files)} files ({size:,.1f} MB) to {options.repo}, which "
        f"{'exists: this adds a commit' if existed else 'was created'} ...",
        flush=True,
    )
    again = "run the same command again: files that have arrived are not sent twice"
    try:
        url = upload(
            directory,
            options.repo,
            message=options.message,
            private=options.private,
            revision=options.revision,
        )
    except KeyboardInterrupt:
        raise UserError(f"interrupted; {again}") from None
    except UserError as error:
        raise UserError(f"{error}; {again}") from error
    print(url)
    return 0


def add_evaluation(card: Path, evaluation: Path, repo_id: str) -> None:
    """Put the results of an evaluation into the card on disk."""
    results = read_json(evaluation)
    if "results" not in results:
        raise UserError(f"--evaluation {evaluation}: not what `gpt2repro evaluate --output` writes")
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    name = repo_id.partition("/")[2]
    card.write_text(model_card.with_evaluation(text, results, name), encoding="utf-8")
