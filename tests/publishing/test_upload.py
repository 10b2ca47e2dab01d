"""Uploads with the real client to the fake Hub: rights, and what is sent again after a fault."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from fake_hub import Fault, impatient
from fake_hub_uploads import UploadHandler, UploadHub
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tiny_export import export_unverified

from gpt2repro import UserError
from gpt2repro.publishing import upload
from gpt2repro.publishing.contents import SUMS, write_sums
from gpt2repro.records.integrity import WEIGHTS
from gpt2repro.system import atomic, patience
from gpt2repro.system.diagnosis import FEW_ATTEMPTS

BRANCHES = ("main", "step00000002", "stock")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return export_unverified(tmp_path_factory.mktemp("push") / "final")


@pytest.fixture
def hub(monkeypatch):
    with UploadHub() as hub:
        hub.use_as_me(monkeypatch)
        yield hub


def test_an_interrupted_upload_sends_only_what_is_missing(hub, tmp_path, monkeypatch):
    """Two weight files; the second never arrives, then the same call again."""
    directory = tmp_path / "sharded"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, name in enumerate(shards):
        save_file({"x": torch.full((5000,), float(number))}, directory / name)
    second = hashlib.sha256((directory / shards[1]).read_bytes()).hexdigest()
    outage = Fault("status:503", path=second, method="PUT", times=float("inf"))
    hub.faults.append(outage)
    with monkeypatch.context() as patch:
        patch.setattr(patience, "GIVE_UP_AFTER_SECONDS", 0.3)
        with pytest.raises(UserError, match=r"cannot push to me/name: gave up after"):
            upload.upload(directory, "me/name", message="m")
    assert hub.files("me/name").keys() == {".gitattributes"}  # nothing half-done is visible
    first_puts = hub.put()
    assert first_puts == 1
    hub.faults.remove(outage)
    upload.upload(directory, "me/name", message="m")
    assert hub.put() - first_puts == 1
    assert {*shards, "config.json"} <= hub.files("me/name").keys()


def test_large_files_go_in_parts(monkeypatch, exported, hub):
    hub.part_size = 50_000
    hub.faults.append(Fault("reset", path="^/lfs/.*/2$", method="PUT"))
    upload.upload(exported, "me/name", message="in parts")
    weights = (exported / "model.safetensors").read_bytes()
    assert hub.files("me/name")["model.safetensors"] == weights
    assert len(hub.requests("^/lfs/.*/[0-9]+$", "PUT")) == -(-len(weights) // 50_000) + 1
    assert hub.messages == ["in parts"]


def test_asking_for_rights_makes_nothing(hub):
    """A run whose dataset is mistyped leaves no empty repository, and neither does `doctor`."""
    assert upload.check_hub_rights("me/new", private=True) is False
    assert upload.check_hub_rights("me/new") is False
    assert not hub.requests("/api/repos/create", "POST")
    hub.add("models", "me/there", {"a": b"a"})
    assert upload.check_hub_rights("me/there") is True
    assert upload.check_hub_rights("lab/new") is False, "of an organization"
    for owner in ("somebody", "shop"):  # in which the account may only read
        with pytest.raises(UserError, match=f"no right to write there.*'{owner}'"):
            upload.check_hub_rights(f"{owner}/new")


def test_why_the_hub_refuses_is_told(exported, hub):
    """It may have nothing to do with rights: a quota, a repository that is locked."""
    hub.add("models", "me/full", {"a": b"a"})
    quota = {"X-Error-Message": "Private repository storage limit reached."}
    hub.faults.append(Fault("status:403", path="/commit/", method="POST", headers=quota))
    with pytest.raises(UserError, match=r"no right to write there \(Private .* reached\."):
        upload.upload(exported, "me/full", message="again")


def test_a_link_of_the_storage_that_expires_is_no_lack_of_rights(hub, exported):
    hub.faults.append(Fault("status:403", path="^/lfs/", method="PUT"))
    upload.upload(exported, "me/name", message="again")
    assert "model.safetensors" in hub.files("me/name")


# --- Others commit at the same time ---------------------------------------------------------------


def between(monkeypatch, method: str, others) -> None:
    """Let `others()` do what they do before the next call of a method of the Hub's client."""
    real, waiting = getattr(HfApi, method), [others]

    def late(self, *args, **kwargs):
        if waiting:
            waiting.pop()()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, method, late)


def test_two_pushes_at_once_do_not_leave_two_models(hub, exported, tmp_path, monkeypatch):
    """Files that came after the listing belong to no model that this push leaves there."""
    sharded = export_unverified(tmp_path / "sharded", max_shard_size="50KB")
    between(
        monkeypatch,
        "create_commit",
        lambda: upload.upload(sharded, "me/name", message="theirs"),
    )
    upload.upload(exported, "me/name", message="ours")
    assert hub.messages == ["theirs", "ours"]
    weights = [
        name for name in hub.files("me/name") if name.startswith("model") and ".py" not in name
    ]
    assert weights == ["model.safetensors"]


