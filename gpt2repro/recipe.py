"""The recipe: everything that decides a run, in one flat, typed, validated record.

Values come from three layers, the later winning: `recipes/gpt2.yaml`, which states every field and
is the reproduction itself; the chosen recipe, which states what it changes; the command line. All
three pass through the same checks. No other module reads a recipe: they are handed plain values.
"""

import dataclasses
import difflib
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from gpt2repro import UserError

DEFAULT_RECIPE = "gpt2"


def knob(
    meaning: str,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
):
    """A required recipe field with its help text and the range a number must lie in."""
    return field(metadata={"help": meaning, "above": above, "least": least, "most": most})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One pretraining run. Batches are counted in tokens, schedules in optimizer steps."""

    # The run
    exp_name: str | None = knob("name of the run; null takes the recipe file's name")
    output_dir: str | None = knob("where the run lives; null is runs/<exp_name>")
    seed: int = knob("seeds the weights and the order of the data", least=0)
    resume: str = knob(
        "auto goes on from the newest valid checkpoint, never refuses a run that exists; or the "
        "directory of a checkpoint"
    )
    init_from: str | None = knob(
        "start from these weights (Hub id or directory) instead of random ones"
    )

    # Data
    dataset_name: str = knob(
        "Hub id, local directory or file format of `datasets`; python-docs is the offline demo's"
    )
    dataset_config: str | None = knob("configuration of the dataset")
    dataset_split: str = knob("split of the dataset")
    dataset_revision: str | None = knob(
        "branch, tag or commit; pinned to the commit when the run starts"
    )
    data_files: list[str] | None = knob(  # noqa: RUF009
        "files or glob patterns, if the dataset is given as files"
    )
    text_column: str = knob("the column that holds the text")
    tokenizer_name: str = knob(
        "Hub id or directory of the tokenizer; python-docs is the offline demo's"
    )
    num_lanes: int = knob(
        "parallel reading positions; the number of processes must divide it", least=1
    )
    num_validation_units: int = knob(
        "row groups at the start of the dataset that are never trained on", least=0
    )
    validation_tokens: int = knob("tokens of them that an evaluation reads", least=1)
    num_reader_threads: int = knob("threads that fetch row groups ahead", least=1, most=256)
    token_cache_dir: str | None = knob("keep tokenized row groups here; null keeps none")

    # Model
    model_size: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = knob(
        "one of the four published sizes"
    )
    n_layer: int | None = knob("overrides the number of layers of model_size", least=1)
    n_head: int | None = knob("overrides the number of attention heads of model_size", least=1)
    n_embd: int | None = knob("overrides the width of model_size", least=1)
    sequence_length: int = knob("context length T in tokens", least=1)
    dropout: float = knob("dropout probability everywhere GPT-2 has it", least=0, most=0.99)
    attn_implementation: Literal[
        "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"
    ] = knob("transformers' attention implementation")
    gradient_checkpointing: bool = knob("recompute activations in the backward pass to save memory")

    # Batch and schedule
    batch_tokens: int = knob("tokens of one optimizer step, over all processes", least=1)
    micro_batch_size: int | Literal["auto"] = knob(
        "rows of one forward pass on one device; auto finds the largest that fits", least=1
    )
    num_steps: int | None = knob("optimizer steps; set either this or num_epochs", least=1)
    num_epochs: int | None = knob(
        "passes over the training text, turned into steps by counting its tokens first", least=1
    )
    warmup_steps: int = knob("steps of linear warm-up", least=0)
    max_lr: float = knob("peak learning rate", above=0)
    min_lr: float = knob("learning rate at the end of the cosine decay", least=0)

    # Optimizer
    optimizer: Literal["adamw", "muon"] = knob(
        "adamw, or muon on the hidden matrices with adamw on the rest"
    )
    adam_beta1: float = knob("decay of Adam's mean", least=0, most=0.999999)
    adam_beta2: float = knob("decay of Adam's variance", least=0, most=0.999999)
    adam_epsilon: float = knob("Adam's denominator offset", above=0)
    weight_decay: float = knob("decoupled decay of matrices and embeddings", least=0)
    muon_lr: float = knob(
        "peak learning rate of the matrices under muon; follows the same schedule", above=0
    )
    muon_momentum: float = knob("momentum of muon", least=0, most=0.999999)
    muon_weight_decay: float = knob("decoupled decay of the matrices under muon", least=0)
    max_grad_norm: float = knob("gradients are clipped to this global L2 norm", above=0)

    # Engine
    mixed_precision: Literal["no", "bf16"] = knob("autocast of the forward pass")
    compile: bool = knob("torch.compile the model")

    # What the run shows and keeps
    log_every: int = knob("steps between lines in metrics.jsonl", least=1)
    eval_every: int = knob(
        "steps between validations; 0 validates at the start and the end only", least=0
    )
    sample_every: int = knob("steps between sampled continuations; 0 is never", least=0)
    sample_prompt: str = knob("what the samples continue")
    eval_tasks: list[Literal["hellaswag"]] = knob(  # noqa: RUF009
        "benchmarks scored during training"
    )
    hellaswag_every: int = knob(
        "steps between HellaSwag evaluations; 0 is at the end only", least=0
    )
    hellaswag_file: str | None = knob("local JSONL of HellaSwag; null takes it from the Hub")
    save_every: int = knob("steps between checkpoints; 0 saves at the end only", least=0)
    keep_last: int = knob("checkpoints kept", least=1)
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = knob("tracker of accelerate")

    # Publishing
    push_to_hub: bool = knob("upload the finished model, and each checkpoint in the background")
    hub_model_id: str | None = knob("user/name on the Hub, for push_to_hub")
    hub_private: bool = knob("create the Hub repository private")

    def __post_init__(self) -> None:
        check_consistency(self)

    @property
    def rows_per_step(self) -> int:
        """Rows of `sequence_length` tokens in one optimizer step."""
        return self.batch_tokens // self.sequence_length

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir or f"runs/{self.exp_name}")

    def resolved(self, **decided: Any) -> "ResolvedRecipe":
        """This recipe with everything decided; a length in epochs has become one in steps."""
        return ResolvedRecipe(**(dataclasses.asdict(self) | {"num_epochs": None} | decided))

    def save(self, path: Path) -> None:
        """Write every field as YAML, in the order of this class."""
        path.write_text(
            yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe(Recipe):
    """A recipe in which nothing is left to decide: what a run is made of and what it saves."""

    num_steps: int
    micro_batch_size: int


FIELDS = {f.name: f for f in dataclasses.fields(Recipe)}
TYPES = get_type_hints(Recipe)


# --- Reading ------------------------------------------------------------------------------------


def load_recipe(argv: list[str]) -> Recipe:
    """The recipe that a command line asks for: `--recipe NAME_OR_FILE` and `--FIELD VALUE` ...

    Raises:
        UserError: an unknown field, a value of the wrong type or out of range, an unreadable file.
    """
    overrides = parse_arguments(argv)
    name = overrides.pop("recipe", DEFAULT_RECIPE)
    path = find_recipe(name)
    checked_overrides = {key: checked(key, value, f"--{key}") for key, value in overrides.items()}
    values = read_recipe(find_recipe(DEFAULT_RECIPE)) | {"exp_name": None}
    for layer in (read_recipe(path), checked_overrides):
        values |= layer
        # A layer that sets one of the two lengths of a run means to replace the other.
        if layer.get("num_epochs") and "num_steps" not in layer:
            values["num_steps"] = None
        if layer.get("num_steps") and "num_epochs" not in layer:
            values["num_epochs"] = None
    missing = [key for key in FIELDS if key not in values]
    assert not missing, f"recipes/{DEFAULT_RECIPE}.yaml must state {missing}"
    if values["exp_name"] is None:
        values["exp_name"] = path.stem
    return Recipe(**values)


def recipes_directory() -> Path:
    """Inside the package; in a checkout this is a link to `recipes/`."""
    return Path(__file__).resolve().parent / "recipes"


def find_recipe(name: str) -> Path:
    """`name` as a file, else as the bare name of a recipe that ships."""
    path = Path(name)
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
    """The checked fields of one YAML file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--recipe {path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"--recipe {path}: a recipe is a mapping of fields to values, "
            f"not a {type(values).__name__}"
        )
    return {key: checked(str(key), value, f"{path}: {key}") for key, value in values.items()}


