"""What a name on the Hub looks like, and what the Hub says of the files behind it."""

import hashlib

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id


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


def read_tree(repo_id: str, revision: str | None) -> dict[str, RepoFile]:
    """The files of a revision by path, each with its hash; none if there is no such."""
    try:
        entries = HfApi().list_repo_tree(repo_id, revision=revision, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return {}


def is_content(entry: RepoFile | None, content: bytes) -> bool:
    """Whether a file on the Hub is `content`: by the SHA-256 of a large one, else by git's hash."""
    if entry is None:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == hashlib.sha256(content).hexdigest()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
