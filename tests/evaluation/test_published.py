"""The published loss is shown where it compares, and nowhere else."""

import pytest

from gpt2repro.evaluation.published import VALIDATION_TEXT, published_loss
from gpt2repro.recipe import load_recipe


def test_the_reproduction_compares_with_the_published_loss():
    for name in ("gpt2", "gpt2-xl", "gpt2-muon"):
        assert published_loss(load_recipe(["--recipe", name]).model_dump())[1] == 3.2924


@pytest.mark.parametrize("field", [*VALIDATION_TEXT, "tokenizer_name"])
def test_another_text_or_tokenizer_does_not(field):
    recipe = load_recipe([]).model_dump()
    assert published_loss(recipe | {field: "another"}) is None
    assert published_loss({}) is None
