"""A tokenizer by its name: of a directory, of the Hub, of the Hub's cache."""

import copy
import json

import pytest
from fake_hub import FakeHub, Fault, impatient
from huggingface_hub import constants, hf_hub_download
from tiny_corpus import documents
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from gpt2repro import UserError
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.bpe import train_bpe
from gpt2repro.data.tokens.encoder import BulkEncoder
from gpt2repro.system import patience


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    return train_bpe(documents(200), 600)


def test_a_directory_that_holds_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="tokenizer_name"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("torn", ["[" * 20_000, "{}", "", '{"version": "1.0"}', "\0"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_torn_file_is_one_line(theirs, tmp_path, file, torn):
    theirs.save_pretrained(tmp_path)
    (tmp_path / file).write_text(torn)
    if file == "tokenizer_config.json" and torn.startswith("{"):  # it says nothing
        assert load_tokenizer(tmp_path)("a").input_ids == theirs("a").input_ids
        return
    with pytest.raises(UserError, match="tokenizer_name"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("tokenizer_config.json", "vocab"),
        ("tokenizer_config.json", "init_inputs"),
        ("special_tokens_map.json", "vocab"),
        ("special_tokens_map.json", "vocab_file"),
    ],
)
def test_settings_that_would_make_any_file_a_vocabulary_are_refused(tmp_path, file, field):
    """Its lines would be in what is exported, and published."""
    key, directory = tmp_path / "id_ed25519", tmp_path / "theirs"
    directory.mkdir()
    key.write_text("-----BEGIN-----\nPRIVATE\n")
    (directory / "x.model").touch()
    settings = {"tokenizer_class": "BertTokenizer", "unk_token": "-----BEGIN-----"}
    value = [str(key)] if field == "init_inputs" else str(key)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / file).write_text(json.dumps(settings | {field: value}))
    assert "PRIVATE" in AutoTokenizer.from_pretrained(directory).get_vocab()  # theirs reads it
    with pytest.raises(UserError, match=f"its setting {field} may be any file"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    "name", ["GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"]
)
def test_the_file_says_how_words_are_split_and_not_the_class(theirs, tmp_path, name):
    backend = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    backend.normalizer = normalizers.NFKC()
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": name, "eos_token": theirs.eos_token}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text = "in 1984 \ufb01ve of 2023"
    loaded = load_tokenizer(tmp_path)
    assert loaded(text)["input_ids"] == backend.encode(text).ids
    assert BulkEncoder(loaded).encode([text])[0].tolist() == backend.encode(text).ids
    assert loaded.eos_token == theirs.eos_token


def test_an_end_that_only_the_class_knows_is_kept(theirs, tmp_path):
    backend = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_token == loaded.bos_token == "<|endoftext|>"


