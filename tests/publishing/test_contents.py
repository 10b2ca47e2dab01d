"""What is verified or published is what it looks like: no code but ours, and none runs before."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_export import VERIFIED, export_unverified
from tiny_gpt2 import tiny_model, tiny_tokenizer

from gpt2repro import UserError
from gpt2repro.commands import export as export_verb
from gpt2repro.commands import push
from gpt2repro.publishing import background, contents, export, upload, verification
from gpt2repro.records import saved_models
from gpt2repro.system import machine, processes


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return export_unverified(tmp_path_factory.mktemp("contents") / "final")


@pytest.fixture
def copy(exported, tmp_path):
    """A native export that a test may spoil."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.fixture
def nothing_runs(monkeypatch):
    """Neither a process, nor a model or tokenizer that is loaded in this one."""

    def run(*_, **__):
        pytest.fail("the directory was loaded before it was looked at")

    for name in ("run_fresh_process", "load_causal_lm", "load_tokenizer"):
        monkeypatch.setattr(verification, name, run)


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def refused(directory: Path, said: str, **options) -> None:
    """By `verify` and by every upload, though the sums are those of what is there."""
    contents.write_sums(directory)
    for look in (verification.verify, upload.to_publish):
        with pytest.raises(UserError, match=said):
            look(directory, **options)


# --- Code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", contents.SHIPPED_CODE)
def test_code_that_is_not_ours_is_refused(copy, nothing_runs, name):
    with (copy / name).open("a") as file:
        file.write("\n")  # one byte
    refused(copy, f"{name} is not this package's.*--allow_code")
    contents.check_contents(copy, allow_code=True)


def test_no_setting_names_code_elsewhere(copy, nothing_runs):
    """`trust_remote_code=True` would take it from a repository, or from a file of another name."""
    auto_map = json.loads((copy / "config.json").read_text())["auto_map"]
    ours = auto_map["AutoModel"]
    for file, settings in (
        ("config.json", {"auto_map": auto_map | {"AutoModel": f"some/body--{ours}"}}),
        ("config.json", {"auto_map": auto_map | {"AutoTokenizer": [None, "evil.Tokenizer"]}}),
        ("config.json", {"text_config": {"auto_map": {"AutoConfig": "some/body--c.C"}}}),
        ("config.json", {"custom_pipelines": {"text-generation": {"impl": "evil.Pipeline"}}}),
        ("config.json", {"auto_map": {"AutoModel": "modeling_gpt2repro.x/repo--code.Model"}}),
        ("config.json", {"_attn_implementation": "some/kernel"}),
        ("generation_config.json", {"custom_generate": "some/body"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [f"some/body--{ours}", None]}}),
        ("tokenizer_config.json", {"auto_map": [ours, None]}),
    ):
        before = (copy / file).read_text()
        change(copy / file, **settings)
        refused(copy, f"{file} names code")
        refused(copy, f"{file} names code", allow_code=True)
        (copy / file).write_text(before)
    change(copy / "config.json", _attn_implementation="sdpa")
    contents.check_contents(copy)
    for name in contents.SHIPPED_CODE:
        (copy / name).unlink()
    change(copy / "config.json", model_type="gpt2")  # the stock form has no code at all
    refused(copy, "config.json names code")


def test_pickles_libraries_and_stray_code_are_not_sent(copy, nothing_runs):
    for name in ("pytorch_model.bin", "x.pt", "ops.so", "custom_generate/generate.py", "a.pth"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"")
        with pytest.raises(UserError, match=f"{name}, which does not belong"):
            upload.to_publish(copy)
        (copy / name).unlink()


LITTER = (".DS_Store", ".nfs000000000001", "train.log", "Thumbs.db", "__pycache__/a.pyc", ".git/x")


def test_what_systems_and_tools_leave_is_neither_refused_nor_sent(copy):
    before = upload.to_publish(copy)
    for name in LITTER:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"")
    (copy / ".env").symlink_to("nowhere")
    contents.check_contents(copy)
    assert upload.to_publish(copy) == before
    (copy / "logs").mkdir()
    (copy / "logs" / "x.txt").touch()
    with pytest.raises(UserError, match=r"logs/x\.txt, which does not belong"):
        contents.check_contents(copy)