def parse_arguments(argv: list[str]) -> dict[str, Any]:
    """`--field value`, `--field=value`, `--fie-ld value`; a bare `--flag` is true. Values are YAML.

    Written out because the recipe file and the command line must agree on names, types and messages
    to the letter; an `argparse` parser of fifty generated options says it differently.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text())
        sys.exit(0)
    values: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(
                f"unexpected argument {word!r}: options are --recipe FILE and --FIELD VALUE"
            )
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            if words and not words[0].startswith("--"):
                text = words.pop(0)
            elif TYPES.get(key) is bool:
                text = "true"
            elif key in FIELDS or key == "recipe":
                raise UserError(f"--{key} needs a value: {allowed(key)}")
        if key in values:
            raise UserError(f"--{key} is given twice")
        values[key] = (
            text if key == "recipe" or key not in FIELDS or takes_text(key) else parse_value(text)
        )
        if key != "recipe" and key not in FIELDS:
            raise UserError(unknown(f"--{key}", key))
    return values


def takes_text(key: str) -> bool:
    """True for fields whose value on the command line is text as it stands, never a YAML number."""
    return str in alternatives(TYPES[key])


def parse_value(text: str) -> Any:
    try:
        return yaml.safe_load(text) if text else text
    except yaml.YAMLError:
        return text


def help_text() -> str:
    lines = [
        "usage: accelerate launch [...] train_accelerate.py [--recipe FILE] [--FIELD VALUE ...]",
        "",
        "  --recipe FILE",
        f"      a YAML file, or the name of a shipped recipe (default {DEFAULT_RECIPE})",
    ]
    for key, definition in FIELDS.items():
        lines += [f"  --{key}", f"      {definition.metadata['help']} [{allowed(key)}]"]
    return "\n".join(lines)


# --- Checking -----------------------------------------------------------------------------------


def checked(key: str, value: Any, where: str) -> Any:
    """`value` as the field's type, or a `UserError` that names `where` and what is allowed."""
    if key not in FIELDS:
        raise UserError(unknown(where, key))
    for kind in alternatives(TYPES[key]):
        try:
            converted = convert(kind, value)
        except (TypeError, ValueError):
            continue
        if in_range(converted, FIELDS[key].metadata):
            return converted
    raise UserError(f"{where}: {value!r} is not allowed; it takes {allowed(key)}")


