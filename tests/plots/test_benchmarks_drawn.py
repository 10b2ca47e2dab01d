"""Benchmarks as curves of a run and as dots of models: the numbers that are drawn."""

import numpy as np
import pytest

from gpt2repro.evaluation.estimates import Estimate, mean
from gpt2repro.evaluation.tables import Table
from gpt2repro.plots.benchmarks import INTERVAL, benchmark_dots, draw_benchmarks
from gpt2repro.records.metrics import scored


def lines_of(key: str) -> list[dict]:
    """A run of 30 steps, scored before steps 10 and 20 and at its end."""
    lines = [{"step": s, "loss": 3.0, "tokens": 100 * (s + 1)} for s in range(30)]
    lines.append({"step": 30})
    for step, value in ((10, 0.25), (20, 0.3), (30, 0.4)):
        lines[step] |= {key: value, f"{key}_stderr": 0.02}
    return lines


def test_curves_stand_where_they_were_scored_with_their_errors():
    runs = {"a": lines_of("piqa/acc"), "b": lines_of("piqa/acc")[:25]}
    assert scored(runs["a"][10]) == ["piqa/acc"] and scored({"step": 1, "loss": 2.0}) == []
    (ax,) = draw_benchmarks(runs, ["piqa/acc"]).axes
    first, second = ax.lines
    assert first.get_xdata().tolist() == [1000, 2000, 3000], "tokens seen before"
    assert first.get_ydata().tolist() == [0.25, 0.3, 0.4]
    assert second.get_xdata().tolist() == [1000, 2000]
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(0.4 + INTERVAL * 0.02)
    assert "tokens" in ax.get_xlabel()


def test_every_column_says_what_its_axis_is():
    """Also where the last row is not full."""
    names = [f"t{n}/acc" for n in range(4)]
    lines = [dict.fromkeys(names, 0.1 * step) | line for step, line in enumerate(lines_of("f1"))]
    axes = draw_benchmarks({"a": lines}, names).axes
    lowest = [ax for ax in axes if ax.get_xlabel()]
    assert [ax.get_title("left") for ax in lowest] == ["t1/acc", "t2/acc", "t3/acc"]
    assert all(ax.xaxis.get_tick_params()["labelbottom"] for ax in lowest)


def test_a_figure_without_an_error_is_drawn_without_a_band():
    lines = [line | ({"f1_stderr": None} if "f1" in line else {}) for line in lines_of("f1")]
    (ax,) = draw_benchmarks({"": lines}, ["f1"]).axes
    assert ax.lines[0].get_ydata().tolist() == [0.25, 0.3, 0.4] and not ax.collections


def test_an_error_is_that_of_its_own_line():
    lines = lines_of("f1")
    lines[10]["f1_stderr"] = None
    lines[20]["f1"] = None
    (ax,) = draw_benchmarks({"": lines}, ["f1"]).axes
    assert ax.lines[0].get_ydata().tolist() == [0.25, 0.4]
    (band,) = ax.collections
    assert np.concatenate([path.vertices[:, 1] for path in band.get_paths()]) == pytest.approx(
        0.4, abs=INTERVAL * 0.02 + 1e-9
    )


def test_a_long_name_is_on_two_lines():
    names = ["core/bigbench_qa_wikidata/centered", "piqa/acc", f"mmlu_{'x' * 40}/acc"]
    lines = [dict.fromkeys(names, 0.1) | line for line in lines_of("f1")]
    titles = [ax.get_title("left") for ax in draw_benchmarks({"": lines}, names).axes]
    assert titles[:2] == ["core/bigbench_qa_wikidata/\ncentered", "piqa/acc"]
    assert titles[2] == "mmlu_xxxxxxxxx…xxxxxxxxxxxxx/\nacc"


def test_core_is_no_share_and_published_figures_are_of_the_same_rows():
    right = mean(np.array([1, 0, 1], float))
    found = {"hellaswag/completion_acc": right, "core": right, "squad/f1": right}
    table = Table(["a", "b"], [found, found], {}, {"hellaswag/completion_acc": (0.2859, "x")})
    figure = benchmark_dots(table)
    assert [ax.get_xlabel() for ax in figure.axes] == [
        *("share right", "F1", "CORE (0: guessing, 1: all right)")
    ]
    assert figure.get_label() == "a is ahead of b in 0 of 1 accuracies"
    assert not any("published" in row for row in table.cells()[0])
    assert "published, not computed" not in figure.axes[0].get_legend_handles_labels()[1]


def test_a_figure_that_one_model_lacks_or_of_another_kind_is_no_dot():
    right = mean(np.array([1, 0, 1], float))
    ours = {"a/acc": right, "a/brier_score": right, "a/gold_bits_per_byte": right}
    theirs = {"a/acc": right, "a/brier_score": right}
    (ax,) = benchmark_dots(Table(["a", "b"], [ours, theirs])).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a/acc"]


def test_dots_have_a_panel_for_each_kind_and_an_interval():
    right = mean(np.array([1, 0, 0, 1, 1], float))
    ours = {"piqa/acc": right, "wikitext/word_perplexity": Estimate(40.0, np.arange(4.0))}
    theirs = {"piqa/acc": mean(np.zeros(5)), "wikitext/word_perplexity": ours["piqa/acc"] * 50}
    figure = benchmark_dots(Table(["a", "b"], [ours, theirs], {}, {"piqa/acc": (0.5, "x")}))
    shares, perplexities = figure.axes
    assert [label.get_text() for label in shares.get_yticklabels()] == ["piqa/acc"]
    assert perplexities.get_xscale() == "log"
    bar = shares.containers[0]
    (segment,) = bar[2][0].get_segments()
    assert segment[:, 0] == pytest.approx([0.6 - 1.96 * right.stderr, 0.6 + 1.96 * right.stderr])
    assert shares.collections[-1].get_offsets().tolist() == [[0.5, 0.0]]
    assert figure.get_label() == "a is ahead of b in 1 of 1 accuracies"
