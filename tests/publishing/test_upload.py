"""Pushing with the real client to the fake Hub: rights, faults, resumption, and the way back."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fake_hub import Fault
from fake_hub_uploads import UploadHub
from safetensors.torch import load_file, save_file
from tiny_gpt2 import tiny_model, tiny_tokenizer

from gpt2repro import UserError
from gpt2repro.publishing import export, upload, verification
from gpt2repro.system import patience


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Its fresh process is left out: test_export.py has it, and the verb starts one below."""
    output = tmp_path_factory.mktemp("push") / "final"
    with pytest.MonkeyPatch.context() as patch:
        answer = {"max_abs_difference": 0.0}
        patch.setattr(verification, "run_fresh_process", lambda _: answer)
        export.export(tiny_model(), tiny_tokenizer(), output)
    return output


@pytest.fixture
def hub(monkeypatch):
    """A fake Hub for this process, whose user is `me`; retries without waiting."""
    with UploadHub() as hub:
        hub.use_in_process(monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        monkeypatch.setattr(patience, "FIRST_DELAY_SECONDS", 0.01)
        monkeypatch.setattr(patience, "LONGEST_DELAY_SECONDS", 0.05)
        monkeypatch.setattr(patience, "OFFLINE_AFTER_SECONDS", 0.2)
        monkeypatch.setattr(patience, "_outages", patience._Outages())  # as in a new process
        real_sleep = time.sleep  # the client's own backoff waits whole seconds
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: real_sleep(0.01))
        yield hub


@pytest.fixture
def verified(monkeypatch, exported):
    """The verb's verification takes seconds and is tested in test_export.py."""
    answer = verification.Verification("gpt2repro", "float32", 1, 1, True, 1, 1, 0.0, 1, "5")
    monkeypatch.setattr(upload, "verify", lambda _: answer)


def put(hub) -> int:
    """Bodies of large files that arrived whole."""
    return sum(request.status == 200 for request in hub.requests("^/lfs/[0-9a-f]", "PUT"))


FRESH = """
import sys
from safetensors.torch import save_file
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("gpt2repro", "modeling_gpt2repro", "configuration_gpt2repro"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("me/name", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("me/name")
ids = tokenizer("This function returns", return_tensors="pt").input_ids
greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
save_file({"ids": ids, "logits": model(ids).logits.detach(), "greedy": greedy}, sys.argv[1])
"""


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
        assert "equal bit for bit" in pushed.stdout and "was created" in pushed.stdout
        files = hub.files("me/name")
        assert files.keys() - {".gitattributes"} == {path.name for path in exported.iterdir()}
        for path in exported.iterdir():
            assert path.name == "README.md" or files[path.name] == path.read_bytes()
        card = files["README.md"].decode()
        assert 'pipeline("text-generation", "me/name", trust_remote_code=True)' in card
        assert str(exported) not in card
        assert put(hub) == 1

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


def test_an_interrupted_upload_sends_only_what_is_missing(hub, tmp_path):
    """Two weight files; the second never arrives, then the same call again."""
    directory = tmp_path / "sharded"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, name in enumerate(shards):
        save_file({"x": torch.full((5000,), float(number))}, directory / name)
    second = verification.sha256(directory / shards[1])
    outage = Fault("status:503", path=second, method="PUT", times=float("inf"))
    hub.faults.append(outage)
    with pytest.raises(UserError, match=r"cannot push to me/name: gave up after"):
        upload.upload(directory, "me/name", message="m", give_up_after_seconds=0.3)
    assert hub.files("me/name").keys() == {".gitattributes"}  # nothing half-done is visible
    first_puts = put(hub)
    assert first_puts == 1
    hub.faults.remove(outage)
    upload.upload(directory, "me/name", message="m")
    assert put(hub) - first_puts == 1
    assert {*shards, "config.json"} <= hub.files("me/name").keys()


