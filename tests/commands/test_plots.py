"""`gpt2repro plots` on a run, a stock checkpoint and two runs; and what it refuses."""

import json
import re
import warnings

import pytest
import torch
import yaml
from tiny_checkpoint import save_now
from tiny_gpt2 import tiny_model
from tiny_language_models import random_gpt2, tiny_tokenizer
from tiny_metrics import run_metrics
from torch.optim import AdamW

from gpt2repro import UserError
from gpt2repro.commands import plots
from gpt2repro.evaluation.published import VALIDATION_TEXT
from gpt2repro.plots import gallery
from gpt2repro.records.saved_models import locate

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


def test_a_run_that_has_not_validated_is_not_of_another_text(tmp_path, capsys):
    old, new = make_run(tmp_path / "old"), make_run(tmp_path / "new")
    lines = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()[:5]]
    lines = [{k: v for k, v in line.items() if not k.startswith("val_")} for line in lines]
    (new / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plots.main([str(old), "--compare", str(new)]) == 0
    shown = capsys.readouterr().out
    assert "different texts" not in shown and "Validation loss" in shown


def test_runs_of_the_same_name_are_told_apart_by_their_directories(tmp_path):
    runs = [gallery.read_run(str(make_run(tmp_path / d, exp_name="demo"))) for d in ("one", "two")]
    names = gallery._distinct_names(runs)
    assert names == [gallery.middle_cut(str(tmp_path / name)) for name in ("one", "two")]
    assert max(map(len, names)) <= 41 and names[0].endswith("/one") and names[1].endswith("/two")


def test_a_run_that_is_made_longer_shows_the_model_it_has_now(stock, tmp_path):
    """Its `final/` is of the shorter one until the longer one has its own."""
    run, model = make_run(tmp_path / "longer"), tiny_model()
    optimizer = AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    step = save_now(run / "checkpoints", 6, model, optimizer)
    (run / "final").symlink_to(stock)
    for finished, expected in (("4", step), ("6", run / "final")):
        (run / "FINISHED").write_text(f"{finished}\n")
        assert plots._model_of(str(run)) == locate(str(run)) == str(expected)


def test_weights_that_are_not_finite_have_no_findings(tmp_path):
    model = random_gpt2(positions=32)
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"1 tensors are not finite, such as transformer\.h\.0\.mlp"
    ):
        plots.main([str(tmp_path)])


def test_activations_that_are_not_finite_have_no_findings(tmp_path):
    model = random_gpt2(positions=32)
    model.transformer.h[0].attn.c_attn.weight.data *= 1e30
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="what it computes of this --prompt is not finite"):
        plots.main([str(tmp_path)])


@pytest.mark.parametrize("name", ["token_neighbours.md", "page.html"])
def test_a_directory_in_the_place_of_a_file_is_one_line(stock, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"--output .* cannot be written"):
        plots.main([str(stock), "--html", "--output", str(tmp_path)])


def test_a_model_without_a_tokenizer_can_be_given_one(stock, tmp_path):
    random_gpt2(positions=32).save_pretrained(tmp_path / "bare")
    bare = [str(tmp_path / "bare"), "--output", str(tmp_path / "plots")]
    with pytest.raises(UserError, match=r"RUN_OR_MODEL \S+ holds no tokenizer"):
        plots.main(bare)
    assert plots.main([*bare, "--tokenizer", str(stock)]) == 0


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
        (["--compare", "x", "--heads", "0.0"], "--heads: with --compare"),
        (["--compare", "x", "--prompt", "y"], "--prompt: with --compare"),
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
    assert "No head here looks mostly" in capsys.readouterr().out
