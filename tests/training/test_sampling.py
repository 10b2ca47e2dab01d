"""Sampling during training leaves no trace: random numbers, mode and compiled code stay."""

import torch
from tiny_gpt2 import tiny_model, tiny_tokenizer
from torch import nn

from gpt2repro.training.sampling import sample_text

PROMPT = "This function"


def test_a_continuation_is_decided_by_its_seed():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = [sample_text(model, tokenizer, PROMPT, num_tokens=12, seed=s) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(PROMPT) for text in texts)


def test_random_numbers_mode_and_gradients_stay():
    model = tiny_model(resid_pdrop=0.5).train()
    before = torch.get_rng_state()
    dropped = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    sample_text(model, tiny_tokenizer(), PROMPT, num_tokens=4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and all(module.training for module in model.modules())
    assert 0.5 in dropped and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    sample_text(model, tiny_tokenizer(), PROMPT, num_tokens=4, seed=1)
    assert not model.training


def test_compiled_code_is_neither_run_nor_added_to():
    model = tiny_model().train()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    model.compile(backend=backend)
    ids = torch.zeros(2, 8, dtype=torch.long)
    model(input_ids=ids, shift_labels=ids).loss.backward()
    graphs = len(compiled)
    assert graphs > 0
    sample_text(model, tiny_tokenizer(), PROMPT, num_tokens=6, seed=1)
    model(input_ids=ids, shift_labels=ids)
    assert len(compiled) == graphs


def test_the_context_bounds_a_continuation():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    short = "a" * (model.config.n_positions - 2)
    text = sample_text(model, tokenizer, short, num_tokens=50, seed=1)
    assert len(tokenizer(text)["input_ids"]) <= model.config.n_positions
    long = "xyz " * model.config.n_positions
    assert sample_text(model, tokenizer, long, num_tokens=50, seed=1) == long
