"""A run's checkpoints on the Hub: a chain that can be proved, found again and gone on from.

One run is trained and pushed to the fake Hub; what happens to its repository afterwards is done to
a copy.
"""

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import Fault
from fake_hub_uploads import UploadHub
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny_export import WITHOUT_THE_PACKAGE, without_fresh_processes
from tiny_run import assert_same_tensors, metrics, tensors, train, write_inputs

from gpt2repro import UserError
from gpt2repro.commands import verify
from gpt2repro.publishing import background
from gpt2repro.publishing.card import with_provenance
from gpt2repro.publishing.chain import Published
from gpt2repro.publishing.export import export
from gpt2repro.records import checkpoints, hub_checkpoints
from gpt2repro.records.provenance import BRANCH, Point, Record
from gpt2repro.system.patience import patiently
from gpt2repro.training import finish
from gpt2repro.training.monitor import Monitor
from modeling_gpt2repro import GPT2ReproForCausalLM

ROOT = Path(__file__).parent.parent
FIELDS = ["--num_steps", "6", "--save_every", "3", "--keep_last", "1", "--eval_every", "0"]
FIELDS += ["--keep_steps", "log", "--push_to_hub", "--hub_model_id", "me/run", "--hub_state"]
BRANCHES = [f"step{step:08d}" for step in (0, 1, 2, 4)]


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        # Exports have tests of their own.
        without_fresh_processes(patch)
        patch.setattr(Monitor, "draw_loss_curve", lambda self: None)
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


def chain(hub: UploadHub) -> dict[str, bytes]:
    refs = hub.repositories["models", "me/run"].refs
    return {
        ref: hub.files("me/run", ref)["provenance.json"]
        for ref in sorted(refs)
        if BRANCH.fullmatch(ref)
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


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"tokens": 999}, "says 999 tokens, not what the recipe has"),
        (
            {"begin": Point(step=2, rows_digest="1" * 64)},
            "the recipe gives other rows before step 2",
        ),
    ],
)
def test_rows_before_a_checkpoint_and_its_tokens_are_compared_too(recipe, hub, change, problem):
    inputs, files = recipe.parent, hub.files("me/run", "step00000004")
    here = ["--dataset_name", str(inputs / "corpus"), "--tokenizer_name", str(inputs / "tokenizer")]
    record = Record.model_validate_json(files["provenance.json"]).model_copy(update=change)
    problems = defaultdict(list)
    verify._compare_with_data([Published("it", {}, {}, files, record)], here, problems)
    assert problems["it"] == [problem] * bool(problem)


@pytest.mark.parametrize("block", ["[1]", "7", "", "a: [", "no_such_field: 1"])
def test_a_card_whose_recipe_is_none_is_one_line(block):
    with pytest.raises(UserError, match="--data: the card's recipe") as raised:
        verify._recipe_of(f"# Card\n\n```yaml\n{block}\n```\n", [])
    assert "\n" not in str(raised.value) and "/tmp" not in str(raised.value)


def test_a_large_model_is_on_main_what_it_is_on_its_branch(recipe, tmp_path, capsys, monkeypatch):
    """The last step is permanent, and the export would make several files of the weights."""
    monkeypatch.setitem(export.__kwdefaults__, "max_shard_size", "40KB")
    monkeypatch.setattr(finish, "MAX_SHARD_SIZE", "40KB")
    fields = ["--num_steps", "2", "--save_every", "1", *FIELDS[4:]]
    with UploadHub() as hub:
        hub.use_as_me(monkeypatch)
        assert train(recipe, tmp_path / "run", *fields) == 0
        assert check(capsys)[0] == 0
        files = hub.files("me/run")
        assert files["provenance.json"] == hub.files("me/run", "step00000002")["provenance.json"]


# --- Tampered with --------------------------------------------------------------------------------


