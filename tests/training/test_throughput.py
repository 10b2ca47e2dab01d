"""FLOPs, throughput and MFU, peak memory."""

import pytest
import torch
from tiny_gpt2 import tiny_model

from gpt2repro.training.throughput import (
    Throughput,
    flops_per_token,
    model_flops_per_token,
    peak_flops,
    peak_memory_gib,
)


def test_flops_of_gpt2_are_nanogpts():
    """nanoGPT's estimate_mfu on GPT-2 124M at T = 1024: N without the position table."""
    num_parameters = 124_439_808 - 1024 * 768
    assert flops_per_token(num_parameters, 12, 768, 1024) == 6 * 123_653_376 + 12 * 12 * 768 * 1024


def test_mfu_is_a_share_of_all_devices_peak():
    throughput = Throughput(flops_per_token=1e9, peak=100e12, num_devices=4)
    throughput.add(tokens=50_000, seconds=0.5, waited=0.1)
    throughput.add(tokens=50_000, seconds=0.5, waited=0.0)
    assert throughput.tokens_per_second == 100_000
    figures = throughput.read()
    assert figures["mfu"] == pytest.approx(100_000 * 1e9 / 400e12)
    assert figures["data_wait_fraction"] == pytest.approx(0.1)
    assert throughput.read()["tokens_per_second"] == 0.0  # counted anew


def test_no_mfu_without_a_published_peak():
    throughput = Throughput(1e9, peak_flops(torch.device("cpu")), 1)
    throughput.add(1000, 1.0, 2.0)
    figures = throughput.read()
    assert figures["mfu"] is None and figures["data_wait_fraction"] == 1.0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA RTX A4000", None),  # neither A40 nor A100
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 5090 D v2", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA GB200", 2500e12),
        ("Tesla T4", None),
    ],
)
def test_the_longest_device_name_counts(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_peak_memory_is_in_gib_and_of_what_computes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert peak_memory_gib(torch.device("cuda")) == 3
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 64  # with an idle GPU beside it


def test_a_models_flops_leave_out_its_position_table():
    model = tiny_model()
    config, table = model.config, model.transformer.wpe.weight
    expected = flops_per_token(
        model.num_parameters() - table.numel(), config.n_layer, config.n_embd, 16
    )
    assert model_flops_per_token(model, 16) == expected