def test_an_export_is_replaced_in_spite_of_what_a_system_left_but_not_of_what_somebody_wrote(copy):
    for name in (".DS_Store", "._model.safetensors", ".nfs000000000001", "Thumbs.db"):
        (copy / name).touch()
    assert contents.not_exported(copy) is None
    for name in ("train.log", ".env", "notes.txt"):
        (copy / name).touch()
        assert contents.not_exported(copy) == name
        (copy / name).unlink()
    (copy / ".DS_Store").unlink()
    (copy / ".DS_Store").mkdir()
    assert contents.not_exported(copy) == ".DS_Store"


def test_a_checkpoint_with_other_code_is_not_pushed(exported, tmp_path):
    checkpoint = Path(shutil.copytree(exported, tmp_path / "step_00000001"))
    (checkpoint / "optimizer.safetensors").write_bytes(b"")  # which stays here
    (checkpoint / "modeling_gpt2repro.py").write_text("raise SystemExit")
    push = background.BackgroundPush("me/name")
    push.submit(checkpoint, "Step 1")
    (problem,) = push.finish()
    assert "modeling_gpt2repro.py is not this package's" in problem
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_a_fork_is_published_when_asked_for_with_a_warning(copy, monkeypatch, capsys):
    (copy / "modeling_gpt2repro.py").write_text("a fork's")
    contents.write_sums(copy)
    sent = {}
    monkeypatch.setattr(verification, "verify", lambda *_, **__: VERIFIED)
    monkeypatch.setattr(upload, "check_hub_rights", lambda *_, **__: True)
    monkeypatch.setattr(upload, "upload", lambda *_, **options: sent.update(options) or "url")
    words = ["--model", str(copy), "--repo", "me/name"]
    with pytest.raises(UserError, match="is not this package's"):
        push.main(words)
    assert push.main([*words, "--allow-code"]) == 0
    assert sent["allow_code"] is True
    assert "warning: modeling_gpt2repro.py in" in capsys.readouterr().err


# --- As it was exported ---------------------------------------------------------------------------


def test_what_was_not_exported_is_named(copy, nothing_runs):
    for name in ("chat_template.jinja", "special_tokens_map.json", "vocab.json"):
        (copy / name).write_text("{}")
        with pytest.raises(UserError, match=f"{name} was added after the export.*remove it, or"):
            verification.verify(copy)
        (copy / name).unlink()
    (copy / "LICENSE").write_text("added by hand, as pictures and the card may be")
    contents.check_sums(copy)
    (copy / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="lacks SHA256SUMS, which every export has; export the mod"):
        verification.verify(copy)


def test_a_clone_without_git_lfs_says_what_to_do(copy):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (copy / "model.safetensors").write_text(pointer)
    for look in (verification.verify, lambda where: saved_models.load_causal_lm(str(where))):
        with pytest.raises(UserError, match=r"a git-lfs pointer, not the file: run `git lfs pull`"):
            look(copy)


