"""What a run runs on: the processes that `accelerate launch` started."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, InitProcessGroupKwargs
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from gpt2repro import UserError
from gpt2repro.data.rows.lanes import check_lanes
from gpt2repro.recipe_fields import Recipe
from gpt2repro.speed.low_precision import has_bf16
from gpt2repro.system import machine, ranks
from gpt2repro.system.patience import GIVE_UP_AFTER_SECONDS
from gpt2repro.system.signals import end_with_launcher
from gpt2repro.training.tracker import check_tracker

# How long ranks wait for one that does something alone: it sits out an outage of its data at the
# start, compiles its first step, or writes a checkpoint to a slow disk.
LONGEST_WAIT_SECONDS = 2 * GIVE_UP_AFTER_SECONDS
# Within the loop. All are together every few seconds there, also while they wait for data: one that
# is late by so much hangs. It is what NCCL waits by default.
LOOP_WAIT_SECONDS = 600
OTHER_ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start_engine(recipe: Recipe) -> Accelerator:
    """The engine that `accelerate launch` chose, one process or many.

    Raises:
        UserError: the processes of this launch do not see each other, or cannot share the lanes.
    """
    end_with_launcher()
    check_tracker(recipe.report_to)
    try:
        launched = int(os.environ.get("WORLD_SIZE", 1))
        accelerator = Accelerator(
            cpu=_cpu_is_asked_for(),
            mixed_precision=recipe.mixed_precision,
            log_with=None if recipe.report_to == "none" else recipe.report_to,
            project_dir=recipe.run_dir,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=LONGEST_WAIT_SECONDS))
            ],
        )
    except (ImportError, ValueError, RuntimeError) as error:
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
    check_engine(accelerator)
    machine.check_torch(accelerator.device)
    if recipe.mixed_precision == "bf16" and not has_bf16(accelerator.device):
        raise UserError("mixed_precision bf16: this GPU only emulates it: set it to no")
    check_lanes(
        recipe.num_lanes,
        rows_per_step=recipe.rows_per_step,
        world_size=accelerator.num_processes,
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        own_precision(accelerator)
    if accelerator.device.type != "cpu":
        _talk_by_hosts()
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    return accelerator


def check_engine(accelerator: Accelerator) -> None:
    """Refuse what `accelerate launch` offers and this loop does not know how to use.

    It shares a batch between all processes, and saves, validates and exports a model whose
    parameters are whole or DTensors, with the names of a GPT-2. An engine that shares a batch
    otherwise or wraps parts of the model fails late, or saves what nobody can load.
    """
    state, parallel = accelerator.state, getattr(accelerator, "parallelism_config", None)
    problem = None
    if accelerator.distributed_type in OTHER_ENGINES:
        problem = f"distributed_type {accelerator.distributed_type.value}: use DDP or FSDP2"
    elif state.dynamo_plugin.backend != DynamoBackend.NO:
        problem = "dynamo_backend: leave it out, the recipe's `compile` compiles in place"
    elif any(getattr(parallel, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")):
        problem = "parallelism_config: only data parallel dimensions can be more than 1"
    elif accelerator.distributed_type == DistributedType.FSDP:
        plugin = state.fsdp_plugin
        if plugin.fsdp_version != 2:
            problem = "fsdp_version 1: set it to 2"
        elif plugin.activation_checkpointing:
            problem = "fsdp_activation_checkpointing: set the recipe's gradient_checkpointing"
        elif plugin.auto_wrap_policy is size_based_auto_wrap_policy:
            problem = "fsdp_auto_wrap_policy SIZE_BASED_WRAP: set it to TRANSFORMER_BASED_WRAP"
        elif isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            problem = "fsdp_offload_params: set it to false"
    if problem:
        raise UserError(f"the launcher's {problem} (launch/ has files that work)")


def _talk_by_hosts() -> None:
    try:
        ranks.talk_by_hosts(LONGEST_WAIT_SECONDS)
    except RuntimeError as error:
        raise UserError(
            f"the hosts of this launch do not reach each other over gloo: {error}; set "
            "GLOO_SOCKET_IFNAME to the network interface between them (`ip address` lists them)"
        ) from None


def own_precision(accelerator: Accelerator) -> None:
    """FSDP2's share of bf16: parameters are gathered in it, sums and outputs stay as they are.

    accelerate would round all three: losses to multiples of 1/32, and gradients at every one of
    their sums over ranks and micro-batches. To be called before `prepare`.
    """
    if accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None
        )


def _cpu_is_asked_for() -> bool:
    """Whether the launch wants CPU processes: it says so, or hides every GPU from them."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return asked or visible == "" or (visible or "").startswith("-1")
