"""The exact stream in a bare torch loop: DistributedDataParallel, no accelerate, no recipe.

    torchrun --nproc_per_node 2 examples/stream_loop.py --dataset_name texts/ --num_steps 20
    torchrun --nproc_per_node 4 examples/stream_loop.py --dataset_name texts/ --num_steps 40

The second command goes on where the first one stopped, on the rows that come next; after a kill,
from the state saved last. Each step prints the digest of its rows: the same for any number of
processes.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2repro.data import ExactStream
from gpt2repro.data.tokenizer import load_tokenizer
from gpt2repro.data.tokens.token_ids import begin_id, num_ids


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--dataset_name")
    data.add_argument("--datasets", type=json.loads, dest="dataset_name", help="a mixture, as JSON")
    add("--tokenizer", default="openai-community/gpt2")
    add("--output", type=Path, default=Path("runs/loop.pt"))
    add("--sequence_length", type=int, default=256)
    add("--rows_per_step", type=int, default=48)
    add("--micro_batch_size", type=int, default=4)
    add("--num_lanes", type=int)
    add("--width", type=int, default=192)
    add("--num_steps", type=int, default=20)
    add("--save_steps", type=int, default=100)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if "RANK" not in os.environ:
        raise SystemExit("start it with torchrun, which says how many processes there are")
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)  # where NCCL puts what is not a tensor
    train(options, device)  # in a function: torch may hang if DDP outlives the process group
    dist.destroy_process_group()


def train(options: argparse.Namespace, device: torch.device) -> None:
    tokenizer = load_tokenizer(options.tokenizer)
    stream = ExactStream(
        options.dataset_name,
        tokenizer=tokenizer,
        sequence_length=options.sequence_length,
        rows_per_step=options.rows_per_step,
        micro_batch_size=options.micro_batch_size,
        num_lanes=options.num_lanes,
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=num_ids(tokenizer),
        n_positions=options.sequence_length,
        n_layer=2,
        n_embd=options.width,
        n_head=max(1, options.width // 64),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=begin_id(tokenizer),
        eos_token_id=begin_id(tokenizer),
    )
    model: nn.Module = GPT2LMHeadModel(config)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if options.output.exists():
        saved = torch.load(options.output, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        stream.load_state_dict(saved["stream"])
    parallel = nn.parallel.DistributedDataParallel(model)

    batches = iter(stream)
    while stream.step < options.num_steps:
        loss = torch.zeros((), device=device)
        for _ in range(stream.batches_per_step):
            batch = {name: tensor.to(device) for name, tensor in next(batches).items()}
            logits = parallel(batch["input_ids"]).logits
            part = F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
            (part / stream.batches_per_step).backward()
            loss += part.detach() / stream.batches_per_step
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss)
        digests: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(digests, stream.digest)
        if dist.get_rank() == 0:
            digest = f"{sum(digests) % 2**64:016x}"
            print(f"step {stream.step}: loss {loss / len(digests):.4f}, rows {digest}", flush=True)
        if stream.step % options.save_steps == 0 or stream.step == options.num_steps:
            state = stream.state_dict()  # every process calls
            if dist.get_rank() == 0:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                unfinished = options.output.with_suffix(".partial")
                torch.save(parts | {"stream": state}, unfinished)
                unfinished.replace(options.output)  # a kill leaves this state or the one before
    stream.close()


if __name__ == "__main__":
    main()
