"""The verb `generate`: the same tokens as `model.generate`, streamed, and refusals in one line."""

import copy
import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gpt2 import save_official, tiny_model, tiny_tokenizer

from gpt2repro import UserError
from gpt2repro.commands import generate
from gpt2repro.system.text import printable
from modeling_gpt2repro import GPT2ReproForCausalLM

PROMPT = "This function returns"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    output = save_official(tiny_model(), tmp_path_factory.mktemp("generate") / "model")
    tiny_tokenizer().save_pretrained(output)
    return output


@pytest.fixture
def run(directory, capsys):
    def call(*arguments: str, streams: bool = False):
        assert generate.main(["--model", str(directory), "--device", "cpu", *arguments]) == 0
        printed = capsys.readouterr()
        return printed if streams else printed.out

    return call


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"stop_strings": ["zz"], "return_dict_in_generate": True}, None),
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search"),
    ],
)
def test_a_models_own_settings_hold_or_are_a_line(directory, tmp_path, capsys, settings, refused):
    model = shutil.copytree(directory, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps(settings))
    arguments = ["--model", str(model), "--prompt", PROMPT, "--max_new_tokens", "4"]
    arguments += ["--temperature", "0"]
    if refused:
        with pytest.raises(UserError, match=f"own settings for generate.*{refused}"):
            generate.main(arguments)
        return
    assert generate.main([*arguments, "--num_beams", "2"]) == 0
    assert capsys.readouterr().out.startswith(PROMPT)


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
    text, told = run("--prompt", PROMPT, "--temperature", "0", streams=True)
    assert told == "The model's context of 32 tokens is full, before 200 new ones.\n"
    wanted = printable(tokenizer.decode(best[0], skip_special_tokens=True))
    assert text.rstrip("\n") == wanted.rstrip("\n")
    assert "\\x1a" in wanted  # which a terminal must not see
    with pytest.raises(UserError, match=r"--prompt: \d+ tokens leave no room .* of 32"):
        run("--prompt", "x " * 40)


def test_numbers_without_a_meaning_for_their_size_are_taken(run):
    huge = ["--max_new_tokens", str(10**30), "--top_k", str(10**30), "--seed", str(2**62)]
    assert run("--prompt", PROMPT, *huge) == run("--prompt", PROMPT, "--top_k", "0", *huge[-2:])


def test_a_prompt_that_is_no_utf8(run, monkeypatch):
    """Three U+FFFD for a byte, as in the stream."""
    options = ["--max_new_tokens", "2", "--temperature", "0"]
    wanted = run("--prompt", "a\ufffd\ufffd\ufffdb", *options)
    assert run("--prompt", "a\udcffb", *options) == wanted
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    with pytest.raises(UserError, match="--prompt -: standard input is no text"):
        run("--prompt", "-")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_told(directory, tmp_path, value):
    """Sampling would raise, and the likeliest of NaNs be any token."""
    shutil.copytree(directory, tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights["h.0.mlp.c_fc.weight"][0, 0] = value
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    for options in ([], ["--temperature", "0"], ["--num_beams", "2"]):
        with pytest.raises(UserError, match=r"--model .*its logits are not finite"):
            generate.main(["--model", str(tmp_path / "model"), "--device", "cpu", *options])


@pytest.mark.parametrize(
    "sizes", [{"n_layer": 10**9}, {"n_embd": 10**9, "n_head": 1}, {"vocab_size": 10**12}]
)
def test_sizes_that_no_model_has_are_refused_before_it_is_built(directory, tmp_path, sizes):
    shutil.copytree(directory, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text()) | sizes
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"--model .*{next(iter(sizes))} must be at most"):
        generate.main(["--model", str(tmp_path / "model"), "--device", "cpu"])


def test_a_penalty_another_tokenizer_and_another_dtype_are_used(run, tmp_path, monkeypatch):
    greedy = ("--prompt", PROMPT, "--temperature", "0", "--max_new_tokens", "12")
    plain = run(*greedy)
    tokenizer = tiny_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 5.0}
    with torch.inference_mode():
        penalized = tokenizer.decode(tiny_model().generate(ids, **how)[0])
    assert run(*greedy, "--repetition_penalty", "5").rstrip("\n") == printable(penalized).rstrip()
    assert plain.rstrip("\n") != printable(penalized).rstrip()
    dtypes, generate = [], GPT2ReproForCausalLM.generate
    monkeypatch.setattr(
        GPT2ReproForCausalLM,
        "generate",
        lambda model, **how: (dtypes.append(model.dtype), generate(model, **how))[1],
    )
    run(*greedy, "--dtype", "bfloat16")
    assert dtypes == [torch.bfloat16]
    other = copy.deepcopy(tokenizer)  # all tests share it
    other.add_tokens(["This function"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="token 300, and the model has 300"):
        run(*greedy, "--tokenizer", str(tmp_path / "other"))


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
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "meta"], "--device meta"),  # where nothing is computed
        (["--device", "xla"], "--device xla"),
        (["--temperature", "nan"], "--temperature nan is out of range"),
        (["--temperature", "1e-30"], "--temperature 1e-30 is out of range"),
        (["--repetition_penalty", "inf"], "--repetition_penalty inf is out of range"),
        (
            ["--num_beams", str(10**30)],
            "--num_beams 1000000000000000000000000000000 is out of range",
        ),
        (["--num_return_sequences", str(10**30)], "--num_return_sequences 1000000"),
        (["--num_beams", "2", "--num_return_sequences", "3"], "no more texts than --num_beams"),
        (["--seed", str(2**64)], "--seed 18446744073709551616 is out of range"),
        (["--seed", "-5"], "--seed -5 is out of range"),
        (["--seed", "²"], "argument --seed: invalid int value"),
        (["--max_new_tokens", "9" * 5000], r"argument --max_new_tokens.{,300} \.\.\. \(see"),
        (["--model", "a" * 300], "argument --model: 'a{40}' ...: too long for a file's name"),
        (["--tokenizer", "a\0b"], r"argument --tokenizer: 'a\\x00b' ...: .*null"),
        (["--colour", "red"], "--colour"),
        (["--model", "./nowhere"], "--model ./nowhere: no such directory"),
    ],
)
def test_refusals_name_the_option(run, arguments, said):
    with pytest.raises(UserError, match=said):
        run("--prompt", PROMPT, *arguments)
