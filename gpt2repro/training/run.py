"""A run put together: what the training loop holds, and how it comes to be from a recipe."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator

from gpt2repro import UserError
from gpt2repro.data.rows.order import LaneState
from gpt2repro.data.rows.producer import StepRows, joined
from gpt2repro.evaluation.published import published_loss
from gpt2repro.publishing import background
from gpt2repro.publishing.background import BackgroundPush
from gpt2repro.publishing.branches import refuse_another_run
from gpt2repro.publishing.card import model_card
from gpt2repro.publishing.upload import check_hub_rights
from gpt2repro.recipe import refuse_changes
from gpt2repro.recipe_fields import Recipe, ResolvedRecipe
from gpt2repro.records import checkpoints
from gpt2repro.records.integrity import is_whole
from gpt2repro.records.metrics import read_metrics
from gpt2repro.records.provenance import branch_of
from gpt2repro.records.run_directory import RunDirectory, Start
from gpt2repro.system import machine, ranks
from gpt2repro.system.command_line import underway
from gpt2repro.system.signals import StopRequest
from gpt2repro.training.engine import (
    LONGEST_WAIT_SECONDS,
    LOOP_WAIT_SECONDS,
    start_engine,
)
from gpt2repro.training.inputs import Inputs, counted_steps, from_anywhere, open_inputs
from gpt2repro.training.learner import Learner, open_learner
from gpt2repro.training.monitor import Monitor
from gpt2repro.training.saving import Checkpoints
from gpt2repro.training.schedule import (
    endless_warmup,
    is_saved,
    jump,
    set_rates,
    stable_until,
    stays,
)
from gpt2repro.training.step import LaunchedStep, next_rows, train_step
from gpt2repro.training.tracker import find_tracker


@dataclass
class Run:
    """The parts of a run on this rank."""

    recipe: ResolvedRecipe
    directory: RunDirectory
    inputs: Inputs
    learner: Learner
    monitor: Monitor
    checkpoints: Checkpoints
    stop: StopRequest
    lanes: dict[int, LaneState]  # where this rank's lanes go on after its last step
    launch: machine.Launch
    failure: Exception | None = None  # why it cannot go on, although what it has can be saved

    @property
    def accelerator(self) -> Accelerator:
        return self.learner.accelerator

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """End threads, files and trackers; what was saved stays saved.

        A rank that fails waits for none of them, its peers wait for it; but for a checkpoint that
        it is writing.
        """
        if error is None:
            self.wait_for_checkpoint()
        self.checkpoints.close()
        if error is not None and ranks.world_size() == 1:
            with suppress(Exception):  # what is told may say why
                self.monitor.catch_up()
        self.monitor.close()
        self.directory.close()
        if error is not None and ranks.world_size() > 1:
            return
        self.inputs.stream.close()
        self.monitor.tracker.close()

    def next_rows(self, step: int) -> StepRows | None:
        """This rank's rows of `step`; None if a stop was agreed on, or any rank failed."""
        batches: list[StepRows] = []
        if self.failure is not None:
            return None
        try:
            for _ in range(self.recipe.batches.of(step)):
                batch = next_rows(self.inputs.stream, self.stop.poll, self._check)
                if batch is None:
                    return None
                batches.append(batch)
        except Exception as error:
            self.failure = error
            return None
        return joined(batches)

    def _check(self) -> None:
        self.directory.check_still_there()
        self.checkpoints.check()

    def train_step(self, step: int, rows: StepRows) -> LaunchedStep | None:
        """One optimizer step; None, and nothing changed, if a stop was agreed on within it."""
        lr = set_rates(self.learner.optimizer, self.recipe, step)
        result = train_step(self.learner, rows, lr, self.stop.poll)
        if result is not None:
            self.lanes = rows.lanes
            self.checkpoints.chain.add(result.rows_digest, remember=self.recipe.keeps_any)
            if step == self.checkpoints.first_step:
                self.learner.settle()
                ranks.wait_at_most(LOOP_WAIT_SECONDS)
        return result

    def saves_before(self, step: int) -> bool:
        """Whether a checkpoint is due before the first step of a launch, as one that stays."""
        return stays(self.recipe, step)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due when `step` is done."""
        return is_saved(self.recipe, step + 1)

    def save(self, step: int) -> None:
        """A checkpoint of the state before `step`, once, after all that led to it is told.

        It is written beside the steps that follow. If the one before could not be, this one makes
        up for it, and the run ends with its `failure`.
        """
        with self.monitor.saving():
            self.wait_for_checkpoint()
        is_lost = self.directory.restore(self.recipe.as_yaml())
        if step == self.checkpoints.saved_step and not ranks.any_rank(is_lost):
            return
        self.monitor.catch_up()
        ranks.wait_at_most(LONGEST_WAIT_SECONDS)  # the disk of rank 0 may be slow
        with self.monitor.saving():
            at_its_end = step == stable_until(self.recipe)
            self.checkpoints.save(step, self.learner, self._state(step), stable=at_its_end)
        if step > self.checkpoints.first_step:  # else the first step is still to come, see there
            ranks.wait_at_most(LOOP_WAIT_SECONDS)

    def wait_for_checkpoint(self) -> None:
        """Until the last one is on the disk; what kept it from getting there is a `failure`."""
        if self.checkpoints.in_flight:
            ranks.wait_at_most(LONGEST_WAIT_SECONDS)
            try:
                self.checkpoints.wait()
            except UserError as error:
                self.failure = self.failure or error
                self.monitor.progress.note(str(error))

    def _state(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds besides tensors; gathers the lanes of all ranks."""
        lanes = {lane: at for each in ranks.gather(self.lanes) for lane, at in each.items()}
        return {
            "recipe": self.recipe.model_dump(),
            "permanent": self.recipe.keeps(step),
            "commit": self.launch.commit,
            "chain": self.checkpoints.chain.model_dump(),
            "metrics_lines": self.monitor.make_durable(),
            "tracker": told.model_dump() if (told := self.monitor.tracker.run) else None,
            "num_epochs": self.inputs.num_epochs,
            "world_size": self.accelerator.num_processes,
            "fitted_to": self.learner.fitted_to,
            "stream": self.inputs.stream.state_dict(lanes),
            "environment": machine.describe(self.accelerator.device.type),
        }


