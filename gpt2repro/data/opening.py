"""A corpus by the name a user gives: of the Hub, of a directory or file, of the demo.

`datasets` says which files a name, config, split and revision mean; who can read them is asked in
the order of `FORMATS`. A new format is a file of its own and a line there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2repro import UserError
from gpt2repro.data import demo_corpus
from gpt2repro.data.corpus import Corpus, Found
from gpt2repro.data.other_formats import open_prepared, open_streamed
from gpt2repro.data.parquet import open_parquet
from gpt2repro.system import patience
from gpt2repro.system.hub import is_hub_id

FORMATS: tuple[Callable[[Found], Corpus | None], ...] = (
    open_parquet,
    open_prepared,
    open_streamed,
)
BUILDER_OF_SUFFIX = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
}


def open_corpus(
    dataset_name: str | Path,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    data_files: str | list[str] | None = None,
    text_column: str = "text",
    if_unreachable: str = "",
) -> Corpus:
    """Open a dataset of the Hub, a local directory, a local file, or the demo's.

    `config`, `split`, `revision` and `data_files` mean what they mean to `datasets.load_dataset`.
    A Hub revision is pinned to its commit, which `identity["revision"]` tells.
    `if_unreachable` is advice for a machine without a network, appended to that error.

    Raises:
        UserError: naming the recipe's field.
    """
    name = str(dataset_name)
    if demo := demo_corpus.built_in(name):
        name, config = str(demo), None
    arguments = _local_arguments(name, data_files)
    identity: dict[str, Any] = {"dataset": "local files", "config": config, "split": split}
    on_hub = arguments is None
    if on_hub:
        revision = patience.patiently(
            lambda: _commit(name, revision),
            f"look up the dataset {name!r} (dataset_name)",
            if_unreachable=if_unreachable,
        )
        arguments = {"path": name, "data_files": data_files, "revision": revision}
        identity["dataset"] = name
        identity["revision"] = revision
    assert arguments is not None
    builder = _load_builder(arguments | {"name": config}, name, on_hub, if_unreachable)
    identity["config"] = builder.config.name if on_hub else config
    files = _files_of_split(builder, split, name)
    found = Found(name, builder, files, split, text_column, identity, on_hub)
    corpus = next(filter(None, (open_format(found) for open_format in FORMATS)))
    if all(corpus.num_documents(unit_index) == 0 for unit_index in range(corpus.num_units)):
        raise UserError(f"dataset_split: {name} has no documents in split {split!r}")
    return corpus


def _local_arguments(name: str, data_files: Any) -> dict[str, Any] | None:
    """`load_dataset_builder`'s arguments for what is on this machine; None for a Hub name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return {"path": str(path.resolve()), "data_files": data_files}
    if path.is_file():
        builder = BUILDER_OF_SUFFIX.get(path.suffix.lower())
        if builder is None:
            known = ", ".join(BUILDER_OF_SUFFIX)
            raise UserError(f"dataset_name: {name} is none of {known}")
        return {"path": builder, "data_files": str(path.resolve())}
    if name in BUILDER_OF_SUFFIX.values():
        if not data_files:
            raise UserError(f"data_files: say which files the {name!r} reader is to read")
        return {"path": name, "data_files": data_files}
    if not is_hub_id(name):
        raise UserError(f"dataset_name: {name} is neither a local directory nor a Hub name")
    return None


def _commit(name: str, revision: str | None) -> str:
    """The commit that a branch, tag or abbreviated hash stands for now."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        commit = (
            HfApi()
            .dataset_info(
                name, revision=revision, expand=["sha"], timeout=patience.REQUEST_TIMEOUT_SECONDS
            )
            .sha
        )
    except GatedRepoError as error:
        raise UserError(
            f"dataset_name: {name} is gated: accept its terms on the Hub and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"dataset_name: no dataset {name!r} on the Hub or in a local directory (a private one "
            "needs HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"dataset_revision: {name} has no revision {revision!r}") from error
    assert commit
    return commit


def _load_builder(arguments: dict[str, Any], name: str, on_hub: bool, if_unreachable: str):
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    def load():
        return load_dataset_builder(**arguments)

    try:
        if not on_hub:
            return load()
        what = f"resolve the files of {name} (dataset_name)"
        return patience.patiently(load, what, if_unreachable=if_unreachable)
    except (FileNotFoundError, DatasetNotFoundError) as error:
        knob = "data_files" if arguments["data_files"] else "dataset_name"
        raise UserError(f"{knob}: no data files in {name}: {error}") from error
    except ValueError as error:
        knob = "dataset_config" if "onfig" in str(error) else "dataset_name"
        raise UserError(f"{knob}: {name}: {error}") from error


def _files_of_split(builder, split: str, name: str) -> list[str]:
    files = builder.config.data_files or {}
    if split not in files:
        known = ", ".join(map(str, files)) or "none"
        raise UserError(f"dataset_split: {name} has no split {split!r}; it has: {known}")
    return list(files[split])
