"""What a run reads: tokenizer, stream, held-out rows, benchmarks.

The verbs that speak of a recipe (`doctor`, `stream-stats`) open the same things through it, so what
they check is what the run will use.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2repro import UserError
from gpt2repro.data import demo_corpus
from gpt2repro.data.corpus import Corpus
from gpt2repro.data.documents import count_epoch_tokens
from gpt2repro.data.encoder import BulkEncoder
from gpt2repro.data.held_out import ValidationSet, validation_set
from gpt2repro.data.local_files import FORMAT_OF_SUFFIX
from gpt2repro.data.opening import open_corpus
from gpt2repro.data.size import tokens_per_byte, units_to_hold_out
from gpt2repro.data.stream import TokenStream
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.evaluation.benchmarks import open_tasks
from gpt2repro.evaluation.task import Task
from gpt2repro.recipe import Recipe
from gpt2repro.records.run_directory import Start
from gpt2repro.system import ranks
from gpt2repro.training.progress import phase

OFFLINE_ADVICE = "; --recipe recipes/demo.yaml trains without a network"


@dataclass(frozen=True)
class Inputs:
    """Everything opened, nothing trained on yet."""

    tokenizer: Any
    corpus: Corpus
    stream: TokenStream  # of this rank, at the row where the run begins
    validation: ValidationSet | None
    tasks: list[Task]  # benchmarks to be scored during training
    num_steps: int
    num_epochs: int | None  # as the recipe asked, before it was counted in steps
    num_validation_units: int
    tokens_per_byte: float | None  # of the corpus as stored, an estimate


def open_inputs(recipe: Recipe, start: Start) -> Inputs:
    """Open what the recipe names, at the place where the run begins.

    Raises:
        UserError: naming the field to change.
    """
    tokenizer = open_tokenizer(recipe)
    encoder = BulkEncoder(tokenizer)
    corpus = open_dataset(recipe, start.recipe.get("dataset_revision"))
    rate = ranks.on_rank_0(lambda: tokens_per_byte(corpus, encoder))
    if recipe.num_validation_units is None and recipe.validation_fraction is None:
        then = {"num_validation_units": start.recipe.get("num_validation_units")}
        recipe = recipe.model_copy(update=then)
    num_held_out = units_held_out(recipe, corpus, encoder, rate)
    recipe = recipe.model_copy(update={"num_validation_units": num_held_out})
    num_steps = _steps_of_run(recipe, start, corpus, encoder)
    stream = open_stream(recipe, corpus, encoder, ranks.rank(), ranks.world_size())
    _check_same_data(ranks.gather(stream.identity))
    if start.path is not None:
        stream.load_state_dict(start.state["stream"])
    return Inputs(
        tokenizer=tokenizer,
        corpus=corpus,
        stream=stream,
        validation=_open_validation(recipe, corpus, encoder),
        tasks=_open_benchmarks(recipe, tokenizer),
        num_steps=num_steps,
        num_epochs=recipe.num_epochs,
        num_validation_units=num_held_out,
        tokens_per_byte=rate,
    )


def from_anywhere(recipe: Recipe) -> dict[str, Any]:
    """The fields that name files here, as they are saved: from any working directory the same.

    What no file here is called stays as it is: a name of the Hub, of a format, of the demo.
    """

    def absolute(name: str | None) -> str | None:
        is_here = name and name != demo_corpus.NAME and Path(name).exists()
        return str(Path(name).absolute()) if name and is_here else name

    fields = ("dataset_name", "tokenizer_name", "init_from")
    found: dict[str, Any] = {field: absolute(getattr(recipe, field)) for field in fields}
    found["output_dir"] = str(recipe.run_dir.absolute())
    if recipe.token_cache_dir:
        found["token_cache_dir"] = str(Path(recipe.token_cache_dir).absolute())
    if recipe.eval_task_files:
        entries = (entry.partition("=") for entry in recipe.eval_task_files)
        found["eval_task_files"] = [f"{task}={Path(file).absolute()}" for task, _, file in entries]
    if recipe.data_files and found["dataset_name"] in FORMAT_OF_SUFFIX.values():
        # Else they are relative to the dataset.
        found["data_files"] = [
            file if "://" in file else str(Path(file).absolute()) for file in recipe.data_files
        ]
    return found


def open_tokenizer(recipe: Recipe) -> Any:
    return load_tokenizer(recipe.tokenizer_name, if_unreachable=OFFLINE_ADVICE)


def open_dataset(recipe: Recipe, revision: str | None = None) -> Corpus:
    """The recipe's text; `revision` is the commit that a resumed run had pinned."""
    return open_corpus(
        recipe.dataset_name,
        config=recipe.dataset_config,
        split=recipe.dataset_split,
        revision=recipe.dataset_revision or revision,
        data_files=recipe.data_files,
        text_column=recipe.text_column,
        document=recipe.document,
        if_unreachable=OFFLINE_ADVICE,
    )


