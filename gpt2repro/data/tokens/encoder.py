"""Texts to token ids in bulk.

A GPT-2 style byte-level BPE is encoded by tiktoken, built from the Hugging Face tokenizer's own
vocabulary and merges: the same ids at several times the speed. Every other tokenizer encodes
itself. Special tokens spelled out in a document ("<|endoftext|>" in a text about GPT-2) are plain
text, or left out where a tokenizer knows no other way to spell them: only the stream puts the real
one between documents.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from gpt2repro import UserError
from gpt2repro.data.tokens.bpe import END_OF_TEXT, byte_of_symbol
from gpt2repro.data.tokens.token_ids import begin_id, num_ids, well_formed

# Radford et al. 2019's pre-tokenizer in tiktoken's possessive spelling, which never backtracks into
# a run of letters: the same pieces, faster.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# What a wrong vocabulary, pattern or normalizer would get wrong: contractions, digits, runs of
# whitespace, every byte, scripts, combining marks, symbols beyond the BMP, a spelled special token.
PROBE_TEXT = (
    "Hello world's  don't WE'LL I've 'tis\n\n\t  x1234567890 ½ ٣ Ⅷ !?... (a+b)^2 == c_d; \r\n"
    "naïve cafe\u0301 Straße ΑΒΓ ДОМ 中文字符 日本語 한국어 हिन्दी עברית العربية ไทย "
    "😀👩‍👩‍👧 𝔘𝔫𝔦 \u00a0\u2003\u3000\u200b\ufeff\x00\x1c\x85 " + END_OF_TEXT + " end   \n  "
    + "".join(map(chr, range(256)))
)  # fmt: skip


MOST_IDS = 2 * 10**6  # that a model's configuration takes
# How a vocabulary of words spells a byte that belongs to none of them.
SPELLED_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class BulkEncoder:
    """Texts to token ids, without special tokens; thread-safe, and it releases the GIL.

    Attributes:
        eot_id: the id that the stream puts before every document.
        dtype: uint16, or uint32 for a vocabulary above 65,536 ids.
        fingerprint: a hash of what the encoder does; equal fingerprints give equal ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.eot_id, self._num_ids = begin_id(tokenizer), num_ids(tokenizer)
        if self._num_ids > MOST_IDS:  # of a few tokens, perhaps: what counts is the highest
            raise UserError(f"tokenizer_name: it has {self._num_ids:,} ids, a model {MOST_IDS:,}")
        self.dtype = np.dtype(np.uint16 if self._num_ids <= 2**16 else np.uint32)
        self._fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._fast.no_padding()
        self._fast.no_truncation()
        self._fast.encode_special_tokens = True  # as plain text
        if getattr(self._fast.model, "dropout", None):
            self._fast.model.dropout = None  # ids drawn at random are no stream to come back to
        self._tiktoken = _as_tiktoken(self._fast)
        self._left_out = np.zeros(0, self.dtype)  # of what is encoded
        if self._tiktoken is None:
            self._left_out = np.array(sorted(self._spelled_ends(tokenizer)), self.dtype)
        self.fingerprint = self._hash(tokenizer)

    @property
    def uses_tiktoken(self) -> bool:
        return self._tiktoken is not None

    @cached_property
    def bytes_of_ids(self) -> np.ndarray:
        """(num_ids,) int64: the bytes of text that each id stands for; 0 for special tokens.

        Exact for a byte-level BPE. Of others, what an id adds to another one that is decoded before
        it: alone, a word that carries its space would lose it. (A text's first word may carry one
        that the text has not.)
        """
        description = json.loads(self._fast.to_str())
        vocabulary = self._fast.get_vocab(with_added_tokens=False)
        ordinary = {id: token for token, id in vocabulary.items()}
        for added in description["added_tokens"]:
            ordinary.pop(added["id"], None)
        # Without a decoder tokens are told apart by spaces that no text has.
        before = [min(ordinary, default=0)] if description["decoder"] else []
        texts = self._fast.decode_batch([[*before, id] for id in range(self._num_ids)])
        lengths = np.array([len(text.encode()) for text in texts])
        lengths = (lengths - len(self._fast.decode(before).encode())).clip(min=0)
        is_byte_level = (description["decoder"] or {}).get("type") == "ByteLevel"
        for id, token in ordinary.items():
            if is_byte_level:
                lengths[id] = len(token)  # a symbol for each byte
            elif SPELLED_BYTE.fullmatch(token):
                lengths[id] = 1
        return lengths

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array (num_tokens,) of `dtype` for each text; lone surrogates become U+FFFD."""
        if self._tiktoken is None:
            texts = [well_formed(text) for text in texts]
            encodings = self._fast.encode_batch(texts, add_special_tokens=False)
            found = [np.asarray(encoding.ids, dtype=self.dtype) for encoding in encodings]
            if len(self._left_out):
                found = [ids[~np.isin(ids, self._left_out)] for ids in found]
            return found
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> np.ndarray:
        assert self._tiktoken is not None
        ids: np.ndarray | list[int]
        try:
            ids = self._tiktoken.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self._encode_one(well_formed(text))
        except ValueError:  # tiktoken's regex runs out of stack on megabytes of whitespace
            ids = self._fast.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, dtype=self.dtype)

    def _spelled_ends(self, tokenizer: PreTrainedTokenizerFast) -> set[int]:
        """Begin and end of a text, where a text that spells them would become them.

        To a model that looks words up (WordLevel, WordPiece, Unigram, a BPE that ignores its
        merges) "</s>" is a word of the vocabulary. A single character is text all the same: to a
        tokenizer by characters, which ends a text with one of them.
        """
        found = {self.eot_id} if isinstance(self._fast.model, Unigram) else set()
        for id in {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}:
            word = str(tokenizer.convert_ids_to_tokens(id))
            texts = [word, f"a {word} b"] if len(word) > 1 else []
            encoded = self._fast.encode_batch(texts, add_special_tokens=False)
            found |= {id for each in encoded if id in each.ids}
        return found

    def _hash(self, tokenizer: PreTrainedTokenizerFast) -> str:
        """Vocabulary, merges and behaviour on the probe: independent of any file's spelling.

        Of what is no GPT-2 style BPE no probe would tell all, so its description counts as well.
        """
        description = json.loads(self._fast.to_str())
        content = [
            sorted(tokenizer.get_vocab().items()),
            description["model"].get("merges"),
            self._fast.encode(PROBE_TEXT, add_special_tokens=False).ids,
            self.eot_id,
        ]
        if self._tiktoken is None:
            parts = ("model", "normalizer", "pre_tokenizer")
            content += [_said(description[part]) for part in parts]
            content += [self._left_out.tolist()] if len(self._left_out) else []
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _said(description: Any) -> Any:
    """A part of a tokenizer's description without what is off: a later version names more."""
    if not isinstance(description, dict):
        return description
    return {
        key: _said(value)
        for key, value in description.items()
        if value or type(value) in (int, float)  # of which 0 says something
    }


