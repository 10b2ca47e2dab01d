"""CORE against an oracle: the definition in plain loops, one forward a prompt."""

import json
import random
import re
from functools import partial

import numpy as np
import pytest
import torch
from tiny_core import ROWS, TASKS, rows_of, write_bundle
from tiny_language_models import KnowsByHeart, on_ranks, random_gpt2, tiny_tokenizer, uniform_gpt2

from gpt2repro import UserError
from gpt2repro.evaluation.benchmarks import open_tasks
from gpt2repro.evaluation.core import open_core
from gpt2repro.evaluation.likelihoods import loglikelihoods
from gpt2repro.evaluation.scoring import score_tasks


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("core"))


def tokenizer_with(bos: str | None):
    """A begin token of its own, or as GPT-2 has it, its end-of-text alone."""
    tokenizer = tiny_tokenizer()
    if bos is None:
        tokenizer.bos_token = None
    elif bos != tokenizer.bos_token:
        tokenizer.add_special_tokens({"bos_token": bos})
    return tokenizer


# --- The oracle -----------------------------------------------------------------------------------


@torch.no_grad()
def losses_and_guesses(model, ids: list[int]) -> tuple[list[float], list[int]]:
    """Of each position: the loss of the token after it, in float32 as torch has it, and argmax."""
    logits = model(torch.tensor([ids])).logits[0].float()
    targets = torch.tensor([*ids[1:], 0])
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    losses[-1] = float("nan")  # nothing follows
    return losses, logits.argmax(-1).tolist()


def common(sequences: list[list[int]]) -> int:
    n = 0
    while n < min(map(len, sequences)) and len({sequence[n] for sequence in sequences}) == 1:
        n += 1
    return n


def is_right(index: int, rows: list[dict], task: tuple, tokenizer, model, positions: int) -> bool:
    kind, num_fewshot, delimiter, _ = task
    row = rows[index]
    others = [i for i in range(len(rows)) if i != index]
    shots = [rows[i] for i in random.Random(1234 + index).sample(others, num_fewshot)]
    before = ""
    for shot in shots:
        if kind == "multiple_choice":
            before += shot["query"] + delimiter + shot["choices"][shot["gold"]] + "\n\n"
        elif kind == "schema":
            before += shot["context_options"][shot["gold"]] + delimiter + shot["continuation"]
            before += "\n\n"
        else:
            before += shot["context"].strip() + delimiter + shot["continuation"] + "\n\n"
    if kind == "multiple_choice":
        prompts = [before + row["query"] + delimiter + choice for choice in row["choices"]]
    elif kind == "schema":
        prompts = [before + c + delimiter + row["continuation"] for c in row["context_options"]]
    else:
        prompt = before + row["context"].strip() + delimiter
        prompts = [prompt.strip(), prompt + row["continuation"]]
    begin = tokenizer.bos_token_id
    begin = tokenizer.eos_token_id if begin is None else begin
    tokens = [[begin, *tokenizer(p, add_special_tokens=False)["input_ids"]] for p in prompts]
    ends = [len(ids) for ids in tokens]
    if kind == "multiple_choice":
        starts = [common(tokens)] * len(tokens)
    elif kind == "schema":
        suffix = common([ids[::-1] for ids in tokens])
        starts = [end - suffix for end in ends]
    else:
        assert tokens[0] == tokens[1][: len(tokens[0])]
        starts, ends, tokens = [len(tokens[0])], ends[1:], tokens[1:]
    means, greedy = [], []
    for ids, start, end in zip(tokens, starts, ends, strict=True):
        if len(ids) > positions:
            gone = len(ids) - positions
            ids, start, end = ids[-positions:], start - gone, end - gone
            assert start > 0, "the tests' rows are shorter than that"
        losses, guesses = losses_and_guesses(model, ids)
        means.append(losses[start - 1 : end - 1].mean().item())
        greedy.append(guesses[start - 1 : end - 1] == ids[start:end])
    return greedy[0] if kind == "language_modeling" else means.index(min(means)) == row["gold"]


