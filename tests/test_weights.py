"""Checkpoints in and out: official files as on the Hub, stock ones, ours; and spoilt ones."""

import json
import logging
from contextlib import contextmanager

import pytest
import torch
from ours_and_theirs import SHAPE, ours_and_theirs, random_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model

from configuration_gpt2repro import GPT2ReproConfig
from modeling_gpt2repro import (
    GPT2ReproForCausalLM,
    GPT2ReproForQuestionAnswering,
    GPT2ReproForSequenceClassification,
    GPT2ReproModel,
)

NOTHING = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}


@contextmanager
def warnings_of_transformers():
    """Collects what transformers' own loggers say, which pytest's caplog does not see."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("transformers").removeHandler(handler)


def save_as_on_the_hub(theirs: GPT2LMHeadModel, directory, dtype=torch.float32) -> dict:
    """The layout of openai-community/gpt2: no prefix, no lm_head, mask buffers, old config keys."""
    tensors = {
        name: tensor.to(dtype).contiguous()
        for name, tensor in theirs.transformer.state_dict().items()
    }
    n = theirs.config.n_positions
    for layer in range(theirs.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(n, n).tril().view(1, 1, n, n)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = theirs.config.to_dict() | {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_ctx": n,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    }
    config.pop("dtype")
    (directory / "config.json").write_text(json.dumps(config))
    return tensors


def load_quietly(kind, directory, **options):
    with warnings_of_transformers() as messages:
        model, report = kind.from_pretrained(directory, output_loading_info=True, **options)
    assert messages == []
    assert {key: report[key] for key in NOTHING} == NOTHING
    return model


# --- in


@pytest.mark.parametrize("size", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_a_file_as_it_lies_on_the_hub(tmp_path, size):
    """The four sizes' number of layers and heads; narrower, or xl alone would be 6 GB."""
    full = GPT2ReproConfig.from_size(size)
    shape = {"n_layer": full.n_layer, "n_head": full.n_head, "n_embd": 4 * full.n_head}
    _, theirs = ours_and_theirs(**shape, initializer_range=0.02)
    save_as_on_the_hub(theirs, tmp_path)
    ours = load_quietly(GPT2ReproForCausalLM, tmp_path)
    ids = random_ids(2, 12)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert not ours.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_load_as_they_are_or_as_asked(tmp_path, dtype):
    _, theirs = ours_and_theirs()
    tensors = save_as_on_the_hub(theirs, tmp_path, dtype)
    as_stored = load_quietly(GPT2ReproForCausalLM, tmp_path)
    assert as_stored.dtype == dtype
    assert torch.equal(as_stored.transformer.wpe.weight, tensors["wpe.weight"])
    widened = load_quietly(GPT2ReproForCausalLM, tmp_path, dtype=torch.float32)
    assert torch.equal(widened.transformer.wpe.weight, tensors["wpe.weight"].float())


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saved(tmp_path, tied, options):
    _, theirs = ours_and_theirs(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not options
    ours = load_quietly(GPT2ReproForCausalLM, tmp_path)
    ids = random_ids(2, 12)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_between_the_decoder_and_the_language_model(tmp_path):
    _, theirs = ours_and_theirs()
    ids = random_ids(2, 12)
    theirs.transformer.save_pretrained(tmp_path / "decoder")
    ours = load_quietly(GPT2ReproForCausalLM, tmp_path / "decoder")
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    theirs.save_pretrained(tmp_path / "lm")
    decoder = load_quietly(GPT2ReproModel, tmp_path / "lm")
    hidden = GPT2Model.from_pretrained(tmp_path / "lm")(ids).last_hidden_state
    assert torch.equal(decoder(ids).last_hidden_state, hidden)


def test_a_new_head_starts_fresh_on_pretrained_weights(tmp_path):
    _, theirs = ours_and_theirs()
    save_as_on_the_hub(theirs, tmp_path)
    model = GPT2ReproForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert model.score.weight.shape == (5, SHAPE["n_embd"])
    assert torch.equal(model.transformer.wte.weight, theirs.transformer.wte.weight)
    spans = GPT2ReproForQuestionAnswering.from_pretrained(tmp_path)
    assert spans.qa_outputs.weight.shape == (2, SHAPE["n_embd"])


def test_every_weight_on_disk_and_in_memory_under_a_device_map(tmp_path):
    ours, _ = ours_and_theirs()
    ours.save_pretrained(tmp_path)
    ids = random_ids(2, 12)
    auto = GPT2ReproForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(auto(ids).logits, ours(ids).logits)
    places = dict.fromkeys(("wte", "wpe", "drop", "h.1", "h.2", "ln_f"), "cpu") | {"h.0": "disk"}
    places = {f"transformer.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    offloaded = GPT2ReproForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert offloaded.transformer.h[0].attn.c_attn.weight.device.type == "meta"
    assert torch.equal(offloaded(ids).logits, ours(ids).logits)


# --- what must not load


def spoil(directory, change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_fc.bias", "ln_f.weight"])
def test_a_missing_tensor_is_an_error_that_names_it(tmp_path, name):
    _, theirs = ours_and_theirs()
    save_as_on_the_hub(theirs, tmp_path)
    spoil(tmp_path, lambda tensors: tensors.pop(name))
    for kind in (GPT2ReproForCausalLM, GPT2ReproModel, GPT2ReproForSequenceClassification):
        with pytest.raises(ValueError, match=rf"lacks \d tensors of .*{name}"):
            kind.from_pretrained(tmp_path)
    _, report = GPT2ReproForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert f"transformer.{name}" in report["missing_keys"]


def test_of_many_missing_tensors_three_are_named(tmp_path):
    _, theirs = ours_and_theirs()
    save_as_on_the_hub(theirs, tmp_path)
    names = ["h.0.ln_1.weight", "h.0.ln_2.weight", "ln_f.bias", "ln_f.weight"]
    for lacking, told in ((names[:3], ""), (names, ", ...")):
        spoil(tmp_path, lambda tensors, names=lacking: [tensors.pop(n, None) for n in names])
        first = ", ".join(f"transformer.{name}" for name in names[:3])
        with pytest.raises(ValueError) as error:
            GPT2ReproForCausalLM.from_pretrained(tmp_path)
        assert f"GPT2ReproForCausalLM: {first}{told}" == str(error.value).split(" of ")[1]


def test_an_untied_head_that_is_not_in_the_file_is_missing(tmp_path):
    _, theirs = ours_and_theirs()
    save_as_on_the_hub(theirs, tmp_path)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        GPT2ReproForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)


def test_another_model_s_file_is_an_error(tmp_path):
    GPT2ReproConfig(**SHAPE).save_pretrained(tmp_path)
    save_file({"encoder.weight": torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \d+ tensors of GPT2ReproForCausalLM"):
        GPT2ReproForCausalLM.from_pretrained(tmp_path)


def test_a_tensor_of_another_shape_is_an_error(tmp_path):
    _, theirs = ours_and_theirs()
    save_as_on_the_hub(theirs, tmp_path)
    spoil(tmp_path, lambda tensors: tensors.update({"wpe.weight": torch.ones(7, 32)}))
    with warnings_of_transformers() as messages, pytest.raises(RuntimeError, match="mismatched"):
        GPT2ReproForCausalLM.from_pretrained(tmp_path)
    assert any("wpe.weight" in message for message in messages)


def test_a_truncated_or_missing_file_is_an_error(tmp_path):
    ours, _ = ours_and_theirs()
    ours.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(Exception, match="not fully covered"):
        GPT2ReproForCausalLM.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        GPT2ReproForCausalLM.from_pretrained(tmp_path)


# --- out


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
def test_a_round_trip_is_bitwise_and_stock_gpt2_loads_it(tmp_path, tied, dtype, options):
    ours, theirs = ours_and_theirs(tie_word_embeddings=tied)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    ours.save_pretrained(tmp_path / "ours", **options)
    theirs.save_pretrained(tmp_path / "theirs", **options)

    def stored(directory):
        return {
            k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()
        }

    mine, yours = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert mine.keys() == yours.keys()
    assert all(mine[k].dtype == dtype and torch.equal(mine[k], yours[k]) for k in mine)
    assert ("lm_head.weight" in mine) == (not tied)

    again = load_quietly(GPT2ReproForCausalLM, tmp_path / "ours")
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert all(map(torch.equal, again.state_dict().values(), ours.state_dict().values()))

    config = GPT2Config(**SHAPE, tie_word_embeddings=tied)  # the stock configuration of an export
    stock = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", config=config, dtype=dtype)
    ids = random_ids(2, 12)
    assert torch.equal(stock(ids).logits, ours(ids).logits)


def test_the_auto_class_answers_with_ours_for_ours_and_theirs_for_theirs(tmp_path):
    ours, theirs = ours_and_theirs()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) is GPT2ReproForCausalLM
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")) is GPT2LMHeadModel
