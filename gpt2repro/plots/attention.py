"""Where the heads of a GPT-2 look while it reads a text.

Shapes: L layers, H heads, T tokens of the text. Layers and heads count from 0, as in the names of
the parameters.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from gpt2repro.plots.style import (
    INK,
    bare,
    caption,
    colour_bar,
    new_figure,
    shades,
)
from gpt2repro.system.text import count_of

HEADS_ABREAST = 3
MOSTLY = 0.5  # the share of a head's attention from which on it is said to look at one place
COPIES, FOLLOWERS = "earlier copies", "what followed earlier copies"
RULE = (
    f"Mostly: more than {MOSTLY:.0%} of a head's attention "
    "(for copies and what followed: where there are any)"
)
WEIGHT = "attention weight (scale by its root)"


@torch.no_grad()
def attention_maps(model: Any, ids: torch.Tensor) -> np.ndarray:
    """Attention weights (L, H, T, T) of a text `ids` (T,): row t says where token t looks."""
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the others never hold the weights
    try:
        attentions = model(ids[None], output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(chosen)
    return torch.cat(attentions).float().numpy()


def attention_habits(attention: np.ndarray, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """How much of its attention each head spends in which way, on average over the text.

    Returns:
        habit -> shares (L, H) in [0, 1]. The last two habits are there if a token occurs twice:
        attention to earlier copies of the token, and to the tokens that followed them, which is
        what an induction head does (Olsson et al. 2022, arXiv 2209.11895). They are averages over
        the tokens that have earlier copies.
    """
    length = attention.shape[-1]
    diagonal = np.diagonal(attention, axis1=-2, axis2=-1)
    previous = np.diagonal(attention, offset=-1, axis1=-2, axis2=-1)
    habits = {
        # In the first rows there is nowhere else to look.
        "the previous token": previous[..., min(1, length - 2) :].mean(-1),
        "the first token": attention[..., min(2, length - 1) :, 0].mean(-1),
        "the token itself": diagonal[..., 1:].mean(-1),
    }
    tokens = np.asarray(ids)
    copies = np.tril(tokens[:, None] == tokens, k=-1)  # (t, j): token j is an earlier copy of t
    repeated = copies.any(-1)
    if repeated.any():
        followers = np.roll(copies, 1, axis=-1)  # j + 1 <= t, so nothing wraps
        habits[COPIES] = (attention * copies).sum(-1)[..., repeated].mean(-1)
        habits[FOLLOWERS] = (attention * followers).sum(-1)[..., repeated].mean(-1)
    return habits


def even_habits(ids: Sequence[int]) -> dict[str, float]:
    """The same shares of a head that looks at all that it may look at evenly: no structure."""
    even = np.tril(np.ones((len(ids), len(ids))))
    habits = attention_habits((even / even.sum(-1, keepdims=True))[None, None], ids)
    return {habit: share.item() for habit, share in habits.items()}


def draw_attention_maps(
    attention: np.ndarray, habits: dict[str, np.ndarray], text: str = ""
) -> Figure:
    """Every head's map of a `text`, as tiles: layers down, heads across."""
    layers, heads, length, _ = attention.shape
    gap = max(1, length // 12)
    pitch = length + gap
    tiles = np.full((layers * pitch - gap, heads * pitch - gap), np.nan)
    for layer in range(layers):
        for head in range(heads):
            top, left = layer * pitch, head * pitch
            tiles[top : top + length, left : left + length] = _causal(attention[layer, head])
    tile = min(1.4, max(0.42, 10 / heads, 6 / layers))
    figure, ((ax,),) = new_figure(
        _habits_finding(habits),
        width=max(7.5, heads * tile + 2),
        height=max(4.5, layers * tile + 1.6),
    )
    image = ax.imshow(tiles, cmap=shades(), norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    bare(ax)
    centres = np.arange(max(layers, heads)) * pitch + (length - 1) / 2
    ax.set_xticks(centres[:heads], range(heads))
    ax.set_yticks(centres[:layers], range(layers))
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    axes = "in a tile: down, the tokens that look; across, those looked at"
    caption(figure, text, f"{axes}\n{RULE}")
    colour_bar(figure, image, ax, WEIGHT)
    return figure


def _causal(weights: np.ndarray) -> np.ndarray:
    """(T, T) without what lies ahead, which is no weight of zero but none."""
    return np.where(np.tri(len(weights), dtype=bool), weights, np.nan)


def _habits_finding(habits: dict[str, np.ndarray]) -> str:
    """How many heads have which main habit."""
    shares = np.stack(list(habits.values()))
    main = np.where(shares.max(0) > MOSTLY, shares.argmax(0), -1)
    counts = {name: int((main == i).sum()) for i, name in enumerate(habits)}
    ordered = sorted(counts, key=counts.__getitem__, reverse=True)
    parts = [f"{counts[name]} at {name}" for name in ordered if counts[name]]
    if not parts:
        return f"None of {count_of(main.size, 'head')} looks mostly at one place"
    return f"Of {count_of(main.size, 'head')} these look mostly at one place: {', '.join(parts)}"


def typical_heads(habits: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """For each main habit the (layer, head) that has it most; the strongest others fill the row."""
    shares = np.stack(list(habits.values()))  # (habits, L, H)
    main, free = shares.argmax(0), np.ones(shares.shape[1:], dtype=bool)
    chosen: list[tuple[int, int]] = []

    def choose(candidates: np.ndarray) -> None:
        if candidates.any():
            best = np.where(candidates, shares.max(0), -1).argmax()
            layer, head = map(int, np.unravel_index(best, free.shape))
            free[layer, head] = False
            chosen.append((layer, head))

    for habit in range(len(shares)):
        choose(free & (main == habit))
    for _ in range(-(-len(shares) // HEADS_ABREAST) * HEADS_ABREAST - len(chosen)):
        choose(free)
    return chosen


def draw_attention_heads(
    attention: np.ndarray,
    habits: dict[str, np.ndarray],
    labels: Sequence[str],
    heads: Sequence[tuple[int, int]],
    even: dict[str, float],
    text: str = "",
) -> Figure:
    """The maps of chosen (layer, head) pairs, large, with the tokens written along both axes.

    `even`: the shares of `even_habits`, without which a share says nothing.
    """
    columns = min(HEADS_ABREAST, len(heads))
    rows = -(-len(heads) // columns)
    side = max(3.2, min(6.0, 0.19 * len(labels) + 0.6))  # inches: a title's lines have room
    size = min(8.0, 0.75 * 72 * side / len(labels))  # points: labels must not touch
    figure, axes = new_figure(
        _heads_finding(habits, heads),
        width=max(7.0, columns * side + 1.6),
        height=rows * (side + 0.6) + 1.4,
        rows=rows,
        columns=columns,
        sharex=True,
        sharey=True,
    )
    for ax in axes.flat[len(heads) :]:
        ax.set_visible(False)
    ticks = np.arange(len(labels))
    for ax, (layer, head) in zip(axes.flat, heads, strict=False):
        image = ax.imshow(_causal(attention[layer, head]), cmap=shades(), norm=PowerNorm(0.5, 0, 1))
        bare(ax)
        described = _describe_head(habits, even, (layer, head))
        ax.set_title(described, fontsize=9.5, loc="left", color=INK)
        ax.set_xticks(ticks, labels, rotation=90, fontsize=size, parse_math=False)
        ax.set_yticks(ticks, labels, fontsize=size, parse_math=False)
    for ax in axes.flat[: len(heads)][-columns:]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
    caption(figure, text, f"down, the tokens that look; across, those looked at\n{RULE}")
    colour_bar(figure, image, axes, WEIGHT)
    return figure


def _heads_finding(habits: dict[str, np.ndarray], heads: Sequence[tuple[int, int]]) -> str:
    """The head that looks most at one place, if one does."""
    share, name, place = max(
        (habits[name][place], name, place) for place in heads for name in habits
    )
    if share <= MOSTLY:
        return "No head here looks mostly at one place"
    head = f"Head {place[1]} of layer {place[0]}"
    where = ", where there are any" if name in (COPIES, FOLLOWERS) else ""
    return f"{head} looks at {name} with {share:.0%} of its attention{where}"


def _describe_head(
    habits: dict[str, np.ndarray], even: dict[str, float], place: tuple[int, int]
) -> str:
    name = max(habits, key=lambda habit: habits[habit][place])
    share = f"{habits[name][place]:.0%}; an even head: {even[name]:.0%}"
    mostly = "mostly" if habits[name][place] > MOSTLY else "not mostly anywhere; most"
    return f"layer {place[0]}, head {place[1]}: {mostly}\nat {name}\n({share})"
