"""The recipe: everything that decides a run, in one flat, typed, validated record.

Values come from three layers, the later winning: `recipes/gpt2.yaml`, which states every field and
is the reproduction itself; the chosen recipe, which states what it changes; the command line. All
three pass through the same checks. Rooms below `training` read no recipe: they are handed plain
values.

Nothing large is imported here: a misspelled option is answered before torch is. The layers are laid
over each other by hand, a dozen lines: a message names the layer and the field as the user spelled
them, setting one of the two lengths of a run replaces the other, and what belongs to a dataset goes
with it.
"""

import difflib
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from reprlib import repr as brief
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Len
from pydantic import (
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from gpt2repro import UserError
from gpt2repro.data.dataset import Dataset, Place, Text, held_out_of, split_at_commas
from gpt2repro.data.rows.lanes import Batches, check_lanes, divisors
from gpt2repro.system.command_line import place, underscored

DEFAULT_RECIPE = "gpt2"
MOST_BYTES = 2**18  # of a recipe; what is larger is something else
MOST_SHOWN = 10  # mistakes in one message

# --- Types: what pydantic takes for each, as YAML and the command line spell it -------------------


def _number(value: Any) -> Any:
    """YAML 1.1 reads 6e-4 as text, and Python takes True for 1."""
    if isinstance(value, bool):
        raise ValueError
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value  # which is refused


def _whole_number(value: Any) -> Any:
    return value if isinstance(value, str) and value.lstrip("+-").isdigit() else _number(value)


def _steps(value: Any) -> Any:
    """One step is typed as a number, several are one text."""
    is_one = isinstance(value, int) and not isinstance(value, bool)
    return [value] if is_one else split_at_commas(value)


def _no_as_a_word(value: Any) -> Any:
    """YAML reads a bare `no` as False, and `no` is what mixed_precision calls it."""
    return "no" if value is False else value


Number = Annotated[float, BeforeValidator(_number), AllowInfNan(False)]
WholeNumber = Annotated[int, BeforeValidator(_whole_number)]
Switch = Annotated[bool, Field(strict=True)]
Precision = Annotated[Literal["no", "bf16"], BeforeValidator(_no_as_a_word)]
Places = Annotated[list[Place], BeforeValidator(split_at_commas)]
Names = Annotated[list[Text], BeforeValidator(split_at_commas)]
Step = Annotated[WholeNumber, Ge(0), Le(10**9)]
Steps = Annotated[list[Step], BeforeValidator(_steps)]
Pair = list[Annotated[WholeNumber, Ge(1), Le(10**9)]]
Multiples = Annotated[list[Annotated[Pair, Len(2, 2)]], Len(0, 1000)]
Datasets = Annotated[list[Dataset], Field(min_length=1, max_length=1000)]


def knob(meaning: str, **limits: Any) -> Any:
    """A required field with its help text and the range a number must lie in (gt, ge, le)."""
    return Field(description=meaning, **limits)


class Recipe(BaseModel):
    """One pretraining run. Batches are counted in tokens, schedules in optimizer steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # The run
    exp_name: Place | None = knob("name of the run; null takes the recipe file's name")
    output_dir: Place | None = knob("where the run lives; null is runs/<exp_name>")
    seed: WholeNumber = knob("seeds the weights and the order of the data", ge=0, le=9 * 10**18)
    resume: Place = knob(
        "auto goes on from the newest valid checkpoint, never refuses a run that exists; or the "
        "directory of a checkpoint, or hub:user/name@step00001000"
    )
    init_from: Place | None = knob(
        "start from these weights (Hub id or directory) instead of random ones"
    )

    # Data
    dataset_name: Place | None = knob(
        "Hub id, local directory or file format of `datasets`; python-docs is the offline demo's; "
        "null for a mixture"
    )
    dataset_config: Text | None = knob("configuration of the dataset")
    dataset_split: Text = knob("split of the dataset")
    dataset_revision: Text | None = knob(
        "branch, tag or commit; pinned to the commit when the run starts"
    )
    data_files: Places | None = knob("files or glob patterns, if the dataset is given as files")
    text_column: Text = knob("the column that holds the text")
    document: Literal["file", "line"] | None = knob(
        "what is one in local .txt and .md files; null: a file if there are several, else a line"
    )
    datasets: Datasets | None = knob(
        "a mixture: for each dataset its name, weight (in tokens, 1 by default), and what differs "
        "from the default of config, split, revision, data_files, text_column, document, epochs "
        "(null: repeats), num_validation_units (null: as below)"
    )
    tokenizer_name: Place = knob(
        "Hub id or directory of the tokenizer; python-docs is the offline demo's"
    )
    order: Literal["shuffled", "file", "build-nanogpt"] = knob(
        "of documents; file: shards of token ids as llm.c reads them, build-nanogpt: as that does"
    )
    chunk_rows: Annotated[WholeNumber, Ge(1), Le(10**9)] | None = knob(
        "for those: rows that they read at once (micro-batch x processes); what is left of a "
        "shard and fewer is skipped; null: a step's"
    )
    num_lanes: WholeNumber = knob(
        "parallel reading positions; the number of processes must divide it", ge=1, le=10**6
    )
    num_validation_units: WholeNumber | None = knob(
        "row groups at the start of the dataset that are never trained on; null: as many as have "
        "about validation_tokens, at most a tenth",
        ge=0,
        le=10**9,
    )
    validation_fraction: Number | None = knob(
        "the share of the dataset's row groups that num_validation_units is to be", gt=0, le=0.5
    )
    validation_tokens: WholeNumber = knob("tokens of them an evaluation reads", ge=1, le=10**12)
    num_reader_threads: WholeNumber = knob("threads that fetch row groups ahead", ge=1, le=256)
    token_cache_dir: Place | None = knob("keep tokenized row groups here; null keeps none")
    unit_digests_dir: Place | None = knob(
        "keep a digest of each row group's text here, and refuse another text; null keeps none"
    )

    # Model
    model_size: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = knob(
        "one of the four published sizes"
    )
    n_layer: WholeNumber | None = knob("overrides the layers of model_size", ge=1, le=1000)
    n_head: WholeNumber | None = knob("overrides the attention heads of model_size", ge=1, le=1000)
    n_embd: WholeNumber | None = knob("overrides the width of model_size", ge=1, le=10**5)
    sequence_length: WholeNumber = knob("context length T in tokens", ge=1, le=10**6)
    dropout: Number = knob("dropout probability everywhere GPT-2 has it", ge=0, le=0.99)
    attn_implementation: Literal[
        "sdpa",
        "sdpa_flash_3",
        "sdpa_flash_4",
        "eager",
        "flex_attention",
        "flash_attention_2",
        "flash_attention_3",
    ] = knob(
        "transformers' attention implementation; sdpa_flash_3 and 4 are sdpa with the kernel of "
        "that package"
    )
    gradient_checkpointing: Switch = knob(
        "recompute activations in the backward pass to save memory"
    )

    # Batch and schedule
    batch_tokens: WholeNumber = knob("tokens of a step, over all processes", ge=1, le=10**9)
    batch_multiples: Multiples = knob(
        "[[step, n], ...]: from that step on each takes n times batch_tokens"
    )
    micro_batch_size: Annotated[WholeNumber, Ge(1), Le(10**9)] | Literal["auto"] = knob(
        "rows of one forward pass on one device; auto finds the largest that fits"
    )
    num_steps: WholeNumber | None = knob("optimizer steps; set this or num_epochs", ge=1, le=10**9)
    num_epochs: WholeNumber | None = knob(
        "passes over the training text, whose tokens are counted first", ge=1, le=10**6
    )
    schedule: Literal["cosine", "linear", "wsd", "power"] = knob(
        "of the learning rate after the warm-up; wsd and power stay at the peak until a cooldown"
    )
    warmup_steps: WholeNumber = knob("steps of linear warm-up", ge=0, le=10**9)
    cooldown_fraction: Number = knob(
        "of wsd and power: the share of the run's steps in which the rate falls", ge=0, le=1
    )
    matrix_cooldown_fraction: Number | None = knob(
        "of wsd and power: another one for the matrices; null: the same", ge=0, le=1
    )
    max_lr: Number = knob("peak learning rate", gt=0, le=1000)
    min_lr: Number = knob("learning rate at the end", ge=0, le=1000)

    # Optimizer
    optimizer: Literal["adamw", "muon"] = knob(
        "adamw, or muon on the hidden matrices with adamw on the rest"
    )
    adam_beta1: Number = knob("decay of Adam's mean", ge=0, le=0.999999)
    adam_beta2: Number = knob("decay of Adam's variance", ge=0, le=0.999999)
    adam_epsilon: Number = knob("Adam's denominator offset", gt=0, le=1)
    embedding_lr_scale: Number = knob(
        "times max_lr: the rate of the token embedding, which is also the head", gt=0, le=1000
    )
    position_lr_scale: Number = knob("the same for the position embedding", gt=0, le=1000)
    matrix_lr_scale: Number = knob("the same for the matrices under adamw", gt=0, le=1000)
    vector_lr_scale: Number = knob("the same for biases and layer norms", gt=0, le=1000)
    weight_decay: Number = knob("decoupled decay of matrices and embeddings", ge=0, le=1000)
    embedding_weight_decay: Number | None = knob(
        "another decay for the token embedding; null: the same", ge=0, le=1000
    )
    cautious_weight_decay: Switch = knob("decay a weight only where its update has its sign")
    scheduled_weight_decay: Switch = knob(
        "let the decay fall with the learning rate, by which it is multiplied anyway"
    )
    embedding_second_moment: Literal["element", "row", "factored"] = knob(
        "what Adam scales the token embedding's update by: the mean square of each value's "
        "gradient, of each token's, or Adafactor's product of rows and columns"
    )
    muon_lr: Number = knob(
        "peak learning rate of the matrices under muon; follows the same schedule", gt=0, le=1000
    )
    muon_momentum: Number = knob("momentum of muon", ge=0, le=0.999999)
    muon_momentum_warmup_steps: WholeNumber = knob(
        "steps in which muon's momentum rises from 0.85", ge=0, le=10**9
    )
    muon_normalize: Switch = knob("NorMuon: level the sizes of an update's rows")
    muon_heads: Switch = knob("orthogonalize each head's query, key and value map on its own")
    muon_weight_decay: Number = knob("decoupled decay of the matrices under muon", ge=0, le=1000)
    ema_decay: Number = knob(
        "of a moving average of the weights, exported too if better; 0: none", ge=0, le=0.9999
    )
    max_grad_norm: Number = knob("gradients are clipped to this global L2 norm", gt=0, le=1e30)

    # Engine
    mixed_precision: Precision = knob("autocast of the forward pass")
    compile: Switch = knob("torch.compile the model")
    max_autotune: Switch = knob(
        "let the compiler time several kernels for each product; costs minutes at every start"
    )
    bf16_residual: Switch = knob(
        "hold the residual stream in bfloat16: less memory to move, for sums that round to 8 bits"
    )
    fp8_head: Switch = knob(
        "multiply the output layer in 8 bits: for GPUs from compute capability 8.9 (Ada, Hopper) "
        "on; the gradient is coarser"
    )

    # What the run shows and keeps
    log_every: WholeNumber = knob("steps between lines in metrics.jsonl", ge=1, le=10**12)
    eval_every: WholeNumber = knob(
        "steps between validations; 0 validates at the start and the end only", ge=0, le=10**12
    )
    sample_every: WholeNumber = knob("steps between samples; 0 is never", ge=0, le=10**12)
    sample_prompt: Text = knob("what the samples continue")
    eval_tasks: Names = knob(
        "benchmarks scored during training: hellaswag_completion, core, or lm-evaluation-harness' "
        "names"
    )
    eval_tasks_every: WholeNumber = knob(
        "steps between them; 0 is at the end only", ge=0, le=10**12
    )
    eval_tasks_limit: WholeNumber | None = knob(
        "rows of each that are scored, the first ones; null is all", ge=1, le=10**9
    )
    eval_tasks_dir: Place | None = knob("directory of more of the harness' task files (YAML)")
    core_dir: Place | None = knob("directory of CORE's evaluation bundle")
    hellaswag_file: Place | None = knob("JSON lines for hellaswag_completion, not the Hub's")
    save_every: WholeNumber = knob("steps between checkpoints; 0: at the end", ge=0, le=10**12)
    keep_last: WholeNumber = knob("checkpoints kept, the newest", ge=1, le=10**9)
    keep_every: WholeNumber = knob(
        "steps between checkpoints that are saved and kept for good; 0: none", ge=0, le=10**9
    )
    keep_steps: Steps | Literal["log"] | None = knob(
        "more of them: a list of steps; log: 0, 1, 2, 4 and so on, up to keep_every if that is set"
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = knob("tracker of accelerate")

    # Publishing
    export_format: Literal["gpt2repro", "gpt2"] = knob(
        "of what is exported: native, with code for trust_remote_code, or stock"
    )
    push_to_hub: Switch = knob("upload the finished model, and checkpoints in the background")
    hub_model_id: Text | None = knob("user/name on the Hub, for push_to_hub")
    hub_private: Switch = knob("create the Hub repository private")
    hub_strategy: Literal["final", "permanent", "all"] = knob(
        "which checkpoints: none, permanent ones as branches such as step00000512, or all, the "
        "others as main"
    )
    hub_state: Switch = knob("upload the training state too, so that --resume hub:... goes on")

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any, info: Any) -> Any:
        """On the command line `null` is text; where nothing is allowed it means that."""
        nullable = NoneType in _alternatives(cls.model_fields[info.field_name].annotation)
        return None if value == "null" and nullable else value

    @property
    def rows_per_step(self) -> int:
        """Rows of `sequence_length` tokens in one batch, as a step has where it takes one."""
        return self.batch_tokens // self.sequence_length

    @property
    def batches(self) -> Batches:
        return Batches(self.batch_multiples)

    def tokens_before(self, step: int) -> int:
        """That all steps before `step` train on."""
        return self.batches.before(step) * self.batch_tokens

    @property
    def all_datasets(self) -> list[Dataset]:
        """What the run reads: `datasets`, or the one that the fields `dataset_...` name."""
        if self.datasets is not None:
            return [held_out_of(each, self.num_validation_units) for each in self.datasets]
        assert self.dataset_name is not None
        return [
            Dataset(
                name=self.dataset_name,
                config=self.dataset_config,
                split=self.dataset_split,
                revision=self.dataset_revision,
                data_files=self.data_files,
                text_column=self.text_column,
                document=self.document,
                num_validation_units=self.num_validation_units,
            )
        ]

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir or f"runs/{self.exp_name}")

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of `step` is permanent: saved, and never pruned."""
        if self._is_multiple(step):
            return True
        if self.keep_steps == "log":  # powers of two, and 0
            return step & (step - 1) == 0 and (not self.keep_every or step < self.keep_every)
        return step in (self.keep_steps or ())

    @property
    def keeps_any(self) -> bool:
        return bool(self.keep_every or self.keep_steps)

    def _is_multiple(self, step: int) -> bool:
        return self.keep_every > 0 and step > 0 and step % self.keep_every == 0

    def num_kept(self, num_steps: int) -> int:
        """How many permanent checkpoints a run of `num_steps` steps has at its end."""
        powers = {0, *(1 << n for n in range(num_steps.bit_length()))}
        named = powers if self.keep_steps == "log" else {*(self.keep_steps or ())}
        others = (step for step in named if step <= num_steps and not self._is_multiple(step))
        multiples = num_steps // self.keep_every if self.keep_every else 0
        return multiples + sum(map(self.keeps, others))

    def resolved(self, **decided: Any) -> "ResolvedRecipe":
        """This recipe with everything decided; epochs and shares have become steps and units."""
        undecided = {"num_epochs": None, "validation_fraction": None}
        return ResolvedRecipe(**(self.model_dump() | undecided | decided))

    def as_yaml(self) -> str:
        """Every field, in the order of this class."""
        fields = self.model_dump()
        text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
        if yaml.safe_load(text) != fields:  # PyYAML folds Unicode's line ends like its own
            text = yaml.safe_dump(fields, sort_keys=False)
        return text


class ResolvedRecipe(Recipe):
    """A recipe in which nothing is left to decide: what a run is made of and what it saves."""

    num_steps: int
    micro_batch_size: int


FIELDS = Recipe.model_fields


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
FORMER_NAMES = {"hellaswag_every": "eval_tasks_every"}  # what earlier recipes call a field
# What means nothing for another dataset: a layer that names one begins without.
OF_A_DATASET = ("dataset_config", "dataset_revision", "data_files", "num_validation_units")
# What an entry of `datasets` says for itself.
OF_AN_ENTRY = (
    *("dataset_config", "dataset_split", "dataset_revision"),
    *("data_files", "text_column", "document"),
)
GONE = {  # fields of earlier recipes -> what says the same
    "eval_task_files": "hellaswag_file for hellaswag_completion, or task files in eval_tasks_dir"
}


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
    """Inside the package; in a checkout this is a link to `recipes/`."""
    return Path(__file__).resolve().parent / "recipes"


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
    """YAML whose keys are given once, without merge keys, which can grow without bound."""

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
            raise UserError(
                f"unexpected argument {brief(word)}: options are --recipe FILE and --FIELD VALUE"
            )
        key, equals, text = underscored(word)[2:].partition("=")
        key = ALIASES.get(key, key)
        if not equals:
            if words and not words[0].startswith("--"):
                text = words.pop(0)
            elif key in FIELDS and bool in _alternatives(FIELDS[key].annotation):
                text = "true"
            elif key in FIELDS or key == "recipe":
                raise UserError(f"--{key} needs a value: {allowed(key)}")
        if key in values:
            raise UserError(f"--{key} is given twice")
        values[key] = _parse_value(text) if _is_yaml(key) else text
    return values


def _is_yaml(key: str) -> bool:
    """False for fields that take text: what is typed is it, and never a number."""
    return key in FIELDS and str not in _alternatives(FIELDS[key].annotation)


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
    for gone, now in GONE.items():
        if layer.pop(gone, None) not in (None, "null"):
            raise UserError(f"{prefix}{gone} is no more: give {now}")
    spelled = {}  # as the user did, where a field has a former name
    for former, key in FORMER_NAMES.items():
        if former in layer and key in layer:
            raise UserError(f"{prefix}{former} is what {key} was called: give one of them")
        if former in layer:
            layer[key], spelled[key] = layer.pop(former), former
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
                    f"{prefix}{spelled.get(key, key)}: {_shown(layer[key])} is not allowed"
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


def _alternatives(annotation: Any) -> list[Any]:
    """The types that an annotation unites, bare of their constraints."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (UnionType, Union):
        return [kind for each in get_args(annotation) for kind in _alternatives(each)]
    return [annotation]


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
    kinds = _alternatives(FIELDS[key].annotation)
    for kind in sorted(kinds, key=lambda each: each is not NoneType):
        if get_origin(kind) is Literal:
            words += get_args(kind)
        elif get_origin(kind) is list:
            (item,) = _alternatives(get_args(kind)[0])
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
    if (name := recipe.exp_name) and (Path(name).name != name or name == ".."):
        raise UserError(f"exp_name {brief(name)} must be a plain name; use output_dir for a path")
    for name in ("bf16_residual", "fp8_head"):
        if getattr(recipe, name) and recipe.mixed_precision != "bf16":
            raise UserError(f"{name} needs mixed_precision bf16")
    if recipe.max_autotune and not recipe.compile:
        raise UserError("max_autotune chooses among the compiler's kernels: it needs compile")


def _check_optimizer(recipe: Recipe) -> None:
    """Refuse rates that contradict each other, and what means nothing to the optimizer."""
    if recipe.min_lr > recipe.max_lr:
        raise UserError(f"min_lr {recipe.min_lr:g} is above max_lr {recipe.max_lr:g}")
    if recipe.matrix_cooldown_fraction is not None and recipe.schedule in ("cosine", "linear"):
        raise UserError("matrix_cooldown_fraction is for schedule: wsd and power; set it to null")
    for name in ("muon_normalize", "muon_heads", "muon_momentum_warmup_steps"):
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
# What a checkpoint was made with that is too old to say it.
BEFORE_THEM = {
    "batch_multiples": [],
    "schedule": "cosine",
    "embedding_second_moment": "element",
    "muon_normalize": False,
}


def as_saved(recipe: Recipe, saved: dict[str, Any]) -> Recipe:
    """`recipe` with what `saved`, that of a checkpoint, had in place of it."""
    return recipe.model_copy(update=BEFORE_THEM | saved if saved else {})


def refuse_changes(recipe: Recipe, saved: dict[str, Any]) -> None:
    """Raise `UserError` for a field that cannot change within a run that `saved` began."""
    for key, then, now in differences(recipe, BEFORE_THEM | saved if saved else {}):
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
