"""The card: valid metadata, every known fact, nothing that nobody handed in."""

import hashlib

import pytest
import yaml
from huggingface_hub import ModelCard

from gpt2repro.publishing import model_card

RECIPE = {
    "dataset_name": "HuggingFaceFW/fineweb-edu",
    "dataset_config": "sample-10BT",
    "dataset_split": "train",
    "dataset_revision": "0123abc",
    "data_files": None,
    "num_validation_units": 100,
    "tokenizer_name": "openai-community/gpt2",
    "model_size": "gpt2",
    "n_layer": None,
    "sequence_length": 1024,
    "batch_tokens": 524288,
    "num_steps": 19073,
    "warmup_steps": 715,
    "max_lr": 6e-4,
    "min_lr": 6e-5,
    "optimizer": "adamw",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "mixed_precision": "bf16",
    "dropout": 0.0,
    "seed": 1337,
    "init_from": None,
}
METRICS = [
    {"step": 0, "tokens": 524288, "val_loss": 10.9, "val_bits_per_byte": 3.3, "rows_digest": "0a"},
    {"step": 1, "tokens": 1048576, "tokens_per_second": 100.0, "mfu": 0.4, "rows_digest": "0b"},
    {"step": 2, "tokens": 1572864, "tokens_per_second": 300.0, "mfu": 0.5, "rows_digest": "0c"},
    {"step": 3, "tokens": 2097152, "tokens_per_second": 200.0, "mfu": 0.45, "rows_digest": "0d"},
    {"step": 4, "tokens": 2097152, "val_loss": 3.25, "val_bits_per_byte": 1.01},
]
EVALUATION = {
    "model": "final",
    "results": {
        "hellaswag/completion_acc_norm": {"value": 0.3012, "stderr": 0.0046},
        "lambada/perplexity": {"value": 38.5, "stderr": 1.1},
        "lambada/acc": {"value": None, "stderr": None},
        "val/loss": {"value": 3.2501, "stderr": 0.002},
    },
    "baseline": {
        "model": "openai-community/gpt2",
        "results": {"hellaswag/completion_acc_norm": {"value": 0.2955, "stderr": 0.0046}},
    },
    "published_not_computed": {
        "hellaswag/completion_acc_norm": {"value": 0.2955, "source": "karpathy/build-nanogpt"}
    },
    "settings": {"limit": None},
}
ENVIRONMENT = {"hardware": "8 x NVIDIA H100", "python": "3.11.7", "torch": "2.13.0"}


def card(**changes) -> str:
    facts = {
        "name": "gpt2",
        "recipe": RECIPE,
        "num_parameters": 124_439_808,
        "environment": ENVIRONMENT,
        "metrics": METRICS,
        "evaluation": EVALUATION,
        "command": "accelerate launch train_accelerate.py --recipe gpt2",
        "num_processes": 8,
        "loss_curve": "loss_curve.png",
        "published_loss": ("OpenAI's", 3.2924),
    }
    return model_card.model_card(**facts | changes)


def test_metadata_is_what_the_hub_reads():
    data = ModelCard(card()).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert (data.license, data.language) == ("mit", "en")
    assert data.datasets == ["HuggingFaceFW/fineweb-edu"]
    assert data.base_model is None
    found = {result.metric_name: result for result in data.eval_results}
    hellaswag = found["hellaswag/completion_acc_norm"]
    assert (hellaswag.dataset_type, hellaswag.metric_type) == ("Rowan/hellaswag", "accuracy")
    assert hellaswag.metric_value == 0.3012  # ours, not the published figure
    assert found["lambada/perplexity"].metric_type == "perplexity"
    assert "lambada/acc" not in found  # not a number: not a result
    assert found["loss"].metric_value == 3.25 and found["bits_per_byte"].metric_value == 1.01
    # as plain YAML, the form that the Hub's model-index has
    metadata = yaml.safe_load(card().split("---\n")[1])
    assert metadata["model-index"][0]["name"] == "gpt2"
    assert all(result["task"]["type"] for result in metadata["model-index"][0]["results"])


