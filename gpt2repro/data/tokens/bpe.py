"""Byte-level BPE: GPT-2's byte alphabet, and the small tokenizer of the offline demo."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from gpt2repro import UserError

END_OF_TEXT = "<|endoftext|>"


def byte_of_symbol() -> dict[str, int]:
    """GPT-2's byte alphabet: printable bytes stand for themselves, the rest for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` ids, GPT-2's pre-tokenizer and `<|endoftext|>` included.

    Deterministic: the same texts in the same order give the same tokenizer. Texts with too few
    distinct pairs give fewer ids.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size: {vocab_size} ids cannot hold 256 bytes and {END_OF_TEXT}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_of_symbol()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]
    # GPT-2's own class, whose bos, eos and unk are all <|endoftext|>: every GPT-2 tool knows it.
    return GPT2Tokenizer(vocab=model["vocab"], merges=merges)
