"""Benchmarks of a model, a baseline and the published, as dots with error bars."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from gpt2repro.evaluation.estimates import Estimate
from gpt2repro.plots.style import MUTED, PALETTE, caption, legend_outside, new_figure, percent

INTERVAL = 1.96  # standard errors on each side: 95 %, were they normal
INCHES_PER_ROW = 0.34
# A panel for each kind: what the names of its figures hold, and its axis.
PANELS = {
    "share right": ("acc", "core", "exact_match", "f1"),
    "bits per byte": ("bits_per_byte",),
    "perplexity (logarithmic)": ("perplexity",),
}


def benchmark_dots(
    names: Sequence[str],
    values: Sequence[Mapping[str, Estimate]],
    published: Mapping[str, tuple[float, str]],
) -> Figure:
    """A row for each figure, a panel for each kind of figure; others are left to the table.

    names, values: of the models, ours first. published: (value, source) by figure.
    """
    panels = {axis: _of_kind(values[0], words) for axis, words in PANELS.items()}
    panels = {axis: keys for axis, keys in panels.items() if keys} or {"value": [*values[0]]}
    sizes = [len(keys) for keys in panels.values()]
    figure, axes = new_figure(
        _finding(names, values, panels),
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
        if axis == "share right":
            ax.xaxis.set_major_formatter(FuncFormatter(percent))
    legend_outside(figure, axes[0, 0], loc="outside lower right")
    caption(figure, "", above="Bars: 1.96 standard errors over rows, on each side.")
    return figure


def _plain(value: float, _position: int | None = None) -> str:
    return f"{value:g}"


def _of_kind(found: Mapping[str, Estimate], words: Sequence[str]) -> list[str]:
    metrics = {key: key.rpartition("/")[2] for key in found}
    return [key for key, metric in metrics.items() if any(word in metric for word in words)]


def _finding(
    names: Sequence[str],
    values: Sequence[Mapping[str, Estimate]],
    panels: Mapping[str, Sequence[str]],
) -> str:
    right = panels.get("share right", [])
    if len(values) < 2 or not right:
        return f"{names[0]} on {sum(map(len, panels.values()))} figures"
    ahead = sum(values[0][key].value > values[1][key].value for key in right)
    return f"{names[0]} is ahead of {names[1]} in {ahead} of {len(right)} accuracies"
