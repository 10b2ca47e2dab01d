"""docs/clusters.md, "Without a network": what `hf download` brought trains with the Hub gone.

The commands are read from the page. The stand-in for the Hub holds tiny files under the names that
the page says; what trains is the tiny run, with the page's options over its own.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import yaml
from fake_hub import FakeHub
from tiny_export import without_fresh_processes
from tiny_run import digests, train, write_inputs

from gpt2repro import UserError

PAGE = Path(__file__).parent.parent / "docs" / "clusters.md"
DATASET, TOKENIZER = "HuggingFaceFW/fineweb-edu", "openai-community/gpt2"
CARD = b"""---
configs:
- config_name: default
  data_files: data/*/*
- config_name: sample-10BT
  data_files: sample/10BT/*
---
"""
# OpenAI's files say whose tokenizer it is in config.json alone.
BESIDE = {
    "tokenizer_config.json": b'{"model_max_length": 1024}',
    "config.json": b'{"model_type": "gpt2"}',
    "model.safetensors": b"large",
}


def commands_of_the_page(program: str) -> list[list[str]]:
    """The commands of the section that begin like `program`, as words."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)
    section = next(text for text in sections if text.startswith("Without a network\n"))
    blocks = re.findall(r"^```bash\n(.+?)^```$", section, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith(program)]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def recipe(hub, tmp_path) -> Path:
    """The tiny run on a Hub like the one that the page names."""
    path = write_inputs(tmp_path)
    texts = (tmp_path / "corpus" / "0.parquet").read_bytes()
    files = {"sample/10BT/000_00000.parquet": texts, "data/2013/0.parquet": texts}
    hub.add("datasets", DATASET, files | {"README.md": CARD})
    tokenizer = {file.name: file.read_bytes() for file in (tmp_path / "tokenizer").iterdir()}
    hub.add("models", TOKENIZER, tokenizer | BESIDE)
    values = yaml.safe_load(path.read_text()) | {"num_steps": 3, "tokenizer_name": TOKENIZER}
    values |= {"dataset_name": DATASET, "dataset_config": "sample-10BT"}
    path.write_text(yaml.safe_dump(values))
    return path


def test_what_was_downloaded_trains_without_the_hub_on_the_same_rows(
    hub, recipe, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    # Fresh processes have tests of their own.
    without_fresh_processes(monkeypatch)
    downloads = commands_of_the_page("hf download")
    assert len(downloads) == 2
    for words in downloads:
        program = Path(sys.executable).parent / words[0]
        subprocess.run([program, *words[1:]], env=os.environ | hub.env, check=True)
    assert not [*tmp_path.rglob("model.safetensors"), *tmp_path.rglob("2013")]
    with monkeypatch.context() as patch:
        hub.use_in_process(patch)
        assert train(recipe, tmp_path / "online") == 0
    asked = len(hub.log)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (words,) = commands_of_the_page("accelerate launch")
    options = words[words.index("train_accelerate.py") + 1 :]
    options[options.index("--num_validation_units") + 1] = "1"  # of 8; the page's are FineWeb-Edu's
    assert train(recipe, tmp_path / "offline", *options) == 0
    assert digests(tmp_path / "offline") == digests(tmp_path / "online")
    with pytest.raises(UserError, match=r"cannot resume the data stream: .*dataset"):
        train(recipe, tmp_path / "online", *options, "--num_steps", "4")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):  # the stream keeps no copy
        train(recipe, tmp_path / "refused", "--tokenizer_name", "gpt2-tokenizer")
    assert len(hub.log) == asked
