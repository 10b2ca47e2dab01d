"""The cross-entropy of a linear head for training, without the logits of all tokens.

Some tokens at a time go from logits to loss and on to the loss's gradient, softmax - onehot, in
place, and leave only its products with the weight and the hidden states: the same three matrix
products as with all logits in memory, and memory for one chunk of them.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from gpt2repro.speed.low_precision import Fp8Products

LARGE_GPU = 32 * 2**30  # bytes: the logits of the larger chunk take 1.6 GB


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    fp8: bool = False,
    compiled: bool = False,
) -> Tensor:
    """Σ -log softmax(hidden Wᵀ)[label] in nats, multiplied in the type that autocast asks for.

    From hidden (N, C), weight (V, C) and labels (N,) to a scalar of at least float32. With `fp8`
    the products of a training step are multiplied in 8 bits; without gradients nothing is. Logits
    become their gradient by compiled code if they do so within such, or `compiled` says it.
    """
    # Within a function of autograd gradients are off, and what it is told that tensors need does
    # not heed `no_grad`: a validation would compute the weight's gradient, a third of the work.
    with_gradients = torch.is_grad_enabled()
    compiled = compiled or torch.compiler.is_compiling()
    how = (with_gradients, compiled, fp8)
    return _SummedCrossEntropy.apply(hidden, weight, labels, ignore_index, *how)


class _SummedCrossEntropy(torch.autograd.Function):
    """`cross_entropy_and_gradients`, whose gradients wait for the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, ignore_index, with_gradients, compiled, fp8):
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        loss, *gradients = cross_entropy_and_gradients(
            hidden,
            weight,
            labels,
            ignore_index,
            dtype,
            *(with_gradients and needed for needed in ctx.needs_input_grad[:2]),
            compiled,
            fp8 and with_gradients,
        )
        ctx.save_for_backward(*gradients)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        hidden_grad, weight_grad = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        return (
            hidden_grad * grad if needs_hidden else None,
            (weight_grad * grad).to(ctx.weight_dtype) if needs_weight else None,
            *(None, None, None, None, None),
        )


# An operator, because a compiler that looks into it keeps the logits of all chunks until the
# backward pass.
@torch.library.custom_op("gpt2repro::cross_entropy_and_gradients", mutates_args=())
def cross_entropy_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    in_compiled_code: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, and its gradients by hidden (N, C) and weight (V, C).

    Logits are multiplied in `dtype`, or in 8 bits. Loss and weight gradient are of at least
    float32; gradients that nobody needs are empty. In compiled code, logits become their gradient
    by Inductor's.
    """
    losses_of = _compiled_losses_and_gradient if in_compiled_code else losses_and_gradient
    wide = torch.promote_types(dtype, torch.float32)
    loss = hidden.new_zeros((), dtype=wide)
    hidden_grad = hidden.new_empty(hidden.shape if needs_hidden else 0)
    weight_grad = weight.new_zeros(weight.shape if needs_weight else 0, dtype=wide)
    chunk_tokens, block_tokens = tokens_at_once(hidden.device)
    vocab_size = len(weight)  # matrix units want rows that begin at multiples of 64 numbers
    width = vocab_size + -vocab_size % 64
    products: HeadProducts = Fp8Products(weight, dtype) if fp8 else Products(weight, dtype, width)
    buffer = hidden.new_empty(min(chunk_tokens, len(labels)), width, dtype=dtype)
    buffer[:, vocab_size:] = 0
    for start in range(0, len(labels), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        counted = (labels[chunk] != ignore_index)[:, None]
        label = labels[chunk, None].where(counted, 0)
        states = hidden[chunk].to(dtype)
        padded = buffer[: len(states)]
        logits = padded[:, :vocab_size]
        products.logits(states, padded)

        blocks = zip(logits.split(block_tokens), label.split(block_tokens), strict=True)
        losses = [losses_of(*block, wide, needs_hidden or needs_weight) for block in blocks]
        loss += torch.cat(losses).where(counted, 0).sum()

        if needs_hidden:
            hidden_grad[chunk] = products.hidden_grad(padded).where(counted, 0)
        if needs_weight:
            products.add_weight_grad(weight_grad, padded, states.where(counted, 0))
    return loss, hidden_grad, weight_grad


def tokens_at_once(device: torch.device) -> tuple[int, int]:
    """Tokens whose logits exist at once, and of them those whose probabilities do.

    The products want many, to fill a GPU's last wave of tiles; a CPU's cache wants few, and a GPU
    few kernels. By arithmetic: no GPU has been measured yet.
    """
    if device.type != "cuda":
        return 512, 32
    large = torch.cuda.get_device_properties(device).total_memory >= LARGE_GPU
    return (16384 if large else 4096), 1024


class HeadProducts(Protocol):
    """The three matrix products of a head of V tokens, for N of its inputs at a time.

    The columns of `padded` (N, V and a few more) beyond the vocabulary are zero, and stay so.
    """

    def logits(self, states: Tensor, padded: Tensor) -> None:
        """states (N, C) Wᵀ into `padded`."""

    def hidden_grad(self, padded: Tensor) -> Tensor:
        """From the gradient of the logits to that of the states, (N, C)."""

    def add_weight_grad(self, total: Tensor, padded: Tensor, states: Tensor) -> None:
        """Add the gradient of W (V, C) to `total`."""


class Products:
    """In the type that the weight is cast to, once for all chunks.

    All are over the padded width. cuBLAS wants not only rows but sides of 16 bytes: for an odd side
    it takes kernels that move one number at a time, on GPUs before Hopper.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, width: int) -> None:
        self.weight, rows = weight.to(dtype), width - len(weight)
        if rows:
            self.weight = nn.functional.pad(self.weight, (0, 0, 0, rows))

    def logits(self, states, padded):
        torch.mm(states, self.weight.T, out=padded)

    def hidden_grad(self, padded):
        return padded @ self.weight

    def add_weight_grad(self, total, padded, states):
        if SUM_WITHIN_PRODUCT and total.is_cuda and total.dtype != states.dtype:
            grad = padded[:, : len(total)]
            torch.addmm(total, grad.T, states, out_dtype=total.dtype, out=total)
        else:
            total += (padded.T @ states)[: len(total)]


