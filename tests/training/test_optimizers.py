"""The parameter groups, and both optimizers against torch's own."""

import math

import pytest
import torch
from tiny_checkpoint import save_now

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.recipe import load_recipe
from gpt2repro.records import checkpoints, integrity
from gpt2repro.training.optim.groups import MATRICES, parameter_groups
from gpt2repro.training.optim.muon import MuonAdamW, orthogonalize
from gpt2repro.training.optim.registry import build_optimizer
from gpt2repro.training.schedule import set_rates
from modeling_gpt2repro import GPT2ReproForCausalLM

SETTINGS = {"max_lr": 1e-2, "muon_lr": 2e-2, "muon_weight_decay": 0.01}


EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight")
# Nothing that a default could stand in for.
ADAM = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-3}


# Every choice at once; a bare word is a switch.
ALL = "muon --muon_normalize --muon_heads --cautious_weight_decay --embedding_second_moment "
CHOICES = ["adamw --cautious_weight_decay", f"{ALL} row", f"{ALL} factored"]


def build(model, name: str, **settings: float | str):
    settings = SETTINGS | settings
    options = [f"--{key}={value}" for key, value in settings.items()]
    return build_optimizer(model, load_recipe([*options, "--optimizer", *name.split()]))


def tiny_model(**overrides) -> GPT2ReproForCausalLM:
    torch.manual_seed(0)
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 8}
    settings |= {"bos_token_id": 0, "eos_token_id": 0, **overrides}
    return GPT2ReproForCausalLM(GPT2ReproConfig(**settings))


def backward(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (4, 8), generator=generator)
    model(input_ids=ids, labels=ids).loss.backward()


