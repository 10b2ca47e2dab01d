"""Files of this machine by the name a user gives: which ones, and of which format.

What exists is meant as it is spelled, whatever `*`, `[` or `::` are elsewhere; what does not exist
is a pattern, from its first part on that does not. Of a directory `datasets` says which files are a
split, by their names or by a dataset card.
"""

import glob
import itertools
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from gpt2repro import UserError
from gpt2repro.data.corpora.corpus import in_a_line
from gpt2repro.system.hub import refuse_pointers

logger = logging.getLogger(__name__)

LOCAL = "local files"  # the name of their dataset, wherever they lie
FORMAT_OF_SUFFIX = {
    ".parquet": "parquet",
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".txt", ".md"), "text"),
}
TOKENS = "tokens"  # the format of what is encoded already: shards.py
TOKEN_SUFFIXES = (".bin", ".npy")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# What `datasets` writes beside data; a name alone asks for them all the same.
NOT_DATA = {
    *("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"),
    "manifest.json",  # of `gpt2repro tokenize`
}


class Files(NamedTuple):
    """A split: its files in order, their format, a builder where only `datasets` can read them."""

    format: str
    builder: Any
    files: list[str]


def is_shard(file: str | PurePath) -> bool:
    """Whether a name says that the file holds token ids."""
    return PurePath(file).suffix.lower() in TOKEN_SUFFIXES


def suffixes_of(file: Path) -> tuple[str, str]:
    """A file's suffixes of format and compression in lower case, "" where it has none.

    Those of what it links to, where its own say no format.
    """
    here, there = _suffixes(file), _suffixes(file.resolve())
    return there if here[0] not in FORMAT_OF_SUFFIX and there[0] in FORMAT_OF_SUFFIX else here


def _suffixes(file: Path) -> tuple[str, str]:
    *_, before, last = ["", "", *(suffix.lower() for suffix in file.suffixes)]
    return (before, last) if last in COMPRESSIONS else (last, "")


def format_of(file: Path) -> str | None:
    """What the file's name says, or that of what it links to."""
    return FORMAT_OF_SUFFIX.get(suffixes_of(file)[0])


def find_local(
    name: str, *, config: str | None, split: str, data_files: str | list[str] | None
) -> Files | None:
    """A split of a local file, of a directory, or of a reader's `data_files`; None for other names.

    Raises:
        UserError: naming the recipe's field.
    """
    path = Path(name).expanduser()
    reader = name if name in FORMAT_OF_SUFFIX.values() and not path.exists() else None
    base, shards = (Path() if reader else path).absolute(), []
    if path.is_file():
        if data_files:
            raise UserError(f"data_files: {name} is a file itself: set it to null")
        splits = {"train": [base]}
    elif data_files and (reader or path.is_dir()):
        given = [data_files] if isinstance(data_files, str) else data_files
        splits = {"train": _each_once([file for name in given for file in _meant(name, base)])}
    elif path.is_dir():
        shards = _only_shards(base)
        splits = {"train": shards} if shards else _splits_of(base, config)
    elif reader:
        raise UserError(f"data_files: say which files the {name!r} reader is to read")
    else:
        return None
    if config and (path.is_file() or data_files or shards):
        raise UserError(f"dataset_config: files have none, and it is {config!r}: set it to null")
    _check_split(split, splits, name)
    if not splits[split]:
        raise UserError(f"dataset_name: no data files in {path}")
    refuse_pointers(splits[split])
    if all(map(is_shard, splits[split])):
        return Files(TOKENS, None, [str(file) for file in splits[split]])
    formats = {reader or format_of(file): file.name for file in splits[split]}
    if formats.keys() == {None}:
        return _of_another_format(path, config, split, splits[split])
    if len(formats) > 1:
        raise UserError(
            f"data_files: {name} holds files of several formats ({', '.join(formats.values())}): "
            "name those of one, such as '*.parquet'"
        )
    return Files(str(*formats), None, [str(file) for file in splits[split]])


