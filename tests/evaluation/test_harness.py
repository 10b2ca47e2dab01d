"""Tasks of lm-evaluation-harness through our engine, against the harness' own HFLM."""

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tiny_language_models import VOCAB_SIZE, on_ranks, random_gpt2, tiny_tokenizer, uniform_gpt2
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from gpt2repro import UserError
from gpt2repro.data.tokens.token_ids import num_ids
from gpt2repro.evaluation.benchmarks import open_tasks
from gpt2repro.evaluation.likelihoods import encode_pairs, loglikelihoods
from gpt2repro.evaluation.scoring import score_task, score_tasks
from gpt2repro.evaluation.tasks import harness
from gpt2repro.evaluation.tasks.harness import LmEvalTask, open_lm_eval_tasks
from gpt2repro.evaluation.writing import Prompt, continuations

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval, of the test extra, is not installed")

WORDS = "a man woman child stands sits runs quickly slowly on the street hill and sings"
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}",
}


def metrics(*names: str, **aggregations: str) -> dict:
    return {
        "metric_list": [
            {
                "metric": name,
                "aggregation": aggregations.get(name, "mean"),
                "higher_is_better": True,
            }
            for name in names
        ]
    }


TASKS: dict[str, dict] = {
    "choice": CHOICE | metrics("acc", "acc_norm", "acc_bytes"),
    "few_shot": CHOICE | metrics("acc", "acc_norm") | {"num_fewshot": 3},
    "mutual_information": CHOICE | metrics("acc", "acc_mutual_info"),
    "without_context": CHOICE | metrics("acc") | {"doc_to_text": "", "target_delimiter": ""},
    "agreement": CHOICE | metrics("mcc", "f1", mcc="matthews_corrcoef", f1="f1"),
    "calibration": CHOICE | metrics("brier_score", brier_score="brier_score"),
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
    }
    | metrics("perplexity", "acc", perplexity="perplexity"),
    "blanks": {  # as Winogrande: the contexts differ, what follows is the same
        "output_type": "multiple_choice",
        "doc_to_text": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{choices[0]}}",
    }
    | metrics("acc"),
    "whole_texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
    }
    | metrics(
        *("word_perplexity", "byte_perplexity", "bits_per_byte"),
        word_perplexity="weighted_perplexity",
        byte_perplexity="weighted_perplexity",
        bits_per_byte="bits_per_byte",
    ),
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["ou", "q"], "max_gen_toks": 24},
        "num_fewshot": 1,
        "filter_list": [
            {"name": "none", "filter": [{"function": "take_first"}]},
            {"name": "loud", "filter": [{"function": "uppercase"}, {"function": "take_first"}]},
        ],
    }
    | metrics("exact_match", "chrf", chrf="chrf"),
}


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    """The tasks as files, with rows of random words."""
    directory, rng = tmp_path_factory.mktemp("tasks"), random.Random(7)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS.split(), k=rng.randint(low, high)))

    for split, size in (("train", 6), ("test", 14)):
        rows = [
            {
                "question": words(2, 60),
                "choices": [words(1, 5), words(1, 5)],
                "answer": rng.randint(0, 1),
                "text": words(3, 150),
            }
            for _ in range(size)
        ]
        path = directory / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(directory / f"{split}.jsonl") for split in ("train", "test")}
    for name, task in TASKS.items():
        whole = {
            "task": f"ours_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "training_split": "train",
            "test_split": "test",
        } | task
        (directory / f"{name}.yaml").write_text(json.dumps(whole))
    group = {"group": "ours_group", "task": ["ours_choice", "ours_last_word"]}
    (directory / "group.yaml").write_text(json.dumps(group))
    rules = [{"metric": "acc"}, {"metric": "acc_norm", "weight_by_size": False}]
    fewer = dict(TASKS["choice"], task="ours_fewer", dataset_path="json", test_split="train")
    fewer |= {"dataset_kwargs": {"data_files": files}}
    (directory / "fewer.yaml").write_text(json.dumps(fewer))
    inner = {"group": "ours_inner", "task": ["ours_few_shot"], "aggregate_metric_list": rules[:1]}
    members = ["ours_choice", "ours_fewer", "ours_inner"]
    of_filters = {"metric": "chrf", "filter_list": "loud"}
    filtered = {"group": "ours_filtered", "task": ["ours_writing"]}
    filtered |= {"aggregate_metric_list": [of_filters]}
    (directory / "filtered.yaml").write_text(json.dumps(filtered))
    outer = {"group": "ours_means", "task": members, "aggregate_metric_list": rules}
    for name, each in (("inner", inner), ("means", outer)):
        (directory / f"{name}.yaml").write_text(json.dumps(each))
    return directory


