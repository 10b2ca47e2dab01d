"""The engine: right values whatever the batch, few shapes, little padding."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from tiny_language_models import VOCAB_SIZE, random_gpt2, tiny_tokenizer, uniform_gpt2
from tokenizers.processors import TemplateProcessing

from gpt2repro.evaluation.likelihoods import (
    NUM_SHAPES,
    Request,
    bucket_lengths,
    encode_pairs,
    loglikelihoods,
    plan_batches,
)

POSITIONS = 64


@pytest.fixture(scope="module")
def model():
    return random_gpt2(positions=POSITIONS)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """57 of 2 to 89 tokens: some fill the model's positions, some lose context on the left."""
    rng = np.random.default_rng(0)
    return [
        Request(rng.integers(0, VOCAB_SIZE, n).tolist(), int(rng.integers(1, min(n, 60))))
        for n in rng.integers(2, 90, 57)
    ]


@torch.no_grad()
def one_by_one(model, requests: list[Request]) -> tuple[np.ndarray, np.ndarray]:
    """The definition: each request alone, log-softmax over everything, no padding."""
    sums, greedy = [], []
    for request in requests:
        ids = torch.tensor([request.ids[-(POSITIONS + 1) :]])
        log_p = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
        log_p, targets = log_p[-request.num_scored :], ids[0, 1:][-request.num_scored :]
        sums.append(log_p.gather(1, targets[:, None]).sum().item())
        greedy.append(bool((log_p.argmax(-1) == targets).all()))
    return np.array(sums), np.array(greedy)


@pytest.mark.parametrize("trim_logits", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_scores_do_not_depend_on_the_batch(model, requests, batch_size, trim_logits):
    ours = loglikelihoods(
        model, requests, max_length=POSITIONS, batch_size=batch_size, trim_logits=trim_logits
    )
    theirs, greedy = one_by_one(model, requests)
    # Sums of up to 59 float32 terms of size 10: padding changes the order of float32 sums.
    np.testing.assert_allclose(ours.log_likelihood, theirs, rtol=1e-6, atol=1e-4)
    np.testing.assert_array_equal(ours.is_greedy, greedy)


def test_greedy_is_what_argmax_gives(model):
    with torch.no_grad():
        ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0]
    wrong = ids.clone()
    wrong[-1] = (wrong[-1] + 1) % VOCAB_SIZE
    requests = [Request(ids.tolist(), 4), Request(wrong.tolist(), 4), Request(wrong.tolist(), 1)]
    scores = loglikelihoods(model, requests, max_length=POSITIONS, batch_size=2)
    assert scores.is_greedy.tolist() == [True, False, False]


def test_a_uniform_model_scores_ln_v(requests):
    scores = loglikelihoods(uniform_gpt2(), requests, max_length=POSITIONS, batch_size=4)
    per_token = -scores.log_likelihood / [request.num_scored for request in requests]
    np.testing.assert_allclose(per_token, math.log(VOCAB_SIZE), rtol=1e-6)  # float32


def test_of_no_requests_there_are_no_scores(model):
    scores = loglikelihoods(model, [], max_length=POSITIONS, batch_size=4)
    assert scores.log_likelihood.shape == scores.is_greedy.shape == (0,)
    assert scores.is_greedy.dtype == bool and scores.padding_waste == 0


def test_padding_waste_is_the_share_of_positions_that_were_for_nothing(model):
    """Inputs of 8, 8, 5 and 3 tokens in one batch; filler rows and a second batch count too."""
    requests = [Request([1] * (n + 1), 1) for n in (8, 3, 8, 5)]
    how = {"max_length": POSITIONS, "reduce": lambda found: found}
    scores = loglikelihoods(model, requests, batch_size=4, **how)
    assert scores.padding_waste == pytest.approx(1 - 24 / 32)
    scores = loglikelihoods(model, requests, batch_size=3, **how)
    assert scores.padding_waste == pytest.approx(1 - 24 / 48)


