"""What the benchmarks ask, by hand, and rows that cannot be scored."""

import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_language_models import (
    HELLASWAG,
    LAMBADA,
    VOCAB_SIZE,
    WIKITEXT2,
    KnowsByHeart,
    random_gpt2,
    read,
    tiny_tokenizer,
    uniform_gpt2,
)
from tokenizers.processors import TemplateProcessing

from gpt2repro import UserError
from gpt2repro.evaluation.benchmarks import BENCHMARKS
from gpt2repro.evaluation.likelihoods import Scores, loglikelihoods
from gpt2repro.evaluation.task import MalformedRow, Task, read_jsonl
from gpt2repro.evaluation.tasks import hellaswag, wikitext
from gpt2repro.evaluation.tasks.held_out import Validation
from gpt2repro.evaluation.tasks.hellaswag import CompletionHellaSwag, LMEvalHellaSwag
from gpt2repro.evaluation.tasks.lambada import Lambada
from gpt2repro.evaluation.tasks.wikitext import (
    WikiText2,
    detokenize_wikitext,
    rolling_windows,
    wikitext_pages,
)
from gpt2repro.system import patience

POSITIONS = 512
BOTH = pytest.mark.parametrize("hellaswag", [CompletionHellaSwag, LMEvalHellaSwag])


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


@BOTH
def test_a_model_that_knows_is_always_right(tokenizer, hellaswag):
    task = hellaswag(read(HELLASWAG), tokenizer, max_length=POSITIONS)
    right = [
        task.requests[at][example.label].ids
        for example, at in zip(task.examples, task.slices, strict=True)
    ]
    assert task.num_rows == len(task.rows) == 10
    assert set(scored(KnowsByHeart(right), task).values()) == {1.0}


@BOTH
def test_a_uniform_model_prefers_the_shortest(tokenizer, hellaswag):
    """Sums favour the ending of fewest tokens; over tokens all tie, and the first is taken."""
    task = hellaswag(read(HELLASWAG), tokenizer, max_length=POSITIONS)
    found = scored(uniform_gpt2(), task)
    num_tokens = [[request.num_scored for request in task.requests[at]] for at in task.slices]
    labels = [example.label for example in task.examples]
    shortest = np.mean([np.argmin(n) == label for n, label in zip(num_tokens, labels, strict=True)])
    assert found[f"{task.prefix}acc"] == shortest
    if hellaswag is CompletionHellaSwag:
        assert found["hellaswag/completion_acc_norm"] == np.mean([label == 0 for label in labels])


def test_completion_text_and_lengths(tokenizer):
    task = CompletionHellaSwag([row(endings=["rows home.", "naïve"])], tokenizer, max_length=64)
    first, second = task.requests
    assert tokenizer.decode(first.ids) == "A boat leaves the shore. the crew rows home."
    assert tokenizer.decode(first.ids[-first.num_scored :]) == " rows home."
    assert first.num_scored > 1 and second.num_scored > 1, "endings of several tokens"
    # Log-likelihoods of -1 and -2 per token: the sum prefers whoever is shorter, the mean not.
    nats = np.array([-2.0 * first.num_scored, -1.0 * second.num_scored])
    found = task.estimates(Scores(nats, np.zeros(2, bool), 0.0))
    assert found["hellaswag/completion_acc_norm"].value == 0.0


def test_lm_eval_text_and_lengths(tokenizer):
    wiki = row(
        activity_label="Garden",
        ctx_a="[header] How to dig [title] Take a spade. [step]  Dig.",
        ctx_b="",
        endings=["Rest.  [substeps] Drink.", "été"],
    )
    plain, cleaned = LMEvalHellaSwag([row(), wiki], tokenizer, max_length=256).examples
    assert plain.context == "Rowing: A boat leaves the shore. The crew"
    assert cleaned.context == "Garden: How to dig. Take a spade.  Dig."
    assert cleaned.endings == ["Rest.  Drink.", "été"]
    task = LMEvalHellaSwag([wiki], tokenizer, max_length=256)
    assert task.lengths(task.examples[0], task.requests) == [13, 3], "characters, not bytes"


