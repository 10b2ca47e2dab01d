"""A saved directory carries its own code: it loads where nothing of this repository exists."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ours_and_theirs import SHAPE, ours_and_theirs, random_ids
from safetensors.torch import load_file
from tiny_export import WITHOUT_THE_PACKAGE

from configuration_gpt2repro import AUTO_MAP, GPT2ReproConfig
from modeling_gpt2repro import (
    GPT2ReproForQuestionAnswering,
    GPT2ReproForSequenceClassification,
    GPT2ReproForTokenClassification,
    GPT2ReproModel,
)

PREAMBLE = """
import sys
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
)
directory, = sys.argv[1:]
"""


def run_elsewhere(script: str, directory: Path, tmp_path: Path, *, installed: bool = False) -> str:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    preamble = PREAMBLE if installed else WITHOUT_THE_PACKAGE + PREAMBLE
    done = subprocess.run(
        [sys.executable, "-c", preamble + script, str(directory)],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_language_model_loads_by_every_auto_class_and_generates(tmp_path):
    ours, _ = ours_and_theirs(pad_token_id=97)
    ours.save_pretrained(tmp_path / "saved")
    ids = random_ids(2, 9)
    torch.save({"ids": ids, "logits": ours(ids).logits.detach()}, tmp_path / "saved" / "expected")
    script = """
here = torch.load(directory + "/expected")
config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
assert config.model_type == "gpt2repro", config
lm, report = AutoModelForCausalLM.from_pretrained(
    directory, trust_remote_code=True, output_loading_info=True
)
assert not any(report.values()), report
assert type(lm).__module__.startswith("transformers_modules."), type(lm)
assert torch.equal(lm(here["ids"]).logits, here["logits"])
assert lm.lm_head.weight is lm.transformer.wte.weight
print(lm.generate(here["ids"], attention_mask=torch.ones_like(here["ids"]),
                  max_new_tokens=5, do_sample=False).tolist())
base = AutoModel.from_pretrained(directory, trust_remote_code=True)
assert type(base).__name__ == "GPT2ReproModel", type(base)
kin = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True)
assert kin(here["ids"]).logits.shape == (2, 2)
lm.save_pretrained(directory + "/again")
"""
    printed = run_elsewhere(script, tmp_path / "saved", tmp_path)
    greedy = ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    assert json.loads(printed.splitlines()[-1]) == greedy.tolist()

    # Saved again by a stranger: the same tensors, the same code, and it loads once more.
    again = tmp_path / "saved" / "again"
    mine, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "saved", again))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    for name in ("configuration_gpt2repro.py", "modeling_gpt2repro.py"):
        source = (Path(__file__).parents[1] / name).read_bytes()
        assert (tmp_path / "saved" / name).read_bytes() == source
        assert (again / name).read_bytes() == source
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP
    script = "AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)"
    run_elsewhere(script, again, tmp_path)


@pytest.mark.parametrize(
    "kind",
    [
        GPT2ReproModel,
        GPT2ReproForSequenceClassification,
        GPT2ReproForTokenClassification,
        GPT2ReproForQuestionAnswering,
    ],
)
def test_whatever_class_is_saved_the_directory_answers_to_all(tmp_path, kind):
    kind(GPT2ReproConfig(**SHAPE)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert {path.name for path in tmp_path.glob("*.py")} == {
        "configuration_gpt2repro.py",
        "modeling_gpt2repro.py",
    }


def test_a_decoder_s_directory_loads_as_a_language_model(tmp_path):
    ours, _ = ours_and_theirs()
    ours.transformer.save_pretrained(tmp_path / "saved")
    script = """
lm, report = AutoModelForCausalLM.from_pretrained(
    directory, trust_remote_code=True, output_loading_info=True
)
assert not any(report.values()), report
"""
    run_elsewhere(script, tmp_path / "saved", tmp_path)


EACH_ITS_OWN = """
def marks():
    found = {}
    for name in ("one", "two", "a/final", "b/final"):
        where = f"{directory}/{name}"
        loaded = [each.from_pretrained(where, trust_remote_code=True)
                  for each in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification)]
        config = AutoConfig.from_pretrained(where, trust_remote_code=True)
        found[name] = {each.mark for each in loaded}, getattr(config, "mark", None)
    return found

expected = {"one": "one", "two": "two", "a/final": None, "b/final": None}
assert marks() == {name: ({name}, mark) for name, mark in expected.items()}, marks()
"""
# What is installed is what one wants while one works on it.
INSTALLED = """
import modeling_gpt2repro
for name in ("one", "b/final"):
    model = AutoModelForCausalLM.from_pretrained(f"{directory}/{name}", trust_remote_code=True)
    assert type(model) is modeling_gpt2repro.GPT2ReproForCausalLM
"""


@pytest.mark.parametrize("installed", [False, True])
def test_every_checkpoint_runs_its_own_code(tmp_path, installed):
    """Two in one process, of different names and of one, with one configuration file and two."""
    ours, _ = ours_and_theirs()
    for name in ("one", "two", "a/final", "b/final"):
        ours.save_pretrained(tmp_path / name)
        for part in ("modeling",) if "/" in name else ("modeling", "configuration"):
            file = tmp_path / name / f"{part}_gpt2repro.py"
            kind = {"modeling": "PreTrainedModel(PreTrainedModel):", "configuration": "Config):"}
            head, found, tail = file.read_text().partition(kind[part] + "\n")
            assert found
            file.write_text(f"{head}{found}    mark = {name!r}\n{tail}")
    run_elsewhere(EACH_ITS_OWN + INSTALLED * installed, tmp_path, tmp_path, installed=installed)
