"""Log-likelihoods of continuations under a causal language model, the engine of every evaluation.

text pairs -> `Request`s -> batches of few, fixed shapes -> one forward each -> nats per request

Requests are sorted by length and cut into batches of a constant number of rows, each padded on the
right to one of a few lengths chosen to waste least. So a compiled model meets a handful of shapes,
and every rank of a sharded model runs the same number of forwards. Right padding needs no mask:
attention is causal, so no scored position sees it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel

from gpt2repro.data.tokens.token_ids import begin_id, ids_to_continue, well_formed

NUM_SHAPES = 6  # lengths a compiled model is asked for; dynamo gives up at 8 recompilations
POSITIONS_AT_ONCE = 1024  # positions turned to float32 together: 1024 x 50257 x 4 bytes = 206 MB


Reduce = Callable[[torch.Tensor], torch.Tensor]  # sums a tensor over the ranks


@dataclass(frozen=True, slots=True)
class Request:
    """Token ids of a context and its continuation; the last `num_scored` of them are scored."""

    ids: Sequence[int] | np.ndarray
    num_scored: int
    is_cut: bool = False  # it has lost tokens on its left already

    def is_truncated(self, max_length: int) -> bool:
        """Whether the context loses tokens on its left in a model of `max_length` positions."""
        return self.is_cut or len(self.ids) > max_length + 1  # the last is never fed


@dataclass(frozen=True)
class Scores:
    """What `loglikelihoods` found, in the order of the requests."""

    log_likelihood: np.ndarray  # (N,) float64, nats, summed over the scored tokens
    is_greedy: np.ndarray  # (N,) bool: every scored token was the most likely one
    padding_waste: float  # share of the computed positions that belonged to no request
    written: Sequence[list[int]] = ()  # the new ids of each of a task's prompts

    def __getitem__(self, at: slice) -> "Scores":
        return Scores(self.log_likelihood[at], self.is_greedy[at], self.padding_waste)


def encode_pairs(tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """Tokenize (context, continuation) texts the way lm-evaluation-harness does.

    Spaces at the end of a context move to the continuation, since a byte-level BPE keeps them with
    the next word. The pair is encoded as one text, and what follows the context's own number of
    tokens is the continuation, after the context's own tokens (a token may span the join);
    `num_scored` is 0 where nothing follows. An empty context is
    replaced by what begins a text, lm-evaluation-harness' `prefix_token_id`.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    texts = ["".join(pair) for pair in pairs]
    context_ids = ids_to_continue(tokenizer, contexts)
    text_ids = ids_to_continue(tokenizer, texts)
    requests = []
    for context, text, head, ids in zip(contexts, texts, context_ids, text_ids, strict=True):
        if context:
            requests.append(Request([*head, *ids[len(head) :]], max(0, len(ids) - len(head))))
            continue
        ids = tokenizer(well_formed(text), add_special_tokens=False, verbose=False)["input_ids"]
        starts_itself = ids[:1] == [begin_id(tokenizer)]
        ids = ids if starts_itself else [begin_id(tokenizer), *ids]
        requests.append(Request(ids, len(ids) - 1))
    return requests


