"""The recipe's fields: all that decides a run, typed, each with its meaning and its range.

recipe.py reads and checks them. Rooms below `training` see no recipe: they are handed plain values.
"""

from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Le, Len
from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from gpt2repro.data.dataset import Dataset, Place, Text, held_out_of, number, split_at_commas
from gpt2repro.data.rows.lanes import Batches

# --- Types: what pydantic takes for each, as YAML and the command line spell it -------------------


def _whole_number(value: Any) -> Any:
    return value if isinstance(value, str) and value.lstrip("+-").isdigit() else number(value)


def _steps(value: Any) -> Any:
    """One step is typed as a number, several are one text."""
    is_one = isinstance(value, int) and not isinstance(value, bool)
    return [value] if is_one else split_at_commas(value)


def _no_as_a_word(value: Any) -> Any:
    """YAML reads a bare `no` as False, and `no` is what mixed_precision calls it."""
    return "no" if value is False else value


MOST_STEPS = 10**8 - 1  # a checkpoint's name has eight digits
Number = Annotated[float, BeforeValidator(number), AllowInfNan(False)]
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


def alternatives(annotation: Any) -> list[Any]:
    """The types that an annotation unites, bare of their constraints."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (UnionType, Union):
        return [kind for each in get_args(annotation) for kind in alternatives(each)]
    return [annotation]


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
    num_steps: WholeNumber | None = knob(
        "optimizer steps; set this or num_epochs",
        ge=1,
        le=MOST_STEPS,
    )
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
    hub_private: Switch = knob("create the Hub repository private; else as its organization has it")
    hub_strategy: Literal["final", "permanent", "all"] = knob(
        "which checkpoints: none, permanent ones as branches such as step00000512, or all, the "
        "others as main"
    )
    hub_state: Switch = knob("upload the training state too, so that --resume hub:... goes on")

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any, info: Any) -> Any:
        """On the command line `null` is text; where nothing is allowed it means that."""
        nullable = NoneType in alternatives(cls.model_fields[info.field_name].annotation)
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
