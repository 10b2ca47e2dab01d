"""Rates as pure functions of the step, and what becomes of them when a run is made longer."""

import shutil
from itertools import pairwise

import pytest
from tiny_checkpoint import save_checkpoint
from tiny_run import metrics, tensors, train, write_inputs

from gpt2repro.recipe import load_recipe
from gpt2repro.records import checkpoints
from gpt2repro.records.run_directory import RunDirectory
from gpt2repro.training import finish
from gpt2repro.training import run as run_module
from gpt2repro.training.monitor import Monitor
from gpt2repro.training.schedule import endless_warmup, jump, lr_at, momentum_at, stable_until


def test_warm_up_then_half_a_cosine():
    schedule = {"max_lr": 6e-4, "min_lr": 6e-5, "warmup_steps": 715, "num_steps": 19073}
    assert lr_at(0, **schedule) == pytest.approx(6e-4 / 715)
    assert lr_at(714, **schedule) == pytest.approx(6e-4)
    assert lr_at(715, **schedule) == pytest.approx(6e-4)
    middle = (715 + 19073) // 2
    assert lr_at(middle, **schedule) == pytest.approx((6e-4 + 6e-5) / 2)
    assert lr_at(19072, **schedule) == pytest.approx(6e-5, rel=1e-4)
    rates = [lr_at(step, **schedule) for step in range(715, 19073)]
    assert rates == sorted(rates, reverse=True)


def test_schedules_without_warm_up_or_decay():
    assert lr_at(0, max_lr=1.0, min_lr=0.0, warmup_steps=0, num_steps=10) == 1.0
    assert lr_at(9, max_lr=1.0, min_lr=1.0, warmup_steps=0, num_steps=10) == 1.0
    assert lr_at(4, max_lr=1.0, min_lr=0.0, warmup_steps=10, num_steps=5) == 0.5
    constant = {"max_lr": 1.0, "min_lr": 0.0, "warmup_steps": 0, "num_steps": 10}
    assert lr_at(9, **constant, schedule="wsd", cooldown_fraction=0.0) == 1.0


def test_exact_points_of_the_others():
    a_run = {"max_lr": 1.0, "min_lr": 0.2, "warmup_steps": 20, "num_steps": 220}
    linear = {"schedule": "linear"}
    assert lr_at(20, **a_run, **linear) == 1.0
    assert lr_at(120, **a_run, **linear) == pytest.approx(0.6)
    assert lr_at(219, **a_run, **linear) == pytest.approx(0.2 + 0.8 / 200)
    for name, power in (("wsd", 1.0), ("power", 1.2)):
        late = {"schedule": name, "cooldown_fraction": 0.25}  # the last 55 steps
        assert {lr_at(step, **a_run, **late) for step in range(19, 166)} == {1.0}
        assert lr_at(165 + 11, **a_run, **late) == pytest.approx(0.2 + 0.8 * 0.8**power)
        assert lr_at(219, **a_run, **late) == pytest.approx(0.2 + 0.8 / 55**power)
        whole = {"schedule": name, "cooldown_fraction": 1.0}
        assert lr_at(4, **a_run, **whole) == 0.25  # the lower one, while they overlap
        assert lr_at(110, **a_run, **whole) == pytest.approx(0.2 + 0.8 * 0.5**power)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "power"])
def test_schedules_are_continuous(name):
    """No step changes the rate by more than a few times what an even way up and down would."""
    a_run = {"max_lr": 1.0, "min_lr": 0.1, "warmup_steps": 50, "num_steps": 1000}
    rates = [lr_at(n, **a_run, schedule=name, cooldown_fraction=0.4) for n in range(1001)]
    steps = [abs(later - earlier) for earlier, later in pairwise(rates)]
    assert max(steps[:50]) < 1.01 / 50 and max(steps[50:]) < 1.3 / 400
    assert rates[-1] == pytest.approx(0.1) and max(rates) == 1.0


def test_momentum_warms_up():
    assert [momentum_at(n, momentum=0.95, warmup_steps=100) for n in (0, 50, 100, 999)] == [
        *(pytest.approx(0.85), pytest.approx(0.90), 0.95, 0.95)
    ]
    assert momentum_at(0, momentum=0.95, warmup_steps=0) == 0.95
    assert momentum_at(0, momentum=0.5, warmup_steps=9) == 0.5


def test_where_a_stable_phase_ends():
    options = ["--num_steps", "100", "--schedule", "power", "--cooldown_fraction", "0.3"]
    assert stable_until(load_recipe(options)) == 70
    assert stable_until(load_recipe([*options, "--matrix_cooldown_fraction", "0.8"])) == 20
    assert stable_until(load_recipe([*options[:4], "--cooldown_fraction", "0"])) is None
    assert stable_until(load_recipe(["--num_steps", "100"])) is None


