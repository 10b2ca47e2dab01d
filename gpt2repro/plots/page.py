"""A run and its model on one page of HTML that needs nothing else: no server and no network.

The curves zoom and tell their values: Bokeh draws them, and its own code lies in the page. All else
is pictures, tables and text.
"""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from bokeh.embed import components
from bokeh.models import HoverTool, NumeralTickFormatter, Span
from bokeh.plotting import figure as new_panel
from bokeh.resources import Resources
from jinja2 import Environment
from matplotlib.figure import Figure

from gpt2repro.plots import curves
from gpt2repro.plots.gallery import Runs
from gpt2repro.plots.style import DPI, INK, MUTED, PALETTE, finding, rendering
from gpt2repro.records.metrics import scored
from gpt2repro.system import atomic

TEMPLATE = Path(__file__).with_name("page_template.html")
SCORED = "benchmarks"  # the picture that stands beside their table
MOST_POINTS = 2000  # of a curve: as many as a wide screen has columns
TOOLS = "pan,box_zoom,wheel_zoom,reset,save"
# What is drawn under each finding: a field of the metrics, its axis, and how numbers look there.
PANELS = {
    "loss_curve": {"loss": ("loss (nats per token)", "0.[000]")},
    "learning_rate": {
        "lr": ("learning rate", "0.[00000]"),
        "grad_norm": ("gradient norm", "0.[000]"),
    },
    "throughput": {
        "tokens_per_second": ("tokens per second", "0.[000]a"),
        "data_wait_fraction": ("time waiting for data", "0.[00]%"),
    },
}


def write_page(
    output: Path,
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    runs: Runs | None,
    pictures: Mapping[str, Figure],
    neighbours: str,
) -> None:
    """Write `output`, whole or not at all.

    Args:
        facts: names and values, of the model card for one.
        runs: whose curves are drawn; None for a model alone.
        pictures: by name. Those of the runs give their finding only, the curves are drawn anew.
        neighbours: the table of nearest tokens, as it reads on a terminal.
    """
    panels = dict(_panels(runs)) if runs else {}
    script, places = components(panels) if panels else ("", {})
    page = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = page.render(
        title=title,
        facts=facts,
        library=Resources("inline", components=["bokeh"], log_level="warn").render_js(),
        script=script,
        curves=[
            (finding(pictures[name]), [places[f"{name}_{key}"] for key in PANELS[name]])
            for name in PANELS
            if runs
        ],
        evaluations=_evaluations(runs),
        benchmarks=_data_url(pictures[SCORED]) if SCORED in pictures else None,
        samples=_samples(runs),
        pictures=[
            (name, finding(picture), _data_url(picture))
            for name, picture in pictures.items()
            if name not in (*PANELS, SCORED)
        ],
        neighbours=neighbours,
    )
    with atomic.new_file(output) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="replace")  # a name may be no text


# --- Curves ---------------------------------------------------------------------------------------


def _panels(runs: Runs) -> Iterator[tuple[str, Any]]:
    """Name and Bokeh figure of every curve. They share the axis below, so they zoom as one."""
    x_key = curves.x_key_of(runs.metrics)
    x_range = None
    for name, parts in PANELS.items():
        for key, (y_label, y_format) in parts.items():
            panel = new_panel(
                height=320,
                min_border_left=80,  # so that panels stand above one another
                sizing_mode="stretch_width",
                tools=TOOLS,
                y_axis_label=y_label,
                x_axis_label="tokens seen" if x_key == "tokens" else "optimizer step",
                y_axis_type="log" if key == "grad_norm" else "linear",
                **({"x_range": x_range} if x_range else {}),
            )
            x_range = panel.x_range
            _draw(panel, runs, key, x_key)
            _finish(panel, x_key, y_format)
            yield f"{name}_{key}", panel


def _draw(panel: Any, runs: Runs, key: str, x_key: str) -> None:
    for color, (run, metrics) in zip(PALETTE, runs.metrics.items(), strict=False):
        of = f"{run}: " if run else ""
        x, y = curves.series(metrics, key, x_key)
        if key == "loss":
            _line(panel, x, y, f"{of}training", color if run else MUTED, smooth=True)
            x, y = curves.validations(metrics, x_key)
            _line(panel, x, y, f"{of}validation", color, marked=True)
        elif key == "lr" and run in runs.muon_scale:
            scaled = runs.muon_scale[run] * y
            _line(panel, x, scaled, f"{of}matrices (Muon)", color, line_dash="dashed")
            _line(panel, x, y, f"{of}AdamW (max_lr, before its scales)", color)
        else:
            label = panel.yaxis.axis_label
            _line(panel, x, y, f"{of}{label}", color, smooth=key != "lr")
    if runs.resumed_at:
        (metrics,) = runs.metrics.values()
        for at in curves.before(np.array(runs.resumed_at), metrics, x_key).tolist():
            _across(panel, at, "resumed", MUTED, "dotted")
    if key == "loss" and runs.baseline:
        _across(panel, runs.baseline[1], runs.baseline[0], INK, "dashed")
    if key == "grad_norm" and runs.max_grad_norm:
        _across(panel, runs.max_grad_norm, "clipped from here on", INK, "dashed")


