"""Controls: the scored tokens stay, the contexts do not; choices keep one between them."""

import json
from functools import partial

import numpy as np
import pytest
from tiny_core import write_bundle
from tiny_language_models import HELLASWAG, LAMBADA, on_ranks, random_gpt2, read, tiny_tokenizer

from gpt2repro.evaluation.controls import KINDS, NONE, OTHER, SHUFFLED, control
from gpt2repro.evaluation.core import open_core
from gpt2repro.evaluation.likelihoods import Request
from gpt2repro.evaluation.scoring import score_tasks
from gpt2repro.evaluation.tasks.harness import open_lm_eval_tasks
from gpt2repro.evaluation.tasks.held_out import Validation
from gpt2repro.evaluation.tasks.hellaswag import HellaSwagCompletion

TOKENIZER = tiny_tokenizer()
BEGIN = TOKENIZER.bos_token_id


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return str(write_bundle(tmp_path_factory.mktemp("core")))


def hellaswag(max_length: int = 512) -> HellaSwagCompletion:
    return HellaSwagCompletion(read(HELLASWAG), TOKENIZER, max_length=max_length)


def parts(request: Request) -> tuple[list[int], list[int]]:
    ids = np.asarray(request.ids).tolist()
    return ids[: -request.num_scored], ids[-request.num_scored :]