def tokenizer_of(kind: str):
    """GPT-2's, whose end begins a text too; one that has no begin; one that puts its own before."""
    tokenizer = tiny_tokenizer()
    if kind == "gpt2":
        return tokenizer
    backend, special = tokenizer.backend_tokenizer, {"eos_token": tokenizer.eos_token}
    if kind == "begins":
        backend.add_special_tokens(["<s>"])
        begin = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=begin)
        special["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


class Judged(NamedTuple):
    """A model, what its requests are made with, and what the harness says of it."""

    model: Any
    tokenizer: Any
    max_length: int
    found: dict[str, Any]


OTHERS = [pytest.param((kind, 512), marks=pytest.mark.sweep) for kind in ("beginless", "begins")]


@pytest.fixture(
    scope="module",
    params=[("gpt2", 512), ("gpt2", 128), ("beginless", 128), ("begins", 128), *OTHERS],
    ids=lambda param: "-".join(map(str, param)),
)
def theirs(request, tasks_dir):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    kind, positions = request.param
    tokenizer = tokenizer_of(kind)
    model = random_gpt2(3, positions=positions, n_embd=32, vocab_size=num_ids(tokenizer))
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer_of(kind), batch_size=4, device="cpu"),
        tasks=[f"ours_{name}" for name in (*TASKS, "fewer")],
        task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
        bootstrap_iters=2,  # 0 is no standard errors, not even of means
    )
    return Judged(model, tokenizer, positions, found)


def opened(tasks_dir, *names, tokenizer=None, max_length=512, **options):
    options |= {"max_length": max_length, "tasks_dir": str(tasks_dir)}
    found = open_lm_eval_tasks(names, tokenizer or tiny_tokenizer(), **options)
    return [task for each in found.values() for task in each]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", TASKS)
def test_equal_to_the_harness_row_for_row(theirs, tasks_dir, name, world_size):
    model, tokenizer, positions, found = theirs
    [task] = opened(tasks_dir, f"ours_{name}", tokenizer=tokenizer, max_length=positions)
    assert not task.skipped and len(task.rows) == 14
    if positions == 128 and name in ("choice", "few_shot", "last_word", "writing"):
        assert task.truncated, "some contexts are cut"
    score = partial(score_task, model, task, batch_size=8)
    estimates = on_ranks(world_size, score).estimates
    samples = [each for each in found["samples"][f"ours_{name}"] if each["filter"] == "none"]
    samples.sort(key=lambda sample: sample["doc_id"])
    for example, sample in zip(task.examples, samples, strict=True):
        ordered = sorted(example.instances, key=lambda instance: instance.idx)
        for instance, [answer] in zip(ordered, sample["resps"], strict=True):
            if isinstance(answer, str):
                assert instance.resps == [answer]
                continue
            ours, answer = np.atleast_1d(instance.resps[0]), np.atleast_1d(answer)
            # The harness sums float32 log-probabilities in float32 and pads otherwise.
            np.testing.assert_allclose(ours, answer, rtol=1e-5)
            assert list(ours[1:]) == list(answer[1:]), "greedy or not"
    results = found["results"][f"ours_{name}"]
    figures = {key.removesuffix(",none"): value for key, value in results.items() if "," in key}
    figures = {key: value for key, value in figures.items() if "_stderr" not in key}
    choice = TASKS[name]["output_type"] == "multiple_choice"
    ours_alone = {"gold_bits_per_byte"} if choice else set()
    assert {key.removeprefix(task.prefix) for key in estimates} == figures.keys() | ours_alone
    for key, value in figures.items():
        assert estimates[task.prefix + key].value == pytest.approx(value, rel=1e-5), key
        if key.startswith("acc"):  # theirs of other figures are bootstrapped
            stderr = results[f"{key}_stderr,none"]
            assert estimates[task.prefix + key].stderr == pytest.approx(stderr, rel=1e-6)


