"""The card: valid metadata, every known fact, nothing that nobody handed in."""

import ast
import json
import re
import shlex
from typing import get_args, get_type_hints

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_export import without_fresh_processes
from tiny_run import digests, train, write_inputs

from gpt2repro import UserError
from gpt2repro.data import demo_corpus
from gpt2repro.data.dataset import Dataset, Place
from gpt2repro.publishing.card import (
    add_evaluation,
    completed,
    model_card,
    with_evaluation,
)
from gpt2repro.publishing.card_markdown import with_section
from gpt2repro.publishing.redaction import PATH_FIELDS, redacted
from gpt2repro.recipe import load_recipe
from gpt2repro.recipe_fields import Places, Recipe
from gpt2repro.records import checkpoints
from gpt2repro.training import finish

RECIPE = load_recipe(["--recipe", "gpt2"]).model_dump() | {"dataset_revision": "0123abc"}
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
        "lambada_openai/perplexity": {"value": 38.5, "stderr": 1.1},
        "lambada_openai/acc": {"value": None, "stderr": None},
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
    "tasks": {
        "hellaswag_completion": {
            "dataset": {"name": "Rowan/hellaswag", "title": "HellaSwag"},
            "figures": ["hellaswag/completion_acc", "hellaswag/completion_acc_norm"],
        },
        "lambada_openai": {
            "dataset": {"name": "EleutherAI/lambada_openai", "title": "LAMBADA"},
            "figures": ["lambada_openai/acc", "lambada_openai/perplexity"],
        },
        "val": {"dataset": None},
    },
}
ENVIRONMENT = {"hardware": "8 x NVIDIA H100", "python": "3.11.7", "torch": "2.13.0"}


def card(**changes) -> str:
    facts = {
        "name": "gpt2",
        "recipe": RECIPE,
        "num_parameters": 124_439_808,
        "environment": ENVIRONMENT,
        "metrics": METRICS,
        "command": "accelerate launch train_accelerate.py --recipe gpt2",
        "commit": "89abcdef",
        "num_processes": 8,
        "loss_curve": "loss_curve.png",
        "published_loss": ("OpenAI's", 3.2924),
    }
    return model_card(**facts | changes)


def evaluated(evaluation: dict = EVALUATION) -> str:
    """As `push --evaluation` leaves the card that the run wrote."""
    return with_evaluation(card(), evaluation, "gpt2")


def test_metadata_is_what_the_hub_reads():
    text = evaluated()
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert (data.license, data.language) == ("mit", "en")
    assert data.datasets == ["HuggingFaceFW/fineweb-edu"]
    assert data.base_model is None
    found = {result.metric_name: result for result in data.eval_results}
    hellaswag = found["hellaswag/completion_acc_norm"]
    assert (hellaswag.dataset_type, hellaswag.metric_type) == ("Rowan/hellaswag", "accuracy")
    assert hellaswag.metric_value == 0.3012  # ours, not the published figure
    assert found["lambada_openai/perplexity"].metric_type == "perplexity"
    assert "lambada_openai/acc" not in found  # not a number: not a result
    assert "val/loss" not in found  # held-out text is no dataset of the Hub
    assert found["loss"].metric_value == 3.25 and found["bits_per_byte"].metric_value == 1.01
    # as plain YAML, the form that the Hub's model-index has
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["model-index"][0]["name"] == "gpt2"
    assert all(result["task"]["type"] for result in metadata["model-index"][0]["results"])