def asked(task, row: int) -> list[tuple[list[int], list[int]]]:
    return [parts(request) for request in task.requests[task.slices[row]]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_scored_tokens_and_all_else_stay(bundle, kind):
    for task in (hellaswag(), open_core(bundle, "core", TOKENIZER, max_length=128)):
        made = control(task, kind, BEGIN)
        assert [parts(r)[1] for r in made.requests] == [parts(r)[1] for r in task.requests]
        assert [parts(r)[0] for r in made.requests] != [parts(r)[0] for r in task.requests]
        asked_at_all = [bool(task.requests[at]) for at in task.slices]  # one has equal choices
        rows = [row for row, some in zip(task.rows, asked_at_all, strict=True) if some]
        assert (made.rows, made.name, made.prefix) == (rows, task.name, task.prefix)
        again = control(task, kind, BEGIN)
        assert [parts(r) for r in again.requests] == [parts(r) for r in made.requests], "seeded"


def test_shuffled_is_the_same_tokens_in_one_order_for_all_choices():
    task = hellaswag()
    made = control(task, SHUFFLED, BEGIN)
    for row in range(len(task.rows)):
        (old, *_), (new, *others) = ([c for c, _ in asked(t, row)] for t in (task, made))
        assert sorted(new) == sorted(old) and new != old
        assert all(other == new for other in others)


def test_the_begin_token_stays_in_front(bundle):
    task = open_core(bundle, "core/schema", TOKENIZER, max_length=512)
    for old, new in zip(task.requests, control(task, SHUFFLED, BEGIN).requests, strict=True):
        assert parts(new)[0][0] == parts(old)[0][0] == BEGIN
        assert sorted(parts(new)[0]) == sorted(parts(old)[0])


def test_choices_that_lost_context_on_their_left_still_share_an_order():
    """A longer ending leaves less room: what both contexts hold stands in the same order."""
    task = hellaswag(max_length=64)
    long = [row for row in range(len(task.rows)) if len(asked(task, row)[0][0]) > 64]
    assert long and task.truncated
    made = control(task, SHUFFLED, BEGIN)
    for row in long:
        contexts = sorted((c for c, _ in asked(made, row)), key=len)
        assert len(contexts[0]) < len(contexts[-1]) <= 64
        rest = iter(contexts[-1])
        assert all(token in rest for token in contexts[0]), "a subsequence"


def test_other_is_the_context_of_another_row_each_given_once():
    task = hellaswag()
    old = [asked(task, row)[0][0] for row in range(len(task.rows))]
    new = [[c for c, _ in asked(control(task, OTHER, BEGIN), row)] for row in range(len(old))]
    assert all(own != contexts[0] for own, contexts in zip(old, new, strict=True))
    assert sorted(contexts[0] for contexts in new) == sorted(old)
    assert all(context == contexts[0] for contexts in new for context in contexts)


def test_where_contexts_differ_they_still_do(bundle):
    """A schema question gets both contexts of another one; without any there is nothing to tell."""
    task = open_core(bundle, "core/schema", TOKENIZER, max_length=512)
    pairs = [{tuple(c) for c, _ in asked(task, row)} for row in range(len(task.rows))]
    made = control(task, OTHER, BEGIN)
    for row, own in enumerate(pairs):
        given = {tuple(c) for c, _ in asked(made, row)}
        assert given in pairs and given != own
    first = np.mean([example.gold == 0 for example in task.examples])
    none = control(task, NONE, BEGIN)
    figures = score_tasks(random_gpt2(), [none], batch_size=3)
    assert figures["core/schema_acc"] == first, "requests that are the same tie"


def test_no_context_is_the_begin_token_alone():
    made = control(hellaswag(), NONE, BEGIN)
    assert {tuple(parts(request)[0]) for request in made.requests} == {(BEGIN,)}


def test_whole_texts_have_nothing_to_control():
    rows = np.random.default_rng(0).integers(0, 300, (5, 65))
    for kind in KINDS:
        assert control(Validation(rows), kind, BEGIN) is None
    one = HellaSwagCompletion(read(HELLASWAG)[:1], TOKENIZER, max_length=512)
    assert control(one, OTHER, BEGIN) is None, "there is no other row"
    assert control(one, SHUFFLED, BEGIN) is not None


def test_tasks_of_the_harness(tmp_path):
    """Also with questions that it asks without a context by itself: those stay as they are."""
    pytest.importorskip("lm_eval", reason="lm_eval, of the test extra, is not installed")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(HELLASWAG)}},
        "test_split": "test",
        "doc_to_text": "{{ctx}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{endings}}",
    }
    kinds = {"endings": ["acc"], "mutual": ["acc", "acc_mutual_info"]}
    for name, metrics in kinds.items():
        metric_list = [{"metric": metric} for metric in metrics]
        task = common | {"task": name, "output_type": "multiple_choice", "metric_list": metric_list}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    whole = {"task": "whole", "output_type": "loglikelihood_rolling", "doc_to_text": ""} | {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(LAMBADA)}},
        "test_split": "test",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "whole.yaml").write_text(json.dumps(whole))
    names = [*kinds, "whole"]
    found = open_lm_eval_tasks(names, TOKENIZER, max_length=512, tasks_dir=str(tmp_path))
    [endings], [mutual], [whole] = found.values()
    assert all(control(whole, kind, BEGIN) is None for kind in KINDS)
    model = random_gpt2()
    plain = score_tasks(model, [endings, mutual], batch_size=8)
    made = {kind: [control(task, kind, BEGIN) for task in (endings, mutual)] for kind in KINDS}
    found = {kind: score_tasks(model, tasks, batch_size=8) for kind, tasks in made.items()}
    for kind, figures in found.items():
        assert figures["endings/acc"] == figures["mutual/acc"], kind
        asked_bare = [r for r in made[kind][1].requests if len(parts(r)[0]) == 1]
        assert len(asked_bare) == len(mutual.requests) / (1 if kind == NONE else 2)
    assert found[NONE]["mutual/acc_mutual_info"] != plain["mutual/acc_mutual_info"]
    assert score_tasks(model, [endings, mutual], batch_size=8) == plain, "untouched"


def test_the_same_on_two_ranks(bundle):
    made = control(open_core(bundle, "core", TOKENIZER, max_length=128), OTHER, BEGIN)
    score = partial(score_tasks, random_gpt2(positions=128), [made], batch_size=4)
    assert on_ranks(2, score) == score()
