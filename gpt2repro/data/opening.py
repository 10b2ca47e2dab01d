"""A corpus by the name a user gives: of the Hub, of a directory or file, of the demo.

Which files a name means, local_files.py says of this machine and `datasets` of the Hub; who can
read them is asked in the order of `FORMATS`. A new format is a file of its own and a line there.
"""

import logging
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from gpt2repro import UserError
from gpt2repro.data import demo_corpus
from gpt2repro.data.corpora.content import content_hashes
from gpt2repro.data.corpora.corpus import Corpus, Found, digest, in_a_line
from gpt2repro.data.corpora.local_files import (
    FORMAT_OF_SUFFIX,
    LOCAL,
    TOKENS,
    Files,
    files_of,
    find_local,
    is_shard,
)
from gpt2repro.data.corpora.other_formats import open_prepared, open_streamed
from gpt2repro.data.corpora.parquet import open_parquet
from gpt2repro.data.corpora.shards import open_shards
from gpt2repro.data.dataset import Dataset
from gpt2repro.data.rows.mixture import THE_DATASET, Source
from gpt2repro.system import hub_client, patience
from gpt2repro.system.hub import is_hub_id

logger = logging.getLogger(__name__)

CONVERTED = "refs/convert/parquet"

FORMATS: tuple[Callable[[Found], Corpus | None], ...] = (
    open_parquet,
    open_shards,
    open_prepared,
    open_streamed,
)


Share = Callable[[str, Callable[[], Corpus]], Corpus]


def by_itself(name: str, opener: Callable[[], Corpus]) -> Corpus:
    """Every process opens everything."""
    return opener()


def is_local(dataset_name: str | Path) -> bool:
    """Whether this machine has what the name means; else it is the Hub's.

    Raises:
        UserError: naming the recipe's field.
    """
    known = str(dataset_name) in (demo_corpus.NAME, *FORMAT_OF_SUFFIX.values())
    with in_a_line(f"dataset_name: cannot open {dataset_name}"):
        return known or Path(dataset_name).expanduser().exists()


def open_corpus(
    dataset_name: str | Path,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    data_files: str | list[str] | None = None,
    text_column: str = "text",
    document: str | None = None,
    if_unreachable: str = "",
) -> Corpus:
    """Open a dataset of the Hub, a local directory, a local file, or the demo's.

    `config`, `split`, `revision` and `data_files` mean what they mean to `datasets.load_dataset`.
    A Hub revision is pinned to its commit, which `identity["revision"]` tells.
    `document` says what is one in local text files, a "file" or a "line": by default a file where
    there are several, a line where there is one.
    `if_unreachable` is advice for a machine without a network, appended to that error.

    Raises:
        UserError: naming the recipe's field.
    """
    name = str(dataset_name)
    if demo := demo_corpus.built_in(name):
        name, config = str(demo), None
    identity: dict[str, Any] = {"dataset": LOCAL, "config": config, "split": split}
    with in_a_line(f"dataset_name: cannot open {name}"):
        files = find_local(name, config=config, split=split, data_files=data_files)
        if on_hub := files is None:
            if not is_hub_id(name):
                raise UserError(f"dataset_name: {name} is neither a local directory nor a Hub name")
            commit = patience.patiently(
                lambda: _commit(name, revision),
                f"look up the dataset {name!r} (dataset_name)",
                attempt_seconds=patience.LONGEST_QUESTION_SECONDS,
                if_unreachable=if_unreachable,
            )
            identity |= {"dataset": name, "revision": commit}
            files = _shards_on_hub(name, commit, data_files)
            if files is not None and split != "train":
                raise UserError(f"dataset_split: shards of token ids have no split {split!r}")
            if files is None:
                options = {"path": name, "name": config, "data_files": data_files}
                builder = _load_builder(options | {"revision": commit}, name, if_unreachable)
                files = files_of(builder, split, name)
                identity["config"] = builder.config.name
                if revision == CONVERTED:
                    _tell_of_conversion(files.files, commit)
        if document and (on_hub or files.format != "text"):
            raise UserError(
                f"document: {document} is for text files of this machine, and {name} has none: "
                "set it to null"
            )
        found = Found(name, *files, split, text_column, identity, on_hub, document)
        corpus = next(filter(None, (open_format(found) for open_format in FORMATS)))
    if corpus.num_units == 0 or corpus.total_documents(range(corpus.num_units)) == 0:
        raise UserError(f"dataset_split: {name} has no documents in split {split!r}")
    if not on_hub and "content" not in corpus.identity:
        corpus.identity["content"] = digest(content_hashes(found.files))
    return corpus