def test_every_known_fact_is_there():
    text = evaluated()
    for fact in (
        "124.4 M parameters",
        "revision 0123abc",
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
        "```\naccelerate launch train_accelerate.py --recipe gpt2\n```",
        "of commit `89abcdef`",
        "8 processes",
        "tokenizer openai-community/gpt2",
        "gradients clipped to norm 1.0",
        "dropout 0.0",
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


def test_an_average_has_the_figures_of_its_own():
    """Both are in the table; the metadata are of this model, and so are benchmarks: it has none."""
    figures = {"val_loss_ema": 3.2, "val_bits_per_byte_ema": 0.99}
    figures |= {"hellaswag/acc": 0.3, "hellaswag/acc_stderr": 0.01}
    metrics = [*METRICS[:-1], METRICS[-1] | figures]
    for averaged, loss in ((None, 3.25), ("the mean of two", 3.2)):
        text = card(metrics=metrics, averaged=averaged)
        assert "| step 4 | 3.2500 | 1.0100 |\n" in text
        assert "| step 4, average of the weights | 3.2000 | 0.9900 |\n" in text
        found = {result.metric_name: result for result in ModelCard(text).data.eval_results}
        assert found["loss"].metric_value == loss
        assert ("They are the mean of two." in text) == bool(averaged)
        assert ("hellaswag/acc" in text) != bool(averaged)


def test_what_nobody_said_is_not_there():
    text = model_card(name="mine")
    for absent in ("None", "nan", "## Training", "## Validation", "MFU", "datasets", "model-index"):
        assert absent not in text, absent
    assert ModelCard(text).data.license is None
    cpu = card(metrics=[METRICS[1] | {"mfu": None}], commit=None, loss_curve=None)
    for absent in ("MFU", "## Validation", "## Benchmarks", "loss_curve", "None", "commit"):
        assert absent not in cpu, absent
    assert "100 tokens/s" in cpu


def test_a_local_dataset_is_not_called_the_hubs(tmp_path):
    for name in (demo_corpus.NAME, str(tmp_path), "parquet"):
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
    assert "| Model | started from openai-community/gpt2, in rows of " in text
    assert "M parameters, trained further on " in text
    assert "Its context is" not in text  # it is that of the other
    assert ModelCard(text).data.base_model == "openai-community/gpt2"
    assert ModelCard(text).data.license is None  # theirs goes on
    old_name = card(recipe=recipe | {"init_from": "gpt2"})
    assert ModelCard(old_name).data.base_model == "gpt2"


def test_a_limited_evaluation_says_so():
    text = evaluated(EVALUATION | {"settings": {"limit": 100}})
    assert "Only the first 100 rows" in text
    names = {each.metric_name for each in ModelCard(text).data.eval_results}
    assert names == {"loss", "bits_per_byte"}  # the Hub has no field for that


@pytest.mark.parametrize("form", ["gpt2repro", "gpt2"])
def test_loading_lines_fit_the_form(form):
    text = completed(card(), where="me/name", format=form, verification=["all well"])
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3 and '"me/name"' in code
    assert ("trust_remote_code=True" in code) == (form == "gpt2repro")
    assert "- all well" in text
    again = completed(text, where="me/other", format=form, verification=["again"])
    assert "me/name" not in again and "all well" not in again
    assert again.count("## How to load it") == again.count("## Verification") == 1
    assert again.index("## How to load it") < again.index("## Training")  # it stays in its place


def test_sections_are_added_to_somebody_elses_card():
    text = completed("# Theirs\n\nWords.\n", where="d", format="gpt2", verification=["v"])
    assert text.startswith("# Theirs\n\nWords.\n\n## How to load it\n")
    assert text.endswith("- v\n")


def test_an_evaluation_is_replaced_by_another():
    text = evaluated()
    assert with_evaluation(text, EVALUATION, "gpt2") == text
    better = {"hellaswag/completion_acc_norm": {"value": 0.31, "stderr": 0.004}}
    text = with_evaluation(text, EVALUATION | {"results": better}, "gpt2")
    assert text.count("## Benchmarks") == 1 and "0.3100 ± 0.0040" in text and "0.3012" not in text
    found = {each.metric_name: each.metric_value for each in ModelCard(text).data.eval_results}
    assert found["hellaswag/completion_acc_norm"] == 0.31 and found["loss"] == 3.25
    assert text.index("## Benchmarks") < text.index("## Verification")
    # Somebody else's figure is left alone.
    theirs = with_evaluation(
        text.replace("hellaswag/completion_acc_norm\n", "wer/clean\n", 1), EVALUATION, "gpt2"
    )
    assert "wer/clean" in {each.metric_name for each in ModelCard(theirs).data.eval_results}
    # Of a part of the rows nothing is told there, and the figure of all goes with its table.
    text = with_evaluation(text, EVALUATION | {"settings": {"limit": 10}}, "gpt2")
    names = {each.metric_name for each in ModelCard(text).data.eval_results}
    assert names == {"loss", "bits_per_byte"} and "first 10 rows" in text


def test_a_heading_in_a_block_of_code_is_none():
    code = "```\n## Verification\n```\n"
    text = with_evaluation(f"# Theirs\n\n{code}\n## Verification\n\nYes.\n", EVALUATION, "gpt2")
    assert code in text
    assert text.index(code) < text.index("## Benchmarks") < text.rindex("## Verification")


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"results": 5}',
        '{"results": {"a/acc": 0.5}}',
        '{"results": {"a/acc": {"value": "high"}}}',
        '{"results": {"a/acc": {"value": 1}}, "baseline": [1]}',
        '{"results": {"a/acc": {"value": 1}}, "baseline": {"model": "b"}}',
        '{"results": {"a/acc": {"value": 1}}, "published_not_computed": {"a/acc": 1}}',
        '{"a":' * 20_000,
        "\0",
    ],
)
def test_another_file_is_no_evaluation_and_the_card_stays(tmp_path, content):
    (tmp_path / "README.md").write_text(card())
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"not what `gpt2repro evaluate|cannot be read"):
        add_evaluation(tmp_path / "README.md", tmp_path / "results.json", "gpt2")
    assert (tmp_path / "README.md").read_text() == card()


