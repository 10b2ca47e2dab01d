"""Exports: what they hold, that strangers load them, and that a wrong one is never published."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from power_failure import Disk
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_export import VERIFIED, WITHOUT_THE_PACKAGE, export_unverified, without_fresh_processes
from tiny_gpt2 import tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from gpt2repro import UserError
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.publishing import contents, export, fresh_process, verification

ROOT = Path(__file__).parent.parent.parent
NATIVE_FILES = {
    "README.md",
    "SHA256SUMS",
    "config.json",
    "configuration_gpt2repro.py",
    "generation_config.json",
    "model.safetensors",
    "modeling_gpt2repro.py",
    "tokenizer.json",
    "tokenizer_config.json",
}
CODE = {"configuration_gpt2repro.py", "modeling_gpt2repro.py"}
STOCK_FILES = (NATIVE_FILES - CODE) | {"vocab.json", "merges.txt"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Both forms of one model, and what their verifications said."""
    root = tmp_path_factory.mktemp("exports")
    picture = root / "loss_curve.png"
    picture.write_bytes(b"\x89PNG")
    return root, {
        form: export.export(
            tiny_model(), tiny_tokenizer(), root / form, format=form, figures=[picture, root / "no"]
        )
        for form in contents.CLASSES
    }


@pytest.fixture
def copy(exported, tmp_path):
    """A native export that a test may spoil."""
    return Path(shutil.copytree(exported[0] / "gpt2repro", tmp_path / "copy"))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# --- What an export holds -------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "files"), [("gpt2repro", NATIVE_FILES), ("gpt2", STOCK_FILES)])
