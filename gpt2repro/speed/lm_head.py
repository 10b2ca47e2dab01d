"""The output layer, faster: the loss in one pass, and on CPUs logits at the memory's speed.

Nothing depends on it. `use_in(model)` puts it in the place of the model's own, with the same weight
under the same name: what is saved, and what others load, knows nothing of it.
"""

import torch
from torch import Tensor, nn

from gpt2repro.speed.fused_cross_entropy import linear_cross_entropy
from modeling_gpt2repro import SEEMS_EXPORTED, GPT2ReproForCausalLM, GPT2ReproLMHead

FEW_ROWS, LARGE_WEIGHT = 64, 2**22  # products on a CPU that wait for memory: (F, C) and (V, C)


def use_in(model: GPT2ReproForCausalLM, *, fp8: bool = False, compiled_loss: bool = False) -> None:
    """Give the model this head, if its own is the plain one, before it is wrapped or compiled.

    With `fp8` the products of a training step have 8 bits: another result, if only a little. With
    `compiled_loss` the loss is compiled also where the model around the head is not.
    """
    plain = model.lm_head
    if type(plain) is not GPT2ReproLMHead:  # an adapter's, a parametrized one, or this already
        return
    head = FusedLMHead(plain.in_features, plain.out_features, bias=False, device="meta")
    head.weight, head.fp8, head.compiled_loss = plain.weight, fp8, compiled_loss
    model.lm_head = head.train(plain.training)


class FusedLMHead(GPT2ReproLMHead):
    """`GPT2ReproLMHead`, whose loss takes three matrix products instead of four.

    In decoding, few rows meet a weight of V C numbers, and on a CPU the product takes as long as it
    takes to read them. `nn.Linear` reads them at half the memory's speed; what is here, at all of
    it. The sums are the same in another order: logits equal the usual ones up to rounding.
    """

    fp8 = compiled_loss = False

    def forward(self, hidden_states, labels=None, ignore_index=-100) -> Tensor:
        if labels is not None:
            states, labels = hidden_states.flatten(0, -2), labels.flatten()
            how = {"fp8": self.fp8, "compiled": self.compiled_loss}
            return linear_cross_entropy(states, self.weight, labels, ignore_index, **how)
        if not self._waits_for_memory(hidden_states):
            return super().forward(hidden_states)
        num_rows = hidden_states.shape[:-1].numel()
        if num_rows == 1 and torch.compiler.is_dynamo_compiling():  # it makes one loop of these
            return (hidden_states[..., None, :] * self.weight).sum(dim=-1)
        if not self.weight.dtype == hidden_states.dtype == torch.float32:
            return super().forward(hidden_states)
        # The weight comes first; and a second row, as for one alone the library has one thread.
        rows = hidden_states.reshape(num_rows, self.in_features)
        logits = self.weight @ (rows.repeat(2, 1) if num_rows == 1 else rows).T
        return logits.T[:num_rows].reshape(*hidden_states.shape[:-1], -1).contiguous()

    def _waits_for_memory(self, hidden_states: Tensor) -> bool:
        """Whether few rows meet a large weight on a CPU; what is recorded must take any length."""
        compiling = torch.compiler.is_dynamo_compiling() and SEEMS_EXPORTED
        exporting = torch.compiler.is_exporting() and not compiling
        if exporting or torch.jit.is_tracing():
            return False
        is_dense = type(self.weight) is nn.Parameter  # and neither sharded nor quantized
        on_cpu = hidden_states.device.type == "cpu" and self.weight.numel() >= LARGE_WEIGHT
        return is_dense and on_cpu and 0 < hidden_states.shape[:-1].numel() <= FEW_ROWS