def edit(hub: UploadHub, branch: str, **files: bytes | None) -> None:
    """Commit other files to a branch; None removes one. A dot is spelled as two underscores."""
    repository = hub.repositories["models", "me/run"]
    folder = "training_state"
    changed = {
        name.replace(f"{folder}__", f"{folder}/").replace("__", "."): content
        for name, content in files.items()
    }
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


def a_right_table_that_nobody_sees(hub, refs):
    card = hub.files("me/run", "step00000002")["README.md"].decode()
    begin = card.index("## Provenance")
    shown = card[begin:].replace("| Tokens | 512 |", "| Tokens | 513 |")
    card = f"{card[:begin]}{shown}\n<!--\n{card[begin:]}-->\n"
    edit(hub, "step00000002", README__md=card.encode())


def a_right_table_below_a_comment_that_hides_it(hub, refs):
    card = hub.files("me/run", "step00000002")["README.md"].decode()
    edit(
        hub,
        "step00000002",
        README__md=card.replace("## Provenance", "<!--\n## Provenance").encode(),
    )


def a_forged_optimizer(hub, refs):
    name = "training_state__optimizer__safetensors"
    state = hub.files("me/run", "step00000002")["training_state/optimizer.safetensors"]
    edit(hub, "step00000002", **{name: state[:-4] + b"\x00\x00\x80?"})


def another_rate(hub, refs):
    state = hub.files("me/run", "step00000002")["training_state/state.json"]
    assert b'"max_lr": ' in state
    changed = state.replace(b'"max_lr": ', b'"max_lr": 1')
    edit(hub, "step00000002", training_state__state__json=changed)


def one_more_in_its_state(hub, refs):
    edit(hub, "step00000002", training_state__evil__py=b"import os")


def no_marker(hub, refs):
    edit(hub, "step00000002", training_state__COMPLETE=None)


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
    refs["step00000099"] = refs["step9"] = refs["step00000004"]


def foreign_with_a_record(hub, refs):
    """Of another run, say: all in it agrees, but it is not what came next."""
    refs["step00000099"] = refs["step00000004"]
    files = hub.files("me/run", "step00000004")
    record = Record.model_validate_json(files["provenance.json"])
    begin = Point(step=4, rows_digest=record.rows_digest)
    digests = ["0" * 16] * 95
    other = {"branch": "step00000099", "step": 99, "tokens": 99 * 256, "digests": digests}
    record = record.model_copy(update={**other, "begin": begin, "previous": "0" * 64})
    record = record.model_copy(update={"rows_digest": record.digest_of_rows()})
    weights = hub.files("me/run")["model.safetensors"]
    record.weights["model.safetensors"] = hashlib.sha256(weights).hexdigest()
    card = with_provenance(files["README.md"].decode(), record).encode()
    content = record.content()
    edit(hub, "step00000099", provenance__json=content, README__md=card, model__safetensors=weights)


def lose(hub, refs):
    del refs["step00000002"]


def lose_the_first(hub, refs):
    del refs["step00000000"]


def lose_the_newest(hub, refs):
    del refs["step00000004"]


def edit_config(hub, pattern: bytes, text: bytes) -> None:
    """Of step 2; its sums are written anew, so that only the other branches tell."""
    files = hub.files("me/run", "step00000002")
    config, num_changes = re.subn(pattern, text, files["config.json"])
    ours, other = (hashlib.sha256(each).hexdigest() for each in (files["config.json"], config))
    sums = files["SHA256SUMS"].replace(ours.encode(), other.encode())
    assert num_changes == 1 and sums != files["SHA256SUMS"]
    edit(hub, "step00000002", config__json=config, SHA256SUMS=sums)


def another_config(hub, refs):
    edit_config(hub, b'"n_head": ', b'"n_head": 1')


def code(hub, refs):
    edit(hub, "main", modeling_gpt2repro__py=b"import os; os.system('x')")


def no_tokenizer(hub, refs):
    edit(hub, "step00000001", tokenizer__json=None)


def no_sums(hub, refs):
    edit(hub, "step00000001", SHA256SUMS=None)


