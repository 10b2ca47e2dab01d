"""What is shown after the export costs nothing."""

from types import SimpleNamespace

import pytest

from gpt2repro.training.finish import _paragraph


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("--once upon a time", "error: --model"),  # taken for text, and not for an option
        ("a\x00b", "embedded null byte"),
    ],
)
def test_a_sample_that_cannot_be_written_is_not_the_runs_failure(prompt, why, tmp_path):
    run = SimpleNamespace(
        directory=SimpleNamespace(final=tmp_path / "final"),
        recipe=SimpleNamespace(sample_prompt=prompt, seed=1),
    )
    said = _paragraph(run)
    assert said.startswith("(no sample: ") and why in said
