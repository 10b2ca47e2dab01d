"""The verb with CORE: figures, controls beside them, and the certification of the yardstick."""

import json
import urllib.request
import zipfile
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from tiny_core import TASKS, write_bundle
from tiny_language_models import HELLASWAG, random_gpt2, task_files, tiny_tokenizer

from gpt2repro.commands import evaluate, scored_model
from gpt2repro.evaluation import core, published
from gpt2repro.evaluation.controls import KINDS
from gpt2repro.system.command_line import EXIT_USAGE, run

SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def save(directory: Path, seed: int) -> Path:
    random_gpt2(seed).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save(tmp_path_factory.mktemp("model"), 0))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> str:
    return str(write_bundle(tmp_path_factory.mktemp("core")))


def evaluated(tmp_path: Path, *arguments: str, status: int = 0) -> dict:
    output = tmp_path / "results.json"
    given = [*arguments, "--output", str(output), "--device", "cpu"]
    assert run("gpt2repro evaluate", evaluate.main, given) == status
    return json.loads(output.read_text())


def test_core_in_the_table_and_in_the_file(model, bundle, tmp_path, capsys):
    options = ["--model", model, "--core-dir", bundle, "--baseline", model]
    found = evaluated(tmp_path, *options, "--tasks", "core")
    results = found["results"]
    each = [f"core/{label}_{m}" for label in TASKS for m in ("acc", "centered")]
    assert list(results) == ["core", *each]
    centered = [results[f"core/{label}_centered"]["value"] for label in TASKS]
    assert results["core"]["value"] == pytest.approx(sum(centered) / len(centered))
    assert found["difference"]["core"] == {"value": 0.0, "stderr": 0.0, "paired": True}
    table, notes = capsys.readouterr()
    line = next(line.split() for line in table.splitlines() if line.startswith("core  "))
    assert float(line[1]) == pytest.approx(results["core"]["value"], abs=1e-4)
    assert "core: 84 of 84 rows scored" in notes and "the mean of 6 tasks" in notes
    one = evaluated(tmp_path, *options[:4], "--tasks", "core/words_10,core/schema", "--limit", "12")
    assert list(one["results"])[::2] == ["core/words_10_acc", "core/schema_acc"]
    assert one["tasks"]["core/schema"]["num_scored"] == 12


def test_controls_are_columns_beside_the_real_figures(model, bundle, tmp_path, capsys):
    files = ["--hellaswag_file", str(HELLASWAG)]
    files += ["--tasks_dir", str(task_files(tmp_path / "tasks"))]
    options = ["--model", model, "--core_dir", bundle, *files]
    tasks = ["--tasks", "hellaswag_completion,ours_wikitext,core"]
    plain = evaluated(tmp_path, *options, *tasks)
    capsys.readouterr()
    found = evaluated(tmp_path, *options, *tasks, "--controls")
    assert found["results"] == plain["results"] and "controls" not in plain
    assert tuple(found["controls"]) == KINDS
    for figures in found["controls"].values():
        others = {name for name in found["results"] if not name.startswith("ours_wikitext")}
        assert figures.keys() == others
    table, notes = capsys.readouterr()
    lines = table.partition("\n\n")[2].splitlines()
    assert lines[0].split() == [model, *KINDS]
    cells = {line.split()[0]: line.replace("±", " ").split()[1:] for line in lines[1:]}
    figure = "hellaswag/completion_acc"
    shown = [found["results"], *found["controls"].values()]
    assert list(map(float, cells[figure][::2])) == pytest.approx(
        [column[figure]["value"] for column in shown], abs=1e-4
    )
    assert cells["ours_wikitext/bits_per_byte"][2:] == ["-", "-", "-"]
    for kind in KINDS:
        assert f"ours_wikitext: {kind}: nothing to change in 2 rows" in notes


# --- Certification --------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with FakeHub() as hub:
        for seed, name in enumerate(SIZES):
            directory = save(tmp_path / name, seed)
            files = {file.name: file.read_bytes() for file in directory.iterdir()}
            hub.add("models", f"openai-community/{name}", files)
        hub.use_in_process(monkeypatch)
        yield hub


