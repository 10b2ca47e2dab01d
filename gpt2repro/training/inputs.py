"""What a run reads: tokenizer, stream, held-out rows, benchmarks.

The verbs that speak of a recipe (`doctor`, `rows`, `tokenize` ...) open the same things through it,
so what they check is what the run will use.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from gpt2repro import UserError
from gpt2repro.data import demo_corpus
from gpt2repro.data.corpora.corpus import Corpus
from gpt2repro.data.corpora.local_files import FORMAT_OF_SUFFIX
from gpt2repro.data.corpora.size import tokens_per_byte, units_to_hold_out
from gpt2repro.data.dataset import Dataset
from gpt2repro.data.opening import about, is_local, open_sources
from gpt2repro.data.rows.documents import count_epoch_tokens
from gpt2repro.data.rows.held_out import ValidationSet, together_held_out, validation_set
from gpt2repro.data.rows.mixture import Source
from gpt2repro.data.rows.order import Plan
from gpt2repro.data.rows.stream import TokenStream, refuse_different
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.encoder import BulkEncoder
from gpt2repro.evaluation.benchmarks import open_tasks
from gpt2repro.evaluation.task import Task
from gpt2repro.recipe_fields import MOST_STEPS, Recipe
from gpt2repro.records.run_directory import Start
from gpt2repro.system import ranks
from gpt2repro.training.progress import phase

logger = logging.getLogger(__name__)

LARGEST_UNREAD_SHARE = 0.02  # of an epoch: more is worth a line
LARGE_SHARE = 0.25  # of the text, held out: worth a line
OFFLINE_ADVICE = "; --recipe recipes/demo.yaml trains without a network"


@dataclass(frozen=True)
class Inputs:
    """Everything opened, nothing trained on yet."""

    tokenizer: Any
    sources: list[Source]
    stream: TokenStream  # of this rank, at the row where the run begins
    validation: ValidationSet | None
    tasks: list[Task]  # benchmarks to be scored during training
    num_steps: int
    num_epochs: int | None  # as the recipe asked, before it was counted in steps

    def uneven_epochs(self) -> str:
        """In words, where an epoch is far from reading everything once."""
        [plan, *others] = self.stream.plans
        if not self.num_epochs or others or not isinstance(plan, Plan):
            return ""
        if (share := plan.unread_share()) < LARGEST_UNREAD_SHARE:
            return ""
        return (
            f"The lanes have unequal parts of the text: of an epoch's tokens {share:.0%} are of "
            "documents read twice, and as many stay for the next; a smaller num_lanes evens it out."
        )


def open_inputs(recipe: Recipe, start: Start) -> Inputs:
    """Open what the recipe names, at the place where the run begins.

    Raises:
        UserError: naming the field to change.
    """
    tokenizer = open_tokenizer(recipe)
    encoder = BulkEncoder(tokenizer)
    sources = open_datasets(recipe, encoder, start.recipe)
    num_steps = _steps_of_run(recipe, start, sources, encoder)
    stream = open_stream(recipe, sources, encoder, ranks.rank(), ranks.world_size())
    refuse_different(ranks.gather(stream.identity))
    if start.path is not None:
        stream.load_state_dict(start.state["stream"])
    return Inputs(
        tokenizer=tokenizer,
        sources=sources,
        stream=stream,
        validation=ranks.on_rank_0(lambda: _open_validation(recipe, sources, encoder)),
        tasks=open_benchmarks(recipe, tokenizer),
        num_steps=num_steps,
        num_epochs=recipe.num_epochs,
    )


def from_anywhere(recipe: Recipe, sources: Sequence[Source] | None = None) -> dict[str, Any]:
    """The fields that name what is read, as they are saved: they mean the same later, anywhere.

    Files here are named from any working directory. What no file here is called stays as it is: a
    name of the Hub, of a format, of the demo. Of `sources` come the commits that are read.
    """
    fields = ("tokenizer_name", "init_from")
    found: dict[str, Any] = {field: _absolute(getattr(recipe, field)) for field in fields}
    found["output_dir"] = str(recipe.run_dir.absolute())
    for field in (
        *("token_cache_dir", "unit_digests_dir"),
        *("eval_tasks_dir", "core_dir", "hellaswag_file"),
    ):
        if directory := getattr(recipe, field):
            found[field] = str(Path(directory).absolute())
    datasets = [_placed(dataset) for dataset in recipe.all_datasets]
    for dataset, source in zip(datasets, sources or [], strict=sources is not None):
        dataset["revision"] = source.corpus.identity.get("revision")
        dataset["num_validation_units"] = source.num_validation_units
    if recipe.datasets:
        return found | {"datasets": datasets}
    [one] = datasets
    names = ("name", "revision"), ("data_files", "num_validation_units")
    of_one = {f"dataset_{name}": one[name] for name in names[0]} | {n: one[n] for n in names[1]}
    return found | of_one


def _absolute(name: str | None) -> str | None:
    is_here = name and name != demo_corpus.NAME and Path(name).exists()
    return str(Path(name).absolute()) if name and is_here else name


def _placed(dataset: Dataset) -> dict[str, Any]:
    """A dataset's fields, with files of this machine named from any working directory."""
    fields = dataset.model_dump() | {"name": _absolute(dataset.name)}
    if dataset.data_files and fields["name"] in FORMAT_OF_SUFFIX.values():
        # Else they are relative to the dataset.
        files = dataset.data_files
        fields["data_files"] = [f if "://" in f else str(Path(f).absolute()) for f in files]
    return fields


