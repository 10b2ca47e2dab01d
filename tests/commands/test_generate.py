"""The verb `generate`: the same tokens as `model.generate`, streamed, and refusals in one line."""

import io

import pytest
import torch
from tiny_gpt2 import save_official, tiny_model, tiny_tokenizer

from gpt2repro import UserError
from gpt2repro.commands import generate
from gpt2repro.system.text import printable

PROMPT = "This function returns"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    output = save_official(tiny_model(), tmp_path_factory.mktemp("generate") / "model")
    tiny_tokenizer().save_pretrained(output)
    return output


@pytest.fixture
def run(directory, capsys):
    def call(*arguments: str) -> str:
        assert generate.main(["--model", str(directory), "--device", "cpu", *arguments]) == 0
        return capsys.readouterr().out

    return call


def test_greedy_text_is_the_models_own(run):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        best = tiny_model().generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    wanted = printable(tokenizer.decode(best[0], skip_special_tokens=True))
    options = ["--prompt", PROMPT, "--temperature", "0"]
    assert run(*options, "--max-new-tokens", "12").rstrip("\n") == wanted
    assert run(*options, "--max_new_tokens=12", "--num_beams", "1").rstrip("\n") == wanted


def test_sampling_is_reproducible_by_its_seed(run):
    options = ["--prompt", PROMPT, "--max_new_tokens", "16", "--temperature", "2", "--top_k", "0"]
    first = run(*options, "--seed", "1")
    assert first.startswith(PROMPT)
    assert run(*options, "--seed", "1") == first
    assert run(*options, "--seed", "2") != first
    likeliest = run("--prompt", PROMPT, "--max_new_tokens", "16", "--temperature", "0")
    assert run(*options, "--top_k", "1") == run(*options, "--top_p", "1e-6") == likeliest


def test_streaming_prints_before_the_end(directory, monkeypatch):
    """Text reaches the screen piece by piece, not at once when all is generated."""
    written = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: written.append(words[0]))
    options = ["--prompt", PROMPT, "--max_new_tokens", "20", "--temperature", "0"]
    assert generate.main(["--model", str(directory), *options]) == 0
    assert sum(bool(piece) for piece in written) > 1


def test_several_texts_and_beams(run):
    options = ["--prompt", PROMPT, "--max_new_tokens", "4", "--seed", "0"]
    assert run(*options, "--num_return_sequences", "3").count(PROMPT) == 3
    assert run(*options, "--num-beams", "2", "--temperature", "0").count(PROMPT) == 1


def test_the_context_is_never_exceeded(run, directory):
    """32 positions: 200 tokens are asked for, and what fits is generated."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        best = tiny_model().generate(ids, max_length=32, do_sample=False, pad_token_id=0)
    text = run("--prompt", PROMPT, "--temperature", "0")
    wanted = printable(tokenizer.decode(best[0], skip_special_tokens=True))
    assert text.rstrip("\n") == wanted.rstrip("\n")
    assert "\\x1a" in wanted  # which a terminal must not see
    with pytest.raises(UserError, match=r"--prompt: \d+ tokens leave no room .* of 32"):
        run("--prompt", "x " * 40)


def test_without_a_prompt_a_text_begins(run):
    assert run("--max_new_tokens", "4", "--seed", "0").strip()


def test_a_prompt_from_standard_input(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert run("--prompt", "-", "--max_new_tokens", "2").startswith(PROMPT)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "-1"], "--temperature -1.0 is out of range"),
        (["--top_p", "0"], "--top_p 0.0 is out of range"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0 is out of range"),
        (["--num_return_sequences", "2", "--temperature", "0"], "--num_return_sequences"),
        (["--device", "abacus"], "--device abacus"),
        (["--colour", "red"], "--colour"),
        (["--model", "./nowhere"], "--model ./nowhere: no such directory"),
    ],
)
def test_refusals_name_the_option(run, arguments, said):
    with pytest.raises(UserError, match=said):
        run("--prompt", PROMPT, *arguments)
