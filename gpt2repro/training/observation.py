"""What a run sees of itself while it trains: evaluations, samples, metrics, incidents.

None of this touches the weights, the optimizer or the random number generators.
"""

import math
from dataclasses import dataclass
from typing import Any

from gpt2repro.data.stream import StepRows
from gpt2repro.evaluation.scoring import score_hellaswag, validation_loss
from gpt2repro.records import incidents
from gpt2repro.records.metrics import peak_memory_gib
from gpt2repro.system import ranks
from gpt2repro.training.finish import draw_loss_curve
from gpt2repro.training.run import Run
from gpt2repro.training.sampling import sample_text

SPIKE_Z = 5.0  # standard deviations above the recent mean that make a loss worth a line
SAMPLE_TOKENS = 48


@dataclass
class Result:
    """What one optimizer step reports, the same on every rank."""

    loss: float  # mean over the step's tokens, nats
    grad_norm: float  # L2, before clipping
    rows_digest: str  # of all ranks' rows, 64 bits in hex

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def observe(run: Run, step: int) -> dict[str, float]:
    """What is due before `step` trains: validation, HellaSwag, a sample; the figures among it.

    A stop request cuts it short; figures that were not finished are left out.
    """
    recipe, last = run.recipe, step == run.recipe.num_steps
    figures: dict[str, float] = {}
    if run.validation is not None and (step == 0 or last or due(recipe.eval_every, step)):
        figures |= validate(run, step)
    if run.hellaswag and (last or (step > 0 and due(recipe.hellaswag_every, step))):
        figures |= hellaswag(run, step)
    if 0 < step < recipe.num_steps and due(recipe.sample_every, step) and not run.stop.agreed:
        sample(run, step)
    return figures


def validate(run: Run, step: int) -> dict[str, float]:
    """Validation loss in nats per token, and bits per byte."""
    assert run.validation is not None
    result = validation_loss(
        run.model,
        run.validation.rows,
        batch_size=run.recipe.micro_batch_size,
        **collectively(run),
    )
    if result is None:
        return {}
    bits_per_byte = result.bits_per_byte(run.validation.num_tokens, run.validation.num_bytes)
    run.progress.note(
        f"step {step}: validation loss {result.loss:.4f} ({bits_per_byte:.4f} bits per byte)"
    )
    return {"val_loss": result.loss, "val_bits_per_byte": bits_per_byte}


def hellaswag(run: Run, step: int) -> dict[str, float]:
    """HellaSwag in both conventions, with standard errors."""
    figures = score_hellaswag(
        run.model, run.hellaswag, batch_size=run.recipe.micro_batch_size, **collectively(run)
    )
    if figures is None:
        return {}
    shown = ", ".join(
        f"{name} {value:.4f}" for name, value in figures.items() if not name.endswith("_stderr")
    )
    run.progress.note(f"step {step}: {shown}")
    return figures


def collectively(run: Run) -> dict[str, Any]:
    """How an evaluation is shared among the ranks and stopped on all of them."""
    return {
        "rank": ranks.rank(),
        "world_size": ranks.world_size(),
        "reduce": ranks.reduce_sum,
        "should_stop": run.stop.poll,
    }


def sample(run: Run, step: int) -> None:
    """Show how the model continues the recipe's prompt."""
    prompt, seed = run.recipe.sample_prompt, run.recipe.seed + step
    text = sample_text(run.model, run.tokenizer, prompt, num_tokens=SAMPLE_TOKENS, seed=seed)
    run.progress.note(f"step {step}: {' '.join(text.split())}")


def report(run: Run, step: int, result: Result, lr: float, figures: dict[str, float]) -> None:
    """The step's line in metrics.jsonl and the tracker, the progress bar and the loss curve."""
    record: dict[str, Any] = {"step": step, "tokens": (step + 1) * run.recipe.batch_tokens}
    record |= {"loss": result.loss, "lr": lr, "grad_norm": result.grad_norm}
    record |= {"rows_digest": result.rows_digest}
    z_score = run.spikes.z_score(result.loss) if result.finite else 0.0
    if z_score > SPIKE_Z:
        figures = figures | {"loss_z_score": z_score}
        run.progress.note(
            f"step {step}: loss {result.loss:.4f} is {z_score:.1f} standard deviations above its "
            "recent mean"
        )
    run.progress.update(loss=result.loss, tokens_per_second=run.throughput.tokens_per_second)
    if figures or due(run.recipe.log_every, step):
        memory = {"peak_memory_gib": peak_memory_gib(run.accelerator.device)}
        run.write(record | run.throughput.read() | memory | figures)
    if "val_loss" in figures:
        draw_loss_curve(run)


def report_end(run: Run, figures: dict[str, float]) -> None:
    """The last line of metrics.jsonl: what the trained model scores."""
    step = run.recipe.num_steps
    run.write({"step": step, "tokens": step * run.recipe.batch_tokens, **figures})


def note_incident(run: Run, step: int, batch: StepRows, result: Result) -> None:
    """Keep the rows of a skipped update where a person can look at them."""
    incidents.record(
        run.directory.incidents,
        step=step,
        rank=ranks.rank(),
        rows=batch.tokens,
        tokenizer=run.tokenizer,
        loss=result.loss,
        grad_norm=result.grad_norm,
        rows_digest=result.rows_digest,
    )
    run.progress.note(
        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: update skipped, "
        f"rows kept in {run.directory.incidents}"
    )