def _only_shards(directory: Path) -> list[Path]:
    """The files of token ids in a directory that has no other data.

    Raises:
        UserError: it has some further down, and nothing says which are meant.
    """
    files = sorted(file for file in directory.iterdir() if file.is_file())
    files = [file for file in files if not file.name.startswith(".")]  # macOS' `._x.bin` is none
    beside = (".md", ".json")  # a card, a manifest
    if any(format_of(file) for file in files if file.suffix.lower() not in beside):
        return []
    shards = [file for file in files if is_shard(file)]
    for file in sorted(directory.glob("[!.]*/**/[!.]*")) if shards else ():
        if format_of(file) and file.suffix.lower() != ".md" and file.is_file():
            raise UserError(
                f"data_files: {directory} has shards of token ids ({shards[0].name}) and, below, "
                f"texts ({file.relative_to(directory)}): name those that are meant, such as '*.npy'"
            )
    return shards


def files_of(builder: Any, split: str, name: str) -> Files:
    """What a builder of `datasets` found."""
    splits = builder.config.data_files or {}
    _check_split(split, splits, name)
    return Files(builder.name, builder, list(splits[split]))


def _check_split(split: str, splits: dict[str, Any], name: str) -> None:
    if split not in splits:
        known = ", ".join(map(str, splits)) or "none"
        raise UserError(f"dataset_split: {name} has no split {split!r}; it has: {known}")


