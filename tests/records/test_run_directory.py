"""Where a launch goes on, who may write, and what a kill between any two files leaves."""

import errno
import fcntl
import json
import os
import threading
from pathlib import Path

import pytest
from tiny_checkpoint import save_checkpoint

from gpt2repro import UserError
from gpt2repro.records import checkpoints, run_directory
from gpt2repro.records.metrics import MetricsLog, read_metrics
from gpt2repro.records.run_directory import RunDirectory, finished_step
from gpt2repro.system import atomic


def add_checkpoint(run: Path, step: int, resume: str = "auto", **state) -> Path:
    return save_checkpoint(run / "checkpoints", step, recipe={"resume": resume}, **state)


RECIPE = "exp_name: a\n"


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of ten steps with checkpoints before steps 4 and 8."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "recipe.yaml").write_text(RECIPE)
    lines = [json.dumps({"step": step}) for step in range(10)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    add_checkpoint(path, 4)
    add_checkpoint(path, 8)
    return path


def test_a_new_run_begins_at_step_0(tmp_path):
    directory = RunDirectory(tmp_path / "deep" / "run")
    start = directory.find_start("auto")
    assert (start.path, start.step, start.note) == (None, 0, "")
    assert not directory.path.exists()  # deciding writes nothing
    assert directory.open(0, RECIPE) == []
    assert directory.recipe.exists() and directory.metrics.read_text() == ""


def test_an_existing_run_goes_on(run):
    directory = RunDirectory(run)
    start = directory.find_start("auto")
    assert start.step == 8 and "going on from its step 8" in start.note
    assert [line["step"] for line in directory.open(8, RECIPE)] == [*range(8)]


def test_never_touches_nothing(run):
    with pytest.raises(UserError, match="--resume never forbids"):
        RunDirectory(run).find_start("never")


def test_broken_ones_are_passed_over_and_named(run):
    (run / "checkpoints" / "step_00000008" / "COMPLETE").unlink()
    start = RunDirectory(run).find_start("auto")
    assert (
        start.step == 4 and "step_00000008 is passed over: it has no COMPLETE marker." in start.note
    )
    (run / "checkpoints" / "step_00000004" / "COMPLETE").unlink()
    start = RunDirectory(run).find_start("auto")
    assert start.step == 0 and "no valid checkpoint: starting at step 0" in start.note


def test_one_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(run, monkeypatch):
    """A colleague's file mode, a file server that is away: the run would begin again from less."""

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(atomic, "sha256", refuse)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"step_00000008 cannot be read: .*Permission denied"):
        RunDirectory(run).find_start("auto")
    with pytest.raises(UserError, match=r"^--resume \S+step_00000004 cannot be read: .*Permission"):
        checkpoints.read_state(run / "checkpoints" / "step_00000004")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_going_back_sets_later_checkpoints_aside(run):
    """They are of a line that is left; lost they are not."""
    directory, earlier = RunDirectory(run), str(run / "checkpoints" / "step_00000004")
    start = directory.find_start(earlier)
    assert start.step == 4
    directory.open(4, RECIPE)
    names = sorted(path.name for path in directory.checkpoints.iterdir())
    assert names == ["step_00000004", "superseded"]
    assert (directory.checkpoints / "superseded" / "step_00000008" / "COMPLETE").exists()
    assert directory.find_start("auto").step == 4


def test_a_run_that_goes_back_is_not_finished_any_more(run):
    """Killed before its new end, it would be said to be, with the model of its old one."""
    directory = RunDirectory(run)
    directory.final.mkdir()
    directory.mark_finished(4)
    assert directory.is_finished(4)
    directory.open(4, "recipe: 1")  # to be made longer: its model is the newest still
    assert directory.is_finished(4)
    directory.open(2, "recipe: 1")
    assert not directory.is_finished(4) and finished_step(run) == 0
    directory.close()


def test_the_same_command_goes_on_when_it_names_a_checkpoint(run):
    """A scheduler repeats `--resume PATH`: what that launch saved since is where it goes on."""
    named = str(run / "checkpoints" / "step_00000004")
    add_checkpoint(run, 9, resume=named)
    start = RunDirectory(run).find_start(named)
    assert start.step == 9 and "going on from its step 9" in start.note