def alternatives(kind: Any) -> list[Any]:
    """The members of a union, None first: on the command line `null` is never the text "null"."""
    members = get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)
    return sorted(members, key=lambda member: member is not NoneType)


def convert(kind: Any, value: Any) -> Any:
    """`value` as `kind`, without losing anything; raises ValueError or TypeError."""
    if kind is NoneType:
        if value is None or value == "null":
            return None
        raise ValueError
    if get_origin(kind) is Literal:
        # YAML reads a bare `no` as False, and `no` is what mixed_precision calls it.
        value = "no" if value is False and "no" in get_args(kind) else value
        if isinstance(value, str) and value in get_args(kind):
            return value
        raise ValueError
    if get_origin(kind) is list:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list):
            raise ValueError
        return [convert(get_args(kind)[0], item) for item in items if item != ""]
    if kind is str:
        if not isinstance(value, str) or not value:
            raise ValueError
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError
        return value
    if isinstance(value, bool) or value is None:
        raise ValueError
    number = float(value)  # YAML 1.1 reads 6e-4 as a string
    if not math.isfinite(number):
        raise ValueError
    if kind is int:
        if number != int(number):
            raise ValueError
        return (
            int(value)
            if isinstance(value, int | str) and str(value).lstrip("+-").isdigit()
            else int(number)
        )
    return number


