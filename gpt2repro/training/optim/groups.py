"""The parameters by kind, each once: what an optimizer treats alike."""

from typing import Any

from torch import nn

from gpt2repro.recipe_fields import Recipe

KINDS = ("qkv", "matrices", "embeddings", "positions", "vectors")
MATRICES = ("qkv", "matrices")


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Trainable parameters as an optimizer's groups, of which empty ones are left out.

    `qkv` are the fused query, key and value projections, `matrices` the other weights of the
    blocks, `positions` the position embedding, `vectors` the biases and layer norms, which are not
    decayed. A tied output head is the token embedding and appears once; an untied one counts as an
    embedding.

    A group has the peak of its rate (`lr`, which is `lr_scale` times the recipe's) and of its decay
    (`weight_decay`, `peak_weight_decay`); the schedule moves both.
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
        elif name.endswith("wpe.weight"):
            kind = "positions"
        elif id(parameter) in embedded or name.endswith("lm_head.weight"):
            kind = "embeddings"
        else:
            kind = "qkv" if name.endswith("attn.c_attn.weight") else "matrices"
        groups[kind].append(parameter)
    return [_group(kind, parameters, recipe) for kind, parameters in groups.items() if parameters]


def matrix_scale(recipe: Recipe) -> float:
    """The rate of the blocks' matrices, times `max_lr`."""
    return recipe.muon_lr / recipe.max_lr if recipe.optimizer == "muon" else recipe.matrix_lr_scale


def _group(kind: str, parameters: list[nn.Parameter], recipe: Recipe) -> dict[str, Any]:
    scales = dict.fromkeys(MATRICES, matrix_scale(recipe)) | {
        "embeddings": recipe.embedding_lr_scale,
        "positions": recipe.position_lr_scale,
        "vectors": recipe.vector_lr_scale,
    }
    decays = {"vectors": 0.0}
    if recipe.embedding_weight_decay is not None:
        decays["embeddings"] = recipe.embedding_weight_decay
    if recipe.optimizer == "muon":
        decays |= dict.fromkeys(MATRICES, recipe.muon_weight_decay)
    decay = decays.get(kind, recipe.weight_decay)
    return {
        "params": parameters,
        "name": kind,
        "lr": recipe.max_lr * scales[kind],
        "lr_scale": scales[kind],
        "weight_decay": decay,
        "peak_weight_decay": decay,
        "second_moment": recipe.embedding_second_moment if kind == "embeddings" else "element",
    }