def test_files_and_tensors(exported, form, files):
    directory = exported[0] / form
    assert {path.name for path in directory.iterdir()} == files | {"loss_curve.png"}
    model = tiny_model()
    tensors = load_file(directory / "model.safetensors")
    assert tensors.keys() == {name for name, _ in model.named_parameters()}
    assert not any("lm_head" in name or name.endswith(".attn.bias") for name in tensors)
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[name], parameter), name
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    for line in (directory / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest


def test_both_forms_hold_the_same_bytes(exported):
    forms = [exported[0] / form / "model.safetensors" for form in contents.CLASSES]
    assert forms[0].read_bytes() == forms[1].read_bytes()


def test_configuration(exported):
    native, stock = (read(exported[0] / form / "config.json") for form in contents.CLASSES)
    assert native["auto_map"].keys() >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert native["architectures"] == ["GPT2ReproForCausalLM"]
    assert stock["model_type"] == "gpt2" and stock["architectures"] == ["GPT2LMHeadModel"]
    assert "auto_map" not in stock
    assert stock["n_ctx"] == stock["n_positions"] == 32  # llama.cpp's converter reads n_ctx
    eos = tiny_tokenizer().eos_token_id
    for form in contents.CLASSES:
        config = read(exported[0] / form / "config.json")
        generation = read(exported[0] / form / "generation_config.json")
        assert config["dtype"] == "float32" and config["tie_word_embeddings"] is True
        assert config["bos_token_id"] == config["eos_token_id"] == eos
        assert config["pad_token_id"] is None and generation["pad_token_id"] == eos
        tokenizer = read(exported[0] / form / "tokenizer_config.json")
        assert tokenizer["model_max_length"] == 32


def test_verification_says_how_equal_the_logits_are(exported):
    found = exported[1]
    assert found["gpt2repro"].max_abs_difference == 0
    assert found["gpt2"].max_abs_difference < 1e-5  # stock GELU is seven roundings, ours one
    for form, each in found.items():
        assert each.num_greedy_tokens == 16 and each.tied
        card = (exported[0] / form / "README.md").read_text()
        assert all(line in card for line in each.lines())
        assert "decodes a text as the live one does" in card  # a text may come back in lower case
    assert "trust_remote_code=True" in (exported[0] / "gpt2repro" / "README.md").read_text()
    assert "trust_remote_code" not in (exported[0] / "gpt2" / "README.md").read_text()


STRANGER = (
    WITHOUT_THE_PACKAGE
    + """
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
torch.set_num_threads(1)
answers, ids = {}, torch.arange(1, 21)[None]
for form, trust in (("gpt2repro", {"trust_remote_code": True}), ("gpt2", {})):
    model = AutoModelForCausalLM.from_pretrained(form, **trust)
    answers[form + "/logits"] = model(ids).logits.detach()
    answers[form + "/hidden"] = AutoModel.from_pretrained(form, **trust)(ids)[0].detach()
    answers[form + "/greedy"] = model.generate(ids, max_new_tokens=8, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(form)
    assert tokenizer.decode(tokenizer("It's true 100%").input_ids) == "It's true 100%"
    text = pipeline("text-generation", form, **trust)("This", max_new_tokens=2)[0]["generated_text"]
    assert text.startswith("This"), text
save_file(answers, sys.argv[1])
"""
)


def test_a_stranger_gets_the_live_models_answers(exported, tmp_path):
    """Written without `verify`, as a second opinion: logits, hidden states, tokens."""
    command = [sys.executable, "-P", "-c", STRANGER, str(tmp_path / "answers")]
    environment = {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}
    result = subprocess.run(
        command, cwd=exported[0], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "pad_token_id" not in result.stderr  # generate() has no reason to warn
    theirs = load_file(tmp_path / "answers")
    model, ids = tiny_model(), torch.arange(1, 21)[None]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        logits, hidden = model(ids).logits, model.transformer(ids)[0]
    torch.set_num_threads(threads)
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(theirs["gpt2repro/logits"], logits)
    assert torch.equal(theirs["gpt2repro/hidden"], hidden)
    # stock GELU is seven roundings, ours one
    torch.testing.assert_close(theirs["gpt2/logits"], logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs["gpt2/hidden"], hidden, rtol=0, atol=1e-5)
    assert torch.equal(theirs["gpt2repro/greedy"], greedy)
    assert torch.equal(theirs["gpt2/greedy"], greedy)


def test_bfloat16_in_shards_with_a_head_of_its_own(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    found = export.export(
        model,
        tiny_tokenizer(),
        tmp_path / "out",
        format="gpt2",
        dtype=torch.bfloat16,
        max_shard_size="100KB",
    )
    assert (found.dtype, found.tied) == ("bfloat16", False)
    assert model.dtype == torch.float32
    index = read(tmp_path / "out" / "model.safetensors.index.json")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and set(index["weight_map"].values()) == {file.name for file in files}
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert tensors.keys() == dict(model.named_parameters()).keys() == index["weight_map"].keys()
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight.bfloat16())


# --- A wrong one is never published ---------------------------------------------------------------


@pytest.fixture
def no_verification(monkeypatch):
    """For tests of what happens around it."""
    monkeypatch.setattr(export, "verify", lambda *_: VERIFIED)


def without_modeling_file(directory):
    (directory / "modeling_gpt2repro.py").unlink()


def with_other_heads(directory):
    config = read(directory / "config.json") | {"n_head": 2}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_modeling_file, "modeling_gpt2repro"),
        (with_other_heads, "logits differ"),
    ],
)
def test_a_failed_check_keeps_the_export_out(exported, tmp_path, monkeypatch, spoil, said):
    output = tmp_path / "final"
    shutil.copytree(exported[0] / "gpt2repro", output)  # an earlier export: it must stay
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    sums = contents.write_sums
    monkeypatch.setattr(export, "write_sums", lambda place: [spoil(place), sums(place)])
    with pytest.raises(UserError, match=said) as error:
        export.export(tiny_model(), tiny_tokenizer(), output)
    assert f"kept as {output}.rejected" in str(error.value)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert (tmp_path / "final.rejected" / "config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"final", "final.rejected"}


def test_packages_may_be_found_by_pythonpath_alone(exported, tmp_path, monkeypatch):
    """As clusters provide them: this Python has none of its own, and a path may be relative."""
    places = ["packages", ROOT, ""]
    monkeypatch.setattr(sys, "executable", sys._base_executable)  # type: ignore[attr-defined]
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, places)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packages").symlink_to(Path(torch.__file__).parent.parent)
    (tmp_path / "json.py").write_text("raise SystemExit('not the one')")  # no place is not here
    verification.verify(exported[0] / "gpt2", tiny_model(), tiny_tokenizer())


