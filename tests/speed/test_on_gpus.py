"""What GPUs compute in a way of their own, against float64. Counted as skipped elsewhere."""

import contextlib
import time

import pytest
import torch
from ours_and_theirs import ours_and_theirs, random_ids

from gpt2repro.recipe import load_recipe
from gpt2repro.speed import fused_cross_entropy, lm_head
from gpt2repro.speed.attention import for_generation, kernel_taken
from gpt2repro.speed.compilation import compile_in_place
from gpt2repro.speed.fused_cross_entropy import linear_cross_entropy
from gpt2repro.speed.low_precision import has_fp8
from gpt2repro.training.micro_batch import largest_that_fits
from gpt2repro.training.optim.muon import orthogonalize
from gpt2repro.training.optim.registry import build_optimizer
from gpt2repro.training.step import LaunchedStep

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def loss_and_gradients(device, dtype, labels, compiled=False, fp8=False):
    """Of 5,000 tokens and a vocabulary of 50,257: more than one chunk on any GPU."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(labels), 64, generator=generator, dtype=torch.float64)
    weight = torch.randn(50257, 64, generator=generator, dtype=torch.float64) * 0.1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hidden, weight = (x.to(device, wide).requires_grad_() for x in (hidden, weight))
    function = torch.compile(linear_cross_entropy) if compiled else linear_cross_entropy
    autocast = torch.autocast("cuda", torch.bfloat16) if dtype == torch.bfloat16 else None
    with autocast or contextlib.nullcontext():
        with torch.no_grad():
            bare = function(hidden, weight, labels.to(device), -100)
        loss = function(hidden, weight, labels.to(device), -100, fp8)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    return [x.double().cpu() for x in (bare, loss.detach(), *gradients)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def labels():
    labels = torch.randint(0, 50257, (5000,), generator=torch.Generator().manual_seed(1))
    labels[::7] = -100
    return labels


@pytest.fixture(scope="module")
def exact(labels):
    return loss_and_gradients("cpu", torch.float64, labels)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("small_chunks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_loss(dtype, small_chunks, compiled, labels, exact, monkeypatch):
    if small_chunks:
        monkeypatch.setattr(fused_cross_entropy, "tokens_at_once", lambda device: (1024, 256))
    ours = loss_and_gradients(CUDA, dtype, labels, compiled)
    # TF32 and bfloat16 products have 2**-11 and 2**-9 of each number; sums average that.
    close(ours, exact, 2**-9 if dtype == torch.float32 else 2**-6)


def test_the_weight_gradient_summed_within_the_product(labels, exact, monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "tokens_at_once", lambda device: (1024, 256))
    monkeypatch.setattr(fused_cross_entropy, "SUM_WITHIN_PRODUCT", True)
    close(loss_and_gradients(CUDA, torch.bfloat16, labels), exact, 2**-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_fused_loss_in_eight_bits(compiled, labels, exact):
    if not has_fp8(CUDA):
        pytest.skip("this GPU has no 8-bit products")
    ours = loss_and_gradients(CUDA, torch.bfloat16, labels, compiled, fp8=True)
    close(ours[:1], exact[:1], 2**-6)  # without gradients it is not in eight bits
    close(ours[1:], exact[1:], 2**-3)  # e5m2 has 2 bits of mantissa


def close(ours, exact, tolerance) -> None:
    for mine, other in zip(ours, exact, strict=True):
        assert (mine - other).norm() <= tolerance * other.norm()


def test_a_compiled_step_is_the_eager_one():
    ours, _ = ours_and_theirs()
    lm_head.use_in(ours)
    ours.to(CUDA).train()
    rows = random_ids(4, 33).to(CUDA)
    step = {"input_ids": rows[:, :-1], "shift_labels": rows[:, 1:], "skip_logits": True}
    found = []
    for _ in range(2):
        ours.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = ours(**step).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in ours.parameters())])
        compile_in_place(ours, fullgraph=True)
    for eager, compiled in zip(*found, strict=True):  # each rounds to bfloat16 at other places
        assert (eager - compiled).norm() <= 2**-5 * eager.norm() + 1e-6


def test_a_compiled_step_of_a_wide_model_is_the_eager_one():
    """Rows of more than 1,024 numbers, which kernels do not hold; again and again, for a race."""
    ours, _ = ours_and_theirs(n_layer=2, n_embd=1280, n_head=20, n_positions=1024)
    lm_head.use_in(ours)
    ours.to(CUDA).train()
    rows = random_ids(8, 1025).to(CUDA)
    step = {"input_ids": rows[:, :-1], "shift_labels": rows[:, 1:], "skip_logits": True}
    eager = None
    for _ in range(20):
        ours.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = ours(**step).loss
        loss.backward()
        found = [loss.detach(), *(p.grad.clone() for p in ours.parameters())]
        if eager is None:
            eager = found
            compile_in_place(ours, fullgraph=True)
        for expected, compiled in zip(eager, found, strict=True):
            assert (expected - compiled).norm() <= 2**-5 * expected.norm() + 1e-6


def test_training_takes_a_fused_kernel_and_generation_not_cudnns():
    shape = (2, 12, 1024, 64)
    assert kernel_taken(shape, torch.bfloat16, CUDA) in ("flash", "cudnn")
    with for_generation():
        assert kernel_taken(shape, torch.bfloat16, CUDA) == "flash"


def test_a_step_is_launched_and_read_later():
    busy = torch.randn(4096, 4096, device=CUDA)

    def launch() -> LaunchedStep:
        figures = torch.stack((busy.sum() * 0 + 3.0, busy.sum() * 0 + 0.5))
        return LaunchedStep(figures, 1e-3, "00")

    launch().result()  # loads its kernels, for which a GPU may stand still
    for _ in range(200):
        busy = torch.nn.functional.normalize(busy @ busy)
    began = time.perf_counter()
    launched = launch()
    prepared = time.perf_counter() - began
    result = launched.result()
    waited = time.perf_counter() - began
    assert (result.loss, result.grad_norm) == (3.0, 0.5)
    assert prepared < waited / 2  # the work takes tens of milliseconds


def test_the_micro_batch_that_is_found_fits_beside_what_comes_later():
    total = torch.cuda.get_device_properties(CUDA).total_memory
    row = total // 64

    def forward_backward(size: int) -> None:
        torch.empty(size * row, dtype=torch.uint8, device=CUDA)

    # Half of the memory comes later; of the other half, nine tenths are 28 rows.
    candidates = [1, 2, 4, 8, 16, 32, 64]
    size = largest_that_fits(candidates, forward_backward, device=CUDA, reserve_bytes=total // 2)
    assert size == 16


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_device_skips_an_update_by_itself(optimizer):
    """Its kernels heed `found_inf`: weights, both moments, counts and the average stay."""
    options = ["--recipe=demo", f"--optimizer={optimizer}", "--ema_decay=0.9"]
    recipe = load_recipe([*options, "--muon_weight_decay=0.1"])
    model = ours_and_theirs()[0].to(CUDA)
    trained = build_optimizer(model, recipe)

    def update(factor: float) -> list[torch.Tensor]:
        for p in model.parameters():
            p.grad = torch.full_like(p, factor)
        trained.found_inf = torch.tensor(float(factor != factor), device=CUDA)
        trained.step()
        state = [value for p in model.parameters() for value in trained.state[p].values()]
        return [x.detach().clone() for x in (*model.parameters(), *state)]

    before, skipped, after = update(0.1), update(float("nan")), update(0.1)
    assert all(map(torch.equal, before, skipped)) and not all(map(torch.equal, skipped, after))


@pytest.mark.parametrize("shape", [(4, 256, 256), (2, 1024, 256)])
def test_muon_in_bfloat16_compiled_or_not(shape):
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = orthogonalize(maps).double()
    for function in (orthogonalize, torch.compile(orthogonalize, dynamic=False)):
        ours = function(maps.to(CUDA), torch.bfloat16)
        assert ours.dtype == torch.bfloat16  # what ranks send to each other
        ours = ours.cpu().double()
        # Fifteen products in bfloat16 with coefficients up to 5.
        assert (ours - exact).norm() <= 0.05 * exact.norm()
