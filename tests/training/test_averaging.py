"""The moving average of the weights: its numbers, its exchange, and a run that keeps one."""

from pathlib import Path

import pytest
import torch
from test_optimizers import build, give_gradients, tiny_model
from tiny_export import without_fresh_processes
from tiny_run import metrics, tensors, train, write_inputs
from transformers import AutoTokenizer, GPT2LMHeadModel

from gpt2repro.training import finish
from gpt2repro.training.optim.averaging import averaged, has_average

EVERY_STEP = ("--save_every", "1", "--keep_last", "9", "--max_lr", "1e-3")
# So large a rate that weights jump about what their average has found.
RESTLESS = ("--num_steps", "6", "--max_lr", "0.1", "--min_lr", "0.1", "--export_format", "gpt2")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_average_is_that_of_the_weights_after_updates_that_were_not_skipped(name):
    model = tiny_model()
    optimizer = build(model, name, ema_decay=0.75)
    assert not has_average(optimizer)
    expected: dict[str, torch.Tensor] = {}
    for step, skipped in enumerate((0.0, 0.0, 1.0, 0.0, None)):
        give_gradients(model, step)
        optimizer.found_inf = None if skipped is None else torch.tensor(skipped)
        before = [state["ema"].clone() for state in optimizer.state.values()]
        optimizer.step()
        for key, p in model.named_parameters():
            weight = p.detach().double()
            if not skipped:
                expected[key] = 0.75 * expected.get(key, weight) + 0.25 * weight
        if skipped:
            after = [state["ema"] for state in optimizer.state.values()]
            assert all(map(torch.equal, before, after))
    for key, p in model.named_parameters():
        average = optimizer.state[p]["ema"]
        assert not average.requires_grad and not torch.equal(average, p)
        # float32 rounds to 6e-8 of the largest of a sum, four times.
        torch.testing.assert_close(average.double(), expected[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_of_nothing_begins_no_average(name):
    """As the first one of all, if it is skipped on a device that leaves nothing behind then."""
    optimizer = build(tiny_model(), name, ema_decay=0.75)
    optimizer.step()
    assert not has_average(optimizer)


def test_weights_and_average_change_places_and_are_put_back_to_the_bit():
    model = tiny_model()
    optimizer = build(model, "adamw", ema_decay=0.75)
    for step in range(2):
        give_gradients(model, step)
        optimizer.step()
    places = [p.data_ptr() for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    averages = [optimizer.state[p]["ema"].clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt), averaged(model, optimizer):
        assert all(map(torch.equal, model.parameters(), averages))
        raise KeyboardInterrupt
    assert all(map(torch.equal, model.parameters(), weights))
    assert all(
        torch.equal(optimizer.state[p]["ema"], a)
        for p, a in zip(model.parameters(), averages, strict=True)
    )
    assert places == [p.data_ptr() for p in model.parameters()]  # compiled code goes on


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def quick_exports(monkeypatch):
    """Fresh processes have tests of their own."""
    without_fresh_processes(monkeypatch)


def test_a_better_average_is_exported_beside_the_weights(recipe, tmp_path, capsys, monkeypatch):
    run, other = tmp_path / "run", tmp_path / "other"
    assert train(recipe, run, "--ema_decay", "0.75", *RESTLESS) == 0
    lines = metrics(run)
    assert [line["step"] for line in lines if "val_loss_ema" in line] == [5, 6]
    last = lines[-1]
    assert last["val_loss_ema"] < last["val_loss"]
    assert last["val_bits_per_byte_ema"] < last["val_bits_per_byte"]
    exported = GPT2LMHeadModel.from_pretrained(run / "final-ema")  # transformers' own
    saved = tensors(run, 6)
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, saved[f"optimizer {name}/ema"])
    assert len(AutoTokenizer.from_pretrained(run / "final-ema")) == exported.config.vocab_size
    for place, says_so in (("final", False), ("final-ema", True)):
        card = (run / place / "README.md").read_text()
        assert f"| step 6 | {last['val_loss']:.4f} |" in card
        average = f"| step 6, average of the weights | {last['val_loss_ema']:.4f} |"
        assert average in card
        assert (
            "They are the moving average, of decay 0.75, of those in training." in card
        ) == says_so
    assert not (run / "final-ema" / "provenance.json").exists()  # of no checkpoint of a chain
    assert f"{run}/final-ema: {last['val_loss_ema']:.4f}" in capsys.readouterr().out

    monkeypatch.setattr(finish, "finish", lambda run: 0)
    # What was exported scores what was said; and validating it has changed nothing.
    options = ("--init_from", str(run / "final-ema"), "--num_steps", "1")
    assert train(recipe, other, *options) == 0
    assert metrics(other)[0]["val_loss"] == pytest.approx(last["val_loss_ema"], rel=1e-6)
    assert train(recipe, tmp_path / "without", *RESTLESS) == 0
    without = metrics(tmp_path / "without")
    assert [line | other for line, other in zip(lines, without, strict=True)] == lines


def test_a_worse_average_is_not_and_one_that_is_turned_off_is_forgotten(recipe, tmp_path):
    run = tmp_path / "run"
    assert train(recipe, run, "--num_steps", "2", *EVERY_STEP) == 0
    (run / "final-ema").mkdir()  # as a shorter run may have left it
    assert train(recipe, run, "--num_steps", "4", "--ema_decay", "0.9", *EVERY_STEP) == 0
    last = metrics(run)[-1]
    assert last["val_loss"] < last["val_loss_ema"] and not (run / "final-ema").exists()
    average = f"| step 4, average of the weights | {last['val_loss_ema']:.4f} |"
    assert average in (run / "final" / "README.md").read_text()
    first, second = tensors(run, 3), tensors(run, 4)
    name = "transformer.wte.weight"
    assert torch.equal(first[f"optimizer {name}/ema"], first[name])  # it began at this step
    assert not torch.equal(second[f"optimizer {name}/ema"], second[name])
    assert train(recipe, run, "--num_steps", "5", *EVERY_STEP) == 0
    assert not any(name.endswith("/ema") for name in tensors(run, 5))
    assert "val_loss_ema" not in metrics(run)[-1]
