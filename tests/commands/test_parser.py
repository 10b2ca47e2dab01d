"""The verbs' arguments: hyphens or underscores, one line for a mistake."""

import importlib
import sys

import pytest

from gpt2repro import UserError, __version__
from gpt2repro.__main__ import VERBS, main
from gpt2repro.commands.parser import OneLineParser
from gpt2repro.system import command_line


@pytest.fixture
def parser() -> OneLineParser:
    parser = OneLineParser(prog="gpt2repro verb")
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
    assert command_line.run(f"gpt2repro {verb}", module.main, ["--no_such_option", "1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("no_such_option" in said or "are required" in said)
