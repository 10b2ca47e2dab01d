"""GPT-2 in a hundred lines of torch, from bytes to the loss. Read it from top to bottom.

    python examples/gpt2_plain.py

It computes what `modeling_gpt2repro.py` computes, whose parameters have the same names: there each
class says which one here is its twin. Shapes: B rows, T tokens, C = n_embd, H heads of width
D = C / H, V tokens in the vocabulary; 124M has C, H, D, L, V = 768, 12, 64, 12, 50257.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class GPT2(nn.Module):
    """Each token's row of the stream becomes, layer by layer, a guess at the token after it."""

    def __init__(self, vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)  # what a token is: (V, C)
        self.wpe = nn.Embedding(n_positions, n_embd)  # where it stands: (1024, C)
        self.h = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)

    def forward(self, ids, targets=None):
        positions = torch.arange(ids.shape[1])  # (T,): 0, 1, 2, ...
        x = self.wte(ids) + self.wpe(positions)  # (B, T, C) + (T, C) = (B, T, C)
        for block in self.h:
            x = block(x)  # (B, T, C)
        logits = self.ln_f(x) @ self.wte.weight.T  # (B, T, C) @ (C, V) = (B, T, V)
        if targets is None:
            return logits
        log_p = logits.log_softmax(dim=-1)  # (B, T, V): log-probabilities of the next token
        right = log_p.gather(-1, targets[..., None])  # (B, T, 1): those of the one that came
        return logits, -right.mean()  # the loss: (), in nats per token


class Block(nn.Module):
    """Look back, then think; both add to the stream and never overwrite it."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = MLP(n_embd)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class Attention(nn.Module):
    """Each token averages the values of the tokens up to it, weighted by query times key."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.c_attn = Linear(n_embd, 3 * n_embd)  # queries, keys and values in one product
        self.c_proj = Linear(n_embd, n_embd)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=-1)  # (B, T, 3C) -> three (B, T, C)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-1, -2)  # (B, H, T, D) @ (B, H, D, T) = (B, H, T, T)
        scores = scores / math.sqrt(C // self.n_head)  # D terms of variance 1 sum to variance D
        triangle = torch.ones(T, T, dtype=torch.bool).tril()  # row t: True for 0 ... t
        scores = scores.masked_fill(~triangle, -torch.inf)  # the future gets no weight
        weights = scores.softmax(dim=-1)  # (B, H, T, T): rows sum to 1
        mixed = weights @ v  # (B, H, T, T) @ (B, H, T, D) = (B, H, T, D)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))  # heads side by side: (B, T, C)


class MLP(nn.Module):
    """Two layers with a GELU between them, for each token on its own."""

    def __init__(self, n_embd):
        super().__init__()
        self.c_fc = Linear(n_embd, 4 * n_embd)
        self.c_proj = Linear(4 * n_embd, n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # C -> 4C -> C


class Linear(nn.Module):
    """x W + b, with W stored (in, out) as OpenAI stored it. Twin of transformers' `Conv1D`."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias  # (B, T, in) @ (in, out) = (B, T, out)


def initialize(model):
    """GPT-2's first weights: N(0, 0.02), and smaller where 2 L sub-layers sum into the stream."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
        if name.endswith("c_proj.weight"):
            parameter.data /= math.sqrt(2 * len(model.h))


if __name__ == "__main__":
    torch.manual_seed(0)
    model = GPT2()
    initialize(model)
    # A byte is a token here. GPT-2's tokenizer has 50,000 more, for bytes that often go together.
    ids = torch.tensor([list(b"Language models are unsupervised multitask learners.")])  # (1, 52)
    logits, loss = model(ids[:, :-1], ids[:, 1:])  # token t learns token t + 1
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"loss {loss.item():.2f}; untrained: guessing costs ln V = {math.log(50257):.2f}")
