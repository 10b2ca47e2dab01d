"""A run that was stopped, killed, moved or sent back is one run for a tracker: each step once.

The last tests need the trackers themselves (`pip install -e ".[trackers]"`), write to temporary
directories and use no network; where one is not installed they are counted as skipped. The others
have a stand-in for accelerate's side of one.
"""

import json
import os
import struct
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import LoggerType
from tiny_run import metrics, train, write_inputs

from gpt2repro import UserError
from gpt2repro.recipe import load_recipe
from gpt2repro.recipe_fields import ResolvedRecipe
from gpt2repro.records import checkpoints
from gpt2repro.records.run_directory import RunDirectory, Start
from gpt2repro.system import command_line
from gpt2repro.training import finish, tracker
from gpt2repro.training.monitor import Monitor
from gpt2repro.training.tracker import Tracker, TrackerRun, find_tracker

Steps = list[tuple[int, float]]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def nothing_is_published(monkeypatch):
    monkeypatch.setattr(finish, "_publish", lambda *_: None)


class Killed(Exception):
    pass


def train_until(step: int, *arguments: Any) -> None:
    """As if killed when it has told of `step`; a checkpoint of step 4 is there, none later."""

    def report_and_die(self, at, *rest):
        report(self, at, *rest)
        if at == step:
            raise Killed

    report = Monitor.report
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Monitor, "report", report_and_die)
        train(*arguments)


def losses(run: Path) -> Steps:
    return [(line["step"], line["loss"]) for line in metrics(run) if "loss" in line]


# --- With a stand-in ------------------------------------------------------------------------------


class Service:
    """What a tracker keeps: its runs by id, each with its name and the lines it was told."""

    name = "wandb"

    def __init__(self) -> None:
        self.runs: dict[str, tuple[str, list[tuple[int, dict[str, Any]]]]] = {}
        self.refuses, self.fails, self.finished, self.tracker = False, False, 0, None

    def init_trackers(self, accelerator, _project, config, init_kwargs) -> None:
        if self.refuses:
            raise RuntimeError("not today")
        how = init_kwargs["wandb"]
        assert how["group"] == "tiny" and how["resume"] == "allow" and config["max_lr"]
        self._lines = self.runs.setdefault(how["id"], (how.get("name", ""), []))[1]
        accelerator.trackers = [self]

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.fails:
            raise ConnectionError("no route to host")
        self._lines.append((step, values))

    def finish(self) -> None:
        self.finished += 1
        if self.fails:
            raise ConnectionError("no route to host")

    def told(self) -> dict[str, Steps]:
        """Each run's losses, by its name."""
        return {
            name: [(step, values["loss"]) for step, values in lines if "loss" in values]
            for name, lines in self.runs.values()
        }


@pytest.fixture
def service(monkeypatch) -> Service:
    service = Service()
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    monkeypatch.setattr(
        Accelerator, "init_trackers", lambda *given, **more: service.init_trackers(*given, **more)
    )
    return service


TOLD = ("--report_to", "wandb", "--keep_last", "9", "--eval_every", "0")


def test_a_run_that_is_killed_goes_on_or_moves_is_told_once(recipe, tmp_path, service):
    run, moved, short = tmp_path / "run", tmp_path / "moved", (*TOLD, "--num_steps", "8")
    train_until(2, recipe, run, *short)  # before there is any checkpoint
    train_until(6, recipe, run, *short)
    checkpoint = run / "checkpoints" / "step_00000004"
    (tracker_id,) = service.runs
    saved = json.loads((checkpoint / "state.json").read_text())["tracker"]
    assert (
        saved
        == TrackerRun(
            report_to="wandb", id=tracker_id, name="tiny", exp_name="tiny", is_new=False
        ).model_dump()
    )
    assert saved == json.loads((run / "tracker.json").read_text())
    assert train(recipe, run, *short) == 0
    assert service.told() == {"tiny": losses(run)} and len(losses(run)) == 8
    del service.runs[tracker_id][1][4:]  # as if the checkpoint were of another machine
    assert train(recipe, moved, *short, "--resume", str(checkpoint)) == 0
    assert [*service.runs] == [tracker_id] and service.told()["tiny"][4:] == losses(moved)
    assert service.finished == 4


