"""A tokenizer by the name a user gives: of the Hub, of a directory, of the demo."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from gpt2repro import UserError
from gpt2repro.data import demo_corpus
from gpt2repro.data.tokens.encoder import PROBE_TEXT
from gpt2repro.system import patience
from gpt2repro.system.command_line import place
from gpt2repro.system.hub import is_hub_id, of_hub_or_cache

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")  # any one will do
_AS_TEXT = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}


def holds_tokenizer(directory: Path) -> bool:
    try:
        return any(any(directory.glob(file)) for file in TOKENIZER_FILES)
    except FileNotFoundError:  # it was removed just now
        return False


def load_tokenizer(
    name_or_directory: str | Path, *, if_unreachable: str = "", trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """A fast tokenizer from the Hub (or its cache), from a directory, or the demo's.

    Args:
        trust_remote_code: run code that comes with it. Unset, transformers would ask on standard
            input, where a prompt may answer.

    Raises:
        UserError: it is not there or cannot be read; names `tokenizer_name`.
    """
    try:
        name = place(str(name_or_directory))
    except ValueError as error:
        raise UserError(f"tokenizer_name: {error}") from None
    if demo := demo_corpus.built_in(name):
        name = str(demo / "tokenizer")
    where = f"load the tokenizer {name!r} (tokenizer_name)"
    directory = Path(name)
    tokenizer: Any
    if directory.is_dir() and not holds_tokenizer(directory):
        raise UserError(f"tokenizer_name: {name} holds no tokenizer ({', '.join(TOKENIZER_FILES)})")
    if not directory.is_dir() and not is_hub_id(name):
        raise UserError(f"tokenizer_name: {name} is neither a local directory nor a Hub name")
    try:
        if directory.is_dir():
            tokenizer = _read(name, trust_remote_code)
        else:
            tokenizer = patience.patiently(
                lambda: of_hub_or_cache(name, partial(_read, name, trust_remote_code)),
                where,
                if_unreachable=if_unreachable,
                reaches_hub=False,  # it may have come from the cache
            )
    except Exception as error:  # torn files raise what they like
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot {where}: {' '.join(str(error).split())[:300]}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer_name: {name!r} has no fast tokenizer")
    return tokenizer


def _read(name: str, trust: bool, offline: bool = False) -> Any:
    """As its tokenizer.json says, where a class of transformers' would encode otherwise.

    Some (GPT-2's, GPT-NeoX', Qwen's) take vocabulary and merges from the file and put their own
    model's normalizer and splitting of words in place of the file's: other ids, without a word.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(
        name, trust_remote_code=trust, local_files_only=offline
    )
    _refuse_paths(name)
    special = [added for added in tokenizer.added_tokens_decoder.values() if added.special]
    if len(tokenizer) - len(special) <= 1:  # what a class makes of no file; T5's has a space
        raise UserError(f"tokenizer_name: {name} holds no tokenizer")
    if not type(tokenizer).__module__.startswith("transformers.models."):
        return tokenizer  # the plain class already, or somebody's own
    try:  # its files are here by now
        plain = PreTrainedTokenizerFast.from_pretrained(
            name, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError):  # there is no tokenizer.json: what is there has been read
        return tokenizer
    # Where the settings ask for a space to begin with, only the class knows how to put it there.
    text = " " * ("add_prefix_space" in plain.init_kwargs) + PROBE_TEXT
    if tokenizer.encode(text, **_AS_TEXT) == plain.encode(text, **_AS_TEXT):
        return tokenizer
    for token in ("bos_token", "eos_token"):  # a class may know them where the files say nothing
        setattr(plain, token, getattr(plain, token) or getattr(tokenizer, token))
    return plain


def _refuse_paths(name: str) -> None:
    """Refuse settings that name a file, a private key perhaps: its lines would be the vocabulary.

    Classes of transformers open what these name. A `*_file` of tokenizer_config.json it does not
    follow; but whatever special_tokens_map.json says goes in after the files that it has found.
    """
    here = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    map_file = cached_file(name, "special_tokens_map.json", **here)
    tokens = json.loads(Path(map_file).read_text(encoding="utf-8")) if map_file else {}
    for settings in (get_tokenizer_config(name, local_files_only=True), tokens):
        for key, value in settings.items():
            is_file = key in ("vocab", "merges", "gguf_file") or (
                settings is tokens and key.endswith("_file")
            )
            if (is_file and isinstance(value, str)) or (key == "init_inputs" and value):
                raise UserError(f"tokenizer_name: {name}: its setting {key} may be any file")
