"""The track: its search, its race and its rules on losses that are a formula, and one real run."""

import json
import math
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from tiny_run import as_if_in_its_own_process, write_inputs

from gpt2repro import UserError
from gpt2repro.recipe import load_recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture
def track(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import track

    return track


def record(recipe: dict, loss: float, rows: str = "a") -> dict:
    return {
        "val_loss": None if loss == math.inf else loss,
        "losses": [loss],
        "rows_digests": [f"{rows}{recipe['seed']}"] * recipe["num_steps"],
        "seconds_per_step": 1.0,
        "threads": 1,
        "environment": {"hardware": "two cores"},
        "recipe": recipe,
    }


@pytest.fixture
def by_formula(track, monkeypatch):
    """Runs whose loss is known: best at a rate of 2e-3, and Muon's falls twice as fast."""
    started = []

    def start(fields: dict, output: Path, options: Namespace) -> dict:
        if not output.exists():
            started.append(output)
            pace = 2 if fields["optimizer"] == "muon" else 1
            loss = 4 + 300 / (pace * fields["num_steps"]) + 0.001 * (fields["seed"] % 2)
            loss += 0.1 * math.log(fields["max_lr"] / 2e-3) ** 2
            loss += 0.02 * (fields["embedding_second_moment"] == "row")
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(record(fields, loss if loss < 5.2 else math.inf)))
        return json.loads(output.read_text())

    monkeypatch.setattr(track, "start_one", start)
    return started


def test_points_are_spread_evenly_and_then_around_the_best(track):
    knobs = {"x": (1e-4, 1e-2), "y": (1.0, 16.0)}
    points = track.spread_evenly(knobs, 16)
    assert points[0] == {"x": 1e-3, "y": 4.0} and len({p["x"] for p in points}) == 16
    for name, (low, high) in knobs.items():
        places = [math.log(p[name] / low) / math.log(high / low) for p in points]
        assert all(0 <= place < 1 for place in places)
        quarters = [sum(int(4 * place) == n for place in places) for n in range(4)]
        assert max(quarters) - min(quarters) <= 2
    x, y = track.around({"x": 1e-3, "y": 16.0}, knobs).values()
    assert x == pytest.approx((1e-3 / 10**0.25, 1e-3 * 10**0.25))
    assert y == pytest.approx((16 / 2**0.5, 16 * 2**0.5))  # beyond the first range


