"""What a recorded figure says of its machine."""

import pytest
import torch

from gpt2repro import environment


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
    monkeypatch.setattr(environment, "first_core", lambda: core)
    capability = torch.backends.cpu.get_cpu_capability()
    assert environment.hardware().endswith(f" cores of Some CPU ({capability}{suffix})")


def test_where_the_kernel_says_nothing_there_is_still_a_name(monkeypatch):
    monkeypatch.setattr(environment, "first_core", dict)
    assert environment.processor()
    assert environment.vector_instructions() == torch.backends.cpu.get_cpu_capability()
