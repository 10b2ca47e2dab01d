"""What a directory to publish holds: known names, plain files, our code to the byte and no other.

Looked at before anything in it is loaded, let alone run. `SHA256SUMS` cannot vouch for that:
whoever changed a file can write it anew.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import configuration_gpt2repro
import modeling_gpt2repro
from gpt2repro import UserError
from gpt2repro.system.atomic import sha256
from gpt2repro.system.hub import refuse_pointers

SUMS = "SHA256SUMS"  # `sha256sum -c SHA256SUMS` checks it anywhere
SHIPPED_CODE = {
    f"{each.__name__}.py": Path(str(each.__file__))
    for each in (configuration_gpt2repro, modeling_gpt2repro)
}
CLASSES = {"gpt2repro": "GPT2ReproForCausalLM", "gpt2": "GPT2LMHeadModel"}
INDEX = "model.safetensors.index.json"

EDITABLE = re.compile(r"README\.md|LICENSE|\.gitattributes|[\w-]+\.png")  # not in SHA256SUMS
EXPORTED = re.compile(  # besides, and the code
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(generation_)?config\.json|tokenizer(_config)?\.json|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.jinja|vocab\.json|merges\.txt"
    r"|SHA256SUMS|provenance\.json"
)
# What systems and tools leave anywhere: it is not published, and no reason to refuse the rest.
LITTER = re.compile(r"\.(?!gitattributes$).*|__pycache__|Thumbs\.db|desktop\.ini|.*\.log")
# Of it, what may go when an export is replaced: nobody wrote it, and it comes again.
DROPPINGS = re.compile(r"\.DS_Store|\._.+|\.nfs\w+|Thumbs\.db|desktop\.ini")

# Settings with which transformers finds code: in this directory, or in a repository that they name.
NAMES_OF_CODE = ("auto_map", "custom_pipelines", "custom_generate", "attn_implementation")


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object")
    return content


# --- What may be there ----------------------------------------------------------------------------


def check_contents(
    directory: Path, *, allow_code: bool = False, ignored: Collection[str] = ()
) -> None:
    """Only what an export consists of: no pickle, no link, no stray code, none that is not ours.

    Args:
        allow_code: the two code files may be another version's or a fork's.
        ignored: names of files that are not looked at.

    Raises:
        UserError: naming the file.
    """
    native = read_json(directory / "config.json").get("model_type") == "gpt2repro"
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if is_litter(name) or name in ignored:
            continue
        refuse_link(path)
        known = belongs(name) and (native or name not in SHIPPED_CODE)
        if not (path.is_dir() or (path.is_file() and known)):
            raise UserError(f"{directory} holds {name}, which does not belong in an export")
    if (changed := changed_code(directory)) and not allow_code:
        raise UserError(
            f"{directory}: {changed[0]} is not this package's: another version's, a fork's or "
            "somebody else's, it would run here and wherever the model is loaded. Export the model "
            "again, or read it and add --allow_code"
        )
    _check_names_of_code(directory, native)


def belongs(name: str) -> bool:
    """Whether an export may hold a file of this name."""
    return name in SHIPPED_CODE or any(each.fullmatch(name) for each in (EXPORTED, EDITABLE))


def is_litter(name: str) -> bool:
    """Whether a path within an export is nothing of it, such as the Hub client's `.cache/x`."""
    return LITTER.fullmatch(name.partition("/")[0]) is not None


def refuse_link(path: Path) -> None:
    """What it leads to, a private key perhaps, would be published in its name.

    Raises:
        UserError: `path` itself is a symbolic link; the directories above it may be.
    """
    if path.is_symlink():
        raise UserError(
            f"{path} is a symbolic link, and what it leads to would be published; put the file "
            "itself there, or export the model to another directory"
        )


def changed_code(directory: Path) -> list[str]:
    """Names of the code files in `directory` that are not, byte for byte, the shipped ones."""
    return [
        name
        for name, shipped in SHIPPED_CODE.items()
        if (directory / name).is_file() and (directory / name).read_bytes() != shipped.read_bytes()
    ]


