"""Uploads beside a training: it is never held up, and hears of what failed."""

import logging
import threading
import time

import pytest
from fake_hub import Fault
from fake_hub_uploads import UploadHub
from tiny_checkpoint import save_checkpoint
from tiny_gpt2 import tiny_tokenizer

from gpt2repro.publishing import background


@pytest.fixture
def hub(monkeypatch):
    with UploadHub() as hub:
        hub.use_as_me(monkeypatch)
        yield hub


HOW = background.Checkpoints(
    tokenizer=tiny_tokenizer(),
    format="gpt2repro",
    with_state=False,
    tell=lambda step: background.Told(f"# step {step}\n", ""),
)


def test_background_push_never_blocks_and_newest_supersedes(hub, tmp_path, monkeypatch):
    """The first upload hangs on a closed gate; of three submitted meanwhile, only the last goes."""
    gate = threading.Event()
    real = background.upload

    def slow(*args, **kwargs):
        gate.wait(30)
        return real(*args, **kwargs)

    monkeypatch.setattr(background, "upload", slow)
    push = background.BackgroundPush("me/name", checkpoints=HOW)
    try:
        for number in range(1, 5):
            directory = save_checkpoint(tmp_path, number)
            weights = (directory / "model.safetensors").read_bytes()
            began = time.monotonic()
            push.submit(directory, f"Step {number}")
            assert time.monotonic() - began < 1  # hard links, not an upload
            for path in directory.iterdir():  # pruned at once: the submission outlives it
                path.unlink()
            directory.rmdir()
            if number == 1:
                while push._current is None:
                    time.sleep(0.01)
    finally:
        gate.set()
        problems = push.finish()
    assert problems == [] and push.url == f"{hub.url}/me/name"
    assert hub.messages == ["Step 1", "Step 4"]
    files = hub.files("me/name")
    assert files["model.safetensors"] == weights and b"# step 4" in files["README.md"]
    loadable = {"generation_config.json", "SHA256SUMS", "README.md"}
    loadable |= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    loadable |= {"configuration_gpt2repro.py", "modeling_gpt2repro.py"}
    assert files.keys() == loadable | {".gitattributes"}  # and no optimizer state
    assert list(tmp_path.iterdir()) == []  # no snapshot is left


def test_background_push_reports_what_failed_and_goes_on(hub, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    # every request of the first submission is refused for good, the second gets through
    hub.faults.append(Fault("status:403", path="/preupload/", method="POST"))
    push = background.BackgroundPush("me/name", checkpoints=HOW)
    first, second = save_checkpoint(tmp_path, 1), save_checkpoint(tmp_path, 2)
    push.submit(first, "Step 1")
    while not push._problems:
        time.sleep(0.01)
    push.submit(second, "Step 2")
    push.submit(tmp_path / "missing", "Step 3")
    problems = push.finish()
    assert len(problems) == 2
    assert f"the push of {first} (Step 1) to me/name failed: " in problems[0]
    assert "no right to write" in problems[0] and "gpt2repro push --model DIR" in problems[0]
    assert "missing could not be prepared" in problems[1]
    assert hub.messages == ["Step 2"]