def test_large_files_go_in_parts(monkeypatch, exported, hub):
    hub.part_size = 50_000
    hub.faults.append(Fault("reset", path="^/lfs/.*/2$", method="PUT"))
    upload.upload(exported, "me/name", message="in parts")
    weights = (exported / "model.safetensors").read_bytes()
    assert hub.files("me/name")["model.safetensors"] == weights
    assert len(hub.requests("^/lfs/.*/[0-9]+$", "PUT")) == -(-len(weights) // 50_000) + 1
    assert hub.messages == ["in parts"]


def test_an_existing_repository_gets_a_commit_and_loses_stale_weights(
    hub, exported, verified, capsys
):
    stale = "model-00001-of-00002.safetensors"
    hub.add("models", "me/name", {"pytorch_model.bin": b"old", stale: b"old", "notes.txt": b"mine"})
    assert upload.main(["--model", str(exported), "--repo", "me/name"]) == 0
    assert "exists: this adds a commit" in capsys.readouterr().out
    files = hub.files("me/name")
    assert files["notes.txt"] == b"mine"
    assert {stale, "pytorch_model.bin"}.isdisjoint(files)
    commits = len(hub.repositories["models", "me/name"].commits)
    upload.upload(exported, "me/name", message="again")  # nothing new: no commit
    assert len(hub.repositories["models", "me/name"].commits) == commits


def test_private_and_revision(hub, exported, verified):
    command = ["--model", str(exported), "--repo", "me/secret", "--private", "--revision", "v2"]
    assert upload.main(command) == 0
    assert "me/secret" in hub.private
    assert "model.safetensors" in hub.files("me/secret", "v2")
    assert "model.safetensors" not in hub.files("me/secret")
    hub.add("models", "me/open", {})
    with pytest.raises(UserError, match="me/open exists and is public"):
        upload.main(["--model", str(exported), "--repo", "me/open", "--private"])


def test_an_evaluation_goes_into_the_card(hub, exported, verified, tmp_path):
    results = {"results": {"hellaswag/completion_acc_norm": {"value": 0.25, "stderr": 0.01}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    before = (exported / "README.md").read_text()
    command = ["--model", str(exported), "--repo", "me/name", "--evaluation"]
    try:
        assert upload.main([*command, str(tmp_path / "results.json")]) == 0
        card = hub.files("me/name")["README.md"].decode()
        assert "0.2500 ± 0.0100" in card and "Rowan/hellaswag" in card
        (tmp_path / "other.json").write_text("{}")
        with pytest.raises(UserError, match=r"--evaluation .*not what `gpt2repro evaluate"):
            upload.main([*command, str(tmp_path / "other.json")])
    finally:
        (exported / "README.md").write_text(before)


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
        upload.main(["--model", str(exported), "--repo", repo])
    assert put(hub) == 0 and not hub.messages


def test_rights_that_hold_create_the_repository(hub):
    assert upload.check_hub_rights("me/new", private=True) is False
    assert upload.check_hub_rights("me/new", private=True) is True
    assert "me/new" in hub.private


def test_no_network_is_one_line(exported, verified, monkeypatch, hub):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="check the rights to me/name: the Hub cannot be reached"):
        upload.main(["--model", str(exported), "--repo", "me/name"])


def test_only_verified_exports_are_pushed(hub, exported, tmp_path):
    checkpoint = tmp_path / "step_00000001"
    checkpoint.mkdir()
    for name in ("COMPLETE", "config.json"):
        (checkpoint / name).write_text("{}")
    with pytest.raises(UserError, match=r"training checkpoint.*gpt2repro export"):
        upload.main(["--model", str(checkpoint), "--repo", "me/name"])
    tampered = tmp_path / "tampered"
    tampered.mkdir()
    for path in exported.iterdir():
        content = bytearray(path.read_bytes())
        if path.suffix == ".safetensors":
            content[-1] ^= 1
        (tampered / path.name).write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors was changed or damaged"):
        upload.main(["--model", str(tampered), "--repo", "me/name"])
    assert hub.log == []


# --- In the background ----------------------------------------------------------------------------


def checkpoints(root: Path, number: int) -> Path:
    """A checkpoint's directory, as training leaves it."""
    directory = root / f"step_{number}"
    directory.mkdir()
    config = {"step": number, "model_type": "gpt2repro"}
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "optimizer.safetensors"):
        save_file({"x": torch.full((1000,), float(number))}, directory / name)
    for name in ("state.json", "COMPLETE"):
        (directory / name).write_text("{}")
    return directory


def test_background_push_never_blocks_and_newest_supersedes(hub, tmp_path):
    """The first upload hangs on a closed gate; of three submitted meanwhile, only the last goes."""
    gate = threading.Event()
    real = upload.upload

    def slow(*args, **kwargs):
        gate.wait(30)
        return real(*args, **kwargs)

    upload.upload, background = slow, None
    try:
        background = upload.BackgroundPush("me/name", tokenizer=tiny_tokenizer())
        for number in range(1, 5):
            directory = checkpoints(tmp_path, number)
            began = time.monotonic()
            background.submit(directory, f"Step {number}")
            assert time.monotonic() - began < 1  # hard links, not an upload
            for path in directory.iterdir():  # pruned at once: the submission outlives it
                path.unlink()
            directory.rmdir()
            if number == 1:
                while background._current is None:
                    time.sleep(0.01)
    finally:
        gate.set()
        problems = background.finish(30) if background else []
        upload.upload = real
    assert problems == [] and background.url == f"{hub.url}/me/name"
    assert hub.messages == ["Step 1", "Step 4"]
    files = hub.files("me/name")
    assert json.loads(files["config.json"])["step"] == 4
    loadable = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    loadable |= {"configuration_gpt2repro.py", "modeling_gpt2repro.py"}
    assert files.keys() == loadable | {".gitattributes"}  # and no optimizer state
    assert list(tmp_path.iterdir()) == []  # no snapshot is left


def test_background_push_reports_what_failed_and_goes_on(hub, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    # every request of the first submission is refused for good, the second gets through
    hub.faults.append(Fault("status:403", path="/preupload/", method="POST"))
    background = upload.BackgroundPush("me/name")
    first, second = checkpoints(tmp_path, 1), checkpoints(tmp_path, 2)
    background.submit(first, "Step 1")
    while not background._problems:
        time.sleep(0.01)
    background.submit(second, "Step 2")
    background.submit(tmp_path / "missing", "Step 3")
    problems = background.finish(30)
    assert len(problems) == 2
    assert f"the push of {first} (Step 1) to me/name failed: " in problems[0]
    assert "no right to write" in problems[0] and "gpt2repro push --model DIR" in problems[0]
    assert "missing could not be prepared" in problems[1]
    assert hub.messages == ["Step 2"]


def test_background_push_gives_up_waiting_but_says_so(hub, tmp_path):
    hub.faults.append(Fault("hang", path="/preupload/", method="POST"))
    background = upload.BackgroundPush("me/name")
    directory = checkpoints(tmp_path, 1)
    background.submit(directory, "Step 1")
    began = time.monotonic()
    problems = background.finish(timeout=0.5)
    assert time.monotonic() - began < 5
    assert len(problems) == 1 and "was not done after 0.5 s" in problems[0]
    hub.closing.set()  # ends the silence: no thread outlives the test
    background._thread.join(30)
    assert not background._thread.is_alive()
