"""Load a GPT-2, continue a prompt and show each token as it is made.

    python examples/generate_stream.py --model runs/demo/final --prompt "This function returns"

`--dtype bfloat16` halves the memory; `--temperature 0` always takes the likeliest token.
"""

import argparse

import torch
from transformers import AutoTokenizer, TextStreamer

from modeling_gpt2repro import GPT2ReproForCausalLM


@torch.inference_mode()
def main() -> None:
    options = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = GPT2ReproForCausalLM.from_pretrained(
        options.model, dtype=options.dtype, trust_remote_code=False
    ).to(device)

    torch.manual_seed(options.seed)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(device)
    room = model.config.n_positions - inputs["input_ids"].shape[1]
    if room < 1:
        raise SystemExit(f"--prompt fills all {model.config.n_positions} positions of the model")
    sampling = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
    # The streamer is handed every token as it is sampled, and prints whole words.
    model.generate(
        **inputs,
        **sampling,
        max_new_tokens=min(options.max_new_tokens, room),
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continue a prompt, token by token.")
    parser.add_argument("--model", default="openai-community/gpt2", help="Hub id or directory")
    parser.add_argument("--prompt", default="Hello, I'm a language model,")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=50, help="sample among this many tokens")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
