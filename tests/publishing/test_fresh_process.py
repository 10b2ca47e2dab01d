"""What the process that verifies an export refuses, one thing after the other."""

import pytest
import torch
from tiny_export import export_unverified
from tiny_gpt2 import tiny_model, tiny_tokenizer

from gpt2repro.publishing import fresh_process, verification
from gpt2repro.publishing.fresh_process import CheckFailed


def asked(**changes) -> dict:
    """What is asked of an export of the tiny model, but for these."""
    tokenizer = tiny_tokenizer()
    request = {"class": "GPT2ReproForCausalLM", "dtype": "float32", "tied": True}
    request |= {"tokenizer": verification._tokenizer_answers(tokenizer)}
    request |= {"tolerance": 1e-4, "prompt_length": 8, "max_new_tokens": 16}
    request |= {"num_threads": torch.get_num_threads(), "directory": "", "trust_remote_code": True}
    return request | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class": "GPT2LMHeadModel"}, "gives a GPT2ReproForCausalLM"),
        ({"dtype": "bfloat16"}, "it loads as float32, not bfloat16"),
        ({"tied": False}, "the token embedding are tied"),
        ({"eos": 5}, "config.json's eos_token_id is"),
        ({"bos": 5}, "config.json's bos_token_id is"),
        ({"generation_pad": 5}, "generation_config.json's pad_token_id is"),
    ],
)
def test_another_kind_of_model(changes, said):
    model = tiny_model()
    model.generation_config.pad_token_id = tiny_tokenizer().eos_token_id
    fresh_process._check_kind(model, asked())
    if changes.keys() <= asked()["tokenizer"].keys():
        changes = {"tokenizer": asked()["tokenizer"] | changes}
    with pytest.raises(CheckFailed, match=said):
        fresh_process._check_kind(model, asked(**changes))


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    directory = export_unverified(tmp_path_factory.mktemp("exported") / "final")
    return verification._live_answers(directory, "float32", tiny_model(), 8, 16)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("logits", lambda t: t[:, :-1], "logits of shape"),
        ("logits", lambda t: t + 1e-3, "logits differ from the live model's by 0.001"),
        ("generated", lambda t: t + 1, "greedy generate"),
    ],
)
def test_other_answers(expected, name, change, said):
    model = tiny_model()
    with torch.inference_mode():
        fresh_process._check_answers(model, asked(), expected)
        with pytest.raises(CheckFailed, match=said):
            other = expected | {name: change(expected[name])}
            fresh_process._check_answers(model, asked(), other)


def test_logits_that_are_no_numbers(expected):
    model = tiny_model()
    model.transformer.ln_f.bias.data[0] = torch.nan
    with torch.inference_mode(), pytest.raises(CheckFailed, match="not finite"):
        fresh_process._check_answers(model, asked(), expected)


@pytest.mark.parametrize(
    "kind", ["missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"]
)
def test_what_loading_reports(kind):
    class AutoModel:
        @staticmethod
        def from_pretrained(*_, **how):
            assert how["trust_remote_code"] and how["output_loading_info"]
            return "the model", {kind: ["lm_head.weight"]}

    said = f"AutoModel reports {kind.replace('_', ' ')}: lm_head.weight"
    with pytest.raises(CheckFailed, match=said):
        fresh_process._load(AutoModel, asked())
    assert fresh_process._load(AutoModel, asked(), ("lm_head.weight",)) == "the model"


def test_every_check_is_made_and_the_base_model_has_the_same_states(expected, monkeypatch):
    model, made = tiny_model(), []
    base = tiny_model().transformer

    def load(auto_class, request, allowed=()):
        return base if auto_class.__name__ == "AutoModel" else model

    monkeypatch.setattr(fresh_process, "_load", load)
    monkeypatch.setattr(fresh_process, "check_tokenizer", lambda *_: made.append("tokenizer"))
    for name in ("_check_kind", "_check_answers"):
        check = getattr(fresh_process, name)
        monkeypatch.setattr(
            fresh_process, name, lambda *a, n=name, check=check: made.append(n) or check(*a)
        )
    model.generation_config.pad_token_id = tiny_tokenizer().eos_token_id
    assert fresh_process._examine(asked(), expected) == {"max_abs_difference": 0.0}
    assert made == ["tokenizer", "_check_kind", "_check_answers"]
    base.ln_f.bias.data[0] += 1e-3
    model.generation_config.pad_token_id = tiny_tokenizer().eos_token_id
    with pytest.raises(CheckFailed, match="AutoModel gives other hidden states"):
        fresh_process._examine(asked(), expected)


def test_live_answers_have_exact_products_whatever_a_run_on_a_gpu_has_set(tmp_path):
    """Its "high" is TF32 on some CPUs, too, and the fresh process has not set it."""
    directory, model, seen = export_unverified(tmp_path / "final"), tiny_model(), []
    model.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        verification._live_answers(directory, "float32", model, 8, 4)
        assert {*seen} == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
