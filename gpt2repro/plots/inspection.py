"""What happens inside a GPT-2 that reads a text: attention, the logit lens, gradients.

Each is measured as plain arrays first, then drawn. Shapes: L layers, H heads, T tokens of the text,
V the vocabulary. Layers and heads count from 0, as in the names of the parameters.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gpt2repro.plots.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PALETTE,
    PURPLE,
    VERMILION,
    bare,
    colour_bar,
    legend,
    legend_below,
    logarithmic,
    new_figure,
    percent,
    shades,
    short_number,
    token_labels,
)

HEADS_ABREAST = 3
MOST_ROWS = 13  # layers shown as rows of text: all of the 124M model, every fourth of the largest
VECTORS = "biases and layer norms"
MARKS = {
    "attn.c_attn": (BLUE, "o"),
    "attn.c_proj": (VERMILION, "s"),
    "mlp.c_fc": (GREEN, "D"),
    "mlp.c_proj": (ORANGE, "^"),
    VECTORS: (MUTED, "."),
}


# --- Attention ----------------------------------------------------------------------------------


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
        what an induction head does (Olsson et al. 2022, arXiv 2209.11895).
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
        habits["earlier copies"] = (attention * copies).sum(-1)[..., repeated].mean(-1)
        habits["what followed earlier copies"] = (
            (attention * followers).sum(-1)[..., repeated].mean(-1)
        )
    return habits


def draw_attention_maps(attention: np.ndarray, habits: dict[str, np.ndarray]) -> Figure:
    """Every head's map, as tiles: layers down, heads across."""
    layers, heads, length, _ = attention.shape
    gap = max(1, length // 12)
    pitch = length + gap
    tiles = np.full((layers * pitch - gap, heads * pitch - gap), np.nan)
    for layer in range(layers):
        for head in range(heads):
            top, left = layer * pitch, head * pitch
            tiles[top : top + length, left : left + length] = attention[layer, head]
    tile = min(1.4, max(0.42, 10 / heads, 6 / layers))
    figure, ((ax,),) = new_figure(
        habits_finding(habits),
        width=max(7.5, heads * tile + 2),
        height=max(4.5, layers * tile + 1.6),
    )
    image = ax.imshow(tiles, cmap=shades(), norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    bare(ax)
    centres = np.arange(max(layers, heads)) * pitch + (length - 1) / 2
    ax.set_xticks(centres[:heads], range(heads))
    ax.set_yticks(centres[:layers], range(layers))
    ax.set_xlabel("head (in each tile: from the first to the last token that is looked at)")
    ax.set_ylabel("layer (in each tile: from the first to the last token that looks)")
    colour_bar(figure, image, ax, "attention weight")
    return figure


def habits_finding(habits: dict[str, np.ndarray]) -> str:
    """How many heads have which main habit."""
    shares = np.stack(list(habits.values()))
    main = np.where(shares.max(0) > 0.5, shares.argmax(0), -1)
    counts = {name: int((main == i).sum()) for i, name in enumerate(habits)}
    counts["no one place"] = int((main == -1).sum())
    parts = [
        f"{name} {counts[name]}" for name in sorted(counts, key=counts.__getitem__, reverse=True)
    ]
    shown = [part for part in parts if not part.endswith(" 0")]
    return f"Where {main.size} attention heads mostly look: {', '.join(shown)}"


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
) -> Figure:
    """The maps of chosen (layer, head) pairs, large, with the tokens written along both axes."""
    columns = min(HEADS_ABREAST, len(heads))
    rows = -(-len(heads) // columns)
    side = max(2.6, min(6.0, 0.19 * len(labels) + 0.6))  # inches
    size = min(8.0, 0.75 * 72 * side / len(labels))  # points: labels must not touch
    described = [_describe_head(habits, place) for place in heads]
    figure, axes = new_figure(
        f"Head {'; '.join(described[:3])}",
        width=max(7.0, columns * side + 1.6),
        height=rows * (side + 0.4) + 1.4,
        rows=rows,
        columns=columns,
        sharex=True,
        sharey=True,
    )
    for ax in axes.flat[len(heads) :]:
        ax.set_visible(False)
    ticks = np.arange(len(labels))
    for ax, (layer, head), text in zip(axes.flat, heads, described, strict=False):
        weights = np.where(np.tri(len(labels), dtype=bool), attention[layer, head], np.nan)
        image = ax.imshow(weights, cmap=shades(), norm=PowerNorm(0.5, 0, 1))
        bare(ax)
        ax.set_title(text, fontsize=9.5, loc="left", color=INK)
        ax.set_xticks(ticks, labels, rotation=90, fontsize=size, parse_math=False)
        ax.set_yticks(ticks, labels, fontsize=size, parse_math=False)
    figure.supxlabel(
        "the token that is looked at (heads are named layer.head)", fontsize=10, color=INK
    )
    figure.supylabel("the token that looks", fontsize=10, color=INK)
    colour_bar(figure, image, axes, "attention weight")
    return figure


def _describe_head(habits: dict[str, np.ndarray], place: tuple[int, int]) -> str:
    name = max(habits, key=lambda habit: habits[habit][place])
    return f"{place[0]}.{place[1]} looks at {name} ({habits[name][place]:.0%})"


# --- The logit lens -----------------------------------------------------------------------------


@torch.no_grad()
def logit_lens(model: Any, ids: torch.Tensor, positions: int) -> np.ndarray:
    """Next-token probabilities (L + 1, positions, V) if the model stopped after each layer.

    Row 0 reads the embeddings, row L is the model's real prediction, for the last `positions`
    tokens of the text `ids` (T,). The final LayerNorm and the output projection are applied to the
    residual stream (nostalgebraist 2020, "interpreting GPT: the logit lens").
    """
    stream: list[torch.Tensor] = []
    body = model.transformer
    hooks = [body.drop.register_forward_hook(lambda _m, _a, out: stream.append(out))]
    hooks += [
        block.register_forward_hook(
            lambda _m, _a, out: stream.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in body.h
    ]
    try:
        model(ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    rows = torch.cat(stream)[:, -positions:]
    return model.lm_head(body.ln_f(rows)).float().softmax(-1).numpy()


def draw_logit_lens(lens: np.ndarray, labels: Sequence[str], tokenizer: Any) -> Figure:
    """The first choice after each layer, shaded by its probability; the last one's as lines too."""
    layers = len(lens) - 1
    shown = sorted(set(np.linspace(0, layers, min(layers + 1, MOST_ROWS)).round().astype(int)))
    lens, positions = lens[shown], lens.shape[1]
    best, chance = lens.argmax(-1), lens.max(-1)
    figure, ((ax, side),) = new_figure(
        lens_finding(lens, shown, labels, tokenizer),
        width=0.82 * positions + 4.6,
        height=0.36 * len(shown) + 2.4,
        columns=2,
        sharey=True,
        width_ratios=(0.82 * positions, 3),
    )
    image = ax.imshow(chance, cmap=shades(), vmin=0, vmax=1, aspect="auto", origin="lower")
    bare(ax)
    for row in range(len(shown)):
        for column, word in enumerate(token_labels(tokenizer, best[row], most=9)):
            color = "white" if chance[row, column] > 0.55 else INK
            ax.text(
                column, row, word, ha="center", va="center", fontsize=8, color=color,
                parse_math=False,
            )  # fmt: skip
    ax.set_xticks(range(positions), labels, fontsize=9, rotation=35, ha="right", parse_math=False)
    ax.set_yticks(
        range(len(shown)), [f"after layer {n - 1}" if n else "embedding" for n in shown], fontsize=9
    )
    ax.set_xlabel("token after which the next one is predicted")
    ax.set_title("first choice for the next token", fontsize=9.5, loc="left", color=INK)
    colour_bar(figure, image, [ax, side], "probability of the first choice")

    leaders = np.argsort(-lens[-1, -1])[:5]
    words = token_labels(tokenizer, leaders.tolist())
    for color, index, word in zip(PALETTE, leaders, words, strict=False):
        label = f"{word}  {percent(lens[-1, -1, index])}"
        side.plot(lens[:, -1, index], range(len(shown)), color=color, marker=".", label=label)
    side.set_xlim(left=0)
    side.set_xlabel("probability")
    side.xaxis.set_major_locator(MaxNLocator(4))
    side.xaxis.set_major_formatter(FuncFormatter(percent))
    side.tick_params(labelleft=False)
    side.set_title(f"the final choices after {labels[-1]}", fontsize=9.5, loc="left", color=INK)
    side.title.set_parse_math(False)
    legend(side, loc="best")
    return figure


def lens_finding(
    lens: np.ndarray, shown: Sequence[int], labels: Sequence[str], tokenizer: Any
) -> str:
    final = lens[-1, -1].argmax()
    agrees = lens[:, -1].argmax(-1) == final
    first = shown[len(agrees) - int(np.argmin(agrees[::-1]))] if not agrees.all() else 0
    (word,) = token_labels(tokenizer, [final])
    since = f"after layer {first - 1}" if first else "at the embedding"
    return (
        f"After “{labels[-1]}”, “{word}” becomes the first choice {since} (the last is "
        f"{shown[-1] - 1}) and ends at {percent(lens[-1, -1, final])}"
    )


# --- Gradients ----------------------------------------------------------------------------------


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


def draw_gradient_norms(norms: dict[str, float]) -> Figure:
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
    most, least = int(totals.argmax()), int(totals.argmin())
    figure, ((ax,),) = new_figure(
        f"Gradients are largest in layer {most} (norm {short_number(totals[most])}) "
        f"and smallest in layer {least} ({short_number(totals[least])})"
        if totals[least] > 0
        else "Some layers receive no gradient",
        width=max(8.0, 0.25 * layers + 4),
    )
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
    logarithmic(ax)
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    ax.set_ylabel("gradient norm (L2, log scale)")
    legend_below(figure, ax)
    return figure
