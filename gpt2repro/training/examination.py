"""Everything that can be known to fail, before hours are spent: what `gpt2repro doctor` asks.

It builds the parts of the run as the training script would, one after the other, and says of each
whether it will do. A failure names the field to change. Nothing is written but
to the caches of data.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import torch

from gpt2repro import UserError
from gpt2repro.data.rows.lanes import check_lanes, divisors
from gpt2repro.data.rows.mixture import Source
from gpt2repro.data.tokens.encoder import BulkEncoder
from gpt2repro.publishing.upload import check_hub_rights
from gpt2repro.recipe import accumulation_steps
from gpt2repro.recipe_fields import Recipe
from gpt2repro.records.checkpoints import state_of
from gpt2repro.records.run_directory import RunDirectory
from gpt2repro.speed.attention import kernel_taken
from gpt2repro.speed.low_precision import EMULATED_BF16, emulates_bf16, has_bf16
from gpt2repro.system import failure, machine
from gpt2repro.system.text import count_of, in_short
from gpt2repro.training.inputs import (
    open_benchmarks,
    open_datasets,
    open_stream,
    open_tokenizer,
)
from gpt2repro.training.learner import build_model, check_device
from gpt2repro.training.micro_batch import largest_that_fits
from gpt2repro.training.optim.registry import build_optimizer
from gpt2repro.training.schedule import endless_warmup, is_saved
from gpt2repro.training.throughput import model_flops_per_token, peak_flops
from modeling_gpt2repro import GPT2ReproForCausalLM

OK, WARNING, FAILURE = "ok", "warning", "FAIL"
STREAM_SECONDS = 5.0  # how long the data stream is timed
STEP_SECONDS = 5.0  # how long training is timed
LARGEST_ON_CPU = 500e6  # parameters; a larger model would take minutes and much memory to time
BUSY = 0.5  # share of the cores that others use, from which on a timing says little
ASSUMED_MFU = 0.40  # at least, of a compiled run
MOST_COUNTED = 10**6  # steps, of which every one is asked whether it is uploaded
SMALL = 100e6  # parameters, with which no run reaches that

Finding = tuple[str, str]  # status, what it says


class Examination:
    """The checks in the order in which a run would meet their subjects."""

    def __init__(self, recipe: Recipe, num_processes: int, price: float | None = None) -> None:
        """`price`: of an hour of one process's device, in whatever currency."""
        self.recipe = recipe
        self.num_processes, self.price = num_processes, price
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # What the checks find, for those after them; None where one failed.
        self.tokenizer: Any = None
        self.sources: list[Source] | None = None
        self.model: GPT2ReproForCausalLM | None = None
        self.need: float | None = None  # tokens/s that training takes, all processes

    def findings(self) -> Iterator[tuple[str, Finding]]:
        checks: list[tuple[str, Callable[[], Finding]]] = [
            ("batch", self._batch),
            ("precision", self._precision),
            ("tokenizer", self._tokenizer),
            ("dataset", self._dataset),
            ("model", self._model),
            ("attention", self._attention),
            ("training", self._training),
            ("data", self._data),
            ("disk", self._disk),
            ("hub", self._hub),
            ("time", self._time),
        ]
        if self.recipe.eval_tasks:
            checks.insert(6, ("benchmarks", self._benchmarks))
        if self.recipe.compile:
            checks.insert(2, ("compiler", self._compiler))
        for name, check in checks:
            try:
                yield name, check()
            except UserError as error:
                yield name, (FAILURE, " ".join(str(error).split()))

    def _batch(self) -> Finding:
        check_lanes(
            self.recipe.num_lanes,
            rows_per_step=self.recipe.rows_per_step,
            world_size=self.num_processes,
        )
        size = self.recipe.micro_batch_size
        if size == "auto":
            rows = self.recipe.rows_per_step // self.num_processes
            return OK, f"{rows} rows a step and process; the micro-batch is found at start"
        steps = accumulation_steps(self.recipe, self.num_processes, size)
        return OK, f"{self.recipe.batch_tokens:,} tokens = {steps} x {size} rows a process"

    def _precision(self) -> Finding:
        check_device(self.recipe, self.device)
        if self.recipe.mixed_precision == "no":
            return OK, "fp32"
        if not has_bf16(self.device):
            return FAILURE, "this GPU has no bf16: set mixed_precision to no"
        if emulates_bf16(self.device):
            return WARNING, EMULATED_BF16
        return OK, "bf16"

    def _compiler(self) -> Finding:
        try:
            torch.compile(torch.sin)(torch.zeros(2, device=self.device))
        except Exception as error:  # of the compiler's own, or of those that it calls
            reason = " ".join(str(error).partition("\n\n")[0].split())[:200]
            return FAILURE, f"{reason}. {failure.NO_COMPILER}"
        return OK, "torch.compile works"

    def _tokenizer(self) -> Finding:
        self.tokenizer = open_tokenizer(self.recipe)
        return OK, f"{self.recipe.tokenizer_name}, {len(self.tokenizer):,} tokens"

    def _dataset(self) -> Finding:
        encoder = BulkEncoder(self.tokenizer) if self.tokenizer is not None else None
        self.sources = open_datasets(self.recipe, encoder)
        said = []
        for dataset, source in zip(self.recipe.all_datasets, self.sources, strict=True):
            revision = source.corpus.identity.get("revision")
            at = f" at {revision[:10]}" if revision else ""
            said.append(f"{dataset.name}{at}, {source.corpus.num_units:,} units")
        return OK, "; ".join(said)

    def _model(self) -> Finding:
        if self.tokenizer is None:
            return WARNING, "not built without a tokenizer"
        self.model = build_model(self.recipe, self.tokenizer)
        num_parameters = self.model.num_parameters()
        state = _state_bytes(self.model, self.recipe)
        copy = state * (_pinned_share(self.model) if self.device.type == "cuda" else 1)
        text = (
            f"{num_parameters:,} parameters; {(state + 4 * num_parameters) / 2**30:.2f} GiB of "
            "weights, gradients and optimizer, and activations on top; "
            f"{copy / 2**30:.2f} GiB of main memory for checkpoints"
        )
        free = min(psutil.virtual_memory().available, machine.main_memory())
        if copy > free:
            return WARNING, f"{text}, but {free / 2**30:.2f} GiB are to be had"
        return OK, text

    def _attention(self) -> Finding:
        """The kernel that torch takes is asked for: it depends on card, types and versions."""
        implementation = self.recipe.attn_implementation
        if not implementation.startswith("sdpa") or self.device.type != "cuda" or not self.model:
            return OK, implementation
        config = self.model.config
        shape = (1, config.n_head, self.recipe.sequence_length, config.n_embd // config.n_head)
        dtype = torch.float32 if self.recipe.mixed_precision == "no" else torch.bfloat16
        kernel = kernel_taken(shape, dtype, self.device)
        if kernel in ("flash", "cudnn"):
            return OK, f"{implementation}, with the {kernel} kernel"
        return WARNING, f"{implementation} with the {kernel} kernel: slower; flash needs bf16"

    def _benchmarks(self) -> Finding:
        if self.tokenizer is None:
            return WARNING, "not opened without a tokenizer"
        tasks = open_benchmarks(self.recipe, self.tokenizer)
        rows = count_of(sum(len(task.rows) for task in tasks), "row")
        left_out = sum(len(task.skipped) for task in tasks)
        text = f"{', '.join(task.name for task in tasks)}: {rows}"
        return (WARNING, f"{text}, {left_out} left out") if left_out else (OK, text)

    def _training(self) -> Finding:
        """Time forward and backward passes here, and multiply by the processes."""
        if self.model is None:
            return WARNING, "not timed without a model"
        model = self.model
        if self.device.type == "cpu" and model.num_parameters() > LARGEST_ON_CPU:
            return WARNING, "not timed: the model is too large for this CPU"
        rows = self._rows_at_once()
        state = 0  # the optimizer's, which lies beside them from the first update on
        if self.device.type == "cuda":
            state = _state_bytes(model, self.recipe) - 4 * model.num_parameters()
        try:
            _beside = torch.empty(state, dtype=torch.uint8, device=self.device)
            rate = _training_rate(model, self.recipe, rows, self.device)
            rate, rows = self._with_more_rows(model, rate, rows)
        except torch.OutOfMemoryError:
            lower = "lower micro_batch_size or " if rows > 1 else ""
            what = f"out of memory with {count_of(rows, 'row')} at once"
            what += " beside the optimizer's state" * bool(state)
            mend = f"{lower}set gradient_checkpointing"
            if state and self.num_processes > 1:
                return WARNING, f"{what}: {mend}, or shard it (launch/fsdp2.yaml)"
            return FAILURE, f"{what}: {mend}"
        self.need = rate * self.num_processes
        per_token = model_flops_per_token(model, self.recipe.sequence_length)
        peak = peak_flops(self.device)
        note = ""
        if peak:
            note = f", {rate * per_token / peak:.0%} MFU uncompiled"
        # Uncompiled passes understate what the run will reach.
        if peak and self.recipe.mixed_precision == "bf16" and model.num_parameters() > SMALL:
            self.need = max(self.need, ASSUMED_MFU * peak / per_token * self.num_processes)
        load = os.getloadavg()[0] / (os.cpu_count() or 1)
        if self.device.type == "cpu" and load > BUSY:
            note += f"; the machine is busy ({load:.0%} of its cores were): it can do more"
        return OK, (
            f"{rate:,.0f} tokens/s on one {self.device.type} with {count_of(rows, 'row')}{note}"
        )

    def _rows_at_once(self) -> int:
        """The micro-batch to be timed: the run's, or one row where only a GPU's memory tells it."""
        size = self.recipe.micro_batch_size
        if size != "auto":
            return size
        if self.device.type != "cpu":
            return 1
        rows = divisors(self.recipe.rows_per_step // self.num_processes)
        return largest_that_fits(rows, lambda _: None, device=self.device, reserve_bytes=0)

    def _with_more_rows(
        self, model: GPT2ReproForCausalLM, rate: float, rows: int
    ) -> tuple[float, int]:
        """Tokens/s and rows where a GPU gains nothing by more, if the run is to find them."""
        most = self.recipe.rows_per_step // self.num_processes
        if self.recipe.micro_batch_size != "auto" or self.device.type == "cpu":
            return rate, rows
        while most % (2 * rows) == 0:
            try:
                faster = _training_rate(model, self.recipe, 2 * rows, self.device)
            except torch.OutOfMemoryError:
                break
            if faster < 1.1 * rate:
                break
            rate, rows = faster, 2 * rows
        return rate, rows

    def _data(self) -> Finding:
        """Time the stream of one process against what training takes."""
        if self.sources is None or self.tokenizer is None:
            return WARNING, "not timed without dataset and tokenizer"
        encoder = BulkEncoder(self.tokenizer)
        stream = open_stream(self.recipe, self.sources, encoder, 0, self.num_processes)
        step_tokens = self.recipe.batch_tokens // self.num_processes
        try:
            next(stream)  # the start-up
            began, tokens = time.perf_counter(), 0
            while (seconds := time.perf_counter() - began) < STREAM_SECONDS:
                next(stream)
                tokens += step_tokens
        finally:
            stream.close()
        rate = tokens / seconds
        need = self.need / self.num_processes if self.need else 0.0
        text = f"{rate:,.0f} tokens/s a process"
        if need > rate:
            more = "raise num_reader_threads or set token_cache_dir"
            return FAILURE, f"{text}, but training takes {need:,.0f}: {more}"
        return OK, f"{text}, {rate / need:.0f} x what training takes" if need else text

    def _disk(self) -> Finding:
        """Weights and optimizer state of every checkpoint kept, one being written, the exports."""
        if self.model is None:
            return WARNING, "not checked without a model"
        num_parameters = self.model.num_parameters()
        state = _state_bytes(self.model, self.recipe)
        num_kept = self.recipe.num_kept(self.recipe.num_steps or 0)
        kept = self.recipe.keep_last + num_kept
        kept += self.recipe.schedule in ("wsd", "power")  # that from before its cooldown
        needed = (kept + 1) * state + (1 + bool(self.recipe.ema_decay)) * 4 * num_parameters
        place = self.recipe.run_dir.absolute()
        there = _saved_bytes(self.recipe)
        existing = next(path for path in (place, *place.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        text = f"{needed / 2**30:.1f} GiB needed"
        if num_kept:
            checkpoints = count_of(num_kept, "permanent checkpoint")
            text += f" ({num_kept * state / 2**30:.1f} of them for {checkpoints})"
        text += f", {there / 2**30:.1f} GiB there" if there else ""
        text += f", {free / 2**30:.1f} GiB free in {existing}"
        if there + free <= needed:
            fewer = ", or keep fewer steps for good" if num_kept else ""
            return FAILURE, f"{text}: set output_dir or lower keep_last{fewer}"
        if self.recipe.num_steps is None and self.recipe.keeps_any:
            each = f"{state / 2**30:.1f} GiB for each permanent checkpoint"
            return WARNING, f"{text}; and {each}: num_epochs does not say yet how many"
        return OK, text

    def _hub(self) -> Finding:
        if not self.recipe.push_to_hub or self.recipe.hub_model_id is None:
            return OK, "not pushing"
        check_hub_rights(self.recipe.hub_model_id, private=self.recipe.hub_private)
        text = f"may write to {self.recipe.hub_model_id}"
        if self.model is None or not (pushed := _num_pushed(self.recipe)):
            return OK, text
        one = 4 * self.model.num_parameters()
        if self.recipe.hub_state:
            one = _state_bytes(self.model, self.recipe)
        return OK, (
            f"{text}, where up to {count_of(pushed, 'checkpoint')} will take "
            f"{pushed * one / 2**30:.1f} GiB (hub_strategy {self.recipe.hub_strategy})"
        )

    def _time(self) -> Finding:
        if self.recipe.num_steps is None or not self.need:
            return WARNING, "no estimate: training was not timed, or its length is in epochs"
        tokens = self.recipe.tokens_before(self.recipe.num_steps)
        hours = tokens / self.need / 3600
        minutes = count_of(math.ceil(hours * 60), "minute")
        spoken = f"{hours:,.1f} hours" if hours >= 1 else minutes
        money = ""
        if self.price is not None:
            money = f", {hours * self.num_processes * self.price:,.2f} at {self.price:g} an hour"
            money += f" and {self.device.type}"
        text = f"about {spoken} for {in_short(tokens)} tokens{money} (an estimate)"
        if note := endless_warmup(self.recipe):
            return WARNING, f"{text}. {note}"
        return OK, text


def _state_bytes(model: GPT2ReproForCausalLM, recipe: Recipe) -> int:
    """Weights, their average and the optimizer's state: of an update that computes nothing."""
    with torch.device("meta"):
        model = type(model)(model.config)
    optimizer = build_optimizer(model, recipe)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [each for state in optimizer.state.values() for each in state.values()]
    return sum(each.nbytes for each in [*model.parameters(), *states])


def _num_pushed(recipe: Recipe) -> int:
    """Of how many steps a run uploads checkpoints: all stay in its repository's history."""
    last = recipe.num_steps
    if recipe.hub_strategy == "final" or last is None or last > MOST_COUNTED:
        return 0
    if recipe.hub_strategy == "permanent":  # and the trained model
        return recipe.num_kept(last) + (not recipe.keeps(last))
    return sum(is_saved(recipe, step) for step in range(last + 1))


def _saved_bytes(recipe: Recipe) -> int:
    """Of the checkpoints that the run's directory has already, among those that are kept."""
    directory, found = RunDirectory(recipe.run_dir), 0
    for path in [*directory.checkpoints.glob("step_*"), *directory.stable.glob("step_*")]:
        with suppress(OSError, ValueError):  # it is being pruned, or is none
            state = state_of(path)
            if not state.get("permanent") or recipe.keeps(state["step"]):
                found += sum(file.stat().st_size for file in path.iterdir())
    return found


def _pinned_share(model: torch.nn.Module) -> float:
    """How much more memory copies of the parameters take where torch pins it, in powers of two."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    return sum(2 ** math.ceil(math.log2(size)) for size in sizes) / sum(sizes)


def _training_rate(
    model: torch.nn.Module, recipe: Recipe, rows: int, device: torch.device
) -> float:
    """Tokens/s of uncompiled forward and backward passes of `rows` rows on `device`."""
    model.to(device).train()
    ids = torch.zeros((rows, recipe.sequence_length), dtype=torch.long, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.mixed_precision == "bf16")

    def forward_backward() -> None:
        with autocast:
            loss = model(input_ids=ids, shift_labels=ids, skip_logits=True).loss
        loss.backward()
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    forward_backward()  # the first one allocates
    began, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < STEP_SECONDS or count == 0:
        forward_backward()
        count += 1
    return count * ids.numel() / seconds
