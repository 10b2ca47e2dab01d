"""The verb `average`: numbers by hand, loads as any export, refusals in one line."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import save_now
from tiny_export import without_fresh_processes
from tiny_gpt2 import TEXTS, tiny_model, tiny_tokenizer
from torch.optim import AdamW
from transformers import AutoTokenizer, GPT2LMHeadModel

from gpt2repro import UserError
from gpt2repro.commands import average
from gpt2repro.data.tokens.bpe import train_bpe


@pytest.fixture(autouse=True)
def quick_exports(monkeypatch):
    """Fresh processes have tests of their own."""
    without_fresh_processes(monkeypatch)


def save(run: Path, step: int, **overrides) -> str:
    """A checkpoint whose weights go by its step, of a run that knows its tokenizer."""
    model = tiny_model(**overrides)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=torch.Generator().manual_seed(step))
    path = save_now(run / "checkpoints", step, model, AdamW(model.parameters()), keep_last=9)
    if not (run / "recipe.yaml").exists():
        tiny_tokenizer().save_pretrained(run / "tokenizer")
        (run / "recipe.yaml").write_text(f"tokenizer_name: {run / 'tokenizer'}\n")
    return str(path)


@pytest.mark.parametrize(
    ("options", "shares", "said"),
    [
        ((), (1 / 3, 1 / 3, 1 / 3), "They are the mean of those of 3 models"),
        (("--decay", "0.8"), (0.64, 0.16, 0.2), "They are the moving average, of decay 0.8, of"),
    ],
)
def test_weights_are_averaged_and_the_card_says_how(tmp_path, capsys, options, shares, said):
    models, output = [save(tmp_path / "run", step) for step in (1, 2, 3)], tmp_path / "mean"
    arguments = [*models, "--output", str(output), "--format", "gpt2", *options]
    assert average.main(arguments) == 0
    assert f"{output}: verified" in capsys.readouterr().out
    saved = [load_file(Path(model) / "model.safetensors") for model in models]
    loaded = GPT2LMHeadModel.from_pretrained(output)
    for name, parameter in loaded.named_parameters():
        terms = (share * each[name].double() for share, each in zip(shares, saved, strict=True))
        assert parameter.dtype == torch.float32
        # Added up in float64 and rounded once, to 6e-8 of a number.
        torch.testing.assert_close(parameter.double(), sum(terms), rtol=6e-8, atol=1e-12)
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tiny_tokenizer().get_vocab()
    card = (output / "README.md").read_text()
    assert "license: mit\n" in card  # the run's
    assert said in card and "gpt2repro average " + " ".join(arguments[:3]) in card


def test_what_is_of_another_kind_is_refused(tmp_path):
    first, output = save(tmp_path / "run", 1), tmp_path / "out"
    for run, overrides, field in (
        ("deep", {"n_layer": 3}, "n_layer"),
        ("heads", {"n_head": 2}, "n_head"),
        ("steep", {"activation_function": "relu"}, "activation_function"),
        ("untied", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("exact", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ("unscaled", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("by layer", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ):
        other = save(tmp_path / run, 2, **overrides)
        with pytest.raises(UserError, match=f"MODEL {other} has another {field} than {first}$"):
            average.main([first, other, "--output", str(output)])
    other = save(tmp_path / "words", 1)
    train_bpe([text[::-1] for text in TEXTS], 300).save_pretrained(tmp_path / "words" / "tokenizer")
    with pytest.raises(UserError, match=f"MODEL {other} has another tokenizer than {first}$"):
        average.main([first, other, "--output", str(output)])
    (tmp_path / "words" / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=f"MODEL {other} holds no tokenizer; name one with --tok"):
        average.main([first, other, "--output", str(output)])
    assert not output.exists()


def test_an_average_has_a_licence_if_all_have_the_same(tmp_path):
    models = [save(tmp_path / "run", step) for step in (1, 2)]
    with_card = tmp_path / "theirs"
    average.main([*models, "--output", str(with_card)])
    for licence, said in (("mit", ["mit"]), ("cc0-1.0", []), ("[mit, apache-2.0]", [])):
        (with_card / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        average.main([*models, str(with_card), "--output", str(tmp_path / "out")])
        text = (tmp_path / "out" / "README.md").read_text()
        assert re.findall(r"^license: (\S+)$", text, re.M) == said


def test_a_width_may_be_spelled_out(tmp_path):
    models = [save(tmp_path / "run", 1), save(tmp_path / "run", 2, n_inner=4 * 64)]
    assert average.main([*models, "--output", str(tmp_path / "out")]) == 0


def test_a_model_is_not_replaced_by_its_average(tmp_path):
    models = [save(tmp_path / "run", step) for step in (1, 2)]
    with pytest.raises(UserError, match=r"--output .*step_00000001 is one of the models"):
        average.main([*models, "--output", models[0]])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["./a"], "MODEL: an average needs two at least"),
        (["./a", "./b"], "MODEL ./a: no such directory"),
        (["./a", "./b", "--decay", "1"], "--decay 1.0 is out of range"),
        (["./a", "./b", "--decay", "nan"], "--decay nan is out of range"),
        ([], "MODEL"),
    ],
)
def test_the_verb_names_what_to_mend(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        average.main([*arguments, "--output", "out"])