def test_the_model_is_asked_for_no_cache_and_for_all_logits_unless_they_may_be_trimmed(requests):
    asked: list[dict] = []
    model = random_gpt2(positions=POSITIONS)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(dict(kwargs)), with_kwargs=True
    )
    loglikelihoods(model, requests, max_length=POSITIONS, batch_size=8)
    assert all(each.keys() == {"input_ids", "use_cache"} for each in asked)
    whole = len(asked)
    loglikelihoods(model, requests, max_length=POSITIONS, batch_size=8, trim_logits=True)
    assert not any(each["use_cache"] for each in asked)
    assert any(each.get("logits_to_keep", 0) for each in asked[whole:])


def test_trimmed_logits_are_the_end_of_the_row_in_quarters():
    """A row of 64 inputs whose last 17 tokens are scored needs 17 positions: two quarters."""
    asked: list[int] = []
    model = random_gpt2(positions=POSITIONS)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(kwargs.get("logits_to_keep", 0)), with_kwargs=True
    )
    for num_scored in (1, 16, 17, 48, 49, 64):
        request = Request([3] * 65, num_scored)
        loglikelihoods(model, [request], max_length=64, batch_size=1, trim_logits=True)
    assert asked == [16, 16, 32, 48, 0, 0]  # 0: all 64


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_give_the_same_bits(model, requests, world_size):
    """Every rank scores its batches; summing what they found is what `reduce` does."""
    alone = loglikelihoods(model, requests, max_length=POSITIONS, batch_size=4)
    found, num_forwards, num_finished = [], [], 0

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    for rank in range(world_size):
        finished: list[int] = []
        loglikelihoods(
            model,
            requests,
            max_length=POSITIONS,
            batch_size=4,
            rank=rank,
            world_size=world_size,
            reduce=collect,
            on_batch=finished.append,
        )
        num_forwards.append(len(finished))
        num_finished += sum(finished)
    together = torch.stack(found).sum(dim=0)
    assert len(set(num_forwards)) == 1, "a sharded model would hang"
    assert num_finished == len(requests), "for a progress bar: filler does not count"
    np.testing.assert_array_equal(together[0].numpy(), alone.log_likelihood)
    np.testing.assert_array_equal(together[1].numpy() > 0, alone.is_greedy)


def test_a_stop_is_asked_before_each_batch(model, requests):
    answers = iter([False, False, True])
    stopped = loglikelihoods(
        model, requests, max_length=POSITIONS, batch_size=4, should_stop=lambda: next(answers)
    )
    assert stopped is None
    assert next(answers, "used up") == "used up"


def test_dropout_is_off_and_the_mode_comes_back(requests):
    model = random_gpt2(positions=POSITIONS, resid_pdrop=0.5).train()
    first, second = (
        loglikelihoods(model, requests, max_length=POSITIONS, batch_size=8) for _ in range(2)
    )
    np.testing.assert_array_equal(first.log_likelihood, second.log_likelihood)
    assert model.training


def test_a_compiled_model_meets_few_shapes(model, requests):
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    ours = loglikelihoods(compiled, requests, max_length=POSITIONS, batch_size=2)
    graphs = counter.frame_count
    loglikelihoods(compiled, requests, max_length=POSITIONS, batch_size=2)
    torch._dynamo.reset()
    assert 1 < graphs <= NUM_SHAPES
    assert counter.frame_count == graphs, "a second evaluation compiles nothing"
    np.testing.assert_allclose(ours.log_likelihood, one_by_one(model, requests)[0], rtol=1e-5)


# --- batches --------------------------------------------------------------------------------------


def test_buckets_are_the_cheapest():
    lengths = np.array([3, 3, 3, 4, 9, 10, 10, 17, 30, 31])

    def cost(buckets) -> int:
        return sum(min(b for b in buckets if b >= n) for n in lengths)

    for num_buckets in range(1, 6):
        choices = itertools.combinations(np.unique(lengths), num_buckets)
        best = min(cost(choice) for choice in choices if 31 in choice)
        assert cost(bucket_lengths(lengths, num_buckets)) == best
    assert bucket_lengths(np.array([7, 7]), 6).tolist() == [7]


