"""A run's permanent checkpoints as branches of its repository, and what stands in their way."""

from huggingface_hub import HfApi

from gpt2repro import UserError
from gpt2repro.records import provenance
from gpt2repro.records.hub_checkpoints import has_state, step_branches
from gpt2repro.records.provenance import Record
from gpt2repro.system.hub import is_content, read_tree
from gpt2repro.system.patience import patiently


def is_published(repo_id: str, branch: str, record: Record, *, with_state: bool) -> bool:
    """Whether the branch holds the checkpoint of `record`, all of it.

    Raises:
        UserError: it holds another one.
    """
    tree = read_tree(repo_id, branch, may_lack=True)
    if provenance.FILE not in tree:
        return False
    if not is_content(tree[provenance.FILE], record.content()):
        raise UserError(
            f"{branch} there is another checkpoint and stays as it is; give the run a hub_model_id "
            "of its own"
        )
    entries = [(tree.get(name), sha256) for name, sha256 in record.weights.items()]
    arrived = all(entry and entry.lfs and entry.lfs.sha256 == sha for entry, sha in entries)
    return arrived and (has_state(tree) or not with_state)


def refuse_another_run(repo_id: str) -> None:
    """A run that begins may not add to the chain of another.

    Raises:
        UserError: the repository has checkpoints.
    """
    for branch in patiently(
        lambda: step_branches(repo_id), f"list the branches of {repo_id}"
    ).values():
        raise UserError(
            f"hub_model_id {repo_id} has checkpoints of another run ({branch.name}): give another "
            f"name, or go on from the newest with --resume hub:{repo_id}"
        )


def set_aside(repo_id: str, step: int) -> None:
    """Branches of later steps are of a line that is left: they get another name, `superseded-...`.

    As in the run's directory nothing is lost, and nothing is taken for what comes now.
    """
    api = HfApi()
    for later, branch in step_branches(repo_id, may_lack=True).items():
        if later > step:
            aside = f"superseded-{branch.name}-{branch.target_commit[:8]}"
            api.create_branch(repo_id, branch=aside, revision=branch.target_commit, exist_ok=True)
            api.delete_branch(repo_id, branch=branch.name)