def open_tokenizer(recipe: Recipe) -> Any:
    return load_tokenizer(recipe.tokenizer_name, if_unreachable=OFFLINE_ADVICE)


def open_datasets(
    recipe: Recipe, encoder: BulkEncoder | None, saved: Mapping[str, Any] | None = None
) -> list[Source]:
    """The recipe's texts, with what is held out of each decided.

    Of the commits that `saved`, the recipe of a resumed run, has pinned, and with its decisions.
    Without an encoder nobody knows how many tokens a unit has.
    """
    datasets, saved = recipe.all_datasets, saved or {}
    one = {"name": saved.get("dataset_name"), "revision": saved.get("dataset_revision")}
    before = saved.get("datasets") or [{**saved, **one}]
    names = [(each.name, _absolute(each.name)) for each in datasets]
    before = [
        each if each.get("name") in own else {} for each, own in zip(before, names, strict=False)
    ]
    pinned = [each.get("revision") for each in before]
    found = open_sources(datasets, pinned, OFFLINE_ADVICE, _for_all_ranks)
    total = sum(source.weight for source in found)
    sources = []
    for dataset, source, then in zip_longest(datasets, found, before[: len(datasets)]):
        corpus = source.corpus
        rate = ranks.on_rank_0(partial(tokens_per_byte, corpus, encoder)) if encoder else None
        given = dataset.num_validation_units
        if given is None and recipe.validation_fraction is None and then:
            given = then.get("num_validation_units")
        num_tokens = int(recipe.validation_tokens * source.weight / total)
        with about(source.label):
            held_out = _units_held_out(recipe, given, corpus, num_tokens, rate)
        sources.append(replace(source, num_validation_units=held_out, tokens_per_byte=rate))
    return sources


def _units_held_out(
    recipe: Recipe, given: int | None, corpus: Corpus, num_tokens: int, rate: float | None
) -> int:
    """`num_validation_units`: as given, as a share, or as many as have about `num_tokens`."""
    if given is None and (corpus.num_held_out_units or recipe.order != "shuffled"):
        if recipe.validation_fraction is not None:
            raise UserError(
                "validation_fraction: what is held out of these shards their names say; set it to "
                "null"
            )
        return corpus.num_held_out_units
    if given is not None:
        return given
    if corpus.num_units == 1:
        raise UserError(
            "num_validation_units: the dataset is a single unit (row group, document), of which no "
            "part can be held out: set it to 0, or write the dataset in several"
        )
    if recipe.validation_fraction is not None:
        return max(1, round(recipe.validation_fraction * corpus.num_units))
    found = units_to_hold_out(corpus, num_tokens, rate)
    held_out, every = (corpus.total_bytes(range(n)) for n in (found, corpus.num_units))
    if held_out and every and held_out > LARGE_SHARE * every:
        logger.warning(
            "num_validation_units: the first %d units are held out and have %.0f %% of the text: "
            "set it to 0, or let a smaller text come first",
            *(found, 100 * held_out / every),
        )
    return found


