"""What a run does for the device it finds itself on."""

import json
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny_gpt2 import tiny_model, tiny_tokenizer
from tiny_run import reset_accelerate, write_inputs
from torch import nn

from gpt2repro import UserError
from gpt2repro.data.rows.producer import StepRows
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.bpe import train_bpe
from gpt2repro.recipe import load_recipe
from gpt2repro.records.run_directory import Start
from gpt2repro.training import learner
from gpt2repro.training.learner import build_model, open_learner, place
from gpt2repro.training.step import train_step


def test_what_a_recipe_asks_of_the_model_it_has(tmp_path):
    path = str(write_inputs(tmp_path))
    for asked in (False, True):
        recipe = load_recipe(["--recipe", path, "--gradient_checkpointing", str(asked)])
        model = build_model(recipe, load_tokenizer(recipe.tokenizer_name))
        assert model.is_gradient_checkpointing == asked
    streams = []
    for asked in (False, True):
        options = ("--mixed_precision", "bf16", "--bf16_residual", str(asked))
        recipe = load_recipe(["--recipe", path, *options])
        model, _ = place(recipe, Accelerator(cpu=True, mixed_precision="bf16"), tiny_model())
        model.transformer.h[1].register_forward_hook(
            lambda module, inputs, output: streams.append(inputs[0].dtype)
        )
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros(1, 4, dtype=torch.long))
        reset_accelerate()
    assert streams == [torch.float32, torch.bfloat16]


def test_ranks_drop_different_units_from_any_step_on(tmp_path, monkeypatch):
    recipe = load_recipe(["--recipe", str(write_inputs(tmp_path)), "--dropout", "0.5"])
    tokenizer = load_tokenizer(recipe.tokenizer_name)
    drawn, weights = [], []
    for rank, step in ((0, 0), (1, 0), (2, 0), (1, 9)):
        monkeypatch.setattr(learner.ranks, "rank", lambda rank=rank: rank)
        state = {"step": step} if step else {}
        reset_accelerate()
        accelerator = Accelerator(cpu=True)
        opened = open_learner(recipe, accelerator, tokenizer, Start(None, state, ""))
        drawn.append(torch.rand(()).item())
        weights.append(opened.model.state_dict()["transformer.wte.weight"])
    assert len(set(drawn)) == 4
    assert all((each == weights[0]).all() for each in weights)


def test_a_resumed_run_keeps_the_size_that_auto_found_where_it_found_it(tmp_path, monkeypatch):
    """And no other: after an explicit size, or on other hardware, `auto` looks again."""
    recipe = load_recipe(["--recipe", str(write_inputs(tmp_path)), "--micro_batch_size", "auto"])
    tokenizer = load_tokenizer(recipe.tokenizer_name)

    def opened(fitted_to: str | None, **changes: Any) -> learner.Learner:
        state = {"step": 4, "recipe": {"micro_batch_size": 2}, "world_size": 1}
        state |= {"fitted_to": fitted_to}
        reset_accelerate()
        accelerator = Accelerator(cpu=True)
        changed = recipe.model_copy(update=changes)
        return open_learner(changed, accelerator, tokenizer, Start(None, state, ""))

    found = opened(None)  # the saved size was given
    assert found.micro_batch_size == 8 and found.fitted_to is not None
    assert opened(found.fitted_to).micro_batch_size == 2
    assert opened(found.fitted_to, dropout=0.1).micro_batch_size == 8
    assert opened(found.fitted_to, bf16_residual=True).micro_batch_size == 8
    monkeypatch.setattr(learner.machine, "hardware", lambda device: "1 x a smaller card")
    assert opened(found.fitted_to).micro_batch_size == 8


def test_a_parameter_that_the_engine_takes_away_is_no_run(tmp_path, monkeypatch):
    """As accelerate 1.14 does under FSDP2, of which nothing would tell but the losses."""
    recipe = load_recipe(["--recipe", str(write_inputs(tmp_path))])

    def untie(model, optimizer):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model, optimizer

    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "prepare", untie)
    with pytest.raises(UserError, match=r"accelerate [\d.]+ took lm_head.weight away"):
        place(recipe, accelerator, tiny_model())


def test_a_head_of_its_own_stays_one_where_the_configuration_says_it_is_tied(tmp_path):
    """As merged adapters were saved: both tensors, and the base model's configuration."""
    theirs = tiny_model(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config))
    names = ["--init_from", str(tmp_path / "merged"), "--sequence_length", "32"]
    recipe = load_recipe([*names, "--batch_tokens", "512", "--num_lanes", "16"])
    ours = build_model(recipe, tiny_tokenizer()).eval()
    ids = torch.arange(10)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.config.tie_word_embeddings is False  # as an export must have it


def test_weights_are_not_trained_on_by_other_ids_than_their_own(tmp_path):
    """Which fit, and mean something else: nothing would tell but the losses."""
    tiny_model().save_pretrained(tmp_path / "theirs")
    names = ["--init_from", str(tmp_path / "theirs"), "--sequence_length", "32"]
    recipe = load_recipe([*names, "--batch_tokens", "512", "--num_lanes", "16"])
    other = train_bpe(["Words of another kind, such as zebras." * 9], 290)
    build_model(recipe, other)  # they came with none
    tiny_tokenizer().save_pretrained(tmp_path / "theirs")
    build_model(recipe, tiny_tokenizer())
    with pytest.raises(UserError, match=r"tokenizer_name .* init_from was trained with .*set it"):
        build_model(recipe, other)


def test_training_is_compiled_for_its_shape_whatever_was_scored_before(tmp_path, monkeypatch):
    """A run that resumes where benchmarks are due has met their lengths first."""
    graphs = []

    def backend(graph, inputs):
        numbers = [each for each in inputs if not isinstance(each, torch.Tensor)]
        graphs.append((torch.is_grad_enabled(), numbers))
        return graph.forward

    monkeypatch.setattr(
        learner, "compile_in_place", lambda module, **how: module.compile(backend=backend)
    )
    names = ["--recipe", str(write_inputs(tmp_path)), "--compile", "true"]
    recipe = load_recipe([*names, "--micro_batch_size", "4"])
    tokenizer = load_tokenizer(recipe.tokenizer_name)
    torch._dynamo.reset()
    opened = open_learner(recipe, Accelerator(cpu=True), tokenizer, Start(None, {}, ""))
    opened.model.eval()
    with torch.no_grad():
        for length in (16, 12, 8):
            opened.model(input_ids=torch.zeros(2, length, dtype=torch.long))
    assert graphs[-1][1], "lengths have become a variable"
    opened.model.train()
    tokens = torch.zeros(recipe.rows_per_step, recipe.sequence_length + 1, dtype=torch.long)
    train_step(opened, StepRows(tokens, 0, {}), 0.1, lambda: False)
    assert graphs[-1] == (True, [])
