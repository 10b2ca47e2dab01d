"""The parameter groups, and both optimizers against torch's own."""

import math

import pytest
import torch

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.recipe import load_recipe
from gpt2repro.training.optim.groups import parameter_groups
from gpt2repro.training.optim.muon import MuonAdamW, orthogonalize
from gpt2repro.training.optim.registry import build_optimizer
from gpt2repro.training.schedule import set_lr
from modeling_gpt2repro import GPT2ReproForCausalLM

SETTINGS = ("--max_lr", "1e-2", "--muon_lr", "2e-2", "--muon_weight_decay", "0.01")


def build(model, name: str):
    return build_optimizer(model, load_recipe([*SETTINGS, "--optimizer", name]))


def tiny_model(**overrides) -> GPT2ReproForCausalLM:
    torch.manual_seed(0)
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 8}
    settings |= {"bos_token_id": 0, "eos_token_id": 0, **overrides}
    return GPT2ReproForCausalLM(GPT2ReproConfig(**settings))


def backward(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (4, 8), generator=generator)
    model(input_ids=ids, labels=ids).loss.backward()


# --- Groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_groups_cover_every_parameter_once(tied):
    model = tiny_model(tie_word_embeddings=tied)
    groups = {group["name"]: group["params"] for group in parameter_groups(model, 0.1)}
    grouped = [id(p) for parameters in groups.values() for p in parameters]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert len(groups["qkv"]) == 2 and len(groups["matrices"]) == 2 * 3
    assert len(groups["embeddings"]) == (2 if tied else 3)
    assert all(p.ndim == 1 for p in groups["vectors"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_and_embeddings_decay(name):
    optimizer = build(tiny_model(), name)
    decay = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    matrices = 0.01 if name == "muon" else 0.1
    assert decay == {"qkv": matrices, "matrices": matrices, "embeddings": 0.1, "vectors": 0.0}


def test_one_schedule_drives_all_groups():
    optimizer = build(tiny_model(), "muon")
    set_lr(optimizer, 5e-3)  # half of max_lr
    lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert lrs["embeddings"] == 5e-3 and lrs["qkv"] == pytest.approx(1e-2)


# --- Updates against torch's ----------------------------------------------------------------------


def test_adamw_is_torchs():
    ours, theirs = tiny_model(), tiny_model()
    optimizer = build(ours, "adamw")
    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    rest = [p for p in theirs.parameters() if p.ndim < 2]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    for step in range(3):
        for model, each in ((ours, optimizer), (theirs, reference)):
            backward(model, step)
            each.step()
            each.zero_grad()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_muon_is_torchs_on_each_linear_map():
    """`torch.optim.Muon` on nn.Linear-layout copies of every map, Q, K and V apart."""
    model = tiny_model()
    optimizer = build(model, "muon")
    fused = model.transformer.h[0].attn.c_attn.weight  # (16, 48)
    single = model.transformer.h[1].mlp.c_fc.weight  # (16, 64)
    maps = [w.detach().T.clone() for w in (*fused.chunk(3, dim=1), single)]
    reference = torch.optim.Muon(
        [torch.nn.Parameter(m) for m in maps], lr=2e-2, weight_decay=0.01, momentum=0.95
    )
    theirs = reference.param_groups[0]["params"]
    for step in range(3):
        backward(model, step)
        gradients = [g.T.clone() for g in (*fused.grad.chunk(3, dim=1), single.grad)]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
    ours = [w.T for w in (*fused.chunk(3, dim=1), single)]
    for mine, other in zip(ours, theirs, strict=True):
        # torch orthogonalizes in bfloat16: fifteen products with 8 bits each leave entries up to 1
        # about 0.02 apart. The map of c_fc is tall, so twice as large. Three steps of 0.02 of it.
        torch.testing.assert_close(mine, other, rtol=0, atol=3 * 0.02 * 0.04)


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_newton_schulz_keeps_the_directions_and_levels_the_singular_values(shape):
    maps = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(maps, full_matrices=False)
    levelled = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        levelled = 3.4445 * levelled - 4.7750 * levelled**3 + 2.0315 * levelled**5
    ours = orthogonalize(maps)
    assert ours.dtype == maps.dtype
    # Ten products in float32, with coefficients up to 5.
    torch.testing.assert_close(ours, u * levelled[:, None] @ vh, rtol=0, atol=1e-4)
    assert levelled.min() > 0.5 and levelled.max() < 1.3


def test_muon_orthogonalizes_q_k_and_v_each_on_its_own():
    """An update of one fused block could not have three orthogonal square maps."""
    model = tiny_model()
    optimizer = build_optimizer(
        model, load_recipe([*SETTINGS[:4], "--optimizer", "muon", "--muon_weight_decay", "0"])
    )
    weight = model.transformer.h[0].attn.c_attn.weight
    before = weight.detach().clone()
    backward(model, 0)
    optimizer.step()
    for update in ((before - weight.detach()) / 2e-2).chunk(3, dim=1):
        singular_values = torch.linalg.svdvals(update)
        # Newton-Schulz in five steps brings singular values to about 1 (0.7 to 1.2), not exactly.
        # The smallest of a gradient of rank < 16 may stay at zero.
        assert singular_values.max() < 1.3 and singular_values.median() > 0.6


def test_muon_trains_the_rest_with_adamw():
    ours, theirs = tiny_model(), tiny_model()
    muon = build(ours, "muon")
    adamw = build(theirs, "adamw")
    for model, optimizer in ((ours, muon), (theirs, adamw)):
        backward(model, 0)
        optimizer.step()
    assert torch.equal(ours.transformer.wte.weight, theirs.transformer.wte.weight)
    assert torch.equal(ours.transformer.ln_f.bias, theirs.transformer.ln_f.bias)
    assert isinstance(muon, MuonAdamW) and math.isfinite(ours.transformer.wte.weight.sum().item())
