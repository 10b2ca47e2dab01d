"""The bulk encoder gives the Hugging Face tokenizer's own ids, only faster."""

import json
import time

import numpy as np
import pytest
from tiny_corpus import documents
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configuration_gpt2repro import LARGEST
from gpt2repro import UserError
from gpt2repro.data.tokens.bpe import byte_of_symbol, train_bpe
from gpt2repro.data.tokens.encoder import MOST_IDS, PROBE_TEXT, BulkEncoder

TEXTS = [*documents(200), PROBE_TEXT, "naïve 中文 😀 don't WE'LL 123 4567 \n\n\t x"] * 2


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    return train_bpe(TEXTS, 600)


def plain_ids(theirs, text: str) -> list[int]:
    """The tokenizer's own ids with special tokens taken as plain text."""
    backend = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


def test_bulk_encoder_gives_the_tokenizers_ids(theirs):
    encoder = BulkEncoder(theirs)
    assert encoder.uses_tiktoken
    assert encoder.eot_id == theirs.eos_token_id
    ours = encoder.encode(TEXTS)
    assert all(ids.dtype == np.uint16 for ids in ours)
    assert [ids.tolist() for ids in ours] == [plain_ids(theirs, text) for text in TEXTS]
    assert encoder.encode([""])[0].tolist() == []
    assert encoder.encode([]) == []


def test_every_character_is_encoded_alike(theirs):
    """All of Unicode's blocks by sample: the two regex engines agree on letters and spaces."""
    encoder = BulkEncoder(theirs)
    points = [*range(0x3000), *range(0x3000, 0xD800, 17), *range(0xE000, 0x110000, 97)]
    for begin in range(0, len(points), 500):
        text = "".join(f"a{chr(p)}1{chr(p)} {chr(p)}." for p in points[begin : begin + 500])
        assert encoder.encode([text])[0].tolist() == plain_ids(theirs, text)


def test_a_special_token_spelled_out_is_plain_text(theirs):
    encoder = BulkEncoder(theirs)
    [ids] = encoder.encode(["before <|endoftext|> after"])
    assert encoder.eot_id not in ids
    assert theirs.decode(ids) == "before <|endoftext|> after"


def bert_like() -> PreTrainedTokenizerFast:
    """A tokenizer of another kind: lower case, words, 70,000 ids."""
    words = ["<unk>", "</s>", *(f"w{number}" for number in range(69_998))]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(5)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_another_tokenizer_encodes_itself():
    encoder = BulkEncoder(bert_like())
    assert not encoder.uses_tiktoken
    assert encoder.dtype == np.uint32  # 70,000 ids do not fit 16 bits
    ours = encoder.encode(["W1 w69997 nothing", "", "w0 " * 20])
    assert [ids.tolist() for ids in ours] == [[3, 69_999, 0], [], [2] * 20]  # never truncated