def test_an_index_does_not_lead_elsewhere(copy):
    """transformers would read the weights, and an export would publish them."""
    elsewhere = (copy / "model.safetensors").rename(copy.parent / "private.safetensors")
    names = dict.fromkeys(load_file(elsewhere), f"../{elsewhere.name}")
    (copy / contents.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    refused = pytest.raises(UserError, match=r" names .*, which is not beside it")
    with refused:
        saved_models.load_causal_lm(str(copy))
    (copy / "sub").mkdir()
    (copy / contents.INDEX).rename(copy / "sub" / contents.INDEX)
    change(copy / "config.json", transformers_weights=f"sub/{contents.INDEX}")
    with refused:
        saved_models.load_causal_lm(str(copy))


def test_an_index_of_something_else_is_in_nobodys_way(copy):
    for name, text in (("faiss.index.json", "{}"), ("a.index.json", "[1]")):
        (copy / name).write_text(text)
    saved_models.load_causal_lm(str(copy))


# --- Links ----------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "id_ed25519").write_text("PRIVATE KEY")
    return tmp_path / "elsewhere" / "id_ed25519"


@pytest.mark.parametrize(
    "name", ["a.png", "README.md", "config.json", "tokenizer.json", "model.safetensors", "sub"]
)
def test_links_are_not_published(copy, nothing_runs, tmp_path, secret, name):
    """Wherever they lead: into another directory, or to the very file that was here."""
    place, kept = copy / name, tmp_path / "kept"
    if place.exists():
        place.rename(kept)
    place.symlink_to(kept if kept.exists() else secret.parent if name == "sub" else secret)
    for look in (verification.verify, upload.to_publish):
        with pytest.raises(UserError, match=f"{name} is a symbolic link"):
            look(copy)
    push = background.BackgroundPush("me/name")
    push.submit(copy, "Step 1")
    assert "is a symbolic link" in push.finish()[0]


def test_what_is_neither_file_nor_directory_is_not_published(copy, nothing_runs):
    os.mkfifo(copy / "a.png")
    with pytest.raises(UserError, match=r"a\.png, which does not belong"):
        upload.to_publish(copy)
    (copy / "a.png").unlink()
    (copy / "a.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"a\.png is a symbolic link"):
        upload.to_publish(copy)


def test_directories_above_may_be_links(exported, tmp_path):
    (tmp_path / "runs").symlink_to(exported.parent)
    assert upload.to_publish(tmp_path / "runs" / "final")
    (tmp_path / "latest").symlink_to(exported)
    assert upload.to_publish(tmp_path / "latest")


def test_a_model_is_read_through_links_but_what_describes_it_is_left(
    exported, tmp_path, secret, monkeypatch, capsys
):
    """As from the Hub's cache, which consists of links."""
    monkeypatch.setattr(export, "verify", lambda *_: VERIFIED)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in exported.iterdir():
        (snapshot / path.name).symlink_to(secret if path.name == "README.md" else path)
    (snapshot / "a.png").symlink_to(secret)
    (snapshot / "b.png").write_bytes(b"PNG")
    output = tmp_path / "out"
    assert export_verb.main(["--model", str(snapshot), "--output", str(output)]) == 0
    assert "left out, as symbolic links: README.md, a.png" in capsys.readouterr().err
    assert {path.name for path in exported.iterdir()} | {"b.png"} == {
        path.name for path in output.iterdir()
    }
    assert not any(b"PRIVATE" in path.read_bytes() for path in output.iterdir())
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(UserError, match=r"a\.png is a symbolic link"):
        export.export(model, tokenizer, output, figures=[snapshot / "a.png"])


# --- Processes ------------------------------------------------------------------------------------

SECRETS = ("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "NVIDIA_API_KEY")
SECRETS += ("AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN", "HTTPS_PROXY", "MY_OWN")
SECRETS += ("PYTHON_KEYRING_PASSWORD", "GIT_CONFIG_VALUE_0", "SSH_AUTH_SOCK", "HF_HUB_TOKEN")
NEEDED = ("PATH", "HOME", "LC_ALL", "TMPDIR", "PYTHONUTF8", "VIRTUAL_ENV", "OMP_NUM_THREADS")
NEEDED += ("CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "HF_HOME", "HF_ENDPOINT")


def test_processes_that_we_start_are_told_no_secrets(monkeypatch, tmp_path):
    for name in SECRETS + NEEDED:
        monkeypatch.setenv(name, "x")
    given = []

    def run(command, env=None, **_):
        given.append(env)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    verification.run_fresh_process(tmp_path)
    machine.code_commit()
    given.append(processes.environment())
    assert len(given) == 4
    for environment in given:
        assert environment.keys().isdisjoint(SECRETS)
        assert environment.keys() >= set(NEEDED)
    assert given[0]["HF_HUB_OFFLINE"] == "1" and given[0]["CUDA_VISIBLE_DEVICES"] == ""