def test_a_scale_is_tuned_raced_and_summarized(track, by_formula, tmp_path, capsys):
    arguments = ["run", "a", "--output", str(tmp_path), "--sides", "muon", "--jobs", "2"]
    arguments += ["--tried", "muon-fast-vectors", "muon-row"]
    with pytest.raises(UserError, match="--tried muon-row: add muon, which it changes, to --sides"):
        others = ["--sides", "normuon", "--tried", "muon-row"]
        track.main(["run", "a", "--output", str(tmp_path), *others])
    assert not by_formula
    assert track.main(arguments) == 0
    tuned = {p.parent.name for p in by_formula if "tuning" in p.parts}
    assert tuned == {"adamw", "muon"} and sum("tuning" in p.parts for p in by_formula) == 2 * 24
    report = json.loads((tmp_path / "a.summary.json").read_text())
    points = report["points"]["adamw"]
    assert any(point["val_loss"] is None for point in points)  # what diverged is listed
    best = min(points, key=lambda point: point["val_loss"] or math.inf)
    assert best["max_lr"] == pytest.approx(2e-3, rel=0.1) and len(points) == 24
    near = [point["max_lr"] / best["max_lr"] for point in points[16:]]  # of 100, a quarter is 3.2
    assert max(near) / min(near) < 3.2 * 1.8 and len({point["max_lr"] for point in points}) == 24
    rows = {(row["side"], row["steps"]): row for row in report["rows"]}
    adamw = rows["adamw", 300]
    assert adamw["counts"] and adamw["mean"] < adamw["upper_bound"] <= report["target"]
    assert all(row["hardware"] == ["two cores"] for row in rows.values())
    with pytest.raises(UserError, match="--seeds 4: a target takes 8 at least"):
        track.main([*arguments, "--seeds", "4"])
    counted = [row["steps"] for row in rows.values() if row["side"] == "muon" and row["counts"]]
    failed = [row["steps"] for row in rows.values() if row["tuned"] and not row["counts"]]
    assert min(counted) == pytest.approx(150, abs=8) and max(failed) < min(counted)
    tried = {p.parent.name for p in by_formula if "tried" in p.parts}  # as a side they would differ
    assert tried == {f"muon-row-{min(counted)}", f"muon-fast-vectors-{min(counted)}"}
    changed = {row["side"]: row["against_plain"] for row in report["rows"] if not row["tuned"]}
    assert changed.keys() == {"muon-fast-vectors", "muon-row"}
    assert changed["muon-row"] == pytest.approx([0.02, 0, 0.02])
    assert changed["muon-fast-vectors"] == pytest.approx([0, 0, 0])
    assert (tmp_path / "a.svg").stat().st_size > 0
    for row in rows.values():  # what has failed by its first seeds is given up
        first = [math.inf if loss is None else loss for loss in row["losses"][:4]]
        given_up = statistics.mean(first) > report["target"]
        assert len(row["losses"]) == (4 if given_up or not row["tuned"] else 8)
    assert any(len(row["losses"]) == 4 for row in rows.values())

    there = ["transfer", "b4", "--points_of", "a", "--seeds", "2"]
    assert track.main([*there, "--output", str(tmp_path)]) == 0
    moved = json.loads((tmp_path / "b4.transfer.json").read_text())["rows"]
    assert [row["side"] for row in moved] == ["adamw", "muon"]
    assert [row["steps"] for row in moved] == [244, round(244 * min(counted) / 300)]
    run = json.loads((tmp_path / "b4" / "transfer" / "adamw-244" / "2.json").read_text())["recipe"]
    assert run["n_layer"] == 12 and all(run[name] == best[name] for name in track.OF_ADAMW)

    assert track.main(["time", "a", "--output", str(tmp_path), "--turns", "2"]) == 0
    taken = json.loads((tmp_path / "a.time.json").read_text())["rows"]
    assert [(row["side"], row["seconds"]) for row in taken] == [("adamw", [1, 1]), ("muon", [1, 1])]
    assert by_formula[-1].parts[-3:] == ("time", "muon", "1.json")

    num_started = len(by_formula)
    assert track.main(arguments) == 0 and len(by_formula) == num_started, "all is there already"
    odd = tmp_path / "a" / "rows" / "adamw-300" / "3.json"
    kept = json.loads(odd.read_text())
    odd.write_text(json.dumps(record(kept["recipe"], 5.0, rows="b")))
    with pytest.raises(UserError, match="runs of seed 3 had different rows"):
        track.main(["summary", "a", "--output", str(tmp_path)])
    odd.write_text(json.dumps(record(kept["recipe"] | {"n_layer": 4}, 5.0)))
    with pytest.raises(UserError, match="of different models"):
        track.main(["summary", "a", "--output", str(tmp_path)])
    capsys.readouterr()


@pytest.mark.parametrize(("recipe", "scale"), [("demo", "a"), ("gpt2-muon", "b4")])
def test_recipes_have_the_winner(track, recipe, scale):
    """The demo that of its own model; the 124M that of 12 layers, and the schedule of the demo."""
    a, own = (
        json.loads((ROOT / f"benchmarks/results/track/{each}.summary.json").read_text())
        for each in ("a", scale)
    )

    def winner(report) -> str:
        found = track.shortest(report["rows"])
        return min(found, key=lambda row: (row["steps"], row["mean"]))["side"]

    best, side = track.best_point(own, winner(own)), track.SIDES[winner(own)]
    schedule = {"schedule": track.SIDES[winner(a)]["schedule"], "min_lr": 0.0}
    fields = load_recipe(["--recipe", recipe]).model_dump()
    for name, value in {**side, **best, **schedule}.items():
        assert fields[name] == value, name


@pytest.mark.parametrize("needed", [1, 40, 60, 61, 100, 200, 201])
def test_any_guess_ends_at_the_fewest_steps(track, needed):
    asked = {}
    for guess in (0.2, 0.5, 1.0):
        tried = []

        def reaches(steps, tried=tried):
            return tried.append(steps) or steps >= needed

        fewest = max(40, min(200, 5 * math.ceil(needed / 5)))  # a fortieth of 200 is 5
        assert track.fewest_steps(200, guess, reaches) == fewest and fewest in tried
        asked[guess] = len(set(tried))
    assert needed != 100 or asked[0.5] == 2, "a guess that is right is tried, and the next shorter"


