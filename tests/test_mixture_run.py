"""A mixture from a recipe to a run: trained, stopped, gone on with, told of in the card."""

import json

import pytest
import yaml
from tiny_corpus import documents, write_lines, write_parquet
from tiny_run import digests, metrics, train, write_inputs

from gpt2repro import UserError
from gpt2repro.data import ExactStream
from gpt2repro.data.opening import open_sources
from gpt2repro.publishing.card import model_card
from gpt2repro.recipe import load_recipe
from gpt2repro.training import finish


@pytest.fixture
def recipe(tmp_path):
    """Three sources of three kinds; the second ends after its first epoch."""
    path = write_inputs(tmp_path)
    write_lines(tmp_path / "lines.jsonl", documents(8, seed=5))
    write_parquet(tmp_path / "more" / "0.parquet", documents(90, seed=6))
    change = {
        "datasets": [
            {"name": str(tmp_path / "corpus"), "weight": 5},
            {"name": str(tmp_path / "lines.jsonl"), "weight": 2.5, "epochs": 1},
            {"name": str(tmp_path / "more"), "weight": 2.5, "num_validation_units": 2},
        ]
    }
    given = yaml.safe_load(path.read_text())
    del given["dataset_name"]
    change["datasets"][1]["num_validation_units"] = 0
    path.write_text(yaml.safe_dump(given | change))
    return path


def test_a_run_stops_and_goes_on_and_another_loop_has_its_rows(
    recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(finish, "finish", lambda run: 0)
    assert train(recipe, tmp_path / "whole") == 0
    assert "corpus x 5: 210 documents, about" in capsys.readouterr().out
    assert train(recipe, tmp_path / "parts", "--num_steps", "7") == 0
    assert train(recipe, tmp_path / "parts", "--num_steps", "12") == 0
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")

    last = metrics(tmp_path / "whole")[-2]
    epochs = [last[f"epoch/datasets[{n}]"] for n in range(3)]
    assert epochs[1] == 1, "ended"
    assert 0 <= epochs[0] < 1 and 0 <= epochs[2] < 1

    saved = yaml.safe_load((tmp_path / "whole" / "recipe.yaml").read_text())
    stream = ExactStream(
        saved["datasets"],
        tokenizer=str(tmp_path / "tokenizer"),
        sequence_length=32,
        rows_per_step=8,
        num_lanes=4,
        num_validation_units=1,
        seed=saved["seed"],
    )
    batches, theirs = iter(stream), []
    for _ in range(12):
        next(batches)
        theirs.append(f"{stream.digest:016x}")
    stream.close()
    assert theirs == [*digests(tmp_path / "whole").values()]

    card = model_card(name="mixed", recipe=saved)
    assert "corpus, weight 0.5," in card and "for 1 epochs" in card


def test_the_held_out_text_is_of_those_that_hold_some_out(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "finish", lambda run: 0)
    assert train(recipe, tmp_path / "run", "--num_steps", "1", "--validation_tokens", "960") == 0
    [line] = [line for line in metrics(tmp_path / "run") if line["step"] == 0]
    # Of 960 tokens two thirds and one third, in whole rows of 32.
    assert line["val_tokens"] == 640 + 320


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"weight": 0}, r"datasets\[1\].weight: Input should be greater than 0"),
        ({"weight": -1}, r"datasets\[1\].weight: "),
        ({"wait": 1}, r"datasets\[1\].wait: "),
        ({"epochs": 0}, r"datasets\[1\].epochs: "),
        ({"name": "nowhere/at all"}, r"datasets\[1\]: dataset_name: nowhere/at all is neither"),
        ({"text_column": "body"}, r"datasets\[1\]: text_column: .* has no column 'body'"),
        ({"name": "empty.jsonl"}, r"datasets\[1\]: dataset_name: no documents"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_dataset(
    recipe, tmp_path, monkeypatch, entry, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    given = yaml.safe_load(recipe.read_text())
    given["datasets"][1] |= entry
    recipe.write_text(yaml.safe_dump(given))
    with pytest.raises(UserError, match=message) as raised:
        open_sources(load_recipe(["--recipe", str(recipe)]).all_datasets)
    assert "\n" not in str(raised.value)


def test_one_dataset_or_several(recipe, tmp_path):
    """What a later layer names replaces the other; both in one are refused."""
    over = load_recipe(["--recipe", str(recipe), "--dataset_name", "python-docs"])
    assert over.datasets is None and over.all_datasets[0].name == "python-docs"
    typed = json.dumps([{"name": "a/b"}, {"name": "c/d", "config": "e", "weight": 2}])
    over = load_recipe(["--recipe", "demo", "--datasets", typed])
    assert over.dataset_name is None
    assert [(each.config, each.num_validation_units) for each in over.all_datasets] == [
        (None, None),
        ("e", None),
    ]
    other = load_recipe(["--recipe", str(recipe), "--datasets", typed])
    assert [each.num_validation_units for each in other.all_datasets] == [None, None]
    for words in (["--text_column", "body"], ["--data_files", "a.jsonl"], ["--document", "line"]):
        with pytest.raises(UserError, match=f"{words[0]}: of several datasets each entry has its"):
            load_recipe(["--recipe", str(recipe), *words])
    typed = '[{name: a/b, weight: 1e-1, data_files: "a.jsonl,b.jsonl"}]'
    [one] = load_recipe(["--recipe", "demo", "--datasets", typed]).all_datasets
    assert (one.weight, one.data_files) == (0.1, ["a.jsonl", "b.jsonl"])
    with pytest.raises(UserError, match="chunk_rows is for order: file"):
        load_recipe(["--recipe", "demo", "--chunk_rows", "2"])
    given = yaml.safe_load(recipe.read_text()) | {"dataset_name": "a/b"}
    recipe.write_text(yaml.safe_dump(given))
    for words in (["--recipe", str(recipe)], ["--dataset_name", "null"]):
        with pytest.raises(UserError, match="set exactly one of dataset_name and datasets"):
            load_recipe(words)
    with pytest.raises(UserError, match="num_epochs: each of several datasets has epochs"):
        load_recipe(["--recipe", "demo", "--datasets", typed, "--num_epochs", "2"])
