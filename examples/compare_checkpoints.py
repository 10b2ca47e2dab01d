"""Two checkpoints side by side on the same text.

    python examples/compare_checkpoints.py runs/demo/final openai-community/gpt2 --text story.txt

Prints the loss of each per token and per byte (the latter compares across tokenizers), how each
continues the prompt, and, if they share a tokenizer, the tokens on which they differ most.
"""

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoTokenizer

from modeling_gpt2repro import GPT2ReproForCausalLM


@torch.inference_mode()
def main() -> None:
    options = parse()
    text = options.text.read_text(encoding="utf-8") if options.text else options.prompt
    tokenizers = [
        AutoTokenizer.from_pretrained(name, trust_remote_code=False) for name in options.models
    ]
    losses, continuations = [], []
    for name, tokenizer in zip(options.models, tokenizers, strict=True):
        model = GPT2ReproForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False
        )
        losses.append(token_losses(model, tokenizer, text))
        continuations.append(continuation(model, tokenizer, options.prompt))

    num_bytes = len(text.encode())
    for name, loss, words in zip(options.models, losses, continuations, strict=True):
        bits_per_byte = loss.sum().item() / math.log(2) / num_bytes
        print(f"{name}\n  {loss.mean():.4f} nats per token, {bits_per_byte:.4f} bits per byte")
        print(f"  {words!r}\n")

    if tokenizers[0].get_vocab() == tokenizers[1].get_vocab():
        ids = tokenizers[0](text)["input_ids"]
        print(f"{'token':>20}  {'first':>7}  {'second':>7}  (nats; where they differ most)")
        for i in (losses[0] - losses[1]).abs().topk(min(options.rows, len(ids))).indices.sort()[0]:
            token = repr(tokenizers[0].decode([ids[i]]))
            print(f"{token:>20}  {losses[0][i]:7.3f}  {losses[1][i]:7.3f}")


def token_losses(model, tokenizer, text: str) -> torch.Tensor:
    """Loss in nats (T,) of every token of `text`, the first one after an end-of-text token.

    A text longer than the context is read in consecutive pieces, each starting anew.
    """
    ids = torch.tensor(tokenizer(text)["input_ids"])
    losses = []
    for piece in ids.split(model.config.n_positions):
        inputs = torch.cat([torch.tensor([tokenizer.eos_token_id]), piece[:-1]])
        logits = model(inputs[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, piece, reduction="none"))
    return torch.cat(losses)


def continuation(model, tokenizer, prompt: str) -> str:
    """The likeliest 20 tokens after `prompt`, or as many as the context has room for."""
    inputs = tokenizer(prompt, return_tensors="pt")
    room = model.config.n_positions - inputs["input_ids"].shape[1]
    if room < 1:
        raise SystemExit(f"--prompt: it fills the context of {model.config.n_positions} tokens")
    how = {"max_new_tokens": min(20, room), "do_sample": False}
    ids = model.generate(**inputs, **how, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Two checkpoints on the same text.")
    parser.add_argument("models", nargs=2, metavar="MODEL", help="Hub id or directory")
    parser.add_argument("--text", type=Path, help="UTF-8 file to score (default: the prompt)")
    parser.add_argument("--prompt", default="The name of the file is the first argument")
    parser.add_argument("--rows", type=int, default=10, help="tokens in the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
