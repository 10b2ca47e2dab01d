"""`micro_batch_size: auto` against a device whose memory is simulated."""

from dataclasses import dataclass, field

import pytest
import torch

from gpt2repro import UserError
from gpt2repro.training import micro_batch
from gpt2repro.training.micro_batch import HEADROOM, largest_that_fits

GIB = 2**30
CUDA = torch.device("cuda")


@dataclass
class Device:
    """Memory in bytes: `base` is the model's, each row of a batch adds `per_row`."""

    capacity: int
    base: int
    per_row: int
    surprise: int = 0  # what batches above 8 rows need besides
    tried: list[int] = field(default_factory=list)
    peak: int = 0

    def forward_backward(self, num_rows: int) -> None:
        self.tried.append(num_rows)
        used = self.base + num_rows * self.per_row + (self.surprise if num_rows > 8 else 0)
        if used > self.capacity:
            raise torch.OutOfMemoryError
        self.peak = max(self.peak, used)

    def install(self, monkeypatch) -> "Device":
        def forget_peak(device=None) -> None:
            self.peak = self.base

        for name, value in {
            "reset_peak_memory_stats": forget_peak,
            "max_memory_allocated": lambda device=None: self.peak,
            "memory_allocated": lambda device=None: self.base,
            "memory_reserved": lambda device=None: self.base,
            "mem_get_info": lambda device=None: (self.capacity - self.base, self.capacity),
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        return self

    def choose(self, candidates: list[int], reserve_bytes: int = 0) -> int:
        return largest_that_fits(
            candidates, self.forward_backward, device=CUDA, reserve_bytes=reserve_bytes
        )


def test_two_small_batches_predict_the_largest_that_fits(monkeypatch):
    device = Device(capacity=80 * GIB, base=2 * GIB, per_row=GIB).install(monkeypatch)
    # (80 - 2) * 0.9 = 70.2 GiB are left for rows
    assert HEADROOM == 0.90 and device.choose([1, 2, 4, 8, 16, 32, 64, 128]) == 64
    assert device.tried == [1, 2, 64]
    assert device.peak == device.base  # what was tried is not the run's peak


def test_room_is_left_for_what_comes_later(monkeypatch):
    device = Device(capacity=80 * GIB, base=2 * GIB, per_row=GIB).install(monkeypatch)
    assert device.choose([1, 2, 4, 8, 16, 32, 64], reserve_bytes=10 * GIB) == 32


def test_a_prediction_that_fails_falls_to_the_next_smaller(monkeypatch):
    device = Device(capacity=80 * GIB, base=2 * GIB, per_row=GIB, surprise=50 * GIB)
    device.install(monkeypatch)
    assert device.choose([1, 2, 4, 8, 16, 32, 64]) == 16
    assert device.tried == [1, 2, 64, 32, 16]


def test_every_rank_takes_what_the_smallest_can(monkeypatch):
    device = Device(capacity=80 * GIB, base=2 * GIB, per_row=GIB).install(monkeypatch)
    # Another rank has room for 16 rows only; then both report that these ran.
    monkeypatch.setattr(
        micro_batch, "gather", lambda mine: [mine, 16] if type(mine) is int else [mine, True]
    )
    assert device.choose([1, 2, 4, 8, 16, 32, 64]) == 16


def test_a_model_that_does_not_fit_with_one_row_is_refused(monkeypatch):
    device = Device(capacity=8 * GIB, base=7 * GIB, per_row=2 * GIB).install(monkeypatch)
    with pytest.raises(UserError, match=r"micro_batch_size.*gradient_checkpointing"):
        device.choose([1, 2, 4])


def test_a_device_with_room_for_one_row(monkeypatch):
    device = Device(capacity=9 * GIB, base=7 * GIB, per_row=int(1.5 * GIB)).install(monkeypatch)
    assert device.choose([1, 2, 4]) == 1


@pytest.mark.parametrize(("candidates", "size"), [([1, 2, 4, 8, 16, 32], 16), ([1, 3, 9, 27], 9)])
def test_a_cpu_takes_a_moderate_size_without_trying(candidates, size):
    def never(num_rows: int) -> None:
        raise AssertionError

    cpu = torch.device("cpu")
    assert largest_that_fits(candidates, never, device=cpu, reserve_bytes=0) == size
