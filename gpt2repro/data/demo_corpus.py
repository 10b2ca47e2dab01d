"""The offline demo's corpus: English prose that every Python carries.

The language reference (`pydoc_data.topics`) and the docstrings of the standard library, about two
million characters, are written once to Parquet in FineWeb-Edu's column schema, together with a
small byte-level BPE trained on them. From there on the demo is an ordinary run: the same reader,
the same loop. Nothing is downloaded and nothing is committed.
"""

import ast
import contextlib
import hashlib
import inspect
import json
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from sysconfig import get_path

from gpt2repro import UserError
from gpt2repro.data.corpora.content import cache_directory
from gpt2repro.data.tokens.bpe import train_bpe
from gpt2repro.system import atomic

NAME = "python-docs"  # what a recipe's dataset_name and tokenizer_name call it
VOCAB_SIZE = 4096
ROWS_PER_GROUP = 100  # documents per Parquet row group, the stream's unit
MIN_CHARACTERS = 60  # shorter docstrings are labels, not prose
SUMS = "SUMS"  # a file with the hashes of the others

# Not the library proper, or not prose: test suites, editors and vendored wheels.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "turtledemo",
}


def built_in(name: str) -> Path | None:
    """The directory of the corpus and its `tokenizer` if `name` means the demo's; made if need be.

    It comes before a directory of that name in the working directory.
    """
    return prepare() if name == NAME else None


def prepare(directory: Path | None = None) -> Path:
    """Write the corpus and its tokenizer unless they are there, and return their directory.

    The directory holds `train.parquet` and `tokenizer/`. By default it lies in the user's cache,
    named after the Python version, because the text differs between versions. The directory appears
    complete or not at all: it is built beside its place and renamed, so concurrent calls are safe.
    One that is not as it was written (a disk that lost power) is made again.

    Raises:
        UserError: it cannot be written.
    """
    try:
        directory = directory or _default_directory()
        if _is_whole(directory):
            return directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            build = Path(scratch) / directory.name
            _write(build)
            for each in [*build.rglob("*"), build]:
                atomic.flush(each)
            if not _is_whole(directory):
                with contextlib.suppress(FileNotFoundError):
                    directory.rename(Path(scratch) / "torn")
                build.rename(directory)
                atomic.flush(directory.parent)
    except (OSError, RuntimeError) as error:
        if not (directory and _is_whole(directory)):  # else another process was faster
            raise UserError(
                f"the demo's corpus cannot be written to {directory} ({error}); XDG_CACHE_HOME "
                "names another place"
            ) from error
    return directory


def _is_whole(directory: Path) -> bool:
    """Whether all is there as it was written: a few milliseconds for a few megabytes."""
    try:
        return json.loads((directory / SUMS).read_bytes()) == _sums(directory)
    except (OSError, ValueError):
        return False


def _sums(directory: Path) -> dict[str, str]:
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != SUMS]
    return {
        str(file.relative_to(directory)): hashlib.blake2b(file.read_bytes()).hexdigest()
        for file in files
    }


def _write(directory: Path) -> None:
    """Make `directory` with the corpus, a tokenizer trained on it, and the sums of both."""
    directory.mkdir()
    documents = list(_read_documents())
    tokenizer = train_bpe((text for _, text in documents), VOCAB_SIZE)
    tokenizer.save_pretrained(directory / "tokenizer")
    _write_parquet(documents, tokenizer, directory / "train.parquet")
    (directory / SUMS).write_text(json.dumps(_sums(directory)), encoding="utf-8")


def _default_directory() -> Path:
    return cache_directory() / f"{NAME}-{platform.python_version()}"


def _read_documents() -> Iterator[tuple[str, str]]:
    """Yield `(source, text)` pairs, each text once, in an arbitrary order that is always the same.

    Ordering by hash mixes reference pages with docstrings, so that the validation units, which are
    the first ones, are a fair sample.
    """
    documents = {text: source for source, text in [*_docstrings(), *_reference_pages()]}
    for text in sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest()):
        yield documents[text], text


def _reference_pages() -> Iterator[tuple[str, str]]:
    """The pages that `help("topic")` shows."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"pydoc_data/topics#{name}", text.strip()


def _docstrings() -> Iterator[tuple[str, str]]:
    """The docstrings of the standard library's Python files, read without importing anything."""
    library = Path(get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # a template, an odd encoding, a broken link
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
                if len(text) >= MIN_CHARACTERS and _is_unicode(text):
                    yield f"{relative.as_posix()}#{getattr(node, 'name', '')}", text


def _is_unicode(text: str) -> bool:
    """False for a docstring that spells a lone surrogate, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _write_parquet(documents: list[tuple[str, str]], tokenizer, path: Path) -> None:
    """Write documents in FineWeb-Edu's columns, `ROWS_PER_GROUP` to a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [text for _, text in documents]
    count = len(texts)
    version = f"python-{platform.python_version()}"
    columns = {
        "text": texts,
        "id": [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts],
        "dump": [version] * count,
        "url": [f"https://docs.python.org/{platform.python_version()}/"] * count,
        "file_path": [source for source, _ in documents],
        "language": ["en"] * count,
        "language_score": [1.0] * count,  # it and the scores below only fill the schema
        "token_count": [len(ids) for ids in tokenizer(texts)["input_ids"]],
        "score": [5.0] * count,
        "int_score": [5] * count,
    }
    pq.write_table(pa.table(columns), path, row_group_size=ROWS_PER_GROUP)
