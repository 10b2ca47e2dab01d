"""Whatever is typed after a verb: arguments, one line that says what is wrong, or the help."""

import contextlib
import importlib
import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2repro import UserError
from gpt2repro.__main__ import VERBS
from gpt2repro.system.command_line import in_one_line

values = (
    st.integers().map(str)
    | st.floats().map(str)
    | st.text(max_size=9)
    | st.sampled_from(["demo", "-1", "1", "2", "0.5", "cpu", "float32", "gpt2", "val,piqa"])
    | st.sampled_from(["9" * 5000, "1" + "0" * 30, "²", "٣", "1_0", "nan", "-inf", "1e400"])
    | st.sampled_from(["a" * 300, "a/" * 3000, "~", "~nobody/x", "\0", "\udcff", "[" * 5000, "%s"])
)


def parse(verb: str, argv: list[str]) -> tuple[object, str]:
    """What `_parse` of the verb makes of `argv`, or what it says."""
    module = importlib.import_module(f"gpt2repro.commands.{VERBS[verb][0]}")
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            return module._parse(argv), shown.getvalue()
        except SystemExit as leave:
            assert leave.code == 0
            return None, shown.getvalue()
        except UserError as error:
            status, said = in_one_line(error)
            assert status == 2 and "\n" not in said and len(said) < 4000, said
            return None, said


@pytest.mark.parametrize("verb", VERBS)
@given(data=st.data())
def test_any_arguments_of_a_verb(verb, data):
    _, shown = parse(verb, ["--help"])
    options = st.sampled_from(sorted(set(re.findall(r"--[a-z][a-z0-9_]+", shown))))
    pairs = st.tuples(options, values)
    words = pairs.map(list) | pairs.map("=".join).map(lambda word: [word])
    words |= values.map(lambda word: [word]) | st.sampled_from([["--"], ["-h"], ["--=x"], ["-"]])
    argv = [word for part in data.draw(st.lists(words, max_size=5)) for word in part]
    required = {"compare-logits": "--reference", "export": "--output", "push": "--repo"}
    required["tokenize"] = "--output"
    if data.draw(st.booleans()):  # else most would be refused for what they lack
        argv += ["--model=m", f"{required.get(verb, '--model')}=r"]
    parse(verb, argv)


OF_A_RECIPE = "recipe exp_name output_dir resume init_from dataset_name data_files tokenizer_name"
OF_A_RECIPE += " token_cache_dir unit_digests_dir eval_tasks_dir core_dir hellaswag_file"
# What each verb cannot do without, and its options that name files or what the Hub has.
PLACES = {
    "average": ("m n --output=o", "output tokenizer"),
    "compare-logits": ("--reference=r", "reference model tokenizer json"),
    "doctor": ("", OF_A_RECIPE),
    "evaluate": (
        "--model=m",
        "model baseline tokenizer output dataset_name data_files hellaswag_file tasks_dir"
        " core_dir rows",
    ),
    "export": ("--model=m --output=o", "model output tokenizer"),
    "generate": ("--model=m", "model tokenizer"),
    "plots": ("m", "output compare tokenizer"),
    "push": ("--model=m --repo=me/m", "model evaluation"),
    "stream-stats": ("", f"output {OF_A_RECIPE}"),
    "tokenize": ("--output=o", f"output {OF_A_RECIPE}"),
}


@pytest.mark.parametrize("verb", PLACES)
def test_every_name_of_a_file_may_be_in_the_home_and_must_be_possible(verb, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    needed, options = PLACES[verb]
    for option in options.split():
        for name in ("a" * 300, "a/" * 3000, "a\0b"):
            _, said = parse(verb, [*needed.split(), f"--{option}={name}"])
            knob = option.partition("=")[0]
            assert re.search(rf"--{knob}\b", said), said
        if option not in ("recipe", "exp_name"):  # which is no path, and there is none
            parsed, said = parse(verb, [*needed.split(), f"--{option}=~/x.json"])
            # Of a directory that has to be there, the refusal says where it was looked for.
            found = repr(parsed) if parsed else said
            assert "/home/me/x.json" in found and "~" not in found, said


def test_the_first_word_of_plots_is_such_a_name_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert "/home/me/x" in repr(parse("plots", ["~/x"])[0])
    assert "too long" in parse("plots", ["a" * 300])[1]
