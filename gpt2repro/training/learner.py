"""What learns: the model on its device, its optimizer, and how many rows it takes at a time."""

import contextlib
import gc
from dataclasses import dataclass

import accelerate
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.distributed.tensor import DTensor

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro import UserError
from gpt2repro.data.rows.lanes import divisors
from gpt2repro.data.tokens.token_ids import begin_id, end_ids, num_ids
from gpt2repro.recipe import accumulation_steps
from gpt2repro.recipe_fields import Recipe
from gpt2repro.records import checkpoints
from gpt2repro.records.run_directory import Start
from gpt2repro.records.saved_models import find_tokenizer, load_causal_lm
from gpt2repro.speed import attention, cpu_memory, lm_head
from gpt2repro.speed.compilation import compile_in_place
from gpt2repro.speed.low_precision import SIDE, has_fp8, hold_stream_in_bf16
from gpt2repro.system import machine, ranks
from gpt2repro.training.micro_batch import largest_that_fits
from gpt2repro.training.optim.averaging import drop_average
from gpt2repro.training.optim.registry import build_optimizer
from gpt2repro.training.throughput import model_flops_per_token
from modeling_gpt2repro import GPT2ReproBlock, GPT2ReproForCausalLM


@dataclass(frozen=True)
class Learner:
    """Model and optimizer as accelerate prepared them, with the state of the step to come."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: AcceleratedOptimizer
    micro_batch_size: int
    fitted_to: str | None  # what decided the size, if it was `auto`
    max_grad_norm: float
    num_parameters: int
    flops_per_token: float

    def settle(self) -> None:
        """After the first step: what is there by now stays, and no collector need look at it."""
        gc.collect()
        gc.freeze()
        if self.accelerator.device.type == "cpu":
            cpu_memory.keep_freed_memory()


def open_learner(recipe: Recipe, accelerator: Accelerator, tokenizer, start: Start) -> Learner:
    """Build the model, suit it to the device, and load the checkpoint it begins from.

    Raises:
        UserError: naming the field to change.
    """
    bare = build_model(recipe, tokenizer)
    num_parameters = bare.num_parameters()
    flops_per_token = model_flops_per_token(bare, recipe.sequence_length)
    model, optimizer = place(recipe, accelerator, bare)
    micro_batch_size = recipe.micro_batch_size
    fitted_to = None
    if micro_batch_size == "auto":
        fitted_to = _what_a_size_fits(recipe, accelerator)
        same = start.state.get("fitted_to") == fitted_to
        if same and start.state.get("world_size") == accelerator.num_processes:
            # Another size would round differently.
            micro_batch_size = int(start.recipe["micro_batch_size"])
        else:
            micro_batch_size = _largest_micro_batch(recipe, accelerator, model)
    accelerator.gradient_accumulation_steps = accumulation_steps(
        recipe, ranks.world_size(), micro_batch_size
    )
    if rank := ranks.rank():  # with the seed of the others it would drop the same units
        torch.manual_seed(recipe.seed + start.step + 10_000_019 * rank)
    if start.path is not None:
        checkpoints.load(start.path, model=model, optimizer=optimizer)
        if not recipe.ema_decay:
            drop_average(optimizer)
    return Learner(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        micro_batch_size=micro_batch_size,
        fitted_to=fitted_to,
        max_grad_norm=recipe.max_grad_norm,
        num_parameters=num_parameters,
        flops_per_token=flops_per_token,
    )


def build_model(recipe: Recipe, tokenizer) -> GPT2ReproForCausalLM:
    """Random weights by the seed, or those of `init_from`, in fp32 on the CPU."""
    torch.manual_seed(recipe.seed)
    start = None
    if recipe.init_from is not None:
        start = load_causal_lm(recipe.init_from, option="init_from", dtype=torch.float32)
    config = start.config if start else _architecture(recipe, tokenizer)
    for name in ("n_layer", "n_head", "n_embd"):
        if start and (asked := getattr(recipe, name)) not in (None, getattr(config, name)):
            raise UserError(f"{name} {asked}: init_from has {getattr(config, name)}; leave it out")
    config.update(dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), recipe.dropout))
    try:
        name = attention.activate(recipe.attn_implementation)
        model = GPT2ReproForCausalLM._from_config(config, attn_implementation=name)
    except ImportError as error:
        raise UserError(f"attn_implementation {recipe.attn_implementation}: {error}") from None
    if start:
        model.load_state_dict(start.state_dict())
        if recipe.tokenizer_name != recipe.init_from:  # else it is the same, read twice
            _check_tokenizer(recipe, tokenizer)
    if (needed := num_ids(tokenizer)) > model.config.vocab_size:
        raise UserError(
            f"tokenizer_name has {needed} tokens, init_from only {model.config.vocab_size}"
        )
    if recipe.sequence_length > model.config.n_positions:
        raise UserError(
            f"sequence_length {recipe.sequence_length} is more than the {model.config.n_positions} "
            "positions of init_from"
        )
    if recipe.gradient_checkpointing:
        # The second name goes with transformers 6; versions that we support lack the first.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    return model


def _check_tokenizer(recipe: Recipe, tokenizer) -> None:
    """Refuse ids that mean something else to the weights, where those come with a tokenizer."""
    known: dict[str, int] = {}
    with contextlib.suppress(UserError):  # there is none, or none that is fast
        known = find_tokenizer(str(recipe.init_from), option="init_from").get_vocab()
    for token, number in tokenizer.get_vocab().items():
        if known.get(token, number) != number:
            raise UserError(
                f"tokenizer_name {recipe.tokenizer_name}: it gives {token!r} as {number}, and "
                f"init_from was trained with {known[token]}; set it to {recipe.init_from}"
            )


def _architecture(recipe: Recipe, tokenizer) -> GPT2ReproConfig:
    """Its vocabulary is exactly the tokenizer's, its context the recipe's."""
    ends = end_ids(tokenizer)
    overrides = {
        name: value
        for name in ("n_layer", "n_head", "n_embd")
        if (value := getattr(recipe, name)) is not None
    }
    try:
        config = GPT2ReproConfig.from_size(
            recipe.model_size,
            vocab_size=num_ids(tokenizer),
            n_positions=recipe.sequence_length,
            bos_token_id=begin_id(tokenizer),
            eos_token_id=ends if len(ends) > 1 else ends[0],
            **overrides,
        )
    except (ValueError, StrictDataclassError) as error:
        raise UserError(str(error.__cause__ or error)) from None
    least = 4 * 12 * config.n_layer * config.n_embd**2  # bytes of the matrices in fp32
    if least > (memory := machine.main_memory()):
        raise UserError(
            f"n_layer {config.n_layer}, n_embd {config.n_embd}: {least / 2**30:,.0f} GiB of "
            f"weights do not fit this machine's {memory / 2**30:,.0f}"
        )
    return config


def check_device(recipe: Recipe, device: torch.device) -> None:
    """Refuse what the recipe asks of a device that has it not."""
    implementation = recipe.attn_implementation
    if device.type in ("cpu", "mps") and implementation == "flex_attention":
        raise UserError("attn_implementation flex_attention: no CPU or Mac trains by it; use sdpa")
    if not attention.runs_on(implementation, device):
        raise UserError(
            f"attn_implementation {implementation}: this device has no such kernel (3 is for "
            "Hopper, 4 for Hopper and Blackwell); use sdpa"
        )
    recomputes = recipe.gradient_checkpointing and recipe.compile and recipe.dropout
    if device.type == "cuda" and recomputes and torch.__version__ >= "2.13.dev0":
        raise UserError(
            "gradient_checkpointing, compile and dropout: what torch 2.13 and newer compile for a "
            "GPU may drop other activations in the backward pass than in the forward "
            "(pytorch/pytorch#198333): leave one of the three out"
        )
    if recipe.fp8_head and not has_fp8(device):
        raise UserError("fp8_head: this GPU has no 8-bit products (Ada and Hopper do)")


def place(
    recipe: Recipe, accelerator: Accelerator, model: GPT2ReproForCausalLM
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Suit the model to its device, compile it in place, and hand it and an optimizer over."""
    sharded = accelerator.distributed_type == DistributedType.FSDP
    check_device(recipe, accelerator.device)
    if recipe.fp8_head and model.config.n_embd % SIDE:
        raise UserError(f"fp8_head needs a multiple of {SIDE} for n_embd {model.config.n_embd}")
    # With FSDP the model around the head is not compiled; see below.
    lm_head.use_in(model, fp8=recipe.fp8_head, compiled_loss=recipe.compile and sharded)
    if recipe.bf16_residual:
        hold_stream_in_bf16(model)
    if recipe.compile:
        # FSDP gathers parameters block by block, between the compiled regions.
        blocks = [m for m in model.modules() if isinstance(m, GPT2ReproBlock)]
        # Where memory is short, what is recomputed anyway need not be kept.
        less_memory = accelerator.device.type == "cpu" or recipe.gradient_checkpointing
        for module in blocks if sharded else [model]:
            compile_in_place(module, less_memory=less_memory, max_autotune=recipe.max_autotune)
    optimizer = build_optimizer(model.to(accelerator.device), recipe)
    model, optimizer = accelerator.prepare(model, optimizer)
    _refuse_untrained(model, optimizer)
    return model, optimizer


