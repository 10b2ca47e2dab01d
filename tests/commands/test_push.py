"""The verb `push`, with the real client to the fake Hub: rights, faults, and the way back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import Fault
from fake_hub_uploads import UploadHub
from safetensors.torch import load_file
from tiny_export import VERIFIED, WITHOUT_THE_PACKAGE, export_unverified
from tiny_gpt2 import tiny_model, tiny_tokenizer

from gpt2repro import UserError
from gpt2repro.commands import push
from gpt2repro.publishing import upload, verification


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return export_unverified(tmp_path_factory.mktemp("push") / "final")


@pytest.fixture
def hub(monkeypatch):
    with UploadHub() as hub:
        hub.use_as_me(monkeypatch)
        yield hub


@pytest.fixture
def verified(monkeypatch, exported):
    """Verification takes seconds and is tested in test_export.py."""
    monkeypatch.setattr(verification, "verify", lambda *_, **__: VERIFIED)


FRESH = (
    WITHOUT_THE_PACKAGE
    + """
from safetensors.torch import save_file
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("me/name", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("me/name")
ids = tokenizer("This function returns", return_tensors="pt").input_ids
greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
save_file({"ids": ids, "logits": model(ids).logits.detach(), "greedy": greedy}, sys.argv[1])
"""
)


@pytest.mark.sweep
def test_push_with_faults_and_reload_by_a_fresh_process(exported, tmp_path):
    """The verb in its own process; 503s, and a connection reset in the middle of the weights."""
    with UploadHub() as hub:
        hub.faults += [
            Fault("reset", path="^/lfs/", method="PUT"),
            Fault("status:503", path="/preupload/", method="POST", times=2),
            Fault("status:503", path="/commit/", method="POST"),
        ]
        environment = (
            os.environ | hub.env | {"HF_TOKEN": "hf_me", "HF_MODULES_CACHE": str(tmp_path)}
        )
        command = [sys.executable, "-m", "gpt2repro", "push", "--model", str(exported)]
        pushed = subprocess.run(
            [*command, "--repo", "me/name"], env=environment, capture_output=True, text=True
        )
        assert pushed.returncode == 0, pushed.stderr
        assert "Traceback" not in pushed.stderr
        assert pushed.stdout.endswith(f"{hub.url}/me/name\n")
        assert "equal bit for bit" in pushed.stdout and "is new: this makes it" in pushed.stdout
        files = hub.files("me/name")
        assert files.keys() - {".gitattributes"} == {path.name for path in exported.iterdir()}
        for path in exported.iterdir():
            assert path.name == "README.md" or files[path.name] == path.read_bytes()
        card = files["README.md"].decode()
        assert 'pipeline("text-generation", "me/name", trust_remote_code=True)' in card
        assert str(exported) not in card
        assert hub.put() == 1

        fresh = subprocess.run(
            [sys.executable, "-P", "-c", FRESH, str(tmp_path / "answers")],
            env=environment | {"HF_TOKEN": ""},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert fresh.returncode == 0, fresh.stderr
    theirs, model = load_file(tmp_path / "answers"), tiny_model()
    ids = tiny_tokenizer()("This function returns", return_tensors="pt")["input_ids"]
    assert torch.equal(theirs["ids"], ids)
    # one thread there, perhaps several here: sums are split differently
    torch.testing.assert_close(theirs["logits"], model(ids).logits, rtol=0, atol=1e-5)
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(theirs["greedy"], greedy)


def test_an_existing_repository_gets_a_commit_and_loses_stale_weights(
    hub, exported, verified, capsys
):
    stale = "model-00001-of-00002.safetensors"
    mine = dict.fromkeys(("notes.txt", "onnx/model.bin", "adapter_model.safetensors"), b"mine")
    template = "chat_template.jinja"  # of an earlier tokenizer
    old = dict.fromkeys(("pytorch_model.bin", stale, template, "vocab.json"), b"old")
    hub.add("models", "me/name", {**old, **mine})
    assert push.main(["--model", str(exported), "--repo", "me/name"]) == 0
    assert "exists: this adds a commit" in capsys.readouterr().out
    files = hub.files("me/name")
    assert {name: files[name] for name in mine} == mine  # nobody loads GPT-2 from them
    assert old.keys().isdisjoint(files)
    commits = len(hub.repositories["models", "me/name"].commits)
    upload.upload(exported, "me/name", message="again")  # nothing new: no commit
    assert len(hub.repositories["models", "me/name"].commits) == commits


def test_private_and_revision(hub, exported, verified):
    command = ["--model", str(exported), "--repo", "me/secret", "--private", "--revision", "v2"]
    assert push.main([*command, "--message", "of today"]) == 0
    assert hub.messages == ["of today"]
    assert "me/secret" in hub.private
    assert "model.safetensors" in hub.files("me/secret", "v2")
    assert "model.safetensors" not in hub.files("me/secret")
    hub.add("models", "me/open", {})
    with pytest.raises(UserError, match="me/open exists and is public"):
        push.main(["--model", str(exported), "--repo", "me/open", "--private"])


def test_an_organization_decides_on_what_nobody_asked_for(hub, exported, verified):
    hub.private_by_default = True
    assert push.main(["--model", str(exported), "--repo", "me/secret"]) == 0
    assert "me/secret" in hub.private


def test_an_evaluation_goes_into_the_card(hub, exported, verified, tmp_path, capsys):
    dataset = {"name": "Rowan/hellaswag", "title": "HellaSwag"}
    results = {
        "results": {"hellaswag/completion_acc_norm": {"value": 0.25, "stderr": 0.01}},
        "tasks": {
            "hellaswag_completion": {
                "dataset": dataset,
                "figures": ["hellaswag/completion_acc_norm"],
            }
        },
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    before = (exported / "README.md").read_text()
    command = ["--model", str(exported), "--repo", "me/name", "--evaluation"]
    try:
        assert push.main([*command, str(tmp_path / "results.json")]) == 0
        card = hub.files("me/name")["README.md"].decode()
        assert "0.2500 ± 0.0100" in card and "Rowan/hellaswag" in card
        assert "warning" not in capsys.readouterr().err
        for model, warns in (
            (str(exported), False),
            (str(exported.parent), False),  # as of a run
            ("me/name", False),
            ("someone/else", True),
        ):
            (tmp_path / "results.json").write_text(json.dumps(results | {"model": model}))
            assert push.main([*command, str(tmp_path / "results.json")]) == 0
            said = f"results.json is of {model}, not {exported}"
            assert (said in capsys.readouterr().err) == warns
        (tmp_path / "other.json").write_text("{}")
        with pytest.raises(UserError, match=r"--evaluation .*not what `gpt2repro evaluate"):
            push.main([*command, str(tmp_path / "other.json")])
    finally:
        (exported / "README.md").write_text(before)


def test_what_is_wrong_here_is_told_before_anything_is_sent(hub, exported, verified, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    command = ["--model", str(copy), "--repo", "me/name"]
    for option in ("--message", "--revision"):
        with pytest.raises(UserError, match=f"{option}: it is empty"):
            push.main([*command, f"{option}="])
    (copy / "README.md").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"README.md: it is no UTF-8 text"):
        push.main(command)
    assert ("models", "me/name") not in hub.repositories


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        ("", "me/name", "no Hub token found; run `hf auth login` or set HF_TOKEN"),
        ("hf_unknown", "me/name", "does not accept the token"),
        ("hf_reader", "me/name", "may only read"),
        ("hf_me", "you/name", "no right to write there.*'you'"),
        ("hf_me", "you/existing", "no right to write there.*'you'"),
        ("hf_me", "name", "give it as user/name"),
    ],
)
def test_rights_are_checked_before_anything_is_sent(
    hub, exported, verified, monkeypatch, tmp_path, token, repo, said
):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no"))
    hub.add("models", "you/existing", {"README.md": b""})
    with pytest.raises(UserError, match=said):
        push.main(["--model", str(exported), "--repo", repo])
    assert hub.put() == 0 and not hub.messages


def test_no_network_is_one_line(exported, verified, monkeypatch, hub):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="check the rights to me/name: the Hub cannot be reached"):
        push.main(["--model", str(exported), "--repo", "me/name"])


def test_only_verified_exports_are_pushed(hub, exported, tmp_path):
    checkpoint = tmp_path / "step_00000001"
    checkpoint.mkdir()
    for name in ("COMPLETE", "config.json"):
        (checkpoint / name).write_text("{}")
    with pytest.raises(UserError, match=r"training checkpoint.*gpt2repro export"):
        push.main(["--model", str(checkpoint), "--repo", "me/name"])
    tampered = tmp_path / "tampered"
    tampered.mkdir()
    for path in exported.iterdir():
        content = bytearray(path.read_bytes())
        if path.suffix == ".safetensors":
            content[-1] ^= 1
        (tampered / path.name).write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors was changed or damaged"):
        push.main(["--model", str(tampered), "--repo", "me/name"])
    # Only the rights were asked for, and nothing was sent.
    assert {(r.method, r.path) for r in hub.log} == {
        ("GET", "/api/whoami-v2"),
        ("GET", "/api/models/me/name"),
    }