def test_a_fork_that_needs_our_package_is_refused(copy, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = copy / "modeling_gpt2repro.py"
    path.write_text("import gpt2repro\n" + path.read_text())
    contents.write_sums(copy)
    with pytest.raises(UserError, match=r"in a fresh process .*gpt2repro"):
        verification.verify(copy, tiny_model(), tiny_tokenizer(), allow_code=True)


def test_another_tokenizer_is_refused(copy):
    want = verification._tokenizer_answers(tiny_tokenizer())
    fresh_process.check_tokenizer(str(copy), True, want)
    for token in ("eos", "bos", "pad"):
        with pytest.raises(fresh_process.CheckFailed, match=f"tokenizer's {token}_token_id is"):
            fresh_process.check_tokenizer(str(copy), True, want | {token: 5})
    content = read(copy / "tokenizer.json")
    content["model"]["merges"] = content["model"]["merges"][:5]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(fresh_process.CheckFailed, match="encodes the probe text to other ids"):
        fresh_process.check_tokenizer(str(copy), True, want)


def test_greedy_tokens_may_part_only_where_the_noise_decides():
    same = fresh_process.same_greedy_tokens
    assert same([1, 2, 3], [1, 2, 3], [1.0, 1.0, 1.0], 0.1)
    assert same([1, 9, 8], [1, 2, 3], [1.0, 0.15, 1.0], 0.1)  # a tie within twice the noise
    assert not same([1, 9, 8], [1, 2, 3], [1.0, 0.25, 1.0], 0.1)
    assert not same([1, 2], [1, 2, 3], [1.0, 1.0, 1.0], 0.1)


def test_a_tampered_file_is_refused(copy):
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors was changed or damaged"):
        verification.verify(copy)
    contents.write_sums(copy)  # which vouches for it: the live model still tells
    with pytest.raises(UserError, match="is not the live model's"):
        verification.verify(copy, tiny_model(), tiny_tokenizer())
    weights.write_bytes(content[:-4])
    contents.write_sums(copy)
    with pytest.raises(UserError, match=r"damaged|cannot be loaded"):
        verification.verify(copy)


def test_other_tensors_are_refused(copy):
    tensors = load_file(copy / "model.safetensors")

    def refused(changed: dict, said: str) -> None:
        save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
        contents.write_sums(copy)
        with pytest.raises(UserError, match=said):
            verification.verify(copy, tiny_model(), tiny_tokenizer())

    head = tensors["transformer.wte.weight"].clone()
    refused(tensors | {"lm_head.weight": head}, "lm_head.weight, .*the model")
    missing = {name: t for name, t in tensors.items() if not name.endswith("ln_f.bias")}
    refused(missing, r"lacks 1 tensors, among them transformer.ln_f.bias")
    spoiled = tensors | {"transformer.ln_f.bias": torch.full((64,), torch.nan)}
    refused(spoiled, "transformer.ln_f.bias is not the live model's")


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (float("nan"), None, r"wpe\.weight holds NaN or infinity"),
        (-float("inf"), torch.bfloat16, r"wpe\.weight holds NaN or infinity"),
        (1e7, torch.float16, r"NaN or infinity: torch\.float16 is too narrow"),
    ],
)
def test_a_number_that_is_none_is_refused_where_no_probe_looks(tmp_path, value, dtype, said):
    model = tiny_model(n_positions=128)
    with torch.no_grad():
        model.transformer.wpe.weight[100:] = value
    with pytest.raises(UserError, match=said):
        export.export(model, tiny_tokenizer(), tmp_path / "final", dtype=dtype)
    assert not (tmp_path / "final").exists()


def test_pickles_and_stray_files_are_refused(copy):
    for name in ("pytorch_model.bin", "optimizer.safetensors", "evil.py", "data.pkl", "sub/x.pt"):
        path = copy / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        with pytest.raises(UserError, match=f"{name}, which does not belong"):
            verification.verify(copy)
        path.unlink()