def _refuse_untrained(model: nn.Module, optimizer: AcceleratedOptimizer) -> None:
    """accelerate 1.14 unties the head that FSDP2 shards: it would stay as it is, and be saved."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in trained:
            raise UserError(
                f"accelerate {accelerate.__version__} took {name} away from the optimizer, so that "
                "it would not train; install another version (requirements.txt has one)"
            )


def _what_a_size_fits(recipe: Recipe, accelerator: Accelerator) -> str:
    """In words, the same on all ranks, what decides which micro-batch is the largest."""
    hardware = set(ranks.gather(machine.hardware(accelerator.device.type)))
    return (
        f"{accelerator.num_processes} processes ({accelerator.distributed_type.value}) on "
        f"{', '.join(sorted(hardware))}, {recipe.mixed_precision}, {recipe.attn_implementation}, "
        f"gradient_checkpointing {recipe.gradient_checkpointing}, average {recipe.ema_decay > 0}, "
        f"dropout {recipe.dropout > 0}, bf16_residual {recipe.bf16_residual}, "
        f"fp8_head {recipe.fp8_head}"
    )


def _largest_micro_batch(recipe: Recipe, accelerator: Accelerator, model: nn.Module) -> int:
    """The largest divisor of a process's rows with which training fits its device."""
    rows_per_rank = recipe.rows_per_step // accelerator.num_processes
    sharded = accelerator.distributed_type == DistributedType.FSDP
    several = any(multiple > 1 for _, multiple in recipe.batch_multiples)  # batches a step, later

    def add_gradients(num_rows: int, *, sync: bool) -> None:
        shape = (num_rows, recipe.sequence_length)
        rows = torch.zeros(shape, dtype=torch.long, device=accelerator.device)
        # Eager code needs at least as much memory as compiled code.
        eager = torch.compiler.set_stance("force_eager")
        with eager, contextlib.nullcontext() if sync else accelerator.no_sync(model):
            loss = model(input_ids=rows, shift_labels=rows, skip_logits=True).loss
            accelerator.backward(loss)

    def forward_backward(num_rows: int) -> None:
        try:
            if several or num_rows < rows_per_rank:
                # Leaves what is kept between micro-batches, by FSDP whole.
                add_gradients(1, sync=False)
            # DDP must not sum gradients: it would wait for a rank that has run out of memory.
            add_gradients(num_rows, sync=sharded)
        except torch.OutOfMemoryError as error:
            if not sharded:
                raise
            # The others wait for this rank's part of the parameters in the middle of a pass, where
            # no message reaches them. It can only end, for the launcher to end them.
            raise UserError(
                f"micro_batch_size auto: out of memory at a size of {num_rows}, and sharded "
                "processes cannot go on from there; set a smaller one, or gradient_checkpointing"
            ) from error
        finally:
            model.zero_grad()

    parameters = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    num_kept = 2 + bool(recipe.ema_decay)
    return largest_that_fits(
        divisors(rows_per_rank),
        forward_backward,
        device=accelerator.device,
        # Adam keeps two values for each parameter that this rank has, Muon no more.
        reserve_bytes=num_kept * sum(p.nbytes for p in parameters if p.requires_grad),
        recovers=not sharded,
    )