def units_held_out(
    recipe: Recipe, corpus: Corpus, encoder: BulkEncoder, rate: float | None = None
) -> int:
    """The recipe's `num_validation_units`: as given, as a share, or as `units_to_hold_out` says.

    `rate`: `tokens_per_byte` of the corpus, if it is known.
    """
    if recipe.num_validation_units is not None:
        return recipe.num_validation_units
    if corpus.num_units == 1:
        raise UserError(
            "num_validation_units: the dataset is a single unit (row group, document), of which no "
            "part can be held out: set it to 0, or write the dataset in several"
        )
    if recipe.validation_fraction is not None:
        return max(1, round(recipe.validation_fraction * corpus.num_units))
    rate = rate or tokens_per_byte(corpus, encoder)
    return units_to_hold_out(corpus, recipe.validation_tokens, rate)


def open_stream(
    recipe: Recipe, corpus: Corpus, encoder: BulkEncoder, rank: int, world_size: int
) -> TokenStream:
    return TokenStream(
        corpus,
        encoder,
        sequence_length=recipe.sequence_length,
        rows_per_step=recipe.rows_per_step,
        num_lanes=recipe.num_lanes,
        num_validation_units=units_held_out(recipe, corpus, encoder),
        seed=recipe.seed,
        rank=rank,
        world_size=world_size,
        num_reader_threads=recipe.num_reader_threads,
        token_cache_dir=recipe.token_cache_dir,
    )


def _open_validation(recipe: Recipe, corpus: Corpus, encoder: BulkEncoder) -> ValidationSet | None:
    if not recipe.num_validation_units:
        return None
    return validation_set(
        corpus,
        encoder,
        sequence_length=recipe.sequence_length,
        num_units=recipe.num_validation_units,
        max_tokens=recipe.validation_tokens,
        num_reader_threads=recipe.num_reader_threads,
        token_cache_dir=recipe.token_cache_dir,
    )


def _open_benchmarks(recipe: Recipe, tokenizer: Any) -> list[Task]:
    return [
        task
        for name in dict.fromkeys(recipe.eval_tasks)
        for task in open_tasks(
            name,
            tokenizer,
            max_length=recipe.sequence_length,
            file=recipe.eval_task_file(name),
        )
    ]


def counted_steps(recipe: Recipe, start: Start) -> int | None:
    """`num_steps`, or `num_epochs` in steps if they were counted when the run began."""
    if recipe.num_steps is None and recipe.num_epochs == start.state.get("num_epochs"):
        return start.recipe.get("num_steps")
    return recipe.num_steps


def _steps_of_run(recipe: Recipe, start: Start, corpus: Corpus, encoder: BulkEncoder) -> int:
    num_steps = counted_steps(recipe, start)
    if num_steps is None:
        num_steps = _steps_of_epochs(recipe, corpus, encoder)
    if start.step > num_steps:
        raise UserError(
            f"num_steps {num_steps} is behind the checkpoint's {start.step}: raise it, or "
            "give another exp_name to start a new run"
        )
    return num_steps


def _steps_of_epochs(recipe: Recipe, corpus: Corpus, encoder: BulkEncoder) -> int:
    """`num_epochs` in optimizer steps, rounded down; the ranks share the counting."""
    assert recipe.num_epochs is not None and recipe.num_validation_units is not None
    rank, world_size = ranks.rank(), ranks.world_size()
    num_units = -(-(corpus.num_units - recipe.num_validation_units) // world_size)
    with phase("counting an epoch's tokens", num_units, enabled=rank == 0) as on_unit:
        counted = count_epoch_tokens(
            corpus,
            encoder,
            recipe.num_validation_units,
            rank=rank,
            world_size=world_size,
            num_reader_threads=recipe.num_reader_threads,
            token_cache_dir=recipe.token_cache_dir,
            on_unit=on_unit,
        )
    steps = sum(ranks.gather(counted)) * recipe.num_epochs // recipe.batch_tokens
    if steps == 0:
        raise UserError("num_epochs is less than one step: lower batch_tokens or raise num_epochs")
    return steps


def _check_same_data(identities: list[dict[str, Any]]) -> None:
    """Refuse processes that opened other data than rank 0: machines with files of their own."""
    first = identities[0]
    if differing := {key for each in identities for key in first if each.get(key) != first[key]}:
        raise UserError(
            f"the processes of this launch see different data ({', '.join(sorted(differing))}): "
            "every machine needs the same files and tokenizer, or a dataset_revision that stays"
        )
