"""What a run asks its model between two steps: validation, benchmarks, a sample.

None of this touches the weights, the optimizer or the random number generators.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from gpt2repro.data.tokens.token_ids import begin_id, ids_to_continue
from gpt2repro.evaluation.likelihoods import evaluating
from gpt2repro.evaluation.scoring import score_tasks
from gpt2repro.evaluation.task import Task
from gpt2repro.evaluation.validation import validation_loss
from gpt2repro.recipe_fields import ResolvedRecipe
from gpt2repro.records.checkpoints import innermost
from gpt2repro.speed.attention import for_generation
from gpt2repro.system import ranks
from gpt2repro.system.signals import StopRequest
from gpt2repro.training.inputs import Inputs
from gpt2repro.training.learner import Learner
from gpt2repro.training.optim.averaging import averaged, has_average
from gpt2repro.training.progress import Progress
from gpt2repro.training.schedule import due

LOGIT_BYTES = 2**32  # of a batch of benchmarks; training never holds a whole batch's logits
SAMPLE_TOKENS = 48

Figures = Mapping[str, float | str]  # of a line in metrics.jsonl, by name; a sample is a text


class Evaluations:
    """Every rank calls its methods; a stop request ends what they began, without a figure."""

    def __init__(
        self,
        recipe: ResolvedRecipe,
        inputs: Inputs,
        learner: Learner,
        stop: StopRequest,
        progress: Progress,
    ) -> None:
        self.recipe, self.inputs, self.learner = recipe, inputs, learner
        self.progress, self._stop = progress, stop
        self.validation_seconds = 0.0  # of the last one
        self.average_is_better = False  # than the weights, at the last validation

    def due(self, step: int) -> list[Callable[[int], Figures]]:
        """What is to be called with `step` before it trains."""
        recipe, last = self.recipe, step == self.recipe.num_steps
        evaluations: list[Callable[[int], Figures]] = []
        if self.inputs.validation and (step == 0 or last or due(recipe.eval_every, step)):
            evaluations.append(self._validate)
        if self.inputs.tasks and (last or (step > 0 and due(recipe.eval_tasks_every, step))):
            evaluations.append(self._score_tasks)
        if 0 < step < recipe.num_steps and due(recipe.sample_every, step):
            evaluations.append(self._sample)
        return evaluations

    def _validate(self, step: int) -> dict[str, float]:
        """What the held-out text says of the weights, and of their average where there is one."""
        began, optimizer = time.perf_counter(), self.learner.optimizer
        figures = self._held_out_figures(step)
        if figures and has_average(optimizer):
            with averaged(self.learner.model, optimizer):
                more = self._held_out_figures(step, " of the average")
            self.average_is_better = bool(more) and more["val_loss"] < figures["val_loss"]
            figures |= {f"{name}_ema": more[name] for name in more if name != "val_tokens"}
        self.validation_seconds = time.perf_counter() - began
        return figures

    def _held_out_figures(self, step: int, of: str = "") -> dict[str, float]:
        """Validation loss in nats per token, bits per byte, and how many tokens they are of."""
        held_out = self.inputs.validation
        assert held_out is not None
        rows_each = -(-len(held_out.rows) // ranks.world_size())
        with self.progress.phase(f"validation{of} at step {step}", rows_each) as on_batch:
            result = validation_loss(
                self.learner.model, held_out.rows, on_batch=on_batch, **self._collectively()
            )
        if result is None:
            return {}
        bits_per_byte = result.bits_per_byte(float(held_out.num_bytes.sum()))
        self.progress.note(
            f"step {step}: validation loss{of} {result.loss:.4f} "
            f"({bits_per_byte:.4f} bits per byte)"
        )
        return {
            "val_loss": result.loss,
            "val_bits_per_byte": bits_per_byte,
            "val_tokens": result.num_tokens,
        }

    def _score_tasks(self, step: int) -> dict[str, float]:
        """The benchmarks' figures, with standard errors."""
        tasks = self.inputs.tasks
        requests = sum(len(task.requests) + len(task.prompts) for task in tasks)
        requests //= ranks.world_size()
        with self.progress.phase(f"benchmarks at step {step}", requests) as on_batch:
            how = self._collectively() | {"batch_size": self._rows_with_logits(tasks)}
            figures = score_tasks(self.learner.model, tasks, on_batch=on_batch, **how)
        if figures is None:
            return {}
        shown = ", ".join(
            f"{name} {value:.4f}" for name, value in figures.items() if not name.endswith("_stderr")
        )
        self.progress.note(f"step {step}: {shown}")
        return figures

    def _rows_with_logits(self, tasks: list[Task]) -> int:
        """The micro-batch, or as many rows as have `LOGIT_BYTES` of logits, in bf16 and in fp32."""
        lengths = [len(request.ids) for task in tasks for request in task.requests]
        lengths += [len(prompt.ids) + prompt.num_new for task in tasks for prompt in task.prompts]
        length = min(self.recipe.sequence_length, max(lengths))
        row = 6 * length * innermost(self.learner.model).config.vocab_size
        return min(self.recipe.micro_batch_size, max(1, LOGIT_BYTES // row))

    def _collectively(self) -> dict[str, Any]:
        """How an evaluation is shared among the ranks and stopped on all of them."""
        return {
            "batch_size": self.recipe.micro_batch_size,
            "rank": ranks.rank(),
            "world_size": ranks.world_size(),
            "reduce": ranks.reduce_sum,
            "should_stop": self._stop.poll,
        }

    def _sample(self, step: int) -> dict[str, str]:
        """How the model continues the recipe's prompt, the prompt before it."""
        if self._stop.agreed:
            return {}
        text = sample_text(
            self.learner.model,
            self.inputs.tokenizer,
            self.recipe.sample_prompt,
            num_tokens=SAMPLE_TOKENS,
            seed=self.recipe.seed + step,
        )
        self.progress.note(f"step {step}: {' '.join(text.split())}")
        return {"sample": text}


def sample_text(model: nn.Module, tokenizer, prompt: str, *, num_tokens: int, seed: int) -> str:
    """Continue `prompt` by `num_tokens` sampled tokens and return both as text.

    Every rank must call: a sharded model gathers its parameters from all of them. The length is
    fixed so that all ranks run the same number of forward passes. The compiled code is left alone
    (lengths vary), and so is the state of the random number generators.
    """
    inner: Any = innermost(model)
    device = next(inner.parameters()).device
    prompt_ids = torch.tensor(ids_to_continue(tokenizer, [prompt]), device=device)
    room = inner.config.n_positions - prompt_ids.shape[1]
    num_tokens = min(num_tokens, room)
    if num_tokens < 1:
        return prompt
    devices = [device] if device.type == "cuda" else []
    eager = torch.compiler.set_stance("force_eager")
    with evaluating(inner), torch.random.fork_rng(devices), eager, for_generation():
        torch.manual_seed(seed)
        ids = inner.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            do_sample=True,
            top_k=50,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=begin_id(tokenizer),
        )
    return tokenizer.decode(ids[0])
