"""`micro_batch_size: auto` against a device whose memory is simulated."""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from tiny_gpt2 import tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpt2repro import UserError
from gpt2repro.data.rows.lanes import divisors
from gpt2repro.training import learner, micro_batch
from gpt2repro.training.micro_batch import HEADROOM, largest_that_fits

MIB, GIB = 2**20, 2**30
CUDA = torch.device("cuda")
ROWS = 512  # of a step: 524,288 tokens


@dataclass(frozen=True)
class Curve:
    """MiB in use at the height of forward and backward, the parameters among it.

    Counted, not computed: the model with its fused head ran on fake tensors, eager, under bf16
    autocast, while a dispatch mode summed the storages alive; attention kept what a flash kernel
    keeps. Rows have 1024 tokens. A curve ends where the memory of the largest card does.
    """

    parameters: int
    least: int  # of a first micro-batch, however few rows it has: its own gradients outweigh them
    peaks: tuple[int, ...]  # of a later one with 1, 2, 4, 8, ... rows, beside earlier gradients

    def height(self, rows: int, *, accumulates: bool = True) -> float:
        """Bytes beyond the parameters."""
        step = rows.bit_length() - 1
        assert rows == 2**step  # as measured, and nothing between
        peak = self.peaks[step] if step < len(self.peaks) else math.inf
        if not accumulates:
            peak = max(self.least, peak - self.parameters)  # which is what was counted
        return (peak - self.parameters) * MIB


CURVES = {
    "gpt2": Curve(475, 1684, (2159, 2592, 3459, 5193, 8662, 14002, 24682, 46043, 88765)),
    "gpt2, checkpointing": Curve(
        475, 1395, (1870, 2015, 2304, 2883, 4042, 4762, 6202, 10148, 19181, 37247)
    ),
    "gpt2-medium": Curve(1354, 3595, (4949, 5927, 7883, 11796, 19621, 33667, 61760, 117945)),
    "gpt2-medium, checkpointing": Curve(
        1354, 3100, (4179, 4387, 4804, 5637, 7303, 9031, 12488, 21122, 39309, 75683)
    ),
    "gpt2-xl": Curve(5942, 12497, (18376, 21201, 26853, 38155, 60760, 104347)),
    "gpt2-xl, checkpointing": Curve(
        5942, 12497, (15970, 16391, 17231, 18911, 22273, 27373, 37573, 59884, 107500)
    ),
}
# The same with the smaller chunks of logits that GPUs below 32 GB are given.
SMALL_CARD_CURVES = {
    "gpt2": Curve(475, 1684, (2159, 2592, 3459, 4794, 7464, 12805, 23485, 44846)),
    "gpt2, checkpointing": Curve(
        475, 1395, (1870, 2015, 2304, 2484, 2844, 3565, 5631, 10148, 19181, 37247)
    ),
    "gpt2-medium": Curve(1354, 3595, (4949, 5927, 7883, 11395, 18418, 32464)),
    "gpt2-medium, checkpointing": Curve(
        1354, 3100, (4179, 4387, 4804, 5236, 6100, 7828, 12029, 21122, 39309)
    ),
    "gpt2-xl": Curve(5942, 12497, (18376, 21201, 26853)),
    "gpt2-xl, checkpointing": Curve(5942, 12497, (15970, 16391, 17231, 18506, 21056, 26156)),
}
# GiB that cards of so many GB leave to a process besides the CUDA context.
CARDS = {24: 23.0, 40: 38.9, 48: 43.9, 80: 78.6}


