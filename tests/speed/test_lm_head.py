"""The faster output layer: the same logits, in the same place, under the same name."""

import pytest
import torch
from ours_and_theirs import ours_and_theirs, random_ids

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