def test_a_chat_template_travels_with_its_tokenizer(tmp_path, monkeypatch):
    """As `transformers serve` and `transformers chat` need one (docs/use/serve.md)."""
    without_fresh_processes(monkeypatch)
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    directory = tmp_path / "chat"
    for _ in range(2):  # an export that has one can be replaced, too
        export.export(tiny_model(), tokenizer, directory, format="gpt2")
    assert "chat_template.jinja" in (directory / "SHA256SUMS").read_text()
    spoken = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert spoken == "user: Hi"
    tokenizer.chat_template = several = {"default": "a", "tool_use": "b"}
    export.export(tiny_model(), tokenizer, tmp_path / "several")
    assert AutoTokenizer.from_pretrained(tmp_path / "several").chat_template == several


def test_a_tokenizer_is_named_as_transformers_4_knows_it_and_not_as_it_was_found(
    tmp_path, monkeypatch
):
    """Converters of other programs read it so; and not how it was found on this machine."""
    tiny_tokenizer().save_pretrained(tmp_path / "own")
    settings = read(tmp_path / "own" / "tokenizer_config.json")
    settings["tokenizer_class"] = "TokenizersBackend"
    settings["extra_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(settings))
    without_fresh_processes(monkeypatch)
    model = tiny_model(vocab_size=302)
    export.export(model, load_tokenizer(tmp_path / "own"), tmp_path / "final")
    settings = read(tmp_path / "final" / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert not settings.keys() & {"is_local", "local_files_only", "extra_special_tokens"}
    text = "word 12"
    again = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert again.extra_special_tokens == settings["additional_special_tokens"]
    assert again(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"300 tokens, more than the model's vocabulary of 299"):
        export.export(tiny_model(vocab_size=299), tiny_tokenizer(), tmp_path / "final")


def test_something_else_is_never_overwritten(tmp_path, no_verification):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="something else than an export"):
        export.export(model, tokenizer, tmp_path / "notes")
    with pytest.raises(UserError, match="is a file"):
        export.export(model, tokenizer, tmp_path / "notes" / "diary.txt")
    (tmp_path / "new").mkdir()
    export.export(model, tokenizer, tmp_path / "new", format="gpt2")
    export.export(model, tokenizer, tmp_path / "new")  # replaces the other form, whole
    assert {path.name for path in (tmp_path / "new").iterdir()} == NATIVE_FILES
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "new"}


def test_what_was_put_there_while_it_is_verified_stays(tmp_path, monkeypatch, no_verification):
    out, model, tokenizer = tmp_path / "final", tiny_model(), tiny_tokenizer()

    def verified(*_):
        (out / "results.json").write_text("a day of evaluation")
        return VERIFIED

    export.export(model, tokenizer, out)
    monkeypatch.setattr(export, "verify", verified)
    with pytest.raises(UserError, match=r"results\.json"):
        export.export(model, tokenizer, out)
    assert (out / "results.json").is_file() and [*tmp_path.iterdir()] == [out]


@pytest.mark.parametrize(
    "theirs", ["diary.txt", "sub/diary.txt", "optimizer.safetensors", "model.py", "a.jpg", "link"]
)
def test_only_what_is_wholly_an_export_is_replaced(copy, tmp_path, theirs):
    """It has a SHA256SUMS, as many a directory has."""
    assert contents.not_exported(copy) is None
    (copy / theirs).parent.mkdir(exist_ok=True)
    if theirs == "link":
        (copy / theirs).symlink_to(tmp_path)
    else:
        (copy / theirs).write_text("dear diary")
    with pytest.raises(UserError, match=f"something else than an export, {theirs[:3]}"):
        export.export(tiny_model(), tiny_tokenizer(), copy)
    assert (copy / theirs).exists()