@dataclass
class Device:
    """Memory in bytes: `base` is in use before, a batch takes `height(rows)` besides."""

    capacity: int
    base: int
    height: Callable[[int], float]
    held: int = 0  # by what the search allocates
    peak: float = 0
    tried: list[int] = field(default_factory=list)
    ran_out: bool = False

    def forward_backward(self, num_rows: int) -> None:
        self.tried.append(num_rows)
        self.use(self.height(num_rows))

    def use(self, num_bytes: float) -> None:
        used = self.base + self.held + num_bytes
        if used > self.capacity:
            self.ran_out = True
            raise torch.OutOfMemoryError
        self.peak = max(self.peak, used)

    def empty(self, num_bytes: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert (dtype, device) == (torch.uint8, CUDA)
        self.use(num_bytes)
        self.held += num_bytes
        block = torch.tensor(0)
        weakref.finalize(block, self._free, num_bytes)
        return block

    def _free(self, num_bytes: int) -> None:
        self.held -= num_bytes

    def install(self, monkeypatch) -> "Device":
        def forget_peak(device=None) -> None:
            self.peak = self.base + self.held

        for name, value in {
            "reset_peak_memory_stats": forget_peak,
            "max_memory_allocated": lambda device=None: self.peak,
            "memory_allocated": lambda device=None: self.base + self.held,
            "memory_reserved": lambda device=None: self.base + self.held,
            "mem_get_info": lambda device=None: (
                self.capacity - self.base - self.held,
                self.capacity,
            ),
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "empty", self.empty)
        return self

    def choose(self, candidates: list[int], reserve_bytes: int = 0, **options) -> int:
        return largest_that_fits(
            candidates, self.forward_backward, device=CUDA, reserve_bytes=reserve_bytes, **options
        )


class Training:
    """A model and its engine, in so far as memory is concerned."""

    def __init__(self, model: str, card: int, ranks: int) -> None:
        self.curve = curve = (SMALL_CARD_CURVES if card < 32 else CURVES)[model]
        self.weight = nn.Parameter(torch.empty(curve.parameters * MIB // 4, device="meta"))
        self.adam = 2 * curve.parameters * MIB
        self.num_processes, self.device = ranks, CUDA
        self.distributed_type = DistributedType.NO if ranks == 1 else DistributedType.MULTI_GPU
        copies = 1 if ranks == 1 else 2  # DDP has a second one: the buckets that it sums in
        self.on = Device(int(CARDS[card] * GIB), copies * curve.parameters * MIB, curve.height)
        self.has_gradients = False

    def __call__(self, *, input_ids: range, **kwargs) -> SimpleNamespace:
        return SimpleNamespace(loss=len(input_ids))

    def backward(self, num_rows: int) -> None:
        self.on.tried.append(num_rows)
        self.on.use(self.curve.height(num_rows, accumulates=self.has_gradients))
        self.has_gradients = True

    def parameters(self) -> Iterator[nn.Parameter]:
        yield self.weight

    def no_sync(self, model=None) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def zero_grad(self) -> None:
        self.has_gradients = False

    def largest_micro_batch(self, monkeypatch) -> int:
        recipe = SimpleNamespace(
            rows_per_step=ROWS, sequence_length=1024, ema_decay=0.0, batch_multiples=()
        )
        self.on.install(monkeypatch)
        monkeypatch.setattr(torch, "zeros", lambda shape, **kwargs: range(shape[0]))
        return learner._largest_micro_batch(recipe, self, self)

    def fits(self, rows: int) -> bool:
        """Whether a whole step does with micro-batches of that size, and leaves the headroom."""
        height = self.curve.height(rows, accumulates=rows < ROWS // self.num_processes)
        return height <= HEADROOM * (self.on.capacity - self.on.base - self.adam)


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("model", CURVES)
def test_the_optimizer_fits_beside_the_largest_batch(monkeypatch, model, card, ranks):
    training = Training(model, card, ranks)
    if not training.fits(1):
        with pytest.raises(UserError, match="not even one row fits"):
            training.largest_micro_batch(monkeypatch)
        return
    rows = training.largest_micro_batch(monkeypatch)
    assert training.fits(rows)
    assert rows == ROWS // ranks or not training.fits(2 * rows)
    device = training.on
    assert sum(device.tried) <= 5 * rows  # the search takes as long as that many rows
    # and leaves nothing to the run
    assert device.held == 0 and device.peak == device.base and not training.has_gradients


@pytest.mark.parametrize(
    ("card", "model", "rows"),
    [
        (24, "gpt2", 32),
        (80, "gpt2", 128),
        (40, "gpt2-xl, checkpointing", 16),
        (80, "gpt2-xl", 16),
        (80, "gpt2-xl, checkpointing", 128),
    ],
)
def test_sizes_that_users_of_one_gpu_get(monkeypatch, card, model, rows):
    assert Training(model, card, ranks=1).largest_micro_batch(monkeypatch) == rows


@pytest.mark.parametrize(
    ("card", "model", "rows"),
    [
        (24, "gpt2", 32),
        (24, "gpt2-medium, checkpointing", 64),
        (40, "gpt2-xl, checkpointing", 16),
        (48, "gpt2-xl", 4),
        (80, "gpt2", 128),
        (80, "gpt2-xl, checkpointing", 128),
    ],
)
def test_ranks_that_cannot_go_on_never_run_out_of_memory(monkeypatch, card, model, rows):
    training = Training(model, card, ranks=1)
    device = training.on.install(monkeypatch)
    assert device.choose(divisors(ROWS), training.adam, recovers=False) == rows
    assert not device.ran_out


def test_a_flat_start_tells_nothing(monkeypatch):
    # As in one pass, where gradients outweigh the activations of few rows.
    device = Device(40 * GIB, 6 * GIB, lambda rows: max(6 * GIB, (4 + rows / 4) * GIB))
    device.install(monkeypatch)
    # (40 - 6 - 12) * 0.9 = 19.8 GiB are left
    for recovers in (True, False):
        assert device.choose([1, 2, 4, 8, 16, 32, 64, 128], 12 * GIB, recovers=recovers) == 32


def test_every_rank_takes_what_the_smallest_can(monkeypatch):
    device = Device(80 * GIB, 2 * GIB, lambda rows: rows * GIB).install(monkeypatch)
    # (80 - 2) * 0.9 = 70.2 GiB are left for rows here, 54 GiB less on another rank
    monkeypatch.setattr(micro_batch, "gather", lambda left: [left, left - 54 * GIB])
    assert device.choose([1, 2, 4, 8, 16, 32, 64]) == 16


def test_a_model_that_does_not_fit_with_one_row_is_refused(monkeypatch):
    device = Device(8 * GIB, 7 * GIB, lambda rows: 2 * rows * GIB).install(monkeypatch)
    with pytest.raises(UserError, match=r"micro_batch_size.*gradient_checkpointing"):
        device.choose([1, 2, 4])
    with pytest.raises(UserError, match=r"micro_batch_size.*gradient_checkpointing"):
        device.choose([1, 2, 4], reserve_bytes=2 * GIB)
    assert device.tried == [1]  # where the optimizer alone is too large there is nothing to try


@pytest.mark.parametrize(("candidates", "size"), [([1, 2, 4, 8, 16, 32], 16), ([1, 3, 9, 27], 9)])
def test_a_cpu_takes_a_moderate_size_without_trying(candidates, size):
    def never(num_rows: int) -> None:
        raise AssertionError

    cpu = torch.device("cpu")
    assert largest_that_fits(candidates, never, device=cpu, reserve_bytes=0) == size


# --- What is tried --------------------------------------------------------------------------------


def search_of(monkeypatch, accelerator, model, batch_multiples=()) -> SimpleNamespace:
    """What the search is asked, of 4 rows of 32 tokens for each process."""
    asked = SimpleNamespace()

    def largest_that_fits(candidates, forward_backward, **options) -> int:
        asked.__dict__.update(options, candidates=candidates, forward_backward=forward_backward)
        return 1

    monkeypatch.setattr(learner, "largest_that_fits", largest_that_fits)
    rows = 4 * accelerator.num_processes
    recipe = SimpleNamespace(
        rows_per_step=rows, sequence_length=32, ema_decay=0.0, batch_multiples=batch_multiples
    )
    learner._largest_micro_batch(recipe, accelerator, model)
    assert asked.candidates == [1, 2, 4]
    return asked


def num_gradients(model) -> int:
    return sum(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("batch_multiples", [(), [(9, 2)]])
def test_a_trial_meets_the_gradients_of_an_earlier_micro_batch(monkeypatch, batch_multiples):
    model, passes = tiny_model().train(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(
            (len(kwargs["input_ids"]), num_gradients(module))
        ),
        with_kwargs=True,
    )
    everything = len(list(model.parameters()))
    asked = search_of(monkeypatch, Accelerator(cpu=True), model, batch_multiples)
    for size in (2, 4):
        asked.forward_backward(size)
        assert num_gradients(model) == 0
    # Four rows at once are all of a step, and there is no earlier one until a step has two batches.
    last = [(1, 0), (4, everything)] if batch_multiples else [(4, 0)]
    assert passes == [(1, 0), (2, everything), *last]
    assert asked.recovers
    assert asked.reserve_bytes == 2 * sum(4 * p.numel() for p in model.parameters())


@pytest.fixture
def world_of_two() -> Iterator[None]:
    """This process as the first of two; the other is imagined."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_a_sharded_trial_counts_a_ranks_own_part_and_ends_where_memory_does(
    monkeypatch, world_of_two
):
    model, sync = tiny_model().train(), [True]
    num_values = sum(p.numel() for p in model.parameters())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))

    @contextlib.contextmanager
    def no_sync(module):
        sync[0] = False
        yield
        sync[0] = True

    accelerator = SimpleNamespace(
        num_processes=2,
        distributed_type=DistributedType.FSDP,
        device=torch.device("cpu"),
        no_sync=no_sync,
        backward=lambda loss: loss.backward(),
    )
    asked = search_of(monkeypatch, accelerator, model)
    assert asked.reserve_bytes == 2 * 4 * num_values // 2 and not asked.recovers

    passes = []

    def run_out(module, args, kwargs) -> None:
        passes.append((len(kwargs["input_ids"]), *sync))
        if passes[-1][0] == 4:
            raise torch.OutOfMemoryError

    model.register_forward_pre_hook(run_out, with_kwargs=True)
    asked.forward_backward(2)
    # What is not summed over ranks yet is kept whole: by training too, up to the last micro-batch.
    assert passes == [(1, False), (2, True)] and num_gradients(model) == 0
    with pytest.raises(UserError, match="micro_batch_size auto: out of memory at a size of 4"):
        asked.forward_backward(4)
