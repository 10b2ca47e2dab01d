"""The curves of a run: what they say, what they tolerate, and that they never kill a run."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny_metrics import run_metrics

from gpt2repro.plots import curves
from gpt2repro.plots.style import finding

PNG = b"\x89PNG\r\n\x1a\n"


def test_loss_curve_writes_png_and_svg_and_nothing_else(tmp_path):
    written = curves.loss_curve(run_metrics(), tmp_path / "deep" / "loss.png")

    assert [path.name for path in written] == ["loss.png", "loss.svg"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["loss.png", "loss.svg"]
    assert written[0].read_bytes().startswith(PNG)
    assert b"<svg" in written[1].read_bytes()


def test_the_title_says_the_finding():
    figure = curves.draw_losses({"": run_metrics()})
    assert finding(figure) == "Validation loss 8.00 → 4.07 nats per token in 40 steps"


def test_the_title_places_the_run_against_the_baseline():
    baseline = ("OpenAI GPT-2 124M, 3.2924 (build-nanogpt)", 3.2924)
    above = curves.draw_losses({"": run_metrics(floor=4)}, baseline=baseline)
    below = curves.draw_losses({"": run_metrics(floor=3)}, baseline=baseline)

    assert finding(above).endswith("in 40 steps, 0.78 above OpenAI GPT-2 124M")
    assert finding(below).endswith("in 40 steps, 0.20 below OpenAI GPT-2 124M")
    labels = [line.get_label() for line in above.axes[0].get_lines()]
    assert baseline[0] in labels


def test_two_runs_are_named_and_share_the_axes():
    runs = {"adamw": run_metrics(floor=5), "muon": run_metrics(floor=4)}
    figure = curves.draw_losses(runs)

    assert finding(figure) == (
        "Validation loss (nats per token): adamw 5.05 after 40 steps, muon 4.07 after 40 steps"
    )
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "adamw: validation, 5.055 at the end (0.006 below training)" in legend
    assert "muon: validation, 4.073 at the end (0.008 below training)" in legend


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{}],
        [{"step": 0}],
        [{"step": 0, "loss": 8.0}],
        [{"step": 0, "tokens": 0, "val_loss": 8.0}],
        [{"step": 0, "tokens": 0, "loss": None}, {"step": 1, "tokens": 9, "loss": float("nan")}],
        [{"step": step, "loss": 8.0 - step} for step in range(3)],  # no tokens were logged
        [{"step": step, "grad_norm": 0.0, "lr": 0.0} for step in range(3)],
        run_metrics()[:1],
    ],
)
def test_whatever_is_missing_every_curve_is_drawn(metrics, tmp_path):
    assert len(curves.loss_curve(metrics, tmp_path / "loss")) == 2
    for draw in (
        curves.draw_losses,
        curves.draw_learning_rate_and_gradient_norm,
        curves.draw_throughput,
    ):
        assert finding(draw({"": metrics}))
        assert finding(draw({"ours": metrics, "theirs": run_metrics()}))


def test_a_failure_is_logged_and_spares_the_run_and_the_last_picture(tmp_path, caplog):
    (path, _) = curves.loss_curve(run_metrics(), tmp_path / "loss.png")
    before = path.read_bytes()

    assert curves.loss_curve([{"step": "x"}, None], path) == []
    assert curves.loss_curve(run_metrics(), tmp_path / "loss.png" / "below_a_file.png") == []

    assert path.read_bytes() == before
    assert len(caplog.records) == 2
    assert "could not be drawn" in caplog.text


def test_threads_may_draw_at_once(tmp_path):
    (alone, _) = curves.loss_curve(run_metrics(), tmp_path / "alone")
    with ThreadPoolExecutor(4) as pool:
        paths = pool.map(lambda i: curves.loss_curve(run_metrics(), tmp_path / f"{i}")[0], range(8))
        assert {path.read_bytes() for path in paths} == {alone.read_bytes()}


def test_no_global_plotting_state_is_touched(tmp_path):
    code = (
        "import sys; from pathlib import Path; from gpt2repro.plots import curves\n"
        f"assert curves.loss_curve([{{'step': 0, 'loss': 1.0}}], Path({str(tmp_path / 'x')!r}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"DISPLAY": "nowhere:0"})


def test_a_label_with_dollars_is_text_not_mathematics(tmp_path):
    figure = curves.draw_losses({"$a": run_metrics(), "b$_{": run_metrics()})
    assert len(curves.save(figure, tmp_path / "loss")) == 2


def test_the_plunge_of_a_long_run_is_cut_off_but_a_short_run_is_whole():
    steps = np.arange(1000.0)
    plunge = (steps, 3.3 + 7.7 * np.exp(-steps / 5))
    low, high = curves.loss_limits([[plunge]], None)
    assert low < 3.3 and high < 4

    slope = (steps, 8 - 4 * steps / 1000)
    low, high = curves.loss_limits([[slope]], ("theirs", 2.0))
    assert low < 2.0 and high > 8.0


def test_a_short_run_beside_a_long_one_lies_within_the_axes():
    short, long = run_metrics(100), run_metrics(6000, eval_every=1000)
    short = [line | {"tokens_per_second": 2e5} if "loss" in line else line for line in short]
    runs = {"short": short, "long": long}
    (ax, *_) = curves.draw_losses(runs).axes
    low, high = ax.get_ylim()
    of_short = [line["loss"] for line in short[3:] if "loss" in line]
    assert low < min(of_short) and max(of_short) < high
    top, _ = curves.draw_throughput(runs).axes[:2]
    low, high = top.get_ylim()
    assert low < 9000 and high > 2e5


def test_a_line_that_is_there_twice_changes_nothing():
    once = run_metrics()
    for twice in ([*once, once[-2]], [each for line in once for each in (line, line)]):
        theirs = curves._steps_and_tokens(once)
        for ours, their in zip(curves._steps_and_tokens(twice), theirs, strict=True):
            np.testing.assert_array_equal(ours, their)
        assert finding(curves.draw_losses({"": twice}))


def test_a_single_step_is_a_dot():
    one = {"": [run_metrics()[0] | {"val_loss_ema": 8.0}]}
    muon = {"muon_scale": {"": 2.0}}
    rates = curves.draw_learning_rate_and_gradient_norm(one, **muon)
    for figure, count in (
        (curves.draw_losses(one), 2),  # training, and validation of the average; and "o"
        (curves.draw_throughput(one), 1),
        (rates, 2),
    ):
        markers = [line.get_marker() for line in figure.axes[0].get_lines()]
        assert markers.count(".") == count


def test_smooth_is_a_centred_moving_average_that_begins_where_the_values_do():
    values = np.random.default_rng(0).normal(size=200)
    reach = [min(i, 4) for i in range(200)]  # 200 // 50
    theirs = [values[i - reach[i] : i + reach[i] + 1].mean() for i in range(200)]
    # Differences of cumulative sums round differently from means of slices.
    np.testing.assert_allclose(curves.smooth(values), theirs, atol=1e-12)
    assert curves.smooth(values)[0] == values[0]


def test_validation_stands_at_the_tokens_that_were_seen_before_it():
    x, loss = curves.validations(run_metrics(), "tokens")
    assert x.tolist() == [step * 4096 for step in (0, 10, 20, 30, 40)] and loss[0] == 8
    (ax, *_) = curves.draw_losses({"": run_metrics()}).axes
    (points,) = [line for line in ax.get_lines() if "validation" in str(line.get_label())]
    assert points.get_xdata().tolist() == x.tolist()
    assert points.get_linestyle() == "None"  # five points are no curve
    (ax, *_) = curves.draw_losses({"": run_metrics(eval_every=4)}).axes
    (line,) = [line for line in ax.get_lines() if "validation" in str(line.get_label())]
    assert line.get_linestyle() == "-" and line.get_marker() == "o"


def test_a_batch_that_grows_leaves_every_point_where_it_was():
    """Tokens are no multiple of steps: from step 20 on there are four times as many."""
    metrics = run_metrics()
    for line in metrics:
        steps = min(line["step"] + 1, 40)
        line["tokens"] = 4096 * (steps + 3 * max(0, steps - 20))
    x, _ = curves.validations(metrics, "tokens")
    assert x.tolist() == [4096 * n for n in (0, 10, 20, 20 + 40, 20 + 80)]
    figure = curves.draw_losses({"": metrics}, resumed_at=[25])
    (ax, *_) = figure.axes
    [resumed] = [line for line in ax.get_lines() if line.get_label() == "resumed"]
    assert resumed.get_xdata()[0] == 4096 * (20 + 20)
    [above] = [child for child in ax.child_axes if child.get_xlabel() == "optimizer step"]
    to_step, to_tokens = above._functions
    assert to_step(4096 * 60) == 30 and to_tokens(30) == 4096 * 60
    assert to_tokens(-1) == -4096 and to_tokens(41) == 4096 * 104  # margins


def test_the_average_of_the_weights_has_a_curve_of_its_own():
    metrics = [
        line | ({"val_loss_ema": line["val_loss"] - 0.1} if "val_loss" in line else {})
        for line in run_metrics()
    ]
    (ax, *_) = curves.draw_losses({"": metrics}).axes
    (line,) = [line for line in ax.get_lines() if "average weights" in str(line.get_label())]
    x, loss = curves.validations(metrics, "tokens")
    assert line.get_xdata().tolist() == x.tolist()
    assert line.get_ydata() == pytest.approx(loss - 0.1)
    assert str(line.get_label()).endswith(f"{loss[-1] - 0.1:.3f}")


def test_resumes_are_marked():
    (ax, *_) = curves.draw_losses({"": run_metrics()}, resumed_at=[12, 30]).axes
    marks = [line for line in ax.get_lines() if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in marks] == [12 * 4096, 30 * 4096]
    assert [line.get_label() for line in marks] == ["resumed", "_nolegend_"]


def test_muons_rate_is_drawn_beside_the_others():
    figure = curves.draw_learning_rate_and_gradient_norm({"": run_metrics()}, muon_scale={"": 2.5})
    rest, matrices = figure.axes[0].get_lines()
    assert (rest.get_label(), matrices.get_label()) == (
        "AdamW (max_lr, before its scales)",
        "matrices (Muon)",
    )
    assert matrices.get_ydata() == pytest.approx(2.5 * rest.get_ydata())


@pytest.mark.parametrize(
    ("rates", "low", "high"),
    [
        ([9000.0] * 99 + [100.0], 8955, 9045),  # one slow step leaves the axis alone
        ([9000.0, 9500.0] * 50, 8875, 9625),
        ([9000.0, 1000.0] * 50, 0, 11000),
    ],
)
def test_a_steady_rate_does_not_leave_half_the_picture_empty(rates, low, high):
    ours = curves.rate_limits([np.array(rates)])
    assert ours == pytest.approx((low, high), rel=0.01)


def test_gradient_norm_and_throughput_say_their_findings():
    runs = {"": run_metrics()}
    schedule = curves.draw_learning_rate_and_gradient_norm(runs, max_grad_norm=1.0)
    assert finding(schedule) == (
        "Learning rate peaks at 0.001 at step 0, median gradient norm 1.5, "
        "65% of logged steps clipped"
    )
    throughput = curves.draw_throughput(runs)
    assert finding(throughput) == (
        "9,000 tokens per second in the median, 0.1% of the time waiting for data"
    )


def test_time_spent_waiting_is_weighed_by_time():
    """A line of 100 s, 90 of them waiting, then 100 of a tenth of a second each."""
    first = {"step": 0, "tokens": 1000, "tokens_per_second": 10.0, "data_wait_fraction": 0.9}
    others = [
        {"step": n, "tokens": 1000 * (n + 1), "tokens_per_second": 1e4, "data_wait_fraction": 0.0}
        for n in range(1, 101)
    ]
    said = finding(curves.draw_throughput({"": [first, *others]}))
    assert said.endswith("81.8% of the time waiting for data")  # 90 of 110 s
    assert finding(curves.draw_throughput({"": [{"step": 0, "mfu": 0.5}]})) == "50% MFU"
    # Where the file begins late, nobody knows how many tokens its first line is of.
    late = [
        {**line, "tokens": line["tokens"] + 10**9, "step": line["step"] + 10**6}
        for line in (first, *others)
    ]
    assert finding(curves.draw_throughput({"": late})).endswith(
        "81.8% of the time waiting for data"
    )
