"""README.md of a published model, written from what the run knows about itself.

Only known facts are stated: a value that nobody handed in leaves no row behind. The two sections
that depend on where and in which form the model lies, loading and verification, are filled in
(again) by `completed` whenever it is exported or pushed.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

LOADING, VERIFICATION, BENCHMARKS = "How to load it", "Verification", "Benchmarks"

# What the metadata may say about training data without having been told.
KNOWN_DATASETS = {
    "HuggingFaceFW/fineweb-edu": {"language": "en", "note": "FineWeb-Edu is under ODC-By 1.0."},
    "python-docs": {"language": "en", "note": "The text is the documentation in every Python."},
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# First part of a result's name in `gpt2repro evaluate` -> the dataset on the Hub and its title.
DATASETS = {
    "hellaswag": ("Rowan/hellaswag", "HellaSwag"),
    "lambada": ("EleutherAI/lambada_openai", "LAMBADA (OpenAI's version)"),
    "wikitext2": ("Salesforce/wikitext", "WikiText-2"),
}
METRIC_TYPES = {
    "acc": "accuracy",
    "loss": "loss",
    "perplexity": "perplexity",
    "bits_per_byte": "bits_per_byte",
}

PRECISIONS = {"no": "float32", "bf16": "bfloat16 autocast"}

Metrics = Sequence[Mapping[str, Any]]  # the lines of a metrics.jsonl


def model_card(
    *,
    name: str,
    recipe: Mapping[str, Any] | None = None,
    num_parameters: int | None = None,
    environment: Mapping[str, str] | None = None,
    metrics: Metrics = (),
    evaluation: Mapping[str, Any] | None = None,
    command: str | None = None,
    num_processes: int | None = None,
    loss_curve: str | None = None,
    published_loss: tuple[str, float] | None = None,
    license: str = "mit",
) -> str:
    """The whole card, with YAML metadata that the Hub accepts.

    Args:
        name: of the model, as its title.
        recipe: every field of the run's recipe, resolved (`dataset_revision` is a commit).
        environment: hardware and versions, as `environment.describe()` gives them.
        metrics: the run's `metrics.jsonl`; throughput, losses and the data ledger come from it.
        evaluation: the JSON of `gpt2repro evaluate --output`.
        command: the command line that trained the model.
        loss_curve: name of the picture beside the card.
        published_loss: whose validation loss others published for the same held-out text, and the
            loss in nats per token.
        license: of the weights.
    """
    recipe = recipe or {}
    parts = [
        f"---\n{metadata(name, recipe, metrics, license)}\n---",
        f"# {name}",
        introduction(recipe, num_parameters),
        f"## {LOADING}",
        training_section(recipe, metrics, environment or {}, command, num_processes),
        f"![Training and validation loss]({loss_curve})" if loss_curve else "",
        validation_section(metrics, published_loss),
        f"## {VERIFICATION}",
        limitations(recipe),
    ]
    card = "\n\n".join(filter(None, parts)) + "\n"
    return with_evaluation(card, evaluation, name) if evaluation else card


def completed(card: str, *, where: str, format: str, verification: Sequence[str]) -> str:
    """`card` with its sections on loading (from `where`: Hub id or path) and verification."""
    card = with_section(card, LOADING, loading(where, format))
    checked = "\n".join(f"- {line}" for line in verification)
    found = f"Before it was published, these were checked and found right:\n\n{checked}"
    return with_section(card, VERIFICATION, found)


def with_evaluation(card: str, evaluation: Mapping[str, Any], name: str) -> str:
    """`card` with table and metadata of `gpt2repro evaluate --output`, earlier ones replaced."""
    card = with_section(card, BENCHMARKS, benchmark_table(evaluation), before=VERIFICATION)
    parsed = ModelCard(card)
    data: Any = parsed.data
    results = eval_results(evaluation)
    names = {each.metric_name for each in results}
    kept = [each for each in data.eval_results or [] if each.metric_name not in names]
    data.eval_results = kept + results or None
    data.model_name = data.model_name or name
    return str(parsed)


def with_section(card: str, title: str, text: str, before: str | None = None) -> str:
    """Replace the text of the section `title`, or insert it `before` another or at the end."""
    section = f"## {title}\n\n{text}\n\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(card):
        card = pattern.sub(lambda _: section, card, count=1)
    elif before and f"\n## {before}\n" in card:
        card = card.replace(f"\n## {before}\n", f"\n{section}## {before}\n", 1)
    else:
        card = f"{card.rstrip()}\n\n{section}"
    return card.rstrip() + "\n"


# --- Metadata -----------------------------------------------------------------------------------


def metadata(name: str, recipe: Mapping, metrics: Metrics, license: str) -> str:
    """The YAML that the Hub reads: licence, library, task, data and the validation loss."""
    dataset, start = str(recipe.get("dataset_name", "")), recipe.get("init_from")
    results = [
        result(dataset, f"{dataset} (held out)", key, METRIC_TYPES[key], value)
        for key, value in last_validation(metrics).items()
        if dataset
    ]
    data = ModelCardData(
        license=license,
        language=KNOWN_DATASETS.get(dataset, {}).get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2repro"],
        datasets=[dataset] if is_hub_id(dataset) else None,
        base_model=start if is_hub_id(start) else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def is_hub_id(name: str | None) -> bool:
    return bool(name and HUB_ID.fullmatch(name) and not Path(name).exists())


def eval_results(evaluation: Mapping) -> list[EvalResult]:
    """What was computed for this model; figures published by others are not among them."""
    found = []
    for key, estimate in evaluation.get("results", {}).items():
        task, _, metric = key.partition("/")
        kind = next((kind for end, kind in METRIC_TYPES.items() if end in metric), None)
        if task in DATASETS and kind and estimate["value"] is not None:
            found.append(result(*DATASETS[task], key, kind, estimate["value"]))
    return found


def result(dataset: str, title: str, metric_name: str, kind: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=dataset,
        dataset_name=title,
        metric_type=kind,
        metric_name=metric_name,
        metric_value=round(value, 6),
    )


# --- What the run says --------------------------------------------------------------------------


def last_validation(metrics: Metrics) -> dict[str, float]:
    """`loss` and `bits_per_byte` of the last validation, in nats per token and bits."""
    for record in reversed(metrics):
        if is_number(record.get("val_loss")):
            keys = {"loss": "val_loss", "bits_per_byte": "val_bits_per_byte"}
            return {key: record[name] for key, name in keys.items() if is_number(record.get(name))}
    return {}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def median_of(metrics: Metrics, key: str) -> float | None:
    """The middle value of a column, which start-up and evaluation steps do not move."""
    values = sorted(record[key] for record in metrics if is_number(record.get(key)))
    return values[len(values) // 2] if values else None


def ledger_digest(metrics: Metrics) -> tuple[str, int] | None:
    """SHA-256 over `step rows_digest` lines, and their number: the text this model saw, in order.

    Two runs with equal digests trained on the same rows at every logged step.
    """
    lines = [f"{r['step']} {r['rows_digest']}\n" for r in metrics if r.get("rows_digest")]
    if not lines:
        return None
    return hashlib.sha256("".join(lines).encode()).hexdigest(), len(lines)


# --- Sections -----------------------------------------------------------------------------------


def introduction(recipe: Mapping, num_parameters: int | None) -> str:
    size = f" of {num_parameters / 1e6:.1f} M parameters" if num_parameters else ""
    data = ""
    if dataset := recipe.get("dataset_name"):
        shown = f"[{dataset}](https://huggingface.co/datasets/{dataset})"
        data = f", pretrained on {shown if is_hub_id(dataset) else dataset}"
        data += f" `{recipe['dataset_config']}`" if recipe.get("dataset_config") else ""
    return (
        f"A GPT-2 (Radford et al. 2019){size}{data}. Its tensors have the official names and "
        "layouts, so every GPT-2 tool reads them."
    )


def loading(where: str, format: str) -> str:
    native = format == "gpt2repro"
    trust = ", trust_remote_code=True" if native else ""
    code = f"""\
