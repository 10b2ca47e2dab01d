"""Steps that take more than one batch: the arithmetic, against adding up step by step."""

import pytest

from gpt2repro.data.rows.lanes import Batches


@pytest.mark.parametrize("multiples", [[], [[1, 2]], [[3, 2], [5, 4], [9, 1]], [[2, 7], [3, 3]]])
def test_batches_before_a_step_and_steps_in_batches(multiples):
    batches, before = Batches(multiples), 0
    for step in range(15):
        assert batches.before(step) == before
        assert (
            batches.of(step)
            == dict([[0, 1], *multiples])[
                max(begin for begin in [0, *(m[0] for m in multiples)] if begin <= step)
            ]
        )
        for more in range(batches.of(step)):
            assert batches.steps_in(before + more) == step
        before += batches.of(step)
