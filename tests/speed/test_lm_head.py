"""The faster output layer: the same logits, in the same place, under the same name."""

import pytest
import torch
from ours_and_theirs import ours_and_theirs, random_ids
from torch import nn
from torch.nn import functional as F

from gpt2repro.speed import lm_head
from gpt2repro.speed.lm_head import FusedLMHead
from modeling_gpt2repro import GPT2ReproLMHead

# The same sums in float32 in another order: a few units in the last place of numbers of order 1.
REORDERED = {"rtol": 1e-5, "atol": 1e-6}


def test_it_takes_the_place_of_the_plain_head_and_its_weight():
    ours, theirs = ours_and_theirs()
    names = [*ours.state_dict()]
    lm_head.use_in(ours)
    assert type(ours.lm_head) is FusedLMHead
    assert ours.lm_head.weight is ours.transformer.wte.weight and [*ours.state_dict()] == names
    head = ours.lm_head
    lm_head.use_in(ours)
    assert ours.lm_head is head
    ids = random_ids(2, 9)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **REORDERED)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_can_have_it_again(tied):
    ours, _ = ours_and_theirs(tie_word_embeddings=tied)
    lm_head.use_in(ours)
    ours.resize_token_embeddings(120)
    assert isinstance(ours.lm_head, GPT2ReproLMHead) and ours.lm_head.out_features == 120
    lm_head.use_in(ours)
    assert type(ours.lm_head) is FusedLMHead and ours.lm_head.out_features == 120
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == tied


def test_another_head_is_left_alone():
    ours, _ = ours_and_theirs()
    ours.lm_head = torch.nn.Linear(32, 99)
    lm_head.use_in(ours)
    assert type(ours.lm_head) is torch.nn.Linear


def test_a_parametrized_head_is_left_alone():
    ours, _ = ours_and_theirs(tie_word_embeddings=False)
    torch.nn.utils.parametrizations.weight_norm(ours.lm_head)
    ids = random_ids(2, 9)
    loss = ours(ids, labels=ids).loss
    lm_head.use_in(ours)
    torch.testing.assert_close(ours(ids, labels=ids, skip_logits=True).loss, loss, **REORDERED)


@pytest.mark.parametrize("rows", [(1, 1), (8, 1), (1, 3), (64,), (65,), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_head_takes_few_rows_in_its_own_way(rows, dtype, monkeypatch):
    monkeypatch.setattr(lm_head, "LARGE_WEIGHT", 0)
    plain, forward = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: plain.append(1) or forward(self, x))
    torch.manual_seed(0)
    head = FusedLMHead(32, 99, bias=False, dtype=dtype)
    hidden = torch.randn(*rows, 32, dtype=dtype, requires_grad=True)
    logits, expected = head(hidden), F.linear(hidden, head.weight)
    assert bool(plain) == (rows in ((65,), (0, 1)) or dtype == torch.bfloat16)
    assert logits.shape == expected.shape and logits.is_contiguous()
    if dtype == torch.float32:
        torch.testing.assert_close(logits, expected, **REORDERED)
    else:
        assert torch.equal(logits, expected)
    ours, theirs = (
        torch.autograd.grad(each.square().sum(), (hidden, head.weight))
        for each in (logits, expected)
    )
    torch.testing.assert_close(ours, theirs, **(REORDERED if dtype == torch.float32 else {}))


def test_a_large_head_keeps_its_hooks_and_is_traced_for_all_lengths(monkeypatch):
    monkeypatch.setattr(lm_head, "LARGE_WEIGHT", 0)
    head = FusedLMHead(32, 99, bias=False)
    seen = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = head(torch.ones(1, 1, 32))
    assert seen[0] is logits
    traced = torch.jit.trace(FusedLMHead(32, 99, bias=False), torch.ones(1, 5, 32))
    assert traced(torch.ones(2, 7, 32)).shape == (2, 7, 99)