def test_rows_are_right_and_wrong_or_equality_would_mean_little(theirs):
    results = theirs.found["results"]
    assert all(0 < results[f"ours_{n}"]["acc,none"] < 1 for n in ("choice", "few_shot"))


def test_the_same_on_two_ranks_and_in_one_pass(theirs, tasks_dir):
    model, tokenizer, positions, found = theirs
    names = ("ours_choice", "ours_whole_texts", "ours_writing")
    tasks = opened(tasks_dir, *names, tokenizer=tokenizer, max_length=positions)
    score = partial(score_tasks, model, tasks, batch_size=4)
    alone = score()
    assert on_ranks(2, score) == pytest.approx(alone, abs=0, rel=0, nan_ok=True)
    assert alone["ours_choice/acc"] == found["results"]["ours_choice"]["acc,none"]


def test_groups_limits_and_few_shot_numbers(tasks_dir):
    both = opened(tasks_dir, "ours_group", limit=5)
    assert [task.name for task in both] == ["ours_choice", "ours_last_word"]
    assert [len(task.rows) for task in both] == [5, 5]
    [none], [three] = (
        opened(tasks_dir, "ours_choice", num_fewshot=number, limit=2) for number in (None, 3)
    )
    assert len(three.requests[0].ids) > len(none.requests[0].ids)
    assert three.requests[0].num_scored == none.requests[0].num_scored


def test_each_is_scored_once(tasks_dir):
    """The same by two names is one; where another holds it, figures would have the same names."""
    how = {"max_length": 512, "tasks_dir": str(tasks_dir), "limit": 2, "option": "eval_tasks"}
    both = open_tasks(["ours_group", "ours_choice", "ours_choice"], tiny_tokenizer(), **how)
    assert [task.name for task in both] == ["ours_choice", "ours_last_word"]
    for names, said in (
        (["ours_choice", "ours_means"], "ours_means and ours_choice score ours_choice; name one"),
        (["ours_means", "ours_inner"], "ours_means and ours_inner score ours_inner; name one"),
    ):
        with pytest.raises(UserError, match=f"^eval_tasks: both {said}"):
            open_tasks(names, tiny_tokenizer(), **how)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A directory that stands for the harness' own tasks, which take seconds to be read."""
    from lm_eval.tasks import TaskManager

    def manager(include_path, include_defaults):
        more = [str(directory)] if include_defaults else []
        return TaskManager(include_path=[*more, *include_path], include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
    (directory := tmp_path / "shipped").mkdir()
    return directory


def test_a_group_may_hold_tasks_of_the_harness(shipped, tmp_path):
    """By name, with changes, within another group; a task may also be defined in the group."""
    (ours := tmp_path / "ours").mkdir()
    row = {"question": "a man", "choices": ["runs", "sits"], "answer": 0}
    for directory, name in ((ours, "mine"), (shipped, "plain"), (shipped, "changed")):
        write_task(directory, name, [row] * 3)
    inline = json.loads((ours / "mine.yaml").read_text()) | {"task": "inline"}
    changed = {"task": "changed", "target_delimiter": " and "}
    for name, members in (("in", ["plain", changed]), ("out", ["in", inline, "mine"])):
        rules = {"group": name, "task": members, "aggregate_metric_list": [{"metric": "acc"}]}
        (ours / f"{name}.yaml").write_text(json.dumps(rules))
    [group] = opened(ours, "out")
    names = {each.name: len(each.rows) for each in group.parts()}
    assert names == {"in": 6, "plain": 3, "changed": 3, "out::inline": 3, "mine": 3}
    changed = next(each for each in group.parts() if each.name == "changed")
    assert changed.requests[0].num_scored > group.requests[0].num_scored
    [alone] = opened(ours, "mine")
    assert len(alone.rows) == 3


def test_what_cannot_be_opened_is_one_line(tasks_dir, tmp_path, shipped):
    with pytest.raises(UserError, match="lm-evaluation-harness has no task ours_nothing"):
        opened(tasks_dir, "ours_nothing")
    with pytest.raises(UserError, match=r"lm-evaluation-harness has no task ours_\*"):
        opened(tasks_dir, "ours_*")
    with pytest.raises(UserError, match=r"no task ours_choise; did you mean ours_choice\?"):
        opened(tasks_dir, "ours_choise")
    lost = TASKS["choice"] | {
        "task": "ours_lost",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "nowhere.jsonl")}},
        "test_split": "test",
    }
    (tmp_path / "lost.yaml").write_text(json.dumps(lost))
    with pytest.raises(UserError, match="--tasks: ours_lost cannot be opened") as raised:
        opened(tmp_path, "ours_lost")
    assert "\n" not in str(raised.value)