def test_certify_tells_of_each_of_the_four_whether_it_is_the_published_one(
    hub, bundle, tmp_path, monkeypatch, capsys
):
    options = ["--certify", "--core_dir", bundle]
    found = evaluated(tmp_path, *options, status=1)["certification"]
    names = [f"openai-community/{name}" for name in SIZES]
    assert list(found) == names
    assert [each["published"] for each in found.values()] == [0.1139, 0.1849, 0.2146, 0.2565]
    assert len({each["value"] for each in found.values()}) == 4, "four models"
    for size, name in zip(SIZES, names, strict=True):
        there = (found[name]["value"] + 0.0029, published.NANOCHAT)
        monkeypatch.setitem(published.PUBLISHED[size], "core", there)
    monkeypatch.setitem(published.PUBLISHED["gpt2-large"], "core", (0.9, published.NANOCHAT))
    capsys.readouterr()
    some = [str(tmp_path / "gpt2"), names[2]]  # a copy on the disk is as good
    mixed = evaluated(tmp_path, *options, "--models", *some, status=1)["certification"]
    assert [each["certified"] for each in mixed.values()] == [True, False]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == some
    assert lines[0].endswith(": within 0.003") and lines[1].endswith(": NOT within 0.003")
    table = tmp_path / "table.md"
    files = [str(table), str(tmp_path / "table.svg")]
    given = [*options, "--models", some[0], "--device", "cpu", "--output", *files]
    assert run("gpt2repro evaluate", evaluate.main, given) == 0
    value = found[names[0]]["value"]
    line = table.read_text().splitlines()[2].split(" | ")
    assert line[0] == f"| {some[0]}/core" and line[1].startswith(f"{value:.4f} ± ")
    assert line[2].startswith("-0.0029") and line[3] == f"{value + 0.0029:g} |"
    assert "<svg" in Path(files[1]).read_text()


@pytest.mark.parametrize("options", [[], ["--autocast"]])
def test_certify_may_round_as_the_published_figures_did(
    model, bundle, tmp_path, monkeypatch, options
):
    rounds, score_all = [], scored_model.score_all

    def watched(*arguments):
        rounds.append(torch.is_autocast_enabled("cpu"))
        return score_all(*arguments)

    monkeypatch.setattr(scored_model, "score_all", watched)
    (tmp_path / "gpt2-xl").symlink_to(model)
    one = ["--models", str(tmp_path / "gpt2-xl")]
    evaluated(tmp_path, "--certify", "--core_dir", bundle, *one, *options, status=1)
    assert rounds == [bool(options)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--model: "),
        (["--model", "x", "--models", "y"], "--models"),
        (["--model", "x", "--tasks", "core"], "--core_dir: name the directory"),
        (["--model", "x", "--tasks", "core", "--core_dir", "/nowhere"], "--core_dir /nowhere"),
        (["--model", "x", "--autocast"], "--autocast goes with --certify"),
        (["--certify"], "--core_dir: name the directory"),
        (["--certify", "--core_dir", "/nowhere"], "no core.yaml in it"),
        (["--certify", "--model", "x"], "--model: --certify"),
        (["--certify", "--limit", "5"], "--limit: --certify"),
        (["--certify", "--tasks", "val"], "--tasks: --certify"),
        (["--certify", "--controls"], "--controls: --certify"),
        (["--certify", "--max_length", "64"], "--max_length: --certify"),
        (["--certify", "--core_dir", "x", "--rows", "y"], "--rows: --certify goes with --models, "),
        (["--compare", "x", "y", "--limit", "5"], "--limit: --compare goes with --output only"),
        (["--model", "x", "--compare", "x", "y"], "--model: --compare"),
        (["--compare", "x", "y", "--certify"], "--certify: --compare"),
        (["--model", "x", "--output", "a.md", "b.txt"], "b.txt: ends in none of .json, .md, .svg,"),
        (["--certify", "--output", "a"], "--output a: ends in none of .json"),
        (["--compare", "x", "y", "--output", "a.jsn"], "--output a.jsn: ends in none of .json"),
        (["--model", "x", "--rows", "/dev/null/x.parquet"], "--rows /dev/null/x.parquet"),
        (["--certify", "--models", "distilgpt2"], "published are gpt2, gpt2-medium"),
    ],
)
def test_mistakes_are_one_line_before_any_model_is_loaded(capsys, arguments, named):
    assert run("gpt2repro evaluate", evaluate.main, arguments) == EXIT_USAGE
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("gpt2repro evaluate: error: ") and named in error


def test_published_core_is_of_all_rows():
    given = ["--model", "openai-community/gpt2", "--tasks", "core", "--core_dir", "x"]
    assert evaluate._published_for(evaluate._parse(given), 1024)["core"][0] == 0.1139
    few = evaluate._parse([*given, "--limit", "50"])
    assert "core" not in evaluate._published_for(few, 1024)


@pytest.mark.internet
def test_the_smallest_is_certified_on_the_real_bundle(tmp_path):
    """Hours on a CPU, minutes on a GPU; GPT2REPRO_INTERNET=1."""
    urllib.request.urlretrieve(core.URL, tmp_path / "bundle.zip")
    with zipfile.ZipFile(tmp_path / "bundle.zip") as zipped:
        zipped.extractall(tmp_path)
    given = ["--certify", "--core_dir", str(tmp_path / "eval_bundle")]
    given += ["--models", "openai-community/gpt2", "--autocast"]
    assert run("gpt2repro evaluate", evaluate.main, given) == 0
