"""What a tracker is told of a run: each step once, and as one run there.

A run that goes on, here or on another machine, goes on in the tracker. Steps that come again after
a kill are not told again. If they come otherwise (the run was sent back to an earlier checkpoint,
or has other settings now), they are told to another run there, named for the step at which it
leaves the first one; it begins with the lines before. TensorBoard takes steps back, and has one.
"""

import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from importlib import import_module
from pathlib import Path
from textwrap import indent
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from pydantic import BaseModel

from gpt2repro import UserError
from gpt2repro.recipe import differences
from gpt2repro.recipe_fields import ResolvedRecipe
from gpt2repro.records import checkpoints
from gpt2repro.records.metrics import read_metrics
from gpt2repro.records.run_directory import RunDirectory, Start, saved_recipe
from gpt2repro.system import atomic, command_line
from gpt2repro.system.threads import StillRunning, within

# Fields on which no figure depends, whatever they are when a run goes on.
MEAN_NOTHING = {
    *("micro_batch_size", "num_reader_threads", "token_cache_dir", "unit_digests_dir"),
    *("save_every", "keep_last", "keep_every", "keep_steps"),
    *("push_to_hub", "hub_model_id", "hub_private", "hub_strategy", "hub_state"),
}
# Where the run of a tracker says which step would be its next.
NEXT_STEP = {"wandb": "step", "trackio": "_next_step"}
FINISH_SECONDS = 30.0  # of the two minutes that a scheduler may give for all


def check_tracker(name: str) -> None:
    """Refuse a tracker whose package is missing; accelerate would go on without a word."""
    available = {getattr(each, "value", each) for each in get_available_trackers()}
    if name != "none" and name not in available:
        raise UserError(
            f"report_to {name}: its package is not installed; `pip install {name}`, or set "
            "report_to to none (metrics.jsonl has every figure)"
        )


class TrackerRun(BaseModel):
    """A run of a tracker, as tracker.json and checkpoints remember it."""

    report_to: str
    id: str  # by which wandb finds it
    name: str  # by which trackio does
    exp_name: str  # whose run it is
    is_new: bool = True  # until it was told what was before