def expected(bundle, label: str, tokenizer, model, positions: int, limit=None) -> list[bool]:
    lines = (bundle / "eval_data" / "some" / f"{label}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    random.Random(1337).shuffle(rows)
    rows = rows[:limit]
    return [is_right(i, rows, TASKS[label], tokenizer, model, positions) for i in range(len(rows))]


# --- Equal to it ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bos", "positions", "limit"),
    [
        ("<|endoftext|>", 512, None),
        (None, 512, 11),
        ("<|bos|>", 128, None),
    ],
)
def test_equal_to_the_definition(bundle, bos, positions, limit):
    tokenizer = tokenizer_with(bos)
    model = random_gpt2(5, positions=positions, vocab_size=len(tokenizer), n_embd=32)
    core = open_core(str(bundle), "core", tokenizer, max_length=positions, limit=limit)
    assert core.num_rows == len(core.rows) == len(TASKS) * (limit or ROWS)
    assert bool(core.truncated) == (positions == 128)
    figures = score_tasks(model, [core], batch_size=8)
    centered = []
    for label, (*_, percent) in TASKS.items():
        right = expected(bundle, label, tokenizer, model, positions, limit)
        accuracy = sum(right) / len(right)
        centered.append((accuracy - percent / 100) / (1 - percent / 100))
        assert figures[f"core/{label}_acc"] == pytest.approx(accuracy), label
        assert figures[f"core/{label}_centered"] == pytest.approx(centered[-1])
    assert figures["core"] == pytest.approx(sum(centered) / len(centered))


def test_a_model_that_knows_half_of_the_answers(bundle):
    """A random model is never greedy right: this one is, for the rows of even number."""
    tokenizer = tokenizer_with("<|endoftext|>")
    for label in ("words", "words_10", "schema_3"):
        task = open_core(str(bundle), f"core/{label}", tokenizer, max_length=512)
        known = [r.ids.tolist() for at in task.slices[::2] for r in task.requests[at]]
        model = KnowsByHeart(known)
        scores = loglikelihoods(model, task.requests, max_length=512, batch_size=8)
        figures = task.estimates(scores)
        right = expected(bundle, label, tokenizer, model, 512)
        assert 0 < sum(right) < len(right)
        assert figures[f"core/{label}_acc"].value == pytest.approx(np.mean(right))
        assert figures[f"core/{label}_acc"].stderr == pytest.approx(
            np.std(right, ddof=1) / len(right) ** 0.5
        )


def test_of_equals_the_first_is_taken(bundle):
    """Under a uniform model all means are equal, of long and short choices alike."""
    tokenizer = tokenizer_with("<|endoftext|>")
    core = open_core(str(bundle), "core", tokenizer, max_length=512)
    figures = score_tasks(uniform_gpt2(), [core], batch_size=3)
    for label in ("choices", "choices_10", "schema", "schema_3"):
        task = open_core(str(bundle), f"core/{label}", tokenizer, max_length=512)
        share = np.mean([example.gold == 0 for example in task.examples])
        assert figures[f"core/{label}_acc"] == share
        assert 0 < figures[f"core/{label}_acc"] < 1


def test_equal_requests_tie_whatever_batch_they_are_in(bundle):
    tokenizer = tokenizer_with("<|endoftext|>")
    task = open_core(str(bundle), "core/choices", tokenizer, max_length=512)
    scores = loglikelihoods(random_gpt2(), task.requests, max_length=512, batch_size=4)
    noisy = np.arange(len(task.requests)) * 1e-9  # a later one would win
    exact = task.estimates(scores)["core/choices_acc"].value
    scores.log_likelihood[:] += noisy
    assert task.estimates(scores)["core/choices_acc"].value == exact


def test_the_same_on_two_ranks(bundle):
    core = open_core(str(bundle), "core", tokenizer_with("<|endoftext|>"), max_length=128)
    model = random_gpt2(5, positions=128)
    score = partial(score_tasks, model, [core], batch_size=4)
    assert on_ranks(2, score) == score()


def test_the_error_of_the_mean_is_what_a_bootstrap_over_rows_gives(bundle):
    core = open_core(str(bundle), "core", tokenizer_with("<|endoftext|>"), max_length=512)
    scores = loglikelihoods(random_gpt2(2), core.requests, max_length=512, batch_size=8)
    found = core.estimates(scores)
    rng, rounds = np.random.default_rng(0), 20_000
    means = []
    for label in TASKS:
        rows = found[f"core/{label}_centered"].influence
        means.append(rows[rng.integers(len(rows), size=(rounds, len(rows)))].mean(axis=1))
    # n - 1 in place of n for the variance within tasks of 14 rows: 4 % wider; 1 % of noise.
    assert found["core"].stderr == pytest.approx(np.mean(means, axis=0).std(), rel=0.05)
    assert (found["core"] - found["core"]).stderr == 0, "paired"


def test_of_one_row_there_is_no_error(tmp_path):
    one = {"alone": ("multiple_choice", 0, " ", 0), "few": ("multiple_choice", 0, " ", 0)}
    row = {"query": "a man", "choices": ["sits", "runs"], "gold": 1}
    bundle = write_bundle(tmp_path, one, alone=[row])
    core = open_core(str(bundle), "core", tiny_tokenizer(), max_length=64)
    figures = score_tasks(random_gpt2(positions=64), [core], batch_size=8)
    assert np.isnan(figures["core_stderr"]) and figures["core/few_acc_stderr"] > 0