# Whether cuBLAS adds to the float32 sum itself, with no rounding to bfloat16 in between. It should
# be faster by a percent of a step; off until a GPU has run it.
SUM_WITHIN_PRODUCT = False


def losses_and_gradient(
    logits: Tensor, label: Tensor, wide: torch.dtype, needs_gradient: bool
) -> Tensor:
    """-log softmax(logits)[label] (n, 1) in `wide`; logits (n, V) become their gradient."""
    probs = torch.softmax(logits, dim=-1, dtype=wide)
    # log Σ exp = the largest logit - the log of its probability, which is at least 1 / V.
    largest, likeliest = (of.amax(dim=-1, keepdim=True) for of in (logits, probs))
    losses = largest - likeliest.log() - logits.gather(1, label)
    if needs_gradient:
        logits.copy_(probs.scatter_(1, label, probs.gather(1, label) - 1))
    return losses


def _compiled_losses_and_gradient(
    logits: Tensor, label: Tensor, wide: torch.dtype, needs_gradient: bool
) -> Tensor:
    """The same by compiled code, which holds nothing else that is as large as the logits."""
    # A compiled model calls its operators in one dispatch state when it is called for the first
    # time and in another one later: without this, all would be compiled again in the second step.
    same_state = getattr(torch._C, "_AutoDispatchBelowADInplaceOrView", contextlib.nullcontext)
    with same_state():
        return compiled(fusible_losses_and_gradient)(logits, label, wide, needs_gradient)


@functools.cache
def compiled(function: Callable) -> Callable:
    """Not when the module is imported: that would make a directory for compiled code."""
    return torch.compile(function)


def fusible_losses_and_gradient(
    logits: Tensor, label: Tensor, wide: torch.dtype, needs_gradient: bool
) -> Tensor:
    """The same in operations on single numbers, of which a compiler makes two loops.

    Nothing is read by its index: torch 2.11's code for CPUs would read that after `copy_`, out of
    the gradient.
    """
    exact = logits.to(wide)
    log_sum = torch.logsumexp(exact, dim=-1, keepdim=True)
    is_label = torch.arange(logits.shape[1], device=logits.device) == label
    losses = log_sum - torch.where(is_label, exact, 0).sum(dim=-1, keepdim=True)
    if needs_gradient:
        logits.copy_((exact - log_sum).exp() - is_label.to(wide))
    return losses


@cross_entropy_and_gradients.register_fake
def _(hidden, weight, labels, ignore_index, dtype, needs_hidden, needs_weight, compiled, fp8):
    wide = torch.promote_types(dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0, dtype=wide),
    )
