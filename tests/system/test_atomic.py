"""Whole or not at all, whoever is interrupted where."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from power_failure import Disk

from gpt2repro.system import atomic


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_takes_its_place_when_it_is_written(tmp_path, durable):
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        with atomic.new_file(path, durable=durable) as scratch:
            assert scratch.parent == tmp_path and scratch != path
            scratch.write_text(text)
            assert text == "first" or path.read_text() == "first"
        assert path.read_text() == text and names(tmp_path) == ["a.txt"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), atomic.new_file(path) as scratch:
        scratch.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and names(tmp_path) == ["a.txt"]


def test_a_rehearsal_meets_what_the_writer_would_and_leaves_nothing(tmp_path):
    atomic.rehearse(tmp_path / "a.txt")
    atomic.rehearse(tmp_path / ("é" * 125 + ".json"))  # 255 bytes, the longest name there is
    with atomic.new_file(tmp_path / ("b" * 255)) as scratch:
        scratch.write_text("whole")
    assert names(tmp_path) == ["b" * 255] and not atomic.leftovers(tmp_path / "a.txt")
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(OSError, match="not a regular file") as raised:
            atomic.rehearse(path)
        assert raised.value.filename == str(path)
    with pytest.raises(OSError, match="No such file") as raised:
        atomic.rehearse(tmp_path / "nowhere" / "a.txt")
    assert raised.value.filename == str(tmp_path / "nowhere" / "a.txt")


def test_a_full_disk_names_the_file_that_was_meant(tmp_path):
    with pytest.raises(OSError, match="No space left") as raised:  # noqa: SIM117
        with atomic.new_file(tmp_path / "recipe.yaml"):
            Path("/dev/full").write_text("all of it")
    assert raised.value.filename == str(tmp_path / "recipe.yaml")


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with atomic.new_file(path) as one, atomic.new_file(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and names(tmp_path) == ["a.txt"]


def test_a_directory_replaces_the_one_before(tmp_path):
    path = tmp_path / "final"
    for text in ("first", "second"):
        scratch = atomic.partial(path)
        (scratch / "deep").mkdir()
        (scratch / "deep" / "file").write_text(text)
        atomic.move_into_place(scratch, path)
        assert (path / "deep" / "file").read_text() == text
        assert names(tmp_path) == ["final"]


def test_a_directory_above_that_cannot_be_listed_takes_nothing_back(tmp_path, monkeypatch):
    """As /home may be, to which only its owner's directories are open."""
    flush = atomic.flush

    def refuse(path):
        if path == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        flush(path)

    monkeypatch.setattr(atomic, "flush", refuse)
    (tmp_path / "me").mkdir()
    scratch = atomic.partial(tmp_path / "me" / "final")
    atomic.move_into_place(scratch, tmp_path / "me" / "final")
    assert names(tmp_path / "me") == ["final"]


def test_what_was_replaced_may_stay_when_it_cannot_be_removed(tmp_path, monkeypatch):
    path = tmp_path / "final"
    path.mkdir()
    scratch = atomic.partial(path)
    (scratch / "file").write_text("second")

    def busy(directory):
        if directory.is_dir():
            raise OSError("busy")

    monkeypatch.setattr(atomic, "remove", busy)
    atomic.move_into_place(scratch, path)
    assert (path / "file").read_text() == "second"
    assert names(tmp_path) == [".final.previous", "final"]


