"""One look for every picture: the title is a finding, axes have units, all eyes tell the colours.

Figures are built without pyplot, so there is no global state: any thread may draw, and no display
is needed.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, NullLocator

from gpt2repro.system import atomic
from gpt2repro.system.text import printable

# Okabe & Ito 2008: eight colours that readers with any colour vision tell apart.
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY = "#CC79A7", "#56B4E9"
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
INK, MUTED, GRID = "#222222", "#666666", "#E4E4E4"
SHADES = "Blues"  # from none to much: ordered in any colour vision and in print
DPI = 150
TITLE_SIZE, SMALLEST_TITLE = 12.0, 9.0  # points
TITLE_LETTERS_PER_INCH = 9.3  # at that size, in bold
CAPTION_LETTERS_PER_INCH = 13  # at 9 points


def new_figure(
    title: str,
    *,
    width: float = 8.0,
    height: float = 5.0,
    rows: int = 1,
    columns: int = 1,
    **options: Any,
) -> tuple[Figure, np.ndarray]:
    """A figure of `width` x `height` inches titled by its finding, and its (rows, columns) axes.

    A title is one line: one too long for the width is smaller, and at last cut (`finding` has all).
    """
    title = printable(title)
    figure = Figure(figsize=(width, height), facecolor="white", label=title)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    letters = width * TITLE_LETTERS_PER_INCH  # that fit, at the full size
    size = min(TITLE_SIZE, TITLE_SIZE * letters / max(1, len(title)))
    if size < SMALLEST_TITLE:
        size = SMALLEST_TITLE
        title = f"{title[: int(letters * TITLE_SIZE / size) - 1]}…"
    figure.suptitle(
        title, x=0.012, ha="left", fontsize=size, fontweight="bold", color=INK, parse_math=False
    )
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        style(ax)
    return figure, axes


def style(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.tick_params(colors=MUTED, labelsize=9, labelcolor=INK)
    ax.xaxis.label.set(color=INK, fontsize=10)
    ax.yaxis.label.set(color=INK, fontsize=10)
    ax.grid(True, color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)


def logarithmic(ax: Axes, name: str, unit: str) -> None:
    """Make the y axis of what is drawn logarithmic, with ticks that read 0.2, 0.5, 1, and name it.

    Where there is nothing positive to show, it stays as it is, and its name says so.
    """
    if not np.isfinite(ax.dataLim.minposy):
        ax.set_ylabel(f"{name} ({unit})")
        return
    ax.set_ylabel(f"{name} ({unit}, log scale)")
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    subs = (1, 2, 3, 4, 6) if high < 30 * low else (1, 2, 5) if high < 1000 * low else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=30))  # else every other decade goes
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def reference_line(ax: Axes, value: float, label: str) -> None:
    """A dashed line across; its name goes to the legend, where no curve can cross it."""
    ax.axhline(value, color=INK, linestyle=(0, (5, 3)), linewidth=1.2, label=label)


def legend(ax: Axes, **options: Any) -> None:
    shown = ax.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9, **options)
    for text in shown.get_texts():
        text.set(color=INK, parse_math=False)


def caption(figure: Figure, text: str, above: str = "") -> None:
    """The text that a model read, small under everything else, and `above` it another label."""
    line = printable(f"the text: {' '.join(text.split())}") if text.strip() else ""
    ends = np.cumsum([_width(letter) for letter in line])  # of the letters
    fit = int(np.searchsorted(ends, figure.get_figwidth() * CAPTION_LETTERS_PER_INCH))
    shown = line if fit == len(line) else f"{line[: fit - 1]}…"
    label = "\n".join(filter(None, (above, shown)))
    figure.supxlabel(label, x=0.012, ha="left", fontsize=9, color=INK, parse_math=False)


def _width(letter: str) -> float:
    """In small letters: of a Chinese one two."""
    return 2.0 if east_asian_width(letter) in "WF" else 1.4 if letter.isupper() else 1.0


def legend_outside(figure: Figure, ax: Axes, **place: Any) -> None:
    """The legend of `ax` beside or under the whole figure, where there is no room in it."""
    entries = ax.get_legend_handles_labels()
    figure.legend(*entries, frameon=False, fontsize=9, labelcolor=INK, **place)


def shades() -> Any:
    """The colour map from none to much; what is missing is white."""
    return colormaps[SHADES].with_extremes(bad="white")


def bare(ax: Axes) -> None:
    """An image needs neither grid nor frame."""
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def colour_bar(figure: Figure, image: Any, axes: Any, label: str) -> None:
    shrink = min(0.85, 6 / figure.get_figheight())  # a tall figure needs no tall scale
    bar = figure.colorbar(image, ax=axes, shrink=shrink, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, length=0, labelcolor=INK)


@contextmanager
def rendering(figure: Figure) -> Iterator[None]:
    """Around `savefig`: a token of a script that the font lacks is a box, and that is no news.

    Whatever the user's matplotlibrc says, text is no TeX, in which tokens and titles would mean
    something else, and an SVG has the ids that it would have next time. It is XML, in which no
    control character may stand: a prompt or a run's name may have some.
    """
    for text in figure.findobj(Text):
        text.set_usetex(False)
        text.set_text(printable(text.get_text()))
    ours = rc_context({"text.usetex": False, "svg.hashsalt": "gpt2repro"})
    with warnings.catch_warnings(), ours:
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def save(figure: Figure, output: Path) -> list[Path]:
    """Write `output`, as its ending says; without one of them as .png and as .svg.

    Each is there complete or not at all.
    """
    paths = []
    output.parent.mkdir(parents=True, exist_ok=True)
    is_named = output.suffix in (".png", ".svg")
    for path in [output] if is_named else [Path(f"{output}{end}") for end in (".png", ".svg")]:
        kind = path.suffix[1:]
        # A date would make two drawings of the same numbers differ.
        metadata = {"Date": None} if kind == "svg" else None
        with atomic.new_file(path) as scratch, rendering(figure):
            figure.savefig(scratch, format=kind, dpi=DPI, metadata=metadata)
        paths.append(path)
    return paths


class ShortNumbers(Formatter):
    """Ticks as `short_number` has them, with as many digits as tell them apart."""

    def __call__(self, value: float, _position: int | None = None) -> str:
        return short_number(value)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        if len(set(values)) < 2:
            return list(map(short_number, values))
        size, letter = _size_of(max(np.abs(values)))
        step = min(np.diff(np.unique(values))) / size
        digits = next(n for n in range(10) if n == 9 or abs(round(step, n) - step) < 0.01 * step)
        return [f"{value / size:.{digits}f}{letter}" if value else "0" for value in values]


def short_number(value: float) -> str:
    """1_638_400 -> 1.6M, 10e9 -> 10B, as tokens and rates are spoken of."""
    size, letter = _size_of(value)
    return f"{value / size:.3g}{letter}"


def _size_of(value: float) -> tuple[float, str]:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # which three digits show as the next
            return size, letter
    return 1.0, ""


def percent(fraction: float, _position: int | None = None) -> str:
    """0.31 -> 31%, 0.00123 -> 0.12%: small probabilities are not nothing."""
    return f"{100 * fraction:.0f}%" if fraction >= 0.1 or not fraction else f"{100 * fraction:.2g}%"


def signed(value: float) -> str:
    """Two digits, with a minus sign that is as wide as a plus."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # no zero has one


def finding(figure: Figure) -> str:
    """What a figure shows, in a sentence: its title, uncut."""
    return str(figure.get_label())


def middle_cut(name: str, most: int = 40) -> str:
    """A name as a legend has room for it: of a long one, beginning and end."""
    half = most // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def token_labels(tokenizer: Any, ids: Sequence[int], most: int = 12) -> list[str]:
    """Tokens as they read in a text, with spaces and line ends made visible."""
    labels = []
    for index in ids:
        label = tokenizer.decode([int(index)], clean_up_tokenization_spaces=False)
        if "\ufffd" in label:  # part of a character
            label = f"<{tokenizer.convert_ids_to_tokens(int(index))}>"
        label = label.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
        label = "".join(c if c.isprintable() else "·" for c in label)
        label = label or f"<{index}>"  # beyond the tokenizer, where the model's rows are padded
        labels.append(label if len(label) <= most else label[: most - 1] + "…")
    return labels
