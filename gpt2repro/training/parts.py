"""From the recipe to the parts of a run.

The training script and the verbs that speak of a recipe (`doctor`, `stream-stats`) build the same
parts through it, so what the doctor checks is what the run will use.
"""

import contextlib
import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro import UserError
from gpt2repro.data import demo_corpus
from gpt2repro.data.corpus import Corpus, open_corpus
from gpt2repro.data.stream import TokenStream, count_epoch_tokens
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.evaluation.scoring import hellaswag_tasks
from gpt2repro.evaluation.tasks import Task
from gpt2repro.recipe import Recipe, check_world_size, divisors
from gpt2repro.records.saved_models import load_causal_lm
from gpt2repro.speed import cpu_attention, cpu_memory, fused_cross_entropy
from gpt2repro.speed.compilation import compile_in_place
from gpt2repro.system import ranks
from gpt2repro.system.patience import GIVE_UP_AFTER_SECONDS
from gpt2repro.training.micro_batch import largest_that_fits
from gpt2repro.training.optimizers import build_optimizer
from modeling_gpt2repro import GPT2ReproBlock, GPT2ReproForCausalLM

LONGEST_WAIT = 2 * GIVE_UP_AFTER_SECONDS
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OFFLINE_ADVICE = "; --recipe recipes/demo.yaml trains without a network"


def start_engine(recipe: Recipe) -> Accelerator:
    """The engine that `accelerate launch` chose, one process or many.

    Raises:
        UserError: the processes of this launch do not see each other, or cannot share the lanes.
    """
    check_tracker(recipe.report_to)
    try:
        launched = int(os.environ.get("WORLD_SIZE", 1))
        accelerator = Accelerator(
            cpu=cpu_is_asked_for(),
            mixed_precision=recipe.mixed_precision,
            log_with=None if recipe.report_to == "none" else recipe.report_to,
            project_dir=recipe.run_dir,
            step_scheduler_with_optimizer=False,
            # While one rank sits out an outage of its data, or publishes, the others wait for it.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=LONGEST_WAIT))],
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the engine cannot start: {error} (mixed_precision {recipe.mixed_precision}; the "
            f"launcher sets {', '.join(f'{v} {os.environ.get(v)}' for v in LAUNCH_VARIABLES)})"
        ) from None
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched but each sees only itself, for want of a GPU: all "
            "would write the same run. To train on CPUs use launch/cpu2.yaml, or set "
            "ACCELERATE_USE_CPU=true"
        )
    check_world_size(recipe, accelerator.num_processes)
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    if accelerator.device.type == "cpu":
        cpu_memory.return_freed_memory()  # until the first step has compiled: see there
    return accelerator


def check_tracker(name: str) -> None:
    """Refuse a tracker whose package is missing; accelerate would go on without a word."""
    if name != "none" and name not in get_available_trackers():
        raise UserError(
            f"report_to {name}: its package is not installed; `pip install {name}`, or set "
            "report_to to none (metrics.jsonl has every figure)"
        )


def cpu_is_asked_for() -> bool:
    """Whether the launch wants CPU processes: it says so, or hides every GPU from them."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return asked or visible == "" or (visible or "").startswith("-1")


# --- Data ---------------------------------------------------------------------------------------


def open_tokenizer(recipe: Recipe):
    """The recipe's tokenizer, from the Hub, a directory or the demo."""
    name = recipe.tokenizer_name
    if name == demo_corpus.NAME:
        name = str(demo_corpus.prepare() / "tokenizer")
    return load_tokenizer(name, if_unreachable=OFFLINE_ADVICE)


def open_dataset(recipe: Recipe, revision: str | None = None) -> Corpus:
    """The recipe's text; `revision` is the commit that a resumed run had pinned."""
    name, config = recipe.dataset_name, recipe.dataset_config
    if name == demo_corpus.NAME:
        name, config = str(demo_corpus.prepare()), None
    return open_corpus(
        name,
        config=config,
        split=recipe.dataset_split,
        revision=recipe.dataset_revision or revision,
        data_files=recipe.data_files,
        text_column=recipe.text_column,
        if_unreachable=OFFLINE_ADVICE,
    )


def open_stream(recipe: Recipe, corpus: Corpus, encoder, rank: int, world_size: int) -> TokenStream:
    return TokenStream(
        corpus,
        encoder,
        sequence_length=recipe.sequence_length,
        rows_per_step=recipe.rows_per_step,
        num_lanes=recipe.num_lanes,
        num_validation_units=recipe.num_validation_units,
        seed=recipe.seed,
        rank=rank,
        world_size=world_size,
        num_reader_threads=recipe.num_reader_threads,
        token_cache_dir=recipe.token_cache_dir,
    )