def test_one_that_never_ends_is_left(service, monkeypatch, capsys):
    """wandb tries to send what is left for as long as its network is away."""
    left = threading.Event()
    monkeypatch.setattr(service, "finish", lambda: threading.Event().wait(600), raising=False)
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 0.1)
    monkeypatch.setattr(command_line, "end_without_exit_handlers", left.set)
    of_a_run = Tracker(None, -1)
    of_a_run.trackers = [service]
    of_a_run.close()
    assert left.is_set()
    assert capsys.readouterr().out.startswith("wandb: not all was sent within 0 s; metrics.jsonl")


def test_what_comes_otherwise_is_another_run_with_all_that_was_before(recipe, tmp_path, service):
    run = tmp_path / "run"
    train_until(6, recipe, run, *TOLD)
    first = losses(run)
    service.refuses = True
    with pytest.raises(UserError, match="report_to wandb: not today; or set it to none"):
        train(recipe, run, *TOLD, "--max_lr", "5e-3")  # another rate from step 4 on
    service.refuses = False
    train_until(7, recipe, run, *TOLD, "--max_lr", "5e-3")
    second = losses(run)
    assert service.told() == {"tiny": first, "tiny-from-00000004": second}
    assert first[4] == second[4] and first[5] != second[5]
    assert train(recipe, run, *TOLD, "--max_lr", "5e-3") == 0
    assert service.told() == {"tiny": first, "tiny-from-00000004": losses(run)}
    assert second == losses(run)[:8]


def test_a_tracker_that_fails_ends_no_run(recipe, tmp_path, service, capsys):
    service.fails = True
    assert train(recipe, tmp_path / "run", *TOLD, "--num_steps", "2") == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("wandb: no route to host") == 2  # the first, and the end
    assert len(losses(tmp_path / "run")) == 2


# --- Which run ------------------------------------------------------------------------------------

WANDB, TRACKIO, BOARD = (
    TrackerRun(report_to=kind, id="1", name="tiny", exp_name="tiny", is_new=False)
    for kind in ("wandb", "trackio", "tensorboard")
)


@pytest.fixture
def place(tmp_path) -> RunDirectory:
    """A run that told of steps 0 to 6 and has checkpoints of 2 and 4."""
    directory = RunDirectory(tmp_path / "run")
    for step in (2, 4):
        checkpoints.checkpoint_path(directory.checkpoints, step).mkdir(parents=True)
    directory.metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(7)))
    directory.recipe.write_text(tiny(report_to="wandb").as_yaml())
    directory.tracker.write_text(WANDB.model_dump_json())
    return directory


def tiny(**fields: Any) -> ResolvedRecipe:
    recipe = load_recipe(["--num_steps", "9", "--exp_name", "tiny", "--micro_batch_size", "1"])
    return recipe.resolved(**{"num_steps": 9, "micro_batch_size": 1, **fields})


def at(step: int, tracker: TrackerRun | None = None, **fields: Any) -> Start:
    state = {"recipe": tiny(**fields).model_dump(), "tracker": tracker and tracker.model_dump()}
    return Start(None, {"step": step, **state} if step else {}, "")


def found(directory: RunDirectory, start: Start, **fields: Any) -> tuple[str, str, int]:
    tracker = find_tracker(tiny(**{"report_to": "wandb"} | fields), directory, start)
    assert tracker.run is not None and tracker.run.report_to == fields.get("report_to", "wandb")
    return "same" if tracker.run.id == "1" else "new", tracker.run.name, tracker.told


def test_in_its_directory(place):
    assert found(place, at(4)) == ("same", "tiny", 6)
    assert found(place, at(4), resume="auto") == ("same", "tiny", 6)
    assert found(place, at(7), max_lr=0.1) == ("same", "tiny", 6)  # nothing comes again
    assert found(place, at(6), max_lr=0.1) == ("same", "tiny", 6)  # told before its update
    assert found(place, at(4), max_lr=0.1) == ("new", "tiny-from-00000004", -1)
    # On another number of processes, say: the same figures.
    assert found(place, at(4), micro_batch_size=8, keep_last=7) == ("same", "tiny", 6)
    assert found(place, at(6), exp_name="other") == ("new", "other", -1)
    assert found(place, at(2)) == ("new", "tiny-from-00000002", -1)
    assert found(place, at(0)) == ("new", "tiny-from-00000000", -1)
    place.tracker.write_text(WANDB.model_copy(update={"is_new": True}).model_dump_json())
    assert found(place, at(4)) == ("same", "tiny", -1)  # it was refused
    place.tracker.write_text(WANDB.model_dump_json())
    place.metrics.unlink()  # lost: what comes was told, who knows what else
    assert found(place, at(4), max_lr=0.1) == ("same", "tiny", 3)