@pytest.mark.parametrize("metadata", ["model-index:\n- name: x", "license: [", "- a"])
def test_a_card_with_broken_metadata_is_to_blame_itself(tmp_path, metadata):
    text = f"---\n{metadata}\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "results.json").write_text(json.dumps(EVALUATION))
    with pytest.raises(UserError, match=r"README.md: its metadata cannot be read: \S+"):
        add_evaluation(tmp_path / "README.md", tmp_path / "results.json", "gpt2")
    assert (tmp_path / "README.md").read_text() == text


def test_an_evaluation_without_datasets_gives_a_table_only():
    """As its JSON was before it named them."""
    old = {key: value for key, value in EVALUATION.items() if key != "tasks"}
    text = evaluated(old)
    assert "0.3012 ± 0.0046" in text
    assert {each.metric_name for each in ModelCard(text).data.eval_results} == {
        "loss",
        "bits_per_byte",
    }


# --- The card determines the run ------------------------------------------------------------------


def recipe_of(text: str) -> str:
    """The YAML block of a card."""
    return re.search(r"^(`{3,})yaml\n(.*?)\n\1$", text, re.M | re.S)[2]


def test_the_table_has_eleven_rows_and_the_block_has_every_field():
    text = card(num_processes=1)
    table = text.split("## Training\n\n")[1].split("\n\n")[0].splitlines()
    assert len(table) - 2 == 11 and all(line.count("|") == 3 for line in table)
    assert "8 x NVIDIA H100, 1 process |" in text
    assert yaml.safe_load(recipe_of(text)) == RECIPE
    assert [*yaml.safe_load(recipe_of(text))] == [*RECIPE]
    assert text.index("<details>") < text.index("```yaml") < text.index("</details>")
    assert text.index("</details>") < text.index("The exact command")
    assert "\n\n\n" not in text and "\n\n\n" not in model_card(name="mine")


@pytest.mark.parametrize(
    "prompt", ["```\nend", "a ````` b", "|x|", "naïve: 😀 {{ 7 }} # x", "null"]
)
def test_any_text_survives_the_block(prompt):
    text = card(recipe=RECIPE | {"sample_prompt": prompt, "tokenizer_name": "a|b"}, command=prompt)
    assert yaml.safe_load(recipe_of(text))["sample_prompt"] == prompt
    fence = re.search("(`+)yaml", text)[1]
    assert f"\n{fence}\n{prompt}\n{fence}\n" in text and fence not in prompt
    assert "tokenizer a/b |" in text  # a bar would end the cell


