"""A training step of GPT-2: ours against transformers' `GPT2LMHeadModel`, in alternation.

    python benchmarks/train_step.py --mode eager --output benchmarks/results/train_step_eager.json

A step is forward and backward of one micro-batch under autocast, gradients dropped at its end; the
optimizer, the same for both, is left out. Ours runs as train_accelerate.py runs it: the loss
without logits, and on a CPU freed memory is kept from the second step on and bfloat16 has an
attention of its own (gpt2repro/speed/).
Theirs gets the same rows, no dropout, no cache, and the C library's memory as it is by default.
On a GPU fp32 means TF32 for both, as in training.
With `--same_allocator` theirs is treated like ours there: what is left is the model's.
With `--nanogpt PATH/TO/model.py`, a copy of nanoGPT's file, a third takes part: bias, and its own
vocabulary of 50,304.
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pairing import (
    Contestant,
    Turn,
    alternate,
    circumstances,
    closing_all,
    paired_ratio,
    ratio_text,
    spread,
    table,
    write_json,
)
from transformers import GPT2Config, GPT2LMHeadModel

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.speed import compilation, cpu_attention, cpu_memory, lm_head
from gpt2repro.system.command_line import run
from gpt2repro.training.throughput import flops_per_token, peak_flops
from modeling_gpt2repro import GPT2ReproForCausalLM

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def build(
    who: str,
    keeps_memory: bool,
    mode: str,
    dtype: str,
    device: str,
    num_rows: int,
    num_steps: int,
    sequence_length: int,
    shape: dict,
    nanogpt: str | None,
) -> Turn:
    """A contestant: its model, compiled in place if asked, and a step on fixed random rows."""
    if keeps_memory and device == "cpu":
        cpu_memory.return_freed_memory()
    if device != "cpu":
        torch.set_float32_matmul_precision("high")  # TF32, as our script and nanoGPT's have it
    torch.manual_seed(0)
    shape = {"n_positions": sequence_length, **shape}
    if who == "theirs":
        model = GPT2LMHeadModel(GPT2Config(**shape, **NO_DROPOUT, bos_token_id=0, eos_token_id=0))
    elif who == "nanogpt":
        code = module_at(nanogpt)
        layers = {name: shape[name] for name in ("n_layer", "n_head", "n_embd")}
        vocab_size = shape["vocab_size"] + -shape["vocab_size"] % 64
        config = code.GPTConfig(block_size=sequence_length, vocab_size=vocab_size, **layers)
        config.dropout, config.bias = 0.0, True
        model = code.GPT(config)
    else:
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=0, eos_token_id=0))
        lm_head.use_in(model)
        if device == "cpu" and dtype == "bf16":
            cpu_attention.use_in(model)
    model.to(device).train()
    if mode == "compiled":
        compilation.compile_in_place(model) if who == "ours" else model.compile()
    rows = torch.randint(0, shape["vocab_size"], (num_rows, sequence_length + 1), device=device)
    ids, wanted = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def loss_of_rows() -> torch.Tensor:
        if who == "nanogpt":
            return model(ids, wanted)[1]
        if who == "theirs":  # takes shift_labels only if it is given labels as well
            return model(ids, labels=wanted, shift_labels=wanted, use_cache=False).loss
        return model(ids, shift_labels=wanted, skip_logits=True).loss

    def steps(number: int) -> dict[str, float]:
        for _ in range(number):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
                loss = loss_of_rows()
            loss.backward()
            model.zero_grad()
        return {"loss": loss.item()}

    steps(1)  # compiles; one more warm-up
    if keeps_memory and device == "cpu":
        cpu_memory.keep_freed_memory()
    return partial(steps, num_steps)


def module_at(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt", path)
    sys.modules["nanogpt"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(arguments) -> dict[str, Any]:
    shape = {"n_layer": arguments.n_layer, "n_head": arguments.n_head, "n_embd": arguments.n_embd}
    settings = {
        "mode": arguments.mode,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "num_rows": arguments.num_rows,
        "num_steps": arguments.steps,
        "sequence_length": arguments.sequence_length,
        "shape": shape | {"vocab_size": arguments.vocab_size},
        "nanogpt": arguments.nanogpt,
    }
    keeping = {"theirs": arguments.same_allocator}
    if arguments.nanogpt:
        keeping["nanogpt"] = arguments.same_allocator
    keeping["ours"] = True
    with closing_all(
        [
            Contestant(who, build, who=who, keeps_memory=keeps, **settings)
            for who, keeps in keeping.items()
        ]
    ) as contestants:
        turns = alternate(contestants, num_rounds=arguments.rounds, num_warmups=arguments.warmups)
        memory = {c.name: c.ask("peak_memory") for c in contestants}
    seconds = {who: [turn["seconds"] for turn in turns[who]] for who in turns}
    tokens = arguments.steps * arguments.num_rows * arguments.sequence_length
    return {
        "seconds": seconds,
        "loss": {who: turns[who][-1]["loss"] for who in turns},
        "tokens_per_second": {who: tokens / spread(s)["median"] for who, s in seconds.items()},
        "peak_memory_bytes": memory,
        "speed_ratio": {
            who: paired_ratio(seconds[who], seconds["ours"]) for who in memory if who != "ours"
        },
        "memory_ratio": {who: memory["ours"] / memory[who] for who in memory if who != "ours"},
    }


def mfu(arguments, tokens_per_second: float) -> float | None:
    """Model FLOPs utilization; None where no peak is published, as for CPUs, or not of bf16."""
    peak = peak_flops(torch.device(arguments.device))
    if peak is None or arguments.dtype != "bf16":
        return None
    width, layers = arguments.n_embd, arguments.n_layer
    multiplied = arguments.vocab_size * width + layers * 12 * width**2
    return (
        tokens_per_second
        * flops_per_token(multiplied, layers, width, arguments.sequence_length)
        / peak
    )


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="benchmarks/train_step.py", description=__doc__.split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--mode", choices=("eager", "compiled"), default="compiled")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--num_rows", type=int, default=16 if cuda else 2, help="micro-batch")
    parser.add_argument("--sequence_length", type=int, default=1024)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_head", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--steps", type=int, default=10 if cuda else 1, help="a turn")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument(
        "--same_allocator", action="store_true", help="theirs keeps and gives back memory like ours"
    )
    parser.add_argument("--nanogpt", metavar="PATH", help="nanoGPT's model.py takes part too")
    parser.add_argument("--output", help="JSON")
    arguments = parser.parse_args(argv)
    if arguments.nanogpt and not (
        arguments.nanogpt.endswith(".py") and Path(arguments.nanogpt).is_file()
    ):
        raise UserError(
            f"--nanogpt: {arguments.nanogpt} is not a Python file: give nanoGPT's model.py"
        )

    around = circumstances(vars(arguments) | {"nanogpt": bool(arguments.nanogpt)})
    found = measure(arguments)
    found["mfu"] = {who: mfu(arguments, rate) for who, rate in found["tokens_per_second"].items()}
    rows = [
        [
            who,
            f"{found['tokens_per_second'][who]:,.0f}",
            f"{found['peak_memory_bytes'][who] / 2**20:,.0f}",
            "-" if found["mfu"][who] is None else f"{found['mfu'][who]:.1%}",
        ]
        for who in found["seconds"]
    ]
    print(table(["", "tokens/s", "peak MiB", "MFU"], rows))
    for who, ratio in found["speed_ratio"].items():
        print(f"ours is {ratio_text(ratio)} times as fast as {who} (median, quartiles)")
        print(f"and needs {found['memory_ratio'][who]:.3f} of the memory")
    write_json(arguments.output, {"benchmark": "train_step", **around, **found})
    return 0


if __name__ == "__main__":
    sys.exit(run("benchmarks/train_step.py", main, sys.argv[1:]))