def test_one_process_writes(run, monkeypatch):
    monkeypatch.setattr(run_directory, "PATIENCE_SECONDS", 0.2)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        for touch in (lambda d: d.find_start("auto"), lambda d: d.open(4, RECIPE)):
            with pytest.raises(UserError, match="is being written by another process; stop it"):
                touch(RunDirectory(run))
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    RunDirectory(run).open(8, RECIPE)


def test_a_lock_that_was_removed_is_taken_again_or_told(run):
    """By a purge of old files; or by somebody who takes it for stale, and begins."""
    directory = RunDirectory(run)
    directory.open(8, RECIPE)
    (run / ".lock").unlink()
    directory.check_still_there()
    with pytest.raises(UserError, match="another process"):
        RunDirectory(run).open(8, RECIPE)
    (run / ".lock").unlink()
    other = RunDirectory(run)
    other.open(8, RECIPE)
    with pytest.raises(UserError, match="is being written by another process; stop it or give"):
        directory.check_still_there()
    other.close()


def test_where_another_launch_has_been_nothing_is_written(run, tmp_path):
    """It came and went: before this one opened the run, or while its lock was lost."""
    late, other = RunDirectory(run), RunDirectory(run)
    early = RunDirectory(tmp_path / "new")
    early.find_start("never")
    late.find_start("auto")
    late.close()  # as on the way to it, without a lock
    for directory, path in ((late, run), (early, tmp_path / "new")):
        other = RunDirectory(path)
        other.open(4, RECIPE)
        other.close()
        with pytest.raises(UserError, match="another launch has been here since this one began"):
            directory.open(0, RECIPE)
    assert (run / "checkpoints" / "step_00000004").is_dir()
    directory = RunDirectory(run)
    directory.open(4, RECIPE)
    (run / ".lock").unlink()
    other.close()
    other = RunDirectory(run)
    other.open(4, RECIPE)
    with pytest.raises(UserError, match="is being written by another process"):
        directory.restore(RECIPE)
    other.close()
    for touch in (directory.check_still_there, lambda: directory.restore(RECIPE)):
        with pytest.raises(UserError, match="another launch has been here"):
            touch()


def test_a_lock_that_is_removed_while_it_is_waited_for_is_not_the_one(run, monkeypatch):
    holder, late = RunDirectory(run), RunDirectory(run)
    holder.open(8, RECIPE)
    (run / ".lock").rename(run / "held")

    def sleep(_):  # the one that waits has the old file open, which is free now
        (run / ".lock").unlink()
        holder.check_still_there()

    (run / ".lock").hardlink_to(run / "held")
    monkeypatch.setattr(run_directory.time, "sleep", sleep)
    monkeypatch.setattr(run_directory, "PATIENCE_SECONDS", 0.2)
    with pytest.raises(UserError, match="is being written by another process"):
        late.find_start("auto")


def test_a_checkpoint_that_was_to_be_written_again_is_there_after_a_kill(run):
    place = run / "checkpoints" / "step_00000008"
    place.rename(place.with_name(".step_00000008.previous"))
    assert RunDirectory(run).find_start("auto").step == 4  # somebody may be about to name it
    (run / ".lock").touch()
    assert RunDirectory(run).find_start("auto").step == 8


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_file_system_that_fails_to_answer_once_ends_no_run(run, monkeypatch, number):
    directory = RunDirectory(run)
    directory.open(8, RECIPE)
    stat, failures = Path.stat, [number]

    def fails_once(path, **options):
        if path.name in ("recipe.yaml", ".lock") and failures:
            raise OSError(failures.pop(), "of the network's")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", fails_once)
    directory.check_still_there()
    assert not failures
    failures.append(number)
    directory.restore(RECIPE)
    assert not failures and (run / "checkpoints").exists()
    failures.append(errno.EACCES)
    with pytest.raises(PermissionError):
        directory.check_still_there()


