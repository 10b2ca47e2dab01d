"""The verb: a table, a baseline beside it, and errors of one line."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_language_models import (
    HELLASWAG,
    LAMBADA,
    random_gpt2,
    read,
    task_files,
    tiny_tokenizer,
)

from gpt2repro import UserError
from gpt2repro.commands import evaluate
from gpt2repro.data.opening import open_corpus
from gpt2repro.evaluation import benchmarks
from gpt2repro.system.command_line import EXIT_USAGE, run

FILES: list[str] = ["--hellaswag_file", str(HELLASWAG)]  # and the tasks_dir of `tasks`


@pytest.fixture(scope="module", autouse=True)
def tasks(tmp_path_factory):
    """The harness' own tasks on the fixtures."""
    options = ["--tasks_dir", str(task_files(tmp_path_factory.mktemp("tasks")))]
    FILES.extend(options)
    yield
    del FILES[-len(options) :]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(seed)`: the directory of a tiny model with its tokenizer."""

    def save(seed: int, **config) -> str:
        directory = tmp_path_factory.mktemp(f"model{seed}")
        random_gpt2(seed, **config).save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
        return str(directory)

    return save


@pytest.fixture(scope="module")
def model(saved) -> str:
    return saved(0)


def evaluated(tmp_path: Path, *arguments: str) -> dict:
    output = tmp_path / "out" / "results.json"
    assert evaluate.main([*arguments, *FILES, "--output", str(output), "--device", "cpu"]) == 0
    return json.loads(output.read_text())


def test_foreign_code_is_not_run_unasked(saved, tmp_path):
    directory = Path(saved(0))
    config = json.loads((directory / "config.json").read_text()) | {"model_type": "theirs"}
    config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "theirs.py").write_text(
        "from pathlib import Path\nfrom transformers import GPT2Config, GPT2LMHeadModel\n"
        f"Path({str(tmp_path / 'it ran')!r}).touch()\n"
        "class Config(GPT2Config):\n    model_type = 'theirs'\n"
        "class Model(GPT2LMHeadModel):\n    config_class = Config\n"
    )
    words = ["--model", str(directory), "--hellaswag_file", str(HELLASWAG), "--device", "cpu"]
    words += ["--tasks", "hellaswag_completion"]
    with pytest.raises(UserError, match="--model"):
        evaluate.main(words)
    assert not (tmp_path / "it ran").exists()
    assert evaluate.main([*words, "--trust_remote_code"]) == 0
    assert (tmp_path / "it ran").exists()


def test_how_rows_were_asked_is_all_that_decides_it(tmp_path):
    words = ["--model", "m", "--tasks", "piqa", "--num_fewshot", "3", "--stride", "64"]
    words += ["--tasks_dir", str(tmp_path), "--hellaswag_file", str(tmp_path / "a")]
    words += ["--core_dir", str(tmp_path / "b")]
    assert evaluate._asked_by(evaluate._parse(words), 512) == {
        "num_fewshot": 3,
        "max_length": 512,
        "stride": 64,
        "tasks_dir": str(tmp_path),
        "hellaswag_file": str(tmp_path / "a"),
        "core_dir": str(tmp_path / "b"),
    }


def test_all_benchmarks(model, tmp_path, capsys):
    tasks = "hellaswag_completion,ours_hellaswag,ours_lambada,ours_wikitext"
    found = evaluated(tmp_path, "--model", model, "--tasks", tasks)
    assert set(found["results"]) == {
        *(f"hellaswag/completion_{metric}" for metric in ("acc", "acc_norm")),
        *(f"ours_hellaswag/{metric}" for metric in ("acc", "acc_norm", "gold_bits_per_byte")),
        *("ours_lambada/acc", "ours_lambada/perplexity"),
        *(f"ours_wikitext/{m}" for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")),
    }
    assert all(figure["stderr"] >= 0 for figure in found["results"].values())
    words = found["tasks"]["ours_lambada"]
    assert words["num_scored"] == words["num_rows"] == 12 and words["dataset"] is None
    ours = found["tasks"]["hellaswag_completion"]
    assert ours["dataset"] is None, "a model card links to HellaSwag for all of its rows only"
    assert ours["figures"] == ["hellaswag/completion_acc", "hellaswag/completion_acc_norm"]
    assert found["environment"]["torch"]
    table, notes = capsys.readouterr()
    line = next(line for line in table.splitlines() if line.startswith("ours_wikitext/bits"))
    value = found["results"]["ours_wikitext/bits_per_byte"]
    assert f"{value['value']:.4f} ± {value['stderr']:.4f}" in line
    assert "hellaswag_completion: 10 of 10 rows scored" in notes
    assert "ours_wikitext: 2 of 2 rows scored" in notes and "stride 512" in notes


def test_held_out_text(model, tmp_path):
    texts = [row["text"] for row in read(LAMBADA)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--model", model, "--tasks", "val", "--dataset-name", str(corpus)]
    num_units = str(open_corpus(corpus).num_units)
    arguments += ["--num-validation-units", num_units, "--max-length=64"]
    found = evaluated(tmp_path, *arguments)
    loss = found["results"]["val/loss"]["value"]
    tokenizer = tiny_tokenizer()
    ids = [id for text in texts for id in (tokenizer.eos_token_id, *tokenizer(text)["input_ids"])]
    num_tokens = (len(ids) - 1) // 64 * 64  # in whole rows
    scored = tokenizer.decode(ids[1 : num_tokens + 1], skip_special_tokens=True)
    bits = loss / 0.6931471805599453 * num_tokens / len(scored.encode())
    assert found["results"]["val/bits_per_byte"]["value"] == pytest.approx(bits)
    assert found["tasks"]["val"]["num_scored"] == num_tokens // 64
    assert not found["tasks"]["val"].get("dataset"), "not on the Hub: no link on a model card"
    few = evaluated(tmp_path, *arguments, "--limit", "2")
    assert few["tasks"]["val"]["num_scored"] == 2


def test_a_model_against_itself_differs_by_nothing(model, tmp_path):
    tasks = "ours_lambada,hellaswag_completion"
    found = evaluated(tmp_path, "--model", model, "--baseline", model, "--tasks", tasks)
    assert found["results"] == found["baseline"]["results"]
    for difference in found["difference"].values():
        assert difference == {"value": 0.0, "stderr": 0.0, "paired": True}


def test_a_baseline_on_the_same_rows_is_paired(model, saved, tmp_path, capsys):
    models = ("--model", model, "--baseline", saved(1))
    found = evaluated(tmp_path, *models, "--tasks", "ours_wikitext")
    ours, theirs = found["results"], found["baseline"]["results"]
    for name, difference in found["difference"].items():
        assert difference["paired"]
        assert difference["value"] == ours[name]["value"] - theirs[name]["value"]
        unpaired = (ours[name]["stderr"] ** 2 + theirs[name]["stderr"] ** 2) ** 0.5
        assert 0 < difference["stderr"] != pytest.approx(unpaired)
    assert "difference" in capsys.readouterr().out


def test_other_rows_are_not_paired(model, saved, tmp_path, capsys):
    """The baseline's short context leaves rows out: no example stands against itself."""
    found = evaluated(
        tmp_path,
        *("--model", model, "--baseline", saved(1, positions=48)),
        *("--tasks", "hellaswag_completion"),
    )
    assert found["baseline"]["tasks"]["hellaswag_completion"]["num_scored"] < 10
    skipped = found["baseline"]["tasks"]["hellaswag_completion"]["skipped"]
    assert all("48 positions" in reason for reason in skipped.values())
    assert {d["paired"] for d in found["difference"].values()} == {False}
    table, notes = capsys.readouterr()
    assert "unpaired" in table
    assert "skipped: ending" in notes


def test_malformed_rows_are_on_the_screen_and_in_the_file(model, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    bad = ["{oops", *['{"ctx": "x "}'] * 7]
    rows.write_text("\n".join([*bad, *HELLASWAG.read_text().splitlines()]))
    output = tmp_path / "r.json"
    evaluate.main(
        [
            "--model",
            model,
            "--tasks",
            "hellaswag_completion",
            "--hellaswag_file",
            str(rows),
            "--output",
            str(output),
        ]
    )
    task = json.loads(output.read_text())["tasks"]["hellaswag_completion"]
    assert (task["num_rows"], task["num_scored"]) == (18, 10)
    assert list(task["skipped"]) == [str(number) for number in range(1, 9)]
    notes = capsys.readouterr().err
    assert "10 of 18 rows scored, 8 skipped" in notes
    assert "row 1 skipped: not JSON" in notes
    assert "and 3 more" in notes


def test_limit_and_batch_size(model, tmp_path):
    one = evaluated(tmp_path, "--model", model, "--tasks", "ours_lambada", "--batch-size", "1")
    many = evaluated(tmp_path, "--model", model, "--tasks", "ours_lambada", "--batch_size=64")
    few = evaluated(tmp_path, "--model", model, "--tasks", "ours_lambada", "--limit", "3")
    for name, figure in one["results"].items():
        # float32 log-probabilities, under an exponential for the perplexity
        assert figure["value"] == pytest.approx(many["results"][name]["value"], rel=1e-5)
    assert few["tasks"]["ours_lambada"]["num_scored"] == 3


def test_a_model_whose_logits_are_not_finite_has_no_figures(model, tmp_path, saved):
    """The first choice would be taken for its answer."""
    tensors = load_file(Path(model) / "model.safetensors")
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"] * math.nan
    broken = saved(0)
    save_file(tensors, Path(broken) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="hellaswag_completion: its logits are not finite"):
        evaluated(tmp_path, "--model", broken)


def test_a_tokenizer_may_give_no_token_that_the_model_has_not(saved, tmp_path):
    small = saved(0, vocab_size=100)
    with pytest.raises(UserError, match=r"--tokenizer: it gives token \d+, and the model has 100$"):
        evaluated(tmp_path, "--model", small)
    (tmp_path / "out").rmdir()  # nor is there a file of it


def test_published_figures_are_a_column_of_their_own():
    given = ["--model", "x", "--baseline", "openai-community/gpt2"]
    arguments = evaluate._parse(given)
    assert evaluate._published_for(arguments, 1024)["val/loss"][0] == 3.2924
    for other in (
        ["--num_validation_units", "7"],
        ["--validation_tokens", "4096"],
        ["--dataset_config", "sample-100BT"],
        ["--text_column", "url"],
    ):
        elsewhere = evaluate._published_for(evaluate._parse([*given, *other]), 1024)
        assert elsewhere and "val/loss" not in elsewhere, "other text, not comparable"
    for other in (["--limit", "5"], ["--max_length", "512"], ["--tokenizer", "other"]):
        assert not evaluate._published_for(evaluate._parse([*given, *other]), 1024)
    assert "val/loss" not in evaluate._published_for(arguments, 512), "in a shorter context"
    arguments.baseline = "openai-community/gpt2-xl"
    value, source = evaluate._published_for(arguments, 1024)["hellaswag/completion_acc_norm"]
    assert (value, source) == (0.4893, "karpathy/build-nanogpt (of gpt2-xl)")
    arguments.baseline = None
    assert evaluate._published_for(arguments, 1024) == {}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tasks_dir", "/nowhere"], "--tasks_dir"),
        (["--num_fewshot", "-1"], "--num_fewshot -1"),
        (["--tasks", "core,hellaswag_completion", "--num_fewshot", "5"], "--num_fewshot: --tasks"),
        (["--tasks", ","], "--tasks"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--max_length", "1000"], "--max_length"),
        (["--stride", "1000", "--tasks", "ours_wikitext"], "--stride"),
        (["--dtype", "float8"], "--dtype"),
        (["--baseline", "/nowhere"], "--baseline /nowhere"),
        (["--hellaswag_file", "/nowhere"], "--hellaswag_file /nowhere"),
        (
            ["--tasks", "val", "--dataset_name", "/nowhere", "--num_validation_units", "1"],
            "dataset_name: /nowhere",
        ),
        (["--tasks", "val", "--dataset_name", "texts"], "--num_validation_units: say how many"),
        (["--devise", "cpu"], "--devise"),
        (["--device", "meta"], "--device meta"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--batch_size", "²"], "--batch_size"),
        (
            [
                "--num_validation_units",
                str(10**30),
                "--tasks",
                "val",
                "--dataset_name",
                str(LAMBADA),
            ],
            "num_validation_units: 1000000000000000000000000000000",
        ),
        (["--output", "a" * 300], "--output"),
        (["--hellaswag_file", "a" * 300], "--hellaswag_file"),
        (["--data_files", "a" * 300], "--data_files"),
        (["--output", "/dev/null/results.json"], "--output"),
    ],
)
def test_mistakes_are_one_line_that_names_the_option(model, capsys, arguments, named):
    given = ["--model", model, "--tasks", "hellaswag_completion", *FILES, *arguments]
    assert run("gpt2repro evaluate", evaluate.main, given) == EXIT_USAGE
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("gpt2repro evaluate: error: ") and named in error


def test_several_data_files_are_words_or_have_commas_as_in_a_recipe(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "of {name}"}}\n')
    given = ["--model", "x", "--tasks", "val", "--dataset_name", str(tmp_path)]
    given += ["--num_validation_units", "1", "--data_files"]
    for files in (["a.jsonl", "b.jsonl"], ["a.jsonl,b.jsonl"]):
        corpus = evaluate._open_corpus(evaluate._parse([*given, *files]))
        texts = [text for unit in range(corpus.num_units) for text in corpus.read_unit(unit)]
        assert texts == ["of a", "of b"]


def test_weights_that_are_not_all_there_are_refused(saved):
    """transformers would fill them with random numbers and a warning."""
    directory = Path(saved(3))
    weights = load_file(directory / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--model .* lacks 1 .*transformer\.h\.0\.mlp\.c_fc"):
        evaluate.main(["--model", str(directory), "--tasks", "hellaswag_completion", *FILES])


def test_without_the_harness_one_line_names_the_extra(model, monkeypatch):
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--tasks: ours_lambada: .* `pip install 'lm_eval<0.5'`"):
        evaluate.main(["--model", model, "--tasks", "val,ours_lambada", *FILES])


def test_a_harness_that_is_not_known_yet_is_said_in_a_line(model, tmp_path, monkeypatch):
    """Its first draft is on PyPI."""
    (tmp_path / "lm_eval-0.5.0.dev1.dist-info").mkdir()
    about = "Metadata-Version: 2.1\nName: lm_eval\nVersion: 0.5.0.dev1\n"
    (tmp_path / "lm_eval-0.5.0.dev1.dist-info" / "METADATA").write_text(about)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"--tasks: ours_lambada: .* `pip install 'lm_eval<0.5'`"):
        evaluate.main(["--model", model, "--tasks", "ours_lambada", *FILES])
