"""The parameters by kind, each once: what an optimizer treats alike."""

from typing import Any

from torch import nn

KINDS = ("qkv", "matrices", "embeddings", "vectors")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters as an optimizer's groups, of which empty ones are left out.

    `qkv` are the fused query, key and value projections, `matrices` the other weights of the
    blocks, `vectors` the biases and layer norms, which are not decayed. A tied output head is the
    token embedding and appears once; an untied one counts as an embedding.
    """
    embedded = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            kind = "vectors"
        elif id(parameter) in embedded or name.endswith("lm_head.weight"):
            kind = "embeddings"
        else:
            kind = "qkv" if name.endswith("attn.c_attn.weight") else "matrices"
        groups[kind].append(parameter)
    return [
        {
            "params": parameters,
            "name": kind,
            "weight_decay": 0.0 if kind == "vectors" else weight_decay,
            "lr_scale": 1.0,
        }
        for kind, parameters in groups.items()
        if parameters
    ]
