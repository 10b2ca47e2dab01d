"""Controls: the questions of a task, asked after something that should not help.

What a model scores without the right context is not comprehension. Only contexts change, the scored
tokens are the task's own; so every kind of task can be controlled.
"""

import copy
from collections.abc import Sequence

import numpy as np

from gpt2repro.evaluation.likelihoods import Request
from gpt2repro.evaluation.task import Task, TaskGroup

SHUFFLED, OTHER, NONE = KINDS = ("shuffled_context", "other_context", "no_context")
SEED = 0


def control(task: Task, kind: str, begin_id: int) -> Task | None:
    """`task` with contexts of one of the KINDS; None where it has nothing to control.

    A row whose first request has no context (a whole text) is left out, and so is what the model is
    to write. Requests of a row that had one context between them still do.
    """
    if isinstance(task, TaskGroup):
        members = [control(each, kind, begin_id) for each in task.members]
        return None if None in members else task.of([each for each in members if each])
    if task.prompts:
        return None
    split = [[_split(r, task.max_length) for r in task.requests[at]] for at in task.slices]
    chosen = [row for row, own in enumerate(split) if own and len(own[0][0]) > 1]
    if len(chosen) < (2 if kind == OTHER else 1):
        return None
    made, rng = copy.copy(task), np.random.default_rng(SEED)
    ring = rng.permutation(chosen)
    donor = dict(zip(ring.tolist(), np.roll(ring, 1).tolist(), strict=True))
    made.rows, made.examples = [task.rows[i] for i in chosen], [task.examples[i] for i in chosen]
    made.requests, made.slices = [], []
    for row in chosen:
        contexts = [context for context, _ in split[row]]
        if kind == SHUFFLED:
            contexts = _shuffled(contexts, begin_id, rng)
        elif kind == OTHER:
            theirs, _ = _distinct([context for context, _ in split[donor[row]] if len(context) > 1])
            contexts = [theirs[i % len(theirs)] for i in _distinct(contexts)[1]]
        else:
            contexts = [np.array([begin_id])] * len(contexts)
        begin = len(made.requests)
        for new, (old, scored) in zip(contexts, split[row], strict=True):
            ids = np.concatenate([new if len(old) > 1 else old, scored]).astype(np.int32)
            made.requests.append(Request(ids, len(scored)))
        made.slices.append(slice(begin, len(made.requests)))
    return made


def _split(request: Request, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The context that a model of `max_length` positions sees, and what is scored after it."""
    ids = np.asarray(request.ids)[-(max_length + 1) :]
    return ids[: -request.num_scored], ids[-request.num_scored :]


def _distinct(contexts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[int]]:
    """The contexts that are not the end of another (cut on its left), and which of them each is."""
    found: list[np.ndarray] = []
    for context in sorted(contexts, key=len, reverse=True):
        if not any(_ends(one, context) for one in found):
            found.append(context)
    return found, [next(i for i, one in enumerate(found) if _ends(one, each)) for each in contexts]


def _ends(whole: np.ndarray, end: np.ndarray) -> bool:
    return np.array_equal(whole[len(whole) - len(end) :], end)


def _shuffled(
    contexts: Sequence[np.ndarray], begin_id: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """All in one order, counted from their ends; a begin token stays in front."""
    places = rng.random(max(map(len, contexts)))
    shuffled = []
    for context in contexts:
        begins = int(context[0] == begin_id)
        order = np.argsort(places[len(places) - len(context) + begins :])
        shuffled.append(np.concatenate([context[:begins], context[begins:][order]]))
    return shuffled
