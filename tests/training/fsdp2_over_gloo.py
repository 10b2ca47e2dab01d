"""Run by two processes (see test_fsdp2.py): the training script on accelerate's own FSDP2.

accelerate keeps FSDP for accelerators. What it does there is told to it here, nothing else: the
engine, `prepare` and all of the script are the real ones.
"""

import json
import os
import sys

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch._dynamo.utils import counters

import train_accelerate
from gpt2repro.system import command_line, ranks
from gpt2repro.training import engine, finish


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
    engine.Accelerator = on_fsdp2
    if "WITHOUT_EXPORT" in os.environ:  # one test of it is enough
        finish.finish = lambda run: 0
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it goes on uncompiled
    status = command_line.run("train_accelerate.py", train_accelerate.main, sys.argv[1:])
    print("dynamo", json.dumps(counters["stats"]), flush=True)
    sys.exit(status)
