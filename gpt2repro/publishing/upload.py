"""Upload an export to the Hub: rights asked first, patient with faults, and looked at afterwards.

An interrupted upload is taken up by running it again: the Hub says which whole files it already has
(a large model is several), and nothing is visible there before the one commit at the end.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from gpt2repro import UserError
from gpt2repro.publishing.card import with_loading
from gpt2repro.publishing.contents import EXPORTED, check_contents, is_litter, read_json
from gpt2repro.publishing.redaction import redacted
from gpt2repro.records import integrity
from gpt2repro.system import atomic
from gpt2repro.system.diagnosis import FEW_ATTEMPTS, PassingFault
from gpt2repro.system.hub import has_owner, is_content, read_file, read_tree
from gpt2repro.system.patience import patiently

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
# A checkpoint's files that nobody loads a model from.
NOT_PUBLISHED = {integrity.OPTIMIZER, integrity.STATE, integrity.MARKER}
# Left over from an earlier push (of another form, tokenizer or number of shards), they would be
# loaded instead or as well.
STALE = re.compile(
    rf"{EXPORTED.pattern}|(modeling|configuration)_gpt2repro\.py|training_state/.+"
    r"|(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)
SEAL = re.compile(r"<!-- pushed as \w+ -->\n")

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# --- Rights ---------------------------------------------------------------------------------------


def check_hub_rights(
    repo_id: str, *, private: bool = False, option: str = "--hub_model_id"
) -> bool:
    """Make sure that uploads to `repo_id` will be accepted. Nothing is made there.

    Returns whether the repository exists.

    Raises:
        UserError: when there is no token, no right to write there, a public repository where a
            private one is wanted, or no answer from the Hub. The message says what to do.
    """
    if not has_owner(repo_id):
        raise UserError(f"{option} {repo_id}: give it as user/name")
    if get_token() is None:
        raise UserError(
            f"{option} {repo_id}: no Hub token found; run `hf auth login` or set HF_TOKEN to a "
            f"token with write access ({TOKENS_PAGE})"
        )
    return patiently(
        lambda: _explained(lambda: _ask(repo_id, private), repo_id),
        f"check the rights to {repo_id}",
        if_unreachable="; without it, push later with `gpt2repro push`",
    )


def _ask(repo_id: str, private: bool) -> bool:
    """Whether `repo_id` exists, and may be written to or made."""
    api = HfApi()
    account = api.whoami()
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            f"{repo_id}: the Hub token may only read; make one that may write at {TOKENS_PAGE}"
        )
    if not api.repo_exists(repo_id):
        orgs = [org["name"] for org in account.get("orgs", []) if org.get("roleInOrg") != "read"]
        if repo_id.partition("/")[0] not in (account.get("name"), *orgs):
            raise _no_right(repo_id)
        return False
    api.auth_check(repo_id, write=True)
    if private and not api.model_info(repo_id).private:
        raise UserError(
            f"{repo_id} exists and is public, but a private one was asked for; make it private in "
            "its settings on the Hub, or give another name"
        )
    return True


def _no_right(repo_id: str, said: str | None = None) -> UserError:
    """`said`: by the Hub, which has other reasons too, such as a quota that is used up."""
    owner = repo_id.partition("/")[0]
    reason = f" ({' '.join(said.split())})" if said else ""
    return UserError(
        f"{repo_id}: the Hub token has no right to write there{reason}; give a repository of your "
        f"own, or a token with write access to {owner!r} ({TOKENS_PAGE})"
    )


def _explained(call: Callable[[], Result], repo_id: str) -> Result:
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
            raise _no_right(repo_id, error.server_message) from error
        if status in (409, 412):  # the commit does not follow the newest: all is looked at again
            raise PassingFault("others commit there at the same time", FEW_ATTEMPTS) from error
        raise


# --- Uploading ------------------------------------------------------------------------------------


def upload(
    directory: Path,
    repo_id: str,
    *,
    message: str,
    private: bool = False,
    revision: str | None = None,
    allow_code: bool = False,
    beside: Mapping[str, Path] = MappingProxyType({}),
) -> str:
    """Commit the files of `directory` to `repo_id` (created if absent), patiently; returns its URL.

    The card that is uploaded shows how to load from `repo_id`; the one on disk stays. Files of
    an earlier push's model that this one does not have are removed in the same commit. A new branch
    begins with nothing: until it has this model, no other is loaded by its name.

    Args:
        beside: further files, by their paths there.

    Raises:
        UserError: when `directory` holds what is not published (see `to_publish`), the Hub refused,
            could not be reached for half an hour, or holds something else afterwards.
    """

    def attempt() -> str:
        api, found = HfApi(), directory.stat()
        try:
            at = str(api.model_info(repo_id).id)  # by its newest name, if it was renamed
        except RepositoryNotFoundError:
            # What nobody asked to be private is what its organization makes of it.
            at = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if revision is not None and not api.revision_exists(at, revision):
            first = api.list_repo_commits(at)[-1].commit_id
            api.create_branch(at, branch=revision, revision=first, exist_ok=True)
        files = to_publish(directory, allow_code=allow_code)
        additions = [CommitOperationAdd(p.name, _published(p, at, revision)) for p in files]
        additions += [CommitOperationAdd(name, str(path)) for name, path in beside.items()]
        names = {addition.path_in_repo for addition in additions}
        head = str(api.model_info(at, revision=revision).sha)
        there = read_tree(at, head)
        if "README.md" in there and _is_edited(read_file(at, "README.md", head, there)):
            said = "%s: the card was edited on the Hub; it is replaced, and stays in its commit %s"
            logger.warning(said, at, head)
        stale = [name for name in there if STALE.fullmatch(name) and name not in names]
        commit = api.create_commit(
            at,
            [*additions, *map(CommitOperationDelete, stale)],
            commit_message=message,
            revision=revision,
            parent_commit=head,
        )
        if atomic.is_another(directory.stat(), found):
            raise PassingFault(f"{directory} was replaced while it was sent", FEW_ATTEMPTS)
        _check_arrived(read_tree(at, commit.oid), additions, f"{at} ({revision or 'main'})")
        return at

    what = f"push to {repo_id}"
    at = patiently(lambda: _explained(attempt, repo_id), what, passes_on=False)
    return f"{constants.ENDPOINT}/{at}" + (f"/tree/{revision}" if revision else "")


def _check_arrived(
    tree: Mapping[str, RepoFile], sent: Sequence[CommitOperationAdd], where: str
) -> None:
    """Refuse what the Hub lists otherwise than it was sent; large files by SHA-256 and size."""
    for addition in sent:
        entry, info = tree.get(addition.path_in_repo), addition.upload_info
        if entry is not None and entry.lfs is not None:
            arrived = (entry.lfs.sha256, entry.size) == (info.sha256.hex(), info.size)
        else:
            with addition.as_file() as file:
                arrived = is_content(entry, file.read())
        if not arrived:
            raise UserError(
                f"{where} does not hold what was sent: its {addition.path_in_repo} is another file"
            )


def to_publish(directory: Path, *, allow_code: bool = False) -> list[Path]:
    """The files of an export or a checkpoint that go to the Hub.

    Raises:
        UserError: one of the others does not belong in an export, or is code that is not ours.
    """
    check_contents(directory, allow_code=allow_code, ignored=NOT_PUBLISHED)
    return [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name not in NOT_PUBLISHED and not is_litter(path.name)
    ]


def _published(path: Path, repo_id: str, revision: str | None) -> str | bytes:
    """The file's path, or the card's text with `repo_id` at `revision` in its examples."""
    if path.name != "README.md":
        return str(path)
    form = read_json(path.with_name("config.json"))["model_type"]
    card = with_loading(path.read_text(encoding="utf-8"), repo_id, form, revision)
    return _sealed(redacted(card))


def _sealed(card: str) -> bytes:
    """`card` with its SHA-256 as a comment, by which the next push sees that nobody edited it."""
    text = SEAL.sub("", card).encode()
    return text + f"<!-- pushed as {hashlib.sha256(text).hexdigest()} -->\n".encode()


def _is_edited(card: bytes) -> bool:
    return _sealed(card.decode("utf-8", "replace")) != card