def test_means_of_groups_are_those_of_the_harness(theirs, tasks_dir):
    """By rows and by tasks, of which one has fewer rows, with a group within a group."""
    from lm_eval.tasks import TaskManager

    model, tokenizer, positions, found = theirs
    [task] = opened(tasks_dir, "ours_means", tokenizer=tokenizer, max_length=positions)
    estimates = score_task(model, task, batch_size=8).estimates
    manager = TaskManager(include_path=str(tasks_dir), include_defaults=False)
    group = manager.load(["ours_means"])["groups"]["ours_means"]
    expected = group.aggregate(found["results"])
    for metric in ("acc", "acc_norm"):
        ours = estimates[f"ours_means/{metric}"]
        assert ours.value == pytest.approx(expected[f"{metric},none"])
        # Theirs pools the variance of both tasks with a degree of freedom less for each.
        assert ours.stderr == pytest.approx(expected[f"{metric}_stderr,none"], rel=0.03)
    assert estimates["ours_inner/acc"].value == estimates["ours_few_shot/acc"].value
    assert len(task.rows) == 34 and task.rows[0] == "ours_choice 1"


def test_a_group_has_the_means_of_the_filters_that_it_names(tasks_dir):
    [task] = opened(tasks_dir, "ours_filtered")
    found = score_task(random_gpt2(), task, batch_size=8).estimates
    assert [key for key in found if key.startswith("ours_filtered/")] == ["ours_filtered/chrf,loud"]
    assert found["ours_filtered/chrf,loud"].value == found["ours_writing/chrf,loud"].value


def write_task(directory, name, rows, **changes):
    """A task of these rows; None leaves a field of the choice out."""
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = CHOICE | metrics("acc") | {"task": name, "dataset_path": "json", "test_split": "test"}
    task["dataset_kwargs"] = {"data_files": {"test": str(directory / f"{name}.jsonl")}}
    whole = {key: value for key, value in (task | changes).items() if value is not None}
    (directory / f"{name}.yaml").write_text(json.dumps(whole))


def test_the_gold_answers_bits_per_byte(tmp_path):
    """Nats of the right choice over its bytes, the space before it among them."""
    rows = [
        {"question": "a man", "choices": ["runs", "sings é"], "answer": 1},
        {"question": "a woman", "choices": ["stands", "sits"], "answer": 0},
    ]
    write_task(tmp_path, "gold", rows)
    [task] = opened(tmp_path, "gold")
    found = score_task(uniform_gpt2(), task, batch_size=4).estimates["gold/gold_bits_per_byte"]
    tokens = task.requests[1].num_scored + task.requests[2].num_scored
    num_bytes = len(" sings é".encode()) + len(" stands")
    assert found.value == pytest.approx(tokens * np.log2(VOCAB_SIZE) / num_bytes)


