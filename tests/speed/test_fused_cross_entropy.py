"""The training loop's loss as a function; tests/test_loss.py has it at work in the model."""

import functools

import pytest
import torch

from gpt2repro.speed import fused_cross_entropy as module
from gpt2repro.speed.fused_cross_entropy import (
    cross_entropy_and_gradients,
    fusible_losses_and_gradient,
    linear_cross_entropy,
    losses_and_gradient,
)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(module, "tokens_at_once", lambda device: (7, 3))


def test_the_gradient_is_the_derivative():
    """Against finite differences, in float64; the last chunk, block and piece are short."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 10, -100, 3, 3, 7, -100, 1, 2])
    torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, -100), (hidden, weight)
    )


def test_without_gradients_none_are_computed(monkeypatch):
    asked = []

    def spy(*args):
        asked.append(args[5:7])
        return cross_entropy_and_gradients(*args)

    monkeypatch.setattr(module, "cross_entropy_and_gradients", spy)
    hidden, weight = torch.ones(9, 5, requires_grad=True), torch.ones(11, 5, requires_grad=True)
    labels = torch.arange(9)
    with torch.no_grad():
        bare = linear_cross_entropy(hidden, weight, labels, -100)
    assert torch.equal(bare, linear_cross_entropy(hidden, weight.detach(), labels, -100))
    assert asked == [(False, False), (True, False)]


def test_logits_far_apart_neither_overflow_nor_vanish():
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    labels = torch.tensor([2, 2])
    loss = linear_cross_entropy(hidden, weight, labels, -100)
    assert loss.item() == 600.0  # and 0: right with certainty
    loss.backward()
    assert torch.equal(hidden.grad, torch.tensor([[2.0], [0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_takes_compiled_code(dtype, monkeypatch):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).requires_grad_() for n in (9, 61))
    labels = torch.tensor([0, 60, -100, 3, 3, 7, -100, 1, 2])

    def loss_and_gradients(of):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = of(hidden, weight, labels, -100)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    eager = loss_and_gradients(linear_cross_entropy)
    monkeypatch.setattr(module, "losses_and_gradient", None)
    compiled = loss_and_gradients(torch.compile(linear_cross_entropy, backend="aot_eager"))
    alone = loss_and_gradients(functools.partial(linear_cross_entropy, compiled=True))
    assert all(map(torch.equal, alone, compiled))  # as in FSDP's blocks, between which the head is
    # Both compute in float32; a gradient of the logits may round to the next bfloat16, 2**-8 of it,
    # and so may its products.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_what_is_compiled_computes_the_same_when_it_is_not(needs_gradient):
    logits = torch.randn(7, 11, dtype=torch.float64)
    label = torch.arange(7)[:, None]
    mine, yours = logits.clone(), logits.clone()
    torch.testing.assert_close(
        fusible_losses_and_gradient(mine, label, torch.float64, needs_gradient),
        losses_and_gradient(yours, label, torch.float64, needs_gradient),
    )
    torch.testing.assert_close(mine, yours)
    assert torch.equal(mine, logits) is not needs_gradient


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_the_operator_says_rightly_what_it_returns(needs):
    """torch's own check: its schema, and the shapes and types that a compiler is told."""
    hidden, weight = torch.randn(20, 8), torch.randn(61, 8)
    labels = torch.arange(20)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = (hidden, weight, labels, -100, dtype, *needs, False, False)
        torch.library.opcheck(cross_entropy_and_gradients, inputs)
