"""The figures of a comparison of logits, against what a hand counts."""

import pytest
import torch
from torch.nn import functional as F

from gpt2repro.publishing.agreement import _agreement

RISING = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_one_position_of_two_has_another_favourite():
    ours = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0], RISING])
    theirs = torch.tensor([[2.0, 3.0, 1.0, 0.0, -1.0, -2.0], RISING])
    found = _agreement(ours, theirs, 1.0)
    assert (found.max_abs, found.top1, found.top5) == (1.0, 0.5, 1.0) and found.holds
    assert found.mean_abs == pytest.approx(2 / 12)
    from_theirs = F.kl_div(
        ours.double().log_softmax(-1), theirs.double().softmax(-1), reduction="batchmean"
    )
    assert found.kl == pytest.approx(from_theirs.item()) and found.kl > 0.1


def test_the_other_way_round_four_of_the_five_likeliest_are_the_same():
    found = _agreement(torch.tensor([RISING[::-1]]), torch.tensor([RISING]), 1.0)
    assert found.top5 == pytest.approx(0.8) and found.top1 == 0 and not found.holds