class AlreadyFinished(Exception):
    """There is nothing to train; the message says what is there and what one may want."""


def open_run(recipe: Recipe, argv: list[str], monitor: Callable[..., Monitor] = Monitor) -> Run:
    """From a recipe to a run that is ready to train, at its first step or where it stopped.

    Everything is checked, built and loaded before the run directory is touched.

    Args:
        argv: what the user typed, for the model card.
        monitor: what tells of the run, built as `Monitor` is.

    Raises:
        UserError: something in the recipe, the files, the Hub or the launch must be mended.
        AlreadyFinished: the run has all its steps and its export.
    """
    launch = machine.launch(argv)
    accelerator = start_engine(recipe)
    directory = RunDirectory(recipe.run_dir)
    try:
        start = _find_start(recipe, directory)
        with underway("Opening tokenizer and text ..."):
            inputs = open_inputs(recipe, start)
        with underway("Building the model ..."):
            learner = open_learner(recipe, accelerator, inputs.tokenizer, start)
        return _claim(recipe, directory, start, inputs, learner, monitor, launch)
    except BaseException:
        directory.close()
        raise


def _find_start(recipe: Recipe, directory: RunDirectory) -> Start:
    """Where the run begins. Nothing is written here; the Hub is asked for the run's repository."""
    start: Start = ranks.on_rank_0(lambda: _before_cooldown(recipe, directory))
    ended = start.path is not None and start.step == counted_steps(recipe, start)
    if ended and ranks.on_rank_0(lambda: directory.is_finished(start.step)):
        raise AlreadyFinished(
            f"{recipe.run_dir} is finished: {start.step} of {start.step} steps, and the "
            f"model is in {directory.final}. Nothing was changed. For another run give another "
            "--exp_name; to train this one on, a larger --num_steps."
        )
    refuse_changes(recipe, start.recipe)
    if (name := recipe.hub_model_id) and recipe.push_to_hub:
        exists = ranks.on_rank_0(lambda: check_hub_rights(name, private=recipe.hub_private))
        if exists and start.path is None and recipe.hub_strategy != "final":
            ranks.on_rank_0(lambda: refuse_another_run(name))
    return start


def _before_cooldown(recipe: Recipe, directory: RunDirectory) -> Start:
    """Where to go on; if this run is to be longer than one that has begun to cool down, before it.

    Also if nothing later is left, as of a run that was killed soon after it went back there.
    """
    start = directory.find_start(recipe.resume)
    if recipe.resume != "auto":
        return start
    # The checkpoint's recipe, with this one's fields where it has none yet.
    before, num_steps = recipe.model_copy(update=start.recipe), counted_steps(recipe, start)
    if num_steps is None:  # epochs that are not counted yet; the run may have had none
        is_longer = (recipe.num_epochs or 0) > (start.state.get("num_epochs") or 0)
    else:
        is_longer = num_steps > (before.num_steps or 0)
    has_cooled = is_longer and start.step > (stable_until(before) or start.step)
    if start.path and not has_cooled and not checkpoints.newer(directory.stable, start.step):
        return start
    path, broken = checkpoints.find_latest(directory.stable)
    if path is None:
        notes = [f"stable/{each.name} is passed over: {why}." for each, why in broken.items()]
        return replace(start, note=" ".join([*notes, start.note]))
    state = checkpoints.state_of(path)
    is_behind = start.step < state["step"] <= (stable_until(recipe) or 0)
    if start.path and not has_cooled and not is_behind:
        return start
    note = f"{recipe.run_dir} exists: going on from step {state['step']}, before its cooldown."
    return Start(path, state, note)


