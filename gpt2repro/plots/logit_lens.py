"""What a GPT-2 would predict if it stopped after each of its L layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gpt2repro.plots.style import (
    INK,
    PALETTE,
    bare,
    caption,
    colour_bar,
    legend,
    new_figure,
    percent,
    shades,
    token_labels,
)

MOST_ROWS = 13  # layers shown as rows of text: all of the 124M model, every fourth of the largest


@torch.no_grad()
def logit_lens(model: Any, ids: torch.Tensor, positions: int) -> np.ndarray:
    """Next-token probabilities (L + 1, positions, V) if the model stopped after each layer.

    Row 0 reads the embeddings, row L is the model's real prediction, for the last `positions`
    tokens of the text `ids` (T,). The final LayerNorm and the output projection are applied to the
    residual stream (nostalgebraist 2020, "interpreting GPT: the logit lens").
    """
    read = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
    rows = torch.cat(read)[:, -positions:]
    rows[:-1] = model.transformer.ln_f(rows[:-1])  # the last ones went through it
    return model.lm_head(rows).float().softmax(-1).numpy()


def draw_logit_lens(
    lens: np.ndarray, labels: Sequence[str], tokenizer: Any, text: str = ""
) -> Figure:
    """The first choice after each layer, shaded by its probability; the last one's as lines too."""
    layers = len(lens) - 1
    shown = sorted(set(np.linspace(0, layers, min(layers + 1, MOST_ROWS)).round().astype(int)))
    found = _lens_finding(lens, labels, tokenizer)
    lens, positions = lens[shown], lens.shape[1]
    best, chance = lens.argmax(-1), lens.max(-1)
    title: dict[str, Any] = {"fontsize": 9.5, "loc": "left", "color": INK}
    figure, ((ax, side),) = new_figure(
        found,
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
    ax.set_title("likeliest next token, had the model ended there", **title)
    colour_bar(figure, image, ax, "its probability")

    leaders = np.argsort(-lens[-1, -1])[:5]
    words = token_labels(tokenizer, leaders.tolist())
    for color, index, word in zip(PALETTE, leaders, words, strict=False):
        label = f"{word}  {percent(lens[-1, -1, index])}"
        side.plot(lens[:, -1, index], range(len(shown)), color=color, marker=".", label=label)
    side.set_xlim(left=0)
    side.set_xlabel("probability")
    side.xaxis.set_major_locator(MaxNLocator(4))
    side.xaxis.set_major_formatter(FuncFormatter(percent))
    side.tick_params(labelleft=True)
    side.set_title(f"the final choices after the last {labels[-1]}", **title)
    side.title.set_parse_math(False)
    legend(side, loc="best")
    caption(figure, text, f"shown: its last {positions} tokens" if text else "")
    return figure


def _lens_finding(lens: np.ndarray, labels: Sequence[str], tokenizer: Any) -> str:
    """From which layer on the last choice stands: all are asked, also those that are not shown."""
    final = lens[-1, -1].argmax()
    agrees = lens[:, -1].argmax(-1) == final
    first = len(agrees) - int(np.argmin(agrees[::-1])) if not agrees.all() else 0
    (word,) = token_labels(tokenizer, [final])
    since = f"after layer {first - 1}" if first else "at the embedding"
    return (
        f"After the last “{labels[-1]}” of the text, “{word}” is the first choice {since} and on, "
        f"at {percent(lens[-1, -1, final])} in the end"
    )
