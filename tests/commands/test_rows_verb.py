"""The verb `rows`: a step's text, who saw a document, what a checkpoint has read."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny_corpus import documents
from tiny_run import digests, train, without_export, write_inputs
from tiny_shards import write_bin

from gpt2repro import UserError
from gpt2repro.commands import tokenize
from gpt2repro.commands.rows import main
from gpt2repro.records import integrity

TEXTS = documents(240, max_words=40)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    recipe = write_inputs(directory)
    with without_export():
        assert train(recipe, directory / "tiny") == 0
    return directory


def shown(capsys, *words) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_a_step_has_the_digest_that_the_run_wrote_from_wherever_it_is_read(run, capsys):
    recipe, checkpoint = run / "recipe.yaml", run / "tiny" / "checkpoints" / "step_00000008"
    from_start = shown(capsys, "--recipe", recipe, "--step", 9)
    assert f"step 9, rows_digest {digests(run / 'tiny')[9]}, 8 rows" in from_start
    assert shown(capsys, "--checkpoint", checkpoint, "--step", 9) == from_start
    earlier = shown(capsys, "--checkpoint", checkpoint, "--step", 2)
    assert f"step 2, rows_digest {digests(run / 'tiny')[2]}" in earlier
    own = shown(capsys, "--checkpoint", checkpoint, "--row", 5)
    assert f"step 8, rows_digest {digests(run / 'tiny')[8]}" in own
    assert re.findall(r"--- row (\d+), lane (\d+)", own) == [("5", "2")]
    told = re.findall(r"\[document (\d+):(\d+) of 0.parquet, row group \1, .*\]\n(.*)", from_start)
    assert len(told) >= 8
    assert all(text in TEXTS[30 * int(unit) + int(number)] for unit, number, text in told)


def test_a_checkpoint_does_not_say_where_to_write(run, tmp_path, capsys):
    """Somebody else's may, in its recipe."""
    theirs = run / "tiny" / "checkpoints" / "step_00000008"
    checkpoint = Path(shutil.copytree(theirs, tmp_path / theirs.name))
    state = json.loads((checkpoint / "state.json").read_text())
    places = {name: str(tmp_path / name) for name in ("token_cache_dir", "unit_digests_dir")}
    state["recipe"] |= places
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / integrity.MARKER).unlink()
    integrity.mark(checkpoint)
    assert shown(capsys, "--checkpoint", checkpoint, "--row", 0).startswith("step 8")
    assert [*tmp_path.iterdir()] == [checkpoint]
    given = ["--token_cache_dir", tmp_path / "mine"]
    assert shown(capsys, "--checkpoint", checkpoint, "--row", 0, *given).startswith("step 8")
    assert {*tmp_path.iterdir()} == {checkpoint, tmp_path / "mine"}


def test_a_document_is_found_by_its_text_its_name_and_its_digest(run, capsys):
    base = ["--recipe", run / "recipe.yaml"]
    first = shown(capsys, *base, "--row", 0)
    name = re.search(r"\[document (\d+:\d+) of .*, tokens 0 to .*, digest ([0-9a-f]{32})\]", first)
    unit, number = map(int, name[1].split(":"))
    text = TEXTS[30 * unit + number]
    found = shown(capsys, *base, "--step", 12, "--find", text)
    assert f"step 0, lane 0: document {name[1]}" in found and "1 documents: " in found
    assert shown(capsys, *base, "--step", 12, "--find", name[1]) == found
    assert shown(capsys, *base, "--step", 12, "--find", name[2]) == found
    assert main([*map(str, base), "--find", "no text has this"]) == 1
    assert "no document that is trained on has that" in capsys.readouterr().out


def test_what_a_checkpoint_has_read_can_be_recomputed(run, capsys):
    """From the recipe alone, without the checkpoint, to the byte."""
    checkpoint = run / "tiny" / "checkpoints" / "step_00000012"
    told = shown(capsys, "--checkpoint", checkpoint, "--seen")
    assert told == shown(capsys, "--recipe", run / "recipe.yaml", "--step", 12, "--seen")
    seen = json.loads(told)
    assert seen["step"] == 12 and seen["identity"]["rows_per_step"] == 8
    assert {entry["lane"] for entry in seen["read"]} == {0, 1, 2, 3}


def test_texts_of_token_shards_are_what_was_encoded(run, tmp_path, capsys):
    recipe = ["--recipe", str(run / "recipe.yaml")]
    assert tokenize.main([*recipe, "--output", str(tmp_path / "shards")]) == 0
    capsys.readouterr()
    told = shown(capsys, *recipe, "--dataset_name", tmp_path / "shards", "--row", 0)
    found = re.findall(r"\[document 1:\d+ of tokens_train_000001.bin, .*\]\n(.*)", told)
    assert found and all(any(text.strip() in whole for whole in TEXTS) for text in found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "-1"], "--step: -1 is below 0"),
        (["--row", "8"], "--row: 8 of 8 rows"),
        (["--find", "0:3"], "--find: unit 0 is held out"),
        (["--find", "a", "--row", "1"], "--find: leave --row and --seen out"),
        (["--find", ""], "--find: it is empty"),
        (["--find", "99:0"], "--find: the dataset has no unit 99"),
        (["--find", "7:99"], "--find: unit 7 has 30 documents"),
        (["--checkpoint", "x", "--seed", "1"], "--seed: the checkpoint has its recipe; leave it"),
        (["--checkpoint", "nowhere"], "--checkpoint nowhere: no such checkpoint directory"),
    ],
)
def test_bad_options_are_one_line(run, words, message):
    base = [] if "--checkpoint" in words else ["--recipe", str(run / "recipe.yaml")]
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        main([*base, *words])
    assert "\n" not in str(raised.value)


def test_steps_that_the_run_does_not_have_are_told(run, capsys):
    beyond = "note  num_steps is 12: this is what a longer run would go on with.\n"
    for step, said in ((12, ""), (13, beyond)):
        assert main(["--recipe", str(run / "recipe.yaml"), "--step", str(step), "--seen"]) == 0
        assert capsys.readouterr().err == said


def test_an_order_of_files_has_no_documents(run, tmp_path):
    import numpy as np

    write_bin(tmp_path / "a.bin", np.array([0, *range(5, 250)] * 40))
    words = ["--dataset_name", str(tmp_path), "--order", "file"]
    with pytest.raises(
        UserError, match="order: rows are traced to documents in the order shuffled"
    ):
        main(["--recipe", str(run / "recipe.yaml"), *words])