def _claim(
    recipe: Recipe,
    directory: RunDirectory,
    start: Start,
    inputs: Inputs,
    learner: Learner,
    monitor: Callable[..., Monitor],
    launch: machine.Launch,
) -> Run:
    """Write to the directory for the first time, and say what this run is."""
    resolved = recipe.resolved(
        num_steps=inputs.num_steps,
        micro_batch_size=learner.micro_batch_size,
        **from_anywhere(recipe, inputs.sources),
    )
    tracker = ranks.on_rank_0(lambda: find_tracker(resolved, directory, start))
    history: list[dict[str, Any]] = []  # of rank 0 alone: after a million steps it is a gigabyte
    text = resolved.as_yaml()
    ranks.on_rank_0(lambda: history.extend(directory.open(start.step, text, start=start.path)))
    newest = directory.taken_in(start.path)
    own = [place.resolve() for place in (directory.checkpoints, directory.stable)]
    is_own = newest is not None and newest.resolve().parent in own
    remarks = [start.note, endless_warmup(resolved)]
    if not start.path:
        remarks.append(inputs.uneven_epochs())
    else:
        remarks.append(jump(resolved, recipe.model_copy(update=start.recipe), start.step))
    start = replace(start, note=" ".join(filter(None, remarks)))
    # May ask for a login: signals end the process.
    ranks.on_rank_0(
        lambda: tracker.log_in(resolved, learner.accelerator, directory.tracker, history)
    )
    stop = StopRequest(ranks.any_rank)
    becomes_permanent = recipe.keeps(start.step) and not start.state.get("permanent")
    lacks_stable = start.step == stable_until(resolved) and not ranks.on_rank_0(
        lambda: is_whole(checkpoints.checkpoint_path(directory.stable, start.step))
    )
    is_saved = bool(start.path) and not becomes_permanent and not lacks_stable
    again = is_own and not is_saved
    return Run(
        recipe=resolved,
        directory=directory,
        inputs=inputs,
        learner=learner,
        monitor=monitor(resolved, directory, inputs, learner, tracker, stop, start, history),
        checkpoints=Checkpoints(
            directory=directory,
            recipe=resolved,
            newest=newest,
            first_step=start.step,
            saved_step=start.step if is_saved else -1,
            chain=ranks.on_rank_0(
                lambda: checkpoints.chain_after(newest, is_own=is_own, again=again)
            ),
            push=_open_push(resolved, directory, start, inputs, learner, launch),
        ),
        stop=stop,
        lanes=inputs.stream.lanes,
        launch=launch,
    )


def _open_push(
    recipe: ResolvedRecipe,
    directory: RunDirectory,
    start: Start,
    inputs: Inputs,
    learner: Learner,
    launch: machine.Launch,
) -> BackgroundPush | None:
    """What uploads beside the training, on the main process, if the recipe asks for it.

    It begins with the permanent checkpoints that an earlier launch did not get there.
    """
    name = recipe.hub_model_id
    if not recipe.push_to_hub or name is None or ranks.rank() != 0:
        return None
    if recipe.hub_strategy == "final":
        return BackgroundPush(name, private=recipe.hub_private)

    def tell(step: int) -> background.Told:
        lines = [line for line in read_metrics(directory.metrics) if line["step"] < step]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        return background.Told(card_of(recipe, learner, launch, lines, step=step), text)

    how = background.Checkpoints(inputs.tokenizer, recipe.export_format, recipe.hub_state, tell)
    private, step = recipe.hub_private, start.step
    push = BackgroundPush(name, private=private, checkpoints=how, going_on_from=step)
    for step, path in checkpoints.permanent_ones(directory.checkpoints):
        push.submit(path, f"Step {step}", branch_of(step))
    return push


def card_of(
    recipe: ResolvedRecipe,
    learner: Learner,
    launch: machine.Launch,
    metrics: list[dict[str, Any]],
    loss_curve: str | None = None,
    averaged: str | None = None,
    step: int | None = None,
) -> str:
    """The card of the model that has come to the end of `metrics`, or of a checkpoint before."""
    return model_card(
        name=str(recipe.exp_name),
        recipe=recipe.model_dump(),
        num_parameters=learner.num_parameters,
        environment=machine.describe(learner.accelerator.device.type),
        metrics=metrics,
        step=step,
        command=launch.command,
        commit=launch.commit,
        num_processes=learner.accelerator.num_processes,
        loss_curve=loss_curve,
        averaged=averaged,
        published_loss=published_loss(recipe.model_dump()),
    )
