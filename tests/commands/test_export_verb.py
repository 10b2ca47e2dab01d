"""The verb `export`: from a checkpoint, official files, a run; refusals name the option."""

import json
import re
import shutil

import pytest
import torch
from fake_hub import FakeHub, Fault, impatient
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_now
from tiny_export import VERIFIED
from tiny_gpt2 import save_official, tiny_model, tiny_tokenizer
from torch.optim import AdamW

from gpt2repro import UserError
from gpt2repro.commands import export
from gpt2repro.publishing import contents
from gpt2repro.publishing import export as publishing
from gpt2repro.publishing.licence import licence_of
from gpt2repro.records import saved_models


@pytest.fixture
def no_verification(monkeypatch):
    """It takes seconds and is tested in tests/publishing/test_export.py."""
    monkeypatch.setattr(publishing, "verify", lambda *_: VERIFIED)


def test_the_verb_exports_checkpoints_and_official_files(tmp_path, capsys, no_verification):
    model = tiny_model()
    step = save_now(tmp_path / "run" / "checkpoints", 3, model, AdamW(model.parameters()))
    with pytest.raises(UserError, match="holds no tokenizer; name one with --tokenizer"):
        export.main(["--model", str(step), "--output", str(tmp_path / "out")])
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for aside in ("stable", "superseded/until_step_00000005"):
        moved = save_now(step.parent / aside, 3, model, AdamW(model.parameters()))
        (tmp_path / "run" / "recipe.yaml").write_text(f"tokenizer_name: {tmp_path / 'tokenizer'}\n")
        assert saved_models.find_tokenizer(str(moved)).get_vocab() == tiny_tokenizer().get_vocab()
    shutil.rmtree(step.parent / "stable")
    official = save_official(model, tmp_path / "official")
    assert saved_models.locate(str(tmp_path / "run")) == str(step)  # no final/ yet
    for source in (step, official, step.parent):
        output = tmp_path / f"of-{source.name}"
        arguments = ["--model", str(source), "--tokenizer", str(tmp_path / "tokenizer")]
        arguments += ["--output", str(output), "--format", "gpt2", "--max-shard-size", "1GB"]
        assert export.main(arguments) == 0
        stored = load_file(output / "model.safetensors")
        for name, parameter in model.named_parameters():
            assert torch.equal(stored[name], parameter)
    assert "verified" in capsys.readouterr().out
    small = ["--dtype", "bfloat16", "--max_shard_size", "20KB", "--output", str(tmp_path / "small")]
    assert export.main([*arguments[:4], *small]) == 0
    shards = sorted((tmp_path / "small").glob("model-*.safetensors"))
    assert len(shards) > 1
    stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    # a run's directory means its final/, and its card goes along
    final = tmp_path / "run" / "final"
    publishing.export(model, tiny_tokenizer(), final, card="# Mine\n")
    assert export.main(["--model", str(tmp_path / "run"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "README.md").read_text().startswith("# Mine\n")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# Theirs\n", "apache-2.0"),
        ("# Theirs\n", None),
        ("---\nlicense: [\n---\n", None),
        (None, None),
    ],
)
def test_a_licence_is_the_sources_or_none(tmp_path, monkeypatch, no_verification, card, licence):
    """Of a directory, whose card goes along, and of a Hub id."""
    directory = save_official(tiny_model(), tmp_path / "theirs")
    tiny_tokenizer().save_pretrained(directory)
    if card is not None:
        (directory / "README.md").write_text(card)
    with FakeHub() as hub:
        hub.use_in_process(monkeypatch)
        hub.add("models", "them/gpt2", {p.name: p.read_bytes() for p in directory.iterdir()})
        for source in (str(directory), "them/gpt2"):
            assert export.main(["--model", source, "--output", str(tmp_path / "out")]) == 0
            text = (tmp_path / "out" / "README.md").read_text()
            said = re.findall(r"^license: (\w\S+)$", text, re.M)
            assert said == ([licence] if licence else [])