# --- A longer run ---------------------------------------------------------------------------------


def test_what_a_user_should_know_of_a_schedule():
    power = ["--schedule", "power", "--cooldown_fraction", "0.2", "--warmup_steps", "5"]
    power += ["--matrix_cooldown_fraction", "0.8", "--num_steps"]
    short, longer = (load_recipe([*power, num_steps]) for num_steps in ("100", "300"))
    assert jump(longer, short, 15) == "" == jump(short, short, 90)
    # 6e-5 + 5.4e-4 (41 / 80)^1.2, and with Muon's rate of 0.02
    assert "rate of the matrices rises from 0.0003 to 0.0006 here" in jump(longer, short, 60)
    muon = {"optimizer": "muon", "muon_lr": 0.02}
    shorter, now = (each.model_copy(update=muon) for each in (short, longer))
    assert "rate of the matrices rises from 0.01 to 0.02 here" in jump(now, shorter, 60)
    back = jump(longer, short, 95)
    assert back.startswith("The learning rate rises from")
    assert back.endswith("before its cooldown (checkpoints/stable) it would not.")
    cosine = load_recipe(["--num_steps", "100", "--warmup_steps", "5"])
    assert jump(short, cosine, 70).endswith(
        "0.00019 to 0.0006 here: so power has it for 100 steps."
    )
    assert jump(cosine.model_copy(update={"max_lr": 1e-2}), cosine, 70) == "", "it is told as such"
    assert jump(cosine, load_recipe(["--num_steps", "80"]), 79).endswith(
        "By wsd, and from before its cooldown, it would not."
    )
    assert endless_warmup(short) == "" == endless_warmup(longer)
    wsd = {"schedule": "wsd", "cooldown_fraction": 0.8, "num_steps": 10, "warmup_steps": 8}
    meets = endless_warmup(short.model_copy(update=wsd))
    assert meets.endswith("the rate gets to 0.0004, and max_lr is 0.0006.")
    line = {"schedule": "wsd", "cooldown_fraction": 1.0, "warmup_steps": 10}
    assert endless_warmup(short.model_copy(update=line)) == ""  # a linear one: it gets to 0.91
    within = load_recipe(["--warmup_steps", "100", "--num_steps", "100"])
    assert "100 steps does not end within the run's 100: lower warmup_steps" in endless_warmup(
        within
    )


WSD = ("--schedule", "wsd", "--cooldown_fraction", "0.5", "--keep_last", "1", "--save_every", "0")