@dataclass
class Tracker:
    """Tells the recipe's tracker the lines of metrics.jsonl, on the main process."""

    run: TrackerRun | None  # None without a tracker
    told: int  # the last step that it has been told
    trackers: Sequence[GeneralTracker] = ()
    has_failed: bool = False

    def log_in(
        self,
        recipe: ResolvedRecipe,
        accelerator: Accelerator,
        place: Path,
        history: Iterable[dict[str, Any]],
    ) -> None:
        """Find or make the run there, tell it what it lacks of `history`, and note it at `place`.

        Raises:
            UserError: the tracker refuses.
        """
        if self.run is None:
            place.unlink(missing_ok=True)
            return
        is_new, name, group = self.run.is_new, self.run.name, recipe.exp_name
        how: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": self.told + 1},
            "wandb": {"id": self.run.id, "group": group, "resume": "allow"},
            "trackio": {"name": name, "group": group, "resume": "never" if is_new else "allow"},
        }
        how["wandb"] |= {"name": name} if is_new else {}  # since then the user may have changed it
        # TensorBoard would show the settings of every launch as a run of their own.
        shows = is_new or recipe.report_to != "tensorboard"
        settings = {
            k: v if isinstance(v, int | float | str) else str(v)  # all that they take
            for k, v in recipe.model_dump().items()
        }
        try:
            self._remember(place)  # even if it refuses now: what the other run was told is cut off
            accelerator.init_trackers(
                "gpt2repro", config=settings if shows else None, init_kwargs=how
            )
            self.trackers = accelerator.trackers
            for each in self.trackers:
                next_step = getattr(each.tracker, NEXT_STEP.get(each.name, ""), 0)
                self.told = next_step - 1 if next_step else self.told
                if each.name == "trackio":  # gives another where one of this name is there
                    self.run.name = each.tracker.name
            for line in history:
                self._tell(line)
            self.run.is_new = False
            self._remember(place)
        except Exception as error:  # each has its own: no login, no network, a version
            gone = "" if is_new else f" If the run there was deleted: remove {place} for a new one."
            said = f"report_to {recipe.report_to}: {error}; or set it to none.{gone}"
            raise UserError(said) from error

    def _remember(self, place: Path) -> None:
        assert self.run is not None
        with atomic.new_file(place) as scratch:
            scratch.write_text(self.run.model_dump_json() + "\n", encoding="utf-8")

    def tell(self, line: dict[str, Any]) -> str:
        """Tell a line if it was not told. What the user should know, once, if the tracker fails.

        No failure of a tracker ends a run that is under way.
        """
        try:
            self._tell(line)
        except Exception as error:
            known, self.has_failed = self.has_failed, True
            return "" if known else f"{self.trackers[0].name}: {error}; the training goes on"
        return ""

    def _tell(self, line: dict[str, Any]) -> None:
        figures = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        for tracker in self.trackers if line["step"] > self.told else ():
            texts = {"sample": _shown(line["sample"], tracker.name)} if "sample" in line else {}
            tracker.log(figures | texts, step=line["step"])
            self.told = line["step"]

    def close(self) -> None:
        """Let it send the rest, which without a network wandb tries for ever.

        All is saved by now, and a scheduler may wait for this process to end.
        """
        for tracker in self.trackers:
            try:
                within(FINISH_SECONDS, tracker.finish)
            except KeyboardInterrupt:
                command_line.end_without_exit_handlers()
                raise
            except StillRunning:
                command_line.end_without_exit_handlers()
                said = f"not all was sent within {FINISH_SECONDS:.0f} s; metrics.jsonl has it"
                print(f"{tracker.name}: {said}", flush=True)
            except Exception as error:
                print(f"{tracker.name}: {error}", flush=True)


def find_tracker(recipe: ResolvedRecipe, directory: RunDirectory, start: Start) -> Tracker:
    """Which run of the tracker goes on, or a new one.

    To be asked before the directory is opened, where what was told and comes again is cut off.
    """
    kind, name, first_step = recipe.report_to, str(recipe.exp_name), start.step
    if kind == "none":
        return Tracker(None, -1)
    known, then = None, saved_recipe(directory.path)
    told = max((line["step"] for line in read_metrics(directory.metrics)), default=-1)
    told_more = told > first_step  # of the first step both tell the same, from before its update
    with suppress(OSError, ValueError):
        known = TrackerRun.model_validate_json(directory.tracker.read_bytes())
    came = not then  # from another machine: only the checkpoint knows
    if came and kind != "tensorboard" and start.recipe.get("exp_name") == name:
        told_more, then = True, start.recipe  # perhaps, on the machine that it comes from
        with suppress(ValueError):
            known = TrackerRun.model_validate(start.state.get("tracker"))
    if known and known.report_to == kind and known.exp_name == name:
        if kind == "tensorboard" or known.is_new:
            return Tracker(known, -1 if known.is_new else first_step - 1)
        goes_back = checkpoints.newer(directory.checkpoints, first_step)
        others = {field for field, _, _ in differences(recipe, then)} - MEAN_NOTHING
        if not (told_more and (goes_back or others)):
            return Tracker(known, max(told, first_step - 1))
        name += f"-from-{first_step:08d}"
    run_id, exp_name = uuid.uuid4().hex[:12], str(recipe.exp_name)
    return Tracker(TrackerRun(report_to=kind, id=run_id, name=name, exp_name=exp_name), -1)


def _shown(text: str, tracker: str) -> Any:
    """What the tracker shows as this text, letter for letter.

    TensorBoard takes a text for Markdown; of plain ones wandb shows the last, trackio none.
    """
    if tracker == "tensorboard":
        return indent(text, "    ", lambda _: True)
    page = f'<pre style="white-space: pre-wrap">{escape(text)}</pre>'
    return import_module(tracker).Html(page)