def test_what_others_commit_afterwards_is_no_fault_of_this_push(hub, exported, monkeypatch):
    def edit():
        if "ours" in hub.messages:
            hub.repositories["models", "me/name"].commit({"README.md": b"theirs"})
        else:
            between(monkeypatch, "list_repo_tree", edit)

    edit()
    upload.upload(exported, "me/name", message="ours")
    assert hub.files("me/name") == {"README.md": b"theirs"}


def test_a_card_that_was_edited_on_the_hub_is_not_replaced_without_a_word(hub, exported, caplog):
    upload.upload(exported, "me/name", message="ours")
    (exported / "README.md").write_text("# another, of a later step\n")
    upload.upload(exported, "me/name", message="ours")
    assert caplog.messages == []
    repository = hub.repositories["models", "me/name"]
    card = hub.files("me/name")["README.md"].replace(b"later", b"later (see my paper)")
    edited = repository.commit(hub.files("me/name") | {"README.md": card})
    upload.upload(exported, "me/name", message="ours")
    assert caplog.messages == [
        f"me/name: the card was edited on the Hub; it is replaced, and stays in its commit {edited}"
    ]


@pytest.mark.parametrize("status", [409, 412])
def test_a_commit_that_comes_too_late_is_made_again(hub, exported, status):
    fault = Fault(f"status:{status}", path="/commit/", method="POST", times=2)
    hub.faults.append(fault)
    upload.upload(exported, "me/name", message="ours")
    assert hub.messages == ["ours"]
    fault.times = float("inf")
    with pytest.raises(UserError, match=r"^cannot push to me/other: others commit there at the"):
        upload.upload(exported, "me/other", message="ours")
    assert fault.num_hits == 2 + FEW_ATTEMPTS


def test_the_card_of_a_branch_loads_that_branch(hub, exported, tmp_path):
    """Its example is run: the stock form lies beside another model, which needs remote code."""
    stock = export_unverified(tmp_path / "stock", format="gpt2")
    for directory, revision in ((exported, None), (exported, "step00000002"), (stock, "stock")):
        upload.upload(directory, "me/name", message="m", revision=revision)
    cards = {each: hub.files("me/name", each)["README.md"].decode() for each in BRANCHES}
    assert "revision" not in cards["main"]
    code = cards["stock"].split("```python\n")[1].split("```")[0]
    found: dict = {}
    exec(code.replace("40", "8"), found)  # it has 32 positions
    assert type(found["generate"].model).__name__ == "GPT2LMHeadModel"
    assert '"me/name", revision="step00000002", trust_remote_code=True' in cards["step00000002"]
    download = "`hf download me/name --revision step00000002 --local-dir DIR && gpt2repro export"
    assert f"{download} --model DIR " in cards["step00000002"]
    assert "`gpt2repro export --model me/name " in cards["main"]


def test_a_moment_without_a_listing_leaves_no_older_model(hub, exported):
    """A replica that lags says of the newest commit that there is none."""
    hub.add("models", "me/name", {"pytorch_model.bin": b"the old one", "notes.txt": b"stay"})
    headers = {"X-Error-Code": "RevisionNotFound"}
    lags = [Fault("status:404", "/tree/", skip=skip, headers=headers) for skip in (0, 1)]
    hub.faults += lags
    upload.upload(exported, "me/name", message="m")
    assert [fault.num_hits for fault in lags] == [1, 1], "before the commit and after it"
    assert hub.files("me/name").keys() & {"pytorch_model.bin", "notes.txt"} == {"notes.txt"}


def test_a_repository_that_was_renamed_stays_the_one(hub, exported):
    """Under its old name a new one could be made, and a public one."""
    upload.upload(exported, "me/new", message="1", private=True)
    hub.renamed["me/old"] = "me/new"
    assert upload.check_hub_rights("me/old") is True
    assert upload.upload(exported, "me/old", message="2") == f"{hub.url}/me/new"
    assert [name for _, name in hub.repositories] == ["me/new"]
    assert b"me/new" in hub.files("me/new")["README.md"]


def test_what_is_replaced_while_it_is_sent_is_sent_again(hub, exported, tmp_path, monkeypatch):
    """By a run that was made longer: not the weights of one model and the sums of another."""
    final, new = tmp_path / "final", tmp_path / "new"
    for place in (final, new):
        shutil.copytree(exported, place)
    tensors = {name: tensor + 1 for name, tensor in load_file(new / WEIGHTS).items()}
    save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
    write_sums(new)
    expected, put = {p.name: p.read_bytes() for p in new.iterdir()}, UploadHandler.lfs_put

    def replaced(self, digest):
        if new.exists():
            atomic.move_into_place(new, final)
        return put(self, digest)

    impatient(monkeypatch)
    monkeypatch.setattr(UploadHandler, "lfs_put", replaced)
    upload.upload(final, "me/model", message="m")
    there = hub.files("me/model")
    assert [there[name] for name in (WEIGHTS, SUMS)] == [expected[name] for name in (WEIGHTS, SUMS)]