@BOTH
def test_labels_are_those_of_the_endings(tokenizer, hellaswag):
    """Numbers or their text, the last one included; and two endings are enough."""
    rows = [row(label=3), row(label="0"), row(endings=["a", "b"], label=1)]
    task = hellaswag(rows, tokenizer, max_length=64)
    assert [example.label for example in task.examples] == [3, 0, 1]
    for label in ("1.5", "one", "-1", 1.0, [1], "4"):
        (reason,) = hellaswag([row(label=label)], tokenizer, max_length=64).skipped.values()
        assert reason.startswith(f"'label' is {label if label == '4' else repr(label)}, ")


def test_an_empty_context_is_named(tokenizer):
    task = CompletionHellaSwag([row(ctx=" \n")], tokenizer, max_length=64)
    assert task.skipped == {1: "the context is empty"}


def test_cleaning():
    assert hellaswag._clean(" [header] A [title] B  c [x] d ") == " A. B c d"


@BOTH
def test_malformed_rows_are_named_and_counted(tokenizer, hellaswag):
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
    task = hellaswag(rows, tokenizer, max_length=128)
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
    task = CompletionHellaSwag(rows, tokenizer, max_length=64)
    assert (task.rows, task.truncated, task.skipped) == ([1, 2], [2], {})
    whole = max(len(request.ids) for request in task.requests[:4]) - 1
    just_fits = CompletionHellaSwag(rows[:1], tokenizer, max_length=whole)
    assert just_fits.truncated == []
    assert CompletionHellaSwag(rows[:1], tokenizer, max_length=whole - 1).truncated == [1]
    assert scored(random_gpt2(positions=64), task)


# --- LAMBADA --------------------------------------------------------------------------------------


def test_lambada_asks_for_the_last_word(tokenizer):
    task = Lambada([{"text": "He swam\nacross the river"}], tokenizer, max_length=64)
    (request,) = task.requests
    assert task.examples == [("He swam\nacross the", " river")]
    assert tokenizer.decode(request.ids[-request.num_scored :]) == " river"


def test_lambada_of_a_model_that_knows(tokenizer):
    task = Lambada(read(LAMBADA), tokenizer, max_length=POSITIONS)
    assert all(request.num_scored >= 1 for request in task.requests)
    assert any(request.num_scored > 1 for request in task.requests), "words of several tokens"
    found = scored(KnowsByHeart([request.ids for request in task.requests]), task)
    assert found == {"lambada/acc": 1.0, "lambada/perplexity": pytest.approx(1.0)}


def test_lambada_of_a_uniform_model(tokenizer):
    task = Lambada(read(LAMBADA), tokenizer, max_length=POSITIONS)
    found = scored(uniform_gpt2(), task)
    mean_tokens = np.mean([request.num_scored for request in task.requests])
    assert found["lambada/acc"] == 0.0
    # ln of a perplexity that float32 gave: to its precision.
    assert np.log(found["lambada/perplexity"]) == pytest.approx(mean_tokens * np.log(VOCAB_SIZE))


def test_lambada_names_rows_without_a_word(tokenizer):
    rows = [{"text": "ends with a space "}, {"text": ""}, {"word": "x"}, {"text": "a good one"}]
    task = Lambada(rows, tokenizer, max_length=64)
    assert task.rows == [4]
    assert list(task.skipped) == [1, 2, 3]
    assert task.skipped[3] == "no 'text'"


