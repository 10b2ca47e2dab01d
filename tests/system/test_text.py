"""Text from elsewhere says what it says and does nothing to a terminal."""

import logging
import os

import pytest

from gpt2repro import UserError
from gpt2repro.system import command_line
from gpt2repro.system.text import count_of, folded, in_short, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("\x07\x00\x7f\x9b", "\\x07\\x00\\x7f\\x9b"),
        ("over\rwritten", "over\\rwritten"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\u2066isolated\u2069", "\\u2066isolated\\u2069"),  # as in "Trojan Source"
        ("another\u2028line\u2029", "another\\u2028line\\u2029"),
        (os.fsdecode(b"a\xff"), "a\\udcff"),
        ("lines\r\nand\ttabs\n", "lines\r\nand\ttabs\n"),
        ("naïve 中文 😀 👩\u200d🔬 \u200fשלום", "naïve 中文 😀 👩\u200d🔬 \u200fשלום"),
    ],
)
def test_controls_are_spelled_out_and_text_is_left(text, shown):
    assert printable(text) == shown


def test_a_file_name_in_an_error_does_nothing_to_the_terminal(capsys):
    def verb(_):
        raise UserError("runs holds \x1b]0;title\x07, which does not belong")

    assert command_line.run("prog", verb, []) == 2
    said = capsys.readouterr().err
    assert said == "prog: error: runs holds \\x1b]0;title\\x07, which does not belong\n"


def test_what_a_library_logs_does_nothing_to_the_terminal(capsys):
    def verb(_):
        handler, make = logging.StreamHandler(), logging.getLogRecordFactory()

        def log(line, told, error=None):
            info = error and (type(error), error, None)
            handler.handle(make("a", logging.WARNING, "a.py", 1, line, (told,), info))

        log("model of type `%s`", "evil\x1b[2J", ValueError("evil\x1b[2J"))
        log("a bad line %d", "x")
        log("another %(key)s", {"another": "key"})
        return 0

    assert command_line.run("prog", verb, []) == 0
    said = capsys.readouterr().err
    assert said.startswith("model of type `evil\\x1b[2J`\nValueError: evil\\x1b[2J\n")
    assert "a bad line %d" in said and "another %(key)s" in said and "\x1b" not in said


def test_lines_fit_a_terminal_and_are_left_alone_in_a_file(monkeypatch):
    line = "       run  " + "some words " * 20
    assert folded(line) == line
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    lines = folded(line, indent=12).split("\n")
    assert len(lines) > 2 and all(len(each) < 80 for each in lines)
    assert lines[0].startswith("       run  some") and lines[1].startswith(" " * 12 + "some")
    assert " ".join(" ".join(lines).split()) == " ".join(line.split())


@pytest.mark.parametrize(
    ("number", "thing", "said"),
    [
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (4, "micro-batch", "4 micro-batches"),
        (1024, "row", "1,024 rows"),
    ],
)
def test_counts_are_spoken(number, thing, said):
    assert count_of(number, thing) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "0"),
        (40_960, "40,960"),
        (1_228_800, "1.2 M"),
        (124_439_808, "124.4 M"),
        (999_949_999, "999.9 M"),
        (999_950_000, "1.0 B"),
        (10**10, "10.0 B"),
        (15 * 10**11, "1.5 T"),
    ],
)
def test_small_numbers_are_said_as_they_are(number, said):
    assert in_short(number) == said
