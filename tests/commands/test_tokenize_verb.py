"""The verb `tokenize`: a recipe's texts as shards, what it says, and that the text is the same."""

import re

import pytest
from tiny_corpus import documents, write_parquet

from gpt2repro import UserError
from gpt2repro.commands.tokenize import main
from gpt2repro.data.corpora import shards
from gpt2repro.data.corpora.manifest import read_manifest
from gpt2repro.data.rows.held_out import validation_set
from gpt2repro.data.tokens.bpe import train_bpe
from gpt2repro.data.tokens.encoder import BulkEncoder
from gpt2repro.recipe import load_recipe
from gpt2repro.training import inputs

TEXTS = documents(400)


@pytest.fixture
def recipe(tmp_path):
    write_parquet(tmp_path / "data" / "train.parquet", [*TEXTS[:5], None, *TEXTS[5:]])
    train_bpe(TEXTS, 400).save_pretrained(tmp_path / "tokenizer")
    words = ["--recipe", "demo", "--tokenizer_name", str(tmp_path / "tokenizer")]
    return [*words, "--dataset_name", str(tmp_path / "data")]


def test_what_it_says_and_what_stays_held_out(recipe, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    words = [*recipe, "--num_validation_units", "4", "--output", str(output), "--shard-tokens=5000"]
    assert main(words) == 0
    manifest = read_manifest(output)
    there = f"{len(manifest.shards)} shards of {manifest.num_tokens:,} tokens in {output}"
    assert re.fullmatch(rf"{there}: complete, [\d,]+ tokens/s\n", capsys.readouterr().out)
    assert main(words) == 0
    assert capsys.readouterr().out == f"{there}: complete, there is nothing to do\n"
    (output / manifest.shards.pop().name).unlink()
    manifest.model_copy(update={"complete": False}).save(output)
    assert main(words) == 0
    going_on, complete = capsys.readouterr().out.splitlines()
    assert going_on.endswith(f"{manifest.num_tokens:,} tokens in {output}: going on")
    assert complete.startswith(f"{there}: complete")

    monkeypatch.setattr(shards, "UNIT_TOKENS", 1000)  # the held-out shard has several
    found = []
    for number, read in (("4", recipe), ("null", [*recipe[:4], "--dataset_name", str(output)])):
        read = load_recipe([*read, "--num_validation_units", number])
        encoder = BulkEncoder(inputs.open_tokenizer(read))
        [source] = inputs.open_datasets(read, encoder)
        num_units = source.num_validation_units
        held = validation_set(source.corpus, encoder, sequence_length=16, num_units=num_units)
        found.append((held.rows.tolist(), held.num_bytes.tolist()))
    assert num_units > 1 and found[0] == found[1]


def test_bad_options_are_refused(recipe, tmp_path):
    for words, said in (
        (["--output", "/dev/null/shards"], "--output /dev/null/shards"),
        (["--shard_tokens", "10"], "--shard_tokens: 10 is not 1,000 to"),
        (["--num_threads", "0"], "--num_threads: 0 is not 1 to 1,024"),
        (["--format", "txt"], "--format: invalid choice: 'txt'"),
        (["--shards", "1"], "--shards: no such field"),
    ):
        with pytest.raises(UserError, match=said):
            main([*recipe, "--output", str(tmp_path / "out"), *words])
