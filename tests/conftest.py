"""Quiet, offline, single-threaded tests: the same on a laptop and on a busy machine."""

import os

# Before torch is imported anywhere: one thread sums in one order, and leaves the other cores to
# the other workers of pytest-xdist.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from tiny_run import reset_accelerate

from gpt2repro.system import patience

# Property tests try the same few examples every time. With PROPERTY_EXAMPLES=2000 they look further
# and elsewhere; a failure prints the example and how to have it again.
EXAMPLES = os.environ.get("PROPERTY_EXAMPLES")
settings.register_profile("few", max_examples=15, derandomize=True, deadline=None, database=None)
if EXAMPLES:
    settings.register_profile("many", max_examples=int(EXAMPLES), deadline=None, print_blob=True)
settings.load_profile("many" if EXAMPLES else "few")


@pytest.fixture(autouse=True)
def no_server_has_answered_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: one that the Hub has answered is patient with it for half an hour."""
    monkeypatch.setattr(patience, "_outages", patience._Outages())


@pytest.fixture(autouse=True)
def no_engine_stands_yet() -> None:
    """Accelerate keeps one for the whole process, whoever set it up and however."""
    reset_accelerate()


# They take minutes, so they begin first: one that begins last keeps one worker while others rest.
LONG_FILES = (
    "test_train_accelerate.py",
    "test_engines.py",
    "test_benchmarks.py",
    "test_failing_rank.py",
    "test_bad_inputs.py",
    "test_launch.py",
    "test_kill_resume.py",
    "test_against_lm_eval.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """All but the tests marked `gpu` are of a CPU, where sums have one order: no GPU is seen.

    `-m gpu` runs the others, by themselves.
    """
    if not config.getoption("markexpr").startswith("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What cannot run here, or takes too long for every time, is counted as skipped."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest -m gpu"))
        if "internet" in item.keywords and "GPT2REPRO_INTERNET" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="needs the real Hub: GPT2REPRO_INTERNET=1"))
        if "sweep" in item.keywords and "GPT2REPRO_SWEEP" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="takes a minute more: make sweep"))
