"""The recipe of a run, from three layers of values, the later winning.

`recipes/gpt2.yaml` states every field and is the reproduction itself; the chosen recipe states what
it changes; then comes the command line. All three pass through the same checks. The fields are in
recipe_fields.py.

Nothing large is imported here: a misspelled option is answered before torch is. The layers are laid
over each other by hand, a dozen lines: a message names the layer and the field as the user spelled
them, setting one of the two lengths of a run replaces the other, and what belongs to a dataset goes
with it.
"""

import difflib
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as brief
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le
from pydantic import ValidationError

from gpt2repro import UserError
from gpt2repro.data.dataset import Dataset
from gpt2repro.data.rows.lanes import check_lanes, divisors
from gpt2repro.recipe_fields import FIELDS, Pair, Recipe, alternatives
from gpt2repro.system.command_line import place, underscored

DEFAULT_RECIPE = "gpt2"
PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
MOST_BYTES = 2**18  # of a recipe; what is larger is something else
MOST_SHOWN = 10  # mistakes in one message

# --- Reading --------------------------------------------------------------------------------------

USUAL = ("exp_name", "dataset_name", "tokenizer_name", "num_steps", "micro_batch_size", "max_lr")
GROUPS = {  # by their first field
    "exp_name": "The run",
    "dataset_name": "Data",
    "model_size": "Model",
    "batch_tokens": "Batch and schedule",
    "optimizer": "Optimizer",
    "mixed_precision": "Engine",
    "log_every": "What the run shows and keeps",
    "export_format": "Publishing",
}
# What other training scripts call a field: understood on the command line, or answered.
ALIASES = {"epochs": "num_epochs", "batch_size": "micro_batch_size"}
HABITS = {
    "lr": "max_lr, the peak of the schedule",
    "learning_rate": "max_lr, the peak of the schedule",
    "output": "output_dir, the run's own directory",
    "steps": "num_steps, of the optimizer",
    "max_steps": "num_steps, of the optimizer",
    "max_iters": "num_steps, of the optimizer",
    "gradient_accumulation_steps": "batch_tokens, from which it follows",
    "block_size": "sequence_length, in tokens",
    "dataset": "dataset_name",
    "tokenizer": "tokenizer_name",
    "model": "model_size, or init_from for weights to start from",
    "bf16": "mixed_precision bf16",
    "warmup": "warmup_steps",
}

REPLACES = {
    "exp_name": ["output_dir"],
    "init_from": ["n_layer", "n_head", "n_embd"],
    "num_epochs": ["num_steps"],
    "num_steps": ["num_epochs"],
    "num_validation_units": ["validation_fraction"],
    "validation_fraction": ["num_validation_units"],
    "dataset_name": ["datasets"],
    "datasets": ["dataset_name", "data_files"],
}
# What means nothing for another dataset: a layer that names one begins without.
OF_A_DATASET = ("dataset_config", "dataset_revision", "data_files", "num_validation_units")
# What an entry of `datasets` says for itself.
OF_AN_ENTRY = (
    *("dataset_config", "dataset_split", "dataset_revision"),
    *("data_files", "text_column", "document"),
)


def load_recipe(argv: list[str]) -> Recipe:
    """The recipe that a command line asks for: `--recipe NAME_OR_FILE` and `--FIELD VALUE` ...

    Raises:
        UserError: unknown fields, values of the wrong type or out of range, an unreadable file.
    """
    overrides = parse_arguments(argv)
    path = find_recipe(overrides.pop("recipe", DEFAULT_RECIPE))
    default = find_recipe(DEFAULT_RECIPE)
    values = _checked({}, read_recipe(default), f"{default}: ") | {"exp_name": None}
    for layer, prefix in ((read_recipe(path), f"{path}: "), (overrides, "--")):
        values = _checked(values, layer, prefix)
    if values["exp_name"] is None:
        named = {"exp_name": path.stem, "output_dir": values["output_dir"]}
        values = _checked(values, named, f"--recipe {path}: ")
    recipe = Recipe(**values)
    _check_consistency(recipe)
    return recipe