def test_tokenizers_that_only_look_like_gpt2_encode_themselves(theirs):
    """Each differs in one thing that tiktoken's twin would get wrong."""
    description = json.loads(theirs.backend_tokenizer.to_str())

    def variant(**changes):
        model = description["model"] | changes.pop("model", {})
        text = json.dumps(description | changes | {"model": model})
        backend = Tokenizer.from_str(text)
        return BulkEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a"))

    byte_level = description["pre_tokenizer"]
    merges = description["model"]["merges"]
    assert variant().uses_tiktoken
    for changes in (
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": byte_level | {"add_prefix_space": True}},
        {"pre_tokenizer": byte_level | {"use_regex": False}},
        {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
        {"model": {"merges": [merges[-1], *merges[:-1]]}},
        {"model": {"ignore_merges": True}},
    ):
        assert not variant(**changes).uses_tiktoken, changes


def test_vocabulary_of_65536_ids_still_fits_16_bits():
    """The largest id is then 65,535."""
    vocab = {f"t{number}": number for number in range(65_535)} | {"</s>": 65_535}
    backend = Tokenizer(models.WordLevel(vocab, "t0"))
    backend.decoder = decoders.Fuse()
    full = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert BulkEncoder(full).dtype == np.uint16
    full.add_tokens(["one more"])
    assert BulkEncoder(full).dtype == np.uint32


def test_a_tokenizer_without_an_end_is_refused():
    backend = Tokenizer(models.WordLevel({"a": 0}, "a"))
    with pytest.raises(UserError, match=r"tokenizer_name: .*neither an eos nor a bos"):
        BulkEncoder(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.parametrize(
    "text",
    [
        "a" * 300_000,
        " " * 1_000_000 + "a",  # more than tiktoken takes
        "\n" * 300_000,
        "\0" * 300_000,
        "é" * 300_000,
        "abcdefghij" * 30_000,
        "!" * 300_000,
        "😀" * 100_000,
        "1234567890" * 30_000,
    ],
    ids=lambda text: repr(text[:4]),
)
def test_pathological_text_neither_crashes_nor_takes_for_ever(theirs, text):
    encoder = BulkEncoder(theirs)
    began = time.perf_counter()
    [ids] = encoder.encode([text])
    assert time.perf_counter() - began < 20  # linear: about 0.2 s; quadratic would take minutes
    assert theirs.decode(ids) == text


@pytest.mark.parametrize("make", [lambda: train_bpe(TEXTS, 300), bert_like], ids=["bpe", "words"])
def test_lone_surrogates_are_replaced(make):
    encoder = BulkEncoder(make())
    ours = encoder.encode(["w1 \ud800 w2", "plain \udfff"])
    theirs = encoder.encode(["w1 \ufffd\ufffd\ufffd w2", "plain \ufffd\ufffd\ufffd"])
    assert [ids.tolist() for ids in ours] == [ids.tolist() for ids in theirs]


def test_fingerprints_tell_tokenizers_apart(theirs):
    prints = {
        BulkEncoder(theirs).fingerprint,
        BulkEncoder(train_bpe(TEXTS, 599)).fingerprint,
        BulkEncoder(train_bpe(TEXTS[:50], 600)).fingerprint,
        BulkEncoder(bert_like()).fingerprint,
    }
    assert len(prints) == 4


def byte_level(merges: list[tuple[str, str]], **model) -> PreTrainedTokenizerFast:
    """The 256 bytes and these merges, then `words` that no merge makes, then an end."""
    words = model.pop("words", ())
    names = [*byte_of_symbol(), *map("".join, merges), *words, "<|endoftext|>"]
    vocab = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, **model))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def test_ids_that_only_another_merge_tells(theirs):
    """tiktoken would make "ezq" of "e" and "zq", and has no word that no merge makes."""
    for tokenizer, text in (
        (byte_level([("z", "q"), ("e", "z"), ("ez", "q")]), "ezq"),
        (byte_level([], words=["zebra"], ignore_merges=True), "zebra"),
    ):
        encoder = BulkEncoder(tokenizer)
        assert not encoder.uses_tiktoken
        assert encoder.encode([text])[0].tolist() == plain_ids(tokenizer, text)
    assert BulkEncoder(byte_level([("z", "q"), ("e", "zq")])).uses_tiktoken


def test_dropout_in_a_vocabulary_is_none_here():
    encoder = BulkEncoder(byte_level([("a", "b"), ("ab", "c")], dropout=0.5))
    assert [ids.tolist() for ids in encoder.encode(["abc"] * 20)] == [[257]] * 20


