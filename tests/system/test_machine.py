"""What a recorded figure says of its machine."""

import pytest
import torch

from gpt2repro.system import machine


@pytest.mark.parametrize(
    ("flags", "suffix"),
    [
        ("fpu avx2", ""),
        ("fpu avx2 avx512_bf16", " with bfloat16"),
        ("amx_tile amx_bf16", " with bfloat16"),
    ],
)
def test_a_processor_is_named_with_what_it_can_do(monkeypatch, flags, suffix):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    core = {"model name": "Some CPU", "flags": flags}
    monkeypatch.setattr(machine, "first_core", lambda: core)
    capability = torch.backends.cpu.get_cpu_capability()
    assert machine.hardware().endswith(f" cores of Some CPU ({capability}{suffix})")


def test_a_run_on_the_processor_does_not_name_an_idle_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert machine.hardware() == machine.describe("cuda")["hardware"] == "2 x Some GPU"
    assert machine.describe("cpu")["hardware"].endswith(")")


def test_where_the_kernel_says_nothing_there_is_still_a_name(monkeypatch):
    monkeypatch.setattr(machine, "first_core", dict)
    assert machine.processor()
    assert machine.vector_instructions() == torch.backends.cpu.get_cpu_capability()
