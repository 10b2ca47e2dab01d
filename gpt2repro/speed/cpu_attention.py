"""Causal self-attention for bfloat16 training on CPUs, about twice as fast as torch's kernel there.

The idea is FlashAttention's (Dao et al. 2022): never hold the (T, T) weights of all queries, and
compute them again in the backward pass. Queries are taken in blocks; a block sees the keys up to
its own end, so what causality forbids is mostly not computed at all. Each step is a matrix product
for all heads of one row of the batch, for which oneDNN has good bfloat16 kernels. As in any
attention in bfloat16 that is not fused, scores are rounded to bfloat16 before the softmax, which
itself is computed in float32. Parts of a row are made contiguous by hand: a product that is given
a transposed part copies it number by number.

The two passes are custom operators, because a compiler that looks into them recognizes the
recomputed weights and keeps them instead, 31 MB a layer at B = 2 and T = 1024.
"""

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "cpu_blocks"
BLOCK_QUERIES = 128  # measured: 64 and 256 are slower by a few percent, 512 by more


def use_in(model: PreTrainedModel) -> None:
    """Make it the model's attention, with torch's `sdpa` for whatever it cannot do."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """transformers' attention interface: (B, H, T, D) three times -> (B, T, H, D), no weights."""
    whole_rows = attention_mask is None and query.shape[2] == key.shape[2] > 1
    if whole_rows and query.dtype == torch.bfloat16 and query.is_cpu and dropout == 0.0:
        return causal_attention(query, key, value, scaling), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def blocks(length: int) -> list[tuple[int, int]]:
    return [(a, min(a + BLOCK_QUERIES, length)) for a in range(0, length, BLOCK_QUERIES)]


def _weights_of_block(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Of a block of N scaled queries for the S keys up to its own end: (H, N, S)."""
    scores = torch.bmm(query, key.transpose(1, 2))
    size = query.shape[1]
    scores[..., -size:] += mask[:size, :size]
    return scores.softmax(-1)


def _mask_of_block(like: Tensor) -> Tensor:
    """-inf where a query of a block would see a key after it."""
    return like.new_full((BLOCK_QUERIES, BLOCK_QUERIES), -torch.inf).triu(1)


@torch.library.custom_op("gpt2repro::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(Q Kᵀ · scaling, causal) V: (B, H, T, D) three times -> (B, T, H, D)."""
    mixed = _empty_rows(query)
    mask = _mask_of_block(query)
    for row, q, k, v in zip(mixed.transpose(1, 2), query, key, value, strict=True):
        q = q * scaling
        for start, end in blocks(q.shape[1]):
            weights = _weights_of_block(q[:, start:end].contiguous(), k[:, :end].contiguous(), mask)
            row[:, start:end] = torch.bmm(weights, v[:, :end].contiguous())
    return mixed


@torch.library.custom_op(
    "gpt2repro::causal_attention_backward", mutates_args=(), device_types="cpu"
)
def _causal_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, each (B, H, T, D), laid out as (B, T, H, D)."""
    query_grads, key_grads, value_grads = _empty_gradients(query, key, value)
    mask = _mask_of_block(query)
    for query_grad, key_grad, value_grad, row_g, row_q, row_k, row_v in zip(
        query_grads, key_grads, value_grads, grad.transpose(1, 2), query, key, value, strict=True
    ):
        row_q = row_q * scaling
        # Keys and values are met by several blocks: their gradients are summed in float32.
        key_sum, value_sum = (x.new_zeros(x.shape, dtype=torch.float32) for x in (row_k, row_v))
        for start, end in blocks(row_q.shape[1]):
            g, q = row_g[:, start:end].contiguous(), row_q[:, start:end].contiguous()
            k, v = row_k[:, :end].contiguous(), row_v[:, :end].contiguous()
            weights = _weights_of_block(q, k, mask)
            value_sum[:, :end] += torch.bmm(weights.transpose(1, 2), g)
            weights_grad = torch.bmm(g, v.transpose(1, 2))
            scores_grad = torch._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
            del weights, weights_grad
            query_grad[:, start:end] = torch.bmm(scores_grad, k) * scaling
            key_sum[:, :end] += torch.bmm(scores_grad.transpose(1, 2), q)
        key_grad.copy_(key_sum)
        value_grad.copy_(value_sum)
    return query_grads, key_grads, value_grads


def _empty_rows(part: Tensor) -> Tensor:
    """(B, T, H, D), contiguous, for a `part` of (B, H, T, D)."""
    return part.new_empty(part.shape[0], part.shape[2], part.shape[1], part.shape[3])


def _empty_gradients(*parts: Tensor) -> tuple[Tensor, ...]:
    return tuple(_empty_rows(part).transpose(1, 2) for part in parts)


@causal_attention.register_fake
def _(query, key, value, scaling):
    return _empty_rows(query)


@_causal_attention_backward.register_fake
def _(grad, query, key, value, scaling):
    return _empty_gradients(query, key, value)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)  # views of one (B, T, 3C): nothing is kept twice


def backward(ctx, grad):
    return *_causal_attention_backward(grad, *ctx.saved_tensors, ctx.scaling), None


causal_attention.register_autograd(backward, setup_context=_setup_context)