# --- WikiText-2 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        (CompletionHellaSwag, HELLASWAG),
        (LMEvalHellaSwag, HELLASWAG),
        (Lambada, LAMBADA),
        (WikiText2, WIKITEXT2),
    ],
)
def test_what_a_tokenizer_adds_to_a_text_is_no_part_of_a_benchmark(task, rows):
    """Such as an end; what it puts before a text is asked for (tests/test_odd_tokenizers.py)."""
    bare, ending = tiny_tokenizer(), tiny_tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", ending.eos_token_id)]
    )
    theirs, ours = (
        [list(map(int, request.ids)) for request in task(read(rows), each, max_length=64).requests]
        for each in (bare, ending)
    )
    assert ours == theirs


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 30])
def test_windows_score_every_token_once(num_tokens, stride):
    windows = rolling_windows(num_tokens, 8, stride)
    covered = [token for _, scored_from, end in windows for token in range(scored_from, end)]
    assert covered == list(range(num_tokens))
    assert all(begin <= scored_from < end <= begin + 8 for begin, scored_from, end in windows)
    assert all(end - scored_from <= stride for _, scored_from, end in windows[1:])
    assert all(begin == max(0, end - 8) for begin, _, end in windows), "with all there is before"


def test_wikitext_of_a_uniform_model(tokenizer):
    """ln V per token whatever the stride, and units as the corpus counts them."""
    pages = read(WIKITEXT2)
    for stride in (64, 16):
        task = WikiText2(pages, tokenizer, max_length=64, stride=stride)
        found = scored(uniform_gpt2(), task)
        assert np.log(found["wikitext2/token_perplexity"]) == pytest.approx(np.log(VOCAB_SIZE))
        num_tokens = sum(request.num_scored for request in task.requests)
        num_words = sum(len(page["page"].split()) + 2 for page in pages)  # lm-eval's empty ends
        per_word = num_tokens / num_words * np.log(VOCAB_SIZE)
        assert np.log(found["wikitext2/word_perplexity"]) == pytest.approx(per_word)
        num_bytes = sum(len(page["page"].encode()) for page in pages)
        bits = num_tokens / num_bytes * np.log2(VOCAB_SIZE)
        assert found["wikitext2/bits_per_byte"] == pytest.approx(bits)


def test_the_stride_is_told_and_by_default_the_whole_context(tokenizer):
    pages = read(WIKITEXT2)
    default = WikiText2(pages, tokenizer, max_length=64)
    whole = WikiText2(pages, tokenizer, max_length=64, stride=64)
    assert default.note == whole.note == "; stride 64"
    assert default.requests == whole.requests
    assert WikiText2(pages, tokenizer, max_length=64, stride=16).note == "; stride 16"


def test_pages_begin_after_the_prefix_token(tokenizer):
    """So that the first token is predicted too; later windows begin with what was before."""
    (page,) = [{"page": "It rained on the river for days. " * 4}]
    task = WikiText2([page], tokenizer, max_length=8, stride=4)
    ids = [tokenizer.bos_token_id, *tokenizer(page["page"])["input_ids"]]
    assert [request.ids for request in task.requests[:3]] == [ids[:9], ids[4:13], ids[8:17]]
    assert [request.num_scored for request in task.requests[:3]] == [8, 4, 4]
    assert sum(request.num_scored for request in task.requests) == len(ids) - 1


def test_detokenization():
    spaced = ' = = Old = = \n \n It cost 1 @,@ 702 , the miller \'s half @-@ loaf ( " one " ) . \n'
    assert (
        detokenize_wikitext(spaced)
        == ' == Old ==\n\nIt cost 1,702, the miller\'s half-loaf ("one").\n'
    )


def test_lines_become_pages():
    lines = [" = One = \n", "", " Text . \n", " = = Part = = \n", "", " = Two = \n", " More . \n"]
    one, two = wikitext_pages(["", *lines])
    assert one == " = One = \n \n Text . \n = = Part = = \n \n"
    assert two == " = Two = \n More . \n"


def test_an_empty_page_is_named(tokenizer):
    task = WikiText2([{"page": " \n"}, {"page": "a b"}], tokenizer, max_length=16)
    assert task.skipped == {1: "the page is empty"}


# --- held-out text --------------------------------------------------------------------------------


