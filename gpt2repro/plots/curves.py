"""A run's curves: loss, learning rate, gradient norm, throughput. Several runs can be overlaid.

A run that is still going draws its own loss.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gpt2repro.plots.style import (
    MUTED,
    PALETTE,
    ShortNumbers,
    legend,
    logarithmic,
    new_figure,
    reference_line,
    save,
)
from gpt2repro.records.metrics import comparable, is_number

logger = logging.getLogger(__name__)

Metrics = Sequence[Mapping[str, Any]]  # the lines of a metrics.jsonl
LEAST_CONNECTED, MOST_MARKED = 8, 40  # evaluations
FAR = 1e9  # steps
AVERAGE = "moving average; faint: each logged step"


# --- Reading metrics ------------------------------------------------------------------------------


def series(metrics: Metrics, key: str, x_key: str) -> tuple[np.ndarray, np.ndarray]:
    """The records that hold finite `x_key` and `key`, as two float arrays (n,)."""
    points = [
        (record[x_key], record[key])
        for record in metrics
        if is_number(record.get(x_key)) and is_number(record.get(key))
    ]
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    return x, y


def validations(
    metrics: Metrics, x_key: str, key: str = "val_loss"
) -> tuple[np.ndarray, np.ndarray]:
    """Validation losses at what was trained on *before* them: the first one at nothing."""
    step, loss = series(comparable(metrics), key, "step")
    return before(step, metrics, x_key), loss


def before(step: Any, metrics: Metrics, x_key: str) -> Any:
    """Where steps, or a step, begin on the axis: at the tokens that were seen before."""
    return np.interp(step, *_steps_and_tokens(metrics)) if x_key == "tokens" else step


def _steps_and_tokens(metrics: Metrics) -> tuple[np.ndarray, np.ndarray]:
    """Steps done and tokens seen by then, as they were logged: a step may take several batches.

    A point far before and one far after go on as it begins and ends.
    """
    logged = series([record for record in metrics if "loss" in record], "tokens", "step")
    tokens_at = dict(zip(*logged, strict=True))  # of lines of the same step the last
    step, tokens = np.array(sorted(tokens_at.items())).reshape(-1, 2).T
    done, seen = np.append(0.0, step + 1), np.append(0.0, tokens)
    first, last = (np.diff(seen)[at] / np.diff(done)[at] for at in (0, -1))
    ends = -FAR, done[-1] + FAR
    return (
        np.concatenate([ends[:1], done, ends[1:]]),
        np.concatenate([[-FAR * first], seen, [seen[-1] + FAR * last]]),
    )


def x_key_of(runs: Mapping[str, Metrics]) -> str:
    """Runs with different batches compare by tokens; `step` serves where tokens were not logged."""
    every = runs.values()
    logged = (any(line.get("tokens") for line in lines if "loss" in line) for lines in every)
    return "tokens" if all(logged) else "step"


def smooth(values: np.ndarray) -> np.ndarray:
    """A moving average over 4% of the run, which does not lag: as many before a value as after it.

    At the beginning there are fewer of both, so that it begins where the values do. At the end
    those after are missing, and it lags by at most 1% of the run.
    """
    index = np.arange(len(values))
    reach = np.minimum(len(values) // 50, index)
    low, high = index - reach, np.minimum(index + reach + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[high] - sums[low]) / (high - low)


# --- Loss -----------------------------------------------------------------------------------------


def loss_curve(
    metrics: Metrics,
    output: Path,
    *,
    baseline: tuple[str, float] | None = None,
    resumed_at: Sequence[int] = (),
) -> list[Path]:
    """Draw training and validation loss for a run that is still going; never raises.

    Args:
        metrics: the records of a metrics.jsonl; any key may be missing.
        output: it is written as .png and as .svg, whatever its ending, atomically.
        baseline: a label and its loss in nats per token, drawn as a dashed line.
        resumed_at: steps where a launch went on, drawn as dotted lines.

    Returns:
        The files written; none if drawing failed, which is logged: no picture is worth a run.
    """
    try:
        figure = draw_losses({"": metrics}, baseline=baseline, resumed_at=resumed_at)
        return save(figure, output.with_suffix(""))
    except Exception as error:
        logger.warning("the loss curve %s could not be drawn: %s", output, error)
        return []


def draw_losses(
    runs: Mapping[str, Metrics],
    *,
    baseline: tuple[str, float] | None = None,
    resumed_at: Sequence[int] = (),
) -> Figure:
    """Training and validation loss of one run, or of several overlaid, against tokens seen."""
    figure, ((ax,),) = new_figure(_loss_finding(runs, baseline))
    x_key = x_key_of(runs)
    curves = []
    for color, (name, metrics) in zip(PALETTE, runs.items(), strict=False):
        of = f"{name}: " if name else ""
        x, loss = series(metrics, "loss", x_key)
        if len(x):
            # A single run's two curves differ in colour, several runs' in weight.
            tint = color if name else MUTED
            ax.plot(x, loss, color=tint, linewidth=0.6, alpha=0.35)
            label = f"{of}training ({AVERAGE})"
            dot = _dot(x)
            ax.plot(x, smooth(loss), color=tint, linewidth=1.1, alpha=0.8, label=label, marker=dot)
        x_val, val = validations(metrics, x_key)
        if len(x_val):
            label = f"{of}validation, {val[-1]:.3f} at the end"
            if len(x):
                gap = val[-1] - np.interp(x_val[-1], x, smooth(loss))
                label += f" ({abs(gap):.3f} {'above' if gap > 0 else 'below'} training)"
            ax.plot(
                x_val,
                val,
                color=color,
                linewidth=1.8,
                # Between few evaluations a line would claim what nobody measured.
                linestyle="-" if len(val) >= LEAST_CONNECTED else "",
                marker="o" if len(val) <= MOST_MARKED else "",
                markersize=5,
                label=label,
            )
        x_mean, of_mean = validations(metrics, x_key, "val_loss_ema")
        if len(x_mean):
            label = f"{of}validation of the average weights, {of_mean[-1]:.3f}"
            look = {"linewidth": 1.2, "linestyle": "--", "marker": _dot(x_mean)}
            ax.plot(x_mean, of_mean, color=color, label=label, **look)
        curves.append([(x, loss), (x_val, val), (x_mean, of_mean)])
    _mark_resumes(ax, runs, resumed_at)
    if baseline:
        label, value = baseline
        reference_line(ax, value, label)
    ax.set_ylim(loss_limits(curves, baseline))
    ax.set_ylabel("cross-entropy loss (nats per token)")
    _label_progress(ax, ax, runs)
    if ax.get_legend_handles_labels()[0]:
        legend(ax, loc="upper right")
    return figure


def _dot(x: np.ndarray) -> str:
    """The marker of a line that a single point would not be."""
    return "." if len(x) == 1 else ""


def _mark_resumes(ax: Axes, runs: Mapping[str, Metrics], resumed_at: Sequence[int]) -> None:
    """Dotted lines where launches of a single run went on."""
    first, *_ = runs.values()
    places = before(np.array(resumed_at), first, x_key_of(runs)) if resumed_at else ()
    for index, at in enumerate(places):
        label = "_nolegend_" if index else "resumed"
        ax.axvline(at, color=MUTED, linestyle=":", linewidth=1, label=label)


def _loss_finding(runs: Mapping[str, Metrics], baseline: tuple[str, float] | None) -> str:
    """What the loss plot shows, in a sentence."""
    kinds = {
        "Validation": {name: validations(metrics, "step") for name, metrics in runs.items()},
        "Training": {name: series(metrics, "loss", "step") for name, metrics in runs.items()},
    }
    for name, found in kinds.items():
        if len(runs) > 1:
            ends = [
                f"{run} {values[-1]:.2f} after {steps[-1]:,.0f} steps"
                for run, (steps, values) in found.items()
                if len(values)
            ]
            if ends:
                return f"{name} loss (nats per token): {', '.join(ends)}"
            continue
        ((steps, values),) = found.values()
        if len(values) < 2:
            continue
        passed = f"{steps[-1] - steps[0]:,.0f} steps"
        finding = f"{name} loss {values[0]:.2f} → {values[-1]:.2f} nats per token in {passed}"
        if baseline and name == "Validation":
            gap = values[-1] - baseline[1]
            label = baseline[0].split(",")[0]
            finding += f", {abs(gap):.2f} {'above' if gap > 0 else 'below'} {label}"
        return finding
    return "The run has just begun" if len(runs) == 1 else "The runs have just begun"


def loss_limits(
    runs: list[list[tuple[np.ndarray, np.ndarray]]], baseline: tuple[str, float] | None
) -> tuple[float, float] | tuple[None, None]:
    """The range of the y axis: the plunge of a long run's first steps is cut off.

    It would press the part that one wants to read to the bottom; the title keeps the first value.

    Args:
        runs: the curves of each. A shorter one has fewer first steps; all others are to be seen,
            so that beside a very short run a long one's plunge is not cut.
    """
    late, every = np.zeros(0), np.zeros(0)
    for curves in runs:
        start = 0.03 * max((x[-1] for x, _ in curves if len(x)), default=0.0)
        every = np.concatenate([every, *(y for _, y in curves)])
        late = np.concatenate([late, *(y[x >= start] for x, y in curves)])
    if not len(every):
        return None, None
    low = min(every.min(), baseline[1] if baseline else math.inf)
    high = late.max() if len(late) and every.max() - low > 1.5 * (late.max() - low) else every.max()
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _label_progress(bottom: Axes, top: Axes, runs: Mapping[str, Metrics]) -> None:
    """The x axis: tokens seen below, and optimizer steps above if there is one run."""
    for ax in (bottom, top):
        ax.margins(x=0.01)
    if x_key_of(runs) == "step":
        bottom.set_xlabel("optimizer step")
        return
    bottom.set_xlabel("tokens seen")
    bottom.xaxis.set_major_formatter(ShortNumbers())
    (metrics, *others) = runs.values()
    if others:
        return
    done, seen = _steps_and_tokens(metrics)
    ways = (lambda tokens: np.interp(tokens, seen, done), lambda step: np.interp(step, done, seen))
    above = top.secondary_xaxis("top", functions=ways)
    above.set_xlabel("optimizer step", fontsize=9, color=MUTED)
    above.tick_params(colors=MUTED, labelsize=8)
    above.spines["top"].set_visible(False)
    above.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    above.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def draw_learning_rate_and_gradient_norm(
    runs: Mapping[str, Metrics],
    *,
    max_grad_norm: float | None = None,
    muon_scale: Mapping[str, float] | None = None,
    resumed_at: Sequence[int] = (),
) -> Figure:
    """The learning rate above the global L2 gradient norm (before clipping), of all runs.

    `muon_scale`: by run, how many times the logged rate Muon's matrices have.
    """
    figure, ((top,), (bottom,)) = new_figure(
        _schedule_finding(runs, max_grad_norm, bool(muon_scale)), height=6, rows=2, sharex=True
    )
    _traces(top, runs, "lr")
    for color, (name, metrics) in zip(PALETTE, runs.items(), strict=False):
        if scale := (muon_scale or {}).get(name):
            x, rate = series(metrics, "lr", x_key_of(runs))
            label = f"{name}: matrices (Muon)" if name else "matrices (Muon)"
            look = {"linewidth": 1.8, "linestyle": "--", "marker": _dot(x)}
            top.plot(x, scale * rate, color=color, label=label, **look)
            if not name and top.lines:
                top.lines[0].set_label("AdamW (max_lr, before its scales)")
    top.set_ylabel("learning rate")
    top.set_ylim(bottom=0)
    _traces(bottom, runs, "grad_norm", raw=True)
    logarithmic(bottom, "gradient norm", "L2")
    if max_grad_norm:
        reference_line(bottom, max_grad_norm, f"clipped from {max_grad_norm:g} on")
    return _finish_panels(figure, top, bottom, runs, resumed_at)


def _schedule_finding(
    runs: Mapping[str, Metrics], max_grad_norm: float | None, by_muon: bool
) -> str:
    rate = "AdamW's rate" if by_muon else "learning rate"

    def describe(metrics: Metrics) -> str:
        steps, rates = series(metrics, "lr", "step")
        norms = series(metrics, "grad_norm", "step")[1]
        parts = []
        if len(rates):
            peak = int(rates.argmax())
            parts.append(f"{rate} peaks at {rates[peak]:.2g} at step {steps[peak]:,.0f}")
        if len(norms):
            parts.append(f"median gradient norm {np.median(norms):.2g}")
            if max_grad_norm:
                parts.append(f"{np.mean(norms > max_grad_norm):.0%} of logged steps clipped")
        return ", ".join(parts) or "nothing logged yet"

    return _each_run(runs, describe)


def draw_throughput(runs: Mapping[str, Metrics], *, resumed_at: Sequence[int] = ()) -> Figure:
    """Tokens per second above the share of time spent waiting for data, of one or more runs."""
    figure, ((top,), (bottom,)) = new_figure(
        _throughput_finding(runs), height=6, rows=2, sharex=True
    )
    _traces(top, runs, "tokens_per_second", raw=True)
    top.set_ylabel("tokens per second")
    top.set_ylim(*rate_limits([series(m, "tokens_per_second", "step")[1] for m in runs.values()]))
    top.yaxis.set_major_formatter(ShortNumbers())
    _traces(bottom, runs, "data_wait_fraction", raw=True)
    bottom.set_ylabel("time waiting for data")
    # At least to 5%: a wait that costs nothing should look like nothing.
    bottom.set_ylim(0, max(0.05, bottom.get_ylim()[1]))
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    return _finish_panels(figure, top, bottom, runs, resumed_at)


def rate_limits(rates: Sequence[np.ndarray]) -> tuple[float, float] | tuple[None, None]:
    """The range of the axis: what nineteen of twenty steps of each run have, to see a change.

    From 0 only if they come near it: a steady run would else leave half the picture empty.
    """
    ranges = [np.quantile(of_run, (0.025, 0.975)) for of_run in rates if len(of_run)]
    if not ranges:
        return None, None
    low, high = float(np.min(ranges)), float(np.max(ranges))
    margin = max(high - low, 0.02 * high) / 4
    return (0.0 if low < high / 3 else max(0.0, low - margin)), high + margin


def _throughput_finding(runs: Mapping[str, Metrics]) -> str:
    def describe(metrics: Metrics) -> str:
        rates, mfu = (series(metrics, key, "step")[1] for key in ("tokens_per_second", "mfu"))
        waited = _share_waited(metrics)
        parts = []
        if len(rates):
            parts.append(f"{np.median(rates):,.0f} tokens per second in the median")
        if len(mfu):
            parts.append(f"{np.median(mfu):.0%} MFU")
        if waited is not None:
            share = f"{waited:.1%}" if waited >= 0.0005 else "under 0.1%"
            parts.append(f"{share} of the time waiting for data")
        return ", ".join(parts) or "nothing logged yet"

    return _each_run(runs, describe)


def _share_waited(metrics: Metrics) -> float | None:
    """Of all the time that the lines are of, each as long as its tokens took."""
    waited = total = 0.0
    seen: float | None = None
    for line in metrics:
        share, rate = line.get("data_wait_fraction"), line.get("tokens_per_second") or 0.0
        if (tokens := line.get("tokens")) is None:
            continue
        # The first line does not say of how many tokens it is: of a step, then.
        own, seen = tokens / (line["step"] + 1) if seen is None else tokens - seen, tokens
        if is_number(share) and rate > 0:
            waited, total = waited + share * own / rate, total + own / rate
    return waited / total if total else None


def _each_run(runs: Mapping[str, Metrics], describe: Callable[[Metrics], str]) -> str:
    """`describe` for each run, under its name if there are several."""
    if len(runs) > 1:
        return "; ".join(f"{name}: {describe(metrics)}" for name, metrics in runs.items())
    (metrics,) = runs.values()
    text = describe(metrics)
    return text[:1].upper() + text[1:]


def _traces(ax: Axes, runs: Mapping[str, Metrics], key: str, *, raw: bool = False) -> None:
    """One line per run; with `raw`, the values themselves lie faintly under their average."""
    x_key = x_key_of(runs)
    for color, (name, metrics) in zip(PALETTE, runs.items(), strict=False):
        x, y = series(metrics, key, x_key)
        if not len(x):
            continue
        if raw:
            ax.plot(x, y, color=color, linewidth=0.6, alpha=0.35)
        label = name or (AVERAGE if raw else None)
        y = smooth(y) if raw else y
        ax.plot(x, y, color=color, linewidth=1.8, label=label, marker=_dot(x))


def _finish_panels(
    figure: Figure, top: Axes, bottom: Axes, runs: Mapping[str, Metrics], resumed_at: Sequence[int]
) -> Figure:
    _label_progress(bottom, top, runs)
    for ax in (top, bottom):
        _mark_resumes(ax, runs, resumed_at)
        if ax.get_legend_handles_labels()[0]:
            legend(ax, loc="best")
    return figure