def in_range(value: Any, limits: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    above, least, most = limits["above"], limits["least"], limits["most"]
    return (
        (above is None or value > above)
        and (least is None or value >= least)
        and (most is None or value <= most)
    )


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
    for kind in alternatives(TYPES[key]):
        if get_origin(kind) is Literal:
            words += get_args(kind)
        elif get_origin(kind) is list:
            item = get_args(kind)[0]
            words.append(
                f"a list of {', '.join(get_args(item)) if get_origin(item) is Literal else 'text'}"
            )
        else:
            words.append(names[kind])
    limits = FIELDS[key].metadata
    bounds = [
        f"{word} {limits[name]:g}"
        for name, word in (("above", "above"), ("least", "at least"), ("most", "at most"))
        if limits[name] is not None
    ]
    return " or ".join(words) + (f", {' and '.join(bounds)}" if bounds else "")


def unknown(where: str, key: str) -> str:
    close = difflib.get_close_matches(key, FIELDS, n=3)
    hint = (
        f"did you mean {' or '.join(close)}?"
        if close
        else "`train_accelerate.py --help` lists them"
    )
    return f"{where}: no such field; {hint}"


def check_consistency(recipe: Recipe) -> None:
    """Refuse fields that contradict each other."""
    if (recipe.num_steps is None) == (recipe.num_epochs is None):
        raise UserError("set exactly one of num_steps and num_epochs (the other to null)")
    if recipe.batch_tokens % recipe.sequence_length:
        nearest = (
            max(1, round(recipe.batch_tokens / recipe.sequence_length)) * recipe.sequence_length
        )
        raise UserError(
            f"batch_tokens {recipe.batch_tokens} is not a multiple of sequence_length "
            f"{recipe.sequence_length}; the nearest that fits is {nearest}"
        )
    if recipe.rows_per_step % recipe.num_lanes:
        fits = [n for n in divisors(recipe.rows_per_step) if n <= 2 * recipe.num_lanes]
        raise UserError(
            f"num_lanes {recipe.num_lanes} does not divide the {recipe.rows_per_step} rows of a "
            f"step (batch_tokens / sequence_length); these would: {', '.join(map(str, fits))}"
        )
    if recipe.min_lr > recipe.max_lr:
        raise UserError(f"min_lr {recipe.min_lr:g} is above max_lr {recipe.max_lr:g}")
    if recipe.push_to_hub and not recipe.hub_model_id:
        raise UserError("push_to_hub needs hub_model_id: the user/name to upload to")
    if recipe.exp_name and Path(recipe.exp_name).name != recipe.exp_name:
        raise UserError(
            f"exp_name {recipe.exp_name!r} must be a plain name; use output_dir for a path"
        )


# What weights, optimizer state and rows depend on. The stream guards what else decides the data.
FIXED_BY_CHECKPOINT = (
    "model_size",
    "n_layer",
    "n_head",
    "n_embd",
    "sequence_length",
    "batch_tokens",
    "optimizer",
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
    now = dataclasses.asdict(recipe)
    ignored = ("resume", "output_dir", "exp_name")
    return [
        (key, saved[key], now[key])
        for key in now
        if key in saved and saved[key] != now[key] and key not in ignored
    ]


# --- Batch arithmetic ---------------------------------------------------------------------------


def accumulation_steps(recipe: Recipe, world_size: int, micro_batch_size: int) -> int:
    """Forward passes per optimizer step on each of `world_size` processes.

    Raises:
        UserError: the division is not exact; the message lists the micro-batch sizes that fit.
    """
    check_world_size(recipe, world_size)
    rows = recipe.rows_per_step // world_size
    if rows % micro_batch_size:
        raise UserError(
            f"micro_batch_size {micro_batch_size} does not divide the {rows} rows that each of "
            f"{world_size} processes has per step; these would: "
            f"{', '.join(map(str, divisors(rows)))}"
        )
    return rows // micro_batch_size


def check_world_size(recipe: Recipe, world_size: int) -> None:
    """Refuse a number of processes among which the lanes cannot be dealt evenly."""
    if recipe.num_lanes % world_size:
        raise UserError(
            f"num_lanes {recipe.num_lanes} is not divisible by the {world_size} processes of this "
            f"launch; launch {', '.join(map(str, divisors(recipe.num_lanes)))} processes, "
            "or change num_lanes"
        )


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