def test_the_gold_answer_of_blanks_is_after_the_right_context(tmp_path):
    rows = [{"answer": 1, "choices": ["a man", "a woman"]}]
    blanks = {"doc_to_text": "{{answer}}", "doc_to_target": "{{choices[0]}}"}
    write_task(tmp_path, "blanks", rows, **blanks)
    [task] = opened(tmp_path, "blanks")
    model = random_gpt2()
    found = score_task(model, task, batch_size=4).estimates["blanks/gold_bits_per_byte"].value
    nats = loglikelihoods(model, task.requests, max_length=64, batch_size=4).log_likelihood
    assert found == pytest.approx(-nats[1] / math.log(2) / len(" a man")) != -nats[0]
    assert nats[0] != pytest.approx(nats[1], rel=1e-3)


def test_a_stride_gives_whole_texts_more_context(tasks_dir):
    [whole] = opened(tasks_dir, "ours_whole_texts", max_length=16)
    [same] = opened(tasks_dir, "ours_whole_texts", max_length=16, stride=16)
    [half] = opened(tasks_dir, "ours_whole_texts", max_length=16, stride=8)
    assert [r.ids for r in whole.requests] == [r.ids for r in same.requests]
    assert whole.note == "; stride 16" and half.note == "; stride 8"
    for at, of_half in zip(whole.slices, half.slices, strict=True):
        once, twice = whole.requests[at], half.requests[of_half]
        assert sum(r.num_scored for r in once) == sum(r.num_scored for r in twice)
        assert all(r.num_scored <= 8 and len(r.ids) == 17 for r in twice[1:])


def test_rows_that_cannot_be_scored_are_named(tmp_path):
    rules = {"group": "all_odd", "task": ["odd"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "all.yaml").write_text(json.dumps(rules))
    good = {"question": "a man", "choices": ["runs", "sits"], "answer": 0}
    rows = [good, good | {"choices": ["", "sits"]}, good, good | {"answer": 5}]
    write_task(tmp_path, "odd", rows, target_delimiter="", process_results="COUNT")
    (tmp_path / "odd.py").write_text(
        "def count(doc, _):\n    return {'acc': [1, 0][doc['answer']]}\n"
    )
    file = tmp_path / "odd.yaml"
    file.write_text(file.read_text().replace('"COUNT"', "!function odd.count"))
    [task] = opened(tmp_path, "odd")
    assert task.skipped == {2: "request 0 has no tokens of its own"}
    for _ in range(2):  # a loop scores a task again and again
        found = score_task(random_gpt2(), task, batch_size=4).estimates
        assert task.rows == [1, 3] and list(task.skipped) == [2, 4]
        assert found["odd/acc"].influence.shape == (2,)
    assert task.skipped[4] == "IndexError: list index out of range"
    [group] = opened(tmp_path, "all_odd")
    assert group.num_rows == 4 and len(group.rows) == 3
    assert score_task(random_gpt2(), group, batch_size=4).estimates.keys() == {
        *("all_odd/acc", "odd/acc", "odd/gold_bits_per_byte")
    }
    assert group.rows == ["odd 1", "odd 3"] and [*group.skipped] == ["odd 2", "odd 4"]


BY_FIELDS = {"doc_to_text": "question", "doc_to_target": "answer", "doc_to_choice": "choices"}
WRITES = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{choices[0]}}"}
WRITES |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 4}, **metrics("exact_match")}


@pytest.mark.parametrize(
    ("how", "skipped"),
    [
        (BY_FIELDS, {2: "Context is not a string", 3: "iterable", 4: "no request", 5: "NoneType"}),
        (WRITES, {3: "None has no element 0", 4: "list object has no element 0"}),
    ],
)
def test_a_row_that_makes_no_request_is_named(tmp_path, how, skipped):
    """Whatever the harness or a template of its stumbles over; also behind a byte order mark."""
    good = {"question": "a man", "choices": ["runs", "sits"], "answer": 0}
    odd = [{"question": None}, {"choices": None}, {"choices": []}, {"answer": None}]
    write_task(tmp_path, "odd", [good, *(good | each for each in odd)], **how)
    file = tmp_path / "odd.jsonl"
    file.write_text("\ufeff" + file.read_text(), encoding="utf-8")
    [task] = opened(tmp_path, "odd")
    score_task(random_gpt2(), task, batch_size=4)
    assert [*task.skipped] == [*skipped] and task.num_rows == 5
    assert all(part in task.skipped[row] for row, part in skipped.items())


