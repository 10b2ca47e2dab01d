"""A run put together: what the training loop holds, and how it comes to be from a recipe."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from gpt2repro import UserError
from gpt2repro.data.stream import Position, TokenStream, ValidationSet, validation_set
from gpt2repro.data.tokenizer import bulk_encoder
from gpt2repro.evaluation.tasks import Task
from gpt2repro.publishing.upload import BackgroundPush, check_hub_rights
from gpt2repro.recipe import (
    Recipe,
    ResolvedRecipe,
    accumulation_steps,
    differences,
    load_recipe,
    refuse_changes,
)
from gpt2repro.records import checkpoints
from gpt2repro.records.metrics import (
    MetricsLog,
    Progress,
    SpikeDetector,
    Throughput,
    flops_per_token,
    peak_flops,
)
from gpt2repro.records.run_directory import Resume, RunDirectory
from gpt2repro.system import machine, ranks
from gpt2repro.system.signals import StopRequest, end_with_launcher
from gpt2repro.training import parts


@dataclass
class Run:
    """The parts of a run on this rank."""

    argv: list[str]  # what the user typed
    recipe: ResolvedRecipe
    accelerator: Accelerator
    directory: RunDirectory
    tokenizer: Any
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    stream: TokenStream
    validation: ValidationSet | None
    hellaswag: list[Task]  # to be scored during training; none unless the recipe asks
    stop: StopRequest
    progress: Progress
    log: MetricsLog | None  # on the main process
    push: BackgroundPush | None  # on the main process, if the recipe asks
    throughput: Throughput
    spikes: SpikeDetector
    first_step: int
    saved_step: int  # the step of the newest checkpoint, -1 without one
    num_epochs: int | None  # as the recipe asked, before it was counted in steps
    lanes: dict[int, Position]  # where this rank's lanes go on after its last step

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        """End threads, files and trackers; what was saved stays saved."""
        self.progress.close()
        self.stream.close()
        if self.log is not None:
            self.log.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    @property
    def looks_for_signals_within_steps(self) -> bool:
        """Where asking costs nothing (one process) or steps may take minutes (CPUs)."""
        return ranks.world_size() == 1 or self.accelerator.device.type == "cpu"

    def write(self, record: dict[str, Any]) -> None:
        """A line in metrics.jsonl, and in the tracker if there is one."""
        if self.log is not None:
            self.log.write(record)
        if self.recipe.report_to != "none":
            scalars = {k: v for k, v in record.items() if isinstance(v, int | float)}
            self.accelerator.log(scalars, step=record["step"])

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors; gathers the lanes of all ranks."""
        lanes = {lane: at for each in ranks.gather(self.lanes) for lane, at in each.items()}
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "num_epochs": self.num_epochs,
            "world_size": self.accelerator.num_processes,
            "stream": self.stream.state_dict(lanes),
            "environment": machine.describe(self.accelerator.device.type),
        }


class AlreadyFinished(Exception):
    """There is nothing to train; the message says what is there and what one may want."""