def unigram(scores: tuple[float, float] = (-1.0, -9.0), **parts) -> PreTrainedTokenizerFast:
    """Of "ab" the likeliest pieces are itself, or "a" and "b", as `scores` say."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("ab", scores[0]), ("a", scores[1]), ("b", -1.0)]
    backend = Tokenizer(models.Unigram([*pieces, *((c, -9.0) for c in "</s> ")], unk_id=0))
    for part, value in parts.items():
        setattr(backend, part, value)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_the_fingerprint_is_fixed_for_ever():
    """Checkpoints, caches and manifests have it: another one orphans them all."""
    assert BulkEncoder(byte_level([("a", "b")])).fingerprint == "c3666441a270e449fce07f3f08de438a"


def test_an_end_is_in_the_fingerprint():
    """Rows begin with it."""
    one, other = byte_level([("a", "b")]), byte_level([("a", "b")])
    other.eos_token = "ab"
    assert BulkEncoder(one).fingerprint != BulkEncoder(other).fingerprint


def test_what_no_probe_shows_is_in_the_fingerprint():
    https = normalizers.Replace("https://", "")
    different = (unigram(), unigram((-9.0, -1.0)), unigram(normalizer=https))
    assert len({BulkEncoder(each).fingerprint for each in different}) == 3
    assert BulkEncoder(unigram()).fingerprint == BulkEncoder(unigram()).fingerprint


def test_an_end_spelled_in_a_text_is_never_the_streams():
    """To a Unigram model it is a piece like any other; nor what is unknown, if it is the same."""
    [ids] = BulkEncoder(unigram()).encode(["ab</s>a"])
    assert ids.tolist() == [2, 3]
    both = unigram()
    both.eos_token = both.unk_token
    [ids] = BulkEncoder(both).encode(["ab?a"])
    assert ids.tolist() == [2, 3]


@pytest.mark.parametrize("make", [models.WordLevel, models.WordPiece])
def test_an_end_spelled_in_a_text_is_left_out_where_words_are_looked_up(make):
    """And only there: the tokenizer's fingerprint says so."""
    vocab = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "<s>": 4, ".": 5}
    backend = Tokenizer(make(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    def encoder(**ends: str) -> BulkEncoder:
        named = {"unk_token": "<unk>", **ends}
        return BulkEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, **named))

    text, both = ["a </s> b <s> what . a"], encoder(eos_token="</s>", bos_token="<s>")
    assert both.encode(text)[0].tolist() == [2, 3, 0, 5, 2]
    assert encoder(eos_token="</s>").encode(text)[0].tolist() == [2, 3, 4, 0, 5, 2]
    dot = encoder(eos_token=".")  # which a text has without meaning its end
    assert dot.encode(text)[0].tolist() == [2, 1, 3, 4, 0, 5, 2]
    assert both.fingerprint != encoder(eos_token="</s>").fingerprint


def test_a_line_end_that_ends_texts_too_stays_in_them():
    """As of a tokenizer by characters, whose end is one of them."""
    model = models.WordLevel({"a": 0, "\n": 1, "?": 2}, "?")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    by_characters = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="\n")
    encoder = BulkEncoder(by_characters)
    assert encoder.encode(["a\na"])[0].tolist() == [0, 1, 0]
    assert encoder.bytes_of_ids[0] == 1  # tokens without a decoder are no words of a sentence


def test_ids_that_no_model_can_have_are_refused():
    """A few tokens, of which one has an enormous id: a table of all ids would fill the memory."""
    assert LARGEST["vocab_size"] == MOST_IDS
    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": MOST_IDS}, unk_token="a"))
    with pytest.raises(UserError, match="tokenizer_name: it has 2,000,001 ids, "):
        BulkEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def test_bytes_of_ids_without_a_twin():
    """By the token's symbols: what "é" is made of decodes to no text."""
    tokenizer = byte_level([("Ã", "©")], words=["zebra"], ignore_merges=True)
    encoder, text = BulkEncoder(tokenizer), "é ü zebra"
    assert not encoder.uses_tiktoken
    [ids] = encoder.encode([text])
    assert encoder.bytes_of_ids[ids].sum() == len(text.encode())
    assert encoder.bytes_of_ids[encoder.eot_id] == 0


def test_bytes_of_ids_of_words_that_carry_their_space():
    """As SentencePiece spells them: a word alone decodes without it. And bytes of no word."""
    vocabulary = {"</s>": 0, "<unk>": 1, "▁a": 2, "▁the": 3, "s": 4, "▁": 5}
    vocabulary |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    spaces = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    backend.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)])
    encoder = BulkEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    text = "the a the é s"
    [ids] = encoder.encode([text])
    assert 1 not in ids and 6 + 0xC3 in ids
    assert encoder.bytes_of_ids[ids].sum() == len(f" {text}".encode())
    assert encoder.bytes_of_ids[encoder.eot_id] == 0
