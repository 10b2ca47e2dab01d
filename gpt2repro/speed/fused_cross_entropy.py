"""The cross-entropy of a linear head for training, without the logits of all tokens.

Some tokens at a time go from logits to loss and on to the loss's gradient, softmax - onehot, in
place, and leave only its products with the weight and the hidden states: the same three matrix
products as with all logits in memory, and memory for one chunk of them.
"""

import contextlib
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

# Tokens whose logits exist at once (enough for a fast product), tokens whose probabilities do (a
# CPU's cache wants few, a GPU few kernels), and tokens of the vocabulary that meet in one product.
CHUNKS = {"cpu": (512, 32, 4096)}
CHUNKS_ON_GPUS = (4096, 1024, 65536)  # by arithmetic: no GPU has been measured yet


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int
) -> Tensor:
    """Σ -log softmax(hidden Wᵀ)[label] in nats, multiplied in the type that autocast asks for.

    From hidden (N, C), weight (V, C) and labels (N,) to a scalar of at least float32.
    """
    # Within a function of autograd gradients are off, and what it is told that tensors need does
    # not heed `no_grad`: a validation would compute the weight's gradient, a third of the work.
    with_gradients = torch.is_grad_enabled()
    return _SummedCrossEntropy.apply(hidden, weight, labels, ignore_index, with_gradients)


class _SummedCrossEntropy(torch.autograd.Function):
    """`cross_entropy_and_gradients`, whose gradients wait for the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, ignore_index, with_gradients):
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
            torch.compiler.is_compiling(),
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
            *(None, None, None),
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, and its gradients by hidden (N, C) and weight (V, C).

    Logits are multiplied in `dtype`. Loss and weight gradient are of at least float32; gradients
    that nobody needs are empty. In compiled code, logits become their gradient by Inductor's.
    """
    losses_of = _compiled_losses_and_gradient if in_compiled_code else losses_and_gradient
    wide = torch.promote_types(dtype, torch.float32)
    chunk_tokens, block_tokens, piece_tokens = CHUNKS.get(hidden.device.type, CHUNKS_ON_GPUS)
    loss = hidden.new_zeros((), dtype=wide)
    hidden_grad = hidden.new_empty(hidden.shape if needs_hidden else 0)
    weight_grad = _zeros_apart(weight, wide) if needs_weight else weight.new_empty(0, dtype=wide)
    # A product of 50257 columns is slower on CPUs than several of 4096. There each piece is cast
    # when it is met: 1 % of a step, and the whole weight in bfloat16 would be another 77 MB.
    pieces = (weight if weight.is_cpu else weight.to(dtype)).split(piece_tokens)
    room = None if pieces[0].dtype == dtype else torch.empty_like(pieces[0], dtype=dtype)

    def cast(piece: Tensor) -> Tensor:
        return piece if room is None else room[: len(piece)].copy_(piece)

    vocab_size = len(weight)  # matrix units want rows that begin at multiples of 64 numbers
    buffer = hidden.new_empty(chunk_tokens, vocab_size + -vocab_size % 64, dtype=dtype)
    for start in range(0, len(labels), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        counted = (labels[chunk] != ignore_index)[:, None]
        label = labels[chunk, None].where(counted, 0)
        inputs = hidden[chunk].to(dtype)
        logits = buffer[: len(inputs), :vocab_size]
        parts = logits.split(piece_tokens, dim=1)
        for part, piece in zip(parts, pieces, strict=True):
            torch.mm(inputs, cast(piece).T, out=part)

        blocks = zip(logits.split(block_tokens), label.split(block_tokens), strict=True)
        losses = [losses_of(*block, wide, needs_hidden or needs_weight) for block in blocks]
        loss += torch.cat(losses).where(counted, 0).sum()

        inputs = inputs.where(counted, 0)
        grad = inputs.new_zeros(inputs.shape if needs_hidden else 0, dtype=wide)
        for number, (part, piece) in enumerate(zip(parts, pieces, strict=True)):
            if needs_hidden:
                grad += part @ cast(piece)
            if needs_weight:
                summed = weight_grad[number * piece_tokens :][: len(piece)]
                product = part.T @ inputs
                if start == 0:  # a page that is read before it is written costs two faults
                    summed.copy_(product)
                else:
                    summed += product
        if needs_hidden:
            hidden_grad[chunk] = grad.where(counted, 0)
    return loss, hidden_grad, weight_grad


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
    """The same in operations on single numbers, of which a compiler makes two loops."""
    exact = logits.to(wide)
    log_sum = torch.logsumexp(exact, dim=-1, keepdim=True)
    losses = log_sum - exact.gather(1, label)
    if needs_gradient:
        is_label = torch.arange(logits.shape[1], device=logits.device) == label
        logits.copy_((exact - log_sum).exp() - is_label.to(wide))
    return losses


def _zeros_apart(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of a tensor's shape, on CPUs in a block of their own that goes back to the kernel.

    The weight's gradient is by far the largest block of a step. Where malloc keeps what is freed
    (cpu_memory.py), it would leave a gap of 154 MB that others break up before the next one comes.
    """
    if not like.is_cpu:
        return torch.zeros_like(like, dtype=dtype)
    block = mmap.mmap(-1, like.numel() * dtype.itemsize, flags=mmap.MAP_PRIVATE)
    return torch.frombuffer(block, dtype=dtype).view(like.shape)


@cross_entropy_and_gradients.register_fake
def _(hidden, weight, labels, ignore_index, dtype, needs_hidden, needs_weight, in_compiled_code):
    wide = torch.promote_types(dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0, dtype=wide),
    )
