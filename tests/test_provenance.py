"""A run's checkpoints on the Hub: a chain that can be proved, found again and gone on from.

One run is trained and pushed to the fake Hub; what happens to its repository afterwards is done to
a copy.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub_uploads import UploadHub
from tiny_run import metrics, train, write_inputs

from gpt2repro import UserError
from gpt2repro.commands import verify
from gpt2repro.publishing import verification
from gpt2repro.records import checkpoints
from gpt2repro.training import finish

FIELDS = ["--num_steps", "6", "--save_every", "3", "--keep_last", "1", "--eval_every", "0"]
FIELDS += ["--keep_steps", "log", "--push_to_hub", "--hub_model_id", "me/run", "--hub_state"]
BRANCHES = [f"step{step:08d}" for step in (0, 1, 2, 4)]


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        # Exports have tests of their own.
        patch.setattr(verification, "run_fresh_process", lambda _: {"max_abs_difference": 0.0})
        patch.setattr(finish, "_paragraph", lambda run: "")
        yield patch


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory, patch) -> Iterator[tuple[Path, UploadHub]]:
    """An undisturbed run, and the Hub that it was pushed to."""
    path = tmp_path_factory.mktemp("runs") / "run"
    with UploadHub() as hub:
        hub.use_as_me(patch)
        assert train(recipe, path, *FIELDS) == 0
        yield path, hub


@pytest.fixture
def hub(run) -> Iterator[UploadHub]:
    """The Hub, which is put back afterwards."""
    _, hub = run
    repository = hub.repositories["models", "me/run"]
    hub.repositories["models", "me/run"] = copy.deepcopy(repository)
    yield hub
    hub.repositories["models", "me/run"] = repository
    hub.faults.clear()


def chain(hub: UploadHub) -> dict[str, bytes]:
    refs = hub.repositories["models", "me/run"].refs
    return {
        ref: hub.files("me/run", ref)["provenance.json"] for ref in sorted(refs) if ref in BRANCHES
    }


def check(capsys, *options: str) -> tuple[int, dict[str, list[str]]]:
    """Exit status of `verify`, and what it says of each branch."""
    capsys.readouterr()
    status = verify.main(["me/run", *options])
    said: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.split("\n\n")[0].splitlines():
        name, _, text = line.partition(" ")
        said.setdefault(name, []).append(text.strip())
    return status, said


# --- Published ------------------------------------------------------------------------------------


def test_a_chain_that_is_right(run, hub, capsys):
    status, said = check(capsys)
    assert status == 0 and [*said] == [*BRANCHES, "main"]
    assert said["step00000004"][0].startswith("right: step 4, 1,024 tokens, weights ")
    path, _ = run
    for branch in BRANCHES:
        record = checkpoints.record_of(path / "checkpoints" / f"step_{branch[4:]}")
        assert chain(hub)[branch] == record.content()
        assert {*record.weights.values()} <= {*hub.stored}  # as the Hub knows them, by SHA-256
    # As metrics.jsonl has them: the rows between two checkpoints.
    digests = [line["rows_digest"] for line in metrics(path)[:4]]
    assert json.loads(chain(hub)["step00000004"])["digests"] == digests[2:]
    final = json.loads(hub.files("me/run")["provenance.json"])
    assert (final["step"], final["branch"], final["begin"]["step"]) == (6, None, 4)
    assert check(capsys, "--revision", "step00000002")[0] == 0
    assert check(capsys, "--revision", "main")[0] == 0
    with pytest.raises(UserError, match=r"--revision step00000003: no such branch; .*step00000004"):
        verify.main(["me/run", "--revision", "step00000003"])
    with pytest.raises(UserError, match="cannot find me/nothing"):
        verify.main(["me/nothing"])


def test_the_rows_are_those_that_the_recipe_gives(recipe, hub, capsys):
    inputs = recipe.parent
    here = ["--dataset_name", str(inputs / "corpus"), "--tokenizer_name", str(inputs / "tokenizer")]
    assert check(capsys, "--data", *here)[0] == 0
    status, said = check(capsys, "--data", *here, "--seed", "7")
    assert status == 1
    assert said["step00000004"] == ["was not trained on what the recipe gives at step 2"]


# --- Tampered with --------------------------------------------------------------------------------


def edit(hub: UploadHub, branch: str, **files: bytes | None) -> None:
    """Commit other files to a branch; None removes one. A dot is spelled as two underscores."""
    repository = hub.repositories["models", "me/run"]
    changed = {name.replace("__", "."): content for name, content in files.items()}
    content = {k: v for k, v in (hub.files("me/run", branch) | changed).items() if v is not None}
    repository.commit(content, branch)


def swap(hub, refs):
    refs["step00000001"], refs["step00000002"] = refs["step00000002"], refs["step00000001"]


def repeat(hub, refs):
    refs["step00000002"] = refs["step00000001"]


def truncate(hub, refs):
    edit(hub, "step00000002", model__safetensors=hub.files("me/run")["model.safetensors"][:-4])


def other_weights_in_the_same_record(hub, refs):
    edit(
        hub,
        "step00000002",
        model__safetensors=hub.files("me/run", "step00000001")["model.safetensors"],
    )


def a_wrong_card(hub, refs):
    card = hub.files("me/run", "step00000002")["README.md"]
    edit(hub, "step00000002", README__md=card.replace(b"| Tokens | 512 |", b"| Tokens | 513 |"))


def a_record_that_hides_it(hub, refs):
    """Of a commit that it was not made with: card and record agree."""
    files = hub.files("me/run", "step00000002")
    record = json.loads(files["provenance.json"])
    ours, other = f"`{record['commit']}`".encode(), b"`" + b"0" * 40 + b"`"
    record["commit"] = "0" * 40
    content = json.dumps(record, indent=1).encode() + b"\n"
    card = files["README.md"].replace(b"| Commit | " + ours, b"| Commit | " + other)
    edit(hub, "step00000002", provenance__json=content, README__md=card)


def no_record(hub, refs):
    edit(hub, "step00000002", provenance__json=None)


def a_digest(hub, refs):
    record = hub.files("me/run", "step00000002")["provenance.json"]
    digest = json.loads(record)["digests"][0].encode()
    edit(hub, "step00000002", provenance__json=record.replace(digest, b"0" * 16))


def foreign(hub, refs):
    refs["step00000003"] = refs["step00000002"]


def foreign_and_newer(hub, refs):
    refs["step00000099"] = refs["step00000004"]


def lose(hub, refs):
    del refs["step00000002"]


def lose_the_first(hub, refs):
    del refs["step00000000"]


def lose_the_newest(hub, refs):
    del refs["step00000004"]


def put_back_main(hub, refs):
    edit(
        hub,
        "main",
        **{"model__safetensors": hub.files("me/run", "step00000000")["model.safetensors"]},
    )


TAMPERINGS = [
    (swap, {"step00000001": "holds the checkpoint of step 2", "step00000002": "holds the checkp"}),
    (repeat, {"step00000002": "holds the checkpoint of step 1"}),
    (truncate, {"step00000002": "its model.safetensors is not the file that its provenance.json"}),
    (other_weights_in_the_same_record, {"step00000002": "holds the same weights as step00000001"}),
    (a_wrong_card, {"step00000002": "its card says otherwise than its provenance.json"}),
    (a_record_that_hides_it, {"step00000002": "is not the checkpoint that step00000004 names"}),
    (no_record, {"step00000002": "holds no checkpoint"}),
    (a_digest, {"step00000002": "its digest of rows does not follow from those of its steps"}),
    (foreign, {"step00000003": "is not of this chain: no later checkpoint names it"}),
    (foreign_and_newer, {"step00000099": "holds the checkpoint of step 4"}),
    (lose, {"step00000002": "is missing: step00000004 names it"}),
    (lose_the_first, {"step00000000": "is missing: step00000001 names it"}),
    (lose_the_newest, {"step00000004": "is missing: main names it"}),
    (put_back_main, {"main": "its model.safetensors is not the file"}),
]


@pytest.mark.parametrize(
    ("tamper", "found"), TAMPERINGS, ids=lambda each: getattr(each, "__name__", "")
)
def test_what_was_tampered_with_is_named(hub, capsys, tamper, found):
    tamper(hub, hub.repositories["models", "me/run"].refs)
    status, said = check(capsys)
    assert status == 1
    for name, problem in found.items():
        assert any(line.startswith(problem) for line in said[name]), said
    wrong = [name for name, lines in said.items() if not lines[0].startswith("right")]
    assert wrong == [*found], said