@pytest.mark.parametrize("derived", [False, True])
def test_what_lies_beside_a_model_goes_along_or_is_told(tmp_path, capsys, no_verification, derived):
    """`derived` as OpenAI's file says of itself, and whatever was made of it."""
    directory = save_official(tiny_model(), tmp_path / "theirs")
    tiny_tokenizer().save_pretrained(directory)
    (directory / "LICENSE").write_text("Theirs.\n")
    for picture in ("curve.png", "loss curve.png", "fig.1.png"):
        (directory / picture).touch()
    own = {"eos_token_id": [0, 5], "do_sample": True, "temperature": 0.7}
    written = own | ({"_from_model_config": True} if derived else {})
    (directory / "generation_config.json").write_text(json.dumps(written))
    tensors = load_file(directory / "model.safetensors")
    more = {f"h.{layer}.lora_A.weight": torch.ones(4, 64) for layer in range(4)}
    save_file(tensors | more, directory / "model.safetensors", metadata={"format": "pt"})
    assert export.main(["--model", str(directory), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "LICENSE").read_text() == "Theirs.\n"
    assert [each.name for each in (tmp_path / "out").glob("*.png")] == ["curve.png"]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert own.items() <= generation.items() and generation["bos_token_id"] == 0
    said = f"--model {directory}: no part of a GPT2ReproForCausalLM, left out: h.0.lora_A.weight, "
    assert f"warning: {said}h.1.lora_A.weight, h.2.lora_A.weight, ...\n" in (
        err := capsys.readouterr().err
    )
    assert "left out, as pictures of other names than a-b_c.png: fig.1.png, loss curve.png" in err


def test_a_card_in_another_encoding_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "README.md").write_bytes(b"caf\xe9\n")
    assert export._beside(tmp_path)[0] == "caf\ufffd\n"


def test_a_licence_is_not_lost_to_an_outage(monkeypatch):
    impatient(monkeypatch)
    with FakeHub() as hub:
        hub.use_in_process(monkeypatch)
        hub.add("models", "me/bare", {"config.json": b"{}"})
        hub.add("models", "me/m", {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"})
        assert licence_of("me/bare", "--model") is None
        hub.faults.append(Fault("status:503", "README.md", "GET|HEAD"))
        hub.faults.append(Fault("status:403", "README.md", "GET|HEAD"))
        assert licence_of("me/m", "--model") == "cc-by-nc-4.0"
        hub.add("models", "me/other", {"README.md": b"---\nlicense: mit\n---\n"})
        hub.faults.append(Fault("status:403", "README.md", "HEAD", times=10**9))
        with pytest.raises(UserError, match=r"cannot read the card of me/other, for its licence"):
            licence_of("me/other", "--model")


def test_the_licence_of_a_run_is_ours_unless_it_began_with_others_weights(tmp_path):
    model = tiny_model()
    step = save_now(tmp_path / "run" / "checkpoints", 3, model, AdamW(model.parameters()))
    assert licence_of(str(step), "--model") is None
    for fields, licence in (("seed: 1\n", "mit"), ("init_from: them/gpt2\n", None)):
        (tmp_path / "run" / "recipe.yaml").write_text(fields)
        assert licence_of(str(step), "--model") == licence


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "./nowhere", "--output", "out"], "--model ./nowhere: no such directory"),
        (["--model", "a/b/c", "--output", "out"], "--model a/b/c: no such directory"),
        (["--model", ".", "--output", "out"], "a directory without a config.json"),
        (["--model", "lora", "--output", "out"], "an adapter: merge it into its model first"),
        (["--model", ".", "--output", "out", "--dtype", "int3"], "--dtype"),
        (["--model", ".", "--output", "a" * 300], "--output.*too long"),
        (["--model", ".", "--output", "a\0b"], "--output.*null"),
        (["--model", ".", "--output", "out", "--format", "onnx"], "--format"),
    ],
)
def test_the_verb_names_the_option_to_mend(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=said):
        export.main(arguments)


def test_the_help_tells_the_librarys_defaults(capsys):
    with pytest.raises(SystemExit):
        export.main(["--help"])
    shown = capsys.readouterr().out
    assert f"default {publishing.MAX_SHARD_SIZE}" in shown
    assert f"{{{','.join(contents.CLASSES)}}}" in shown
