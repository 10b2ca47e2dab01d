"""What a mistake, a full disk, Ctrl-C and a closed pipe look like on the screen."""

import errno
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from gpt2repro import UserError
from gpt2repro.system import command_line


def raising(error: BaseException):
    def verb(argv: list[str]) -> int:
        raise error

    return verb


def test_a_mistake_is_one_line_and_status_2(capsys):
    assert command_line.run("prog", raising(UserError("first\n   second   third")), []) == 2
    assert capsys.readouterr().err == "prog: error: first second third\n"


@pytest.mark.parametrize("number", command_line.FULL_DISK)
def test_a_full_disk_is_no_bug_of_ours(number, capsys):
    error = OSError(number, os.strerror(number), "runs/a/metrics.jsonl")
    assert command_line.run("prog", raising(error), []) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "metrics.jsonl" in said
    with pytest.raises(FileNotFoundError):
        command_line.run("prog", raising(FileNotFoundError(errno.ENOENT, "no such file")), [])


def test_what_a_verb_returns_is_the_status():
    assert command_line.run("prog", lambda argv: len(argv), ["a", "b", "c"]) == 3


def test_ctrl_c_has_no_traceback(capsys):
    assert command_line.run("prog", raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err.strip() == "prog: interrupted"


def test_bugs_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        command_line.run("prog", raising(ZeroDivisionError()), [])


def test_rank_0_speaks_first(monkeypatch, capsys):
    said_before = []
    monkeypatch.setattr(
        command_line.time, "sleep", lambda _: said_before.append(capsys.readouterr().err)
    )
    for rank, expected in (("0", []), ("1", [""])):
        monkeypatch.setenv("RANK", rank)
        assert command_line.run("prog", raising(UserError("no")), []) == 2
        assert said_before == expected and capsys.readouterr().err == "prog: error: no\n"


def test_a_full_disk_costs_the_lines_of_its_time_alone(tmp_path, monkeypatch):
    with (tmp_path / "log").open("w") as file:
        stream = command_line.LastingStream(file)

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(stream, "_stream", mock.Mock(write=full, fileno=file.fileno))
            assert stream.write("lost") == 4
        stream.write("there again")
    assert (tmp_path / "log").read_text() == "there again"


def test_a_reader_that_has_seen_enough_is_no_error():
    """`gpt2repro ... | head -1` ends quietly."""
    code = (
        "import sys; from gpt2repro.system import command_line\n"
        "def verb(argv):\n"
        "    for _ in range(10**6): print('line')\n"
        "sys.exit(command_line.run('prog', verb, []))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.wait(30) == 0 and process.stderr.read() == ""


def in_a_shell(verb: str, end: str, outlives_readers: bool = False) -> subprocess.CompletedProcess:
    """A command line whose output goes where `end` says."""
    code = (
        "import sys; from gpt2repro.system import command_line\n"
        f"def verb(argv): {verb}\n"
        f"sys.exit(command_line.run('prog', verb, [], outlives_readers={outlives_readers}))"
    )
    command = f'"{sys.executable}" -c "$0" {end}'
    shell = ["bash", "-o", "pipefail", "-c", command, code]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    return subprocess.run(
        shell, env=buffered, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_the_last_words_may_find_no_room_or_no_reader():
    """They are written at the end, when the verb has its status."""
    full = in_a_shell("print('line')", "> /dev/full")
    assert full.returncode == 2 and full.stderr.startswith("prog: error: [Errno 28]")
    assert full.stderr.count("\n") == 1
    much = in_a_shell("print('line' * 10**6)", "> /dev/full")
    assert much.returncode == 2 and much.stderr.count("\n") == 1, much.stderr
    done = in_a_shell("import time; time.sleep(0.5); print('line'); return 1", "| true")
    assert (done.returncode, done.stderr) == (1, "")


def test_an_exit_handler_that_hangs_can_be_skipped():
    hangs = "import atexit, time; atexit.register(time.sleep, 600); print('said')"
    done = in_a_shell(f"{hangs}; command_line.end_without_exit_handlers(); return 75", "")
    assert (done.returncode, done.stdout, done.stderr) == (75, "said\n", "")
    crashed = in_a_shell(f"{hangs}; command_line.end_without_exit_handlers(); 1 / 0", "")
    assert crashed.returncode == 1 and crashed.stderr.endswith("division by zero\n")


@pytest.mark.parametrize("outlives_readers", [False, True])
@pytest.mark.parametrize("end", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_may_be_closed_from_the_start(end, outlives_readers):
    verb = "print('line', sys.stdout.isatty()); print('line', file=sys.stderr); return 3"
    assert in_a_shell(verb, end, outlives_readers).returncode == 3


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_training_outlives_its_reader(stream):
    """`train_accelerate.py ... | head -1` trains to the end, and its status is the training's."""
    code = (
        "import pathlib, sys; from gpt2repro.system import command_line\n"
        "def train(argv):\n"
        f"    for step in range(10**5): print('line', file=sys.{stream})\n"
        "    pathlib.Path(argv[0]).write_text(str(step)); return 0\n"
        "sys.exit(command_line.run('prog', train, sys.argv[1:], outlives_readers=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "/dev/stdout" if stream == "stderr" else "/dev/stderr"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    read, other = getattr(process, stream), process.stdout if stream == "stderr" else process.stderr
    assert read.readline() == "line\n"
    read.close()
    assert process.wait(30) == 0 and other.read() == "99999"


def test_letters_that_a_terminal_lacks_are_spelled_out():
    code = (
        "import sys; from gpt2repro.system import command_line\n"
        "sys.exit(command_line.run('prog', lambda argv: print('naïve 猫'), []))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "na\\xefve \\u732b\n"), done.stderr


def test_hyphens_in_names_are_underscores_and_values_are_left_alone():
    assert command_line.underscored("--top-k=a-b") == "--top_k=a-b"
    assert [command_line.underscored(word) for word in ("--a-b-c", "a-b", "-k", "-")] == [
        "--a_b_c",
        "a-b",
        "-k",
        "-",
    ]


def test_seconds_are_counted_on_a_terminal_and_nowhere_else(capsys, monkeypatch):
    def told(in_logs: bool = False) -> str:
        with command_line.underway("Loading ...", in_logs=in_logs):
            time.sleep(0.3)
        return capsys.readouterr().out

    monkeypatch.setattr(command_line, "SIGN_OF_LIFE_SECONDS", 0.05)
    assert told() == "" and told(in_logs=True) == "Loading ...\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    shown = told()
    assert re.fullmatch(r"Loading \.\.\.\n(  0 s\r)+ {8}\r", shown), shown
    with command_line.bar_is_shown():
        assert told() == "Loading ...\n" + " " * 8 + "\r"
    monkeypatch.setenv("RANK", "1")
    assert told(in_logs=True) == ""


def test_what_fails_underway_fails_as_ever(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with pytest.raises(KeyError), command_line.underway("Loading ..."):
        raise KeyError("x")
    assert not any(thread.name == "seconds" for thread in threading.enumerate())