def one_more_file(hub, refs):
    edit(hub, "main", chat_template__jinja=b"{{ messages }}", LICENSE=b"which may be added")


def an_adapter(hub, refs):
    """`from_pretrained` would apply it, with peft installed; the sums are written anew."""
    added = b"{}"
    sums = hub.files("me/run")["SHA256SUMS"].decode()
    sums += f"{hashlib.sha256(added).hexdigest()}  adapter_config.json\n"
    edit(hub, "main", adapter_config__json=added, SHA256SUMS=sums.encode())


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
    (a_right_table_that_nobody_sees, {"step00000002": "its card says otherwise than its prov"}),
    (a_right_table_below_a_comment_that_hides_it, {"step00000002": "its card says otherwise"}),
    (a_forged_optimizer, {"step00000002": "its training_state/optimizer.safetensors is not the"}),
    (another_rate, {"step00000002": "its training_state/state.json is not the file that its"}),
    (one_more_in_its_state, {"step00000002": "holds training_state/evil.py, which its training_"}),
    (no_marker, {"step00000002": "its training_state/COMPLETE cannot be read"}),
    (a_record_that_hides_it, {"step00000002": "is not the checkpoint that step00000004 names"}),
    (no_record, {"step00000002": "holds no checkpoint"}),
    (a_digest, {"step00000002": "its digest of rows does not follow from those of its steps"}),
    (foreign, {"step00000003": "is not of this chain: no later checkpoint names it"}),
    (foreign_and_newer, {"step00000099": "holds the checkpoint of step 4", "step9": "holds the"}),
    (foreign_with_a_record, {"step00000099": "is not of this chain: no later checkpoint names"}),
    (lose, {"step00000002": "is missing: step00000004 names it"}),
    (lose_the_first, {"step00000000": "is missing: step00000001 names it"}),
    (lose_the_newest, {"step00000004": "is missing: main names it"}),
    (another_config, {"step00000002": "its config.json is not that of step00000000"}),
    (code, {"main": "its modeling_gpt2repro.py is not the file that its SHA256SUMS lists"}),
    (no_tokenizer, {"step00000001": "its tokenizer.json is not the file that its SHA256SUMS"}),
    (no_sums, {"step00000001": "lacks its SHA256SUMS"}),
    (one_more_file, {"main": "holds chat_template.jinja, which its SHA256SUMS does not list"}),
    (an_adapter, {"main": "holds adapter_config.json, which does not belong in an export"}),
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


@pytest.mark.parametrize("field", ["branch", "weights", "commit"])
def test_a_hostile_record_does_nothing_to_a_terminal(hub, capsys, field):
    """A file's name may: that is spelled out."""
    escape = "\x1b[2J\x1b]0;owned\x07"
    record = json.loads(hub.files("me/run")["provenance.json"])
    record[field] = {f"{escape}.safetensors": "0" * 64} if field == "weights" else escape
    edit(hub, "main", provenance__json=json.dumps(record).encode(), **{escape: b""})
    refs = hub.repositories["models", "me/run"].refs
    refs[f"step1{escape}"] = refs["main"]
    assert verify.main(["me/run"]) == 1
    said = capsys.readouterr().out
    assert "its provenance.json cannot be read" in said
    assert "\x1b" not in said and "\x07" not in said and "step1\\x1b" in said


def test_rows_begin_where_those_before_end(hub, capsys):
    """All that comes after was written anew, by somebody who left out what came before."""
    files, main = hub.files("me/run", "step00000004"), hub.files("me/run")
    record = Record.model_validate_json(files["provenance.json"])
    record = record.model_copy(update={"begin": Point(step=2, rows_digest="1" * 64)})
    record = record.model_copy(update={"rows_digest": record.digest_of_rows()})
    last = Record.model_validate_json(main["provenance.json"])
    begin = Point(step=4, rows_digest=record.rows_digest)
    last = last.model_copy(update={"begin": begin, "previous": record.sha256})
    last = last.model_copy(update={"rows_digest": last.digest_of_rows()})
    for branch, its, new in (("step00000004", files, record), ("main", main, last)):
        before = hashlib.sha256(its["provenance.json"]).hexdigest().encode()
        sums = its["SHA256SUMS"].replace(before, new.sha256.encode())
        card = with_provenance(its["README.md"].decode(), new).encode()
        edit(hub, branch, provenance__json=new.content(), SHA256SUMS=sums, README__md=card)
    status, said = check(capsys)
    problem = "its rows do not begin where step00000002 ends"
    assert (status, said["step00000004"]) == (1, [problem]), said
    assert said["main"][0].startswith("right")


