"""What a recipe names, from any working directory; what rank 0 opens for all."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_hub import FakeHub
from tiny_corpus import documents, parquet_bytes
from tiny_language_models import HELLASWAG
from tiny_run import digests, train, write_inputs
from tiny_shards import write_bin

from gpt2repro import UserError
from gpt2repro.data.opening import open_corpus
from gpt2repro.data.rows.mixture import Source
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.bpe import train_bpe
from gpt2repro.data.tokens.encoder import BulkEncoder
from gpt2repro.recipe import load_recipe
from gpt2repro.records.run_directory import Start
from gpt2repro.records.saved_models import find_tokenizer
from gpt2repro.system import ranks
from gpt2repro.training import finish, inputs
from gpt2repro.training.inputs import Inputs, from_anywhere, open_inputs


def test_a_run_of_relative_names_goes_on_from_another_directory(tmp_path, monkeypatch, capsys):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    recipe = write_inputs(home)
    fields = yaml.safe_load(recipe.read_text())
    fields |= {
        "tokenizer_name": "./tokenizer",
        "dataset_name": "corpus",
        "token_cache_dir": "cache",
    }
    fields |= {"hellaswag_file": "rows.jsonl", "eval_tasks": ["hellaswag_completion"]}
    recipe.write_text(yaml.safe_dump(fields))
    (home / "rows.jsonl").write_text('{"ctx": "a", "endings": ["b", "c"], "label": 0}')
    monkeypatch.setattr(finish, "finish", lambda run: 0)
    monkeypatch.chdir(home)
    assert train(recipe, Path("runs/tiny"), "--num_steps", "4") == 0
    saved = home / "runs" / "tiny" / "recipe.yaml"
    assert yaml.safe_load(saved.read_text()) | {
        "tokenizer_name": str(home / "tokenizer"),
        "dataset_name": str(home / "corpus"),
        "output_dir": str(home / "runs" / "tiny"),
        "token_cache_dir": str(home / "cache"),
        "hellaswag_file": str(home / "rows.jsonl"),
    } == yaml.safe_load(saved.read_text())
    monkeypatch.chdir(elsewhere)
    checkpoint = home / "runs" / "tiny" / "checkpoints" / "step_00000004"
    assert len(find_tokenizer(str(checkpoint))) == 300
    words = ["--recipe", str(saved), "--num_steps", "8"]
    capsys.readouterr()
    assert train(saved, home / "runs" / "tiny", *words[2:]) == 0
    said = capsys.readouterr().out
    assert "going on from its step 4" in said
    changes = [line for line in said.splitlines() if " until here and is " in line]
    assert len(changes) == 1 and "num_steps" in changes[0]
    assert len(digests(home / "runs" / "tiny")) == 8 and not list(elsewhere.iterdir())


def test_a_folder_of_texts_is_trained_on_by_its_name_alone(tmp_path, monkeypatch, capsys):
    """What is held out is decided once, and saved; what it is stands on the first lines."""
    recipe, run, texts = write_inputs(tmp_path), tmp_path / "run", documents(100, max_words=40)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:03}.txt").write_text(text)
    monkeypatch.setattr(finish, "finish", lambda run: 0)
    words = ["--dataset_name", str(tmp_path / "texts"), "--num_steps"]
    assert train(recipe, run, *words, "4") == 0
    saved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (saved["num_validation_units"], saved["validation_fraction"]) == (8, None)
    shares = (
        r"texts: 90 documents, about ([\d,]+) tokens to train on, ([\d.]+) epochs in this run; "
        r"10 documents, about ([\d,]+) tokens held out\n"
    )
    found = re.search(shares, capsys.readouterr().out).groups()
    encoder = BulkEncoder(train_bpe(documents(240, max_words=40), 300))
    lengths = [1 + len(ids) for ids in encoder.encode(texts)]
    true = [sum(lengths[10:]), 4 * 256 / sum(lengths[10:]), sum(lengths[:10])]
    assert [float(each.replace(",", "")) for each in found] == pytest.approx(true, rel=0.1)
    # Another default, as a later version may have it: the run keeps its own.
    monkeypatch.setattr(inputs, "units_to_hold_out", lambda *_: 3)
    assert train(recipe, run, *words, "6") == 0 and len(digests(run)) == 6
    with pytest.raises(UserError, match="num_validation_units was 8 in the checkpoint and is"):
        train(recipe, run, *words, "8", "--validation_fraction", "0.5")


def test_one_document_cannot_be_held_out(tmp_path, monkeypatch, capsys):
    recipe, run, text = write_inputs(tmp_path), tmp_path / "run", tmp_path / "all.txt"
    text.write_text("word " * 2000)
    words = ["--dataset_name", str(text), "--num_lanes", "1", "--num_epochs", "2"]
    with pytest.raises(UserError, match="num_validation_units: the dataset is a single unit"):
        train(recipe, run, *words)
    monkeypatch.setattr(finish, "finish", lambda run: 0)
    assert train(recipe, run, *words, "--num_validation_units", "0") == 0
    said = capsys.readouterr().out
    assert "1 document, about " in said and "2.0 epochs in this run; nothing held out" in said
    [ids] = BulkEncoder(load_tokenizer(tmp_path / "tokenizer")).encode([text.read_text()])
    assert len(digests(run)) == 2 * (1 + len(ids)) // 256  # batch_tokens


def test_a_resumed_run_reads_the_commit_that_it_began_with(tmp_path, monkeypatch):
    """Somebody pushes other texts meanwhile; a run of today must not see them tomorrow."""
    recipe, run = write_inputs(tmp_path), tmp_path / "run"
    texts = documents(240, max_words=40)
    monkeypatch.setattr(finish, "finish", lambda run: 0)
    with FakeHub() as hub:
        hub.use_in_process(monkeypatch)
        corpus = hub.add("datasets", "me/texts", {"0.parquet": parquet_bytes(texts, 30)})
        first = corpus.resolve("main")
        assert train(recipe, run, "--dataset_name", "me/texts", "--num_steps", "4") == 0
        corpus.commit({"0.parquet": parquet_bytes(texts[::-1], 30)})
        assert corpus.resolve("main") != first
        assert train(recipe, run, "--dataset_name", "me/texts", "--num_steps", "6") == 0
    assert train(recipe, tmp_path / "here", "--num_steps", "6") == 0
    assert digests(run) == digests(tmp_path / "here")


def test_units_are_hashed_and_cached_where_a_recipe_says(tmp_path, monkeypatch):
    """Those that are trained on, and those that are held out."""
    recipe = write_inputs(tmp_path)
    monkeypatch.setattr(finish, "finish", lambda run: 0)
    places = ["--unit_digests_dir", tmp_path / "digests", "--token_cache_dir", tmp_path / "cache"]
    assert train(recipe, tmp_path / "run", "--num_steps", "60", *map(str, places)) == 0
    [record] = (tmp_path / "digests").rglob("*.units")
    assert {line.split()[0] for line in record.read_text().split("\n") if line} == set("01234567")
    cached = {int(path.stem) for path in (tmp_path / "cache").rglob("*.tokens")}
    assert cached == set(range(8))


def test_limits_and_shares_of_a_recipe_hold(tmp_path):
    recipe = load_recipe(["--recipe", str(write_inputs(tmp_path)), "--validation_fraction", "0.4"])
    tokenizer = load_tokenizer(recipe.tokenizer_name)
    encoder = BulkEncoder(tokenizer)
    [source] = inputs.open_datasets(recipe, encoder)
    assert (source.num_validation_units, source.corpus.num_units) == (3, 8)
    tasks = {
        "sequence_length": 64,
        "eval_tasks": ["hellaswag_completion"],
        "hellaswag_file": str(HELLASWAG),
    }
    for limit, count in ((None, 10), (2, 2)):
        limited = recipe.model_copy(update=tasks | {"eval_tasks_limit": limit})
        [task] = inputs.open_benchmarks(limited, tokenizer)
        assert task.num_rows == count
    (tmp_path / "shards").mkdir()
    write_bin(tmp_path / "shards" / "train_0.bin", np.arange(3000) % 300)
    shards = [Source(open_corpus(tmp_path / "shards"), 0)]
    of_shards = recipe.model_copy(update={"order": "file", "chunk_rows": 16})
    stream = inputs.open_stream(of_shards, shards, encoder, 0, 1)
    assert stream.identity["chunk_rows"] == 16


def test_only_what_is_here_is_made_absolute(tmp_path, monkeypatch):
    """A name of the Hub stays one, unless a directory here has it: that is what would be read."""
    monkeypatch.chdir(tmp_path)
    names = ["--tokenizer_name", "gpt2", "--init_from", "openai-community/gpt2"]
    recipe = load_recipe(["--recipe", "demo", *names])
    found = from_anywhere(recipe)
    assert (found["dataset_name"], found["tokenizer_name"]) == ("python-docs", "gpt2")
    assert found["init_from"] == "openai-community/gpt2"
    for name in ("gpt2", "openai-community/gpt2", "python-docs"):
        Path(name).mkdir(parents=True)
    found = from_anywhere(recipe)
    assert found["tokenizer_name"] == str(tmp_path / "gpt2")
    assert found["init_from"] == str(tmp_path / "openai-community" / "gpt2")
    assert found["dataset_name"] == "python-docs"  # the demo's comes before a directory


@pytest.mark.parametrize(
    ("dataset", "absolute"), [("json", True), ("someone/texts", False), ("here", False)]
)
def test_data_files_are_relative_to_their_dataset(tmp_path, monkeypatch, dataset, absolute):
    """But for a bare reader, whose files are relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    files = ["a/*.jsonl", "hf://datasets/x/y.jsonl", "/data/b.jsonl"]
    recipe = load_recipe(["--dataset_name", dataset, "--data_files", ",".join(files)])
    found = from_anywhere(recipe).get("data_files", recipe.data_files)
    assert found == [str(tmp_path / files[0]) if absolute else files[0], *files[1:]]


