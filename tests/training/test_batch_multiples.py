"""Steps that take more batches later: which rows, with what loss and gradient; resumed; told."""

import math

import pytest
import torch
from tiny_run import (
    assert_same_tensors,
    digests,
    metrics,
    tensors,
    train,
    without_export,
    write_inputs,
)

from gpt2repro import UserError
from gpt2repro.commands import rows
from gpt2repro.recipe import load_recipe
from gpt2repro.records import checkpoints, saved_models

GROWING = ("--batch_multiples", "[[2, 2], [5, 3]]", "--eval_every", "0", "--keep_last", "9")
BATCHES = [1, 1, 2, 2, 2, 3, 3, 3]  # of each step


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", autouse=True)
def no_export():
    with without_export():
        yield


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """Eight steps of which each is saved."""
    run = tmp_path_factory.mktemp("growing") / "run"
    assert train(recipe, run, *GROWING, "--num_steps", "8", "--save_every", "1") == 0
    return run


def test_a_step_has_the_rows_of_as_many_batches(recipe, run, tmp_path):
    assert train(recipe, tmp_path, "--num_steps", "17", "--save_every", "0") == 0
    alone = [int(digest, 16) for _, digest in sorted(digests(tmp_path).items())]
    ends = [sum(BATCHES[: n + 1]) for n in range(8)]
    sums = [sum(alone[end - n : end]) for n, end in zip(BATCHES, ends, strict=True)]
    assert digests(run) == {step: f"{each % 2**64:016x}" for step, each in enumerate(sums)}
    lines = metrics(run)
    assert [line["tokens"] for line in lines] == [256 * end for end in [*ends, ends[-1]]]
    record = checkpoints.record_of(run / "checkpoints" / "step_00000006")
    assert record.tokens == 256 * ends[5]


@pytest.mark.parametrize("step", [1, 2, 5])
def test_loss_and_gradient_are_means_over_all_of_them(run, step):
    """Recomputed from the checkpoint before the step, in one pass."""
    checkpoint = run / "checkpoints" / f"step_{step:08d}"
    reader = rows.Reader(load_recipe(["--recipe", str(run / "recipe.yaml")]), is_decided=True)
    reader.go_on_from(checkpoints.state_of(checkpoint))
    tokens = reader.take().tokens
    assert len(tokens) == 8 * BATCHES[step]
    model = saved_models.load_causal_lm(str(checkpoint), option="--model", dtype=torch.float32)
    loss = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous()).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    line = metrics(run)[step]
    # Sums in another order.
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_an_update_is_adamws_of_the_clipped_gradient_at_the_rate_of_its_step(run):
    """Step 3 by torch's own means, from the checkpoint before it to the one after it."""
    checkpoint = run / "checkpoints" / "step_00000003"
    reader = rows.Reader(load_recipe(["--recipe", str(run / "recipe.yaml")]), is_decided=True)
    reader.go_on_from(checkpoints.state_of(checkpoint))
    tokens = reader.take().tokens
    model = saved_models.load_causal_lm(str(checkpoint), option="--model", dtype=torch.float32)
    named, saved = dict(model.named_parameters()), tensors(run, 3)
    lr = 1e-3 + (1e-2 - 1e-3) * (1 + math.cos(math.pi * 1 / 6)) / 2  # a step after the warm-up's 2
    groups = [
        {"params": [p for p in named.values() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    for name, parameter in named.items():
        optimizer.state[parameter] = {
            key: saved[f"optimizer {name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
        }
    model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous()).loss.backward()
    assert torch.nn.utils.clip_grad_norm_(named.values(), 1.0) > 1
    optimizer.step()
    for name, after in tensors(run, 4).items():
        if name in named:  # sums in another order; without clipping some differ by 7e-4
            torch.testing.assert_close(named[name].data, after, rtol=0, atol=1e-5)
    assert metrics(run)[3]["lr"] == pytest.approx(lr)


def test_it_goes_on_bitwise_from_any_step(recipe, run, tmp_path):
    for length in ("1", "2", "4", "8"):
        options = (*GROWING, "--min_lr", "1e-2", "--num_steps", length)
        assert train(recipe, tmp_path / "parts", *options) == 0
    options = (*GROWING, "--min_lr", "1e-2", "--num_steps", "8")
    assert train(recipe, tmp_path / "whole", *options) == 0
    assert_same_tensors(tensors(tmp_path / "parts", 8), tensors(tmp_path / "whole", 8))


def test_rows_are_shown_by_optimizer_steps(recipe, run, capsys):
    saved = str(run / "checkpoints" / "step_00000004")
    for words in (["--recipe", str(recipe), *GROWING[:2]], ["--checkpoint", saved]):
        assert rows.main([*words, "--step", "5"]) == 0
        assert f"step 5, rows_digest {digests(run)[5]}, 24 rows" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["[[0, 2]]", "[[4, 2], [2, 3]]", "[[4, 0]]", "[4, 2]", "2"])
def test_what_is_no_schedule_is_one_line(value):
    with pytest.raises(UserError, match="batch_multiples"):
        load_recipe(["--batch_multiples", value])


def test_it_cannot_change_within_a_run(recipe, run):
    with pytest.raises(UserError, match=r"batch_multiples is .* but the checkpoint was made with"):
        train(recipe, run, "--num_steps", "9")
