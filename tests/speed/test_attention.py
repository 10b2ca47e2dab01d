"""The kernel behind torch's attention."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2repro.speed.attention import activate, for_generation, kernel_taken


def test_the_kernel_is_asked_for():
    arguments = (1, 2, 16, 8), torch.float32, torch.device("cpu")
    assert kernel_taken(*arguments) == "flash"
    with sdpa_kernel(SDPBackend.MATH):
        assert kernel_taken(*arguments) == "math"


def test_a_kernel_of_others_needs_its_package_and_other_names_are_left_alone():
    assert activate("flex_attention") == "flex_attention"
    with pytest.raises(ImportError, match="flash"):
        activate("sdpa_flash_3")


@pytest.mark.parametrize("before", [True, False])
def test_generation_does_without_cudnns_kernel_and_leaves_the_choice_as_it_was(before):
    preferred = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with pytest.raises(KeyError), for_generation():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            raise KeyError
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(preferred)
