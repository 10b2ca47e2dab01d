"""The kernel behind torch's attention."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2repro.speed.attention import activate, kernel_taken


def test_the_kernel_is_asked_for():
    arguments = (1, 2, 16, 8), torch.float32, torch.device("cpu")
    assert kernel_taken(*arguments) == "flash"
    with sdpa_kernel(SDPBackend.MATH):
        assert kernel_taken(*arguments) == "math"


def test_a_kernel_of_others_needs_its_package_and_other_names_are_left_alone():
    assert activate("flex_attention") == "flex_attention"
    with pytest.raises(ImportError, match="flash"):
        activate("sdpa_flash_3")
