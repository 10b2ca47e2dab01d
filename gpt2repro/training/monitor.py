"""All that a run says of itself: its first lines, metrics, incidents, the bar on the screen."""

import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from accelerate.utils import DistributedType

from gpt2repro.data.corpora.size import estimate_tokens, in_words
from gpt2repro.data.rows.mixture import tokens_of_each
from gpt2repro.data.rows.producer import StepRows
from gpt2repro.evaluation.published import published_loss
from gpt2repro.plots.curves import loss_curve
from gpt2repro.recipe import differences
from gpt2repro.recipe_fields import ResolvedRecipe
from gpt2repro.records.incidents import IncidentLog
from gpt2repro.records.metrics import MetricsLog, read_metrics
from gpt2repro.records.run_directory import RunDirectory, Start, read_resumes
from gpt2repro.speed.low_precision import EMULATED_BF16, emulates_bf16
from gpt2repro.system import machine, ranks
from gpt2repro.system.signals import StopRequest
from gpt2repro.system.text import count_of, folded, in_short
from gpt2repro.training.evaluations import Evaluations, Figures
from gpt2repro.training.inputs import Inputs
from gpt2repro.training.learner import Learner
from gpt2repro.training.progress import Progress
from gpt2repro.training.schedule import due
from gpt2repro.training.step import LaunchedStep, StepResult
from gpt2repro.training.throughput import Throughput, peak_flops, peak_memory_gib
from gpt2repro.training.tracker import Tracker

SPIKE_Z = 5.0  # standard deviations above the recent mean that make a loss worth a line
STEPS_TO_WARM_UP = 4
DRAWN_AT_MOST = 100  # the loss curve is not drawn more than a hundredth of the time
# They work on a step while this process prepares the next one; only then is the first one told.
DEVICES_BEHIND = ("cuda",)


