import json
import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GPT2Config

from configuration_gpt2repro import LARGEST, SIZES, GPT2ReproConfig
from modeling_gpt2repro import GPT2ReproForCausalLM


@pytest.mark.parametrize(
    ("size", "num_parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_the_four_models_have_the_published_number_of_parameters(size, num_parameters):
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(GPT2ReproConfig.from_size(size))
    assert model.num_parameters() == num_parameters


def test_the_default_is_the_smallest():
    assert GPT2ReproConfig().to_dict() == GPT2ReproConfig.from_size("gpt2").to_dict()


def test_from_size_takes_overrides_and_names_the_sizes():
    config = GPT2ReproConfig.from_size("gpt2-xl", n_layer=2, vocab_size=4096)
    assert (config.n_layer, config.n_embd, config.vocab_size) == (2, 1600, 4096)
    with pytest.raises(ValueError, match=r"gpt2, gpt2-medium, gpt2-large, gpt2-xl, not 'small'"):
        GPT2ReproConfig.from_size("small")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_head", 7),
        ("n_head", 0),
        ("n_embd", 0),
        ("n_layer", 0),
        ("vocab_size", -1),
        ("n_positions", 0),
        ("n_inner", 0),
        ("layer_norm_epsilon", 0.0),
        ("attn_pdrop", 1.5),
        ("resid_pdrop", -0.1),
        ("activation_function", "gleu"),
        ("n_layer", 10**9),
        ("n_head", 10**9),
        ("n_embd", 768 * 10**9),
        ("n_inner", 10**9),
        ("vocab_size", 10**9),
        ("n_positions", 10**9),
        ("n_layer", "12"),
        ("n_embd", 768.0),
        ("n_head", True),
        ("use_cache", "yes"),
        ("activation_function", None),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(StrictDataclassError, match=field):
        GPT2ReproConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_inner", 1),
        ("attn_pdrop", 0.0),
        ("resid_pdrop", 1.0),
        ("n_inner", None),
        *LARGEST.items(),
    ],
)
def test_the_bounds_themselves_are_allowed(field, value):
    divides = {"n_head": {"n_embd": 1000}, "n_embd": {"n_head": 10}}.get(field, {})
    assert getattr(GPT2ReproConfig(**{field: value} | divides), field) == value


def test_a_value_spoilt_later_is_refused_when_saved(tmp_path):
    config = GPT2ReproConfig()
    config.n_head = 7
    with pytest.raises(StrictDataclassError, match="n_head"):
        config.save_pretrained(tmp_path)


OFFICIAL = {  # openai-community/gpt2, as it lies on the Hub
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def test_an_official_file_is_read_quietly(tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL))
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        config = GPT2ReproConfig.from_pretrained(tmp_path)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert config.model_type == "gpt2repro"
    theirs = GPT2Config.from_pretrained(tmp_path)
    fields = set(OFFICIAL) - {"model_type", "architectures"}
    assert {f: getattr(config, f) for f in fields} == {f: getattr(theirs, f) for f in fields}


def test_every_field_has_the_default_and_the_meaning_of_theirs_but_for_dropout():
    ours, theirs = GPT2ReproConfig().to_dict(), GPT2Config().to_dict()
    shared = ours.keys() & theirs.keys()
    assert {name for name in shared if ours[name] != theirs[name]} == {
        "model_type",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
    }
    assert ours.keys() - theirs.keys() == {"auto_map"}


def test_cross_attention_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**OFFICIAL, "add_cross_attention": True}))
    with pytest.raises(ValueError, match="add_cross_attention"):
        GPT2ReproConfig.from_pretrained(tmp_path)


def test_a_round_trip_through_the_auto_class_changes_nothing(tmp_path):
    config = GPT2ReproConfig.from_size("gpt2-medium", attn_pdrop=0.25, n_inner=3)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is GPT2ReproConfig
    assert again.to_diff_dict() == config.to_diff_dict()
    assert (tmp_path / "configuration_gpt2repro.py").exists()


def test_a_map_into_another_repository_is_not_inherited():
    config = GPT2ReproConfig(auto_map={"AutoModel": "someone/theirs--modeling_theirs.Model"})
    assert config.auto_map["AutoModel"] == "modeling_gpt2repro.GPT2ReproModel"
    assert config.auto_map.keys() >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_the_standard_names_are_aliases():
    config = GPT2ReproConfig(hidden_size=128, num_attention_heads=4, num_hidden_layers=3)
    assert (config.n_embd, config.n_head, config.n_layer) == (128, 4, 3)
    assert config.max_position_embeddings == 1024


def test_sizes_have_heads_of_width_64():
    assert {size["n_embd"] / size["n_head"] for size in SIZES.values()} == {64}
