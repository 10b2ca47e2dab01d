"""Run by two processes (see test_engines.py): the training script on accelerate's own engines.

accelerate keeps FSDP for accelerators. What it does there is told to it here, nothing else: the
engine, `prepare` and all of the script are the real ones. DDP gets buckets so small that a tiny
model has several, at which the compiler cuts its graph.
"""

import functools
import json
import os
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from torch._dynamo.utils import counters

import train_accelerate
from gpt2repro.speed.compilation import compile_in_place
from gpt2repro.system import command_line, ranks
from gpt2repro.training import engine, finish, learner


def on_ddp(kwargs_handlers: list, **options) -> Accelerator:
    dist._DEFAULT_FIRST_BUCKET_BYTES = 10_000
    buckets = DistributedDataParallelKwargs(bucket_cap_mb=0.05)
    return Accelerator(kwargs_handlers=[*kwargs_handlers, buckets], **options | {"cpu": True})


def on_fsdp2(**options) -> Accelerator:
    accelerator = Accelerator(**options | {"cpu": True})
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=["GPT2ReproBlock"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    if options["mixed_precision"] != "no":
        plugin.set_mixed_precision(options["mixed_precision"])  # as its own launch does
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    ranks.talk_by_hosts(60)  # as beside NCCL
    return accelerator


if __name__ == "__main__":
    engine.Accelerator = {"ddp": on_ddp, "fsdp2": on_fsdp2}[os.environ["ENGINE"]]
    if "WITHOUT_EXPORT" in os.environ:  # one test of it is enough
        finish.finish = lambda run: 0
    if backend := os.environ.get("BACKEND"):
        learner.compile_in_place = functools.partial(compile_in_place, backend=backend)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it goes on uncompiled
    status = command_line.run("train_accelerate.py", train_accelerate.main, sys.argv[1:])
    sys.stdout.flush()  # then in one piece, since two processes write here
    os.write(1, f"\ndynamo {json.dumps(counters['stats'])}\n".encode())
    sys.exit(status)