def test_the_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}))
    train_bpe(documents(9), 300).save_pretrained(tmp_path / "tokenizer")
    recipe = load_recipe(["--tokenizer_name", "~/tokenizer", "--hellaswag_file", "~/a.jsonl"])
    assert recipe.tokenizer_name == str(tmp_path / "tokenizer")
    assert recipe.hellaswag_file == str(tmp_path / "a.jsonl")


@pytest.mark.parametrize("place", ["hub", "here"])
def test_rank_0_asks_the_hub_for_all(tmp_path, monkeypatch, place):
    """One process plays both, one after the other: what rank 0 sends is what rank 1 receives."""
    path = write_inputs(tmp_path)
    options = ["--recipe", str(path)]
    if place == "hub":
        options += ["--dataset_name", "someone/texts"]
    sent: list[bytes] = []

    def opened(rank: int) -> Inputs:
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        inputs = open_inputs(load_recipe(options), Start(None, {}, ""))
        inputs.stream.close()
        return inputs

    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "gather", lambda value: [value])
    with FakeHub() as hub:
        hub.use_in_process(monkeypatch)
        texts = (tmp_path / "corpus" / "0.parquet").read_bytes()
        hub.add("datasets", "someone/texts", {"0.parquet": texts})
        monkeypatch.setattr(
            ranks, "broadcast", lambda value: sent.append(pickle.dumps(value)) or value
        )
        zero = opened(0)
        assert bool(hub.log) == (place == "hub")
        hub.log.clear()
        monkeypatch.setattr(ranks, "broadcast", lambda value: pickle.loads(sent.pop(0)))
        one = opened(1)
        assert not hub.log and not sent
        assert one.sources[0].corpus.read_unit(7) == zero.sources[0].corpus.read_unit(7)
    assert one.stream.identity == zero.stream.identity
    assert (one.validation.rows == zero.validation.rows).all()
    assert (one.validation.num_bytes == zero.validation.num_bytes).all()