def test_one_branch_is_compared_with_the_one_before(hub, capsys):
    another_config(hub, {})
    for one, before in (("step00000002", "step00000001"), ("step00000004", "step00000002")):
        problem = f"its config.json is not that of {before}"  # of two, who knows which is right
        assert check(capsys, "--revision", one) == (1, {one: [problem]})
    status, said = check(capsys, "--revision", "main")  # a copy of the newest
    assert (status, [*said]) == (0, ["main"]) and said["main"][0].startswith("right")


def test_what_was_proved_is_said(hub, capsys):
    """Also of a card that an editor gave other line ends."""
    card = hub.files("me/run")["README.md"].replace(b"\n", b"\r\n")
    edit(hub, "main", README__md=card)
    assert verify.main(["me/run"]) == 0
    assert "Configuration, tokenizer\nand code, which no record names," in capsys.readouterr().out


def test_another_version_of_transformers_may_have_gone_on(hub, capsys):
    edit_config(hub, b'transformers_version": "', b'transformers_version": "4.')
    assert check(capsys)[0] == 0


# --- On the way there -----------------------------------------------------------------------------


def test_what_did_not_get_there_is_said_and_pushed_by_the_same_command(
    recipe, run, tmp_path, capsys
):
    """One branch is refused, and of another the Hub makes something else: `main` is neither."""
    _, undisturbed = run
    with UploadHub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.use_as_me(patch)
        refused = Fault("status:403", path="/commit/step00000001", method="POST", times=9)
        hub.faults.append(refused)
        hub.stored["0" * 64] = b"something else"
        hub.mixed_up["step00000002"] = "0" * 64
        assert train(recipe, tmp_path / "run", *FIELDS) == 0
        said = capsys.readouterr().out
        assert "(Step 1) to me/run failed: " in said and "no right to write" in said
        assert "(step00000002) does not hold what was sent: its model.safetensors is" in said
        assert "the same training command pushes it again" in said
        assert "Step 1" not in hub.messages
        assert hub.messages.count("Step 2") == 1  # to its branch, and not to main
        assert check(capsys)[0] == 1
        hub.faults.remove(refused)
        hub.mixed_up.clear()
        # As after a kill in the middle: what is there, whole, is not sent again.
        del hub.log[:]
        assert train(recipe, tmp_path / "run", *FIELDS) == 0
        assert hub.put() == 0 and hub.messages.count("Step 4") == 2
        assert len(hub.requests("tree/main$")) == 1  # however many branches there are
        assert check(capsys)[0] == 0 and (tmp_path / "run" / "FINISHED").exists()
        assert chain(hub) == chain(undisturbed)
        assert not list(tmp_path.rglob(".pushing-*"))


def test_another_run_does_not_add_to_it(recipe, hub, tmp_path):
    with pytest.raises(
        UserError, match=r"me/run has checkpoints of another run .*--resume hub:me/run"
    ):
        train(recipe, tmp_path / "run", *FIELDS)
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_back_sets_the_later_branches_aside(recipe, hub, tmp_path, capsys, run):
    path = Path(shutil.copytree(run[0], tmp_path / "run"))
    left = chain(hub)["step00000004"]
    back = ["--resume", str(path / "checkpoints" / "step_00000002"), "--max_lr", "5e-3"]
    assert train(recipe, path, *FIELDS, *back) == 0
    refs = hub.repositories["models", "me/run"].refs
    [aside] = [ref for ref in refs if ref.startswith("superseded-step00000004-")]
    assert hub.files("me/run", aside)["provenance.json"] == left != chain(hub)["step00000004"]
    assert check(capsys)[0] == 0


