"""The published loss is shown where it compares, and nowhere else."""

import numpy as np
import pytest

from gpt2repro.evaluation.estimates import Estimate, mean
from gpt2repro.evaluation.published import PUBLISHED, VALIDATION_TEXT, published_loss
from gpt2repro.evaluation.tables import Table
from gpt2repro.recipe import load_recipe


def test_the_reproduction_compares_with_the_published_loss():
    for name in ("gpt2", "gpt2-xl", "gpt2-muon"):
        assert published_loss(load_recipe(["--recipe", name]).model_dump())[1] == 3.2924


@pytest.mark.parametrize("field", [*VALIDATION_TEXT, "tokenizer_name"])
def test_another_text_or_tokenizer_does_not(field):
    recipe = load_recipe([]).model_dump()
    assert published_loss(recipe | {field: "another"}) is None
    assert published_loss({}) is None


@pytest.mark.parametrize("num_rows", [200, 10_042])
def test_a_file_of_other_rows_does_not(num_rows):
    found = {name: Estimate(0.3, np.zeros(num_rows)) for name in ("hellaswag/acc", "val/loss")}
    shown = Table(["gpt2"], [found], published=PUBLISHED["gpt2"]).as_json()
    expected = {"hellaswag/acc", "val/loss"} if num_rows == 10_042 else {"val/loss"}
    assert shown["published_not_computed"].keys() == expected, "a loss has its text to decide"


def test_an_error_that_is_not_known_is_null_in_json_and_large_figures_are_short():
    table = Table(["one row"], [{"a": mean([1.0]), "ppl": Estimate(50257.123, np.zeros(2))}])
    assert table.as_json()["results"]["a"] == {"value": 1.0, "stderr": None}
    assert table.cells()[2][1].startswith("50257 ")
