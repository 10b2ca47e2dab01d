"""What a run says of itself: spikes, progress, the time of its steps, samples without a trace."""

import time
from types import SimpleNamespace

import pytest
import torch
from tiny_gpt2 import tiny_model, tiny_tokenizer
from torch import nn

from gpt2repro.training.evaluations import LOGIT_BYTES, Evaluations, sample_text
from gpt2repro.training.monitor import Monitor, SpikeDetector
from gpt2repro.training.progress import Progress

PROMPT = "This function"


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
        progress.update(loss=1.5, tokens_per_second=1000.0, seconds=90.0, batches_left=1)
        progress.note("something happened")
        progress.close()
        shown = capsys.readouterr()
        assert ("something happened" in shown.out) == enabled
        assert ("3/4 steps, loss 1.5000, 1,000 tok/s, 01:30 left" in shown.err) == enabled


def test_the_time_that_is_left_is_not_that_of_a_first_step(capsys):
    """Which compiles: a minute, where the others take half a second."""
    progress = Progress(first_step=0, num_steps=4, enabled=True)
    for seconds, batches_left in ((60.0, 1000), (0.5, 999), (0.5, 998)):
        progress.update(loss=1.5, tokens_per_second=1.0, seconds=seconds, batches_left=batches_left)
    progress.close()
    assert capsys.readouterr().err.rstrip().endswith("08:19 left")  # 499 s


@pytest.mark.parametrize("tells_late", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("on_device", [0.0, 30.0])
def test_a_step_has_its_own_seconds_whenever_it_is_told(monkeypatch, tells_late, on_device):
    """Its launch and the wait for its end; no evaluation's, nor another step's.

    A step that the device ends at once was told, before an evaluation, with no seconds at all.
    """
    now, told = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Launched:
        def __init__(self) -> None:
            self.waits_for = on_device

        def result(self) -> None:
            now[0] += self.waits_for
            self.waits_for = 0.0

    stream = SimpleNamespace(wait_seconds=1.0)
    monitor = Monitor.__new__(Monitor)
    monitor.inputs = SimpleNamespace(stream=stream)
    monitor._untold, monitor._tells_late = None, tells_late
    monitor._tell = lambda report: told.append((report.step, report.seconds, report.waited))
    for step in range(4):
        if step in (1, 3):
            monitor.catch_up()
            now[0] += 1000.0  # an evaluation
        with monitor.timing():
            now[0] += 10.0 + step
            stream.wait_seconds += 2.0
        monitor.report(step, None, Launched(), {})
    monitor.catch_up()
    assert told == [(step, 10.0 + step + on_device, 2.0) for step in range(4)]


def test_benchmarks_take_as_many_rows_as_their_logits_leave_room_for():
    """Training keeps no logits, so that a micro-batch may have hundreds of rows."""

    def rows(micro_batch_size: int, longest: int = 2000) -> int:
        recipe = SimpleNamespace(micro_batch_size=micro_batch_size, sequence_length=1024)
        model = tiny_model(vocab_size=50257, n_embd=8)
        parts = SimpleNamespace(recipe=recipe, learner=SimpleNamespace(model=model))
        request = SimpleNamespace(ids=range(longest))
        tasks = [SimpleNamespace(requests=[request], prompts=[])]
        return Evaluations._rows_with_logits(parts, tasks)

    assert [rows(size) for size in (1, 8, 512)] == [1, 8, 13]
    assert rows(512, longest=170) == 83, "of short ones more"
    assert LOGIT_BYTES > 83 * 170 * 50257 * (2 + 4)
    assert LOGIT_BYTES > 13 * 1024 * 50257 * (2 + 4)


# --- Samples --------------------------------------------------------------------------------------


def test_a_continuation_is_decided_by_its_seed():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = [sample_text(model, tokenizer, PROMPT, num_tokens=12, seed=s) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(PROMPT) for text in texts)


def test_random_numbers_mode_and_gradients_stay():
    model = tiny_model(resid_pdrop=0.5).train()
    before = torch.get_rng_state()
    dropped = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    sample_text(model, tiny_tokenizer(), PROMPT, num_tokens=4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and all(module.training for module in model.modules())
    assert 0.5 in dropped and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    sample_text(model, tiny_tokenizer(), PROMPT, num_tokens=4, seed=1)
    assert not model.training


def test_compiled_code_is_neither_run_nor_added_to():
    model = tiny_model().train()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    model.compile(backend=backend)
    ids = torch.zeros(2, 8, dtype=torch.long)
    model(input_ids=ids, shift_labels=ids).loss.backward()
    graphs = len(compiled)
    assert graphs > 0
    sample_text(model, tiny_tokenizer(), PROMPT, num_tokens=6, seed=1)
    model(input_ids=ids, shift_labels=ids)
    assert len(compiled) == graphs


def test_the_context_bounds_a_continuation():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    short = "a" * (model.config.n_positions - 2)
    text = sample_text(model, tokenizer, short, num_tokens=50, seed=1)
    assert len(tokenizer(text)["input_ids"]) <= model.config.n_positions
    long = "xyz " * model.config.n_positions
    assert sample_text(model, tokenizer, long, num_tokens=50, seed=1) == long
