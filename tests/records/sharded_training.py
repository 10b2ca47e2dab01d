"""Run by two processes (see test_checkpoints.py): FSDP2 training that is saved and resumed."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from test_checkpoints import make
from tiny_checkpoint import save_now

from gpt2repro.recipe import load_recipe
from gpt2repro.records import checkpoints
from gpt2repro.training.optim.averaging import averaged
from gpt2repro.training.optim.registry import build_optimizer


def sharded(optimizer_name: str):
    """The tiny model with each block and the rest sharded as accelerate does, and its optimizer."""
    model, _ = make(optimizer_name)
    body = model.transformer
    for block in body.h:
        fully_shard(block)
    fully_shard([body.ln_f, body.wte, model.lm_head], reshard_after_forward=False)
    fully_shard(model)
    recipe = load_recipe(["--optimizer", *optimizer_name.split(), "--max_lr", "1e-2"])
    optimizer = build_optimizer(model, recipe)
    return model, optimizer


def train(model, optimizer, steps: range) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 50, (4, 8), generator=generator)
        mine = ids[dist.get_rank() :: 2]
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.found_inf = torch.zeros(())  # as the training step says that it is finite
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / 2
        dist.all_reduce(mean)
        losses.append(mean.item())
        norms.append(norm.full_tensor().item())
    return losses, norms


def evaluate(model) -> float:
    with torch.no_grad():
        ids = torch.arange(32).view(4, 8)
        return model(input_ids=ids, labels=ids).loss.item()


def snapshot_of(model, optimizer) -> dict[str, torch.Tensor]:
    taken = checkpoints.take_snapshot(step=6, model=model, optimizer=optimizer, state={})
    return taken.weights | taken.optimizer


def main(mode: str, optimizer_name: str, directory: Path) -> None:
    assert mode == "fsdp2"
    dist.init_process_group("gloo")
    model, optimizer = sharded(optimizer_name)
    losses, norms = train(model, optimizer, range(3))
    path = save_now(directory / "checkpoints", 3, model, optimizer)
    more = train(model, optimizer, range(3, 6))
    model, optimizer = sharded(optimizer_name)
    checkpoints.load(path, model=model, optimizer=optimizer)
    resumed, _ = train(model, optimizer, range(3, 6))
    before = snapshot_of(model, optimizer)
    evaluated = [evaluate(model)]  # after which FSDP2 keeps what it gathered of the outermost
    with averaged(model, optimizer):
        evaluated.append(evaluate(model))
    evaluated.append(evaluate(model))
    after = snapshot_of(model, optimizer)
    if dist.get_rank() == 0:
        report = {"losses": losses + more[0], "norms": norms + more[1], "resumed": resumed}
        report["evaluated"] = evaluated
        report["differences"] = [
            name
            for name in before.keys() | after.keys()
            if not (name in before and name in after and torch.equal(before[name], after[name]))
        ]
        (directory / "report.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
