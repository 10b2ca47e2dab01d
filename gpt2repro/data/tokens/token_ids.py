"""How a text begins and ends in token ids, and how many ids there are: one answer for all rooms.

Tokenizers differ in it: some have a token of their own for a beginning, some put tokens around
every text, the ids of some have gaps.
"""

from collections.abc import Sequence
from typing import Any

from gpt2repro import UserError


def begin_id(tokenizer: Any) -> int:
    """The id before a text: bos, else eos, which in GPT-2 ends one text and begins the next.

    The stream puts it before every document, an empty prompt is this id, and a text is scored after
    it, as in lm-evaluation-harness.

    Raises:
        UserError: the tokenizer has neither; names `tokenizer_name`.
    """
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token is None:
        raise UserError(
            "tokenizer_name: the tokenizer (in a command, --tokenizer) has neither an eos nor a "
            "bos token to put before a text"
        )
    return int(token)


def end_ids(tokenizer: Any) -> list[int]:
    """The ids after which a text is over: eos, and what begins the next one. Empty without both."""
    ids = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    return list(dict.fromkeys(id for id in ids if id is not None))


def num_ids(tokenizer: Any) -> int:
    """The highest id plus one: rows of an embedding. `len` counts tokens, and ids may have gaps."""
    return 1 + max(tokenizer.get_vocab().values())


def ids_to_continue(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Each text as a model is given it to go on from: never empty, and never ended.

    What the tokenizer puts before a text stays, unless the text has it; what it puts after it, as
    T5's does, goes. An empty text is `begin_id`. Lone surrogates become U+FFFD.
    """
    encoded = tokenizer(
        [well_formed(text) for text in texts], return_special_tokens_mask=True, verbose=False
    )
    rows = []
    for ids, added in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        end = max((at + 1 for at, special in enumerate(added) if not special), default=0)
        doubled = int(added[:1] == [1] and ids[:1] == ids[1:2])
        rows.append(ids[doubled:end] or [begin_id(tokenizer)])
    return rows


def well_formed(text: str) -> str:
    """`text` without lone surrogates, which no UTF-8 encoder accepts."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
