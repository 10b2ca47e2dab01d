"""What a run does for the device it finds itself on."""

import pytest
from accelerate import Accelerator
from tiny_gpt2 import tiny_model
from tiny_run import reset_accelerate, write_inputs

from gpt2repro.recipe import load_recipe
from gpt2repro.speed import cpu_attention
from gpt2repro.training.learner import place


@pytest.mark.parametrize(
    ("options", "attention"),
    [
        ((), "sdpa"),
        (("--mixed_precision", "bf16"), cpu_attention.NAME),
        (("--mixed_precision", "bf16", "--attn_implementation", "eager"), "eager"),
    ],
)
def test_on_a_cpu_bf16_has_its_attention(tmp_path, options, attention):
    recipe = load_recipe(["--recipe", str(write_inputs(tmp_path)), *options])
    try:
        accelerator = Accelerator(cpu=True, mixed_precision=recipe.mixed_precision)
        model = tiny_model()
        model.set_attn_implementation(recipe.attn_implementation)
        model, _ = place(recipe, accelerator, model)
    finally:
        reset_accelerate()
    assert model.config._attn_implementation == attention
