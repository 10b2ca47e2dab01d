"""A training step of GPT-2: ours against transformers' `GPT2LMHeadModel`, in alternation.

    python benchmarks/train_step.py --mode eager --output benchmarks/results/train_step_eager.json

A step is forward and backward of one micro-batch under autocast, gradients dropped at its end; the
optimizer, the same for both, is left out. Ours runs as train_accelerate.py runs it: the loss
without logits, and on a CPU freed memory is kept from the second step on (gpt2repro/speed/).
Theirs gets the same rows, no dropout, no cache, and the C library's memory as it is by default.
On a GPU fp32 means TF32 for both, as in training.
With `--same_allocator` theirs is treated like ours there: what is left is the model's.
With `--nanogpt PATH/TO/model.py`, a copy of nanoGPT's file, a third takes part: bias, and its own
vocabulary of 50,304. With `--variants fp8_head,less_memory+chunks_4096`, ours takes part in these
forms too; `--against ""` leaves theirs out. Between its turns a contestant holds its weights
and no other memory of a GPU.
"""

import importlib.util
import sys
import time
from dataclasses import dataclass
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
    synchronize,
    table,
    write_json,
)
from transformers import GPT2Config, GPT2LMHeadModel

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro import UserError
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.speed import (
    attention,
    compilation,
    cpu_memory,
    fused_cross_entropy,
    lm_head,
    low_precision,
)
from gpt2repro.system.command_line import run
from gpt2repro.training.throughput import flops_per_token, peak_flops
from modeling_gpt2repro import GPT2ReproForCausalLM

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@dataclass(frozen=True)
class Form:
    """How ours is built; by default as the training script builds it."""

    less_memory: bool = False
    max_autotune: bool = False
    gradient_checkpointing: bool = False
    bf16_residual: bool = False
    fp8_head: bool = False
    sum_within_product: bool = False
    chunk_tokens: int | None = None
    fused_head: bool = True
    cudnn: bool = True
    attention: str = "sdpa"


VARIANTS: dict[str, dict[str, Any]] = {
    "less_memory": {"less_memory": True},
    "max_autotune": {"max_autotune": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "bf16_residual": {"bf16_residual": True},
    "fp8_head": {"fp8_head": True},
    "sum_within_product": {"sum_within_product": True},
    "chunks_4096": {"chunk_tokens": 4096},
    "chunks_16384": {"chunk_tokens": 16384},
    "plain_head": {"fused_head": False},
    "flash": {"cudnn": False},
    "sdpa_flash_3": {"attention": "sdpa_flash_3"},
}


def form(name: str) -> Form:
    """The form of a contestant's name: `ours`, or variants joined by +."""
    changes: dict[str, Any] = {}
    for each in name.split("+") if name != "ours" else ():
        if each not in VARIANTS:
            raise UserError(f"--variants: {each} is none of {', '.join(VARIANTS)}")
        changes |= VARIANTS[each]
    return Form(**changes)


def build_ours(how: Form, mode: str, dtype: str, device: str, shape: dict) -> torch.nn.Module:
    torch.backends.cuda.enable_cudnn_sdp(how.cudnn)
    fused_cross_entropy.SUM_WITHIN_PRODUCT = how.sum_within_product
    if how.chunk_tokens:
        _, block_tokens = fused_cross_entropy.tokens_at_once(torch.device(device))
        tokens = how.chunk_tokens, block_tokens
        fused_cross_entropy.tokens_at_once = lambda device: tokens
    config = GPT2ReproConfig(**shape, bos_token_id=0, eos_token_id=0)
    name = attention.activate(how.attention)
    model = GPT2ReproForCausalLM._from_config(config, attn_implementation=name)
    if how.fused_head:
        lm_head.use_in(model, fp8=how.fp8_head)
    if how.bf16_residual:
        low_precision.hold_stream_in_bf16(model)
    if how.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if mode == "compiled":
        less_memory = how.less_memory or device == "cpu"
        compilation.compile_in_place(model, less_memory=less_memory, max_autotune=how.max_autotune)
    return model


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
        model = build_ours(form(who), mode, dtype, device, shape)
    model.to(device).train()
    if mode == "compiled" and who in ("theirs", "nanogpt"):
        model.compile()
    rows = torch.randint(0, shape["vocab_size"], (num_rows, sequence_length + 1), device=device)
    ids, wanted = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def loss_of_rows() -> torch.Tensor:
        if who == "nanogpt":
            return model(ids, wanted)[1]
        if who == "theirs":  # takes shift_labels only if it is given labels as well
            return model(ids, labels=wanted, shift_labels=wanted, use_cache=False).loss
        return model(ids, shift_labels=wanted, skip_logits=True).loss

    def steps(number: int) -> float:
        for _ in range(number):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
                loss = loss_of_rows()
            loss.backward()
            model.zero_grad()
        return loss.item()

    def turn() -> dict[str, float]:
        if device == "cpu":
            return {"loss": steps(num_steps)}
        steps(1)  # takes the memory that it gives back below
        synchronize()
        began = time.perf_counter()
        loss = steps(num_steps)
        seconds = time.perf_counter() - began
        torch.cuda.empty_cache()
        return {"loss": loss, "seconds": seconds}

    steps(1)  # compiles; one more warm-up
    if keeps_memory and device == "cpu":
        cpu_memory.keep_freed_memory()
    return turn


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
    variants = [name for name in arguments.variants.split(",") if name]
    for name in variants:
        form(name)  # a misspelled one is told before anything is built
    others = [name for name in arguments.against.split(",") if name]
    if arguments.nanogpt:
        others.append("nanogpt")
    keeping = dict.fromkeys(others, arguments.same_allocator)
    keeping |= dict.fromkeys(("ours", *variants), True)
    failed: dict[str, str] = {}
    with closing_all(
        [
            Contestant(who, build, who=who, keeps_memory=keeps, **settings)
            for who, keeps in keeping.items()
        ]
    ) as contestants:
        for contestant in contestants:  # builds it: one that cannot, leaves the others
            try:
                contestant.turn()
            except RuntimeError as error:
                failed[contestant.name] = str(error).strip().splitlines()[-1]
                contestant.close()  # and with its process goes the memory that it has
                if contestant.name == "ours":
                    raise
        running = [c for c in contestants if c.name not in failed]
        turns = alternate(running, num_rounds=arguments.rounds, num_warmups=arguments.warmups)
        memory = {c.name: c.ask("peak_memory") for c in running}
        ours = next(c for c in running if c.name == "ours")
        kernels = ours.ask("profile") if arguments.profile else None
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
        "failed": failed,
        "kernels": kernels,
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
    parser.add_argument("--variants", default="", metavar="A,B+C", help=", ".join(VARIANTS))
    parser.add_argument(
        "--against", default="theirs", metavar="A,B", help="who else; empty: ours alone"
    )
    parser.add_argument("--profile", action="store_true", help="ours: the kernels of a turn")
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
    for who, why in found["failed"].items():
        print(f"{who} did not run: {why}")
    for kernel in found["kernels"] or []:
        print(f"{kernel['share']:7.1%} {kernel['calls']:6d} x  {kernel['name'][:90]}")
    write_json(arguments.output, {"benchmark": "train_step", **around, **found})
    return 0


if __name__ == "__main__":
    sys.exit(run("benchmarks/train_step.py", main, sys.argv[1:]))
