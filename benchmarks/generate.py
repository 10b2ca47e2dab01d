"""Generation with `generate()`: ours against transformers' `GPT2LMHeadModel`, in alternation.

    python benchmarks/generate.py --output benchmarks/results/generate.json

Greedy, fp32 by default, random weights. The time of one new token is the prefill's
(the prompt is read); decoding is what the tokens after it take. `static` is decoding with a static
cache, which transformers compiles by itself on CUDA; on a CPU it is asked to.
"""

import sys
import time
from contextlib import nullcontext
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
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.speed import attention
from gpt2repro.system.command_line import run
from modeling_gpt2repro import GPT2ReproForCausalLM

WAYS = ("theirs", "ours", "theirs_static", "ours_static")
# (ours, against which of theirs)
COMPARED = (("ours", "theirs"), ("ours_static", "theirs"), ("ours_static", "theirs_static"))


def build(
    who: str, dtype: str, device: str, num_rows: int, prompt: int, new_tokens: int, shape: dict
) -> Turn:
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": None}  # no row ends early
    if who.startswith("theirs"):
        model = GPT2LMHeadModel(GPT2Config(**shape, **ends))
    else:
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, **ends))
    model.to(device, getattr(torch, dtype)).eval()
    ids = torch.randint(1, model.config.vocab_size, (num_rows, prompt), device=device)
    how: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "pad_token_id": 0,
    }
    if who.endswith("static"):
        compile_config = CompileConfig(fullgraph=True, dynamic=False)
        compile_config._compile_all_devices = True  # by default a CPU is not worth it
        how |= {"cache_implementation": "static", "compile_config": compile_config}

    def seconds_of(num_tokens: int) -> float:
        synchronize()
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, **how)
        synchronize()
        return time.perf_counter() - began

    def turn() -> dict[str, float]:
        ours = attention.for_generation() if who.startswith("ours") else nullcontext()
        with torch.no_grad(), ours:
            whole, prefill = seconds_of(new_tokens), seconds_of(1)
        return {"prefill": prefill, "decode": max(whole - prefill, 1e-9)}

    return turn


def measure(arguments, num_rows: int) -> dict[str, Any]:
    settings = {
        "dtype": arguments.dtype,
        "device": arguments.device,
        "num_rows": num_rows,
        "prompt": arguments.prompt,
        "new_tokens": arguments.new_tokens,
        "shape": {
            "n_layer": arguments.n_layer,
            "n_head": arguments.n_head,
            "n_embd": arguments.n_embd,
            "vocab_size": arguments.vocab_size,
        },
    }
    ways = [who for who in WAYS if arguments.static or not who.endswith("static")]
    with closing_all([Contestant(who, build, who=who, **settings) for who in ways]) as contestants:
        turns = alternate(contestants, num_rounds=arguments.rounds, num_warmups=arguments.warmups)
    phases = {"prefill": arguments.prompt, "decode": arguments.new_tokens - 1}
    found: dict[str, Any] = {}
    for phase, tokens in phases.items():
        seconds = {who: [turn[phase] for turn in turns[who]] for who in ways}
        found[phase] = {
            "seconds": seconds,
            "tokens_per_second": {
                who: num_rows * tokens / spread(values)["median"] for who, values in seconds.items()
            },
            "speed_ratio": {
                f"{ours}/{theirs}": paired_ratio(seconds[theirs], seconds[ours])
                for ours, theirs in COMPARED
                if ours in ways and theirs in ways
            },
        }
    return found


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="benchmarks/generate.py", description=__doc__.split("\n")[0])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_head", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument(
        "--no_static", dest="static", action="store_false", help="dynamic caches only"
    )
    parser.add_argument("--output", help="JSON")
    arguments = parser.parse_args(argv)

    around = circumstances(vars(arguments))
    results = {size: measure(arguments, size) for size in arguments.batch_sizes}
    rows = [
        [f"batch {size} {phase}", f"{found[phase]['tokens_per_second']['theirs']:,.1f}"]
        + [ratio_text(ratio) for ratio in found[phase]["speed_ratio"].values()]
        for size, found in results.items()
        for phase in ("prefill", "decode")
    ]
    pairs = next(iter(results.values()))["decode"]["speed_ratio"]
    print(table(["", "theirs tok/s", *pairs], rows))
    write_json(arguments.output, {"benchmark": "generate", **around, "batch_sizes": results})
    return 0


if __name__ == "__main__":
    sys.exit(run("benchmarks/generate.py", main, sys.argv[1:]))