def test_headings_in_a_block_are_no_sections():
    prompt = "## Verification\n\n## How to load it\n```\n## Training"
    text = card(command=f"train --sample_prompt '\n{prompt}\n'")
    again = completed(text, where="me/x", format="gpt2", verification=["all well"])
    assert f"\n{prompt}\n" in again
    assert again.index("- all well") > again.index(prompt)


@pytest.mark.parametrize("where", ['a"b', "a```b/c", "it's", "a b", "back\\slash", "l\nf"])
def test_any_directory_is_quoted_where_it_is_loaded_from(where):
    text = completed("# T\n", where=where, format="gpt2repro", verification=[])
    fence = re.search("(`+)python", text)[1]
    code = text.split(f"{fence}python\n")[1].split(f"\n{fence}\n")[0]
    assert where in {n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)}
    ticks, command = re.search(r"(`+) ?(gpt2repro export .*?) ?\1 writes", text, re.S).groups()
    assert shlex.split(command)[3] == where and ticks not in command


def test_a_published_card_names_what_lies_here_without_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private" / "corpus").mkdir(parents=True)
    secret = str(
        tmp_path / "customer x" / "more words, so that the line is long enough to be folded"
    )
    recipe = RECIPE | {
        "dataset_name": "private/corpus",
        "data_files": [f"{secret}/one.parquet", "hf://datasets/a/b/*.parquet", "/srv/all/*.txt"],
        "tokenizer_name": "~/tokenizers/mine",
        "output_dir": "../somewhere/runs",
        "init_from": "openai-community/gpt2",
        "sample_prompt": "and/or this/that",
    }
    command = (
        f"accelerate launch --config_file launch/cpu.yaml /home/me/train_accelerate.py '{secret}'"
    )
    command += " --data_files=/srv/all/*.txt,/srv/a --sample_prompt 'see https://a.b/c/d'"
    evaluation = EVALUATION | {"baseline": EVALUATION["baseline"] | {"model": "/home/me/old"}}
    text = with_evaluation(card(recipe=recipe, command=command), evaluation, "gpt2")
    shown = redacted(text + "\nI used /usr/bin/python.\n")
    for path in ("private/", "customer x/", "/srv", "~/", "../", "/home", str(tmp_path)):
        assert path not in shown, path
    for kept in (
        "trained further on corpus",
        "tokenizer mine",
        "openai-community/gpt2",
        "launch/cpu.yaml train_accelerate.py",
        "https://a.b/c/d",
        "hf://datasets/a/b/*.parquet",
        "and/or this/that",
        "old, computed here",
        "karpathy/build-nanogpt",
    ):
        assert kept in shown, kept
    again = yaml.safe_load(recipe_of(shown))
    assert again.keys() == recipe.keys()
    assert (again["dataset_name"], again["output_dir"]) == ("corpus", "runs")
    assert again["data_files"] == ["one.parquet", "hf://datasets/a/b/*.parquet", "./*.txt"]
    assert "corpus" in {each.dataset_type for each in ModelCard(shown).data.eval_results}
    assert redacted(shown) == shown


@pytest.mark.parametrize("name", ["/home/me/o'brien: x", "file:///home/me/x", "/home/me/ü #b"])
def test_a_published_card_has_no_path_however_yaml_spells_it(name):
    """In the metadata and in the block of the recipe."""
    recipe = RECIPE | {"dataset_name": name, "dataset_revision": None}
    command = f"train --dataset_name {shlex.quote(name)}"
    shown = redacted(card(recipe=recipe, command=command))
    assert "/home" not in shown
    (dataset,) = {each.dataset_type for each in ModelCard(shown).data.eval_results}
    assert dataset == yaml.safe_load(recipe_of(shown))["dataset_name"] == name.rpartition("/")[2]


@pytest.mark.parametrize(
    "option",
    [
        "--main_process_ip ",
        "--main-process-ip=",
        "--rdzv-endpoint=",
        "--master_addr ",
        "--local-addr=",
        "--env ",
        "--aws_secret_access_key ",
        "--rdzv_conf=",
    ],
)
@pytest.mark.parametrize("value", ["10.1.2.3:29500", "HF_TOKEN=hf_a b", "A=it's b"])
def test_a_published_card_names_no_machine_and_no_secret(option, value):
    words = [f"{option}{value}"] if option.endswith("=") else [option.strip(), value]
    text = card(command=shlex.join(["accelerate", "launch", *words, "train.py", "--seed", "1"]))
    assert f"accelerate launch {option}PRIVATE train.py --seed 1\n" in redacted(text)