def test_data_that_cannot_be_read_are_named_in_one_line(tmp_path, capfd):
    """Also those of a group's member; and a first row on which the harness tries its templates."""
    good = {"question": "a man", "choices": ["runs", "sits"], "answer": 0}
    for name, other in (("half", {"question": "\ud800"}), ("empty", {"choices": ["", ""]})):
        write_task(tmp_path, name, [good | other, good])
        rules = {"group": f"all_{name}", "task": [name]}
        (tmp_path / f"all_{name}.yaml").write_text(json.dumps(rules))
    for name, said in (("all_half", "surrogate pair"), ("all_empty", "index out of range")):
        with pytest.raises(UserError, match=f"^--tasks: .*opened from .*{name[4:]}.jsonl.*{said}"):
            opened(tmp_path, name)
    assert "rror" not in capfd.readouterr().err


def test_a_nanmean_leaves_out_the_rows_that_are_none():
    def nanmean(values):
        raise AssertionError("ours, which knows its error")

    found = harness._estimate([0.0, math.nan, 1.0, 1.0], nanmean)
    # Of all four, by the delta method: residuals of -2/3, 0, 1/3, 1/3, divided by 3/4.
    assert found.value == 2 / 3 and found.stderr == pytest.approx((6 / 9 * 16 / 9 / 3 / 4) ** 0.5)
    assert math.isnan(harness._estimate([math.nan] * 2, nanmean).value)
    other = harness._estimate([0.0, 1.0, 1.0, math.nan], nanmean)
    assert len(found.influence) == len((found - other).influence) == 4  # row by row


def test_a_figure_that_a_task_does_not_announce_is_a_mean(tmp_path):
    """As the summary length of the harness' CNN/DailyMail."""
    rows = [{"question": q, "choices": ["runs", "sits"], "answer": 0} for q in "abc"]
    write_task(tmp_path, "extra", rows)
    [task] = opened(tmp_path, "extra")
    task._task.process_results = lambda doc, answers: {"acc": 1.0, "size": len(doc["question"])}
    found = score_task(random_gpt2(), task, batch_size=4).estimates
    assert found["extra/size"].value == 1.0 and found["extra/size"].stderr == 0