# --- Rows that cannot be scored, bundles that are none --------------------------------------------

BAD = {
    "choices": [
        ('{"query": "a", "choices": ["b", "c"]', "not JSON"),
        ('{"query": "a", "choices": ["b", "c"]}', "'gold' is 'None', not the index"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "'gold' is '2', not the index of one"),
        ('{"query": "a", "choices": ["b", "c"], "gold": "0"}', "'gold'"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "'gold'"),
        ('{"query": "a", "choices": ["b", "c"], "gold": -1}', "'gold'"),
        ('{"choices": ["b", "c"], "gold": 0}', "no 'query'"),
        ('{"query": "a", "choices": "bc", "gold": 0}', "'choices' is not a list"),
        ('{"query": "a", "choices": ["b", " "], "gold": 0}', "'choices' is empty"),
        ('{"query": "a", "choices": ["b", ["c"]], "gold": 0}', "'choices' is a list, not text"),
        ('{"query": "\\ud83d", "choices": ["b", "c"], "gold": 0}', "not JSON"),
        ("[1]", "is a list, not an object"),
        ("", "an empty line"),
    ],
    "schema": [
        ('{"context_options": ["a", "b"], "continuation": "", "gold": 0}', "'continuation' is"),
        ('{"context_options": ["a"], "continuation": "c", "gold": 0}', "at least two"),
    ],
    "words": [
        ('{"continuation": "c"}', "no 'context'"),
        ('{"context": "a", "continuation": "\\n"}', "'continuation' is empty"),
        ('{"context": "a", "continuation": "%s"}' % ("word " * 200), "more than the model's 128"),
    ],
}


def test_malformed_rows_are_named_and_the_others_scored_as_if_they_were_not_there(tmp_path, bundle):
    """Also with a BOM. A row too long for the model still serves as an example of others."""
    changed = {}
    for label, bad in BAD.items():
        rows = [json.dumps(row) for row in rows_of(TASKS[label][0], [*TASKS].index(label))]
        for at, (line, _) in enumerate(bad):
            rows.insert(2 * at, line)
        changed[label] = rows
    broken = write_bundle(tmp_path, **changed)
    for file in broken.rglob("*.*"):
        if file.is_file():
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    tokenizer, model = tokenizer_with("<|endoftext|>"), random_gpt2(5, positions=128)
    core, clean = (open_core(str(b), "core", tokenizer, max_length=128) for b in (broken, bundle))
    named = {
        f"core/{label} {2 * at + 1}": reason
        for label, bad in BAD.items()
        for at, (_, reason) in enumerate(bad)
    }
    assert core.skipped.keys() == named.keys()
    for row, reason in named.items():
        assert reason in core.skipped[row], row
    assert len(core.rows) == len(clean.rows) and core.num_rows == len(clean.rows) + len(named)
    # The shuffle of `words` has a row more in it, which is found too long after the shuffle.
    ours, theirs = (score_tasks(model, [task], batch_size=8) for task in (core, clean))
    assert [
        k for k in ours if ours[k] != theirs[k] and not k.startswith(("core/words_", "core_"))
    ] == []


def test_numbers_are_text_as_a_template_prints_them(tmp_path):
    rows = [{"query": 7, "choices": [1, 2.5], "gold": 1}]
    bundle = write_bundle(tmp_path, {"choices": TASKS["choices"]}, choices=rows)
    task = open_core(str(bundle), "core/choices", tiny_tokenizer(), max_length=64)
    assert [tiny_tokenizer().decode(r.ids[1:]) for r in task.requests] == ["7 1", "7 2.5"]


def test_contexts_that_are_the_same_leave_nothing_to_choose(tmp_path):
    """As in nanochat, where the mean of no losses is NaN: the first is taken."""
    row = {"context_options": ["a man", "a man"], "continuation": "sits"}
    rows = [row | {"gold": gold} for gold in (0, 1, 1, 1)]
    bundle = write_bundle(tmp_path, {"schema": TASKS["schema"]}, schema=rows)
    core = open_core(str(bundle), "core", tiny_tokenizer(), max_length=64)
    assert score_tasks(random_gpt2(positions=64), [core], batch_size=8)["core/schema_acc"] == 0.25