def prepare(argv: list[str]) -> Run:
    """From the command line to a run that is ready to train, at its first step or where it stopped.

    Everything is checked, built and loaded before the run directory is touched.

    Raises:
        UserError: something in the recipe, the files, the Hub or the launch must be mended.
        AlreadyFinished: the run has all its steps and its export.
    """
    recipe = load_recipe(argv)
    end_with_launcher()
    accelerator = parts.start_engine(recipe)
    directory = RunDirectory(recipe.run_dir)
    resume: Resume = ranks.on_rank_0(lambda: directory.decide(recipe.resume))
    saved = resume.state.get("recipe", {})
    if resume.step == recipe.num_steps and ranks.on_rank_0(directory.final.is_dir):
        raise AlreadyFinished(
            f"{recipe.run_dir} is finished: {resume.step} of {recipe.num_steps} steps, and the "
            f"model is in {directory.final}. Nothing was changed. For another run give another "
            "--exp_name; to train this one on, a larger --num_steps."
        )

    refuse_changes(recipe, saved)

    tokenizer = parts.open_tokenizer(recipe)
    encoder = bulk_encoder(tokenizer)
    corpus = parts.open_dataset(recipe, saved.get("dataset_revision"))
    num_steps = recipe.num_steps
    if num_steps is None and recipe.num_epochs == resume.state.get("num_epochs"):
        num_steps = saved["num_steps"]  # counted when the run began
    if num_steps is None:
        num_steps = parts.steps_of_epochs(recipe, corpus, encoder)
    if resume.step > num_steps:
        raise UserError(
            f"num_steps {num_steps} is behind the checkpoint's {resume.step}: raise it, or "
            "give another exp_name to start a new run"
        )
    stream = parts.open_stream(recipe, corpus, encoder, ranks.rank(), ranks.world_size())
    check_same_data(ranks.gather(stream.identity))
    if resume.path is not None:
        stream.load_state_dict(resume.state["stream"])
    validation = None
    if recipe.num_validation_units:
        validation = validation_set(
            corpus,
            encoder,
            sequence_length=recipe.sequence_length,
            num_units=recipe.num_validation_units,
            max_tokens=recipe.validation_tokens,
            num_reader_threads=recipe.num_reader_threads,
            token_cache_dir=recipe.token_cache_dir,
        )

    hellaswag = parts.open_hellaswag(recipe, tokenizer)
    hub_model_id = recipe.hub_model_id if recipe.push_to_hub else None
    if hub_model_id is not None:
        ranks.on_rank_0(lambda: check_hub_rights(hub_model_id, private=recipe.hub_private))

    model = parts.build_model(recipe, tokenizer)
    num_parameters = model.num_parameters(exclude_embeddings=False)
    config = model.config
    model, optimizer = parts.place(recipe, accelerator, model)
    micro_batch_size = recipe.micro_batch_size
    if micro_batch_size == "auto" and resume.state.get("world_size") == ranks.world_size():
        micro_batch_size = int(saved["micro_batch_size"])
    if micro_batch_size == "auto":
        micro_batch_size = parts.largest_micro_batch(recipe, accelerator, model)
    accelerator.gradient_accumulation_steps = accumulation_steps(
        recipe, ranks.world_size(), micro_batch_size
    )
    resolved = recipe.resolved(
        num_steps=num_steps,
        micro_batch_size=micro_batch_size,
        output_dir=str(recipe.run_dir),
        dataset_revision=corpus.identity.get("revision"),
    )
    if resume.path is not None:
        checkpoints.load(resume.path, model=model, optimizer=optimizer)

    history = ranks.on_rank_0(lambda: directory.open(resume.step, resolved.save))
    spikes = SpikeDetector(line["loss"] for line in history if line.get("loss") is not None)
    main = accelerator.is_main_process
    if main:
        changes = [
            f"{key} was {then} until here and is {now} now"
            for key, then, now in differences(resolved, saved)
        ]
        show_facts(resolved, accelerator, num_parameters, [resume.note, *changes])
    start_tracker(resolved, accelerator)
    return Run(
        argv=argv,
        recipe=resolved,
        accelerator=accelerator,
        directory=directory,
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        stream=stream,
        validation=validation,
        hellaswag=hellaswag,
        stop=StopRequest(lambda flag: ranks.any_rank(flag, accelerator.device)),
        progress=Progress(first_step=resume.step, num_steps=num_steps, enabled=main),
        log=MetricsLog(directory.metrics) if main else None,
        push=BackgroundPush(hub_model_id, private=recipe.hub_private, tokenizer=tokenizer)
        if main and hub_model_id is not None
        else None,
        throughput=Throughput(
            flops_per_token(
                num_parameters - config.n_positions * config.n_embd,
                config.n_layer,
                config.n_embd,
                recipe.sequence_length,
            ),
            peak_flops(accelerator.device),
            accelerator.num_processes,
        ),
        spikes=spikes,
        first_step=resume.step,
        saved_step=resume.step if resume.path else -1,
        num_epochs=recipe.num_epochs,
        lanes=stream.lanes,
    )


def check_same_data(identities: list[dict[str, Any]]) -> None:
    """Refuse processes that opened other data than rank 0: machines with files of their own."""
    first = identities[0]
    if differing := {key for each in identities for key in first if each.get(key) != first[key]}:
        raise UserError(
            f"the processes of this launch see different data ({', '.join(sorted(differing))}): "
            "every machine needs the same files and tokenizer, or a dataset_revision that stays"
        )


def show_facts(
    recipe: ResolvedRecipe, accelerator: Accelerator, num_parameters: int, notes: list[str]
) -> None:
    """The first lines on the screen: what this run is, before hours are spent on it."""
    processes, rows = accelerator.num_processes, recipe.micro_batch_size
    accumulation = accelerator.gradient_accumulation_steps
    lines = {
        "run": f"{recipe.run_dir}",
        "model": f"GPT-2, {num_parameters / 1e6:.1f} M parameters, {recipe.sequence_length} tokens "
        "of context",
        "data": f"{recipe.dataset_name} {recipe.dataset_config or ''}".rstrip(),
        "batch": f"{recipe.batch_tokens:,} tokens = {processes} process(es) x {accumulation} "
        f"micro-batch(es) x {rows} rows x {recipe.sequence_length} tokens",
        "optimizer": f"{recipe.optimizer}, {recipe.num_steps:,} steps, "
        f"{recipe.num_steps * recipe.batch_tokens / 1e6:,.1f} M tokens in all",
        "engine": f"{accelerator.distributed_type.value.lower()} on "
        f"{machine.hardware(accelerator.device.type)}, "
        f"mixed_precision {recipe.mixed_precision}, compile {str(recipe.compile).lower()}",
    }
    for name, value in lines.items():
        print(f"{name:>10}  {value}")
    for note in filter(None, notes):
        print(f"{'note':>10}  {note}")
    print(flush=True)


def start_tracker(recipe: Recipe, accelerator: Accelerator) -> None:
    """Log in to the recipe's tracker, if it names one."""
    if recipe.report_to == "none":
        return
    try:
        accelerator.init_trackers("gpt2repro", config=tracked(recipe))
    except Exception as error:  # each has its own: no login, no network, a version
        raise UserError(f"report_to {recipe.report_to}: {error}; or set it to none") from error


def tracked(recipe: Recipe) -> dict[str, Any]:
    """The recipe as trackers take it: scalars and text only."""
    values = dataclasses.asdict(recipe).items()
    return {k: v if isinstance(v, int | float | str) else str(v) for k, v in values}
