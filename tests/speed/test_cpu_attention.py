"""The bfloat16 attention for CPUs against torch's, eager and compiled."""

import pytest
import torch
from ours_and_theirs import ours_and_theirs, random_ids
from torch.nn import functional as F

from gpt2repro.speed import cpu_attention


def heads(num_tokens: int, seed: int = 0) -> list[torch.Tensor]:
    """Query, key, value (2, 3, T, 8) as the model hands them over: views of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(2, num_tokens, 72, generator=generator).bfloat16()
    return [part.unflatten(-1, (3, 8)).transpose(1, 2) for part in qkv.split(24, dim=-1)]


def value_and_gradients(attention, parts, grad):
    parts = [part.detach().clone().requires_grad_() for part in parts]
    mixed = attention(*parts)
    mixed.backward(grad.to(mixed.dtype))
    return [tensor.float() for tensor in (mixed.detach(), *(part.grad for part in parts))]


def relative_errors(found, truth):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]


def by_torch(query, key, value):
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25)
    return mixed.transpose(1, 2)


def by_blocks(query, key, value):
    return cpu_attention.causal_attention(query, key, value, 0.25)


@pytest.mark.parametrize("num_tokens", [2, 16, 37])
@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients_are_as_close_to_the_truth_as_torchs(
    num_tokens, compiled, monkeypatch
):
    monkeypatch.setattr(cpu_attention, "BLOCK_QUERIES", 16)  # 37 = 16 + 16 + 5
    parts = heads(num_tokens)
    grad = torch.randn(2, num_tokens, 3, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    truth = value_and_gradients(by_torch, [part.float() for part in parts], grad)
    theirs = relative_errors(value_and_gradients(by_torch, parts, grad), truth)
    attention = torch.compile(by_blocks, backend="aot_eager") if compiled else by_blocks
    ours = relative_errors(value_and_gradients(attention, parts, grad), truth)
    # Unfused: scores and weights are rounded to bfloat16 (2^-9 relative) on their way.
    assert all(our < their + 2**-8 for our, their in zip(ours, theirs, strict=True))


def test_the_operators_keep_their_promises_to_autograd_and_the_compiler():
    parts = [part.detach().requires_grad_() for part in heads(20)]
    torch.library.opcheck(cpu_attention.causal_attention, (*parts, 0.25))


@pytest.mark.parametrize(
    ("case", "is_taken"),
    [
        ("plain", True),
        ("mask", False),
        ("dropout", False),
        ("one query", False),
        ("some queries", False),
        ("float32", False),
    ],
)
def test_it_is_taken_for_whole_rows_in_bfloat16_alone(monkeypatch, case, is_taken):
    """What it has no room for (padding, a cache, dropout) is torch's."""
    taken, fast = [], cpu_attention.causal_attention
    monkeypatch.setattr(
        cpu_attention, "causal_attention", lambda *parts: taken.append(1) or fast(*parts)
    )
    module, (query, key, value) = ours_and_theirs()[0].transformer.h[0].attn, heads(16)
    full = torch.ones(16, 16, dtype=torch.bool).tril()
    mask, dropout = (full[None, None] if case == "mask" else None), 0.5 * (case == "dropout")
    if case == "float32":
        query, key, value = query.float(), key.float(), value.float()
    if case == "one query":
        query = query[:, :, -1:]
    if case == "some queries":
        query, mask = query[:, :, -4:], full[None, None, -4:]
    mixed, _ = cpu_attention.attend(module, query, key, value, mask, 0.25, dropout)
    assert bool(taken) == is_taken
    if not dropout:
        parts = (part.float() for part in (query, key, value))
        rows = full[-query.shape[2] :]
        theirs = F.scaled_dot_product_attention(*parts, rows, scale=0.25).transpose(1, 2)
        # bfloat16's 8 bits, rounded on the way too
        torch.testing.assert_close(mixed.float(), theirs, rtol=2**-6, atol=2**-6)


def test_a_model_trains_with_it_and_falls_back_where_it_must():
    ours, _ = ours_and_theirs()
    ids = random_ids(2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        expected = ours(ids, labels=ids).loss
        cpu_attention.use_in(ours)
        loss = ours(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=2**-8)  # bfloat16's 8 bits
    loss.backward()
    assert all(p.grad is not None for p in ours.parameters())

    ours.set_attn_implementation("sdpa")
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    plain = ours(ids, attention_mask=mask).logits
    cpu_attention.use_in(ours)
    assert torch.equal(ours(ids, attention_mask=mask).logits, plain)  # float32, and a mask
    with torch.no_grad():
        cached = ours.generate(ids[:1, :4], max_new_tokens=4, do_sample=False)
        ours.set_attn_implementation("sdpa")
        assert torch.equal(cached, ours.generate(ids[:1, :4], max_new_tokens=4, do_sample=False))


def test_the_name_does_not_follow_the_model_to_disk(tmp_path):
    ours, _ = ours_and_theirs()
    cpu_attention.use_in(ours)
    ours.save_pretrained(tmp_path)
    assert cpu_attention.NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")
