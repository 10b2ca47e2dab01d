"""What `evaluate` writes: a table, a picture, rows of two models to be compared without either."""

import contextlib
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny_core import write_bundle
from tiny_language_models import HELLASWAG, random_gpt2, task_files, tiny_tokenizer

from gpt2repro.commands import evaluate
from gpt2repro.system.command_line import EXIT_USAGE, run

TASKS = ["--tasks", "hellaswag_completion,ours_lambada,ours_wikitext,core"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A directory with two models, the tasks' files, and what `evaluate` wrote of each."""
    directory = tmp_path_factory.mktemp("files")
    task_files(directory / "tasks")
    write_bundle(directory / "core")
    for name, seed in (("ours", 0), ("theirs", 1)):
        random_gpt2(seed).save_pretrained(directory / name)
        tiny_tokenizer().save_pretrained(directory / name)
        arguments = ["--model", str(directory / name), "--rows", str(directory / f"{name}.parquet")]
        assert evaluate.main([*arguments, *TASKS, *options(directory)]) == 0
    return directory


def options(directory: Path) -> list[str]:
    return [
        *("--hellaswag_file", str(HELLASWAG), "--tasks_dir", str(directory / "tasks")),
        *("--core_dir", str(directory / "core"), "--device", "cpu"),
    ]


@pytest.fixture(scope="module")
def together(files) -> list[str]:
    """What is shown of both models at once; all kinds of `--output` lie beside them."""
    outputs = [str(files / f"together.{kind}") for kind in ("json", "md", "svg", "png")]
    models = ["--model", str(files / "ours"), "--baseline", str(files / "theirs")]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert evaluate.main([*models, *TASKS, *options(files), "--output", *outputs]) == 0
    return shown.getvalue().splitlines()


def test_rows_compare_as_the_models_do(files, together, capsys):
    """The same figures, differences and errors as with both models at once."""
    both = [str(files / f"{name}.parquet") for name in ("ours", "theirs")]
    assert evaluate.main(["--compare", *both]) == 0
    apart = capsys.readouterr().out.splitlines()
    assert [line.split() for line in apart] == [line.split() for line in together]
    assert len(apart) > 10 and "unpaired" not in "".join(apart)
    outputs = [files / f"compared.{kind}" for kind in ("json", "md", "svg")]
    assert evaluate.main(["--compare", *both, "--output", *map(str, outputs)]) == 0
    found, markdown = json.loads(outputs[0].read_text()), outputs[1].read_text().splitlines()
    assert found["results"].keys() == found["difference"].keys() and found["difference"]["core"]
    assert found["baseline"]["model"] == str(files / "theirs")
    assert len(markdown) == len(apart) + 1 and "<svg" in outputs[2].read_text()
    table = pq.read_table(both[0]).to_pylist()
    of_figure = [line for line in table if line["figure"] == "hellaswag/completion_acc"]
    assert [line["row"] for line in of_figure] == [str(n) for n in range(1, 11)]
    assert {line["influence"] for line in of_figure} <= {0.0, 1.0}


def test_other_rows_are_unpaired_and_other_questions_refused(files, tmp_path, capsys):
    few, shots = str(tmp_path / "few.parquet"), str(tmp_path / "shots.parquet")
    model = ["--model", str(files / "theirs"), "--tasks", "hellaswag_completion", *options(files)]
    assert evaluate.main([*model, "--limit", "5", "--rows", few]) == 0
    assert evaluate.main([*model, "--max_length", "64", "--rows", shots]) == 0
    whole = str(files / "ours.parquet")
    capsys.readouterr()
    assert evaluate.main(["--compare", whole, few]) == 0
    assert capsys.readouterr().out.count("unpaired") == 2
    (tmp_path / "text.parquet").write_text("no table")
    for other, said in (
        (shots, "--compare: rows were asked otherwise: max_length "),
        (str(tmp_path / "text.parquet"), "text.parquet: it is no file of --rows"),
        (str(tmp_path / "nowhere"), "nowhere: it is no file of --rows"),
    ):
        assert run("gpt2repro evaluate", evaluate.main, ["--compare", whole, other]) == EXIT_USAGE
        out, error = capsys.readouterr()
        assert said in error and not out and len(error.splitlines()) == 1


def test_rows_of_other_texts_or_in_another_context_are_not_taken_for_the_same(
    files, tmp_path, capsys
):
    """Whatever their numbers: held-out texts of as many rows, a context that nobody named."""
    for name, text in (("one", "a man stands on the hill. "), ("two", "she sings in the street! ")):
        lines = [json.dumps({"text": text * 40})] * 4
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        given = ["--model", str(files / "ours"), "--tasks", "val", "--max_length", "32"]
        given += ["--dataset_name", str(tmp_path / f"{name}.jsonl"), "--num_validation_units", "1"]
        given += ["--limit", "9", "--rows", str(tmp_path / f"{name}.parquet"), "--device", "cpu"]
        assert evaluate.main(given) == 0
    capsys.readouterr()
    both = [str(tmp_path / f"{name}.parquet") for name in ("one", "two")]
    assert len(pq.read_table(both[0])) == len(pq.read_table(both[1])) > 20
    assert evaluate.main(["--compare", *both]) == 0
    table = capsys.readouterr().out.splitlines()
    assert all(line.endswith("unpaired") for line in table[1:]) and len(table) > 3
    short = str(tmp_path / "short.parquet")
    given = ["--model", str(files / "ours"), *TASKS, *options(files), "--max_length", "256"]
    assert evaluate.main([*given, "--rows", short]) == 0
    capsys.readouterr()
    given = ["--compare", str(files / "ours.parquet"), short]
    assert run("gpt2repro evaluate", evaluate.main, given) == EXIT_USAGE
    assert "rows were asked otherwise: max_length 512 and 256" in capsys.readouterr().err


def test_every_kind_of_output_in_one_run(files, together):
    outputs = [files / f"together.{kind}" for kind in ("json", "md", "svg", "png")]
    found = json.loads(outputs[0].read_text())
    markdown = outputs[1].read_text().splitlines()
    assert markdown[1] == "| --- | --- | --- | --- |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown]
    assert [line[0] for line in cells[2:]] == [*found["results"]]
    shown = [" ".join(line[1:]).split() for line in cells[2:]]
    assert shown == [line.split()[1:] for line in together[1:]]
    assert outputs[3].stat().st_size > 10_000
    assert "<svg" in outputs[2].read_text()


def test_a_preset_is_a_list_of_tasks(files, capsys):
    core = evaluate._parse(["--model", "x", "--preset", "core", "--core_dir", "y"])
    assert core.tasks == ["core"]
    paper = evaluate._parse(
        ["--model", "gpt2", "--preset", "gpt2-paper", "--tasks", "val,wikitext"]
    )
    assert paper.tasks[:2] == ["lambada_openai", "cbt_cn"] and paper.tasks[-1] == "val"
    assert len(paper.tasks) == 7, "each once"
    held_out = ["--dataset_name", "y", "--num_validation_units", "1"]
    spaced = evaluate._parse(["--model", "x", "--tasks", "val, piqa", *held_out])
    assert spaced.tasks == ["val", "piqa"]
    published = evaluate._published_for(paper, 1024)
    assert published["lambada_openai/acc"][0] == 0.4599 and "table 3" in published["cbt_cn/acc"][1]
    wrong = ["--model", "x", "--preset", "all"]
    assert run("gpt2repro evaluate", evaluate.main, wrong) == EXIT_USAGE
    assert "--preset all: there are gpt2-paper, early, core" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "metrics"), [("cbt_cn", 2), ("commonsense_qa_cloze", 3)])