@pytest.mark.parametrize("world_size", [1, 4])
def test_batches_hold_each_request_once_in_few_shapes(world_size):
    # HellaSwag's lengths in GPT-2 tokens are a mix of short captions and longer articles.
    rng = np.random.default_rng(1)
    lengths = np.concatenate([rng.integers(20, 60, 900), rng.integers(60, 180, 2100)])
    batches = plan_batches(lengths, batch_size=16, max_length=1024, world_size=world_size)
    counted = np.concatenate([batch.index[: batch.num_counted] for batch in batches])
    assert sorted(counted) == list(range(len(lengths)))
    assert all(batch.length >= lengths[batch.index].max() for batch in batches)
    assert {len(batch.index) for batch in batches} == {16}
    assert len({batch.length for batch in batches}) <= NUM_SHAPES
    assert len(batches) % world_size == 0
    shapes = [batch.length for batch in batches]
    assert shapes == sorted(shapes, reverse=True), "what runs out of memory does so at once"
    assert all(length % 8 == 0 for length in shapes)
    computed = sum(batch.length * 16 for batch in batches)
    assert 1 - lengths.sum() / computed < 0.25


def test_no_shape_exceeds_the_model():
    (batch,) = plan_batches(np.array([61, 62]), batch_size=8, max_length=62)
    assert batch.length == 62  # not 64


def test_ranks_without_a_batch_of_their_own_repeat_one_that_does_not_count():
    """Else a sharded model would wait for them. Shorter batches are filled with their own rows."""
    batches = plan_batches(np.array([9, 30, 20]), batch_size=2, max_length=64, world_size=5)
    assert [batch.num_counted for batch in batches] == [2, 1, 0, 0, 0]
    assert [batch.index.tolist() for batch in batches] == [[1, 2], *[[0, 0]] * 4]
    assert [batch.length for batch in batches] == [32, *[16] * 4]


# --- tokens of a pair -----------------------------------------------------------------------------


def test_pairs_are_split_where_the_context_ends():
    tokenizer = tiny_tokenizer()
    first, spaced = encode_pairs(
        tokenizer, [("The lamp", " fell down"), ("The lamp ", "fell down")]
    )
    assert first == spaced, "a space at the end of the context belongs to the continuation"
    assert tokenizer.decode(first.ids[-first.num_scored :]) == " fell down"
    assert tokenizer.decode(first.ids) == "The lamp fell down"


def test_a_context_keeps_its_own_tokens_where_one_would_span_the_join():
    """As the harness has it: what follows their number in the tokens of both is scored."""
    tokenizer = tiny_tokenizer()
    head, both = (tokenizer(text)["input_ids"] for text in ("This func", "This function returns"))
    assert both[: len(head)] != head
    [request] = encode_pairs(tokenizer, [("This func", "tion returns")])
    assert list(request.ids) == [*head, *both[len(head) :]]
    assert request.num_scored == len(both) - len(head)


def test_of_a_pair_without_a_continuation_nothing_is_scored():
    (request,) = encode_pairs(tiny_tokenizer(), [("The lamp", "")])
    assert request.num_scored == 0


def test_an_empty_context_becomes_the_prefix_token():
    tokenizer = tiny_tokenizer()
    request, marked = encode_pairs(tokenizer, [("", "Lamp"), ("", "<|endoftext|>Lamp")])
    assert request.ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(request.ids[1:]) == "Lamp"
    assert request.num_scored == len(request.ids) - 1
    assert marked == request, "a text that begins with it gets no second one"


def test_after_an_empty_context_the_tokenizer_adds_nothing_of_its_own():
    tokenizer = tiny_tokenizer()
    (expected,) = encode_pairs(tokenizer, [("", "Lamp")])
    end = ("<|endoftext|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[end]
    )
    assert encode_pairs(tokenizer, [("", "Lamp")]) == [expected]