@pytest.mark.parametrize("link", ["final", ".final.partial", ".final.previous"])
def test_of_a_link_to_a_directory_the_link_goes(tmp_path, link):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("somebody's")
    (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    scratch = atomic.partial(tmp_path / "final")
    (scratch / "file").write_text("ours")
    atomic.move_into_place(scratch, tmp_path / "final")
    assert (tmp_path / "elsewhere" / "file").read_text() == "somebody's"
    assert (tmp_path / "final" / "file").read_text() == "ours"
    assert names(tmp_path) == ["elsewhere", "final"]


@pytest.mark.parametrize("instant", ["flush", "rename"])
def test_one_whole_directory_exists_at_every_instant(tmp_path, monkeypatch, instant):
    path = tmp_path / "final"
    path.mkdir()
    (path / "file").write_text("before")
    scratch = atomic.partial(path)
    (scratch / "file").write_text("after")
    renamed = []

    def die(*_):
        raise KeyboardInterrupt

    rename = type(path).rename

    def rename_once(self, target):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(rename(self, target))

    if instant == "flush":
        monkeypatch.setattr(atomic, "flush", die)
    else:
        monkeypatch.setattr(type(path), "rename", rename_once)
    with pytest.raises(KeyboardInterrupt):
        atomic.move_into_place(scratch, path)
    whole = [each for each in tmp_path.iterdir() if (each / "file").read_text() == "before"]
    assert len(whole) == 1 and (scratch / "file").read_text() == "after"


def test_what_a_killed_writer_left_is_removed(tmp_path):
    scratch = atomic.partial(tmp_path / "final")
    (scratch / "half").write_text("")
    assert atomic.partial(tmp_path / "final") == scratch and not names(scratch)


def test_two_writers_of_a_directory_do_not_meet(tmp_path, capsys):
    path = tmp_path / "final"
    with atomic.own_partial(path) as one:
        (one / "one").touch()
        with atomic.own_partial(path) as other:
            (other / "other").touch()
            atomic.move_into_place(other, path)
        assert names(one) == ["one"] and names(path) == ["other"]
        assert f"{one} stays: somebody still writes it" in capsys.readouterr().err
        atomic.move_into_place(one, path)
    assert names(path) == ["one"] and names(tmp_path) == ["final"]


def test_a_name_that_begins_alike_is_another(tmp_path):
    others = atomic.partial(tmp_path / "m.v2")
    with atomic.own_partial(tmp_path / "m"):
        assert others.is_dir()


def test_what_a_killed_writer_of_its_own_left_is_removed_or_told(tmp_path, capsys, monkeypatch):
    code = "import os, sys; from pathlib import Path; from gpt2repro.system import atomic\n"
    code += "with atomic.own_partial(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    path = tmp_path / "final"
    for _ in range(2):  # the second finds what the first left
        assert subprocess.run([sys.executable, "-c", code, path]).returncode == -9
    (left,) = names(tmp_path)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        with atomic.own_partial(path) as scratch:
            assert names(tmp_path) == sorted([left, scratch.name])
    assert f"{left} stays" in capsys.readouterr().err
    with atomic.own_partial(path) as scratch:
        assert names(tmp_path) == [scratch.name] and not names(scratch)
    assert capsys.readouterr().err == "" and names(tmp_path) == []


# --- Power failures -------------------------------------------------------------------------------


def test_a_durable_file_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    disk, path = Disk(monkeypatch), tmp_path / "a.txt"
    with atomic.new_file(path, durable=True) as scratch:
        scratch.write_text("all of it")
    assert disk.lost(path) == set()


def test_a_directory_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """With all that is in it; the one before goes when the new one has the name there."""
    disk, path = Disk(monkeypatch), tmp_path / "new" / "final"
    for text in ("first", "second"):
        scratch = atomic.partial(path)
        (scratch / "deep").mkdir()
        (scratch / "deep" / "file").write_text(text)
        (scratch / "file").write_text(text)
        atomic.move_into_place(scratch, path)
        assert disk.lost(path) == set()
    assert disk.names[path.parent] == {"final", ".final.previous"}
    assert disk.names[tmp_path] == {"new"}
    assert names(path.parent) == ["final"]


def test_a_mode_that_the_file_system_decides_is_left_alone(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    (tmp_path / "a").touch()
    monkeypatch.setattr(Path, "chmod", refused)
    atomic.let_umask_decide(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_a_file_system_that_flushes_no_directory_is_written_all_the_same(tmp_path, monkeypatch):
    fsync = os.fsync

    def of_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    scratch = atomic.partial(tmp_path / "a")
    (scratch / "file").write_text("text")
    atomic.move_into_place(scratch, tmp_path / "a")
    assert (tmp_path / "a" / "file").read_text() == "text"
    monkeypatch.setattr(os, "fsync", lambda _: os.close(-1))  # EBADF: a fault of any other kind
    with pytest.raises(OSError, match="Bad file descriptor"):
        atomic.flush(tmp_path)


@pytest.mark.parametrize("copies", ["there", "previous"])
def test_a_directory_that_cannot_have_its_name_leaves_the_earlier_one_there(
    tmp_path, monkeypatch, copies
):
    """Also where a kill had left it under another name: it is the only copy."""
    path, rename = tmp_path / "final", Path.rename
    earlier = path if copies == "there" else tmp_path / ".final.previous"
    earlier.mkdir()
    (earlier / "a").write_text("before")
    scratch = atomic.partial(path)

    def fails(self, place):
        if self == scratch:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return rename(self, place)

    monkeypatch.setattr(Path, "rename", fails)
    for _ in range(2):
        with pytest.raises(OSError, match="quota"):
            atomic.move_into_place(scratch, path)
        assert (path / "a").read_text() == "before"