def test_a_lock_that_cannot_be_taken_again_now_is_taken_before_the_next_batch(run, monkeypatch):
    """Its file was replaced, says the file system, and fails to open the new one."""
    directory = RunDirectory(run)
    directory.open(8, RECIPE)
    open_file = Path.open

    def fails(path, *rest):
        if path.name == ".lock":
            raise OSError(errno.EIO, "of the network's")
        return open_file(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda _: (_ for _ in ()).throw(OSError(errno.ESTALE, "stale")))
        patch.setattr(Path, "open", fails)
        directory.check_still_there()
    RunDirectory(run).find_start("auto")  # nobody holds it
    directory.check_still_there()
    with pytest.raises(UserError, match="another process"):
        RunDirectory(run).open(8, RECIPE)


def test_a_link_that_leads_nowhere_is_told(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    for run in (tmp_path / "runs", tmp_path / "runs" / "mine"):
        with pytest.raises(UserError, match=r"runs is a link to .*gone, which is not there: make"):
            RunDirectory(run).open(0, RECIPE)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, 524])
def test_a_file_system_without_locks_is_told_and_written(run, monkeypatch, capsys, number):
    def unsupported(*_):
        raise OSError(number, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    directory = RunDirectory(run)
    assert directory.find_start("auto").step == 8 and directory.open(8, RECIPE)
    said = capsys.readouterr().out
    assert said.count("cannot be locked here (No locks available)") == 1


def test_a_lock_that_is_refused_is_no_lack_of_locks(run, monkeypatch):
    """As a Windows share says that another holds it."""

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fcntl, "flock", refused)
    (run / ".lock").touch()
    with pytest.raises(UserError, match=r"cannot be read: .*Permission denied"):
        RunDirectory(run).find_start("auto")
    with pytest.raises(UserError, match=r"cannot be written: .*Permission denied"):
        RunDirectory(run).open(8, RECIPE)


def test_a_launch_waits_for_one_that_is_about_to_stop_and_goes_on_from_its_checkpoint(run, capsys):
    stopping = RunDirectory(run)
    stopping.open(8, RECIPE)

    def save_and_leave():
        add_checkpoint(run, 10)
        stopping.close()

    timer = threading.Timer(0.3, save_and_leave)
    timer.start()
    assert RunDirectory(run).find_start("auto").step == 10
    timer.join()
    assert "written by another process: waiting 60 s for its end" in capsys.readouterr().out


def test_between_the_choice_of_a_checkpoint_and_the_first_file_nobody_else_writes(run, monkeypatch):
    monkeypatch.setattr(run_directory, "PATIENCE_SECONDS", 0.2)
    (run / ".lock").touch()  # as every run has that was ever opened
    first = RunDirectory(run)
    first.find_start("auto")
    with pytest.raises(UserError, match="is being written by another process; stop it"):
        RunDirectory(run).find_start("auto")
    first.close()
    assert RunDirectory(run).find_start("auto").step == 8


def test_a_new_launch_is_not_preempted_yet(run):
    directory = RunDirectory(run)
    directory.preempted.touch()
    directory.open(8, RECIPE)
    assert not directory.preempted.exists()


@pytest.mark.parametrize(
    "killed_before", ["lock", "recipe", "whole recipe", "metrics", "whole metrics"]
)
def test_a_launch_that_was_killed_while_it_opened_can_be_repeated(tmp_path, killed_before):
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    if killed_before != "lock":
        (directory.path / ".lock").touch()
    if killed_before == "whole recipe":
        (directory.path / ".recipe.yaml.123.abc").write_text(RECIPE[:3])
    if "metrics" in killed_before:
        directory.recipe.write_text(RECIPE)
    if killed_before == "whole metrics":
        (directory.path / ".metrics.jsonl.123.abc").touch()
    again = RunDirectory(directory.path)
    assert again.find_start("auto").step == 0
    assert again.open(0, RECIPE) == []
    names = {path.name for path in directory.path.iterdir()}
    assert names == {".lock", "recipe.yaml", "metrics.jsonl", "launches.jsonl"}