def give_gradients(model, seed: int | None) -> None:
    """Random gradients of every parameter, or with None zero ones."""
    generator = torch.Generator().manual_seed(seed or 0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        if seed is not None:
            p.grad.normal_(generator=generator)


# --- Groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_groups_cover_every_parameter_once(tied):
    model = tiny_model(tie_word_embeddings=tied)
    groups = {group["name"]: group["params"] for group in parameter_groups(model, load_recipe([]))}
    grouped = [id(p) for parameters in groups.values() for p in parameters]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert len(groups["qkv"]) == 2 and len(groups["matrices"]) == 2 * 3
    assert len(groups["embeddings"]) == (1 if tied else 2) and len(groups["positions"]) == 1
    assert all(p.ndim == 1 for p in groups["vectors"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_are_left_alone(name):
    model = tiny_model()
    frozen = model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    before = frozen.clone()
    optimizer = build(model, name)
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters()} - {id(frozen)}
    backward(model, 0)
    optimizer.step()
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameters_without_a_gradient_stay_as_they_are(name):
    """A part of the model that a loss does not reach is not decayed either."""
    model = tiny_model()
    optimizer = build(model, name)
    backward(model, 0)
    unreached = [model.transformer.h[0].mlp.c_fc.weight, model.transformer.wpe.weight]
    before = [p.detach().clone() for p in unreached]
    for p in unreached:
        p.grad = None
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(unreached, before, strict=True))
    assert not any(p in optimizer.state for p in unreached)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_and_embeddings_decay(name):
    optimizer = build(tiny_model(), name)
    decay = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    matrices = 0.01 if name == "muon" else 0.1
    assert decay == {
        "qkv": matrices,
        "matrices": matrices,
        "embeddings": 0.1,
        "positions": 0.1,
        "vectors": 0.0,
    }


@pytest.mark.parametrize(("name", "matrices"), [("adamw", 1e-2 * 0.3), ("muon", 2e-2 * 0.7)])
def test_without_a_gradient_to_follow_there_is_the_decay_alone(name, matrices):
    """Zero gradients: every parameter shrinks by its learning rate times its decay."""
    model = tiny_model()
    optimizer = build(model, name, weight_decay=0.3, muon_weight_decay=0.7)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    give_gradients(model, None)
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.0 if p.ndim < 2 else 1e-2 * 0.3 if name in EMBEDDINGS else matrices
        torch.testing.assert_close(p, before[name] * (1 - decay), rtol=1e-6, atol=0)  # float32


def test_rates_and_decays_of_the_groups():
    scales = {"embedding_lr_scale": 3, "position_lr_scale": 5, "vector_lr_scale": 7}
    for name, of_matrices in (("adamw", 1e-2 * 11), ("muon", 2e-2)):
        own = {"matrix_lr_scale": 11} if name == "adamw" else {}
        optimizer = build(tiny_model(), name, **scales, **own, embedding_weight_decay=0.4)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        expected = {"embeddings": 0.03, "positions": 0.05, "vectors": 0.07}
        assert rates == pytest.approx(expected | dict.fromkeys(MATRICES, of_matrices))
        decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
        assert (decays["embeddings"], decays["positions"], decays["vectors"]) == (0.4, 0.1, 0.0)


def test_one_schedule_drives_all_groups():
    """Half of the way down: rates by it, decays too if they are to, a cooldown of the matrices."""
    options = "--optimizer muon --max_lr 1e-2 --min_lr 0 --muon_lr 2e-2 --muon_weight_decay 0.3"
    options += " --num_steps 100 --warmup_steps 0 --schedule wsd --cooldown_fraction 0.5"
    recipe = load_recipe(options.split())
    optimizer = build_optimizer(tiny_model(), recipe)
    assert set_rates(optimizer, recipe, 75) == 5e-3
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups["embeddings"]["lr"] == 5e-3 and groups["qkv"]["lr"] == pytest.approx(1e-2)
    assert groups["qkv"]["weight_decay"] == 0.3 and groups["qkv"]["momentum"] == 0.95
    more = " --matrix_cooldown_fraction 1 --scheduled_weight_decay"
    recipe = load_recipe(f"{options}{more} --muon_momentum_warmup_steps 150".split())
    for _ in range(2):  # from the peaks, not from what was set before
        assert set_rates(optimizer, recipe, 75) == 5e-3
    assert groups["embeddings"]["lr"] == 5e-3 and groups["qkv"]["lr"] == pytest.approx(5e-3)
    assert groups["qkv"]["weight_decay"] == pytest.approx(0.3 / 4)
    assert groups["embeddings"]["weight_decay"] == pytest.approx(0.05)
    assert groups["qkv"]["momentum"] == pytest.approx(0.90)


# --- Updates against torch's ----------------------------------------------------------------------


def test_adamw_is_torchs():
    ours, theirs = tiny_model(), tiny_model()
    optimizer = build(ours, "adamw", **ADAM)
    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    rest = [p for p in theirs.parameters() if p.ndim < 2]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.8, 0.9),
        eps=1e-3,
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


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp.c_fc", "mlp.c_proj"])
def test_muon_follows_its_rule(name):
    """Jordan et al. 2024 in float64: Nesterov's momentum, Newton-Schulz, the decay, step sizes."""
    lr, momentum, decay = 2e-2, 0.8, 0.7
    model = tiny_model()
    optimizer = build(model, "muon", muon_momentum=momentum, muon_weight_decay=decay)
    weight = model.get_submodule(f"transformer.h.1.{name}").weight
    expected = weight.double().T  # (out, in)
    mean = torch.zeros_like(expected)
    for step in range(3):
        give_gradients(model, step)
        gradient = weight.grad.double().T
        optimizer.step()
        mean = momentum * mean + (1 - momentum) * gradient
        ahead = momentum * mean + (1 - momentum) * gradient
        update = ahead / ahead.norm()
        for _ in range(5):
            gram = update @ update.T
            update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
        tall = max(1, expected.shape[0] / expected.shape[1]) ** 0.5
        expected = expected * (1 - lr * decay) - lr * tall * update
    # Ten products in float32, as below; three steps of 0.02 of them, of which one kind is doubled.
    torch.testing.assert_close(weight.T.double(), expected, rtol=0, atol=3 * 2 * lr * 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("maps", [3, 6])
def test_normuon_and_cautious_decay_follow_their_rules(maps):
    """Li et al. 2025 with the update's own size, Chen et al. 2025, in float64; also by heads."""
    lr, momentum, decay, beta2, eps = 2e-2, 0.8, 0.7, 0.9, 1e-3
    options = "muon --muon_normalize --cautious_weight_decay" + " --muon_heads" * (maps == 6)
    settings = {"muon_momentum": momentum, "muon_weight_decay": decay}
    model = tiny_model()
    optimizer = build(model, options, **settings, adam_beta2=beta2, adam_epsilon=eps)
    weight = model.transformer.h[1].attn.c_attn.weight
    expected = weight.double().T.reshape(maps, -1, 16).clone()  # (maps, out, in)
    mean, moment = torch.zeros_like(expected), torch.zeros(*expected.shape[:2], 1)
    for step in range(3):
        give_gradients(model, step)
        gradient = weight.grad.double().T.reshape(expected.shape)
        optimizer.step()
        mean = momentum * mean + (1 - momentum) * gradient
        ahead = orthogonalize(momentum * mean + (1 - momentum) * gradient)
        moment = beta2 * moment + (1 - beta2) * (ahead**2).mean(2, keepdim=True)
        update = ahead / (moment.sqrt() + eps)
        update *= ahead.norm(dim=(1, 2), keepdim=True) / update.norm(dim=(1, 2), keepdim=True)
        expected = expected - lr * (update + decay * expected * (update * expected >= 0))
    # Ten products in float32, as above.
    ours = weight.T.reshape(expected.shape).double()
    torch.testing.assert_close(ours, expected, rtol=0, atol=3 * lr * 1e-4)
    assert optimizer.state[weight]["row_sq"].shape == (1, 48)


@torch.no_grad()
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("kind", ["element", "row", "factored"])
def test_adamw_follows_its_rule(kind, cautious):
    """Loshchilov & Hutter 2019, Shazeer & Stern 2018 and Chen et al. 2025 in float64."""
    lr, beta1, beta2, eps, decay = 1e-2, 0.8, 0.9, 1e-3, 0.7
    model = tiny_model()
    options = "adamw" + " --cautious_weight_decay" * cautious
    settings = {"embedding_second_moment": kind, "embedding_weight_decay": decay}
    optimizer = build(model, options, **ADAM, **settings)
    weight = model.transformer.wte.weight
    expected = weight.double().clone()
    mean, square = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(1, 4):
        give_gradients(model, step)
        gradient = weight.grad.double()
        optimizer.step()
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        rows, columns = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
        moment = {"element": square, "row": rows, "factored": rows * columns / rows.mean()}[kind]
        update = mean / (1 - beta1**step) / ((moment / (1 - beta2**step)).sqrt() + eps)
        agrees = update * expected >= 0 if cautious else 1
        expected = expected - lr * (update + decay * expected * agrees)
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)  # float32
    shapes = {name: tuple(value.shape) for name, value in optimizer.state[weight].items()}
    assert ("exp_avg_sq" in shapes) == (kind == "element")
    assert shapes.get("row_sq", (50, 1)) == (50, 1) and shapes.get("column_sq", (1, 16)) == (1, 16)


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_newton_schulz_keeps_the_directions_and_levels_the_singular_values(shape):
    maps = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(maps, full_matrices=False)
    levelled = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        levelled = 3.4445 * levelled - 4.7750 * levelled**3 + 2.0315 * levelled**5
    ours = orthogonalize(maps)
    assert ours.dtype == torch.float32
    # Ten products in float32, with coefficients up to 5.
    torch.testing.assert_close(ours.double(), u * levelled[:, None] @ vh, rtol=0, atol=1e-4)
    assert levelled.min() > 0.5 and levelled.max() < 1.3
    small = orthogonalize(maps * 1e-5)  # as gradients are
    torch.testing.assert_close(small, ours, rtol=0, atol=1e-4)