def open_hellaswag(recipe: Recipe, tokenizer) -> list[Task]:
    """The benchmark in both conventions, if the recipe scores it during training."""
    if "hellaswag" not in recipe.eval_tasks:
        return []
    return hellaswag_tasks(
        tokenizer, max_length=recipe.sequence_length, hellaswag_file=recipe.hellaswag_file
    )


def steps_of_epochs(recipe: Recipe, corpus: Corpus, encoder) -> int:
    """`num_epochs` in optimizer steps, rounded down; the ranks share the counting."""
    assert recipe.num_epochs is not None
    counted = count_epoch_tokens(
        corpus,
        encoder,
        recipe.num_validation_units,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        num_reader_threads=recipe.num_reader_threads,
        token_cache_dir=recipe.token_cache_dir,
    )
    steps = sum(ranks.gather(counted)) * recipe.num_epochs // recipe.batch_tokens
    if steps == 0:
        raise UserError("num_epochs is less than one step: lower batch_tokens or raise num_epochs")
    return steps


# --- Model --------------------------------------------------------------------------------------


def model_config(recipe: Recipe, tokenizer) -> GPT2ReproConfig:
    """The architecture; its vocabulary is exactly the tokenizer's, its context the recipe's."""
    overrides = {
        name: value
        for name in ("n_layer", "n_head", "n_embd")
        if (value := getattr(recipe, name)) is not None
    }
    try:
        return GPT2ReproConfig.from_size(
            recipe.model_size,
            vocab_size=len(tokenizer),
            n_positions=recipe.sequence_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **overrides,
        )
    except (ValueError, StrictDataclassError) as error:
        raise UserError(str(error.__cause__ or error)) from None


def build_model(recipe: Recipe, tokenizer) -> GPT2ReproForCausalLM:
    """Random weights by the seed, or those of `init_from`, in fp32 on the CPU."""
    torch.manual_seed(recipe.seed)
    start = None
    if recipe.init_from is not None:
        start = load_causal_lm(recipe.init_from, option="init_from", dtype=torch.float32)
    config = start.config if start else model_config(recipe, tokenizer)
    config.update(dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), recipe.dropout))
    attention = recipe.attn_implementation
    try:
        model = GPT2ReproForCausalLM._from_config(config, attn_implementation=attention)
    except ImportError as error:
        raise UserError(f"attn_implementation {attention}: {error}") from None
    if start:
        model.load_state_dict(start.state_dict())
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"tokenizer_name has {len(tokenizer)} tokens, init_from only {model.config.vocab_size}"
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


def place(recipe: Recipe, accelerator: Accelerator, model: GPT2ReproForCausalLM):
    """Suit the model to its device, compile it in place, and hand it and an optimizer over."""
    sharded = accelerator.distributed_type == DistributedType.FSDP
    on_cpu = accelerator.device.type == "cpu"
    fused_cross_entropy.use_in(model)
    if on_cpu and recipe.mixed_precision == "bf16" and recipe.attn_implementation == "sdpa":
        cpu_attention.use_in(model)
    if recipe.compile:
        # FSDP gathers parameters block by block, between the compiled regions.
        blocks = [m for m in model.modules() if isinstance(m, GPT2ReproBlock)]
        for module in blocks if sharded else [model]:
            compile_in_place(module)
    optimizer = build_optimizer(
        model.to(accelerator.device),
        name=recipe.optimizer,
        max_lr=recipe.max_lr,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        epsilon=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
        muon_lr=recipe.muon_lr,
        muon_momentum=recipe.muon_momentum,
        muon_weight_decay=recipe.muon_weight_decay,
    )
    return accelerator.prepare(model, optimizer)


def largest_micro_batch(recipe: Recipe, accelerator: Accelerator, model: nn.Module) -> int:
    """The largest divisor of a process's rows that fits its device."""

    def forward_backward(num_rows: int) -> None:
        shape = (num_rows, recipe.sequence_length)
        rows = torch.zeros(shape, dtype=torch.long, device=accelerator.device)
        # Eager code needs at least as much memory as compiled code. DDP must not sum gradients:
        # it would wait for a rank that has run out of memory.
        alone = getattr(model, "no_sync", contextlib.nullcontext)
        with torch.compiler.set_stance("force_eager"), alone():
            accelerator.backward(model(input_ids=rows, shift_labels=rows, skip_logits=True).loss)
        model.zero_grad()

    return largest_that_fits(
        divisors(recipe.rows_per_step // accelerator.num_processes),
        forward_backward,
        device=accelerator.device,
        # Adam keeps two values for each parameter.
        reserve_bytes=2 * sum(p.numel() * p.element_size() for p in model.parameters()),
    )
