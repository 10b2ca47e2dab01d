"""What our benchmarks ask, by hand, and rows that cannot be scored."""

import json

import numpy as np
import pytest
from tiny_language_models import (
    HELLASWAG,
    OF_THE_HARNESS,
    VOCAB_SIZE,
    KnowsByHeart,
    random_gpt2,
    read,
    task_files,
    tiny_tokenizer,
    uniform_gpt2,
)
from tokenizers.processors import TemplateProcessing

from gpt2repro import UserError
from gpt2repro.evaluation import published
from gpt2repro.evaluation.benchmarks import open_tasks
from gpt2repro.evaluation.likelihoods import Scores, loglikelihoods
from gpt2repro.evaluation.task import MalformedRow, Task, read_jsonl
from gpt2repro.evaluation.tasks.held_out import Validation
from gpt2repro.evaluation.tasks.hellaswag import HellaSwagCompletion, read_rows
from gpt2repro.system import patience

POSITIONS = 512


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def scored(model, task: Task) -> dict[str, float]:
    scores = loglikelihoods(model, task.requests, max_length=task.max_length, batch_size=8)
    return {name: estimate.value for name, estimate in task.estimates(scores).items()}


def row(**changes) -> dict:
    good = {
        "activity_label": "Rowing",
        "ctx_a": "A boat leaves the shore.",
        "ctx_b": "the crew",
        "ctx": "A boat leaves the shore. the crew",
        "endings": ["rows.", "flies away.", "sleeps.", "sings."],
        "label": 0,
    }
    return good | changes


# --- HellaSwag ------------------------------------------------------------------------------------


def test_a_local_copy_is_hellaswag_if_it_has_all_rows(tokenizer, monkeypatch):
    """On a model card some of its rows would pass for the benchmark."""
    how = {"max_length": POSITIONS, "hellaswag_file": str(HELLASWAG), "limit": 2}
    (some,) = open_tasks(["hellaswag_completion"], tokenizer, **how)
    assert some.dataset is None
    monkeypatch.setitem(published.NUM_ROWS, "hellaswag", len(read(HELLASWAG)))
    (whole,) = open_tasks(["hellaswag_completion"], tokenizer, **how)
    assert whole.dataset is not None and whole.dataset.name == "Rowan/hellaswag"


def test_a_model_that_knows_is_always_right(tokenizer):
    task = HellaSwagCompletion(read(HELLASWAG), tokenizer, max_length=POSITIONS)
    right = [
        task.requests[at][example.label].ids
        for example, at in zip(task.examples, task.slices, strict=True)
    ]
    assert task.num_rows == len(task.rows) == 10
    assert set(scored(KnowsByHeart(right), task).values()) == {1.0}


def test_a_uniform_model_prefers_the_shortest(tokenizer):
    """Sums favour the ending of fewest tokens; over tokens all tie, and the first is taken."""
    task = HellaSwagCompletion(read(HELLASWAG), tokenizer, max_length=POSITIONS)
    found = scored(uniform_gpt2(), task)
    num_tokens = [[request.num_scored for request in task.requests[at]] for at in task.slices]
    labels = [example.label for example in task.examples]
    shortest = np.mean([np.argmin(n) == label for n, label in zip(num_tokens, labels, strict=True)])
    assert found[f"{task.prefix}acc"] == shortest
    assert found["hellaswag/completion_acc_norm"] == np.mean([label == 0 for label in labels])


def test_completion_text_and_lengths(tokenizer):
    task = HellaSwagCompletion([row(endings=["rows home.", "naïve"])], tokenizer, max_length=64)
    first, second = task.requests
    assert tokenizer.decode(first.ids) == "A boat leaves the shore. the crew rows home."
    assert tokenizer.decode(first.ids[-first.num_scored :]) == " rows home."
    assert first.num_scored > 1 and second.num_scored > 1, "endings of several tokens"
    # Log-likelihoods of -1 and -2 per token: the sum prefers whoever is shorter, the mean not.
    nats = np.array([-2.0 * first.num_scored, -1.0 * second.num_scored])
    found = task.estimates(Scores(nats, np.zeros(2, bool), 0.0))
    assert found["hellaswag/completion_acc_norm"].value == 0.0