def test_the_bound_is_students(track):
    losses = [3.0, 3.1, 2.9, 3.0]  # scipy.stats.t.ppf(0.95, 3) = 2.3534
    assert track.upper_bound(losses) == pytest.approx(3 + 2.353 * (0.02 / 3) ** 0.5 / 2)
    assert track.upper_bound([*losses, math.inf]) == track.upper_bound([3.0]) == math.inf
    for few in ([*losses, *losses, math.inf], losses):
        with pytest.raises(
            UserError, match=f"no target: it takes 8 seeds.* and has {len(few)} with"
        ):
            track.target_of(few)
    assert track.target_of([3.0] * 8) == 3.0


def test_the_best_may_not_lie_where_nothing_was_looked_for(track, capsys):
    inside = {"max_lr": 1e-3, "embedding_lr_scale": 10.0, "weight_decay": 0.1}
    track.tell_edges("adamw", track.OF_ADAMW, inside)
    assert capsys.readouterr().out == ""
    track.tell_edges("adamw", track.OF_ADAMW, inside | {"max_lr": 0.02})
    assert capsys.readouterr().out == "adamw: the best max_lr, 0.02, is outside 0.0001 to 0.01\n"
    track.tell_edges("adamw", track.OF_ADAMW, inside | {"max_lr": 0.0098})
    assert "0.0098, is near an end of 0.0001 to 0.01" in capsys.readouterr().out


def test_a_run_of_its_own_is_ended_told_of_and_gone_on_with(track, tmp_path):
    """The process is a stand-in that takes the same arguments."""
    output = tmp_path / "a" / "rows" / "muon-150" / "1.json"

    def start(code: str, seconds: float = 60.0) -> dict:
        options = Namespace(output=tmp_path, threads=1, deadline=time.monotonic() + seconds)
        options.launcher = [sys.executable, "-c", f"import sys, time; {code}", "at"]
        fields = {"seed": 1, "num_validation_units": None}  # which the run's data decide
        return track.start_one(fields, output, options)

    with pytest.raises(UserError, match=r"failed or was stopped: out of memory \(.*log\)"):
        start("sys.exit('out of memory')")
    assert "out of memory" in (tmp_path / "work" / "a-rows-muon-150-1" / "log").read_text()
    for seconds in (0.5, 0.0):
        with pytest.raises(track.TimeIsOver):
            start("time.sleep(60)", seconds)
    decided = {"seed": 1, "output_dir": "x", "num_validation_units": 4}
    record = {"val_loss": 3.5, "recipe": decided}
    done = start(f"open(sys.argv[-1], 'w').write({json.dumps(record)!r})")
    assert done == record == start("sys.exit(1)") and not [*(tmp_path / "work").iterdir()]
    output.write_text(json.dumps({"recipe": {"seed": 2}}))
    with pytest.raises(UserError, match="it has seed 2, and is to have 1; move it away"):
        start("sys.exit(1)")


def test_one_run_and_its_repetition(track, tmp_path, monkeypatch, capsys):
    """Through the training script's own loop, on the tiny recipe; then with another loss in it."""
    recipe = write_inputs(tmp_path)
    monkeypatch.setitem(
        track.SCALES, "a", track.Scale(3, 1, (), {"recipe": str(recipe), **track.PLAIN})
    )

    def in_this_process(fields: dict, output: Path, options: Namespace) -> dict:
        output.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fields.yaml").write_text(json.dumps(fields))
        with as_if_in_its_own_process():
            directory = str(output.with_suffix(""))
            track.main(["one", str(tmp_path / "fields.yaml"), directory, str(output)])
        return json.loads(output.read_text())

    monkeypatch.setattr(track, "start_one", in_this_process)
    options = Namespace(scale="a", dataset_name=None)
    fields = track.job("normuon", {"max_lr": 1e-2, "muon_lr": 0.02}, 3, 1, options)
    file = tmp_path / "rows" / "normuon-3" / "1.json"
    found = in_this_process(fields, file, options)
    assert found["recipe"]["muon_normalize"] and found["recipe"]["warmup_steps"] == 0
    assert len(found["losses"]) == 3 and len(set(found["rows_digests"])) == 3
    assert 0 < found["val_loss"] < 7 and found["seconds_per_step"] > 0
    assert track.main(["repeat", str(file.parent)]) == 0
    assert "the same" in capsys.readouterr().out
    found["losses"][1] += 1e-7
    file.write_text(json.dumps(found))
    assert track.main(["repeat", str(file)]) == 1
    assert "other losses from step 1 on" in capsys.readouterr().out
