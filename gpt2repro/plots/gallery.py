"""Every picture there is: of runs and of models, one line each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from gpt2repro.evaluation.published import VALIDATION_TEXT, published_loss
from gpt2repro.plots import attention, benchmarks, curves, gradients, logit_lens, parameters
from gpt2repro.plots.style import middle_cut, token_labels
from gpt2repro.records.metrics import comparable, read_metrics, scored
from gpt2repro.records.run_directory import read_resumes, saved_recipe

Heads = list[tuple[int, int]]  # (layer, head)

LENS_POSITIONS = 12

# --- Runs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says: the lines of its metrics, and its recipe if there is one."""

    path: Path
    metrics: curves.Metrics
    recipe: dict[str, Any]

    @property
    def name(self) -> str:
        return self.recipe.get("exp_name") or self.path.resolve().name

    @property
    def validation_text(self) -> str:
        """What the last validation loss is of: text, tokens and context."""
        fields = (*VALIDATION_TEXT, "dataset_revision", "tokenizer_name")
        tokens = [line.get("val_tokens") for line in comparable(self.metrics)][-1:]
        return repr([self.recipe.get(field) for field in fields] + tokens)

    @property
    def baseline(self) -> tuple[str, float] | None:
        return published_loss(self.recipe)


def read_run(name: str) -> RunRecord | None:
    """The run at `name`; None if there is no metrics.jsonl, so that it can only be a model."""
    path = Path(name)
    if not (path / "metrics.jsonl").is_file():
        return None
    return RunRecord(path, read_metrics(path / "metrics.jsonl"), saved_recipe(path))


@dataclass(frozen=True)
class Runs:
    """One run or several, and what is the same in all of them."""

    metrics: dict[str, curves.Metrics]  # by name; the name of a single run is ""
    of_one_text: bool  # whether their validation losses compare; if not, they are left out
    baseline: tuple[str, float] | None
    max_grad_norm: float | None
    resumed_at: list[int]  # steps; of a single run
    muon_scale: dict[str, float]  # of runs by Muon: its rate, in units of the logged one


RUN_PICTURES: dict[str, Callable[[Runs], Figure]] = {
    "loss_curve": lambda runs: curves.draw_losses(
        runs.metrics, baseline=runs.baseline, resumed_at=runs.resumed_at
    ),
    "learning_rate": lambda runs: curves.draw_learning_rate_and_gradient_norm(
        runs.metrics,
        max_grad_norm=runs.max_grad_norm,
        muon_scale=runs.muon_scale,
        resumed_at=runs.resumed_at,
    ),
    "throughput": lambda runs: curves.draw_throughput(runs.metrics, resumed_at=runs.resumed_at),
}


def run_pictures(runs: Runs) -> Iterator[tuple[str, Figure]]:
    """File name and figure of each of the curves; benchmarks where there are some."""
    for name, draw in RUN_PICTURES.items():
        yield name, draw(runs)
    lines = (line for metrics in runs.metrics.values() for line in metrics)
    if names := scored(dict.fromkeys(name for line in lines for name in line)):
        yield "benchmarks", benchmarks.draw_benchmarks(runs.metrics, names)


def overlaid(runs: list[RunRecord]) -> Runs:
    """What is drawn of one run or several. What does not hold for all of them is left out."""
    # A line that holds for one of two runs only would be read as holding for both.
    baselines = {run.baseline for run in runs}
    thresholds = {run.recipe.get("max_grad_norm") for run in runs}
    named = dict(zip(_distinct_names(runs), runs, strict=True))
    of_one_text = len({run.validation_text for run in runs if comparable(run.metrics)}) <= 1
    return Runs(
        metrics={
            name: run.metrics if of_one_text else _without_validation(run.metrics)
            for name, run in named.items()
        },
        of_one_text=of_one_text,
        baseline=baselines.pop() if len(baselines) == 1 else None,
        max_grad_norm=thresholds.pop() if len(thresholds) == 1 else None,
        resumed_at=read_resumes(runs[0].path) if len(runs) == 1 else [],
        muon_scale={
            name: run.recipe["muon_lr"] / run.recipe["max_lr"]
            for name, run in named.items()
            if run.recipe.get("optimizer") == "muon"
            and {"muon_lr", "max_lr"} <= run.recipe.keys()
            and run.recipe.get("matrix_cooldown_fraction") is None  # else in no proportion
        },
    )


def _without_validation(metrics: curves.Metrics) -> curves.Metrics:
    return [{k: v for k, v in line.items() if not k.startswith("val_")} for line in metrics]


def _distinct_names(runs: list[RunRecord]) -> list[str]:
    """Nothing for a single run; else names, or directories where two runs have the same name."""
    if len(runs) == 1:
        return [""]
    names = [middle_cut(run.name) for run in runs]
    if len(set(names)) < len(names):
        names = [middle_cut(str(run.path)) for run in runs]
    return names if len(set(names)) == len(names) else [f"run {n}" for n in range(1, len(runs) + 1)]


# --- Models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A model that reads a text of T tokens."""

    model: Any
    tokenizer: Any
    ids: torch.Tensor  # (T,)
    heads: Heads | None  # drawn large; None for typical ones

    @property
    def labels(self) -> list[str]:
        return token_labels(self.tokenizer, self.ids.tolist())

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.ids)

    @cached_property
    def attention(self) -> tuple[Any, dict[str, Any]]:
        """Maps (L, H, T, T), and what the heads do."""
        maps = attention.attention_maps(self.model, self.ids)
        return maps, attention.attention_habits(maps, self.ids.tolist())


MODEL_PICTURES: dict[str, Callable[[Reading], Figure]] = {
    "attention_maps": lambda reading: attention.draw_attention_maps(
        *reading.attention, text=reading.text
    ),
    "attention_heads": lambda reading: _attention_heads(reading),
    "logit_lens": lambda reading: logit_lens.draw_logit_lens(
        logit_lens.logit_lens(reading.model, reading.ids, min(LENS_POSITIONS, len(reading.ids))),
        reading.labels[-LENS_POSITIONS:],
        reading.tokenizer,
        reading.text,
    ),
    "position_similarity": lambda reading: parameters.draw_position_similarity(
        parameters.position_similarity(reading.model)
    ),
    "weights": lambda reading: parameters.draw_weights(
        parameters.weight_samples(reading.model), reading.model.config.initializer_range
    ),
    "gradient_norms": lambda reading: gradients.draw_gradient_norms(
        gradients.gradient_norms(reading.model, reading.ids), reading.text
    ),
}


def model_pictures(reading: Reading) -> Iterator[tuple[str, Figure]]:
    """File name and figure of each look inside, as it is drawn."""
    for name, draw in MODEL_PICTURES.items():
        yield name, draw(reading)


def _attention_heads(reading: Reading) -> Figure:
    maps, habits = reading.attention
    heads = reading.heads or attention.typical_heads(habits)
    even = attention.even_habits(reading.ids.tolist())
    return attention.draw_attention_heads(
        maps, habits, reading.labels, heads, even, text=reading.text
    )