def test_labels_are_those_of_the_endings(tokenizer):
    """Numbers or their text, the last one included; and two endings are enough."""
    rows = [row(label=3), row(label="0"), row(endings=["a", "b"], label=1)]
    task = HellaSwagCompletion(rows, tokenizer, max_length=64)
    assert [example.label for example in task.examples] == [3, 0, 1]
    for label in ("1.5", "one", "-1", 1.0, [1], "4"):
        (reason,) = HellaSwagCompletion(
            [row(label=label)], tokenizer, max_length=64
        ).skipped.values()
        assert reason.startswith(f"'label' is {label if label == '4' else repr(label)}, ")


def test_an_empty_context_is_named(tokenizer):
    task = HellaSwagCompletion([row(ctx=" \n")], tokenizer, max_length=64)
    assert task.skipped == {1: "the context is empty"}


def test_malformed_rows_are_named_and_counted(tokenizer):
    no_label = row()
    del no_label["label"]
    rows = [
        row(),
        no_label,
        row(label=""),
        row(label="2"),  # the Hub has text
        row(label=4),
        row(label=-1),
        row(label=True),
        row(endings=None),
        row(endings=["one"]),
        row(endings=["one", 2]),
        row(endings=["one", " "]),
        row(ctx=None, ctx_a=None),
        row(ctx=3, ctx_b=3),
        MalformedRow("not JSON"),
        ["a", "list"],
        row(endings=["ok", "far too long " * 40]),
    ]
    task = HellaSwagCompletion(rows, tokenizer, max_length=128)
    assert task.rows == [1, 4]
    assert list(task.skipped) == [2, 3, *range(5, 17)]
    assert task.num_rows == len(rows)
    assert task.skipped[2] == task.skipped[3] == "no 'label'"
    assert task.skipped[5] == "'label' is 4, but there are 4 endings"
    assert task.skipped[14] == "not JSON"
    assert "ending 1 has" in task.skipped[16] and "128 positions" in task.skipped[16]
    assert len(task.requests) == 8


def test_a_long_context_is_cut_on_the_left_and_counted(tokenizer):
    rows = [row(), row(ctx="a b c " * 100)]
    task = HellaSwagCompletion(rows, tokenizer, max_length=64)
    assert (task.rows, task.truncated, task.skipped) == ([1, 2], [2], {})
    whole = max(len(request.ids) for request in task.requests[:4]) - 1
    just_fits = HellaSwagCompletion(rows[:1], tokenizer, max_length=whole)
    assert just_fits.truncated == []
    assert HellaSwagCompletion(rows[:1], tokenizer, max_length=whole - 1).truncated == [1]
    assert scored(random_gpt2(positions=64), task)


def test_what_a_tokenizer_adds_to_a_text_is_no_part_of_a_benchmark(tmp_path):
    """Such as an end; what it puts before a text is asked for (tests/test_odd_tokenizers.py)."""
    bare, ending = tiny_tokenizer(), tiny_tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", ending.eos_token_id)]
    )
    names = [f"ours_{name}" for name in OF_THE_HARNESS]
    how = {"max_length": 64, "tasks_dir": str(task_files(tmp_path / "tasks"))}
    how |= {"hellaswag_file": str(HELLASWAG)}
    theirs, ours = (
        [
            list(map(int, request.ids))
            for task in open_tasks([*names, "hellaswag_completion"], each, **how)
            for request in task.requests
        ]
        for each in (bare, ending)
    )
    assert ours == theirs


# --- held-out text --------------------------------------------------------------------------------


def test_validation_is_paired_by_its_tokens():
    rows = np.arange(10, dtype=np.uint16).reshape(2, 5)
    assert Validation(rows).identity() == Validation(rows.copy()).identity()
    assert Validation(rows).identity() != Validation(rows + 1).identity()


