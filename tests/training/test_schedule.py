"""Warm-up, then half a cosine: a pure function of the step."""

import pytest

from gpt2repro.training.schedule import lr_at


def test_warm_up_then_half_a_cosine():
    schedule = {"max_lr": 6e-4, "min_lr": 6e-5, "warmup_steps": 715, "num_steps": 19073}
    assert lr_at(0, **schedule) == pytest.approx(6e-4 / 715)
    assert lr_at(714, **schedule) == pytest.approx(6e-4)
    assert lr_at(715, **schedule) == pytest.approx(6e-4)
    middle = (715 + 19073) // 2
    assert lr_at(middle, **schedule) == pytest.approx((6e-4 + 6e-5) / 2)
    assert lr_at(19072, **schedule) == pytest.approx(6e-5, rel=1e-4)
    rates = [lr_at(step, **schedule) for step in range(715, 19073)]
    assert rates == sorted(rates, reverse=True)


def test_schedules_without_warm_up_or_decay():
    assert lr_at(0, max_lr=1.0, min_lr=0.0, warmup_steps=0, num_steps=10) == 1.0
    assert lr_at(9, max_lr=1.0, min_lr=1.0, warmup_steps=0, num_steps=10) == 1.0
    assert lr_at(4, max_lr=1.0, min_lr=0.0, warmup_steps=10, num_steps=5) == 0.5