def test_task_files_of_ours(files, tmp_path, capsys, name, metrics):
    """On rows in the published schema, which was not looked at from here."""
    rows = {
        "cbt_cn": {
            "sentences": ["The boy went out.", "It rained."],
            "question": "So he took the XXXXX with him .",
            "answer": "hat",
            "options": ["dog", "hat", "sun"],
        },
        "commonsense_qa_cloze": {
            "question": "Where is a boat?",
            "choices": {"label": ["A", "B"], "text": ["on a river", "in a shoe"]},
            "answerKey": "A",
        },
    }
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(rows[name])}\n" * 3)
    ours = Path(evaluate.__file__).parents[1] / "evaluation" / "tasks" / f"{name}.yaml"
    split = "test" if name == "cbt_cn" else "validation"
    (tmp_path / "local.yaml").write_text(
        f"include: {ours}\ntask: local\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{{split}: {tmp_path / 'rows.jsonl'}}}}}\n"
        "training_split: null\n"
    )
    arguments = ["--model", str(files / "ours"), "--tasks", "local", "--tasks_dir", str(tmp_path)]
    output = tmp_path / "results.json"
    assert evaluate.main([*arguments, "--device", "cpu", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert len(found["results"]) == metrics and found["tasks"]["local"]["num_scored"] == 3
