"""Tasks of lm-evaluation-harness through our engine, against the harness' own HFLM."""

import json
import random

import numpy as np
import pytest
from tiny_language_models import random_gpt2, tiny_tokenizer

from gpt2repro import UserError
from gpt2repro.evaluation.likelihoods import loglikelihoods
from gpt2repro.evaluation.lm_eval_tasks import open_lm_eval_tasks
from gpt2repro.evaluation.scoring import score_tasks

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
    return directory


@pytest.fixture(scope="module", params=[512, 128])
def theirs(request, tasks_dir):
    """A model, its context, and what the harness says of it."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = random_gpt2(3, positions=request.param, n_embd=32)
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=4, device="cpu"),
        tasks=[f"ours_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
        bootstrap_iters=0,
    )
    return model, request.param, found


def opened(tasks_dir, *names, max_length=512, **options):
    return open_lm_eval_tasks(
        names, tiny_tokenizer(), max_length=max_length, tasks_dir=str(tasks_dir), **options
    )


@pytest.mark.parametrize("name", TASKS)
def test_equal_to_the_harness_row_for_row(theirs, tasks_dir, name):
    model, positions, found = theirs
    [task] = opened(tasks_dir, f"ours_{name}", max_length=positions)
    assert not task.skipped and len(task.rows) == 14
    if positions == 128 and name in ("choice", "few_shot", "last_word"):
        assert task.truncated, "some contexts are cut"
    scores = loglikelihoods(model, task.requests, max_length=positions, batch_size=8)
    estimates = task.estimates(scores)
    samples = sorted(found["samples"][f"ours_{name}"], key=lambda sample: sample["doc_id"])
    for example, sample in zip(task.examples, samples, strict=True):
        ordered = sorted(example.instances, key=lambda instance: instance.idx)
        for instance, [answer] in zip(ordered, sample["resps"], strict=True):
            ours = np.atleast_1d(instance.resps[0])
            # The harness sums float32 log-probabilities in float32 and pads otherwise.
            np.testing.assert_allclose(ours, np.atleast_1d(answer), rtol=1e-5)
    results = found["results"][f"ours_{name}"]
    figures = {key.removesuffix(",none"): value for key, value in results.items() if "," in key}
    figures = {key: value for key, value in figures.items() if "_stderr" not in key}
    assert {key.removeprefix(task.prefix) for key in estimates} == figures.keys()
    for key, value in figures.items():
        assert estimates[task.prefix + key].value == pytest.approx(value, rel=1e-5), key
        stderr = results.get(f"{key}_stderr,none")
        if isinstance(stderr, float):
            assert estimates[task.prefix + key].stderr == pytest.approx(stderr, rel=1e-6)


def test_rows_are_right_and_wrong_or_equality_would_mean_little(theirs):
    _, _, found = theirs
    assert all(0 < found["results"][f"ours_{n}"]["acc,none"] < 1 for n in ("choice", "few_shot"))


def test_the_same_on_two_ranks_and_in_one_pass(theirs, tasks_dir):
    model, positions, found = theirs
    tasks = opened(tasks_dir, "ours_choice", "ours_whole_texts", max_length=positions)
    alone = score_tasks(model, tasks, batch_size=4)
    parts = []
    for rank in range(2):
        score_tasks(
            model,
            tasks,
            batch_size=4,
            rank=rank,
            world_size=2,
            reduce=lambda t: parts.append(t) or t,
        )
    shared = iter([sum(parts), sum(parts)])
    again = score_tasks(
        model, tasks, batch_size=4, rank=0, world_size=2, reduce=lambda _: next(shared)
    )
    assert again == alone
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


def test_what_cannot_be_opened_is_one_line(tasks_dir, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    def only_ours(include_path, include_defaults):  # reading all that it ships takes seconds
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", only_ours)
    with pytest.raises(UserError, match="lm-evaluation-harness has no task ours_nothing"):
        opened(tasks_dir, "ours_nothing")
    writes = {
        "task": "ours_writes",
        "output_type": "generate_until",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks_dir / "test.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."]},
    }
    (tmp_path / "writes.yaml").write_text(json.dumps(writes))
    with pytest.raises(UserError, match="ours_writes has the model write"):
        opened(tmp_path, "ours_writes")
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