def open_sources(
    datasets: Sequence[Dataset],
    revisions: Sequence[str | None] = (),
    if_unreachable: str = "",
    share: Share = by_itself,
) -> list[Source]:
    """Open what a stream reads.

    Args:
        datasets: their `num_validation_units` are given.
        revisions: for each dataset that names none, the commit that a resumed run had pinned.
        share: is given a name and what opens it, and may have one process open it for several.

    Raises:
        UserError: naming the field, and of several datasets which one.
    """
    sources: list[Source] = []
    for dataset, pinned in zip_longest(datasets, revisions[: len(datasets)]):
        label = f"datasets[{len(sources)}]" if len(datasets) > 1 else THE_DATASET
        with about(label):
            opener = partial(
                open_corpus,
                dataset.name,
                config=dataset.config,
                split=dataset.split,
                revision=dataset.revision or pinned,
                data_files=dataset.data_files,
                text_column=dataset.text_column,
                document=dataset.document,
                if_unreachable=if_unreachable,
            )
            corpus = share(dataset.name, opener)
        units = dataset.num_validation_units
        units = corpus.num_held_out_units if units is None else units
        sources.append(Source(corpus, units, dataset.exact_weight, dataset.epochs, label))
    return sources


@contextmanager
def about(label: str) -> Iterator[None]:
    """Errors inside say which of several datasets they are about."""
    try:
        yield
    except UserError as error:
        if label == THE_DATASET:
            raise
        raise UserError(f"{label}: {error}") from error


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
                name, revision=revision, expand=["sha"], timeout=hub_client.REQUEST_TIMEOUT_SECONDS
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
        is_commit = re.fullmatch("[0-9a-f]{40}", revision or "")
        gone = " (any more: its history was rewritten?)" if is_commit else ""
        raise UserError(f"dataset_revision: {name} has no revision {revision!r}{gone}") from error
    assert commit
    return commit


def _shards_on_hub(name: str, commit: str, data_files: str | list[str] | None) -> Files | None:
    """Files of token ids, which `datasets` does not know; None unless `data_files` names such."""
    from fsspec.utils import glob_translate
    from huggingface_hub import HfApi

    patterns = [data_files] if isinstance(data_files, str) else data_files or []
    if not patterns or not all(map(is_shard, patterns)):
        return None
    paths = patience.patiently(
        lambda: HfApi().list_repo_files(name, revision=commit, repo_type="dataset"),
        f"list the files of {name} (dataset_name)",
        attempt_seconds=patience.LONGEST_QUESTION_SECONDS,
    )
    # As `datasets` matches: `*` within a directory, `**/` for any, and none as well.
    parts = [posixpath.normpath(pattern).split("/") for pattern in patterns]
    plain = ["/".join(p if p == "**" else re.sub(r"\*+", "*", p) for p in each) for each in parts]
    matches = re.compile("|".join(map(glob_translate, plain))).match
    meant = sorted(filter(matches, paths))
    if not meant:
        raise UserError(f"data_files: no data files in {name}: {', '.join(patterns)}")
    return Files(TOKENS, None, [f"hf://datasets/{name}@{commit}/{path}" for path in meant])


def _tell_of_conversion(files: list[str], commit: str) -> None:
    """The Hub's own copies in parquet are CONFIGURATION/SPLIT/*, and no card says so."""
    logger.warning(
        "dataset_revision: the Hub writes %s anew now and then, without its history, and a run "
        "cannot be resumed from a commit that is gone: for a long one download its files",
        CONVERTED,
    )
    names = [file.partition(f"@{commit}/")[2] for file in files]
    if len(configurations := sorted({name.partition("/")[0] for name in names})) > 1:
        logger.warning(
            "dataset_revision: %s has %d configurations (%s), and all are read as one: data_files "
            "'%s/*train/*.parquet' takes the training split of one",
            *(CONVERTED, len(configurations), ", ".join(configurations), configurations[0]),
        )
    if cut := next((name for name in names if "/partial-" in name), None):
        logger.warning("dataset_revision: %s has the first 5 GB alone of some (%s)", CONVERTED, cut)


def _load_builder(options: dict[str, Any], name: str, if_unreachable: str):
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    def load():
        try:
            return load_dataset_builder(**options)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            raise UserError(
                f"dataset_name: {name} is a script, which `datasets` runs no longer; the Hub may "
                f"have a copy in parquet: dataset_revision {CONVERTED}"
            ) from error

    try:
        return patience.patiently(
            load,
            f"resolve the files of {name} (dataset_name)",
            if_unreachable=if_unreachable,
        )
    except (FileNotFoundError, DatasetNotFoundError) as error:
        knob = "data_files" if options["data_files"] else "dataset_name"
        raise UserError(f"{knob}: no data files in {name}: {error}") from error
    except ValueError as error:
        knob = "dataset_config" if "onfig" in str(error) else "dataset_name"
        raise UserError(f"{knob}: {name}: {error}") from error