@pytest.mark.parametrize("field", ["process_docs", "doc_to_choice"])
def test_choices_are_shuffled_as_the_harness_seeds_them(tmp_path, field):
    """GPQA's are, by Python's own generator, others by NumPy's; both stay what they were.

    Whatever else is opened beside it, they are those of `lm_eval --tasks` with this name alone.
    """
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"question": q, "choices": [*"abcdefgh"], "answer": 0} for q in "ab"]
    write_task(tmp_path, "shuffled", rows, **{field: "SHUFFLE"})
    (tmp_path / "shuffled.py").write_text(
        "import random\nimport numpy as np\nfrom datasets import Dataset\n"
        "def doc_to_choice(doc):\n"
        "    return random.sample([doc['choices'][n] for n in np.random.permutation(8)], 8)\n"
        "def process_docs(docs):\n"
        "    return Dataset.from_list([doc | {'choices': doc_to_choice(doc)} for doc in docs])\n"
    )
    file = tmp_path / "shuffled.yaml"
    file.write_text(file.read_text().replace('"SHUFFLE"', f"!function shuffled.{field}"))
    write_task(tmp_path, "another", rows)
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist()
    _, task = opened(tmp_path, "another", "shuffled")
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=random_gpt2(), tokenizer=tiny_tokenizer(), device="cpu"),
        tasks=["shuffled"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["samples"]["shuffled"]
    for example, sample in zip(task.examples, theirs, strict=True):
        ordered = sorted(example.instances, key=lambda instance: instance.idx)
        assert [instance.args for instance in ordered] == [*map(tuple, sample["arguments"])]


def test_half_a_surrogate_pair_of_a_task_of_code_is_replaced():
    ours, theirs = encode_pairs(tiny_tokenizer(), [("", "a \ud800"), ("", "a \ufffd\ufffd\ufffd")])
    assert ours == theirs


def test_what_was_written_stays_with_its_row(tmp_path):
    """Also when a row before it has been left out, and when it is scored once more."""
    rows = [{"question": q, "choices": ["runs"], "answer": n} for n, q in enumerate("abcd")]
    write = {"output_type": "generate_until", "doc_to_choice": None, "process_results": "COUNT"}
    write |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 5}, "filter_list": None}
    write_task(tmp_path, "writes", rows, **write)
    (tmp_path / "writes.py").write_text(
        "texts = []\n"
        "def count(doc, texts_of_row):\n"
        "    texts.append((doc['question'], *texts_of_row))\n"
        "    return {'acc': 1 / (doc['answer'] != 1)}\n"
    )
    file = tmp_path / "writes.yaml"
    file.write_text(file.read_text().replace('"COUNT"', "!function writes.count"))
    [task] = opened(tmp_path, "writes")
    texts = task._task.config.process_results.__globals__["texts"]
    seen = []
    for _ in range(2):
        texts.clear()
        score_task(random_gpt2(), task, batch_size=2)
        seen.append([*texts])
        assert task.rows == [1, 3, 4] and task.skipped == {2: "ZeroDivisionError: division by zero"}
    assert seen[0] == seen[1] and len({text for _, text in seen[0]}) > 2
    assert [question for question, _ in seen[0]] == [*"abcd"]


def test_a_text_is_over_where_the_harness_ends_it(tasks_dir):
    """At an end, the stop of the task, or enough: a begin in it is no end."""
    tokenizer = tokenizer_of("begins")
    [task] = opened(tasks_dir, "ours_writing", tokenizer=tokenizer, limit=1)
    [prompt] = task.prompts
    [q] = tokenizer.encode("q", add_special_tokens=False)
    ids = {"begin": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "stop": q}
    assert [name for name, id in ids.items() if prompt.is_over([9, id])] == ["end", "stop"]


def test_a_models_own_settings_for_generate_change_nothing():
    model = random_gpt2()
    prompts = [Prompt([*range(n, n + 9)], 12, lambda new: False) for n in range(1, 60, 7)]
    plain = continuations(model, prompts, batch_size=4)
    own = GenerationConfig(
        repetition_penalty=3.0, num_beams=3, stop_strings=["a"], return_dict_in_generate=True
    )
    model.generation_config = own
    assert continuations(model, prompts, batch_size=4) == plain
    assert model.generation_config is own


def test_what_follows_an_end_that_the_model_names_is_no_text():
    """Else a row's text would depend on how long its neighbours in a batch are."""
    model = random_gpt2()
    prompts = [Prompt([*range(n, n + 9)], 12, lambda new: False) for n in range(1, 60, 7)]
    [first, *_] = continuations(model, prompts, batch_size=4)
    model.generation_config.eos_token_id = [first[3]]
    alone = continuations(model, prompts, batch_size=1)
    assert continuations(model, prompts, batch_size=len(prompts)) == alone
    assert alone[0] == first[: first.index(first[3]) + 1]
    assert {len(each) for each in alone} > {12}, "others go on"


def test_a_prompt_without_room_for_more_is_not_asked_for_its_neighbours_more():
    """Tasks that are scored together ask for other numbers of tokens."""
    model, room = random_gpt2(positions=64), 64
    full = Prompt([*range(1, room - 1)], 2, lambda new: False)
    prompts = [full, Prompt([5, 6, 7], room - 4, lambda new: False), full]
    alone = [continuations(model, [prompt], batch_size=1)[0] for prompt in prompts]
    assert continuations(model, prompts, batch_size=4) == alone
    assert [len(new) for new in alone] == [2, room - 4, 2]


