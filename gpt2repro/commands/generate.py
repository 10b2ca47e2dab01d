"""The verb `generate`: continue a prompt, printing tokens as they come.

gpt2repro generate --model runs/demo/final --prompt "This function returns"
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gpt2repro import UserError
from gpt2repro.commands.parser import DTYPES, OneLineParser, find_device, named
from gpt2repro.system.text import printable

if TYPE_CHECKING:
    import torch


def main(argv: list[str]) -> int:
    """`gpt2repro generate --model DIR --prompt TEXT`; the prompt and its continuation on stdout."""
    options = _parse(argv)
    import torch
    from transformers import LogitsProcessor, TextStreamer

    from gpt2repro.data.tokens.token_ids import end_ids
    from gpt2repro.records.saved_models import check_ids, find_tokenizer, load_causal_lm, locate
    from gpt2repro.speed import attention

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    class Finite(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not (scores < float("inf")).all():  # sampling would fail, the likeliest be nonsense
                raise UserError(
                    f"--model {options.model}: its logits are not finite: NaN or inf in its "
                    "weights, or too large for --dtype float16"
                )
            return scores

    device, source = find_device(options.device), locate(options.model)
    model: Any = load_causal_lm(source, dtype=DTYPES.get(options.dtype, options.dtype))
    model.to(device)
    tokenizer = find_tokenizer(source, options.tokenizer)
    inputs = _encode(tokenizer, _read_prompt(options.prompt), device)
    check_ids(inputs["input_ids"][0].tolist(), model)
    room = model.config.n_positions - inputs["input_ids"].shape[1]
    if room < 1:
        raise UserError(
            f"--prompt: {model.config.n_positions - room} tokens leave no room in the model's "
            f"context of {model.config.n_positions}"
        )
    if options.seed is not None:
        torch.manual_seed(options.seed)
    streamed = options.num_return_sequences == options.num_beams == 1
    streamer = Printer(tokenizer, skip_special_tokens=True) if streamed else None
    with torch.inference_mode(), attention.for_generation(), _refusals_in_a_line(options.model):
        texts = model.generate(
            **inputs,
            **_sampling(options),
            max_new_tokens=min(options.max_new_tokens, room),
            pad_token_id=next(iter(end_ids(tokenizer)), None),
            logits_processor=[Finite()],
            return_dict_in_generate=False,
            tokenizer=tokenizer,  # for the model's own stop strings
            streamer=streamer,
        )
    if not streamed:
        print(printable("\n\n".join(tokenizer.batch_decode(texts, skip_special_tokens=True))))
    if options.max_new_tokens > room and texts.shape[1] == model.config.n_positions:
        full = f"The model's context of {model.config.n_positions} tokens is full"
        print(f"{full}, before {options.max_new_tokens} new ones.", file=sys.stderr)
    return 0


@contextmanager
def _refusals_in_a_line(model: str) -> Iterator[None]:
    """Options have been checked: what `generate` still refuses the model's own settings ask for."""
    try:
        yield
    except (ValueError, ImportError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"--model {model}: its own settings for generate(), in generation_config.json: {said}"
        ) from None


def _parse(argv: list[str]) -> Namespace:
    parser = OneLineParser(prog="gpt2repro generate", description="Continue a prompt.")

    add = parser.add_argument
    add(
        "--model",
        type=named,
        required=True,
        help="a run, an export, a checkpoint, a GPT-2 directory or Hub id",
    )
    add("--prompt", help="text to continue; `-` reads it from standard input (default: a new text)")
    add("--max_new_tokens", type=int, default=200, help="stop after so many (default %(default)s)")
    add(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest (default %(default)s)"
    )
    add("--top_k", type=int, default=50, help="sample among the k likeliest, 0: all (default 50)")
    add("--top_p", type=float, default=1.0, help="among the likeliest that sum to p (default 1)")
    add("--repetition_penalty", type=float, default=1.0, help="above 1 discourages (default 1)")
    add(
        "--num_return_sequences", type=int, default=1, help="so many texts, not streamed if above 1"
    )
    add("--num_beams", type=int, default=1, help="beam search, not streamed if above 1")
    add("--seed", type=int, help="the same seed gives the same text")
    add("--dtype", choices=("auto", *DTYPES), default="auto")
    add("--device", help="such as cuda or cpu (default: the GPU if there is one)")
    add("--tokenizer", type=named, help="Hub id or directory (default: the model's own)")
    options = parser.parse_args(argv)
    _check(options)
    return options


def _check(options: Namespace) -> None:
    limits = {
        "max_new_tokens": options.max_new_tokens >= 1,
        # Logits are divided by the two, and stay what float32 can hold.
        "temperature": options.temperature == 0 or 1e-9 <= options.temperature <= 1e9,
        "repetition_penalty": 1e-9 <= options.repetition_penalty <= 1e9,
        "top_k": options.top_k >= 0,
        "top_p": 0 < options.top_p <= 1,
        # Each of them is a row of the batch.
        "num_return_sequences": 1 <= options.num_return_sequences <= 1000,
        "num_beams": 1 <= options.num_beams <= 1000,
        "seed": options.seed is None or 0 <= options.seed < 2**63,
    }
    for name, holds in limits.items():
        if not holds:
            raise UserError(f"--{name} {getattr(options, name)} is out of range")
    if options.num_return_sequences > options.num_beams and options.temperature == 0:
        raise UserError(
            "--num_return_sequences: at temperature 0 all of them would be the same text"
        )
    if options.num_return_sequences > options.num_beams > 1:
        raise UserError("--num_return_sequences: beam search has no more texts than --num_beams")


def _read_prompt(prompt: str | None) -> str:
    try:
        return sys.stdin.read() if prompt == "-" else prompt or ""
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt -: standard input is no text: {error}") from None


def _encode(tokenizer, prompt: str, device: "torch.device") -> dict[str, "torch.Tensor"]:
    """The prompt's ids (1, T)."""
    import torch

    from gpt2repro.data.tokens.token_ids import ids_to_continue

    input_ids = torch.tensor(ids_to_continue(tokenizer, [prompt]), device=device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _sampling(options: Namespace) -> dict:
    """generate()'s arguments; a greedy search gets none of sampling's, which it would warn of."""
    common = {
        "num_beams": options.num_beams,
        "num_return_sequences": options.num_return_sequences,
        "repetition_penalty": options.repetition_penalty,
    }
    if options.temperature == 0:
        return common | {"do_sample": False}
    return common | {
        "do_sample": True,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
    }
