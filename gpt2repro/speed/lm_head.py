"""The output layer, whose loss takes one pass over the logits.

Nothing depends on it. `use_in(model)` puts it in the place of the model's own, with the same weight
under the same name: what is saved, and what others load, knows nothing of it.
"""

from torch import Tensor

from gpt2repro.speed.fused_cross_entropy import linear_cross_entropy
from modeling_gpt2repro import GPT2ReproForCausalLM, GPT2ReproLMHead


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
    """`GPT2ReproLMHead`, whose loss takes three matrix products instead of four."""

    fp8 = compiled_loss = False

    def forward(self, hidden_states, labels=None, ignore_index=-100) -> Tensor:
        if labels is None:
            return super().forward(hidden_states)
        states, labels = hidden_states.flatten(0, -2), labels.flatten()
        how = {"fp8": self.fp8, "compiled": self.compiled_loss}
        return linear_cross_entropy(states, self.weight, labels, ignore_index, **how)