@pytest.mark.parametrize(
    "name", [".DS_Store", "train.log", ".nfs0000000012ab", "slurm-123.out", "lost+found", "run.sh"]
)
def test_what_belongs_to_nobody_is_in_nobodys_way(tmp_path, name):
    (tmp_path / name).write_text("")
    assert RunDirectory(tmp_path).find_start("never").step == 0
    assert RunDirectory(tmp_path).open(0, RECIPE) == []
    assert (tmp_path / name).exists()


def test_files_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds files of something else \(thesis.tex\)"):
        RunDirectory(tmp_path).find_start("auto")
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(tmp_path / "thesis.tex").find_start("auto")
    (tmp_path / "checkout" / ".git").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds files of something else \(.git\)"):
        RunDirectory(tmp_path / "checkout").find_start("auto")


def test_a_metrics_file_that_lost_lines_is_told_and_the_others_are_kept(run):
    add_checkpoint(run, 9, metrics_lines=9)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert RunDirectory(run).find_start("auto").note.endswith("going on from its step 9.")
    del lines[2]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "metrics.jsonl has lost 1 lines." in RunDirectory(run).find_start("auto").note
    lines[4] = "\x00" * len(lines[4])
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    directory = RunDirectory(run)
    note = directory.find_start("auto").note
    assert "metrics.jsonl has lost 2 lines (line 5 cannot be read)." in note
    assert [line["step"] for line in directory.open(9, RECIPE)] == [0, 1, 3, 4, 6, 7, 8]


@pytest.mark.parametrize("content", ["", "- a list\n", "just words", "a: [", "\x00"])
def test_a_damaged_recipe_is_named(run, content):
    (run / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=r"recipe.yaml cannot be read"):
        run_directory.saved_recipe(run)


def test_a_directory_that_vanished_is_made_again_with_all_that_is_left(run):
    directory = RunDirectory(run)
    history = directory.open(8, RECIPE)
    log = MetricsLog(directory.metrics, len(history))
    directory.check_still_there()
    moved = run.rename(run.with_name("moved"))
    with pytest.raises(UserError, match="was removed or moved while it was written"):
        directory.check_still_there()
    log.write({"step": 8})
    directory.restore(RECIPE)
    log.make_durable()
    add_checkpoint(run, 9, metrics_lines=log.num_lines)
    log.write({"step": 9})
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [*range(10)]
    with pytest.raises(UserError, match="is being written by another process"):
        RunDirectory(run).open(9, RECIPE)  # still ours alone
    directory.close()
    again = RunDirectory(run)
    assert again.find_start("auto").note == f"{run} exists: going on from its step 9."
    assert (moved / "checkpoints" / "step_00000008").is_dir()


def test_small_files_reach_the_disk_before_the_checkpoint_that_counts_on_them(run, monkeypatch):
    """What a power failure would leave: the order of fsyncs and renames."""
    events = []
    monkeypatch.setattr(run_directory.atomic, "flush", lambda path: events.append(path.name))
    directory = RunDirectory(run)
    log = MetricsLog(directory.metrics, len(directory.open(8, RECIPE)))
    assert [name.split(".")[1] for name in events if name.startswith(".")] == ["recipe", "metrics"]
    assert events.count("run") == 2  # the directory, after either rename
    synced = []
    monkeypatch.setattr("os.fsync", synced.append)
    log.make_durable()
    assert synced == [log._file.fileno()]


def test_launches_are_recorded_and_those_that_were_left_are_no_resumes(run):
    for step in (0, 4, 8, 8, 4, 6):
        directory = RunDirectory(run)
        directory.open(step, RECIPE)
        directory.close()
    (run / "launches.jsonl").open("a").write('{"step": 7, "da')  # torn
    assert run_directory.read_resumes(run) == [4, 6]
    directory = RunDirectory(run)
    directory.open(8, RECIPE)  # in a line of its own
    directory.close()
    assert run_directory.read_resumes(run) == [4, 6, 8]
    assert run_directory.read_resumes(run / "nowhere") == []
