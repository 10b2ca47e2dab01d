"""The publishable directory: written beside its place, verified by a fresh process, then renamed.

Two forms of the same tensors under the same names. `gpt2repro`, the native one, carries both model
files as remote code. `gpt2` has a stock configuration instead, for tools that run no remote code.
"""

import copy
import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    GenerationConfig,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro import UserError
from gpt2repro.data.tokens.token_ids import end_ids
from gpt2repro.publishing.card import completed, model_card, with_provenance
from gpt2repro.publishing.contents import (
    CLASSES,
    INDEX,
    SHIPPED_CODE,
    not_exported,
    read_json,
    refuse_link,
    write_sums,
)
from gpt2repro.publishing.verification import Verification, expected_tensors, verify
from gpt2repro.records import integrity, provenance
from gpt2repro.records.provenance import Record
from gpt2repro.system import atomic
from gpt2repro.system.atomic import sha256
from gpt2repro.system.text import printable

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
MAX_SHARD_SIZE = "5GB"  # a broken upload costs one shard again


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    output: Path,
    *,
    format: str = "gpt2repro",
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    card: str | None = None,
    figures: Iterable[Path] = (),
    record: Record | None = None,
) -> Verification:
    """Write `model` and `tokenizer` to the directory `output`, verified.

    An earlier export there is replaced.

    Args:
        model: a `GPT2ReproForCausalLM` with whole weights on the CPU. It is not changed.
        format: `gpt2repro` (with code, for `trust_remote_code=True`) or `gpt2` (stock).
        dtype: of the stored tensors; None keeps the model's.
        max_shard_size: bytes, or text such as "500MB"; larger models are split into several files.
        card: README.md, whose sections on loading and verification are written here; None writes a
            short one.
        figures: files to put beside the card, pictures or LICENSE; where there is none, left out.
        record: where the model comes from, whose hashes of weights are those written here.

    Raises:
        UserError: when `output` is not an export, a figure is a symbolic link, the disk is full, or
            a check failed. Then nothing at `output` has changed, and what failed a check is kept as
            `<output>.rejected`.
    """
    figures = [figure for figure in figures if figure.is_file()]
    for figure in figures:
        refuse_link(figure)
    _refuse_to_overwrite(output)
    dtype = dtype or model.dtype
    try:
        with atomic.own_partial(output) as scratch:
            _write_weights(model, scratch, dtype, max_shard_size)
            for figure in figures:
                shutil.copy(figure, scratch / figure.name)
            record = _write_rest(
                model.config, tokenizer, scratch, format, dtype, record, model.generation_config
            )
            verification = _verified(scratch, output, model, tokenizer)
            text = completed(
                with_provenance(card or model_card(name=output.resolve().name), record),
                where=str(output),
                format=format,
                verification=verification.lines(),
            )
            (scratch / "README.md").write_text(printable(text), encoding="utf-8")
            _refuse_to_overwrite(output)  # what has been put there in the meantime
            atomic.move_into_place(scratch, output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output} could not be written: {error}") from None
    return verification


def stage(
    checkpoint: Path,
    output: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    format: str,
    card: str,
    record: Record | None,
) -> None:
    """Write to the new directory `output` what `export` would of a checkpoint, with its weights.

    They are the very file, and nothing is loaded: made beside a training, it costs it nothing.

    Raises:
        UserError: the file is not the one that `record` knows.
    """
    output.mkdir()
    atomic.link(checkpoint / integrity.WEIGHTS, output / integrity.WEIGHTS)
    config = GPT2ReproConfig.from_json_file(checkpoint / "config.json")
    if _write_rest(config, tokenizer, output, format, torch.float32, record) != record:
        raise UserError(f"{integrity.WEIGHTS} was changed or damaged after it was saved")
    text = completed(
        with_provenance(card, record),
        where=str(checkpoint),
        format=format,
        verification=["`model.safetensors` is, byte for byte, the file that training saved"],
    )
    (output / "README.md").write_text(printable(text), encoding="utf-8")


def _write_rest(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    format: str,
    dtype: torch.dtype,
    record: Record | None,
    generation: GenerationConfig | None = None,
) -> Record | None:
    """All but weights and card; returns the record, with the hashes of the weights there."""
    _write_configs(config, tokenizer, directory, format, dtype)
    _write_generation_config(generation, tokenizer, directory)
    _write_tokenizer(tokenizer, directory, config.n_positions, plain_files=format == "gpt2")
    if record:
        weights = {path.name: sha256(path) for path in sorted(directory.glob("*.safetensors"))}
        record = record.model_copy(update={"weights": weights})
        (directory / provenance.FILE).write_bytes(record.content())
    write_sums(directory)
    return record


