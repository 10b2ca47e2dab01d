"""Whatever a recipe file or a command line holds: a recipe, or one line that says what is wrong."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gpt2repro import UserError
from gpt2repro.recipe import load_recipe
from gpt2repro.recipe_fields import FIELDS, Recipe, alternatives
from gpt2repro.system.command_line import in_one_line

NAMES = list(FIELDS)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "some.yaml"


def loaded(argv: list[str]) -> Recipe | None:
    """None where it is refused, as it should be: any other error fails the test."""
    try:
        return load_recipe(argv)
    except UserError as error:
        status, said = in_one_line(error)
        assert status == 2 and "\n" not in said and len(said) < 4000, said
        return None


# --- Anything -------------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 7).map(lambda power: -(10 ** (3**power)))
    | st.integers(1, 13).map(lambda power: 2 ** (2**power))
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["a" * 300, "²", "1_0", "٣", "~", "~nobody/x", "\0", "null", "auto"])
    | st.sampled_from(["1e400", "9" * 5000, "0x" + "f" * 5000, "[" * 5000])
    | st.dates()
    | st.datetimes()
    | st.binary(max_size=9)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        | st.sets(st.integers(), max_size=3)
    ),
    max_leaves=8,
)
keys = st.sampled_from(NAMES) | st.text(max_size=9) | st.integers() | st.floats() | st.none()


@given(mapping=st.dictionaries(keys, values, max_size=5))
def test_any_values_for_any_fields(file, mapping):
    file.write_text(yaml.safe_dump(mapping, allow_unicode=True), encoding="utf-8")
    loaded(["--recipe", str(file)])


# What YAML makes of words that people type, and what only its specification knows.
SPELLED = """seed max_lr exp_name data_files compile : : : , , - - ? [ [ ] { { } " ' | > & &a *a <<
    <<: ! !!int !!bool !!float !!null !!set !!binary !!timestamp !!str !!map !!seq !!merge !x # % @
    ` = .inf -.inf .nan ~ null yes no on 0x 0b1 0o7 1:30 2024-01-01 2024-13-45 1_000 1e3 ---"""
words = st.sampled_from([*SPELLED.split(), "...", "\ufeff"])


@given(
    content=st.lists(words | st.sampled_from(["\n", "\n", " ", "  "]) | st.text(max_size=3)).map(
        lambda parts: " ".join(parts).encode("utf-8", "surrogatepass")
    )
    | st.text().map(str.encode)
    | st.binary()
)
def test_any_text_and_any_bytes(file, content):
    file.write_bytes(content)
    loaded(["--recipe", str(file)])


typed = (
    st.sampled_from([*(f"--{name}" for name in NAMES), "--recipe", "demo", "--", "-x", "-1"])
    | words
    | scalars.map(str)
)


@given(argv=st.lists(typed, max_size=6), glue=st.sampled_from(["", "="]))
def test_any_command_line(argv, glue):
    if glue and len(argv) > 1:
        argv = [glue.join(argv[:2]), *argv[2:]]
    loaded(argv)


# --- What is valid --------------------------------------------------------------------------------


def alike(name: str) -> Iterator[st.SearchStrategy[Any]]:
    """Values that the field `name` mostly takes."""
    for kind in alternatives(FIELDS[name].annotation):
        if get_origin(kind) is Literal:
            yield st.sampled_from(get_args(kind))
        elif get_origin(kind) is list:
            (item,) = alternatives(get_args(kind)[0])
            texts = st.text(min_size=1)
            yield st.lists(st.sampled_from(get_args(item)) if get_args(item) else texts)
        elif kind is str:
            yield st.text(min_size=1)
        elif kind is float:
            yield st.floats(0, 1)
        else:
            yield {int: st.integers(0, 99), bool: st.booleans()}.get(kind, st.none())


likely = st.sampled_from([*FIELDS]).flatmap(
    lambda name: st.tuples(st.just(name), st.one_of(*alike(name)))
)


@given(fields=st.lists(likely, max_size=4))
def test_a_saved_recipe_is_the_recipe(file, fields):
    file.write_text(yaml.safe_dump(dict(fields)), encoding="utf-8")
    if (recipe := loaded(["--recipe", str(file)])) is None:
        return
    file.write_text(recipe.as_yaml(), encoding="utf-8")
    assert load_recipe(["--recipe", str(file)]) == recipe
    resolved = recipe.resolved(num_steps=7, micro_batch_size=1, num_validation_units=2)
    file.write_text(resolved.as_yaml(), encoding="utf-8")
    assert load_recipe(["--recipe", str(file)]).model_dump() == resolved.model_dump()
