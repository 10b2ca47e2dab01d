"""Open a GPT-2 by the name a user gives: a run, an export, a checkpoint, a directory, a Hub id."""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from gpt2repro import UserError
from gpt2repro.data.tokenizer import holds_tokenizer, load_tokenizer
from gpt2repro.records import checkpoints
from gpt2repro.records.integrity import is_whole
from gpt2repro.records.run_directory import finished_step, run_of, saved_recipe
from gpt2repro.system import atomic, ranks
from gpt2repro.system.hub import is_hub_id, of_hub_or_cache, refuse_pointers
from gpt2repro.system.patience import patiently
from gpt2repro.system.text import printable
from modeling_gpt2repro import GPT2ReproForCausalLM

OFFLINE_ADVICE = "; give a local directory, or run where the Hub answers"


def locate(name: str, option: str = "--model") -> str:
    """The directory that `name` means, or `name` itself if it can only be a Hub id.

    A run's directory means its `final/` or, before the run has ended (also once more, after it was
    made longer), its newest checkpoint; the run's `checkpoints/` always means the latter.

    Raises:
        UserError: neither a directory with a `config.json` nor spelled like a Hub id.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return _local(path)
    if path.is_dir():
        for candidate in _candidates(path):
            if (candidate / "config.json").is_file():
                return _local(candidate)
        if (path / "adapter_config.json").is_file():
            raise UserError(f"{option} {name}: an adapter: merge it into its model first, and save")
        raise UserError(f"{option} {name}: a directory without a config.json")
    if path.exists() or not is_hub_id(name):
        raise UserError(f"{option} {name}: no such directory, and no Hub id either")
    return name


def _local(path: Path) -> str:
    """`path` spelled like no Hub id: whoever removes it now must not make it one."""
    return str(path) if path.is_absolute() else f".{os.sep}{path}"


def _candidates(run: Path) -> Iterator[Path]:
    """What a run's directory may mean, the likeliest first: to look for a checkpoint reads it."""
    finished = finished_step(run)
    later = checkpoints.newer(run / "checkpoints", finished) if finished is not None else []
    if not any(map(is_whole, later)):
        yield run / "final"
    for place in (run / "checkpoints", run):
        newest, _ = checkpoints.find_latest(place)
        if newest is not None:
            yield newest
    yield run / "final"


def load_causal_lm(
    name: str,
    *,
    option: str = "--model",
    model_class: type[PreTrainedModel] = GPT2ReproForCausalLM,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model at `name` (see `locate`) on the CPU, in evaluation mode.

    Args:
        dtype: of the parameters; "auto" is the one they are stored in.

    Raises:
        UserError: not there, not reachable, not a GPT-2, or its tensors are not all there.
    """
    where = locate(name, option)
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # one bar for every file that is opened
    logging.set_verbosity_error()  # warnings about tensors, which are errors below

    def load(offline: bool) -> Any:
        return model_class.from_pretrained(
            where,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            local_files_only=offline,
        )

    try:
        read = _of_directory if Path(where).is_dir() else of_hub_or_cache
        loaded = patiently(
            lambda: read(where, load),
            f"load the model {where!r} ({option})",
            if_unreachable=OFFLINE_ADVICE,
            reaches_hub=False,
        )
    except Exception as error:  # safetensors, configuration and file errors have no common base
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{option} {name}: cannot be loaded: {reason}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
    model, info = loaded
    if lacking := sorted(info["missing_keys"]):  # transformers would have made them up
        raise UserError(f"{option} {name}: lacks {len(lacking)} tensors, among them {lacking[0]}")
    if (surplus := sorted(info["unexpected_keys"])) and ranks.rank() == 0:
        names = ", ".join(surplus[:3]) + (", ..." if len(surplus) > 3 else "")
        said = f"warning: {option} {name}: no part of a {type(model).__name__}, left out: {names}"
        print(printable(said), file=sys.stderr, flush=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False  # whatever its file says, as of merged adapters
    return model.eval()


def _of_directory(name: str, load: Callable[[bool], Any]) -> Any:
    """`load(False)` of what lies in the directory `name`, if all of it is of one model."""
    directory = Path(name)
    found = directory.stat()
    try:
        refuse_pointers(sorted(directory.glob("*.safetensors")))
        _refuse_weights_elsewhere(directory)
        return load(False)
    finally:
        if not directory.is_dir() or atomic.is_another(directory.stat(), found):
            raise UserError(f"{name} was removed or replaced while it was read: run this again")


def _refuse_weights_elsewhere(directory: Path) -> None:
    """Settings and indexes name files beside them; transformers would open any, anywhere."""
    for file in (directory / "config.json", *directory.glob("*.index.json")):
        said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        named = said if isinstance(said, dict) else {}
        weights = named.get("weight_map")
        names = [*weights.values()] if isinstance(weights, dict) else []
        for name in filter(None, [named.get("transformers_weights"), *names]):
            if Path(name).name != name:
                raise ValueError(f"{file.name} names {name}, which is not beside it")


def find_tokenizer(
    name: str, given: str | None = None, *, option: str = "--model", trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """The tokenizer `given`, or the one that goes with the model `name`.

    A training checkpoint holds none: its run's `final/` is looked at, then its recipe.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    load = functools.partial(
        load_tokenizer, if_unreachable=OFFLINE_ADVICE, trust_remote_code=trust_remote_code
    )
    if given:
        return load(given)
    where = locate(name, option)
    if not Path(where).is_dir():
        return load(where)
    run = run_of(Path(where))
    for directory in (Path(where), run / "final"):
        if holds_tokenizer(directory):
            return load(directory)
    if trained_with := saved_recipe(run).get("tokenizer_name"):
        return load(trained_with)
    raise UserError(f"{option} {name} holds no tokenizer; name one with --tokenizer")


def check_ids(ids: ArrayLike, model: PreTrainedModel) -> None:
    """Refuse what a model would look up beyond its embedding: on a GPU that ends the process.

    A tokenizer may have more ids than the model; what counts is what it gives.
    """
    size = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if (highest := np.max(ids, initial=0)) >= size:
        raise UserError(f"--tokenizer: it gives token {highest}, and the model has {size}")