def test_a_row_may_have_questions_of_several_kinds(tmp_path):
    """As those of SQuAD 2: an answer to be written, and whether there is one."""
    from lm_eval.api.instance import Instance

    rows = [{"question": f"{n} a man", "choices": ["runs", "sits"], "answer": 0} for n in range(3)]
    write_task(tmp_path, "both", rows)
    [choices] = opened(tmp_path, "both")
    harness, construct = choices._task, choices._task.construct_requests

    def construct_both(doc, ctx, metadata):
        asked = ("a man", {"until": ["."], "max_gen_toks": 4})
        extra = {"doc": doc, "arguments": asked, "idx": 2, "metadata": metadata}
        written = Instance(request_type="generate_until", **extra)
        return [*construct(doc, ctx, metadata=metadata), written]

    harness.construct_requests = construct_both
    harness.process_results = lambda doc, answers: {"acc": len(answers[2]) + answers[0][0]}
    task = LmEvalTask(harness, tiny_tokenizer(), max_length=64)
    assert (len(task.requests), len(task.prompts)) == (6, 3)
    found = score_task(random_gpt2(), task, batch_size=4).estimates["both/acc"]
    nats = loglikelihoods(random_gpt2(), task.requests, max_length=64, batch_size=4)
    written = continuations(random_gpt2(), task.prompts, batch_size=4)
    lengths = [len(tiny_tokenizer().decode(ids).split(".")[0]) for ids in written]
    np.testing.assert_allclose(found.influence, nats.log_likelihood[::2] + lengths, rtol=1e-4)


def test_a_group_with_a_member_that_cannot_be_scored_is_refused_when_it_is_opened(tmp_path):
    good = {"question": "a man", "choices": ["runs", "sits"], "answer": 0}
    write_task(tmp_path, "good", [good])
    write_task(tmp_path, "bad", [good | {"choices": ["stands " * 99, "sits"]}])
    rules = {
        "group": "mixed",
        "task": ["good", "bad"],
        "aggregate_metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "mixed.yaml").write_text(json.dumps(rules))
    with pytest.raises(UserError, match="bad: none of its 1 rows can be scored; row 1: request 0"):
        opened(tmp_path, "mixed", max_length=64)


def test_what_asks_for_more_than_there_is_room_is_named(tmp_path):
    rows = [{"question": "a man", "choices": ["runs"], "answer": 0}]
    write = {"output_type": "generate_until", "doc_to_choice": None, **metrics("exact_match")}
    write |= {"generation_kwargs": {"until": ["."]}}
    write_task(tmp_path, "long", rows, **write)
    for name, how in (("sampling", {"do_sample": True}), ("warm", {"temperature": 0.7})):
        changed = {"generation_kwargs": write["generation_kwargs"] | how}
        write_task(tmp_path, name, rows, **write | changed)
    with pytest.raises(UserError, match="row 1: asks for 256 new tokens of a model of 64 positi"):
        open_tasks(["long"], tiny_tokenizer(), max_length=64, tasks_dir=str(tmp_path))
    for name in ("sampling", "warm"):
        with pytest.raises(UserError, match=f"--tasks: {name} samples what it writes"):
            opened(tmp_path, name)


@pytest.mark.parametrize("name", ["cbt_cn", "cbt_ne"])
def test_no_row_of_our_tasks_is_an_example_of_itself(tmp_path, name):
    """The harness takes examples from the rows that are asked where a task has no others."""
    file = Path(harness.__file__).with_name(f"{name}.yaml")
    rows = [
        {"sentences": [f"It was {n} ."], "question": "So XXXXX was it .", "answer": f"thing{n}"}
        for n in range(5)
    ]
    for row in rows:
        row["options"] = [row["answer"], "cat"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "local.yaml").write_text(
        f"include: {file}\ntask: local\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.json'}}}}}\n"
    )
    [task] = opened(tmp_path, "local", num_fewshot=3)
    for example in task.examples:
        [context, answer] = example.instances[0].args
        assert context.count("It was") == 4 and answer.split()[0] not in context
