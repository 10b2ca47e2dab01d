"""What a name on the Hub looks like, and what the Hub says of the files behind it."""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from gpt2repro import UserError
from gpt2repro.system.diagnosis import FEW_ATTEMPTS, PassingFault, diagnose
from gpt2repro.system.hub_client import REQUEST_TIMEOUT_SECONDS

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def is_hub_id(name: str) -> bool:
    """Whether `name` is spelled like a repository of the Hub: `owner/name`, or `gpt2` of old."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def has_owner(name: str) -> bool:
    """Whether it is `owner/name`: what one can upload to, and what no word of a sentence is."""
    return "/" in name and is_hub_id(name)


def read_tree(repo_id: str, revision: str, *, may_lack: bool = False) -> dict[str, RepoFile]:
    """The files of a revision by path, each with its hash; none if there is no such.

    Raises:
        PassingFault: there is none, and not `may_lack`: the Hub itself has just named it.
    """
    try:
        entries = HfApi().list_repo_tree(repo_id, revision=revision, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    except (RepositoryNotFoundError, RevisionNotFoundError):
        if may_lack:
            return {}
        raise PassingFault(f"{repo_id} lacks {revision}, says the Hub", FEW_ATTEMPTS) from None


def is_content(entry: RepoFile | None, content: bytes) -> bool:
    """Whether a file on the Hub is `content`: by the SHA-256 of a large one, else by git's hash."""
    if entry is None:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == hashlib.sha256(content).hexdigest()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def read_file(repo_id: str, path: str, revision: str, tree: Mapping[str, RepoFile]) -> bytes:
    """A small file of a revision that consists of `tree`; b"" if that has none of this name.

    The tree says so, and no failed download: without an answer that raises EntryNotFoundError, too.

    Raises:
        UserError: what comes is not what the tree lists.
    """
    if path not in tree:
        return b""
    for again in (False, True):  # a damaged cache is not asked twice
        content = Path(
            hf_hub_download(repo_id, path, revision=revision, force_download=again)
        ).read_bytes()
        if is_content(tree[path], content):
            return content
    raise UserError(f"{path} of {repo_id} came otherwise than the Hub lists it; ask again")


def of_hub_or_cache(name: str, load: Callable[[bool], Result]) -> Result:
    """`load(False)` of a model on the Hub, or `load(True)`, of what is cached, if no Hub is there.

    One quick question tells: `from_pretrained` itself would spend most of a minute on it. A Hub
    that answers, whatever it says, is not passed over: what is cached may be older, or a part.
    """
    try:
        HfApi().model_info(name, expand=["sha"], timeout=REQUEST_TIMEOUT_SECONDS)
    except Exception as error:
        verdict = diagnose(error)
        if verdict is None or verdict.answered:
            raise
        with contextlib.suppress(Exception):  # the Hub's silence is what to tell
            cached = load(True)
            if not constants.HF_HUB_OFFLINE:
                logger.warning(
                    "%s: the Hub cannot be reached, so it is as it was cached here", name
                )
            return cached
        raise
    return load(False)


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Where git cloned a repository without git-lfs, a text lies in the place of a large file.

    Raises:
        UserError: naming it, and what fetches the file.
    """
    for path in paths:
        with path.open("rb") as file:
            if file.read(24) == b"version https://git-lfs.":
                raise UserError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull`")