def test_somebody_elses_sums_are_not_an_exports(copy, tmp_path):
    def refused(output: Path) -> None:
        with pytest.raises(UserError, match="--output"):
            export.export(tiny_model(), tiny_tokenizer(), output)

    (tmp_path / "link").symlink_to(copy)
    refused(tmp_path / "link")
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"gpt2repro"', '"llama"'))
    refused(copy)
    (copy / "config.json").write_text(config)
    sums = (copy / "SHA256SUMS").read_text()
    for text in ("", sums.replace("tokenizer.json", "other.json"), "\x00"):
        (copy / "SHA256SUMS").write_text(text)
        refused(copy)
    (copy / "SHA256SUMS").write_bytes(b"\xff\xfe")
    refused(copy)
    assert (copy / "model.safetensors").is_file()
    (copy / "SHA256SUMS").write_text(sums)
    (copy / "model.safetensors").unlink()
    assert contents.not_exported(copy) is None  # what is left of an export


def test_what_failed_a_check_takes_no_place_of_others(copy, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("no")

    monkeypatch.setattr(export, "verify", fail)
    (tmp_path / "final.rejected").mkdir()
    (tmp_path / "final.rejected" / "diary.txt").write_text("dear diary")
    for _ in range(2):  # what failed before goes
        with pytest.raises(UserError, match=r"kept as .*final\.rejected\.2"):
            export.export(tiny_model(), tiny_tokenizer(), tmp_path / "final")
    found = {path.name for path in tmp_path.iterdir()} - {copy.name}
    assert found == {"final.rejected", "final.rejected.2"}
    assert (tmp_path / "final.rejected" / "diary.txt").is_file()


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(UserError, match=r"final could not be written.*No space left"):
        export.export(tiny_model(), tiny_tokenizer(), tmp_path / "final")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "write", "said"),
    [
        ("expected.safetensors", "write_bytes", r"final could not .*gpt2repro-verify-"),
        ("README.md", "write_text", "final could not be written"),
    ],
)
def test_a_disk_that_is_full_while_verifying_is_named(tmp_path, monkeypatch, file, write, said):
    """The temporary directory, or the output's disk again: the weights do not stay on it."""
    without_fresh_processes(monkeypatch)
    writes = getattr(Path, write)

    def full(self, *rest, **more):
        if self.name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        return writes(self, *rest, **more)

    monkeypatch.setattr(Path, write, full)
    with pytest.raises(UserError, match=said) as error:
        export.export(tiny_model(), tiny_tokenizer(), tmp_path / "final")
    assert "No space left" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_process_that_takes_too_long_is_a_failed_check(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "SECONDS_FOR_FRESH_PROCESS", 0.01)
    with pytest.raises(UserError, match=r"in 0.01 s\. It is kept as .*rejected"):
        export.export(tiny_model(), tiny_tokenizer(), tmp_path / "final")


def test_another_export_to_the_same_place_spoils_nothing(tmp_path, monkeypatch):
    """It begins when the first has been verified."""

    def verify_late(directory, *_):
        monkeypatch.setattr(export, "verify", lambda *_: VERIFIED)
        export.export(tiny_model(), tiny_tokenizer(), tmp_path / "final", format="gpt2")
        return VERIFIED

    monkeypatch.setattr(export, "verify", verify_late)
    export.export(tiny_model(), tiny_tokenizer(), tmp_path / "final")
    assert {path.name for path in (tmp_path / "final").iterdir()} == NATIVE_FILES
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_the_live_model_is_left_as_it_was(tmp_path, monkeypatch):
    without_fresh_processes(monkeypatch)
    model = tiny_model(attn_pdrop=0.5)
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    model.train()
    before = model.config.to_dict()
    export.export(model, tiny_tokenizer(), tmp_path / "final")
    assert model.training and model.config._attn_implementation == "eager"
    assert model.config.to_dict() == before
    assert read(tmp_path / "final" / "config.json")["use_cache"] is True


def test_a_wrong_shard_size_names_the_option(tmp_path):
    with pytest.raises(UserError, match="--max_shard_size many"):
        export.export(tiny_model(), tiny_tokenizer(), tmp_path / "o", max_shard_size="many")
    assert list(tmp_path.iterdir()) == []


def test_an_export_survives_a_power_failure(tmp_path, monkeypatch):
    """All of it is on the disk before it has the name."""
    disk = Disk(monkeypatch)
    output = export_unverified(tmp_path / "export")
    assert disk.lost(output) == set()