def test_a_published_card_has_no_path_in_a_command():
    text = card(command="torchrun --log_dir file:///home/me/logs train.py --recipe ../me/a.yaml")
    assert "torchrun --log_dir logs train.py --recipe a.yaml\n" in redacted(text)
    text = card(command="train.py --recipe '../my dir/a b.yaml' --output_dir 'file:///a b/c'")
    assert "train.py --recipe 'a b.yaml' --output_dir 'c'\n" in redacted(text)
    text = card(command="accelerate launch --tpu_use_sudo --multi_gpu train.py")
    assert "--tpu_use_sudo --multi_gpu train.py" in redacted(text)


@pytest.mark.parametrize("fence", ["````", "~~~", "~~~~"])
def test_a_section_is_replaced_and_not_what_looks_like_it(fence):
    shown = f"{fence}\n## Verification\n```\n{fence}\n\nof somebody\n\n"
    before, after = f"# A\n\n## B\n\n{shown}", f"## C\n\n{shown}"
    theirs = f"## Verification\n\n{shown}"
    text = with_section(before + theirs + after + theirs, "Verification", "Ours.")
    assert text == f"{before}## Verification\n\nOurs.\n\n{after.rstrip()}\n"


def test_what_is_no_text_is_spelled_out():
    text = card(name="a\x1b[2Jb", command="say '\u202egnp.exe'")
    assert "\x1b" not in redacted(text) and "a\\x1b[2Jb" in redacted(text)
    assert "\u202e" not in redacted(text)


def test_a_run_is_repeated_from_its_card_alone(tmp_path, monkeypatch):
    """The same rows at every step, from nothing but the text of `final/README.md`."""
    without_fresh_processes(monkeypatch)
    assert train(write_inputs(tmp_path), tmp_path / "first", "--num_steps", "3") == 0
    text = (tmp_path / "first" / "final" / "README.md").read_text(encoding="utf-8")
    assert "train_accelerate.py --recipe" in text

    (tmp_path / "from_card.yaml").write_text(recipe_of(text), encoding="utf-8")
    monkeypatch.setattr(finish, "finish", lambda run: 0)
    assert train(tmp_path / "from_card.yaml", tmp_path / "second") == 0
    assert digests(tmp_path / "second") == digests(tmp_path / "first")
    record = checkpoints.record_of(tmp_path / "second" / "checkpoints" / "step_00000003")
    assert f"| Digest of all rows so far | `{record.rows_digest}` |" in text


def test_a_checkpoint_is_not_given_the_figures_of_an_earlier_model():
    """A line of a step is measured before the step trains: the last ones are of models before."""
    metrics = [{"step": 0, "tokens": 8, "loss": 9.0, "val_loss": 9.0, "val_bits_per_byte": 2.0}]
    recipe = RECIPE | {"batch_tokens": 8, "batch_multiples": [[2, 3]]}
    text = card(recipe=recipe, metrics=metrics, step=4)
    assert ModelCard(text).data.eval_results is None
    assert "| Tokens seen | 64 |" in text  # of two steps of one batch, and two of three
    assert "| Batch | 8 tokens, 3 times that from step 2 |" in text
    assert ModelCard(card(recipe=recipe, metrics=metrics)).data.eval_results is not None


def test_every_field_that_may_name_a_place_is_redacted():
    def places(model) -> set[str]:
        hints = get_type_hints(model, include_extras=True)
        return {
            name
            for name, hint in hints.items()
            if {Place, Places}.intersection((hint, *get_args(hint)))
        }

    found = places(Recipe) | places(Dataset)
    assert found >= {"output_dir", "unit_digests_dir", "data_files", "name"}
    assert found - {"exp_name"} <= {*PATH_FIELDS}