def test_validation_is_paired_by_its_tokens():
    rows = np.arange(10, dtype=np.uint16).reshape(2, 5)
    assert Validation(rows).identity() == Validation(rows.copy()).identity()
    assert Validation(rows).identity() != Validation(rows + 1).identity()


def test_validation_bits_per_byte():
    rows = np.zeros((3, 9), dtype=np.uint16)
    found = scored(uniform_gpt2(), Validation(rows, bytes_per_token=4.0))
    assert found["val/loss"] == pytest.approx(np.log(VOCAB_SIZE))
    assert found["val/bits_per_byte"] == pytest.approx(np.log2(VOCAB_SIZE) / 4)


# --- Files of rows --------------------------------------------------------------------------------


def test_a_byte_order_mark_before_a_benchmark(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a b"}\n{"text": "c d"}\n')
    assert read_jsonl(str(tmp_path / "rows.jsonl"), "lambada") == [{"text": "a b"}, {"text": "c d"}]


@pytest.mark.parametrize("content", ["é".encode("latin-1"), "é".encode("utf-16"), None])
def test_a_file_that_is_no_text_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="--lambada_file"):
        read_jsonl(str(tmp_path / "rows.jsonl"), "lambada")


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
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "a b"}}\n{line}\n{{"text": "c d"}}\n')
    task = Lambada(read_jsonl(str(tmp_path / "rows.jsonl"), "x"), tokenizer, max_length=64)
    assert task.rows == [1, 3] and list(task.skipped) == [2]


def test_a_label_of_many_digits_is_none(tokenizer):
    task = CompletionHellaSwag([row(), row(label="9" * 5000)], tokenizer, max_length=64)
    assert task.rows == [1] and "not the index of an ending" in task.skipped[2]


# --- Cleaning takes time in proportion to the text ------------------------------------------------

OLD_CLEANING = r"\[.*?\]"
OLD_BRACKETS = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)


@given(st.text("[]() {}\"'\n\t\u00a0\x1fa.", max_size=40))
def test_cleaning_is_that_of_lm_eval(text):
    """Its expressions, which take cubic time, give the same."""
    expected = re.sub(OLD_CLEANING, "", text.strip().replace(" [title]", ". "))
    assert hellaswag._clean(text) == expected.replace("  ", " ")
    ours = theirs = text
    for pattern, (old, replacement) in zip(wikitext._BRACKETED, OLD_BRACKETS, strict=True):
        ours = pattern.sub(wikitext._tightened, ours)
        theirs = re.sub(old, replacement, theirs)
        assert ours == theirs


@pytest.mark.parametrize("opening", ["[", "(", "{", '"', "'"])
@pytest.mark.parametrize("filling", ["", " ", " a", "a "])
def test_cleaning_is_linear(opening, filling):
    """A megabyte in moments, where the old expressions would take hours and years."""
    once = (opening + filling * 1000) * (10**6 // (1 + 1000 * len(filling)))
    many = (opening + filling) * (10**6 // (1 + len(filling)))
    began = time.process_time()
    for text in (opening + filling * 10**6, once, many, many[:-1] + "]"):
        hellaswag._clean(text)
        detokenize_wikitext(text)
        wikitext_pages([f" = {text} = \n", f" = {text}\n"])
    assert time.process_time() - began < 20


def test_rows_from_the_cache_prove_no_connection(monkeypatch):
    """Else a machine without a network would be patient for half an hour from then on."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": "a b"}])
    assert BENCHMARKS["lambada"].read_rows(None, None) == [{"text": "a b"}]
    assert not patience._outages.hub_answered


def test_a_benchmark_is_waited_for_five_minutes_and_the_line_names_its_option(monkeypatch):
    now = [0.0]

    def away(*_, **__):
        raise ConnectionError("away")

    monkeypatch.setattr("datasets.load_dataset", away)
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    patience._outages.hub_answered = True
    with pytest.raises(UserError, match=r"gave up after 300 s .*--lambada_file"):
        BENCHMARKS["lambada"].read_rows(None, None)
