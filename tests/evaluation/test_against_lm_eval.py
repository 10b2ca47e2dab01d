"""Row for row against lm-evaluation-harness: same rows, same model, its own task files and code.

Only the data differ from what `lm_eval --tasks hellaswag,lambada_openai,wikitext` runs: the task
files include the harness' own and read the fixtures instead of the Hub.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_language_models import (
    OF_THE_HARNESS,
    VOCAB_SIZE,
    random_gpt2,
    task_files,
    tiny_tokenizer,
)
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.evaluation.likelihoods import loglikelihoods
from gpt2repro.evaluation.scoring import score_task
from gpt2repro.evaluation.tasks.harness import LmEvalTask, open_lm_eval_tasks
from modeling_gpt2repro import GPT2ReproForCausalLM

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval, of the test extra, is not installed")

METRICS = {
    "hellaswag": ("acc", "acc_norm"),
    "lambada": ("acc", "perplexity"),
    "wikitext": ("word_perplexity", "bits_per_byte"),
}


def opened(name: str, directory: Path, positions: int, **options) -> LmEvalTask:
    how = {"max_length": positions, "tasks_dir": str(directory)} | options
    [[task]] = open_lm_eval_tasks([f"ours_{name}"], tiny_tokenizer(), **how).values()
    return task


@cache
def half_trained(directory: Path, positions: int) -> GPT2ReproForCausalLM:
    """Ours, having read half of the fixtures' rows: right on some and wrong on others."""
    config = GPT2ReproConfig(
        vocab_size=VOCAB_SIZE,
        n_positions=positions,
        n_embd=48,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(config)
    words = opened("lambada", directory, positions, limit=6)
    endings = opened("hellaswag", directory, positions, limit=5)
    right = words.requests + [
        endings.requests[at][int(example.instances[0].doc["label"])]
        for example, at in zip(endings.examples, endings.slices, strict=True)
    ]
    rows = [torch.tensor(request.ids[-positions - 1 :]) for request in right]
    inputs = pad_sequence([row[:-1] for row in rows], batch_first=True)
    targets = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(1000):
        loss = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
        if loss < 0.2:  # known by heart
            return model.eval()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError("the tiny model does not learn")


def save(model, directory: Path) -> str:
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


# 512 positions hold every row; 80 cut most contexts on the left and give WikiText several windows.
@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    return task_files(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module", params=["stock-512", "ours-512", "ours-80"])
def harness(request, tasks, tmp_path_factory):
    """What the harness says of a model: (model, results, {task: samples in order}, task files)."""
    from lm_eval.tasks import TaskManager

    kind, positions = request.param.split("-")
    model = half_trained(tasks, int(positions))
    if kind == "stock":
        weights, model = model.state_dict(), random_gpt2(n_embd=48, n_layer=1)
        model.load_state_dict(weights)
    directory = save(model, tmp_path_factory.mktemp(kind))
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={directory},dtype=float32,trust_remote_code=True",
        tasks=[f"ours_{name}" for name in OF_THE_HARNESS],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    samples = {
        name: sorted(found["samples"][f"ours_{name}"], key=lambda sample: sample["doc_id"])
        for name in OF_THE_HARNESS
    }
    return model, found["results"], samples, tasks


@pytest.mark.parametrize("name", OF_THE_HARNESS)
def test_equal_row_for_row(harness, name):
    model, results, samples, directory = harness
    max_length = model.config.n_positions
    task = opened(name, directory, max_length)
    assert task.skipped == {} and len(task.rows) == len(samples[name])
    assert bool(task.truncated) == (max_length == 80 and name != "wikitext")
    scores = loglikelihoods(model, task.requests, max_length=max_length, batch_size=8)
    found = task.estimates(scores)

    ours = scores.log_likelihood
    if name == "wikitext":
        ours = [ours[at].sum() for at in task.slices]
        theirs = [sample["filtered_resps"][0] for sample in samples[name]]
    else:
        theirs = [response[0] for sample in samples[name] for response in sample["filtered_resps"]]
    # The harness sums float32 log-probabilities in float32 and pads otherwise.
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)

    for metric in {"acc", "acc_norm"}.intersection(METRICS[name]):
        by_row = [sample[metric] for sample in samples[name]]
        np.testing.assert_array_equal(found[task.prefix + metric].influence, by_row)
    theirs = results[f"ours_{name}"]
    for metric in METRICS[name]:
        ours = found[task.prefix + metric].value
        assert ours == pytest.approx(theirs[f"{metric},none"], rel=2e-5)


def test_the_comparison_can_tell_rows_apart(harness):
    """Some rows right and some wrong, or equality would mean little."""
    _, results, _, _ = harness
    assert 0 < results["ours_hellaswag"]["acc_norm,none"] < 1
    assert 0 < results["ours_lambada"]["acc,none"] < 1


@pytest.mark.sweep  # it reads all of its thousands of task files; docs/use/lm_eval.md runs it too
def test_its_command_line_takes_our_checkpoint(tasks, tmp_path):
    """As docs/evaluation.md says: the code comes from the directory, in a process without ours."""
    directory = tmp_path / "checkpoint"
    model = half_trained(tasks, 512)
    save(model, directory)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf"),
        *("--model_args", f"pretrained={directory},trust_remote_code=True"),
        *("--tasks", "ours_hellaswag", "--include_path", str(tasks)),
        *("--device", "cpu", "--batch_size", "4", "--output_path", str(tmp_path / "results")),
    ]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (output,) = (tmp_path / "results").rglob("*.json")
    theirs = json.loads(output.read_text())["results"]["ours_hellaswag"]
    task = opened("hellaswag", tasks, 512)
    for name, ours in score_task(model, task, batch_size=8).estimates.items():
        metric = name.removeprefix(task.prefix)
        if metric == "gold_bits_per_byte":  # ours alone
            continue
        assert ours.value == theirs[f"{metric},none"]
        assert ours.stderr == pytest.approx(theirs[f"{metric}_stderr,none"])
    assert list((tmp_path / "modules").rglob("modeling_gpt2repro.py")), "remote code was used"