def _line(
    panel: Any,
    x: np.ndarray,
    y: np.ndarray,
    name: str,
    color: str,
    *,
    smooth: bool = False,
    marked: bool = False,
    **look: Any,
) -> None:
    """A curve; `smooth` draws its moving average over it, `marked` its points."""
    if not len(x):
        return
    if smooth:
        panel.line(*thinned(x, y), name=f"{name}, each logged step", color=color, alpha=0.3)
        y, name = curves.smooth(y), f"{name}, moving average"
    x, y = thinned(x, y)
    # Between few evaluations a line would claim what nobody measured.
    if not marked or len(x) >= curves.LEAST_CONNECTED:
        panel.line(x, y, name=name, legend_label=name, color=color, line_width=2, **look)
    if (marked and len(x) <= curves.MOST_MARKED) or len(x) == 1:
        panel.scatter(x, y, name=name, legend_label=name, color=color, size=6)


def _across(panel: Any, value: float, name: str, color: str, dash: str) -> None:
    """A line across the panel: upright where the run went on, level at a value to compare with."""
    dimension = "height" if name == "resumed" else "width"
    panel.add_layout(Span(location=value, dimension=dimension, line_color=color, line_dash=dash))
    nowhere = [math.nan, math.nan]
    panel.line(nowhere, nowhere, color=color, line_dash=dash, legend_label=name)  # for the legend


def _finish(panel: Any, x_key: str, y_format: str) -> None:
    tips = [("", "$name"), (x_key, "$snap_x{0,0}"), ("", "$snap_y{0.[0000000]}")]
    panel.add_tools(HoverTool(tooltips=tips, mode="mouse"))
    panel.xaxis.formatter = NumeralTickFormatter(format="0.[000]a" if x_key == "tokens" else "0,0")
    panel.yaxis.formatter = NumeralTickFormatter(format=y_format)
    panel.toolbar.logo = None  # it is a link
    panel.toolbar.autohide = True
    if panel.legend:
        panel.legend.click_policy = "hide"
        panel.legend.orientation = "horizontal"
        panel.add_layout(panel.legend[0], "above")  # where it covers no curve


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` of the points (n,): of each stretch the lowest and the highest."""
    if len(x) > most:
        bounds = np.linspace(0, len(x), most // 2 + 1).astype(int)
        parts = pairwise(bounds)
        kept = sorted({a + end(y[a:b]) for a, b in parts for end in (np.argmin, np.argmax)})
        x, y = x[kept], y[kept]
    return x.astype(np.float32), y.astype(np.float32)


# --- Tables and pictures --------------------------------------------------------------------------


def _evaluations(runs: Runs | None) -> list[list[str]]:
    """Rows of what was evaluated, the first one the head: run, step, and a column for each figure.

    A standard error stands beside its figure.
    """
    lines = [
        (run, line)
        for run, metrics in (runs.metrics.items() if runs else ())
        for line in metrics
        if _evaluated(line)
    ]
    names = list(dict.fromkeys(name for _, line in lines for name in _evaluated(line)))
    several = bool(runs and len(runs.metrics) > 1)
    head = [*(["run"] if several else []), "step", *names]
    rows = [
        [*([run] if several else []), f"{line['step']:,}", *(_figure(line, n) for n in names)]
        for run, line in lines
    ]
    return [head, *rows] if rows else []


def _evaluated(line: Mapping[str, Any]) -> list[str]:
    return [*(name for name in line if name.startswith("val_")), *scored(line)]


def _figure(line: Mapping[str, Any], name: str) -> str:
    value, error = line.get(name), line.get(f"{name}_stderr")
    if value is None:
        return ""
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
    return shown + ("" if error is None else f" ± {error:.4f}")


def _samples(runs: Runs | None) -> list[tuple[str, str]]:
    """When, and what the model wrote."""
    return [
        (f"{run} step {line['step']:,}".strip(), line["sample"])
        for run, metrics in (runs.metrics.items() if runs else ())
        for line in metrics
        if line.get("sample")
    ]


def _data_url(picture: Figure) -> str:
    """The picture without its title: in a third of the bytes of PNG, at a loss that no eye sees."""
    picture.suptitle("")
    data = io.BytesIO()
    with rendering(picture):
        picture.savefig(data, format="webp", dpi=DPI)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
