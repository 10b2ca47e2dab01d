"""Command lines: one line for a mistake, documented exit statuses, hyphens or underscores."""

import errno
import importlib
import os
import subprocess
import sys

import pytest

from gpt2repro import UserError, __version__
from gpt2repro.__main__ import VERBS, main
from gpt2repro.commands import cli


def raising(error: BaseException):
    def verb(argv: list[str]) -> int:
        raise error

    return verb


def test_a_mistake_is_one_line_and_status_2(capsys):
    assert cli.run("prog", raising(UserError("first\n   second   third")), []) == 2
    assert capsys.readouterr().err == "prog: error: first second third\n"


@pytest.mark.parametrize("number", cli.FULL_DISK)
def test_a_full_disk_is_no_bug_of_ours(number, capsys):
    error = OSError(number, os.strerror(number), "runs/a/metrics.jsonl")
    assert cli.run("prog", raising(error), []) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "metrics.jsonl" in said
    with pytest.raises(FileNotFoundError):
        cli.run("prog", raising(FileNotFoundError(errno.ENOENT, "no such file")), [])


def test_what_a_verb_returns_is_the_status():
    assert cli.run("prog", lambda argv: len(argv), ["a", "b", "c"]) == 3


def test_ctrl_c_has_no_traceback(capsys):
    assert cli.run("prog", raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err.strip() == "prog: interrupted"


def test_bugs_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        cli.run("prog", raising(ZeroDivisionError()), [])


def test_rank_0_speaks_first(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    for rank, waits in (("0", 0), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        assert cli.run("prog", raising(UserError("no")), []) == 2
        assert len(waited) == waits


def test_a_reader_that_has_seen_enough_is_no_error():
    """`gpt2repro ... | head -1` ends quietly."""
    code = (
        "import sys; from gpt2repro.commands import cli\n"
        "def verb(argv):\n"
        "    for _ in range(10**6): print('line')\n"
        "sys.exit(cli.run('prog', verb, []))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.wait(30) == 0 and process.stderr.read() == ""


@pytest.fixture
def parser() -> cli.OneLineParser:
    parser = cli.OneLineParser(prog="gpt2repro verb")
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--prompt")
    return parser


def test_hyphens_and_underscores_mean_the_same(parser):
    for argv in (["--top_k", "5"], ["--top-k", "5"], ["--top-k=5"], ["--top_k=5"]):
        assert parser.parse_args(argv).top_k == 5
    assert parser.parse_args(["--prompt", "a-b --c-d"]).prompt == "a-b --c-d"


@pytest.mark.parametrize(
    "argv", [["--top_k", "many"], ["--top"], ["--unknown", "1"], ["--prompt"], ["stray"]]
)
def test_bad_arguments_raise_one_line_that_names_the_help(parser, argv):
    with pytest.raises(UserError, match=r"\(see `gpt2repro verb --help`\)$") as error:
        parser.parse_args(argv)
    assert "\n" not in str(error.value)


def run_main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpt2repro", *arguments])
    with pytest.raises(SystemExit) as leave:
        main()
    return leave.value.code


def test_the_verbs_are_listed(monkeypatch, capsys):
    assert run_main(monkeypatch) == 2
    assert run_main(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)
    assert run_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"gpt2repro {__version__}\n"


def test_an_unknown_verb_is_refused(monkeypatch, capsys):
    assert run_main(monkeypatch, "trian") == 2
    assert "no verb 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_refuses_nonsense_in_one_line(verb, capsys):
    module = importlib.import_module(f"gpt2repro.commands.{VERBS[verb][0]}")
    with pytest.raises(SystemExit) as leave:
        module.main(["--help"])
    assert leave.value.code == 0 and "usage" in capsys.readouterr().out
    assert cli.run(f"gpt2repro {verb}", module.main, ["--no_such_option", "1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("no_such_option" in said or "are required" in said)