def test_validation_bits_per_byte():
    rows = np.zeros((3, 9), dtype=np.uint16)
    found = scored(uniform_gpt2(), Validation(rows, np.array([8, 32, 56])))
    assert found["val/loss"] == pytest.approx(np.log(VOCAB_SIZE))
    assert found["val/bits_per_byte"] == pytest.approx(np.log2(VOCAB_SIZE) / 4)


# --- Files of rows --------------------------------------------------------------------------------


def test_row_numbers_are_line_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a b"}\n{"text": \n\n{"text": "c\u2028d"}\n\n', encoding="utf-8")
    rows = read_jsonl(str(path), "rows_file")
    assert len(rows) == 4, "U+2028 ends no line, and the end of the file is no row"
    assert isinstance(rows[1], MalformedRow) and "not JSON" in str(rows[1])
    assert str(rows[2]) == "an empty line"


def test_rows_that_are_all_bad_are_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"ctx": "a"}) + "\n")
    with pytest.raises(UserError, match="none of its 1 rows can be scored; row 1: 'endings'"):
        names = ["hellaswag_completion"]
        open_tasks(names, tiny_tokenizer(), max_length=64, hellaswag_file=str(path))


def test_a_file_of_hellaswag_goes_with_the_benchmark_that_reads_it():
    how = {"max_length": POSITIONS, "hellaswag_file": str(HELLASWAG)}
    with pytest.raises(UserError, match="hellaswag_completion does"):
        open_tasks(["hellaswag"], tiny_tokenizer(), **how)
    named = open_tasks(["hellaswag_completion"], tiny_tokenizer(), **how)
    assert [task.name for task in named] == ["hellaswag_completion"]


def test_without_a_network_one_line_names_the_file_option(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setattr(patience, "OFFLINE_AFTER_SECONDS", 0)
    with pytest.raises(UserError) as raised:
        read_rows(None)
    assert "give a local copy with --hellaswag_file" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_byte_order_mark_before_a_benchmark(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a b"}\n{"text": "c d"}\n')
    assert read_jsonl(str(tmp_path / "rows.jsonl"), "rows_file") == [
        {"text": "a b"},
        {"text": "c d"},
    ]


@pytest.mark.parametrize("content", ["é".encode("latin-1"), "é".encode("utf-16"), None])
def test_a_file_that_is_no_text_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="--rows_file"):
        read_jsonl(str(tmp_path / "rows.jsonl"), "rows_file")


@pytest.mark.parametrize(
    "line",
    [
        "[" * 10**5,
        '{"a": ' * 10**5,
        '{"text": "half \\ud83d"}',
        f'{{"text": {"9" * 5000}}}',
        "{",
        "",
    ],
    ids=["lists", "objects", "surrogate", "digits", "cut", "nothing"],
)
def test_lines_that_no_row_can_be_read_from_are_named(tmp_path, tokenizer, line):
    good = json.dumps(row())
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    rows = read_jsonl(str(tmp_path / "rows.jsonl"), "x")
    task = HellaSwagCompletion(rows, tokenizer, max_length=64)
    assert task.rows == [1, 3] and list(task.skipped) == [2]


def test_a_label_of_many_digits_is_none(tokenizer):
    task = HellaSwagCompletion([row(), row(label="9" * 5000)], tokenizer, max_length=64)
    assert task.rows == [1] and "not the index of an ending" in task.skipped[2]


def test_rows_from_the_cache_prove_no_connection(monkeypatch):
    """Else a machine without a network would be patient for half an hour from then on."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": "a b"}])
    assert read_rows(None) == [{"text": "a b"}]
    assert not patience._outages.hub_answered


def test_a_benchmark_is_waited_for_five_minutes_and_the_line_names_its_option(monkeypatch):
    now = [0.0]

    def away(*_, **__):
        raise ConnectionError("away")

    monkeypatch.setattr("datasets.load_dataset", away)
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    patience._outages.hub_answered = True
    with pytest.raises(UserError, match=r"gave up after 300 s .*--hellaswag_file"):
        read_rows(None)