class Monitor:
    """What happens beside the steps. Every rank calls its methods; the main process speaks."""

    def __init__(
        self,
        recipe: ResolvedRecipe,
        directory: RunDirectory,
        inputs: Inputs,
        learner: Learner,
        tracker: Tracker,
        stop: StopRequest,
        start: Start,
        history: Sequence[dict[str, Any]],
    ) -> None:
        """Introduce the run and begin the bar.

        `history`: the lines of metrics.jsonl before the step where this launch begins, on rank 0.
        """
        accelerator = learner.accelerator
        main = accelerator.is_main_process
        self.recipe, self.directory, self.inputs, self.learner = recipe, directory, inputs, learner
        self.tracker = tracker
        if main:
            self._introduce(start)
        self.progress = Progress(first_step=start.step, num_steps=recipe.num_steps, enabled=main)
        self.evaluations = Evaluations(recipe, inputs, learner, stop, self.progress)
        self._log = MetricsLog(directory.metrics, len(history)) if main else None
        self._throughput = Throughput(
            learner.flops_per_token, peak_flops(accelerator.device), accelerator.num_processes
        )
        self._spikes = SpikeDetector(
            line["loss"] for line in history if line.get("loss") is not None
        )
        self._incidents = IncidentLog(directory.incidents)
        self._tells_late = accelerator.device.type in DEVICES_BEHIND
        self._untold: Report | None = None
        self._at_step = 0.0, 0.0  # the last one's seconds so far, and of them those for data
        self._num_told, self._draw_again_at = 0, 0.0

    def close(self) -> None:
        """End the bar and the file."""
        self.progress.close()
        if self._log is not None:
            self._log.close()

    def _introduce(self, start: Start) -> None:
        """The first lines on the screen: what this run is, before hours are spent on it."""
        recipe, accelerator = self.recipe, self.learner.accelerator
        device, rows = accelerator.device.type, recipe.micro_batch_size
        processes = count_of(accelerator.num_processes, "process")
        passes = count_of(accelerator.gradient_accumulation_steps, "micro-batch")
        engine = {DistributedType.NO: "", DistributedType.FSDP: ", FSDP2"}
        lines = {
            "run": f"{self.directory.path}",
            "model": f"GPT-2, {in_short(self.learner.num_parameters)} parameters, "
            f"{recipe.sequence_length:,} tokens of context",
            "data": "; ".join(self._shares_of_data()),
            "batch": f"{recipe.batch_tokens:,} tokens = {processes} x {passes} x "
            f"{count_of(rows, 'row')} x {recipe.sequence_length:,} tokens"
            + "".join(
                f"; {n} such from step {at:,}"
                for at, n in recipe.batch_multiples
                if at < recipe.num_steps
            ),
            "optimizer": f"{recipe.optimizer}, {count_of(recipe.num_steps, 'step')}, "
            f"{in_short(recipe.tokens_before(recipe.num_steps))} tokens in all",
            "engine": f"{processes}{engine.get(accelerator.distributed_type, ', DDP')}, "
            f"{'fp32' if recipe.mixed_precision == 'no' else recipe.mixed_precision}, "
            f"{'compiled' if recipe.compile else 'not compiled'}, on {machine.hardware(device)}",
        }
        changes = [
            f"{key} was {then} until here and is {now} now"
            for key, then, now in differences(recipe, start.recipe)
        ]
        is_slow = recipe.mixed_precision == "bf16" and emulates_bf16(accelerator.device)
        said = (start.note, *changes, EMULATED_BF16 if is_slow else None)
        notes = [("note", note) for note in said if note]
        for name, value in [*lines.items(), *notes]:
            print(folded(f"{name:>10}  {value}", indent=12))
        print(flush=True)

    def _shares_of_data(self) -> Iterator[str]:
        """What of each dataset is trained on, how often, and what is held out."""
        recipe, sources = self.recipe, self.inputs.sources
        run_tokens = recipe.tokens_before(recipe.num_steps)
        sizes = [estimate_tokens(s.corpus, s.training_units, s.tokens_per_byte) for s in sources]
        if self.inputs.num_epochs:  # for which they were counted
            sizes = [run_tokens // self.inputs.num_epochs]
        shares = tokens_of_each(sources, sizes, run_tokens)
        for dataset, source, tokens, share in zip(
            recipe.all_datasets, sources, sizes, shares, strict=True
        ):
            corpus, held_out = source.corpus, range(source.num_validation_units)
            tokens_held_out = estimate_tokens(corpus, held_out, source.tokens_per_byte)
            said = f"{dataset}: {in_words(corpus, source.training_units, tokens)} to train on"
            if tokens:
                epochs = share / tokens
                said += f", {epochs:{',.1f' if epochs >= 1 else '.2g'}} epochs in this run"
            said += f"; {in_words(corpus, held_out, tokens_held_out)} held out"
            if recipe.order != "shuffled":
                said += f"; {self.inputs.stream.plans[0]}"
            yield said

    # --- Before a step ----------------------------------------------------------------------------

    def observe(self, step: int) -> Figures:
        """What is due before `step` trains: validation, benchmarks, a sample; by name in the line.

        A stop request cuts it short; figures that were not finished are left out.
        """
        evaluations = self.evaluations.due(step)
        figures: dict[str, float | str] = {}
        if evaluations or step == self.recipe.num_steps:
            self.catch_up()
        for evaluate in evaluations:
            figures |= evaluate(step)
        return figures

    # --- After a step -----------------------------------------------------------------------------

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Around a step: how long this process is at it, and how much of that it waits for data."""
        stream = self.inputs.stream
        began, waited = time.perf_counter(), stream.wait_seconds
        yield
        self._at_step = time.perf_counter() - began, stream.wait_seconds - waited
        if self._untold is not None:
            self._untold.wait()  # the device is at most one step behind

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a checkpoint: what the training waits for it."""
        began = time.perf_counter()
        yield
        self._throughput.saving += time.perf_counter() - began

    def report(self, step: int, rows: StepRows, launched: LaunchedStep, figures: Figures) -> None:
        """Tell of the step; on a GPU when the next one is launched, so that it is never idle.

        `figures`: what `observe` found before the step.
        """
        if self._untold is not None:
            self._tell(self._untold)
        self._untold = Report(step, rows, launched, figures, *self._at_step)
        if not self._tells_late:
            self.catch_up()

    def catch_up(self) -> None:
        """Wait for the device and tell of its last step, before anything else is done or told."""
        if self._untold is not None:
            self._untold.wait()
            self._tell(self._untold)
            self._untold = None

    def _tell(self, report: "Report") -> None:
        """The step's line in metrics.jsonl and the tracker, the progress bar and the loss curve."""
        step, figures, result = report.step, report.figures, report.launched.result()
        batches, batch_tokens = self.recipe.batches, self.recipe.batch_tokens
        self._throughput.add(batches.of(step) * batch_tokens, report.seconds, report.waited)
        z_score = self._spikes.z_score(result.loss) if result.finite else 0.0
        if z_score > SPIKE_Z:
            figures = {**figures, "loss_z_score": z_score}
            self.progress.note(
                f"step {step}: loss {result.loss:.4f} is {z_score:.1f} standard deviations above "
                "its recent mean"
            )
        rate = self._throughput.tokens_per_second
        left = batches.before(self.recipe.num_steps) - batches.before(step + 1)
        seconds = report.seconds / batches.of(step)
        self.progress.update(
            loss=result.loss, tokens_per_second=rate, seconds=seconds, batches_left=left
        )
        self._compare_with_validation(report.seconds)
        if figures or due(self.recipe.log_every, step):
            record: dict[str, Any] = {"step": step, "tokens": self.recipe.tokens_before(step + 1)}
            record |= {"loss": result.loss, "lr": result.lr, "grad_norm": result.grad_norm}
            record |= {"rows_digest": result.rows_digest}
            record |= self.inputs.stream.epochs(report.rows.lanes) | self._throughput.read()
            record |= {"peak_memory_gib": peak_memory_gib(self.learner.accelerator.device)}
            self._write({**record, **figures})
        if "val_loss" in figures and time.perf_counter() >= self._draw_again_at:
            began = time.perf_counter()
            self.draw_loss_curve()
            seconds = time.perf_counter() - began
            self._draw_again_at = began + DRAWN_AT_MOST * seconds  # all GPUs wait for it
        if result.finite:
            self._incidents.over()
        else:
            self._note_incident(step, report.rows, result)

    def make_durable(self) -> int:
        """Flush what is written to the disk; the number of lines of metrics.jsonl, on rank 0."""
        if self._log is None:
            return 0
        self._log.make_durable()
        return self._log.num_lines

    def _compare_with_validation(self, seconds: float) -> None:
        """Say, once, that most of the time will go to validations."""
        between = self.recipe.eval_every * seconds
        self._num_told += 1
        # The first steps warm up, and a compiled one waits for the compiler.
        validation = self.evaluations.validation_seconds
        matters = between < validation >= 1
        if self._num_told == STEPS_TO_WARM_UP and between and matters:
            self.progress.note(
                f"A validation takes {validation:,.0f} s, the steps between two of "
                f"them {between:,.0f} s: raise eval_every or lower validation_tokens"
            )

    def report_end(self, figures: Figures) -> None:
        """The last line of metrics.jsonl: what the trained model scores."""
        step = self.recipe.num_steps
        self._write({"step": step, "tokens": self.recipe.tokens_before(step), **figures})

    def diverged(self) -> bool:
        """Whether so many updates in a row were skipped that the run should end; says so then."""
        diverged = self._incidents.too_many
        if diverged:
            self.catch_up()
            self.progress.note(self._incidents.advice())
        return diverged

    def _note_incident(self, step: int, rows: StepRows, result: StepResult) -> None:
        """Keep the rows of a skipped update; a disk that does not take them ends no run."""
        self._incidents.count()
        rows_of_ranks = ranks.gather(rows.tokens)
        said = f"update skipped, rows kept in {self._incidents.directory}"
        if ranks.rank() == 0:
            try:
                self._incidents.record(
                    rows_of_ranks,
                    step=step,
                    tokenizer=self.inputs.tokenizer,
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    rows_digest=result.rows_digest,
                )
            except OSError as error:
                said = f"update skipped, its rows could not be kept: {error}"
        self.progress.note(
            f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: {said}"
        )

    def _write(self, record: dict[str, Any]) -> None:
        """A line in metrics.jsonl, and in the tracker if there is one."""
        if self._log is not None:
            self._log.write(record)
        if problem := self.tracker.tell(record):
            self.progress.note(problem)

    def draw_loss_curve(self) -> None:
        """Draw what metrics.jsonl has by now; no failure of it ends a run."""
        if self.learner.accelerator.is_main_process:
            loss_curve(
                read_metrics(self.directory.metrics),
                self.directory.loss_curve,
                baseline=published_loss(self.recipe.model_dump()),
                resumed_at=read_resumes(self.directory.path),
            )


@dataclass
class Report:
    """A step to be told of."""

    step: int
    rows: StepRows
    launched: LaunchedStep
    figures: Figures
    seconds: float  # that this process was at it: launched it, waited for the device to end it
    waited: float  # of them for data

    def wait(self) -> None:
        """Until the device is done with it."""
        began = time.perf_counter()
        self.launched.result()
        self.seconds += time.perf_counter() - began


class SpikeDetector:
    """How many standard deviations a loss lies above the mean of the last 128 losses."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses: deque[float] = deque(losses, maxlen=128)

    def z_score(self, loss: float) -> float:
        """Score `loss` against those before it, then remember it; 0 while too few are known."""
        score = 0.0
        if len(self._losses) >= 32:  # fewer say nothing about their spread
            spread = statistics.stdev(self._losses)
            score = (loss - statistics.fmean(self._losses)) / spread if spread else 0.0
        self._losses.append(loss)
        return score
