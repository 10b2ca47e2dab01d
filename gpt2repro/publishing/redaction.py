"""A card as others may see it: of what lies on this machine names, no paths and no addresses."""

import re
from pathlib import Path, PurePath
from typing import Any

import yaml

from gpt2repro.publishing.card_markdown import BENCHMARKS, TRAINING, recipe_block, section_span
from gpt2repro.system.hub import is_hub_id
from gpt2repro.system.text import printable

# Fields of a recipe that may name what lies on this machine, and such names in a command line.
PATH_FIELDS = (
    "output_dir",
    "resume",
    "init_from",
    "dataset_name",
    "name",  # of an entry of `datasets`
    "data_files",
    "tokenizer_name",
    "token_cache_dir",
    "unit_digests_dir",
    "eval_tasks_dir",
    "core_dir",
    "hellaswag_file",
)
PATH = re.compile(
    r"(?<=')(?:~|\.\.|file://)?/[^'\n]+(?=')"  # quoted, with spaces perhaps
    r"|(?<![\w:/.<~-])(?:~|\.\.|file://)?(?:/[^\s/\"'`|,<>()\[\]{}]+)+/?"
)
# Options of launchers that name machines, or what only the own ones shall know.
OWN_OPTION = (
    r"--(?:main.process.ip|master.addr|local.addr|rdzv.endpoint|rdzv.conf"
    r"|env|vm|tpu.name|tpu.zone|aws.\w+)"
)
PRIVATE = re.compile(
    rf"""'({OWN_OPTION}=)(?:[^']|'"'"')*'|({OWN_OPTION}[= ])(?:'[^']*'|"[^"]*"|[^\s\\'"])+"""
)


def redacted(card: str) -> str:
    """`card` as others may see it: nothing but text, and of what lies here names without paths."""
    for path in sorted(_local_paths(recipe_block(card) or ""), key=len, reverse=True):
        words = r"\s+".join(map(re.escape, path.split()))  # YAML folds long lines
        name = _name(path).replace("\\", r"\\")  # no reference to a group
        card = re.sub(rf"(?<![\w/.-]){words}(?![\w/-])", name, card)
    for title in (TRAINING, BENCHMARKS):  # the command line; names of other models
        if span := section_span(card, title):
            begin, end = span
            section = PRIVATE.sub(lambda found: f"{found[1] or found[2]}PRIVATE", card[begin:end])
            section = PATH.sub(lambda found: _name(found[0]), section)
            card = card[:begin] + section + card[end:]
    return printable(card)


def _local_paths(recipe_yaml: str) -> set[str]:
    """What a recipe names on this machine's disk."""
    try:
        recipe = yaml.safe_load(recipe_yaml)
    except yaml.YAMLError:  # somebody edited it
        return set()
    values: list[Any] = []
    datasets = (recipe.get("datasets") or []) if isinstance(recipe, dict) else []
    for fields in (recipe, *datasets):
        for field in PATH_FIELDS if isinstance(fields, dict) else ():
            value = fields.get(field)
            values += value if isinstance(value, list) else [value]
    return {
        spelled
        for value in values
        if isinstance(value, str) and "/" in value and not re.match(r"hub:|(?!file:)\w+://", value)
        if Path(value).exists() or not is_hub_id(value)
        for spelled in (value, value.replace("'", "''"))  # as YAML has it within quotes
    }


def _name(path: str) -> str:
    """The last part of a path; a pattern is no name in YAML, so it gets a dot before it."""
    name = PurePath(path).name
    return name if name[:1].isalnum() else f"./{name}"
