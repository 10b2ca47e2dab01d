"""compare-logits: equal on the layouts of all four sizes, and able to tell when they are not."""

import json

import pytest
import torch
from fake_hub import FakeHub, Fault
from safetensors.torch import load_file, save_file
from tiny_gpt2 import save_official, tiny_model, tiny_tokenizer

from configuration_gpt2repro import SIZES
from gpt2repro import UserError
from gpt2repro.commands import compare_logits
from gpt2repro.publishing import export, verification

MODES = ("prefill", "cached decode", "left-padded batch")


def run(tmp_path, *arguments) -> tuple[int, dict]:
    status = compare_logits.main([*map(str, arguments), "--json", str(tmp_path / "r.json")])
    return status, json.loads((tmp_path / "r.json").read_text())


@pytest.mark.parametrize("size", SIZES)
def test_all_four_sizes_in_the_official_layout(size, tmp_path):
    """Width, heads and context are the official ones; two layers and 1,000 tokens are enough."""
    model = tiny_model(**SIZES[size] | {"n_layer": 2}, n_positions=1024, vocab_size=1000)
    with torch.no_grad():
        for parameter in model.parameters():  # official-looking: nothing is zero or one
            parameter.add_(0.02 * torch.randn_like(parameter))
    directory = save_official(model, tmp_path / size)
    status, report = run(tmp_path, "--reference", directory)
    assert status == 0 and report["equal"] and report["differing_parameters"] == []
    assert report["modes"].keys() == set(MODES)
    for mode in report["modes"].values():
        assert mode["max_abs"] <= 1e-4 and mode["tolerance"] >= 1e-4
        assert mode["mean_abs"] <= mode["max_abs"] and abs(mode["kl"]) < 1e-8
        assert mode["top1"] == 1.0


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    directory = save_official(tiny_model(), tmp_path_factory.mktemp("reference") / "gpt2")
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_the_screen(reference, tmp_path, capsys):
    status, report = run(tmp_path, "--reference", reference, "--prompt", "This function")
    screen = capsys.readouterr().out
    assert status == 0
    assert "all equal bit for bit" in screen and "Equal within the tolerance." in screen
    assert all(mode in screen for mode in MODES)
    ours, theirs = report["next_tokens"]["ours"], report["next_tokens"]["theirs"]
    assert len(ours) == 5 and [text for text, _ in ours] == [text for text, _ in theirs]
    assert repr(ours[0][0]) in screen


def test_bfloat16_is_judged_by_the_references_own_noise(reference, tmp_path):
    status, report = run(tmp_path, "--reference", reference, "--dtype", "bfloat16")
    assert status == 0
    prefill = report["modes"]["prefill"]
    assert prefill["tolerance"] > 1e-3  # about 2**-8 of the logits, times three
    assert 1e-4 < prefill["max_abs"] <= prefill["tolerance"]


def test_nan_agrees_with_nothing(reference, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(reference / "model.safetensors")
    tensors["h.1.mlp.c_fc.weight"] = tensors["h.1.mlp.c_fc.weight"] * torch.nan
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text((reference / "config.json").read_text())
    status, report = run(tmp_path, "--reference", reference, "--model", other)
    assert status == 1
    assert {(mode["max_abs"], mode["top1"]) for mode in report["modes"].values()} == {(None, None)}
    assert "100.0%" not in capsys.readouterr().out


def test_other_weights_are_told_and_fail(reference, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(reference / "model.safetensors")
    tensors["h.1.mlp.c_fc.weight"] = tensors["h.1.mlp.c_fc.weight"].clone()
    tensors["h.1.mlp.c_fc.weight"][0, 0] += 1e-6  # far below the tolerance of the logits
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text((reference / "config.json").read_text())
    status, report = run(tmp_path, "--reference", reference, "--model", other)
    assert status == 1
    assert report["differing_parameters"] == ["transformer.h.1.mlp.c_fc.weight"]
    assert all(mode["max_abs"] <= mode["tolerance"] for mode in report["modes"].values())
    assert "1 differ, among them transformer.h.1.mlp.c_fc.weight" in capsys.readouterr().out


def test_another_computation_on_the_same_weights_fails(reference, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((reference / "model.safetensors").read_bytes())
    config = json.loads((reference / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
    status, report = run(tmp_path, "--reference", reference, "--model", other)
    assert status == 1 and report["differing_parameters"] == [] and not report["equal"]
    screen = capsys.readouterr().out
    assert "<- beyond" in screen and "NOT equal" in screen
    status, _ = run(tmp_path, "--reference", reference, "--model", other, "--tolerance", "100")
    assert status == 0


def test_a_native_export_serves_as_either(reference, tmp_path, monkeypatch):
    answer = verification.Verification("gpt2repro", "float32", 1, 1, True, 1, 1, 0.0, 1, "5")
    monkeypatch.setattr(export, "verify", lambda *_: answer)
    export.export(tiny_model(), tiny_tokenizer(), tmp_path / "final")
    for pair in ((reference, tmp_path / "final"), (tmp_path / "final", reference)):
        assert run(tmp_path, "--reference", pair[0], "--model", pair[1])[0] == 0


def test_refusals_name_the_option(reference, tmp_path):
    wide = save_official(tiny_model(n_embd=128), tmp_path / "wide")
    with pytest.raises(UserError, match=r"different architectures: .* is \(.*\) and \(.*\)"):
        compare_logits.main(["--reference", str(reference), "--model", str(wide)])
    with pytest.raises(UserError, match=r"--model ./nowhere: no such directory"):
        compare_logits.main(["--reference", str(reference), "--model", "./nowhere"])
    for tolerance in ("nan", "-1"):
        with pytest.raises(UserError, match=f"--tolerance {tolerance}"):
            compare_logits.main(["--reference", "./nowhere", "--tolerance", tolerance])
    with pytest.raises(UserError, match="--length 1"):
        compare_logits.main(["--reference", str(reference), "--length", "1"])
    incomplete = tmp_path / "incomplete"
    incomplete.mkdir()
    (incomplete / "config.json").write_text((reference / "config.json").read_text())
    tensors = load_file(reference / "model.safetensors")
    del tensors["ln_f.weight"]
    save_file(tensors, incomplete / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--reference .*lacks 1 tensors.*ln_f\.weight"):
        compare_logits.main(["--reference", str(incomplete)])


def test_offline_without_weights_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    with pytest.raises(UserError, match="openai-community/gpt2") as error:
        compare_logits.main(["--reference", "openai-community/gpt2"])
    assert "--reference" in str(error.value) and len(str(error.value)) < 600


def test_a_reference_on_the_hub(reference, tmp_path, monkeypatch, caplog):
    files = {path.name: path.read_bytes() for path in reference.iterdir()}
    with FakeHub() as hub:
        hub.use_in_process(monkeypatch)
        hub.add("models", "openai-community/gpt2", files)
        assert run(tmp_path, "--reference", "openai-community/gpt2")[0] == 0
        # One that answers badly is waited for; where none answers, what is cached is taken.
        hub.faults.append(fault := Fault("status:503", "api/models", times=2))
        assert run(tmp_path, "--reference", "openai-community/gpt2")[0] == 0
        assert fault.num_hits == 2
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        assert run(tmp_path, "--reference", "openai-community/gpt2")[0] == 0
    assert "openai-community/gpt2: the Hub cannot be reached, so it is as it was" in caplog.text
