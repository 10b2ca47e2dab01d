"""Checkpoints on the Hub that a run can go on from: `hub:me/run@step00001000`, or the newest.

A branch holds the model, and in `training_state/` what else a checkpoint consists of. All of it is
safetensors or JSON, and checked on arrival: against what the Hub says it has, and as every
checkpoint by its own marker.
"""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

from huggingface_hub import GitRefInfo, HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from gpt2repro import UserError
from gpt2repro.records import checkpoints, integrity, provenance
from gpt2repro.system import atomic
from gpt2repro.system.diagnosis import FEW_ATTEMPTS, PassingFault
from gpt2repro.system.hub import has_owner, is_content, read_file, read_tree
from gpt2repro.system.patience import patiently

PREFIX = "hub:"
STATE_FOLDER = "training_state"
METRICS = "metrics.jsonl"  # what the run had logged until there


def step_branches(repo_id: str, *, may_lack: bool = False) -> dict[int, GitRefInfo]:
    """The branches that are named like permanent checkpoints, by ascending step.

    Raises:
        PassingFault: there is no such repository, and not `may_lack`.
    """
    try:
        refs = HfApi().list_repo_refs(repo_id).branches
    except RepositoryNotFoundError:
        if may_lack:
            return {}
        raise PassingFault(f"there is no {repo_id}, says the Hub", FEW_ATTEMPTS) from None
    named = [(ref, provenance.BRANCH.fullmatch(ref.name)) for ref in refs]
    return dict(sorted((int(match[1]), ref) for ref, match in named if match))


def has_state(tree: Collection[str]) -> bool:
    """Whether a revision with these files can be gone on from."""
    return f"{STATE_FOLDER}/{integrity.MARKER}" in tree


def read_record(
    repo_id: str, revision: str, tree: Mapping[str, RepoFile]
) -> provenance.Record | None:
    """The `provenance.json` of a revision; None where there is none that can be read."""
    return provenance.parsed(read_file(repo_id, provenance.FILE, revision, tree))


def fetch(name: str, place: Path) -> Path:
    """Download the checkpoint `name` (`hub:me/run`, `hub:me/run@REVISION`) to below `place`.

    What has arrived there before is not asked for again. Returns the checkpoint's directory; the
    `metrics.jsonl` that was pushed with it lies beside.

    Raises:
        UserError: there is none to go on from, or what came is not what was pushed.
    """
    repo_id, at, revision = name.removeprefix(PREFIX).partition("@")
    if not has_owner(repo_id) or (at and not revision):
        raise UserError(f"--resume {name}: give it as hub:user/name or hub:user/name@step00001000")
    commit, tree = patiently(lambda: _find(repo_id, revision), f"find {name}")
    wanted = [path for path in tree if path.startswith(f"{STATE_FOLDER}/")]
    if not has_state(tree):
        raise UserError(
            f"--resume {name}: no training state is there: it goes with a run's checkpoints if "
            "hub_state is set, to their branches such as step00001000"
        )
    for path in (integrity.WEIGHTS, provenance.FILE, *wanted):
        download = partial(hf_hub_download, repo_id, path, revision=commit, local_dir=place)
        patiently(download, f"download {path} of {name}", passes_on=False)
    try:
        return _assemble(place, tree)
    except OSError as error:
        raise UserError(f"--resume {name}: cannot be put together: {error}") from None
    except ValueError as error:
        atomic.remove(place)  # so that all of it is asked for again
        raise UserError(f"--resume {name}: not what was pushed: {error}") from None


def _find(repo_id: str, revision: str) -> tuple[str, dict[str, RepoFile]]:
    """The commit of `revision`, or of the newest checkpoint with training state; and its files."""
    if revision:
        commit = str(HfApi().model_info(repo_id, revision=revision).sha)
        return commit, read_tree(repo_id, commit)
    main, newest = str(HfApi().model_info(repo_id).sha), -1
    found = main, read_tree(repo_id, main)
    if has_state(found[1]) and (record := read_record(repo_id, *found)):
        newest = record.step
    for step, branch in reversed(step_branches(repo_id).items()):
        tree = read_tree(repo_id, branch.target_commit) if step > newest else {}
        if has_state(tree):
            return branch.target_commit, tree
    return found


def _assemble(place: Path, tree: dict[str, RepoFile]) -> Path:
    """A checkpoint's directory of what has arrived, looked through; ValueError if it is none.

    The marker is what the Hub has, and lists the rest; the record is the one that follows from it.
    """
    for name in (provenance.FILE, f"{STATE_FOLDER}/{integrity.MARKER}"):
        if not is_content(tree.get(name), (place / name).read_bytes()):
            raise ValueError(f"{name} came otherwise than the Hub lists it")
    content = (place / provenance.FILE).read_bytes()
    path = checkpoints.checkpoint_path(place, provenance.Record.model_validate_json(content).step)
    atomic.remove(path)
    path.mkdir()
    for name in tree:
        folder, _, file = name.rpartition("/")
        if name == integrity.WEIGHTS or (folder == STATE_FOLDER and file != METRICS):
            atomic.link(place / name, path / file)
    if problem := integrity.find_problem(path):
        raise ValueError(problem)
    record = checkpoints.record_of(path)
    if record is None or record.content() != content:
        raise ValueError(f"{provenance.FILE} is another checkpoint's")
    return path
