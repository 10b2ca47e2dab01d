"""What a model writes: greedy continuations of prompts, for the benchmarks that read them.

prompts -> sorted by lengths, cut into batches, dealt to the ranks -> `generate` -> token ids
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from gpt2repro.evaluation.likelihoods import Reduce, evaluating
from gpt2repro.speed.attention import for_generation


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to continue by at most `num_new` more; `is_over` says of those so far if it is."""

    ids: Sequence[int]
    num_new: int
    is_over: Callable[[list[int]], bool]


class _Over(StoppingCriteria):
    """Ends the rows of a batch one by one, and remembers after how many new ids each was over.

    What follows in a row while others are still being written is none of it.
    """

    def __init__(self, prompts: Sequence[Prompt], begin: int, ends: Collection[int]) -> None:
        """`ends`: ids at which `generate` itself ends a row."""
        self.prompts, self.begin, self.ends = prompts, begin, ends
        self.lengths: list[int | None] = [None] * len(prompts)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        for row, new in enumerate(input_ids[:, self.begin :].tolist()):
            prompt = self.prompts[row]
            if self.lengths[row] is None and (
                new[-1] in self.ends or len(new) >= prompt.num_new or prompt.is_over(new)
            ):
                self.lengths[row] = len(new)
        over = [length is not None for length in self.lengths]
        return torch.tensor(over, device=input_ids.device)


def continuations(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    reduce: Reduce | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> list[list[int]] | None:
    """The new ids of every prompt, the same on every rank; None when `should_stop` said so.

    `model` has transformers' `generate`, within its wrappers; compiled code is left alone, since
    every token is another length. The arguments are those of `loglikelihoods`.
    """
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].num_new, len(prompts[i].ids)))
    batches: list[tuple[list[int], bool]] = []  # and whether it counts
    # Of one number of new tokens: a prompt that asks for few may leave no room for more. All ranks
    # are at the same number, equally often: of a sharded model, one that is done goes on as long as
    # another writes.
    for _, alike in groupby(order, key=lambda i: prompts[i].num_new):
        same = list(alike)
        batches += [(same[i : i + batch_size], True) for i in range(0, len(same), batch_size)]
        batches += [(same[:1], False)] * (-len(batches) % world_size)
    most = max(prompt.num_new for prompt in prompts)
    found = torch.zeros(len(prompts), most, dtype=torch.float64)  # ids + 1; 0 is none
    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    eager: AbstractContextManager = torch.compiler.set_stance("force_eager")
    with evaluating(model), eager, for_generation(), _plainly(inner):
        for batch, counts in batches[rank::world_size]:
            if should_stop is not None and should_stop():
                return None
            written = _greedy(inner, [prompts[i] for i in batch])
            counted = batch if counts else []
            for i, new in zip(counted, written, strict=False):
                found[i, : len(new)] = torch.tensor(new, dtype=torch.float64) + 1
            if on_batch is not None:
                on_batch(len(counted))
    if world_size > 1:
        assert reduce is not None, "several ranks need a reduce"
        found = reduce(found.to(next(inner.parameters()).device)).cpu()
    return [[int(id) - 1 for id in row if id] for row in found.tolist()]


@contextmanager
def _plainly(inner: Any) -> Iterator[None]:
    """Of a model's own settings for `generate`, which fill in what a call leaves open, the ends."""
    own = inner.generation_config
    inner.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        yield
    finally:
        inner.generation_config = own


def _greedy(inner: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    device = next(inner.parameters()).device
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[longest - len(prompt.ids) :] = torch.as_tensor(prompt.ids)
    ends = torch.arange(longest, 0, -1)
    mask = ends[None, :] <= torch.tensor([len(prompt.ids) for prompt in prompts])[:, None]
    told: Any = inner.generation_config.eos_token_id
    over = _Over(prompts, longest, told if isinstance(told, list) else [told])
    written = inner.generate(
        ids.to(device),
        attention_mask=mask.long().to(device),
        do_sample=False,
        max_new_tokens=max(prompt.num_new for prompt in prompts),
        stopping_criteria=StoppingCriteriaList([over]),
        pad_token_id=0,
        synced_gpus=isinstance(inner, FSDPModule),
    )
    new = written[:, longest:].tolist()
    return [row[:length] for row, length in zip(new, over.lengths, strict=True)]
