"""Fewer bits: how far the results are off, and that nothing else changes."""

import pytest
import torch
from ours_and_theirs import ours_and_theirs, random_ids

from gpt2repro.speed import lm_head
from gpt2repro.speed.fused_cross_entropy import linear_cross_entropy
from gpt2repro.speed.low_precision import hold_stream_in_bf16


def loss_and_gradients(num_tokens: int, fp8: bool) -> list[torch.Tensor]:
    """Of a head of an odd vocabulary: [loss, by hidden, by weight], multiplied in bfloat16 or 8."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 64, generator=generator, requires_grad=True)
    weight = (torch.randn(509, 64, generator=generator) * 0.1).requires_grad_()
    labels = torch.randint(0, 509, (num_tokens,), generator=generator)
    labels[3] = -100
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, -100, fp8)
    return [loss, *torch.autograd.grad(loss, (hidden, weight))]


@pytest.mark.parametrize("num_tokens", [96, 37])  # the second must be padded for the products
def test_a_head_of_eight_bits_is_off_by_their_rounding(num_tokens):
    ours, wide = (loss_and_gradients(num_tokens, fp8) for fp8 in (True, False))
    # A loss averages its tokens' errors; a gradient has e5m2's, up to 2**-3 of each number and on
    # average much less.
    torch.testing.assert_close(ours[0], wide[0], rtol=2**-8, atol=0.0)
    for mine, theirs in zip(ours[1:], wide[1:], strict=True):
        assert not torch.equal(mine, theirs) and mine.dtype == theirs.dtype
        assert (mine - theirs).norm() < 2**-4 * theirs.norm()
    assert not ours[1][3].any()  # its label was not counted


def test_eight_bits_train_and_do_not_validate():
    heads = {}
    for fp8 in (True, False):
        ours, _ = ours_and_theirs()
        lm_head.use_in(ours, fp8=fp8)
        rows = random_ids(2, 17)
        step = {"input_ids": rows[:, :-1], "shift_labels": rows[:, 1:], "skip_logits": True}
        with torch.autocast("cpu", torch.bfloat16):
            trained = ours(**step).loss
            with torch.no_grad():
                heads[fp8] = trained.item(), ours(**step).loss.item(), ours(rows).logits
    assert heads[True][0] != heads[False][0] == heads[False][1] == heads[True][1]
    assert torch.equal(heads[True][2], heads[False][2])


def test_the_stream_is_held_in_bfloat16_and_the_loss_hardly_changes():
    ours, _ = ours_and_theirs()
    rows = random_ids(4, 17)
    stream, losses = [], []
    for block in ours.transformer.h:
        block.register_forward_hook(lambda module, inputs, output: stream.append(output.dtype))
    for change in (lambda model: None, hold_stream_in_bf16):
        change(ours)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(ours(rows, labels=rows).loss)
        losses[-1].backward()
    assert stream == [torch.float32] * 3 + [torch.bfloat16] * 3
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}
    # Three blocks' sums and the norms' inputs, rounded to 2**-9 of each number.
    torch.testing.assert_close(losses[1], losses[0], rtol=2**-8, atol=0.0)
