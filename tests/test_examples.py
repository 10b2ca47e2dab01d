"""Each example runs as a user would run it, on a tiny checkpoint in OpenAI's form."""

import json
import math
import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from ours_and_theirs import SHAPE, ours_and_theirs, random_ids
from tiny_language_models import random_gpt2, tiny_tokenizer
from tiny_metrics import run_metrics

from modeling_gpt2repro import GPT2ReproForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    def run_example(name: str, *options) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    random_gpt2(positions=64, initializer_range=0.02).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("The cat sat on the mat. The dog sat on the log. " * 60)
    return path


def test_fine_tuning_lowers_the_held_out_loss_and_saves_a_gpt2(run, checkpoint, text, tmp_path):
    options = ["--model", checkpoint, "--text", text, "--output", tmp_path / "tuned"]
    out = run("fine_tune.py", *options, "--sequence-length", 32, "--lr", 1e-2, "--epochs", 2)

    before, after = (float(x) for x in re.findall(r"held-out loss \w+: +(\d+\.\d+)", out))
    assert after < before - 0.5
    _, report = GPT2ReproForCausalLM.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not report["missing_keys"]
    assert (tmp_path / "tuned" / "tokenizer.json").exists()


def test_fine_tuning_refuses_too_little_text(run, checkpoint, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Hello.")
    with pytest.raises(SystemExit, match="--text"):
        run("fine_tune.py", "--model", checkpoint, "--text", short, "--output", tmp_path / "x")


@pytest.mark.parametrize("temperature", [0, 1])
def test_generation_streams_the_prompt_and_its_continuation(run, checkpoint, temperature):
    options = ["--model", checkpoint, "--prompt", "The cat", "--temperature", temperature]
    out = run("generate_stream.py", *options, "--max-new-tokens", 12)
    assert out.startswith("The cat")
    assert len(out) > len("The cat\n")


def test_generation_stops_at_the_end_of_the_context(run, checkpoint):
    run("generate_stream.py", "--model", checkpoint, "--max-new-tokens", 10_000)
    with pytest.raises(SystemExit, match="--prompt"):
        run("generate_stream.py", "--model", checkpoint, "--prompt", "x " * 200)


def test_two_checkpoints_are_compared_on_the_same_text(run, checkpoint, text, tmp_path):
    random_gpt2(1, positions=64, initializer_range=0.2).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    out = run("compare_checkpoints.py", checkpoint, tmp_path, "--text", text, "--rows", 3)

    first, second = map(float, re.findall(r"(\d+\.\d{4}) nats per token, \d", out))
    # Small random weights are nearly uniform over the vocabulary, large ones confidently wrong.
    assert first == pytest.approx(math.log(320), abs=0.05)
    assert second > first + 0.1
    rows = re.findall(r"^ *'.+'  +(\d+\.\d{3})  +(\d+\.\d{3})$", out, re.MULTILINE)
    assert len(rows) == 3


# --- GPT-2 in a hundred lines ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> dict:
    return runpy.run_path(str(EXAMPLES / "gpt2_plain.py"))


def test_the_plain_model_computes_what_the_model_file_computes(plain):
    ours, _ = ours_and_theirs()
    shape = {
        key: SHAPE[key] for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    }
    theirs = plain["GPT2"](**shape)
    theirs.load_state_dict(ours.transformer.state_dict())  # the same names and layouts, all of them
    rows = random_ids(3, 21)
    logits, loss = theirs(rows[:, :-1], rows[:, 1:])
    expected = ours(rows[:, :-1], shift_labels=rows[:, 1:])
    # Written out, attention and loss round at other places: a few units in the last of float32.
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(theirs(rows[:, :-1]), logits)


def test_the_plain_model_starts_as_the_model_file_does(plain):
    torch.manual_seed(0)
    model = plain["GPT2"](vocab_size=500, n_positions=64, n_embd=128, n_layer=8, n_head=2)
    plain["initialize"](model)
    # Standard deviations of 16,384 numbers and more are known to half a percent, times five.
    for weight, std in ((model.h[0].mlp.c_fc.weight, 0.02), (model.wte.weight, 0.02)):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    for weight in (model.h[3].mlp.c_proj.weight, model.h[7].attn.c_proj.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)


def test_the_plain_model_names_its_size_and_what_guessing_costs(run):
    shown = run("gpt2_plain.py")
    assert "124,439,808 parameters" in shown and f"ln V = {math.log(50257):.2f}" in shown
    assert float(re.search(r"loss ([\d.]+)", shown)[1]) == pytest.approx(math.log(50257), abs=0.6)


def test_every_class_of_the_model_file_names_a_twin_that_exists(plain):
    source = (EXAMPLES.parent / "modeling_gpt2repro.py").read_text(encoding="utf-8")
    twins = re.findall(r"Twin: (?:the end of )?`(\w+)", source)
    assert sorted(twins) == ["Attention", "Block", "GPT2", "GPT2", "MLP"]
    assert all(twin in plain for twin in twins)


@pytest.mark.sweep
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    """Beside a run that is called as the demo is, in a kernel of its own."""
    run = tmp_path / "runs" / "demo"
    random_gpt2(positions=64).save_pretrained(run / "final")
    tiny_tokenizer().save_pretrained(run / "final")
    lines = "".join(json.dumps(line) + "\n" for line in run_metrics())
    (run / "metrics.jsonl").write_text(lines)
    notebook = nbformat.read(EXAMPLES / "inspect.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "none are committed"
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    printed = "".join(output.get("text", "") for output in outputs)
    assert "nats per token" in printed and "layer 1: " in printed