@pytest.fixture(autouse=True)
def no_export(monkeypatch):
    """The export has tests of its own."""

    def finished(run) -> int:
        run.directory.final.mkdir(exist_ok=True)
        run.directory.mark_finished(run.recipe.num_steps)
        return 0

    monkeypatch.setattr(finish, "finish", finished)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_longer_run_goes_on_from_before_the_cooldown(recipe, tmp_path, capsys):
    """And is then the run that was that long from the beginning, bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(recipe, whole, *WSD, "--num_steps", "12") == 0
    assert train(recipe, parts, *WSD, "--num_steps", "8") == 0
    assert (parts / "checkpoints" / "stable" / "step_00000004").is_dir()
    shorter = metrics(parts)
    capsys.readouterr()
    assert train(recipe, parts, *WSD, "--num_steps", "8") == 0
    assert "is finished" in capsys.readouterr().out
    assert train(recipe, parts, *WSD, "--num_steps", "12") == 0
    shown = capsys.readouterr().out
    assert "going on from step 4, before its cooldown" in shown and "rises" not in shown
    assert metrics(parts) == metrics(whole) and metrics(parts)[:4] == shorter[:4]
    ours, theirs = tensors(parts, 12), tensors(whole, 12)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert [p.name for p in (parts / "checkpoints" / "stable").iterdir()] == ["step_00000006"]
    assert (parts / "checkpoints" / "superseded" / "step_00000008").is_dir()


def test_a_cooldown_may_begin_where_the_run_resumes(recipe, tmp_path, capsys):
    """A branch off a stable phase is itself made longer later."""
    stable = ("--schedule", "wsd", "--cooldown_fraction", "0", "--keep_last", "1")
    assert train(recipe, tmp_path, *stable, "--num_steps", "2") == 0
    assert train(recipe, tmp_path, *WSD, "--num_steps", "4") == 0
    assert [p.name for p in (tmp_path / "checkpoints" / "stable").iterdir()] == ["step_00000002"]
    capsys.readouterr()
    assert train(recipe, tmp_path, *WSD, "--num_steps", "6") == 0
    shown = capsys.readouterr().out
    assert "going on from step 2, before its cooldown" in shown and "rises" not in shown


def test_its_permanent_checkpoints_are_those_of_a_run_that_was_so_long(recipe, tmp_path):
    """Also where it went back to one of them: the same weights, rows and chain."""
    found = []
    for name, lengths in (("whole", ("12",)), ("parts", ("8", "12"))):
        for length in lengths:
            options = (*WSD, "--num_steps", length, "--keep_every", "2")
            assert train(recipe, tmp_path / name, *options) == 0
        kept = checkpoints.permanent_ones(tmp_path / name / "checkpoints")
        found.append({step: checkpoints.record_of(path).content() for step, path in kept})
    whole, parts = found
    assert [*whole] == [2, 4, 6, 8, 10, 12] and parts == whole
    # Of those from before a cooldown there is one at a time; a permanent one is among the others.
    stable = tmp_path / "parts" / "checkpoints" / "stable"
    assert [path.name for path in stable.iterdir()] == ["step_00000006"]


def test_killed_soon_after_the_cooldown_began_its_chain_is_that_of_a_run_that_was_not(
    recipe, tmp_path, monkeypatch
):
    """Its checkpoint is there in both places: written once more, it would name another before."""
    kept = ("--keep_every", "2")
    assert train(recipe, tmp_path / "plain", *WSD, *kept, "--num_steps", "8") == 0
    for lost in (False, True):
        run = tmp_path / f"lost {lost}"
        with monkeypatch.context() as patch:

            def killed(self, step, *_, report=Monitor.report):
                if step == 5:
                    raise KeyboardInterrupt
                return report(self, step, *_)

            patch.setattr(Monitor, "report", killed)
            with pytest.raises(KeyboardInterrupt):
                train(recipe, run, *WSD, *kept, "--num_steps", "8")
        if lost:
            shutil.rmtree(run / "checkpoints" / "stable")
        assert train(recipe, run, *WSD, *kept, "--num_steps", "8") == 0
        for step in (2, 4, 6, 8):
            ours, theirs = (
                checkpoints.record_of(checkpoints.checkpoint_path(each / "checkpoints", step))
                for each in (run, tmp_path / "plain")
            )
            assert ours == theirs
        assert (run / "checkpoints" / "stable" / "step_00000004").is_dir()


def test_a_damaged_checkpoint_from_before_the_cooldown_is_told(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(recipe, run, *WSD, "--num_steps", "8") == 0
    (weights,) = (run / "checkpoints" / "stable").glob("step_*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert train(recipe, run, *WSD, "--num_steps", "12") == 0
    assert "stable/step_00000004 is passed over: " in capsys.readouterr().out


@pytest.mark.parametrize(("epochs", "step"), [(4, 10), (3, 50), (2, 50)])
def test_more_epochs_are_a_longer_run_and_fewer_are_not(recipe, tmp_path, epochs, step):
    """Before they are counted."""
    fields = ["--recipe", str(recipe), "--output_dir", str(tmp_path), "--num_epochs"]
    saved = load_recipe([*fields, "3", *WSD]).model_dump() | {"num_steps": 60, "num_epochs": None}
    (tmp_path / "recipe.yaml").touch()
    for directory, its in ((RunDirectory(tmp_path).stable, 10), (tmp_path / "checkpoints", 50)):
        save_checkpoint(directory, its, recipe=saved, num_epochs=3)
    now = load_recipe([*fields, str(epochs), *WSD])
    assert run_module._before_cooldown(now, RunDirectory(tmp_path)).step == step


@pytest.mark.parametrize("kept", [(), ("--keep_every", "3")])
def test_killed_after_it_went_back_it_goes_back_again(recipe, tmp_path, capsys, monkeypatch, kept):
    """The newest checkpoint was set aside, the next one not written, and an older one is kept."""
    run = tmp_path / "run"
    assert train(recipe, run, *WSD, *kept, "--num_steps", "8") == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr("gpt2repro.training.run.train_step", killed)
        train(recipe, run, *WSD, *kept, "--num_steps", "12")
    left = [path.name for path in (run / "checkpoints").glob("step_*")]
    assert left == (["step_00000003"] if kept else [])
    capsys.readouterr()
    assert train(recipe, run, *WSD, *kept, "--num_steps", "12") == 0
    assert "going on from step 4, before its cooldown" in capsys.readouterr().out
    assert [line["step"] for line in metrics(run)] == [*range(13)]


def test_a_rate_that_rises_is_told(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(recipe, run, "--num_steps", "6", "--min_lr", "0") == 0
    capsys.readouterr()
    assert train(recipe, run, "--num_steps", "12", "--min_lr", "0") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "The learning rate rises from 0.0015 to 0.0065 here: so cosine has it" in shown
