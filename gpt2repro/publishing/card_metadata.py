"""What the Hub reads of a card: licence, data, task, and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from gpt2repro.data import demo_corpus
from gpt2repro.publishing.licence import own_licence
from gpt2repro.system.hub import has_owner, is_hub_id

# What may be said of training data without having been told.
KNOWN_DATASETS = {
    "HuggingFaceFW/fineweb-edu": {"language": "en", "note": "FineWeb-Edu is under ODC-By 1.0."},
    demo_corpus.NAME: {"language": "en", "note": "The text is the documentation in every Python."},
}
# What a result's name contains -> what the Hub calls such a figure.
METRIC_TYPES = {
    "acc": "accuracy",
    "loss": "loss",
    "perplexity": "perplexity",
    "bits_per_byte": "bits_per_byte",
}


def metadata(
    name: str, recipe: Mapping, validations: Sequence[tuple], licence: str | None
) -> ModelCardData:
    """What the Hub reads: licence, library, task, data and the validation loss."""
    names, start = [each["name"] for each in datasets_of(recipe)], recipe.get("init_from")
    dataset = names[0] if len(names) == 1 else ""
    languages = {KNOWN_DATASETS.get(name, {}).get("language") for name in names}
    results = [
        _result(dataset, f"{dataset} (held out)", kind, kind, value)
        for _, loss, bits in validations[-1:]
        for kind, value in (("loss", loss), ("bits_per_byte", bits))
        if dataset and value is not None
    ]
    return ModelCardData(
        license=licence or own_licence(recipe),
        language=languages.pop() if len(languages) == 1 else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2repro"],
        datasets=list(dict.fromkeys(filter(is_on_hub, names))) or None,
        base_model=start if start and is_hub_id(start) and not Path(start).exists() else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def datasets_of(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a recipe reads, each with the fields of an entry of its `datasets`."""
    fields = ("config", "split", "revision")
    one = {field: recipe.get(f"dataset_{field}") for field in fields} | {
        "name": recipe.get("dataset_name") or "",
        "data_files": recipe.get("data_files"),
        "num_validation_units": recipe.get("num_validation_units"),
    }
    return list(recipe.get("datasets") or [one])


def is_on_hub(name: str | None) -> bool:
    return bool(name and has_owner(name) and not Path(name).exists())


def eval_results(evaluation: Mapping) -> list[EvalResult]:
    """What was computed for this model on a dataset of the Hub, which the evaluation names.

    Nothing of a part of its rows: beside others, on the Hub, it would pass for the whole.
    """
    if evaluation.get("settings", {}).get("limit"):
        return []
    datasets = {
        figure: report["dataset"]
        for report in evaluation.get("tasks", {}).values()
        for figure in report.get("figures", [])
        if report.get("dataset")  # held-out text has none, nor have older reports
    }
    found = []
    for key, estimate in evaluation.get("results", {}).items():
        metric = key.partition("/")[2]
        kind = next((kind for end, kind in METRIC_TYPES.items() if end in metric), None)
        if key in datasets and kind and estimate["value"] is not None:
            name, title = datasets[key]["name"], datasets[key]["title"]
            found.append(_result(name, title, key, kind, estimate["value"]))
    return found


def _result(dataset: str, title: str, metric_name: str, kind: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=dataset,
        dataset_name=title,
        metric_type=kind,
        metric_name=metric_name,
        metric_value=round(value, 6),
    )