def recipes_directory() -> Path:
    """Inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def find_recipe(name: str) -> Path:
    """`name` as a file, else as the bare name of a recipe that ships."""
    try:
        path = Path(place(name))
    except ValueError as error:
        raise UserError(f"--recipe {brief(name)}: {error}") from None
    if path.is_file():
        return path
    shipped = recipes_directory() / (path.name if path.suffix else f"{name}.yaml")
    if shipped.is_file() and len(path.parts) <= 2:  # demo, demo.yaml or recipes/demo.yaml
        return shipped
    known = ", ".join(sorted(recipe.stem for recipe in recipes_directory().glob("*.yaml")))
    raise UserError(
        f"--recipe {name}: no such file, and no shipped recipe has that name (there are {known})"
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in one YAML file, not checked yet."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {path}: cannot be read: {error}") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"--recipe {path}: more than {MOST_BYTES:,} bytes: that is no recipe")
    try:
        values = yaml.load(text, _Loader)
    except Exception as error:  # what a scalar or a deep nesting raises has no common base
        raise UserError(f"--recipe {path}: not valid YAML: {error}") from None
    if values is None:
        raise UserError(f"--recipe {path}: is empty; a recipe states at least what it changes")
    if not isinstance(values, dict):
        raise UserError(
            f"--recipe {path}: a recipe is a mapping of fields to values, "
            f"not a {type(values).__name__}"
        )
    return {str(key): value for key, value in values.items()}


class _Loader(yaml.SafeLoader):
    """YAML whose keys are given once, without merge keys, which can grow without bound.

    Nor is 010 eight, or 1:30 ninety, as YAML 1.1 has it: such whole numbers are text, for a field
    to read or refuse.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, PLAIN_INT if tag == "tag:yaml.org,2002:int" else form) for tag, form in forms]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        values = yaml.constructor.BaseConstructor.construct_mapping(self, node, deep)
        if len(values) < len(node.value):
            ((key, _),) = Counter(key.value for key, _ in node.value).most_common(1)
            raise yaml.YAMLError(f"{key} is given twice")
        return values


def parse_arguments(argv: list[str]) -> dict[str, Any]:
    """`--field value`, `--field=value`, `--fie-ld value`; a bare `--flag` is true. Values are YAML.

    Written out because the recipe file and the command line must agree on names, types and messages
    to the letter; an `argparse` parser of fifty generated options says it differently.
    """
    if "-h" in argv or "--help" in argv:
        print(_help_text())
        sys.exit(0)
    values: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            several = "; several data_files take commas between them, and a pattern quotes around"
            raise UserError(
                f"unexpected argument {brief(word)}: options are --recipe FILE and --FIELD VALUE"
                + (several if [*values][-1:] == ["data_files"] else "")
            )
        key, equals, text = underscored(word)[2:].partition("=")
        key = ALIASES.get(key, key)
        if not equals:
            if words and not words[0].startswith("--"):
                text = words.pop(0)
            elif key in FIELDS and bool in alternatives(FIELDS[key].annotation):
                text = "true"
            elif key in FIELDS or key == "recipe":
                raise UserError(f"--{key} needs a value: {allowed(key)}")
        if key in values:
            raise UserError(f"--{key} is given twice")
        values[key] = _parse_value(text) if _is_yaml(key) else text
    return values


def _is_yaml(key: str) -> bool:
    """False for fields that take text: what is typed is it, and never a number."""
    return key in FIELDS and str not in alternatives(FIELDS[key].annotation)


def _parse_value(text: str) -> Any:
    try:
        return yaml.load(text, _Loader) if text else text
    except Exception:  # see read_recipe
        return text


