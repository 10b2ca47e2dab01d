"""Tokenizers that are no GPT-2's, from the recipe to the export: right ids in every room.

Three of them: ids with a gap, so that there are more of them than tokens; tokens that the tokenizer
itself puts around every text; a beginning, and no end.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_corpus import WORDS
from tiny_export import VERIFIED, without_fresh_processes
from tiny_language_models import task_files
from tiny_run import train, write_inputs
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gpt2repro.commands import evaluate, generate, plots
from gpt2repro.commands import export as export_verb
from gpt2repro.data.tokens.encoder import BulkEncoder
from gpt2repro.data.tokens.token_ids import begin_id, end_ids, ids_to_continue, num_ids
from gpt2repro.evaluation.likelihoods import encode_pairs
from gpt2repro.publishing import export
from gpt2repro.publishing.agreement import next_tokens
from gpt2repro.records import checkpoints
from gpt2repro.records.saved_models import load_causal_lm
from gpt2repro.training import monitor
from modeling_gpt2repro import GPT2ReproForCausalLM

BEGIN, END, GAP = 1, 2, 70_000


def odd(kind: str) -> PreTrainedTokenizerFast:
    names = {"gap": {"</s>": GAP}, "around": {"<s>": BEGIN, "</s>": END}, "begin": {"<s>": BEGIN}}
    vocab = {"<unk>": 0} | names[kind] | {word: 3 + at for at, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "around":
        both = [("<s>", BEGIN), ("</s>", END)]
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=both
        )
    roles = {"<s>": "bos_token", "</s>": "eos_token"}
    special = {roles[name]: name for name in names[kind]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


KINDS = {  # what begins a text, what ends one, how many ids there are, what a prompt begins with
    "gap": (GAP, [GAP], GAP + 1, []),
    "around": (BEGIN, [END, BEGIN], 3 + len(WORDS), [BEGIN]),
    "begin": (BEGIN, [BEGIN], 3 + len(WORDS), []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids(kind):
    begin, ends, number, before = KINDS[kind]
    tokenizer = odd(kind)
    assert (begin_id(tokenizer), end_ids(tokenizer)) == (begin, ends)
    assert num_ids(tokenizer) == number
    encoder = BulkEncoder(tokenizer)
    assert encoder.eot_id == begin and encoder.dtype == (np.uint32 if kind == "gap" else np.uint16)
    assert ids_to_continue(tokenizer, ["the of", "", "a \udcff"]) == [
        [*before, 3, 4],
        [begin],
        [*before, 8, 0],
    ]


def test_an_end_that_is_spelled_out_stays():
    assert ids_to_continue(odd("around"), ["the </s>"]) == [[BEGIN, 3, END]]


def test_a_beginning_that_is_spelled_out_is_not_doubled():
    assert ids_to_continue(odd("around"), ["<s> the", "<s>"]) == [[BEGIN, 3], [BEGIN]]
    assert ids_to_continue(odd("begin"), ["<s> <s> the"]) == [[BEGIN, BEGIN, 3]]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_scored_is_the_continuation(kind):
    begin, _, _, before = KINDS[kind]
    after, alone = encode_pairs(odd(kind), [("the of", " and to"), ("", "the of")])
    assert (after.ids, after.num_scored) == ([*before, 3, 4, 5, 6], 2)
    assert (alone.ids, alone.num_scored) == ([begin, 3, 4], 2)


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory) -> tuple[str, Path, dict[str, list]]:
    """Trained for 4 steps, with a sample and a benchmark; the prompts and rows that it saw."""
    directory = tmp_path_factory.mktemp(request.param)
    recipe, tasks = write_inputs(directory), task_files(directory / "tasks")
    for file in (directory / "tokenizer").iterdir():
        file.unlink()
    odd(request.param).save_pretrained(directory / "tokenizer")
    seen: dict[str, Any] = {"prompts": [], "rows": []}

    class Seen(monitor.Monitor):
        def report(self, step, rows, *others):
            seen["rows"].append(rows.tokens)
            super().report(step, rows, *others)

    def generate(self, ids, **options):
        seen["prompts"] += ids.tolist()
        return original(self, ids, **options)

    original = GPT2ReproForCausalLM.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT2ReproForCausalLM, "generate", generate)
        patch.setattr("gpt2repro.training.run.open_run.__defaults__", (Seen,))
        without_fresh_processes(patch)
        options = ["--num_steps", "4", "--sample_every", "2", "--sample_prompt", "the of"]
        options += ["--eval_tasks", "ours_lambada", "--eval_tasks_dir", str(tasks)]
        assert train(recipe, directory / "run", *options) == 0
    return request.param, directory / "run", seen


def test_a_run(run):
    kind, directory, seen = run
    begin, ends, number, before = KINDS[kind]
    rows = torch.cat(seen["rows"])
    assert (rows == begin).any() and rows.max() < number
    assert not (rows == END).any() or kind != "around"
    assert seen["prompts"][0] == [*before, 3, 4]  # the others are the export's
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert {"val_loss", "ours_lambada/acc"} <= lines[-1].keys()
    newest, _ = checkpoints.find_latest(directory / "checkpoints")
    for source in (newest, directory / "final"):
        model = load_causal_lm(str(source))
        assert model.config.vocab_size == number
        told = model.generation_config.eos_token_id
        assert (told if isinstance(told, list) else [told]) == ends


def test_generating(run, monkeypatch, capsys):
    kind, directory, _ = run
    begin, ends, _, before = KINDS[kind]
    words = ["--model", str(directory), "--device", "cpu", "--temperature", "0"]
    assert generate.main([*words, "--prompt", "the of", "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("the of")
    given = []
    original = generate._encode
    monkeypatch.setattr(generate, "_encode", lambda *a: given.append(original(*a)) or given[-1])
    for prompt in ("the of", ""):
        assert generate.main([*words, "--prompt", prompt, "--max_new_tokens", "2"]) == 0
    assert [each["input_ids"].tolist() for each in given] == [[[*before, 3, 4]], [[begin]]]
    model = load_causal_lm(str(directory))
    for end in ends:  # whatever ends a text ends what is generated
        model.lm_head.weight.data[:] = 0
        model.transformer.ln_f.bias.data[:] = 1
        model.lm_head.weight.data[end] = 1
        written = model.generate(torch.tensor([[3]]), max_new_tokens=9, do_sample=False)
        assert written.tolist() == [[3, end]]


def test_evaluating_looking_and_exporting(run, tmp_path, monkeypatch):
    kind, directory, _ = run
    _, ends, _, before = KINDS[kind]
    corpus = ["--dataset_name", str(directory.parent / "corpus"), "--num_validation_units", "1"]
    words = ["--model", str(directory), "--tasks", "val,ours_lambada"]
    words += ["--tasks_dir", str(directory.parent / "tasks")]
    output = tmp_path / "results.json"
    assert evaluate.main([*words, *corpus, "--device", "cpu", "--output", str(output)]) == 0
    metrics = (directory / "metrics.jsonl").read_text().splitlines()
    found = json.loads(output.read_text())["results"]
    for name in ("ours_lambada/acc", "ours_lambada/perplexity"):  # as the run scored them
        assert found[name]["value"] == pytest.approx(json.loads(metrics[-1])[name], rel=1e-4)
    seen = []
    monkeypatch.setattr(plots, "_write", lambda pictures, output: {})
    monkeypatch.setattr("gpt2repro.plots.gallery.model_pictures", seen.append)
    (tmp_path / "plots").mkdir()
    options = ["--prompt", "the of", "--output", str(tmp_path / "plots")]
    assert plots.main([str(directory / "final"), *options]) == 0
    assert seen[0].ids.tolist() == [*before, 3, 4]
    model, tokenizer = load_causal_lm(str(directory)), odd(kind)
    assert len(next_tokens(model, tokenizer, "")) == 5  # after `begin_id`
    monkeypatch.setattr(export, "verify", lambda *_: VERIFIED)
    stock = tmp_path / "stock"
    words = ["--model", str(directory), "--format", "gpt2", "--output", str(stock)]
    assert export_verb.main(words) == 0
    told = json.loads((stock / "generation_config.json").read_text())
    assert told["eos_token_id"] == (ends if len(ends) > 1 else ends[0])
    assert told["pad_token_id"] == ends[0]


@pytest.mark.parametrize("run", ["around"], indirect=True)  # the oddest: it takes a process
def test_an_export_is_verified_by_a_fresh_process(run, tmp_path):
    assert export_verb.main(["--model", str(run[1]), "--output", str(tmp_path / "out")]) == 0