def test_muon_orthogonalizes_q_k_and_v_each_on_its_own():
    """An update of one fused block could not have three orthogonal square maps."""
    model = tiny_model()
    optimizer = build(model, "muon", muon_weight_decay=0)
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
    muon = build(ours, "muon", **ADAM)
    adamw = build(theirs, "adamw", **ADAM)
    for step in range(3):
        for model, optimizer in ((ours, muon), (theirs, adamw)):
            give_gradients(model, step)
            optimizer.step()
    rest = [name for name, p in ours.named_parameters() if p.ndim < 2 or name in EMBEDDINGS]
    for name in rest:
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name)), name
    assert len(rest) == 2 * 8 + 2 + 2
    assert isinstance(muon, MuonAdamW) and math.isfinite(ours.transformer.wte.weight.sum().item())


@pytest.mark.parametrize("name", ["adamw", "muon", *CHOICES])
def test_an_update_that_is_not_finite_never_happened(name):
    """`found_inf`, as a gradient scaler or the training step sets it: 1.0 skips, 0.0 does not."""
    ours, theirs = tiny_model(), tiny_model()
    skipping, plain = build(ours, name), build(theirs, name)
    for step in range(5):
        found_inf = float(step in (0, 2, 3))
        give_gradients(ours, step)
        if found_inf:
            ours.transformer.wte.weight.grad[3, 3] = math.nan
            ours.transformer.h[0].mlp.c_fc.weight.grad[3, 3] = math.inf
        skipping.found_inf = torch.tensor(found_inf)
        skipping.step()
        if not found_inf:
            give_gradients(theirs, step)
            plain.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name
        for key, value in plain.state[q].items():
            assert torch.equal(skipping.state[p][key], value), (name, key)


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_resumes_bitwise(name, tmp_path):
    def trained(model, optimizer, steps: range) -> None:
        for step in steps:
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()

    model, fresh = tiny_model(), tiny_model()
    optimizer, fresh_optimizer = build(model, name), build(fresh, name)
    trained(model, optimizer, range(10))
    path = save_now(tmp_path, 10, model, optimizer)
    assert integrity.find_problem(path) is None
    checkpoints.load(path, model=fresh, optimizer=fresh_optimizer)
    for each in ((model, optimizer), (fresh, fresh_optimizer)):
        trained(*each, range(10, 13))
    for (name, p), q in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q), name