def _help_text() -> str:
    """The usual fields, then all of them in the groups of recipes/gpt2.yaml, with their values."""
    values = {name: read_recipe(find_recipe(name)) for name in (DEFAULT_RECIPE, "demo")}

    def described(key: str) -> list[str]:
        own, demo = (values[name].get(key, values[DEFAULT_RECIPE][key]) for name in values)
        shown = f"{_as_typed(own)}; demo {_as_typed(demo)}"
        text = f"{FIELDS[key].description} ({allowed(key)}) [{shown}]"
        return [
            f"  --{key}",
            *textwrap.wrap(text, 78, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]

    lines = [
        "usage: accelerate launch [...] train_accelerate.py [--recipe FILE]",
        "                                                   [--FIELD VALUE ...]",
        "",
        "  --recipe FILE",
        f"      a YAML file, or the name of a shipped recipe (default {DEFAULT_RECIPE})",
        "",
        f"In brackets the value of the recipe {DEFAULT_RECIPE}, and of the demo. --epochs and",
        "--batch_size are understood as --num_epochs and --micro_batch_size.",
        "",
        "The usual ones",
    ]
    for key in USUAL:
        lines += described(key)
    for key in FIELDS:
        if key in GROUPS:
            lines += ["", GROUPS[key]]
        lines += described(key)
    return "\n".join(lines)


def _as_typed(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


# --- Checking -------------------------------------------------------------------------------------


def _checked(below: dict[str, Any], layer: dict[str, Any], prefix: str) -> dict[str, Any]:
    """`layer` over the valid values `below`; all that is wrong in it is one `UserError`.

    Args:
        prefix: what a message puts before a field of the layer, such as `--`.
    """
    layer = dict(layer)
    # A layer that sets one of two ways to say a thing means to replace the other.
    for one, others in REPLACES.items():
        if layer.get(one) not in (None, "null"):
            layer |= {other: None for other in others if other not in layer}
    changed = {key for key in ("dataset_name", "datasets") if key in layer and below}
    if any(layer[key] != below[key] for key in changed):
        layer = dict.fromkeys(OF_A_DATASET) | layer
    try:
        values = Recipe(**(below | layer)).model_dump()
    except ValidationError as error:
        nested = [each for each in error.errors() if "datasets" in each["loc"][:-1]]
        reasons = {
            str(each["loc"][0]): each.get("ctx", {}).get("error")
            for each in error.errors()
            if each not in nested
        }
        raise UserError(
            "; ".join(
                [f"{prefix}{_path(each['loc'])}: {each['msg']}" for each in nested[:MOST_SHOWN]]
                + [
                    f"{prefix}{key}: {_shown(layer[key])} is not allowed"
                    f"{f' ({reason})' if str(reason or '') else ''}; it takes {allowed(key)}"
                    if key in FIELDS
                    else _unknown(prefix, key)
                    for key, reason in [*reasons.items()][:MOST_SHOWN]
                ]
            )
        ) from None
    lost = [key for key in OF_AN_ENTRY if values["datasets"] and key in layer]
    if lost := [key for key in lost if values[key] not in (None, below.get(key))]:
        field = lost[0].removeprefix("dataset_")
        raise UserError(f"{prefix}{lost[0]}: of several datasets each entry has its own {field}")
    return values


def _path(location: Sequence[int | str]) -> str:
    """A place within a nested field: datasets[1].weight."""
    return "".join(f"[{n}]" if isinstance(n, int) else f".{n}" for n in location).lstrip(".")


def _shown(value: Any) -> str:
    """A value that was refused, in a few words: it may be huge, and nest without end."""
    try:
        shown = brief(value)
        return shown if len(shown) <= 100 else f"{shown[:100]}..."
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "so large a number"


def allowed(key: str) -> str:
    """What a field takes, in words."""
    if key == "recipe":
        return "a YAML file or the name of a shipped recipe"
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        NoneType: "null",
    }
    words: list[str] = []
    kinds = alternatives(FIELDS[key].annotation)
    for kind in sorted(kinds, key=lambda each: each is not NoneType):
        if get_origin(kind) is Literal:
            words += get_args(kind)
        elif get_origin(kind) is list:
            (item,) = alternatives(get_args(kind)[0])
            of = {Dataset: "mappings", int: "whole numbers", Pair: "pairs, at least 1 and 1"}
            what = of.get(item) or ", ".join(get_args(item)) or "text"
            words.append(f"a list of {what}")
        else:
            words.append(names[kind])
    bounds = " and ".join(_bounds(key))
    return " or ".join(words) + (f", {bounds}" if bounds else "")


def _bounds(key: str) -> list[str]:
    """The limits of a number, in words; those of one of several types stand at that type."""
    nested = [limit for each in get_args(FIELDS[key].annotation) for limit in get_args(each)[1:]]
    words = {Gt: ("above", "gt"), Ge: ("at least", "ge"), Le: ("at most", "le")}
    return [
        f"{words[type(limit)][0]} {getattr(limit, words[type(limit)][1]):g}"
        for limit in [*FIELDS[key].metadata, *nested]
        if type(limit) in words
    ]


def _unknown(prefix: str, key: str) -> str:
    if key in HABITS:
        return f"{prefix}{key}: here it is {HABITS[key]}"
    close = difflib.get_close_matches(key, FIELDS, n=3)
    hint = (
        f"did you mean {' or '.join(close)}?"
        if close
        else "`train_accelerate.py --help` lists them"
    )
    return f"{prefix}{key if len(key) < 80 else brief(key)}: no such field; {hint}"


def _check_consistency(recipe: Recipe) -> None:
    """Refuse fields that contradict each other."""
    if (recipe.num_steps is None) == (recipe.num_epochs is None):
        raise UserError("set exactly one of num_steps and num_epochs (the other to null)")
    if (recipe.dataset_name is None) == (recipe.datasets is None):
        raise UserError("set exactly one of dataset_name and datasets (the other to null)")
    if recipe.datasets and recipe.num_epochs:
        raise UserError("num_epochs: each of several datasets has epochs of its own; set num_steps")
    if recipe.order == "shuffled" and recipe.chunk_rows:
        raise UserError("chunk_rows is for order: file and build-nanogpt; set it to null")
    if recipe.num_validation_units is not None and recipe.validation_fraction is not None:
        raise UserError("set one of num_validation_units and validation_fraction, not both")
    if recipe.batch_tokens % recipe.sequence_length:
        nearest = (
            max(1, round(recipe.batch_tokens / recipe.sequence_length)) * recipe.sequence_length
        )
        raise UserError(
            f"batch_tokens {recipe.batch_tokens} is not a multiple of sequence_length "
            f"{recipe.sequence_length}; the nearest that fits is {nearest}"
        )
    check_lanes(recipe.num_lanes, rows_per_step=recipe.rows_per_step)
    begins = [begin for begin, _ in recipe.batch_multiples]
    if begins != sorted({*begins}):
        raise UserError(f"batch_multiples: its steps {begins} do not rise")
    _check_optimizer(recipe)
    if recipe.push_to_hub and not recipe.hub_model_id:
        raise UserError("push_to_hub needs hub_model_id: the user/name to upload to")
    if recipe.push_to_hub and recipe.hub_state and recipe.hub_strategy == "final":
        raise UserError("hub_state goes with checkpoints: set hub_strategy to permanent or all")
    if recipe.push_to_hub and recipe.hub_strategy == "permanent" and not recipe.keeps_any:
        raise UserError("hub_strategy permanent: say which with keep_every or keep_steps")
    where = recipe.run_dir.absolute()
    try:
        str(where).encode()
    except UnicodeEncodeError:
        raise UserError(f"output_dir: {where} is no UTF-8 name; take one that is") from None
    if (name := recipe.exp_name) and (Path(name).name != name or name == ".."):
        raise UserError(f"exp_name {brief(name)} must be a plain name; use output_dir for a path")
    for name in ("bf16_residual", "fp8_head"):
        if getattr(recipe, name) and recipe.mixed_precision != "bf16":
            raise UserError(f"{name} needs mixed_precision bf16")
    attention = recipe.attn_implementation
    if attention.startswith(("flash_attention", "sdpa_flash")) and recipe.mixed_precision != "bf16":
        raise UserError(f"attn_implementation {attention} needs mixed_precision bf16")
    if attention.startswith(("sdpa_flash", "flash_attention_3")) and recipe.dropout:
        raise UserError(f"attn_implementation {attention} knows no dropout: set it to 0")
    if recipe.max_autotune and not recipe.compile:
        raise UserError("max_autotune chooses among the compiler's kernels: it needs compile")


def _check_optimizer(recipe: Recipe) -> None:
    """Refuse rates that contradict each other, and what means nothing to the optimizer."""
    if recipe.min_lr > recipe.max_lr:
        raise UserError(f"min_lr {recipe.min_lr:g} is above max_lr {recipe.max_lr:g}")
    if recipe.matrix_cooldown_fraction is not None and recipe.schedule in ("cosine", "linear"):
        raise UserError("matrix_cooldown_fraction is for schedule: wsd and power; set it to null")
    for name in ("muon_normalize", "muon_heads"):
        if getattr(recipe, name) and recipe.optimizer != "muon":
            raise UserError(f"{name} needs optimizer muon")
    if recipe.matrix_lr_scale != 1 and recipe.optimizer == "muon":
        raise UserError("matrix_lr_scale is for optimizer: adamw; muon's matrices have muon_lr")


# What weights, optimizer state and rows depend on. The stream guards what else decides the data.
FIXED_BY_CHECKPOINT = (
    "model_size",
    "n_layer",
    "n_head",
    "n_embd",
    "sequence_length",
    "batch_tokens",
    "batch_multiples",
    "optimizer",
    "embedding_second_moment",
    "muon_normalize",
)


def refuse_changes(recipe: Recipe, saved: dict[str, Any]) -> None:
    """Raise `UserError` for a field that cannot change within a run that `saved` began."""
    for key, then, now in differences(recipe, saved):
        if key in FIXED_BY_CHECKPOINT:
            raise UserError(
                f"{key} is {now} but the checkpoint was made with {then}: set it back, "
                "or give another exp_name to start a new run"
            )


def differences(recipe: Recipe, saved: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """`(field, then, now)` of every field that decides the training and differs from `saved`."""
    ignored = ("resume", "output_dir", "exp_name")
    return [
        (key, saved[key], now)
        for key, now in recipe.model_dump().items()
        if key in saved and saved[key] != now and key not in ignored
    ]


# --- Batch arithmetic -----------------------------------------------------------------------------


def accumulation_steps(recipe: Recipe, world_size: int, micro_batch_size: int) -> int:
    """Forward passes per optimizer step on each of `world_size` processes.

    Raises:
        UserError: the division is not exact; the message lists the micro-batch sizes that fit.
    """
    check_lanes(recipe.num_lanes, rows_per_step=recipe.rows_per_step, world_size=world_size)
    rows = recipe.rows_per_step // world_size
    if rows % micro_batch_size:
        raise UserError(
            f"micro_batch_size {micro_batch_size} does not divide the {rows} rows that each of "
            f"{world_size} processes has per step; these would: "
            f"{', '.join(map(str, divisors(rows)))}"
        )
    return rows // micro_batch_size
