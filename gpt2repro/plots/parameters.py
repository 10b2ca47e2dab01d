"""What a GPT-2 has stored: its embeddings and the distributions of its weights.

Each is measured as plain arrays first, then drawn. Shapes: L layers, V the vocabulary, N positions.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from gpt2repro.plots.style import (
    BLUE,
    INK,
    MUTED,
    VERMILION,
    bare,
    colour_bar,
    legend_outside,
    new_figure,
    signed,
    token_labels,
)

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
SAMPLED_WEIGHTS = 100_000  # of a matrix; enough for the shape of its distribution


# --- Embeddings -----------------------------------------------------------------------------------


@torch.no_grad()
def position_similarity(model: Any) -> np.ndarray:
    """Cosine similarities (N, N) of the position embeddings."""
    unit = nn.functional.normalize(model.transformer.wpe.weight.float(), dim=-1)
    return (unit @ unit.T).numpy()


def draw_position_similarity(similarity: np.ndarray) -> Figure:
    """The similarities as a map, and their mean as a function of the distance."""
    size = len(similarity)
    by_distance = np.array([np.diagonal(similarity, d).mean() for d in range(size)])
    far = size // 2
    figure, ((ax, side),) = new_figure(
        f"Neighbouring positions have cosine similarity {signed(by_distance[1])}, "
        f"positions {far} apart {signed(by_distance[far])}",
        width=10,
        height=4.8,
        columns=2,
    )
    image = ax.imshow(similarity, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    bare(ax)
    ax.set_xlabel("position")
    ax.set_ylabel("position")
    colour_bar(figure, image, ax, "cosine similarity of the embeddings")
    kept = size - max(1, size // 16)  # the longest distances average over a handful of pairs
    side.plot(np.arange(1, kept), by_distance[1:kept], color=BLUE, linewidth=2)
    side.axhline(0, color=MUTED, linewidth=1)
    side.set_ylim(min(-0.3, by_distance.min() - 0.05), 1.03)
    side.set_xlabel("distance between two positions (tokens)")
    side.set_ylabel("mean cosine similarity")
    return figure


@torch.no_grad()
def token_neighbours(
    model: Any, ids: Sequence[int], count: int = 6
) -> list[list[tuple[int, float]]]:
    """For each token its `count` nearest others by cosine of the embeddings, as (id, cosine)."""
    unit = nn.functional.normalize(model.transformer.wte.weight.float(), dim=-1)
    rows = torch.as_tensor(ids)
    cosines = unit[rows] @ unit.T  # (len(ids), V)
    cosines[torch.arange(len(rows)), rows] = -torch.inf
    values, indices = cosines.topk(min(count, unit.shape[0] - 1))
    return [
        list(zip(row.tolist(), values.tolist(), strict=True))
        for row, values in zip(indices, values, strict=True)
    ]


def neighbours_table(
    neighbours: list[list[tuple[int, float]]], ids: Sequence[int], tokenizer: Any
) -> str:
    """A Markdown table that reads as well on a terminal."""
    header = ["token", *(f"nearest {n + 1}" for n in range(len(neighbours[0])))]
    rows = [header]
    for word, nearest in zip(token_labels(tokenizer, ids), neighbours, strict=True):
        others = token_labels(tokenizer, [index for index, _ in nearest])
        rows.append([word, *(f"{o} {c:.2f}" for o, (_, c) in zip(others, nearest, strict=True))])
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * width for width in widths])
    lines = ("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)
    return "\n".join(lines) + "\n"


# --- Weights --------------------------------------------------------------------------------------


@torch.no_grad()
def weight_samples(model: Any) -> dict[str, list[np.ndarray]]:
    """Evenly spaced weights of the four matrices of every block: name -> one array a layer."""
    samples: dict[str, list[np.ndarray]] = {}
    for name in MATRICES:
        weights = [block.get_submodule(name).weight for block in model.transformer.h]
        stride = -(-weights[0].numel() // SAMPLED_WEIGHTS)
        while math.gcd(stride, weights[0].shape[1]) > 1:  # it would meet the same few columns
            stride += 1
        samples[name] = [w.flatten()[::stride].float().numpy() for w in weights]
    return samples


def draw_weights(samples: dict[str, list[np.ndarray]], initializer_range: float) -> Figure:
    """One distribution a layer and matrix, beside the spread that it was initialized with."""
    layers = len(samples[MATRICES[0]])
    initial = {
        name: initializer_range / (2 * layers) ** 0.5
        if name.endswith("c_proj")
        else initializer_range
        for name in MATRICES
    }
    spread = {
        (name, layer): values.std()
        for name, rows in samples.items()
        for layer, values in enumerate(rows)
    }
    widest = max(spread, key=lambda key: spread[key] / (initial[key[0]] or 1))
    name, layer = widest
    deviation = f"standard deviation {spread[widest]:.3f}"
    title = f"{name} of layer {layer} is widest: {deviation}"
    if initial[name]:
        title = f"{name} of layer {layer} is widest against its initialization: {deviation}, "
        title += f"{spread[widest] / initial[name]:.1f} times that one"
    figure, axes = new_figure(
        title,
        width=max(9.0, 0.28 * layers + 5),
        height=6.5,
        rows=2,
        columns=2,
        sharex=True,
        sharey=True,  # else all matrices would look equally wide
    )
    for ax, (name, rows) in zip(axes.flat, samples.items(), strict=True):
        _violins(ax, rows)
        for sign in (-1, 1):
            label = "± one standard deviation at initialization" if sign > 0 else None
            ax.axhline(
                sign * initial[name], color=VERMILION, linestyle=(0, (5, 3)), linewidth=1.2,
                label=label,
            )  # fmt: skip
        ax.set_title(name, fontsize=10, loc="left", color=INK)
    for ax in axes[-1]:
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    for ax in axes[:, 0]:
        ax.set_ylabel("weight")
    legend_outside(figure, axes[0, 0], loc="outside lower left", ncols=4)
    return figure


def _violins(ax: Axes, rows: list[np.ndarray]) -> None:
    """The middle 99.8% of each array as a mirrored density, with a bar of ± one deviation."""
    limit = max(float(np.quantile(np.abs(values), 0.998)) for values in rows)
    edges = np.linspace(-limit, limit, 121)
    centres = (edges[1:] + edges[:-1]) / 2
    for layer, values in enumerate(rows):
        density = np.histogram(values, edges)[0].astype(float)
        width = 0.42 * density / density.max()
        inside = density > 0
        ax.fill_betweenx(
            centres[inside], layer - width[inside], layer + width[inside], color=BLUE, alpha=0.35,
            linewidth=0,
        )  # fmt: skip
        deviation = values.std()
        ax.plot(
            [layer] * 2, [-deviation, deviation], color=BLUE, linewidth=2.5, solid_capstyle="butt",
            marker="" if deviation else ".", label=None if layer else "± one standard deviation",
        )  # fmt: skip