def _meant(each: str, base: Path) -> list[Path]:
    """The files that one of `data_files` means: itself, all in it, or what it is a pattern of."""
    if "://" in each:
        raise UserError(f"data_files: {each} is no file of this machine: download it")
    path = base / Path(each).expanduser()
    there = next(part for part in (path, *path.parents) if part.exists())
    rest = path.relative_to(there) if there != path else "**"
    pattern = glob.escape(str(there)) + (f"/{rest}" if there.is_dir() else "")
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 (pathlib's takes hidden ones too)
    found = [] if there.is_file() and there != path else found  # nothing lies in a file
    files = [file for file in map(Path, sorted(found)) if file.is_file()]
    files = [file for file in files if file == path or file.name not in NOT_DATA]
    if not files:
        raise UserError(f"data_files: no data files in {base}: {each}")
    return files


def _each_once(files: list[Path]) -> list[Path]:
    """The first of each, where patterns overlap or a link leads back to where it lies."""
    once = list({file.resolve(): file for file in reversed(files)}.values())[::-1]
    if len(once) < len(files):
        logger.warning("data_files: names %d files twice; once is read", len(files) - len(once))
    return once


def _splits_of(directory: Path, config: str | None) -> dict[str, list[Path]]:
    """Split -> files, as `datasets` has it, but of all formats: it takes the most frequent one.

    It takes a place for a pattern or an address too, so it is shown a link with a harmless name.
    """
    from datasets.data_files import (
        DEFAULT_PATTERNS_ALL,
        EmptyDatasetError,
        get_data_patterns,
        resolve_pattern,
    )

    with tempfile.TemporaryDirectory() as scratch:
        link = Path(scratch).resolve() / "data"
        link.symlink_to(directory)

        def files(pattern: str, base: Path) -> Iterator[Path]:
            try:
                found = resolve_pattern(pattern, str(base))
            except FileNotFoundError:
                if not glob.has_magic(pattern):
                    raise
                return
            for file in (directory / Path(file).relative_to(link) for file in found):
                if file.name not in NOT_DATA:
                    yield file

        def resolved(patterns: dict, base: Path) -> dict[str, list[Path]]:
            return {s: _data_of([f for p in patterns[s] for f in files(p, base)]) for s in patterns}

        try:
            if of_card := _patterns_of_card(directory, link, config):
                return resolved(*of_card)
            patterns = get_data_patterns(str(link))
            if patterns == DEFAULT_PATTERNS_ALL:  # of which `datasets` leaves them out
                patterns = {s: [*patterns[s], "**/README.md"] for s in patterns}
            splits = resolved(patterns, link)
        except (EmptyDatasetError, FileNotFoundError) as error:
            linked = any(file.is_symlink() and file.is_dir() for file in directory.iterdir())
            advice = "; in linked directories, data_files finds some: '**'" if linked else ""
            raise UserError(f"dataset_name: no data files in {directory}{advice}") from error
    _tell_of_the_rest(directory, splits)
    return splits


def _data_of(files: list[Path]) -> list[Path]:
    """Those of a split that are data. Markdown beside another format than text is none.

    README.md is a text among other Markdown only, and a dataset card never.
    """
    markdown = [file for file in files if suffixes_of(file)[0] == ".md"]
    if any(format_of(file) not in ("text", None) or file.suffix == ".arrow" for file in files):
        no_data = set(markdown)
    else:
        no_data = {file for file in markdown if file.name.lower() == "readme.md"}
        if len(no_data) < len(markdown):
            no_data = {file for file in no_data if _is_card(file)}
    data = [file for file in files if file not in no_data]
    return list(filter(format_of, data)) or data or files


def _is_card(file: Path) -> bool:
    """Whether what it begins with, between lines of dashes, describes a dataset."""
    begins = rb"---\r?\n((?!---).*\n)*(configs|dataset_info):"
    with in_a_line("dataset_name"), file.open("rb") as content:
        return re.match(begins, content.read(2**20)) is not None


def _tell_of_the_rest(directory: Path, splits: dict[str, list[Path]]) -> None:
    """Of files in no split, such as `more.jsonl` beside `train.jsonl`; hidden ones are no data.

    And of linked directories, into which `datasets` does not look.
    """
    taken = {file for files in splits.values() for file in files}
    formats = {format_of(file) for file in taken} - {None}
    every = sorted(directory.rglob("*")) if formats else []
    names = [str(file.relative_to(directory)) for file in every if file not in taken]
    names = [name for name in names if not re.search(r"(^|/)(\.|__|(?i:readme\.md)$)", name)]
    links = [name for name in names if (directory / name).is_symlink()]
    if linked := [name for name in links if (directory / name).is_dir()]:
        logger.warning(
            "dataset_name: linked directories are not looked into, such as %r of %s: data_files "
            "'**' takes what is there",
            *(linked[0], directory),
        )
    rest = [name for name in names if format_of(directory / name) in formats]
    if rest:
        logger.warning(
            "dataset_name: by their names %d files of %s are in no split (%s), such as %r: they "
            "are left out, unless data_files names them",
            *(len(rest), directory, ", ".join(map(str, splits)), rest[0]),
        )


def _patterns_of_card(
    directory: Path, link: Path, config: str | None
) -> tuple[dict[str, list[str]], Path] | None:
    """Split -> patterns of a configuration in the directory's dataset card, and below what.

    None without any. A card is the author's: it names nothing but what lies in the directory.
    """
    from datasets.data_files import get_data_patterns, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    card, configs = directory / "README.md", MetadataConfigs()
    if card.is_file() and card.read_bytes().lstrip().startswith(b"---"):  # else it is told of
        with in_a_line(f"dataset_name: the dataset card {card} cannot be read"):
            configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data)
    known = list(configs)
    chosen = config or configs.get_default_config_name() or (known[0] if len(known) == 1 else None)
    if (config or known) and chosen not in configs:
        raise UserError(f"dataset_config: {directory} has no {config!r}; it has: {known}")
    if chosen is None:
        return None
    given, below = configs[chosen].get("data_files"), str(configs[chosen].get("data_dir") or "")
    patterns = sanitize_patterns(given) if given else {}
    for name in (below, *itertools.chain(*patterns.values())):
        is_address = name.startswith("file:") or "://" in name or "::" in name
        if is_address or name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"dataset_name: the card of {directory} names {name!r}, outside of it")
    return patterns or get_data_patterns(str(link / below)), link / below


def _of_another_format(path: Path, config: str | None, split: str, files: list[Path]) -> Files:
    """What only `datasets` can read. Its builders write to a cache, of which nothing is needed."""
    if path.is_file():
        raise UserError(f"dataset_name: {path} is none of {', '.join(FORMAT_OF_SUFFIX)}")
    from datasets import load_dataset_builder

    data_files = {split: [glob.escape(str(file)) for file in files]}
    with (
        tempfile.TemporaryDirectory() as cache,
        in_a_line(f"dataset_name: no data files in {path}"),
    ):
        builder = load_dataset_builder(str(path), config, data_files=data_files, cache_dir=cache)
        return files_of(builder, split, str(path))
