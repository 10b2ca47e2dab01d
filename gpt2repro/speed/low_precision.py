"""Fewer bits where a recipe asks for them: they change what is learned, if only a little.

Eight bits for the output layer's products, which GPUs from compute capability 8.9 on multiply twice
as fast. A tensor is divided by a scale that brings its largest number to the largest of the type,
and the product is multiplied by the scales again; sums are float32 (Micikevicius et al. 2022).
Weights and inputs take e4m3 (3 bits of mantissa), gradients e5m2 (2 bits and more range).

Sixteen bits for the residual stream, which halves what norms and additions read and write.
"""

import timeit

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_gpt2repro import GPT2ReproForCausalLM

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SIDE = 16  # cuBLAS wants the sides that are summed over, and the columns, in multiples of it
EMULATED_BF16 = "this CPU emulates bf16, many times slower: set mixed_precision to no"


def hold_stream_in_bf16(model: GPT2ReproForCausalLM) -> None:
    """Blocks add to a stream of bfloat16; what autocast computes in float32, it still does."""
    model.transformer.drop.register_forward_hook(_to_bf16)


def _to_bf16(module: nn.Module, inputs: tuple, stream: Tensor) -> Tensor:
    return stream.to(torch.bfloat16)


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU multiplies in bfloat16: older ones (V100, T4) only pretend, and take longer."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def emulates_bf16(device: torch.device) -> bool:
    """Whether this is a CPU that is far slower in bfloat16 than in float32: tried, not asked."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype)
        matrix @ matrix  # the first product builds its kernel
        return min(timeit.repeat(lambda: matrix @ matrix, repeat=5, number=1))

    return device.type == "cpu" and seconds(torch.bfloat16) > 2 * seconds(torch.float32)


def has_fp8(device: torch.device) -> bool:
    """Whether it multiplies in 8 bits. A CPU does, slowly: for tests.

    AMD's count their capabilities otherwise, and some have 8 bits of another kind: none is trusted.
    """
    if device.type != "cuda":
        return device.type == "cpu"
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Products:
    """`fused_cross_entropy.HeadProducts` in 8 bits.

    Of the second factor the hardware wants the columns contiguous, of the first the rows.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.vocab_size = len(weight)
        padded = F.pad(weight, (0, 0, 0, -len(weight) % 64))  # to the width of `padded` below
        self.weight, self.scale = scaled(padded, E4M3)
        self.columns = self.weight.T.contiguous().T
        self.dtype = dtype
        # The gradient, softmax - onehot, lies between -1 and 1 whatever the logits are.
        self.grad_scale = weight.new_full((), 1 / torch.finfo(E5M2).max, dtype=torch.float32)

    def logits(self, states: Tensor, padded: Tensor) -> None:
        eighth, scale = scaled(states, E4M3)
        padded.copy_(self._multiply(eighth, scale, self.weight.T, self.scale))

    def hidden_grad(self, padded: Tensor) -> Tensor:
        grad = (padded / self.grad_scale).to(E5M2)
        return self._multiply(grad, self.grad_scale, self.columns, self.scale)

    def add_weight_grad(self, total: Tensor, padded: Tensor, states: Tensor) -> None:
        missing = -len(states) % SIDE
        eighth, scale = scaled(F.pad(states, (0, 0, 0, missing)), E4M3)
        grad = (F.pad(padded, (0, 0, 0, missing)) / self.grad_scale).to(E5M2)
        by_columns = eighth.T.contiguous().T
        product = self._multiply(grad.T.contiguous(), self.grad_scale, by_columns, scale)
        total += product[: self.vocab_size]

    def _multiply(self, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
        return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=self.dtype)


def scaled(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tensor in 8 bits, and the number to multiply it by to have it back."""
    scale = (tensor.abs().amax().float() / torch.finfo(dtype).max).clamp(min=1e-12)
    return (tensor / scale).to(dtype), scale