def test_after_another_tracker_or_none_it_is_told_from_the_beginning(place):
    assert found(place, at(4), report_to="trackio") == ("new", "tiny", -1)
    assert find_tracker(tiny(report_to="none"), place, at(4)) == Tracker(None, -1)
    place.tracker.write_text("{")
    assert found(place, at(4)) == ("new", "tiny", -1)


def test_a_run_that_was_deleted_there_is_forgotten_with_the_file(place):
    """A checkpoint remembers it too, for another machine; here the file alone counts."""
    place.tracker.unlink()
    assert found(place, at(4, WANDB, report_to="wandb")) == ("new", "tiny", -1)


def test_from_elsewhere(tmp_path):
    place = RunDirectory(tmp_path / "new")
    assert found(place, at(0)) == ("new", "tiny", -1)
    came = at(4, WANDB, report_to="wandb")
    assert found(place, came) == ("same", "tiny", 3)
    assert found(place, came, max_lr=0.1) == ("new", "tiny-from-00000004", -1)
    assert found(place, came, exp_name="mine") == ("new", "mine", -1)
    assert found(place, came, report_to="trackio") == ("new", "tiny", -1)
    assert found(place, at(4, TRACKIO), report_to="trackio") == ("new", "tiny-from-00000004", -1)


def test_tensorboard_takes_steps_back(place):
    board = {"report_to": "tensorboard"}
    assert found(place, at(2), **board) == ("new", "tiny", -1)
    place.tracker.write_text(BOARD.model_dump_json())
    assert found(place, at(2), max_lr=0.1, **board) == ("same", "tiny", 1)
    place.tracker.unlink()  # its files are in the directory, so they do not come with checkpoints
    assert found(place, at(2, BOARD, **board), **board) == ("new", "tiny", -1)


# --- The trackers themselves ----------------------------------------------------------------------