def _for_all_ranks(name: str, open_corpus: Callable[[], Corpus]) -> Corpus:
    """Rank 0 asks the Hub, for all; files of this machine every rank opens, as machines differ."""
    if ranks.on_rank_0(lambda: is_local(name)):
        return open_corpus()
    return ranks.on_rank_0(open_corpus)


def open_stream(
    recipe: Recipe, sources: Sequence[Source], encoder: BulkEncoder, rank: int, world_size: int
) -> TokenStream:
    return TokenStream(
        sources,
        encoder,
        sequence_length=recipe.sequence_length,
        rows_per_step=recipe.rows_per_step,
        num_lanes=recipe.num_lanes,
        seed=recipe.seed,
        order=recipe.order,
        chunk_rows=recipe.chunk_rows,
        rank=rank,
        world_size=world_size,
        num_reader_threads=recipe.num_reader_threads,
        token_cache_dir=recipe.token_cache_dir,
        unit_digests_dir=recipe.unit_digests_dir,
    )


def _open_validation(
    recipe: Recipe, sources: Sequence[Source], encoder: BulkEncoder
) -> ValidationSet | None:
    """Held-out rows of every dataset that holds some out, as many as its weight has it."""
    held_out = [source for source in sources if source.num_validation_units]
    total = sum(source.weight for source in held_out)
    parts = []
    for source in held_out:
        num_tokens = int(recipe.validation_tokens * source.weight / total)
        with about(source.label):
            part = validation_set(
                source.corpus,
                encoder,
                sequence_length=recipe.sequence_length,
                num_units=source.num_validation_units,
                max_tokens=max(recipe.sequence_length, num_tokens),
                num_reader_threads=recipe.num_reader_threads,
                token_cache_dir=recipe.token_cache_dir,
                unit_digests_dir=recipe.unit_digests_dir,
            )
        parts.append(part)
    return together_held_out(parts) if parts else None


def open_benchmarks(recipe: Recipe, tokenizer: Any) -> list[Task]:
    return open_tasks(
        recipe.eval_tasks,
        tokenizer,
        max_length=recipe.sequence_length,
        option="eval_tasks",
        limit=recipe.eval_tasks_limit,
        tasks_dir=recipe.eval_tasks_dir,
        hellaswag_file=recipe.hellaswag_file,
        core_dir=recipe.core_dir,
    )


def counted_steps(recipe: Recipe, start: Start) -> int | None:
    """`num_steps`, or `num_epochs` in steps if they were counted when the run began."""
    if recipe.num_steps is None and recipe.num_epochs == start.state.get("num_epochs"):
        return start.recipe.get("num_steps")
    return recipe.num_steps


def _steps_of_run(
    recipe: Recipe, start: Start, sources: Sequence[Source], encoder: BulkEncoder
) -> int:
    num_steps = counted_steps(recipe, start)
    if num_steps is None:
        num_steps = _steps_of_epochs(recipe, sources[0], encoder)
    if start.step > num_steps:
        raise UserError(
            f"num_steps {num_steps} is behind the checkpoint's {start.step}: raise it, or "
            "give another exp_name to start a new run"
        )
    return num_steps


def _steps_of_epochs(recipe: Recipe, source: Source, encoder: BulkEncoder) -> int:
    """`num_epochs` in optimizer steps, rounded down; the ranks share the counting."""
    assert recipe.num_epochs is not None
    rank, world_size = ranks.rank(), ranks.world_size()
    num_units = -(-(source.corpus.num_units - source.num_validation_units) // world_size)
    with phase("counting an epoch's tokens", num_units, enabled=rank == 0) as on_unit:
        counted = count_epoch_tokens(
            source.corpus,
            encoder,
            source.num_validation_units,
            rank=rank,
            world_size=world_size,
            num_reader_threads=recipe.num_reader_threads,
            token_cache_dir=recipe.token_cache_dir,
            unit_digests_dir=recipe.unit_digests_dir,
            on_unit=on_unit,
        )
    batches = sum(ranks.gather(counted)) * recipe.num_epochs // recipe.batch_tokens
    steps = recipe.batches.steps_in(batches)
    if steps == 0:
        raise UserError("num_epochs is less than one step: lower batch_tokens or raise num_epochs")
    if steps > MOST_STEPS:
        raise UserError(f"num_epochs is {steps:,} steps, more than {MOST_STEPS:,}: lower it")
    return steps
