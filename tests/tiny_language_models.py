"""Language models small enough for tests: random, uniform, and one that knows given texts."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2repro.data.tokens.bpe import train_bpe

FIXTURES = Path(__file__).parent / "fixtures"
HELLASWAG, LAMBADA = FIXTURES / "hellaswag.jsonl", FIXTURES / "lambada.jsonl"
WIKITEXT2 = FIXTURES / "wikitext2.jsonl"
VOCAB_SIZE = 320


# The harness' own task, and the split that its fixture stands for.
OF_THE_HARNESS = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", HELLASWAG),
    "lambada": ("lambada/lambada_openai.yaml", "test", LAMBADA),
    "wikitext": ("wikitext/wikitext.yaml", "test", WIKITEXT2),
}


def task_files(directory: Path) -> Path:
    """`directory` with the harness' own tasks on the fixtures, as `ours_hellaswag` and so on."""
    import lm_eval

    harness = Path(lm_eval.__file__).parent / "tasks"
    directory.mkdir(exist_ok=True)
    for name, (base, split, file) in OF_THE_HARNESS.items():
        (directory / f"{name}.yaml").write_text(
            f"include: {harness / base}\n"
            f"task: ours_{name}\n"
            "tag: []\n"
            "dataset_path: json\n"
            "dataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{{split}: {file}}}}}\n"
            "training_split: null\n" + ("validation_split: null\n" if split == "test" else "")
        )
    return directory


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tiny_tokenizer():
    """A byte-level BPE of the fixtures' own text: a few merges, so words have several tokens."""
    return train_bpe([path.read_text(encoding="utf-8") for path in FIXTURES.glob("*.jsonl")], 320)


def random_gpt2(seed: int = 0, *, positions: int = 512, vocab_size: int = VOCAB_SIZE, **config):
    """Stock GPT-2 with weights large enough that no two endings nearly tie."""
    torch.manual_seed(seed)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5} | config
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocab_size, n_positions=positions, **ids, **shape)
    ).eval()


def uniform_gpt2(vocab_size: int = VOCAB_SIZE) -> GPT2LMHeadModel:
    """Every logit is zero: ln V nats for any token."""
    model = random_gpt2(vocab_size=vocab_size)
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


class KnowsByHeart(torch.nn.Module):
    """Continues the beginnings of the token sequences it was given as they go on; else uniform."""

    def __init__(self, sequences, vocab_size: int = VOCAB_SIZE) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.vocab_size = vocab_size
        self.next_token = {
            tuple(ids[:end]): ids[end] for ids in sequences for end in range(1, len(ids))
        }

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for end in range(1, len(ids) + 1):
                if (token := self.next_token.get(tuple(ids[:end]))) is not None:
                    logits[row, end - 1, token] = 100.0
        return SimpleNamespace(logits=logits)


def on_ranks(world_size: int, score: Callable[..., Any]) -> Any:
    """What rank 0 says, given what each rank has added to every sum."""
    if world_size == 1:
        return score()
    parts: list[list[torch.Tensor]] = []
    for rank in range(world_size):
        parts.append([])
        score(rank=rank, world_size=world_size, reduce=lambda t: parts[-1].append(t) or t)
    sums = iter([sum(of_ranks) for of_ranks in zip(*parts, strict=True)])
    return score(rank=0, world_size=world_size, reduce=lambda _: next(sums))