# --- Found again ----------------------------------------------------------------------------------

FRESH = (
    WITHOUT_THE_PACKAGE
    + """
from safetensors.torch import save_file
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
answers = {}
for repo, trust in (("me/run", True), ("me/stock", False)):
    options = {"revision": "step00000002", "trust_remote_code": trust}
    model = AutoModelForCausalLM.from_pretrained(repo, **options)
    ids = AutoTokenizer.from_pretrained(repo, **options)("the text", return_tensors="pt")
    answers |= {"ids": ids.input_ids, repo: model(ids.input_ids).logits.detach()}
save_file(answers, sys.argv[1])
"""
)


def test_a_branch_loads_in_a_process_without_this_package(recipe, run, hub, tmp_path):
    path, _ = run
    options = ["--hub_model_id", "me/stock", "--export_format", "gpt2"]
    fields = [field for field in FIELDS if field not in ("--hub_model_id", "me/run")]
    assert train(recipe, tmp_path / "stock", *fields, *options) == 0
    files = hub.files("me/stock", "step00000002")
    assert json.loads(files["config.json"])["model_type"] == "gpt2"
    assert not [name for name in files if name.endswith(".py") and "/" not in name]
    answers = tmp_path / "answers"
    environment = os.environ | hub.env | {"HF_TOKEN": "", "HF_MODULES_CACHE": str(tmp_path)}
    fresh = subprocess.run(
        [sys.executable, "-P", "-c", FRESH, str(answers)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert fresh.returncode == 0, fresh.stderr
    found = load_file(answers)
    directory = path / "checkpoints" / "step_00000002"
    model = GPT2ReproForCausalLM.from_pretrained(directory, trust_remote_code=False)
    for repo in ("me/run", "me/stock"):  # of other kernels, to rounding
        torch.testing.assert_close(found[repo], model(found["ids"]).logits, rtol=0, atol=1e-5)


# --- Gone on from ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hub:me/run@step00000002", "hub:me/run"])
def test_a_run_goes_on_from_the_hub_in_an_empty_directory(recipe, run, hub, tmp_path, name, capsys):
    """By its name, and from the newest, which is `main` while it trains and a branch at the end."""
    path, _ = run
    before = chain(hub)
    assert train(recipe, tmp_path / "run", *FIELDS, "--resume", name) == 0
    first = 2 if "@" in name else 4
    launches = (tmp_path / "run" / "launches.jsonl").read_text()
    assert json.loads(launches)["step"] == first
    assert metrics(tmp_path / "run") == metrics(path)
    assert_same_tensors(tensors(tmp_path / "run", 6), tensors(path, 6))
    assert chain(hub) == before and check(capsys)[0] == 0
    assert not (tmp_path / "run" / ".hub").exists()


def test_a_record_of_another_commit_is_not_gone_on_from(hub, tmp_path):
    a_record_that_hides_it(hub, {})
    with pytest.raises(UserError, match=r"not what was pushed: provenance\.json is another"):
        hub_checkpoints.fetch("hub:me/run@step00000002", tmp_path / "x")


def test_no_answer_is_not_the_answer_that_there_is_no_record(run, hub, tmp_path):
    """Main is the newest, step 4; 503s, more than the Hub's client sits out, hide its record."""
    refs = hub.repositories["models", "me/run"].refs
    refs["main"] = refs.pop("step00000004")
    newer = checkpoints.record_of(run[0] / "checkpoints" / "step_00000002")
    how = background.Checkpoints(None, "gpt2repro", with_state=True, tell=None)
    push = background.BackgroundPush("me/run", checkpoints=how, going_on_from=4)
    for look in (
        lambda: hub_checkpoints.fetch("hub:me/run", tmp_path).name == "step_00000004",
        lambda: patiently(lambda: push._what_lacks("step00000002", newer), "") == (False, False),
    ):
        shutil.rmtree(Path(constants.HF_HUB_CACHE), ignore_errors=True)
        outage = Fault("status:503", path="resolve/.*/provenance.json", method="HEAD", times=20)
        hub.faults.append(outage)
        assert look()
        hub.faults.remove(outage)
        assert outage.num_hits > 6
    assert push.finish() == []


def test_what_cannot_be_gone_on_from_is_one_line(recipe, hub, tmp_path):
    refs = hub.repositories["models", "me/run"].refs
    refs["plain"] = refs["main"]  # as exported: without training state
    edit(hub, "step00000001", training_state__state__json=b"{}")
    edit(hub, "step00000002", training_state__state__json=None)
    for name, said in (
        ("hub:run", "give it as hub:user/name or"),
        ("hub:me/run@", "give it as hub:user/name or"),
        ("hub:me/nothing", "cannot find hub:me/nothing: "),
        ("hub:me/run@step00000003", "cannot find hub:me/run@step00000003: "),
        ("hub:me/run@plain", "no training state is there: it goes with .* if hub_state is set"),
        ("hub:me/run@step00000001", "not what was pushed: state.json has another size"),
        ("hub:me/run@step00000002", "not what was pushed: it lacks state.json"),
    ):
        with pytest.raises(UserError, match=said):
            train(recipe, tmp_path / "run", *FIELDS, "--resume", name)
        assert not [
            path
            for path in (tmp_path / "run").rglob("*")
            if path.is_file() and path.name not in (".lock",) and ".hub" not in path.parts
        ]


@pytest.mark.sweep  # a fifth launch and four processes: half a minute
def test_killed_twice_and_gone_on_elsewhere_by_two_processes(recipe, tmp_path, patch, capsys):
    fields = [*FIELDS, "--num_steps", "60", "--save_every", "7"]
    del fields[:4]
    with UploadHub() as hub, pytest.MonkeyPatch.context() as here:
        hub.use_as_me(here)
        assert train(recipe, tmp_path / "undisturbed", *fields) == 0
        expected = chain(hub)
    with UploadHub() as hub, pytest.MonkeyPatch.context() as here:
        hub.use_as_me(here)
        environment = os.environ | hub.env | {"HF_TOKEN": "hf_me", "OMP_NUM_THREADS": "1"}
        script = [str(ROOT / "train_accelerate.py"), "--recipe", str(recipe), *fields]
        killed = tmp_path / "killed"
        for num_lines in (10, 35):
            command = [sys.executable, *script, "--output_dir", str(killed)]
            with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
                while process.poll() is None and num_lines_of(killed) < num_lines:
                    time.sleep(0.005)
                assert process.poll() is None, "it was to be killed in the middle"
                process.kill()
        moved = ["--output_dir", str(tmp_path / "moved"), "--resume", "hub:me/run"]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        launcher += ["--config_file", str(ROOT / "launch" / "cpu2.yaml")]
        ended = subprocess.run(
            [*launcher, *script, *moved], env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        assert check(capsys)[0] == 0
        first = json.loads((tmp_path / "moved" / "launches.jsonl").read_text())["step"]
        ours, theirs = metrics(tmp_path / "moved"), metrics(tmp_path / "undisturbed")
        assert [m.get("rows_digest") for m in ours] == [m.get("rows_digest") for m in theirs]
        for mine, his in zip(ours[:-1], theirs[:-1], strict=True):
            # Two processes sum gradients in another order, and many steps at 1e-2 amplify that.
            assert mine["loss"] == pytest.approx(his["loss"], abs=2e-3 * (mine["step"] >= first))
        assert chain(hub).keys() == expected.keys()
        for name, content in chain(hub).items():
            mine, his = json.loads(content), json.loads(expected[name])
            same = content == expected[name]
            assert same or (mine["step"] > first and mine["rows_digest"] == his["rows_digest"])
            assert mine["digests"] == his["digests"]


def num_lines_of(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0
