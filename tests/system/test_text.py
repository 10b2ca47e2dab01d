"""Text from elsewhere says what it says and does nothing to a terminal."""

import os

import pytest

from gpt2repro import UserError
from gpt2repro.system import command_line
from gpt2repro.system.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("\x07\x00\x7f\x9b", "\\x07\\x00\\x7f\\x9b"),
        ("over\rwritten", "over\\rwritten"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
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
