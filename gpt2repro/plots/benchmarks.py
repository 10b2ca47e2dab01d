"""Benchmarks with error bars: of models side by side as dots, of runs as they train as curves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from gpt2repro.plots import curves
from gpt2repro.plots.curves import Metrics
from gpt2repro.plots.style import (
    INK,
    MUTED,
    PALETTE,
    ShortNumbers,
    caption,
    legend_outside,
    middle_cut,
    new_figure,
    percent,
)
from gpt2repro.records.metrics import is_number

if TYPE_CHECKING:
    from gpt2repro.evaluation.tables import Table

INTERVAL = 1.96  # standard errors on each side: 95 %, were they normal
INCHES_PER_ROW = 0.34
MOST_PANELS = 12  # of a picture of curves
LONGEST_TITLE = 28  # letters of a panel's line
SHARE = "share right"
# A panel for each kind: what the names of its figures hold, and its axis.
PANELS = {
    SHARE: ("acc", "exact_match"),
    "F1": ("f1",),
    "CORE (0: guessing, 1: all right)": ("core",),
    "bits per byte": ("bits_per_byte",),
    "perplexity (logarithmic)": ("perplexity",),
}


def benchmark_dots(table: "Table") -> Figure:
    """A row for each figure of all models, a panel for each kind; others are left to the table."""
    names, values, published = table.names, table.values, table.published_of_these_rows()
    common = [key for key in values[0] if all(key in found for found in values)]
    panels = {axis: _of_kind(common, words) for axis, words in PANELS.items()}
    panels = {axis: keys for axis, keys in panels.items() if keys} or {"value": common}
    sizes = [len(keys) for keys in panels.values()]
    figure, axes = new_figure(
        _finding(table, panels),
        height=1.6 + sum(sizes) * INCHES_PER_ROW + 0.6 * len(sizes),
        rows=len(panels),
        gridspec_kw={"height_ratios": [size + 0.8 for size in sizes]},
    )
    for ax, (axis, keys) in zip(axes[:, 0], panels.items(), strict=True):
        places = np.arange(len(keys))
        for at, (name, found) in enumerate(zip(names, values, strict=True)):
            shift = 0.12 * (2 * at - len(names) + 1)
            ours = [found[key].value for key in keys]
            errors = [np.nan_to_num(INTERVAL * found[key].stderr) for key in keys]
            style = {"fmt": "o", "markersize": 5, "capsize": 2, "color": PALETTE[at]}
            ax.errorbar(ours, places + shift, xerr=errors, label=name, **style)
        told = [(published[key][0], place) for key, place in zip(keys, places, strict=True)
                if key in published]  # fmt: skip
        if told:
            style = {"marker": "D", "facecolors": "none", "edgecolors": MUTED, "s": 36}
            ax.scatter(*zip(*told, strict=True), label="published, not computed", **style)
        ax.set_yticks(places, keys)
        ax.set_ylim(len(keys) - 0.5, -0.5)
        ax.set_xlabel(axis)
        if axis.endswith("(logarithmic)"):
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter(FuncFormatter(_plain))
            ax.xaxis.set_minor_formatter(FuncFormatter(_plain))
        if axis == SHARE:
            ax.xaxis.set_major_formatter(FuncFormatter(percent))
    legend_outside(figure, axes[0, 0], loc="outside lower right")
    caption(figure, "", above="Bars: 1.96 standard errors over rows, on each side.")
    return figure


def _plain(value: float, _position: int | None = None) -> str:
    return f"{value:g}"


def _of_kind(names: Sequence[str], words: Sequence[str]) -> list[str]:
    """The figures whose metric has one of the `words`; of `brier_score` none is `core`."""
    metrics = {name: f"_{name.rpartition('/')[2].partition(',')[0]}_" for name in names}
    return [name for name, metric in metrics.items() if any(f"_{w}_" in metric for w in words)]


def _finding(table: "Table", panels: Mapping[str, Sequence[str]]) -> str:
    names, values, right = table.names, table.values, panels.get(SHARE, [])
    if len(values) < 2 or not right:
        return f"{names[0]} on {sum(map(len, panels.values()))} figures"
    ahead = sum(values[0][key].value > values[1][key].value for key in right)
    return f"{names[0]} is ahead of {names[1]} in {ahead} of {len(right)} accuracies"


# --- Of runs --------------------------------------------------------------------------------------


def draw_benchmarks(runs: Mapping[str, Metrics], names: Sequence[str]) -> Figure:
    """A panel for each of the first figures, over what was trained on before it was scored."""
    shown, x_key = names[:MOST_PANELS], curves.x_key_of(runs)
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    title = f"{len(shown)} of {len(names)} figures" if len(names) > len(shown) else ""
    figure, axes = new_figure(
        title or f"Benchmarks: {', '.join(shown)}",
        height=1.2 + 2.4 * rows,
        rows=rows,
        columns=columns,
        sharex=True,
    )
    for ax, key in zip(axes.flat, shown, strict=False):
        for color, (run, metrics) in zip(PALETTE, runs.items(), strict=False):
            lines = [
                line for line in metrics if f"{key}_stderr" in line and is_number(line.get(key))
            ]
            steps, value = curves.series(lines, key, "step")
            told = [line[f"{key}_stderr"] for line in lines]
            error = np.array([each if is_number(each) else np.nan for each in told])
            x = curves.before(steps, metrics, x_key)
            ax.plot(x, value, "o-", color=color, markersize=3, label=run or None)
            if np.isfinite(error).any():
                low, high = value - INTERVAL * error, value + INTERVAL * error
                ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        task, slash, metric = key.rpartition("/")
        parts = [task + slash, metric] if slash and len(key) > LONGEST_TITLE else [key]
        title = "\n".join(middle_cut(part, LONGEST_TITLE) for part in parts)
        ax.set_title(title, loc="left", fontsize=9, color=INK)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax in axes.flat[: len(shown)][-columns:]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("tokens" if x_key == "tokens" else "step")
        if x_key == "tokens":
            ax.xaxis.set_major_formatter(ShortNumbers())
    if len(runs) > 1:
        legend_outside(figure, axes[0, 0], loc="outside lower right")
    caption(figure, "", above="Bands: 1.96 standard errors over rows, on each side.")
    return figure