def _check_names_of_code(directory: Path, native: bool) -> None:
    """No setting may name code but a native configuration, which names the files beside it."""
    for path in sorted(directory.glob("*config.json")):
        for reference in _names_of_code(read_json(path)):
            file, _, name = reference.partition(".")
            ours = f"{file}.py" in SHIPPED_CODE and name.isidentifier()  # no `x/repo--file.Class`
            if not (native and path.name == "config.json" and ours):
                raise UserError(
                    f"{directory}: {path.name} names code that is not this package's, {reference!r}"
                )


def _names_of_code(settings: Any, inside: bool = False) -> Iterator[str]:
    """The code that settings name, at any depth; a built-in attention is no code."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            if not (key.endswith("attn_implementation") and "/" not in str(value)):
                yield from _names_of_code(value, inside or key.lstrip("_") in NAMES_OF_CODE)
    elif isinstance(settings, list):
        for value in settings:
            yield from _names_of_code(value, inside)
    elif inside and isinstance(settings, str):
        yield settings


# --- As it was exported ---------------------------------------------------------------------------


def write_sums(directory: Path) -> None:
    """Record every file whose change would change the model; the card may be edited afterwards."""
    names = sorted(path.name for path in directory.iterdir() if not EDITABLE.fullmatch(path.name))
    lines = [f"{sha256(directory / name)}  {name}\n" for name in names if name != SUMS]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def listed(sums: str) -> dict[str, str]:
    """SHA-256 by file name, as the text of `SHA256SUMS` has them."""
    parts = (line.partition("  ") for line in sums.splitlines())
    return {name: digest for digest, _, name in parts}


def unlisted(names: Iterable[str], sums: Mapping[str, str]) -> list[str]:
    """What would be loaded, for all that one knows, and was not exported."""
    return [
        name
        for name in sorted(names)
        if name not in (SUMS, *sums) and not EDITABLE.fullmatch(name) and not is_litter(name)
    ]


def _listed(directory: Path) -> dict[str, str]:
    """SHA-256 by file name, as the directory's sums have them.

    Raises:
        UserError: the file is none of ours.
    """
    try:
        return listed((directory / SUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / SUMS} cannot be read: {error}") from None


def not_exported(directory: Path) -> str | None:
    """Something in `directory` that no export wrote, None if all is: then it may be replaced.

    Every file is one that its sums list, or a card or picture beside them; and it is a GPT-2. Files
    may have been lost or damaged since.
    """
    try:
        listed = {SUMS, *_listed(directory)}
        if read_json(directory / "config.json").get("model_type") not in CLASSES:
            return "config.json"
    except UserError:
        listed = set()
    for path in sorted(directory.iterdir()):
        ours = path.name in listed or (listed and EDITABLE.fullmatch(path.name))
        if DROPPINGS.fullmatch(path.name) and not path.is_dir():
            continue
        if path.is_symlink() or not path.is_file() or not ours:
            return path.name
    return None


def check_sums(directory: Path) -> None:
    """Refuse a file that is not the one that was exported, or that was not.

    Raises:
        UserError: naming it; `SHA256SUMS` itself, if that is not there.
    """
    if not (directory / SUMS).is_file():
        raise UserError(f"{directory} lacks {SUMS}, which every export has; export the model again")
    refuse_pointers(sorted(directory.glob("*.safetensors")))
    sums = _listed(directory)
    for name in unlisted((path.name for path in directory.iterdir()), sums):
        raise UserError(
            f"{directory}: {name} was added after the export ({SUMS} does not list it); remove it, "
            "or export the model again"
        )
    for name, digest in sums.items():
        if not (directory / name).is_file():
            raise UserError(f"{directory} lacks {name}, which its {SUMS} lists; export it again")
        if sha256(directory / name) != digest:
            raise UserError(
                f"{directory}: {name} was changed or damaged after the export (its SHA-256 is not "
                f"the one in {SUMS}); export it again"
            )