def _as_tiktoken(fast: Tokenizer) -> tiktoken.Encoding | None:
    """tiktoken's twin of a GPT-2 style byte-level BPE; None if it is no such tokenizer.

    tiktoken merges by the rank of the result, so ids must grow along the list of merges, and a
    token must come of its own text by these merges, for tiktoken would make it of any others too.
    Whatever this reading of the description misses, ids that differ on the probe text tell.
    """
    description = json.loads(fast.to_str())
    model, pre = description["model"], description["pre_tokenizer"] or {}
    plain = (
        model["type"] == "BPE"
        and not any(
            model.get(knob)
            for knob in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        )
        and pre.get("type") == "ByteLevel"
        and not pre.get("add_prefix_space")
        and pre.get("use_regex", True)
        and description["normalizer"] is None
        and all(token["special"] for token in description["added_tokens"])
    )
    if not plain:
        return None
    ranks = _ranks(model["vocab"], model["merges"])
    if ranks is None:
        return None
    # One special token, never allowed: without any, tiktoken looks for "" at every character.
    twin = tiktoken.Encoding(
        "gpt2repro",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: max(ranks.values()) + 1},
    )
    probes = [PROBE_TEXT, *(text for token in ranks if "\ufffd" not in (text := _text(token)))]
    theirs = [each.ids for each in fast.encode_batch(probes, add_special_tokens=False)]
    return twin if [twin.encode_ordinary(text) for text in probes] == theirs else None


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")


def _ranks(vocab: dict[str, int], merges: list) -> dict[bytes, int] | None:
    """Bytes -> id for the 256 bytes and every merge; None if tiktoken would merge differently."""
    symbols = byte_of_symbol()
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    names = [*symbols, *("".join(pair) for pair in pairs)]
    if any(name not in vocab for name in names):
        return None
    merged_ids = [vocab[name] for name in names[256:]]
    if any(later <= earlier for earlier, later in pairwise(merged_ids)):
        return None
    return {bytes(symbols[symbol] for symbol in name): vocab[name] for name in names}