def tensorboard_runs(run: Path) -> dict[str, list[dict[str, Any]]]:
    """As all below: each run's lines by its name."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(run / "gpt2repro"))
    found.Reload()
    lines: dict[int, dict[str, Any]] = {}
    for tag in found.Tags()["scalars"]:
        for each in found.Scalars(tag):
            assert tag not in lines.setdefault(each.step, {"step": each.step}), "told twice"
            lines[each.step][tag] = each.value
    for each in found.Tensors("sample/text_summary"):
        lines[each.step]["sample"] = each.tensor_proto.string_val[0].decode()
    return {"tiny": [lines[step] for step in sorted(lines)]}


def trackio_runs(_: Path) -> dict[str, list[dict[str, Any]]]:
    trackio, storage = import_module("trackio"), import_module("trackio.sqlite_storage")
    media = import_module("trackio.utils").MEDIA_DIR
    lines = {}
    for each in trackio.Api().runs("gpt2repro"):
        assert each.name not in lines and each.config["_Group"] == "tiny"
        found = storage.SQLiteStorage.get_logs("gpt2repro", each.name, run_id=each.id)
        for line in found:
            if "sample" in line:
                path = media / line["sample"]["file_path"]
                line["sample"] = path.read_text(encoding="utf-8")
        lines[each.name] = found
    return lines


def wandb_runs(run: Path) -> dict[str, list[dict[str, Any]]]:
    """What `wandb sync` would send: the files of a run's launches, by their time."""
    lines: dict[str, list[dict[str, Any]]] = {}
    names: dict[str, str] = {}
    import_module("wandb").teardown()  # ends the process that writes, and what it read of WANDB_DIR
    for path in sorted(run.parent.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        for record in wandb_records(path.read_bytes()):
            if record.WhichOneof("record_type") == "run":
                name = names.setdefault(record.run.run_id, record.run.display_name)
                assert record.run.run_group == "tiny"
            elif record.WhichOneof("record_type") == "history":
                items = [(".".join(e.nested_key), e.value_json) for e in record.history.item]
                line = {key: json.loads(value) for key, value in items}
                if page := line.get("sample.path"):
                    line["sample"] = (path.parent / "files" / page).read_text(encoding="utf-8")
                lines.setdefault(name, []).append(line | {"step": line["_step"]})
    return lines


def wandb_records(log: bytes) -> Iterator[Any]:
    """Records of a .wandb file: in pieces, in blocks of 32 KiB, as LevelDB keeps its log."""
    records = import_module("wandb.proto.wandb_internal_pb2")
    at, content = 7, b""
    while at + 7 <= len(log):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, size, piece = struct.unpack("<IHB", log[at : at + 7])
        content += log[at + 7 : at + 7 + size]
        at += 7 + size
        if piece in (1, 4):  # whole, or the last one
            yield records.Record.FromString(content)
            content = b""


READ = {"tensorboard": tensorboard_runs, "trackio": trackio_runs, "wandb": wandb_runs}


@pytest.fixture(params=READ)
def kind(request, tmp_path, monkeypatch) -> str:
    """A tracker that keeps to this directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    if request.param == "trackio":
        for name, module in [*sys.modules.items()]:  # they read it when they were imported
            for path in ("TRACKIO_DIR", "MEDIA_DIR") if name.startswith("trackio") else ():
                if hasattr(module, path):
                    below = "trackio" if path == "TRACKIO_DIR" else "trackio/media"
                    monkeypatch.setattr(module, path, tmp_path / below)
    return request.param


def test_killed_gone_on_and_sent_back(kind, recipe, tmp_path):
    run, told = tmp_path / "run", ("--report_to", kind, "--keep_last", "9", "--sample_every", "5")
    train_until(6, recipe, run, *told)
    assert train(recipe, run, *told) == 0
    first = losses(run)
    back = ("--resume", str(run / "checkpoints" / "step_00000004"), "--max_lr", "5e-3")
    assert train(recipe, run, *told, *back) == 0
    runs = READ[kind](run)
    lines = {
        name: [(each["step"], each["loss"]) for each in lines[:-1]] for name, lines in runs.items()
    }
    if kind == "tensorboard":
        directories = {path.parent for path in run.rglob("events.out.*")}
        assert len(directories) == 2  # the figures, and the settings of the first launch
        assert [*lines] == ["tiny"]
        assert [step for step, _ in lines["tiny"]] == [*range(12)]
        assert [loss for _, loss in lines["tiny"]] == pytest.approx([x for _, x in losses(run)])
    else:
        assert lines == {"tiny": first, "tiny-from-00000004": losses(run)}
    assert first[:5] == losses(run)[:5] and first[5] != losses(run)[5]
    for lines in runs.values():
        assert [line["step"] for line in lines if "sample" in line] == [5, 10]
        assert [line["step"] for line in lines if "val_loss" in line] == [0, 5, 10, 12]


def test_figures_of_tasks_and_texts_arrive(kind, tmp_path):
    """A text shows letter for letter, be it Markdown or HTML."""
    told = {"loss": 2.5, "core": 0.25, "hellaswag/completion_acc": 0.5}
    line = {"step": 3, **told, "rows_digest": "00ff", "mfu": None, "sample": "# <1> of\n\n *x*"}
    accelerator = Accelerator(cpu=True, log_with=kind, project_dir=tmp_path / "run")
    tracker = Tracker(TrackerRun(report_to=kind, id="1", name="tiny", exp_name="tiny"), -1)
    tracker.log_in(tiny(report_to=kind), accelerator, tmp_path / "tracker.json", [line])
    assert tracker.tell(line) == ""
    assert tracker.tell({"step": 4, "loss": 2.25}) == ""
    tracker.close()
    ((name, lines),) = READ[kind](tmp_path / "run").items()
    assert name == "tiny" and [each["step"] for each in lines] == [3, 4]
    assert {key: lines[0][key] for key in told} == told and lines[1]["loss"] == 2.25
    assert not {"rows_digest", "mfu"} & lines[0].keys()
    page = (
        "    # <1> of\n    \n     *x*" if kind == "tensorboard" else "# &lt;1&gt; of\n\n *x*</pre>"
    )
    assert page in lines[0]["sample"]


@pytest.mark.parametrize("kind", ["trackio"], indirect=True)
def test_trackio_takes_a_second_run_of_one_name_for_another(kind, recipe, tmp_path):
    """And what goes on is the second one, not the one that was begun under the name."""
    told = ("--report_to", kind, "--keep_last", "9", "--eval_every", "0", "--num_steps")
    assert train(recipe, tmp_path / "first", *told, "8") == 0
    for length in ("2", "4"):
        assert train(recipe, tmp_path / "second", *told, length) == 0
    storage = import_module("trackio.sqlite_storage").SQLiteStorage
    steps = [
        [line["step"] for line in storage.get_logs("gpt2repro", each.name, run_id=each.id)]
        for each in import_module("trackio").Api().runs("gpt2repro")
    ]
    assert sorted(steps) == [[*range(5)], [*range(9)]]