def test_every_known_fact_is_there():
    text = card()
    for fact in (
        "124.4 M parameters",
        "revision `0123abc`",
        "the first 100 row groups",
        "2,097,152",
        "524,288 tokens",
        "19,073, of which 715 warm-up",
        "0.0006 to 6e-05, cosine",
        "AdamW (betas 0.9, 0.95",
        "bfloat16 autocast",
        "200 tokens/s (median)",
        "45.0 % (median)",
        "8 x NVIDIA H100",
        "torch 2.13.0",
        "accelerate launch train_accelerate.py --recipe gpt2",
        "![Training and validation loss](loss_curve.png)",
        "| step 0 | 10.9000 | 3.3000 |",
        "| step 4 | 3.2500 | 1.0100 |",
        "| OpenAI's, published, not computed here | 3.2924 |",
        "0.3012 ± 0.0046",
        "openai-community/gpt2, computed here",
        "OpenAI's GPT-2, published",
        "from karpathy/build-nanogpt",
        "ODC-By",
        "Its context is 1024 tokens",
    ):
        assert fact in text, fact


def test_the_data_ledger_is_a_digest_of_all_steps():
    digest = hashlib.sha256(b"0 0a\n1 0b\n2 0c\n3 0d\n").hexdigest()
    assert model_card.ledger_digest(METRICS) == (digest, 4)
    assert digest in card()
    other = [METRICS[0], METRICS[1] | {"rows_digest": "ff"}, *METRICS[2:]]
    assert model_card.ledger_digest(other) != (digest, 4)


def test_what_nobody_said_is_not_there():
    text = model_card.model_card(name="mine")
    for absent in ("None", "nan", "## Training", "## Validation", "MFU", "datasets", "model-index"):
        assert absent not in text, absent
    assert ModelCard(text).data.license == "mit"
    cpu = card(metrics=[METRICS[1] | {"mfu": None}], evaluation=None, loss_curve=None)
    for absent in ("MFU", "## Validation", "## Benchmarks", "loss_curve", "None"):
        assert absent not in cpu, absent
    assert "100 tokens/s" in cpu


def test_a_local_dataset_is_not_called_the_hubs(tmp_path):
    for name in ("python-docs", str(tmp_path), "parquet"):
        data = ModelCard(card(recipe=RECIPE | {"dataset_name": name, "dataset_config": None})).data
        assert data.datasets is None
    assert ModelCard(card(recipe=RECIPE | {"dataset_name": "mc4"})).data.language is None


def test_muon_and_a_start_from_other_weights_are_told():
    recipe = RECIPE | {
        "optimizer": "muon",
        "muon_lr": 0.02,
        "muon_momentum": 0.95,
        "muon_weight_decay": 0.0,
        "init_from": "openai-community/gpt2",
    }
    text = card(recipe=recipe)
    assert "Muon on the hidden matrices (lr 0.02" in text
    assert "| Started from | openai-community/gpt2 |" in text
    assert ModelCard(text).data.base_model == "openai-community/gpt2"


def test_a_limited_evaluation_says_so():
    text = card(evaluation=EVALUATION | {"settings": {"limit": 100}})
    assert "Only the first 100 rows" in text


@pytest.mark.parametrize("form", ["gpt2repro", "gpt2"])
def test_loading_lines_fit_the_form(form):
    text = model_card.completed(card(), where="me/name", format=form, verification=["all well"])
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3 and '"me/name"' in code
    assert ("trust_remote_code=True" in code) == (form == "gpt2repro")
    assert "- all well" in text
    again = model_card.completed(text, where="me/other", format=form, verification=["again"])
    assert "me/name" not in again and "all well" not in again
    assert again.count("## How to load it") == again.count("## Verification") == 1
    assert again.index("## How to load it") < again.index("## Training")  # it stays in its place


def test_sections_are_added_to_somebody_elses_card():
    text = model_card.completed(
        "# Theirs\n\nWords.\n", where="d", format="gpt2", verification=["v"]
    )
    assert text.startswith("# Theirs\n\nWords.\n\n## How to load it\n")
    assert text.endswith("- v\n")


def test_an_evaluation_is_added_later_and_replaced():
    """As `push --evaluation` does to the card that the run wrote."""
    text = model_card.with_evaluation(card(evaluation=None), EVALUATION, "gpt2")
    assert text == card()
    better = {"hellaswag/completion_acc_norm": {"value": 0.31, "stderr": 0.004}}
    text = model_card.with_evaluation(text, {"results": better}, "gpt2")
    assert text.count("## Benchmarks") == 1 and "0.3100 ± 0.0040" in text and "0.3012" not in text
    found = {each.metric_name: each.metric_value for each in ModelCard(text).data.eval_results}
    assert found["hellaswag/completion_acc_norm"] == 0.31 and found["loss"] == 3.25
    assert text.index("## Benchmarks") < text.index("## Verification")