def _refuse_to_overwrite(output: Path) -> None:
    """Only an earlier export or an empty directory may be replaced."""
    if output.is_symlink():
        raise UserError(f"--output {output} is a symbolic link; give a directory")
    if output.is_dir():
        if foreign := not_exported(output):
            raise UserError(
                f"--output {output} holds something else than an export, {foreign}; "
                "give another directory"
            )
    elif output.exists():
        raise UserError(f"--output {output} is a file; give a directory")


def _verified(
    scratch: Path, output: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> Verification:
    """Verify what was written; what fails a check is kept as `<output>.rejected`."""
    try:
        return verify(scratch, model, tokenizer)
    except UserError as error:
        rejected = _place_for_rejected(output.absolute())
        atomic.remove(rejected)
        scratch.rename(rejected)
        reason = str(error).replace(str(scratch), "the export")
        raise UserError(f"{output} was not written: {reason}. It is kept as {rejected}") from None


def _place_for_rejected(output: Path) -> Path:
    """`<output>.rejected`, or `<output>.rejected.2` and so on where that is not of an export."""
    numbers = itertools.chain([""], map(".{}".format, itertools.count(2)))
    names = (f"{output.name}.rejected{number}" for number in numbers)
    return next(
        place
        for place in map(output.with_name, names)
        if not place.is_symlink()
        and (not place.exists() or (place.is_dir() and not_exported(place) is None))
    )


# --- Writing --------------------------------------------------------------------------------------


def _write_weights(
    model: PreTrainedModel, directory: Path, dtype: torch.dtype, max_shard_size: int | str
) -> None:
    """safetensors by official names, in as many files as `max_shard_size` asks for."""
    tensors = {
        name: tensor.to("cpu", dtype).contiguous()
        for name, tensor in expected_tensors(model).items()
    }
    try:
        split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    except (ValueError, OverflowError) as error:
        raise UserError(f"--max_shard_size {max_shard_size}: {error}") from None
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name] for name in names}
        save_file(shard, directory / file, metadata={"format": "pt"})
        atomic.let_umask_decide(directory / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_configs(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    format: str,
    dtype: torch.dtype,
) -> None:
    """config.json and, in the native form, the code it names.

    GPT-2 has no padding token and gets none, as one that equals eos makes fine-tuning ignore the
    end of every text.
    """
    config = copy.deepcopy(config)
    if format == "gpt2":
        fields = {key: value for key, value in config.to_dict().items() if hasattr(GPT2Config, key)}
        fields.pop("model_type")
        # n_ctx is n_positions' second name in the official files; llama.cpp's converter reads it.
        config = GPT2Config(**fields | {"n_ctx": config.n_positions})
    else:
        for source in SHIPPED_CODE.values():
            shutil.copy(source, directory)
    config.architectures = [CLASSES[format]]
    config.dtype = dtype
    config.use_cache = True  # training turns it off
    for key in SPECIAL_IDS:
        setattr(config, key, getattr(tokenizer, key))
    config.to_json_file(directory / "config.json")


def _write_generation_config(
    own: GenerationConfig | None, tokenizer: PreTrainedTokenizerFast, directory: Path
) -> None:
    """The model's own settings for `generate()`, if somebody made any, with the tokenizer's ids.

    `<|endoftext|>` is bos and eos; where they differ, either ends what is written, as do the
    model's own ends. Some id has to fill finished rows: without a padding token it is eos.
    """
    ids = {key: getattr(tokenizer, key) for key in SPECIAL_IDS}
    ends = end_ids(tokenizer)
    own = copy.deepcopy(own or GenerationConfig())
    if own._from_model_config:  # then its one end is nobody's choice, nor what any model's has
        also = own.eos_token_id if isinstance(own.eos_token_id, list) else []
        for field in GenerationConfig.from_model_config(GPT2Config()).to_diff_dict():
            setattr(own, field, getattr(GenerationConfig(), field, None))
    else:
        also = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = [*dict.fromkeys(end for end in (*ends, *also) if end is not None)]
    if ends:
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = next(iter(ends), None)
    own.update(**ids)
    try:
        own.save_pretrained(directory)
    except ValueError as error:  # settings that contradict each other
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the model's generation_config.json: {reason}") from None


def _write_tokenizer(
    tokenizer: PreTrainedTokenizerFast, directory: Path, n_positions: int, *, plain_files: bool
) -> None:
    """tokenizer.json and its configuration; vocab.json and merges.txt for older tools."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = n_positions
    # Code that was not needed to load it, and how it was found here.
    for name in ("auto_map", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    several = isinstance(tokenizer.chat_template, dict)  # they would be files in a folder
    tokenizer.save_pretrained(directory, save_jinja_files=not several)
    file = directory / "tokenizer_config.json"
    settings = read_json(file)
    # transformers 4 and others' tools know these by their former names, and 5 does as well.
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    bpe = tokenizer.backend_tokenizer.model
    if plain_files and type(bpe).__name__ == "BPE":
        bpe.save(str(directory))