```python
from transformers import pipeline
generate = pipeline("text-generation", "{where}"{trust})
print(generate("The meaning of", max_new_tokens=40)[0]["generated_text"])
```"""
    if native:
        note = f"""\
`trust_remote_code=True` runs `modeling_gpt2repro.py` and `configuration_gpt2repro.py`, which lie
beside this card; `AutoModelForCausalLM` and `AutoModel` take the same flag. It is not needed where
gpt2repro is installed and imported (`import modeling_gpt2repro`). For tools that run no remote code
(vLLM, llama.cpp, TGI), `gpt2repro export --model {where} --format gpt2 --output OUT` writes the
same tensors with a stock configuration."""
    else:
        note = """\
This is the stock form: no remote code, any tool that takes `openai-community/gpt2` takes it."""
    return f"{code}\n\n{note}\n\n{PADDING_NOTE}"


PADDING_NOTE = """\
GPT-2 has no padding token. To generate for several prompts at once, set
`tokenizer.pad_token = tokenizer.eos_token` and `tokenizer.padding_side = "left"`."""


def training_section(
    recipe: Mapping,
    metrics: Metrics,
    environment: Mapping[str, str],
    command: str | None,
    num_processes: int | None,
) -> str:
    rows = data_rows(recipe, metrics) | recipe_rows(recipe) | speed_rows(metrics, num_processes)
    if environment:
        versions = [f"{k} {v}" for k, v in environment.items() if k != "hardware"]
        rows |= {"Hardware": environment.get("hardware"), "Versions": ", ".join(versions)}
    if ledger := ledger_digest(metrics):
        rows["Data ledger"] = f"`{ledger[0]}` (SHA-256 over `rows_digest` of {ledger[1]:,} steps)"
    rows = {key: value for key, value in rows.items() if value not in (None, "")}
    if not rows and not command:
        return ""
    note = KNOWN_DATASETS.get(recipe.get("dataset_name", ""), {}).get("note", "")
    said = f"The exact command:\n\n```\n{command}\n```" if command else ""
    table = markdown_table(["", ""], [[k, str(v)] for k, v in rows.items()]) if rows else ""
    return "\n\n".join(filter(None, ["## Training", table, note, said]))


def data_rows(recipe: Mapping, metrics: Metrics) -> dict[str, str | None]:
    files = recipe.get("data_files")
    words = [recipe.get("dataset_name"), recipe.get("dataset_config")]
    words += [f"files {', '.join(files)}" if files else None]
    words += [f"split {recipe['dataset_split']}" if recipe.get("dataset_split") else None]
    revision = recipe.get("dataset_revision")
    words += [f"revision `{revision}`" if revision else None]
    seen = max((r["tokens"] for r in metrics if is_number(r.get("tokens"))), default=None)
    held_out = recipe.get("num_validation_units")
    return {
        "Data": ", ".join(filter(None, words)),
        "Held out": f"the first {held_out} row groups" if held_out else None,
        "Tokenizer": recipe.get("tokenizer_name"),
        "Tokens seen": f"{seen:,}" if seen else None,
    }


def recipe_rows(recipe: Mapping) -> dict[str, str | None]:
    if not recipe:
        return {}
    get = recipe.get
    shape = ", ".join(f"{k} {get(k)}" for k in ("n_layer", "n_head", "n_embd") if get(k))
    adam = f"betas {get('adam_beta1')}, {get('adam_beta2')}, epsilon {get('adam_epsilon')}"
    context = f"context {get('sequence_length')}" if get("sequence_length") else None
    warmup = f", of which {get('warmup_steps')} warm-up" if get("warmup_steps") else ""
    optimizer = f"AdamW ({adam}, weight decay {get('weight_decay')})"
    if get("optimizer") == "muon":
        optimizer = (
            f"Muon on the hidden matrices (lr {get('muon_lr')}, momentum {get('muon_momentum')}, "
            f"weight decay {get('muon_weight_decay')}), {optimizer} on the rest"
        )
    return {
        "Model": ", ".join(filter(None, [get("model_size"), shape, context])),
        "Batch": f"{get('batch_tokens'):,} tokens" if get("batch_tokens") else None,
        "Steps": f"{get('num_steps'):,}{warmup}" if get("num_steps") else None,
        "Learning rate": f"{get('max_lr')} to {get('min_lr')}, cosine" if get("max_lr") else None,
        "Optimizer": optimizer if get("optimizer") else None,
        "Gradient clipping": str(get("max_grad_norm")) if get("max_grad_norm") else None,
        "Precision": PRECISIONS.get(get("mixed_precision", "")),
        "Dropout, seed": f"{get('dropout')}, {get('seed')}" if get("seed") is not None else None,
        "Started from": get("init_from"),
    }  # fmt: skip


def speed_rows(metrics: Metrics, num_processes: int | None) -> dict[str, str | None]:
    rate, mfu = median_of(metrics, "tokens_per_second"), median_of(metrics, "mfu")
    return {
        "Processes": str(num_processes) if num_processes else None,
        "Throughput": f"{rate:,.0f} tokens/s (median)" if rate else None,
        "MFU": f"{100 * mfu:.1f} % (median)" if mfu else None,
    }


def validation_section(metrics: Metrics, published_loss: tuple[str, float] | None) -> str:
    """The first and the last validation, and a figure that others published for the same text."""
    evaluated = [r for r in metrics if is_number(r.get("val_loss"))]
    if not evaluated:
        return ""
    rows = []
    for record in [evaluated[0], *evaluated[1:][-1:]]:
        bits = record.get("val_bits_per_byte")
        bits = f"{bits:.4f}" if is_number(bits) else ""
        rows.append([f"step {record['step']:,}", f"{record['val_loss']:.4f}", bits])
    if published_loss:
        whose, loss = published_loss
        rows.append([f"{whose}, published, not computed here", f"{loss:g}", ""])
    header = ["", "Validation loss (nats per token)", "Bits per byte"]
    return f"## Validation\n\n{markdown_table(header, rows)}"


def benchmark_table(evaluation: Mapping) -> str:
    """Ours, the baseline computed beside it, and what others published, each in a column."""
    ours = evaluation.get("results", {})
    if not ours:
        return ""
    baseline = evaluation.get("baseline", {})
    published = evaluation.get("published_not_computed", {})
    header = ["", "this model"]
    header += [f"{baseline['model']}, computed here"] if baseline else []
    header += ["OpenAI's GPT-2, published"] if published else []
    rows = []
    for key in ours:
        row = [key, estimate_text(ours[key])]
        row += [estimate_text(baseline["results"].get(key))] if baseline else []
        row += [f"{published[key]['value']:g}" if key in published else ""] if published else []
        rows.append(row)
    sources = sorted({each["source"] for each in published.values()})
    note = f"Published figures were not computed here; they are from {'; '.join(sources)}."
    settings = evaluation.get("settings", {})
    limit = settings.get("limit")
    short = f"Only the first {limit} rows of each task were scored." if limit else ""
    return "\n\n".join(
        filter(None, [markdown_table(header, rows), short, note if published else ""])
    )


def estimate_text(estimate: Mapping | None) -> str:
    """`0.2955 ± 0.0046`; an empty cell where there is no figure."""
    if not estimate or estimate["value"] is None:
        return ""
    error = estimate.get("stderr")
    return f"{estimate['value']:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def limitations(recipe: Mapping) -> str:
    reach = ""
    if context := recipe.get("sequence_length"):
        reach = f" Its context is {context} tokens; positions are learned, so none is beyond."
    return (
        "## Limitations\n\n"
        "This is a base model: it continues text, follows no instructions, and states what is "
        "false as fluently as what is true. What its training text holds, prejudice included, it "
        f"may say again; nothing was done to align it.{reach}"
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