def bucket_lengths(lengths: np.ndarray, num_buckets: int) -> np.ndarray:
    """The `num_buckets` lengths (or fewer) to which `lengths` are rounded up at the least cost.

    Exact, by dynamic programming over the distinct lengths: `cost[j]` is the least total length of
    the j shortest ones, the last of their buckets ending at `ends[j]`.
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    ends = np.concatenate([[0], distinct])
    rows = np.concatenate([[0], np.cumsum(counts)])
    grow = np.triu(ends[None, :] * (rows[None, :] - rows[:, None]).astype(float))
    grow[np.tril_indices(len(ends), -1)] = np.inf  # a bucket cannot end before it starts
    cost = np.where(ends == 0, 0.0, np.inf)
    starts = []
    for _ in range(num_buckets):
        total = cost[:, None] + grow
        starts.append(total.argmin(axis=0))
        cost = total.min(axis=0)
    chosen, j = set(), len(distinct)
    for start in reversed(starts):
        chosen.add(int(ends[j]))
        j = start[j]
    return np.array(sorted(chosen - {0}))


@dataclass(frozen=True)
class Batch:
    """Requests to run together, `index` into their list, all padded to `length` positions."""

    index: np.ndarray  # (batch_size,); only the first `num_counted` are results, others are filler
    num_counted: int
    length: int


def plan_batches(
    lengths: np.ndarray, *, batch_size: int, max_length: int, world_size: int = 1
) -> list[Batch]:
    """Cut requests with `lengths` inputs into equal batches of at most `NUM_SHAPES` shapes.

    The longest come first, so that an out-of-memory error does too. The number of batches is a
    multiple of `world_size`; what is missing is filled with rows that do not count. The batches
    that count do not depend on `world_size`.
    """
    order = np.argsort(-lengths, kind="stable")
    batch_size = min(batch_size, len(order))
    pieces = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    longest = np.array([lengths[piece[0]] for piece in pieces])
    longest = np.minimum(-(-longest // 8) * 8, max_length)  # 8: what tensor cores like
    buckets = bucket_lengths(longest, NUM_SHAPES)
    batches = [
        Batch(np.resize(piece, batch_size), len(piece), int(buckets[np.searchsorted(buckets, n)]))
        for piece, n in zip(pieces, longest, strict=True)
    ]
    missing = -len(batches) % world_size
    return batches + [Batch(batches[-1].index, 0, batches[-1].length)] * missing


def without_cache(model: torch.nn.Module) -> dict[str, Any]:
    """What to call the model with so that it builds no cache, which an evaluation has no use for.

    It would be gigabytes, and compiled blocks would specialize on which layer's part is theirs.
    """
    return {"use_cache": False} if takes(model, "use_cache") else {}


def takes(model: torch.nn.Module, argument: str) -> bool:
    """Whether `forward` of the model within its wrappers has this argument."""
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    return argument in signature(bare.forward).parameters


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; the model's mode is as before afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: FSDP and compiled graphs object to its tensors
            yield
    finally:
        model.train(was_training)


def loglikelihoods(
    model: torch.nn.Module,
    requests: Sequence[Request],
    *,
    max_length: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    reduce: Reduce | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_batch: Callable[[int], object] | None = None,
    trim_logits: bool = False,
) -> Scores | None:
    """Score every request; the same on every rank, whatever the batch and world size.

    Args:
        model: anything whose `model(input_ids=(B, T) int64).logits` is (B, T, V): plain, wrapped
            for DDP or FSDP, or compiled. One forward holds B * T * V logits.
        requests: each with 1 <= num_scored < len(ids) and num_scored <= max_length. A longer
            request loses context on its left, as in lm-evaluation-harness.
        max_length: positions the model has.
        rank, world_size: batches are dealt to the ranks in turn.
        reduce: sums a float64 tensor over the ranks; needed above one rank, called once.
        should_stop: polled before each batch; must answer alike on all ranks.
        on_batch: told the number of requests that each of this rank's batches finished.
        trim_logits: pass `logits_to_keep`, where `model.forward` has it, so that the head runs on
            the end of each row only. It adds shapes: leave it off for a compiled model.

    Returns:
        Scores, or None when `should_stop` said so.
    """
    if not requests:
        return Scores(np.zeros(0), np.zeros(0, dtype=bool), 0.0)
    lengths = np.array([min(len(request.ids) - 1, max_length) for request in requests])
    assert all(1 <= r.num_scored <= n for r, n in zip(requests, lengths, strict=True))
    batches = plan_batches(
        lengths, batch_size=batch_size, max_length=max_length, world_size=world_size
    )
    device = next(model.parameters()).device
    options = without_cache(model)
    found = torch.zeros(2, len(requests), dtype=torch.float64)  # log-likelihood, is greedy
    with evaluating(model):
        for batch in batches[rank::world_size]:
            if should_stop is not None and should_stop():
                return None
            rows = [requests[i] for i in batch.index]
            scored = _score_batch(model, rows, batch.length, device, trim_logits, options)
            found[:, batch.index[: batch.num_counted]] = scored[:, : batch.num_counted]
            if on_batch is not None:
                on_batch(batch.num_counted)
    if world_size > 1:
        assert reduce is not None, "several ranks need a reduce"
        found = reduce(found.to(device)).cpu()
    computed = sum(batch.length * len(batch.index) for batch in batches)
    log_likelihood, is_greedy = found.numpy()
    return Scores(log_likelihood, is_greedy > 0.5, 1 - float(lengths.sum()) / computed)


def _score_batch(
    model: torch.nn.Module,
    requests: Sequence[Request],
    length: int,
    device: torch.device,
    trim_logits: bool,
    options: dict[str, Any],
) -> torch.Tensor:
    """(2, B) float64: the log-likelihoods of a batch padded to `length`, and who is greedy.

    `options` go to the model.
    """
    inputs = torch.zeros(len(requests), length, dtype=torch.int64)
    targets = torch.zeros_like(inputs)
    scored = torch.zeros_like(inputs, dtype=torch.bool)
    for row, request in enumerate(requests):
        ids = torch.as_tensor(np.asarray(request.ids[-(length + 1) :], dtype=np.int64))
        end = len(ids) - 1
        inputs[row, :end], targets[row, :end] = ids[:-1], ids[1:]
        scored[row, end - request.num_scored : end] = True
    kept = length
    if trim_logits:  # in quarters, so that there are few shapes
        first = int(scored.any(dim=0).int().argmax())
        kept = -(-length * -(-4 * (length - first) // length) // 4)
    trim = {"logits_to_keep": kept} if kept < length else {}
    logits = model(input_ids=inputs.to(device), **options, **trim).logits
    targets, scored = targets[:, length - kept :], scored[:, length - kept :]
    rows, columns = scored.nonzero(as_tuple=True)
    # Only scored positions are turned to float32: log p(t) = logit(t) - logsumexp(logits).
    parts = []
    for at in torch.arange(len(rows)).split(POSITIONS_AT_ONCE):
        picked = logits[rows[at].to(device), columns[at].to(device)].float()
        target = targets[rows[at], columns[at]].to(device)
        log_p = picked.gather(1, target[:, None])[:, 0] - picked.logsumexp(dim=1)
        parts.append(torch.stack([log_p, (picked.argmax(dim=1) != target).float()]))
    log_p, wrong = torch.cat(parts, dim=1).cpu().double()
    sums = torch.zeros(2, len(requests), dtype=torch.float64)
    sums.index_add_(1, rows, torch.stack([log_p, wrong]))
    return torch.stack([sums[0], (sums[1] == 0).double()])