@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_a_space_that_nobody_asks_for_is_not_put_there(tmp_path, name):
    words = {"<unk>": 0, "</s>": 1, "a": 2, "▁a": 3, "b": 4, "▁b": 5, "▁": 6}
    merges = [("▁", "a"), ("▁", "b")]
    backend = Tokenizer(models.BPE(words, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": name, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path)("a b", add_special_tokens=False)["input_ids"] == [2, 5]


def test_a_space_that_the_settings_ask_for_is_put_there(theirs, tmp_path, caplog):
    theirs.save_pretrained(tmp_path)
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    settings |= {"eos_token": theirs.eos_token, "model_max_length": 9}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path)("a")["input_ids"] == theirs(" a")["input_ids"]
    assert not caplog.text  # that the probe would be too long for a model, say


def test_a_tokenizer_of_words_in_a_text_file_is_one(tmp_path):
    """BERT's, as its older models have it: no JSON but the settings."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    settings = {"tokenizer_class": "BertTokenizer", "bos_token": "[CLS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert [ids.tolist() for ids in BulkEncoder(tokenizer).encode(["a b"])] == [[5, 6]]


@pytest.fixture
def hub(monkeypatch, theirs, tmp_path):
    monkeypatch.setattr(patience, "FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(patience, "LONGEST_DELAY_SECONDS", 0.02)
    theirs.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with FakeHub() as hub:
        hub.add("models", "openai-community/gpt2", files | {"config.json": b"{}"})
        hub.use_in_process(monkeypatch)
        yield hub


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "qwen2", "bert", "t5"])
def test_a_model_without_a_tokenizer_has_none(hub, kind):
    """transformers makes one of the special tokens alone, and an epoch of it would be ends."""
    hub.add("models", "me/model", {"config.json": json.dumps({"model_type": kind}).encode()})
    with pytest.raises(UserError, match="me/model holds no tokenizer"):
        load_tokenizer("me/model")


def test_a_cache_that_has_the_model_alone_holds_no_tokenizer(hub, monkeypatch):
    hub.add("models", "me/model", {"config.json": b'{"model_type": "gpt2"}'})
    hf_hub_download("me/model", "config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        load_tokenizer("me/model")


@pytest.mark.parametrize(
    ("status", "file"),
    [(429, "tokenizer.json"), (503, "tokenizer_config.json"), (503, "config.json")],
)
def test_a_file_that_cannot_be_had_now_is_not_one_that_does_not_exist(
    hub, theirs, monkeypatch, status, file
):
    """The client gives up after six answers, and transformers would go on without the file."""
    impatient(monkeypatch)
    fault = Fault(f"status:{status}", file, "GET|HEAD", times=20)
    hub.faults.append(fault)
    loaded = load_tokenizer("openai-community/gpt2")
    assert fault.num_hits == 20
    assert BulkEncoder(loaded).fingerprint == BulkEncoder(theirs).fingerprint


def test_who_else_asks_the_hub_has_the_clients_own_answers(hub, monkeypatch):
    """The client is the whole process's: a Trainer that pushes, a script that downloads."""
    load_tokenizer("openai-community/gpt2")
    impatient(monkeypatch)
    path = hf_hub_download("openai-community/gpt2", "config.json")
    hub.faults.append(Fault("status:429", "config.json", "GET|HEAD", times=3, retry_after="1"))
    assert hf_hub_download("openai-community/gpt2", "config.json") == path
    hub.faults.append(Fault("status:503", "config.json", "GET|HEAD", times=10**9))
    assert hf_hub_download("openai-community/gpt2", "config.json") == path, "from the cache"


def test_loading_from_the_hub_and_then_from_its_cache(hub, theirs, monkeypatch, caplog):
    hub.faults.append(Fault("status:503", "api/models", times=8))
    first = load_tokenizer("openai-community/gpt2")
    assert isinstance(first, GPT2Tokenizer)
    assert BulkEncoder(first).fingerprint == BulkEncoder(theirs).fingerprint
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    offline = load_tokenizer("openai-community/gpt2")
    assert BulkEncoder(offline).fingerprint == BulkEncoder(theirs).fingerprint
    assert "openai-community/gpt2: the Hub cannot be reached, so it is as it was" in caplog.text


def test_a_hub_that_answers_is_waited_for_and_no_older_copy_is_taken(hub, theirs, tmp_path):
    load_tokenizer("openai-community/gpt2")
    newer = copy.deepcopy(theirs)  # all tests share it
    newer.add_tokens(["of late"])
    newer.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    hub.add("models", "openai-community/gpt2", files | {"config.json": b"{}"})
    hub.faults.append(Fault("status:503", "api/models"))
    assert len(load_tokenizer("openai-community/gpt2")) == len(theirs) + 1


@pytest.mark.parametrize("file", ["tokenizer.json", "added_tokens.json"])
@pytest.mark.parametrize("answer", ["status:403", "status:451", "answer", "reset"])
def test_a_file_that_is_refused_is_not_one_that_does_not_exist(
    hub, theirs, tmp_path, file, answer, monkeypatch
):
    """By a proxy's filter or login page. transformers would go on with the other files."""
    impatient(monkeypatch)
    bpe = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    files = {
        "config.json": b'{"model_type": "gpt2"}',
        "vocab.json": json.dumps(bpe["vocab"]).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *pairs]).encode(),
        "added_tokens.json": json.dumps({"wh": len(bpe["vocab"])}).encode(),
    }
    if file == "tokenizer.json":
        files[file] = (tmp_path / file).read_bytes()
    hub.add("models", "me/older", files)
    for name, content in files.items():
        (place := tmp_path / "older" / name).parent.mkdir(exist_ok=True)
        place.write_bytes(content)
    expected = BulkEncoder(load_tokenizer(tmp_path / "older")).fingerprint
    fault = Fault(answer, file, "HEAD", answer=(200, b"<html>Sign in</html>"))
    hub.faults.append(fault)
    assert BulkEncoder(load_tokenizer("me/older")).fingerprint == expected
    assert fault.num_hits == 1


def test_a_file_that_is_refused_time_and_again_is_told(hub, monkeypatch):
    impatient(monkeypatch)
    hub.faults.append(Fault("status:403", "tokenizer.json", "HEAD", times=10**9))
    with pytest.raises(UserError, match=r"cannot load the tokenizer .*/tokenizer.json: HTTP 403"):
        load_tokenizer("openai-community/gpt2")


def test_a_name_that_does_not_exist_is_refused_at_once(hub):
    with pytest.raises(UserError, match=r"the tokenizer 'a/b' \(tokenizer_name\).*(404|401)"):
        load_tokenizer("a/b")


def test_a_machine_without_a_network_is_told_so(hub, monkeypatch):
    monkeypatch.setattr(patience, "OFFLINE_AFTER_SECONDS", 0.2)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"tokenizer_name\): the Hub cannot be reached .*; try demo"
    ):
        load_tokenizer("nobody/nothing", if_unreachable="; try demo")


@pytest.mark.parametrize("place", ["directory", "hub"])
def test_nobody_is_asked_whether_foreign_code_may_run(hub, theirs, tmp_path, monkeypatch, place):
    """A prompt that begins with a y, read from standard input, would say yes."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    theirs.save_pretrained(tmp_path / "foreign")
    settings = {"auto_map": {"AutoTokenizer": [None, "evil.T"]}, "tokenizer_class": "T"}
    (tmp_path / "foreign" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "foreign" / "evil.py").write_text("raise SystemExit('it ran')")
    name = str(tmp_path / "foreign")
    if place == "hub":
        name = "some/body"
        files = {path.name: path.read_bytes() for path in (tmp_path / "foreign").iterdir()}
        hub.add("models", name, files)
    with pytest.raises(UserError, match="contains custom code"):
        load_tokenizer(name)
