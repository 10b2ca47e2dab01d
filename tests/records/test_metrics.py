"""Throughput and MFU, metrics.jsonl, loss spikes, the progress bar."""

import json
import math

import pytest
import torch

from gpt2repro.records.metrics import (
    MetricsLog,
    Progress,
    SpikeDetector,
    Stopwatch,
    Throughput,
    flops_per_token,
    peak_flops,
    peak_memory_gib,
    read_metrics,
    rewind_metrics,
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
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GB200", 2500e12),
        ("Tesla T4", None),
    ],
)
def test_the_longest_device_name_counts(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_lines_are_valid_json_and_there_at_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 0, "loss": float("nan"), "grad_norm": math.inf, "rows_digest": "00"})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 0, "loss": None, "grad_norm": None, "rows_digest": "00"}
    log.close()


def test_going_back_cuts_later_lines_and_torn_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert rewind_metrics(path, 0) == [] and path.read_text() == ""
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(6)) + '{"step": 6, "lo')
    assert [line["step"] for line in read_metrics(path)] == [*range(6)]
    assert [line["step"] for line in rewind_metrics(path, 4)] == [0, 1, 2, 3]
    assert path.read_text().count("\n") == 4
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert read_metrics(tmp_path / "nowhere.jsonl") == []


def test_a_spike_is_measured_against_recent_losses():
    detector = SpikeDetector(3.0 + 0.01 * (step % 2) for step in range(32))
    assert detector.z_score(3.005) == pytest.approx(0.0, abs=0.01)
    # mean 3.005, standard deviation 0.005 (times sqrt(32/31))
    assert detector.z_score(3.055) == pytest.approx(10, rel=0.03)
    assert detector.z_score(3.055) < 10  # it is one of them now
    assert SpikeDetector([3.0] * 31).z_score(9.0) == 0.0  # too few to know
    assert SpikeDetector([3.0] * 40).z_score(9.0) == 0.0  # no spread to measure by


def test_only_the_main_process_shows_progress(capsys):
    for enabled in (False, True):
        progress = Progress(first_step=2, num_steps=4, enabled=enabled)
        progress.update(loss=1.5, tokens_per_second=1000.0)
        progress.note("something happened")
        progress.close()
        shown = capsys.readouterr()
        assert ("something happened" in shown.out) == enabled
        assert ("loss 1.5000, 1,000 tok/s" in shown.err) == enabled


def test_a_lap_ends_where_the_next_begins():
    watch = Stopwatch()
    began = watch.start
    laps = [watch.lap() for _ in range(3)]
    assert sum(laps) == pytest.approx(watch.start - began) and min(laps) >= 0


def test_peak_memory_is_in_gib_and_of_what_computes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert peak_memory_gib(torch.device("cuda")) == 3
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 64  # with an idle GPU beside it
