"""Whether a published chain of checkpoints is what a run made, by what the Hub says of it alone.

Every branch is asked for the hashes of its files, and for those that are small. The records name
each other by their SHA-256, from the newest back to the first, so one that was changed, left out or
put in is not the one that is named. No record names configuration, tokenizer and code: these are
compared with `SHA256SUMS`, and among branches; nor training state: that with its own marker. (Who
may write to the repository can write all of it anew: against that helps the hash of the newest
record, kept elsewhere, or to recompute the rows.)
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from gpt2repro import UserError
from gpt2repro.publishing.card import is_provenance
from gpt2repro.publishing.contents import SUMS, belongs, is_litter, listed, unlisted
from gpt2repro.records import integrity, provenance
from gpt2repro.records.hub_checkpoints import METRICS, STATE_FOLDER
from gpt2repro.records.provenance import Point, Record, branch_of
from gpt2repro.system.hub import has_owner, read_file, read_tree
from gpt2repro.system.patience import patiently

MAIN = "main"
WEIGHTS = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)")

# What another launch may say differently in a configuration.
OF_A_LAUNCH = rb'\n *"transformers_version": "[^"]*",?'
NOTHING = rb"(?!)"

LIKE_OURS = re.compile(r"step[-_]?\d")  # also what only looks like the name of a checkpoint

Problems = defaultdict[str, list[str]]  # in words, by the branch's name
Blobs = dict[str, bytes]  # by git's hash


@dataclass(frozen=True)
class Published:
    """A branch as the Hub has it; `record` is None where its provenance.json is none."""

    name: str
    tree: Mapping[str, RepoFile]
    sums: Mapping[str, str]  # what its SHA256SUMS says
    files: Mapping[str, bytes]  # the card, of `sums` and training state those that git has itself
    record: Record | None

    @property
    def card(self) -> str:
        text = self.files.get("README.md", b"").decode("utf-8", "replace")
        return text.replace("\r\n", "\n")  # some editors' line ends

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.files.get(provenance.FILE, b"")).hexdigest()

    @property
    def is_itself(self) -> bool:
        """Whether its record is its own, and may be followed."""
        return self.record is not None and self.name in (MAIN, self.record.branch)

    @property
    def weights(self) -> dict[str, str | None]:
        """SHA-256 by name, as the Hub has it, of the files that a model is loaded from."""
        found = sorted(name for name in self.tree if WEIGHTS.fullmatch(name))
        return {name: lfs.sha256 if (lfs := self.tree[name].lfs) else None for name in found}

    def found(self, name: str, without: bytes = NOTHING) -> str | None:
        """SHA-256 of a file of `sums` as it is, or of what it says `without` a pattern."""
        if name in self.files:
            return hashlib.sha256(re.sub(without, b"", self.files[name])).hexdigest()
        return lfs.sha256 if name in self.tree and (lfs := self.tree[name].lfs) else None

    def problems(self) -> Iterator[str]:
        """What is wrong with it whatever the others are."""
        record = self.record
        if record is None:
            there = provenance.FILE in self.tree
            yield f"its {provenance.FILE} cannot be read" if there else "holds no checkpoint"
            return
        if record.branch not in (None, branch_of(record.step)) or (
            self.name != MAIN and record.branch != self.name
        ):
            yield f"holds the checkpoint of step {record.step}"
        for name in sorted({*self.weights, *record.weights}):
            if self.weights.get(name) != record.weights.get(name):
                yield f"its {name} is not the file that its {provenance.FILE} names"
        yield from self._other_files()
        ends = record.begin.step + len(record.digests)
        if (ends, record.digest_of_rows()) != (record.step, record.rows_digest):
            yield "its digest of rows does not follow from those of its steps"
        if not is_provenance(self.card, record):
            yield f"its card says otherwise than its {provenance.FILE}"

    def _other_files(self) -> Iterator[str]:
        if not self.sums:
            yield f"lacks its {SUMS}"
            return
        for name, sha256 in self.sums.items():
            if self.found(name) != sha256:
                yield f"its {name} is not the file that its {SUMS} lists"
        others = sorted(self.tree.keys() - {*self.state})
        for name in others:
            if not (belongs(name) or is_litter(name)):
                yield f"holds {name}, which does not belong in an export"
        for name in filter(belongs, unlisted(others, self.sums)):
            yield f"holds {name}, which its {SUMS} does not list"
        yield from self._training_state()

    @property
    def state(self) -> list[str]:
        return [name for name in self.tree if name.startswith(f"{STATE_FOLDER}/")]

    def _training_state(self) -> Iterator[str]:
        """What differs from the marker of a checkpoint that can be gone on from."""
        marker = f"{STATE_FOLDER}/{integrity.MARKER}"
        if not self.state:
            return
        try:
            marked = integrity.Marker.model_validate_json(self.files.get(marker, b"")).root
        except ValueError:
            yield f"its {marker} cannot be read"
            return
        places = {name: f"{STATE_FOLDER}/{name}" for name in marked}
        places[integrity.WEIGHTS] = integrity.WEIGHTS
        for name, file in marked.items():
            if self.found(places[name]) != file.sha256:
                yield f"its {places[name]} is not the file that its {marker} lists"
        for name in {*self.state} - {marker, f"{STATE_FOLDER}/{METRICS}", *places.values()}:
            yield f"holds {name}, which its {marker} does not list"


def read_branches(repo_id: str, revision: str | None = None) -> dict[str, Published]:
    """The branches by name, the oldest checkpoint first and `main` last.

    Args:
        revision: only this one, and the one that it names as the one before.

    Raises:
        UserError: there is no such repository or branch, or the Hub does not answer.
    """
    if not has_owner(repo_id):
        raise UserError(f"{repo_id}: give it as user/name")
    main = patiently(lambda: str(HfApi().model_info(repo_id).sha), f"find {repo_id}")
    refs = patiently(lambda: HfApi().list_repo_refs(repo_id), f"list the branches of {repo_id}")
    named = {each.name: each.target_commit for each in refs.branches if LIKE_OURS.match(each.name)}
    commits = dict(sorted(named.items())) | {MAIN: main}
    known: Blobs = {}
    if revision is None:
        return {name: _read(repo_id, name, commit, known) for name, commit in commits.items()}
    if revision not in commits:
        raise UserError(
            f"--revision {revision}: no such branch; {repo_id} has {', '.join(commits)}"
        )
    one = _read(repo_id, revision, commits[revision], known)
    before = branch_of(one.record.begin.step) if one.record else ""
    if one.record and one.record.branch and one.name == MAIN:
        before = one.record.branch
    found = {before: _read(repo_id, before, commits[before], known)} if before in commits else {}
    return found | {revision: one}


def _read(repo_id: str, name: str, commit: str, known: Blobs) -> Published:
    """A branch; its files are read unless they are `known`, of another that has the same."""
    tree = patiently(lambda: read_tree(repo_id, commit), f"list the files of {name}")

    def read(file: str) -> bytes:
        blob = tree[file].blob_id
        if blob not in known:
            known[blob] = patiently(
                lambda: read_file(repo_id, file, commit, tree), f"read {file} of {name}"
            )
        return known[blob]

    files = {file: read(file) for file in ("README.md", provenance.FILE, SUMS) if file in tree}
    sums = listed(files.get(SUMS, b"").decode("utf-8", "replace"))
    small = [file for file in tree if not tree[file].lfs and file != f"{STATE_FOLDER}/{METRICS}"]
    of_state = f"{STATE_FOLDER}/"
    files |= {file: read(file) for file in small if file in sums or file.startswith(of_state)}
    return Published(name, tree, sums, files, provenance.parsed(files.get(provenance.FILE, b"")))


def find_problems(branches: Mapping[str, Published], *, whole: bool = True) -> Problems:
    """What is wrong, by the name of a branch, also of one that is missing.

    Args:
        whole: all branches are here; else the last one is asked about.
    """
    problems: Problems = defaultdict(list)
    checked = [*branches.values()][0 if whole else -1 :]
    for branch in checked:
        problems[branch.name] += branch.problems()
    for name, problem in _unlike(branches):
        if whole or name == checked[-1].name:
            problems[name].append(problem)
    reached = _follow(branches, checked[-1], problems, whole=whole)
    if whole:
        for name in branches.keys() - reached - {MAIN}:
            problems[name].append("is not of this chain: no later checkpoint names it")
        seen: dict[str, str] = {}
        for name in sorted(branches.keys() - {MAIN}):
            weights = repr(branches[name].weights)
            if branches[name].weights and seen.setdefault(weights, name) != name:
                problems[name].append(f"holds the same weights as {seen[weights]}")
    return problems


def _unlike(branches: Mapping[str, Published]) -> Iterator[tuple[str, str]]:
    """What beside the weights is not as on most branches of the same code, by branch."""
    of_code: dict[str | None, list[Published]] = defaultdict(list)
    for branch in branches.values():
        if branch.record and branch.sums:
            of_code[branch.record.commit].append(branch)
    for alike in of_code.values():
        names = {name for branch in alike for name in branch.sums}
        for name in sorted(names - {provenance.FILE} - {n for b in alike for n in b.weights}):
            found = {branch.name: branch.found(name, OF_A_LAUNCH) for branch in alike}
            [(usual, _)] = Counter(found.values()).most_common(1)
            like = next(each for each in found if found[each] == usual)
            others = [each for each in found if found[each] != usual]
            yield from ((each, f"its {name} is not that of {like}") for each in others)


def _before(published: Published) -> tuple[str, str] | None:
    """Name and SHA-256 of the record that a branch leads to; `main` may be a copy of a branch."""
    record = published.record
    if record is None or not published.is_itself:
        return None
    if published.name == MAIN and record.branch:
        return record.branch, published.sha256
    return (branch_of(record.begin.step), record.previous) if record.previous else None


def _follow(
    branches: Mapping[str, Published], last: Published, problems: Problems, *, whole: bool
) -> set[str]:
    """From record to record, from `last` back to the first; the names of those that are reached."""
    reached: list[str] = []
    at = last
    while _before(at) or not at.is_itself:
        name, sha256 = _before(at) or ("", "")
        before = branches.get(name)
        if name and before is None:
            problems[name].append(f"is missing: {at.name} names it")
        elif before and before.sha256 != sha256:
            problems[name].append(f"is not the checkpoint that {at.name} names")
        elif before and before.record and at.record and at.record.step != before.record.step:
            ends = Point(step=before.record.step, rows_digest=before.record.rows_digest)
            if at.record.begin != ends:
                problems[at.name].append(f"its rows do not begin where {name} ends")
        below = name or ("" if at.name == MAIN else at.name)
        others = [each for each in branches if each != MAIN and (not below or each < below)]
        before = before or (branches[others[-1]] if others else None)
        if not whole or before is None or before.name in reached:
            break
        reached.append(before.name)
        at = before
    if whole:  # what was uploaded since `main` was
        head = reached[0] if reached else ""
        for name, branch in branches.items():
            end = (head, branches[head].sha256) if head else None
            if head < name != MAIN and branch.is_itself and _before(branch) == end:
                reached.append(name)
                head = name
    return {*reached}
