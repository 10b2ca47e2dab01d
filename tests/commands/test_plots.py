"""`gpt2repro plots` on a run, a stock checkpoint and two runs; and what it refuses."""

import json
import re
import warnings

import pytest
import yaml
from tiny_language_models import random_gpt2, tiny_tokenizer
from tiny_metrics import run_metrics

from gpt2repro import UserError
from gpt2repro.commands import plots
from gpt2repro.evaluation.published import VALIDATION_TEXT
from gpt2repro.plots import gallery

CURVES = {"loss_curve", "learning_rate", "throughput"}
INSIDES = {
    "attention_maps",
    "attention_heads",
    "logit_lens",
    "position_similarity",
    "weights",
    "gradient_norms",
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A directory as transformers' own GPT-2 writes it."""
    directory = tmp_path_factory.mktemp("models") / "stock"
    random_gpt2(positions=32).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def make_run(path, **recipe):
    path.mkdir(parents=True)
    lines = (json.dumps(record) + "\n" for record in run_metrics())
    (path / "metrics.jsonl").write_text("".join(lines))
    (path / "recipe.yaml").write_text(yaml.safe_dump({"exp_name": path.name, **recipe}))
    return path


def drawn(directory) -> set[str]:
    """Names of the pictures that are there both as PNG and as SVG."""
    pngs, svgs = ({path.stem for path in directory.glob(f"*.{s}")} for s in ("png", "svg"))
    assert pngs == svgs
    return pngs


def test_a_finished_run_shows_its_curves_and_its_model(stock, tmp_path, capsys):
    run = make_run(tmp_path / "demo", max_grad_norm=1.0)
    (run / "final").symlink_to(stock)

    assert plots.main([str(run)]) == 0

    assert drawn(run / "plots") == CURVES | INSIDES
    out = capsys.readouterr().out
    for name in CURVES | INSIDES:
        assert re.search(rf"^{run}/plots/{name}\.png  \S.+$", out, re.MULTILINE)
    assert "Validation loss 8.00 → 4.07 nats per token in 40 steps" in out
    table = (run / "plots" / "token_neighbours.md").read_text(encoding="utf-8")
    assert table.startswith("| token") and table in out


def test_a_run_that_has_no_model_yet_shows_its_curves(tmp_path, capsys):
    run = make_run(tmp_path / "young")
    assert plots.main([str(run)]) == 0
    assert drawn(run / "plots") == CURVES
    assert "no model yet" in capsys.readouterr().out


def test_a_stock_checkpoint_and_a_prompt_of_any_script(stock, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a glyph that the font lacks is no news
        plots.main([str(stock), "--output", str(tmp_path), "--prompt", "$a_ 中文 😀\n $a_"])
    assert drawn(tmp_path) == INSIDES


def test_two_runs_are_overlaid_apart_from_the_runs_own_plots(tmp_path, capsys):
    adamw, muon = make_run(tmp_path / "adamw"), make_run(tmp_path / "muon")
    assert plots.main([str(adamw), "--compare", str(muon)]) == 0
    assert drawn(adamw / "plots" / "against-muon") == CURVES
    assert "adamw 4.07 after 40 steps, muon 4.07 after 40 steps" in capsys.readouterr().out


def test_runs_of_the_same_name_are_told_apart_by_their_directories(tmp_path):
    runs = [gallery.read_run(str(make_run(tmp_path / d, exp_name="demo"))) for d in ("one", "two")]
    assert gallery._distinct_names(runs) == [str(tmp_path / "one"), str(tmp_path / "two")]


def test_the_baseline_is_drawn_for_the_reproduction_only(tmp_path):
    published = {**VALIDATION_TEXT, "tokenizer_name": "gpt2"}
    for name, recipe, expected in (("gpt2", published, True), ("other", {}, False)):
        run = gallery.read_run(str(make_run(tmp_path / name, **recipe)))
        _, figure = next(gallery.run_pictures(gallery.overlaid([run])))
        assert ("OpenAI GPT-2 124M" in figure.get_suptitle().replace("\n", " ")) is expected


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--prompt", ""], "--prompt"),
        (["--heads", "9.0"], "--heads 9.0"),
        (["--heads", "first"], "LAYER.HEAD"),
        (["--compare", "elsewhere"], "metrics.jsonl"),
        (["--output", "/dev/null/x"], "--output"),
    ],
)
def test_a_mistake_is_answered_with_the_option_to_mend(stock, options, named):
    with pytest.raises(UserError, match=named):
        plots.main([str(stock), *options])


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="RUN_OR_MODEL"):
        plots.main([str(tmp_path)])


def test_chosen_heads_are_drawn(stock, tmp_path, capsys):
    plots.main([str(stock), "--output", str(tmp_path), "--heads", "1.0,0.1"])
    assert re.search(r"(None of these 2 heads|Head (1\.0|0\.1)) looks ", capsys.readouterr().out)