def test_a_continuation_that_merges_with_its_context_is_named(tmp_path):
    """nanochat stops there: the tokens of the whole do not begin with those of the prompt."""
    tokenizer = tiny_tokenizer()
    whole, tail = next(
        (left + right, right)
        for left, right in ((w[:i], w[i:]) for w in ("the", "and", "ing", "er") for i in (1, 2))
        if right and len(tokenizer(left + right)["input_ids"]) == 1
    )
    rows = [
        {"context": whole.removesuffix(tail), "continuation": tail},
        {"context": "a man", "continuation": " sits"},
    ]
    bundle = write_bundle(tmp_path, {"words": ("language_modeling", 0, "", 0)}, words=rows)
    entry = json.loads((bundle / "core.yaml").read_text())
    entry["icl_tasks"][0]["continuation_delimiter"] = ""
    (bundle / "core.yaml").write_text(json.dumps(entry))
    task = open_core(str(bundle), "core/words", tokenizer, max_length=64)
    assert task.skipped == {1: "continuation 0 has no tokens of its own"}


def without(name):
    return lambda bundle: (bundle / name).unlink()


def saying(name, old, new):
    def change(bundle):
        text = (bundle / name).read_text()
        assert old in text
        (bundle / name).write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("core.yaml"), "no core.yaml in it; it is the evaluation bundle, https://karpathy"),
        (without("eval_meta_data.csv"), "there is no eval_meta_data.csv in it"),
        (without("eval_data/some/words.jsonl"), "there is no eval_data/some/words.jsonl in it"),
        (saying("core.yaml", "icl_tasks", "tasks"), "core.yaml .* malformed: KeyError"),
        (saying("core.yaml", "{", "{{"), "core.yaml .* malformed: "),
        (saying("core.yaml", "multiple_choice", "essay"), "malformed: .*choices: .*'essay'"),
        (saying("core.yaml", "[0]", "0"), "core.yaml .* malformed: "),
        (saying("core.yaml", "[0]", "[-1]"), "num_fewshot -1"),
        (saying("core.yaml", "some/words", "../some/words"), "dataset_uri .* is not in the bundle"),
        (saying("core.yaml", "choices_10", "choices"), "no task, or one twice"),
        (saying("eval_meta_data.csv", "words,", "others,"), "words: no random baseline"),
        (saying("eval_meta_data.csv", ",50", ",100"), "choices: no random baseline"),
        (saying("eval_meta_data.csv", ",50", ",half"), "malformed: .*'half'"),
        (
            saying("eval_meta_data.csv", "Random baseline", "Chance"),
            "eval_meta_data.csv is malformed: KeyError",
        ),
    ],
)
def test_a_bundle_that_is_none_is_refused_in_one_line(tmp_path, change, named):
    bundle = write_bundle(tmp_path)
    change(bundle)
    with pytest.raises(UserError, match=re.compile(f"--core_dir {bundle}: .*{named}")) as raised:
        open_core(str(bundle), "core", tiny_tokenizer(), max_length=64)
    assert "\n" not in str(raised.value)


def test_too_few_rows_for_the_examples_and_names_that_are_no_tasks(tmp_path, bundle):
    with pytest.raises(UserError, match=r"--limit: core/choices_10 draws 10 examples .* 10 rows"):
        open_core(str(bundle), "core", tiny_tokenizer(), max_length=64, limit=10)
    few = write_bundle(tmp_path, choices_10=rows_of("multiple_choice", 0)[:9])
    for limit in (None, 11):
        with pytest.raises(UserError, match=r"--core_dir: core/choices_10 draws 10 .* has 9 rows"):
            open_core(str(few), "core", tiny_tokenizer(), max_length=64, limit=limit)
    with pytest.raises(UserError, match=r"--tasks: core/poems: .* has choices, choices_10, schema"):
        open_core(str(bundle), "core/poems", tiny_tokenizer(), max_length=64)
    with pytest.raises(UserError, match=r"--core_dir: name the directory .*eval_bundle.zip"):
        open_core(None, "core", tiny_tokenizer(), max_length=64)
    no_ids = tiny_tokenizer()
    no_ids.bos_token = no_ids.eos_token = None
    with pytest.raises(UserError, match="neither an eos nor a bos token"):
        open_core(str(bundle), "core", no_ids, max_length=64)
    (few / "eval_data/some/words.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"--core_dir .*words.jsonl: "):
        open_core(str(few), "core/words", tiny_tokenizer(), max_length=64)
    (few / "eval_data/some/words.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"core/words: none of its 1 rows .* row 1: no 'context'"):
        open_core(str(few), "core/words", tiny_tokenizer(), max_length=64)


def test_a_task_beside_all_of_them_is_refused(bundle):
    """Its rows would be scored twice, under the same names."""
    names = ["core/schema", "core"]
    with pytest.raises(UserError, match="--tasks: both core and core/schema score core/schema"):
        open_tasks(names, tokenizer_with("<|bos|>"), max_length=512, core_dir=str(bundle))
