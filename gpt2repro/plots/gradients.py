"""How large the gradients of a text's loss are, layer by layer."""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gpt2repro.plots.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    VERMILION,
    caption,
    legend_outside,
    logarithmic,
    new_figure,
    short_number,
)

VECTORS = "biases and layer norms"
MARKS = {
    "attn.c_attn": (BLUE, "o"),
    "attn.c_proj": (VERMILION, "s"),
    "mlp.c_fc": (GREEN, "D"),
    "mlp.c_proj": (ORANGE, "^"),
    VECTORS: (MUTED, "."),
}


def gradient_norms(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """L2 norm of each parameter's gradient of the loss on one text `ids` (T,), by name."""
    model.zero_grad()
    with torch.enable_grad():
        model(ids[None], labels=ids[None], use_cache=False).loss.backward()
    norms = {
        name: parameter.grad.norm().item()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return norms


def draw_gradient_norms(norms: dict[str, float], text: str = "") -> Figure:
    """Each layer's gradient norm as a line, its parameters' as dots around it."""
    prefix = "transformer.h."
    layers = 1 + max(int(n.removeprefix(prefix).split(".")[0]) for n in norms if prefix in n)
    points: dict[str, list[tuple[int, float]]] = {}
    squares = np.zeros(layers)
    for name, norm in norms.items():
        if not name.startswith(prefix):
            continue
        layer, kind = name.removeprefix(prefix).split(".", 1)
        squares[int(layer)] += norm**2
        matrix = kind.removesuffix(".weight")
        points.setdefault(matrix if matrix in MARKS else VECTORS, []).append((int(layer), norm))
    totals = np.sqrt(squares)
    figure, ((ax,),) = new_figure(_finding(totals), width=max(8.0, 0.25 * layers + 4))
    ax.plot(range(layers), totals, color=INK, linewidth=2, label="the whole layer")
    for label, (color, marker) in MARKS.items():
        x, y = zip(*points[label], strict=True)
        ax.plot(x, y, marker, color=color, markersize=5, alpha=0.85, label=label)
    for name, label, dashes in (
        ("transformer.wte.weight", "token embedding", (0, (5, 3))),
        ("transformer.wpe.weight", "position embedding", (0, (1, 2))),
    ):
        if norms.get(name):
            ax.axhline(norms[name], color=PURPLE, linestyle=dashes, linewidth=1.5, label=label)
    logarithmic(ax, "gradient norm", "L2")
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    legend_outside(figure, ax, loc="outside right center")
    caption(figure, text)
    return figure


def _finding(totals: np.ndarray) -> str:
    """`totals`: the norm of each layer's gradient."""
    if not np.isfinite(totals).all():
        return "Some layers' gradients are not finite"
    most, least = int(totals.argmax()), int(totals.argmin())
    if not totals[least]:
        return "Some layers receive no gradient"
    return (
        f"The text's gradients are largest in layer {most} (norm {short_number(totals[most])}), "
        f"smallest in layer {least} ({short_number(totals[least])})"
    )
