"""The demo's small tokenizer is a GPT-2 tokenizer, and always the same."""

import pytest
from tiny_corpus import documents
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gpt2repro import UserError
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.bpe import train_bpe
from gpt2repro.data.tokens.encoder import PROBE_TEXT, BulkEncoder

TEXTS = [*documents(200), PROBE_TEXT, "naïve 中文 😀 don't WE'LL 123 4567 \n\n\t x"] * 2


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    return train_bpe(TEXTS, 600)


def test_trained_bpe_is_a_gpt2_tokenizer(theirs):
    assert isinstance(theirs, PreTrainedTokenizerFast)
    assert len(theirs) == 600
    end = theirs.convert_tokens_to_ids("<|endoftext|>")
    assert end == theirs.eos_token_id == theirs.bos_token_id == theirs.unk_token_id
    for text in TEXTS[-2:]:
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs("a<|endoftext|>b")["input_ids"].count(end) == 1


def test_training_is_deterministic_and_survives_saving(theirs, tmp_path):
    again = train_bpe(iter(TEXTS), 600)
    assert BulkEncoder(again).fingerprint == BulkEncoder(theirs).fingerprint
    theirs.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert BulkEncoder(loaded).fingerprint == BulkEncoder(theirs).fingerprint
        assert [loaded(text)["input_ids"] for text in TEXTS[-3:]] == [
            theirs(text)["input_ids"] for text in TEXTS[-3:]
        ]


def test_a_vocabulary_too_small_for_bytes_is_refused():
    assert len(train_bpe(TEXTS, 257)) == 257
    with pytest.raises(UserError, match="vocab_size: 256"):
        train_bpe(TEXTS, 256)
