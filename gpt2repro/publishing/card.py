"""README.md of a published model, written from what the run knows about itself.

The values are computed here and laid out by `card_template.md`. Only known facts are stated: a
value that nobody handed in leaves no row behind. The two sections that depend on where and in which
form the model lies, loading and verification, are filled in (again) by `completed` whenever it is
exported; a push fills in the first.
"""

import json
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from jinja2 import Template

from gpt2repro import UserError
from gpt2repro.data.rows.lanes import Batches
from gpt2repro.publishing.card_markdown import (
    BENCHMARKS,
    LOADING,
    PROVENANCE,
    TRAINING,
    VERIFICATION,
    cell,
    code,
    fence,
    markdown_table,
    section_span,
    with_section,
)
from gpt2repro.publishing.card_metadata import (
    KNOWN_DATASETS,
    datasets_of,
    eval_results,
    is_on_hub,
    metadata,
)
from gpt2repro.publishing.contents import read_json
from gpt2repro.records.metrics import comparable, is_number, scored
from gpt2repro.records.provenance import Record
from gpt2repro.system import atomic

CARD = Path(__file__).with_name("card_template.md")
HOW_TO_LOAD = Path(__file__).with_name("loading_template.md")


Metrics = Sequence[Mapping[str, Any]]  # the lines of a metrics.jsonl


def model_card(
    *,
    name: str,
    recipe: Mapping[str, Any] | None = None,
    num_parameters: int | None = None,
    environment: Mapping[str, str] | None = None,
    metrics: Metrics = (),
    step: int | None = None,
    command: str | None = None,
    commit: str | None = None,
    num_processes: int | None = None,
    loss_curve: str | None = None,
    published_loss: tuple[str, float] | None = None,
    averaged: str | None = None,
    licence: str | None = None,
) -> str:
    """The whole card, with YAML metadata that the Hub accepts.

    Args:
        name, loss_curve: of the model, as its title; of the picture beside the card.
        recipe: every field of the run's recipe, resolved (`dataset_revision` is a commit).
        environment: hardware and versions, as `machine.describe()` gives them.
        metrics: the run's `metrics.jsonl`; throughput and losses come from it.
        step: of a checkpoint within a run. What `metrics` last say is then of an earlier model.
        command, commit: what trained it, its launcher's options included, and of which code.
        published_loss: whose loss on the same held-out text others published, and the loss.
        averaged: which average the weights are, if they are one; `metrics` then tell of both.
        licence: where it is known from elsewhere than a recipe.
    """
    known, environment, validations = recipe or {}, environment or {}, _validations(metrics)
    shown = {k: cell(v) if isinstance(v, str) else v for k, v in known.items()}
    datasets, own_metrics = datasets_of(known), metrics if step is None else ()
    recipe_yaml = yaml.safe_dump(dict(known), sort_keys=False, allow_unicode=True).rstrip()
    card = ModelCard.from_template(
        metadata(name, known, _validations(own_metrics, "_ema" if averaged else ""), licence),
        template_path=str(CARD),
        name=name,
        num_parameters=num_parameters,
        corpus=" and ".join(map(_linked, datasets)),
        data="; ".join(_described(each, datasets) for each in datasets),
        notes=[KNOWN_DATASETS[e["name"]]["note"] for e in datasets if e["name"] in KNOWN_DATASETS],
        recipe=shown,
        recipe_yaml=recipe_yaml,
        fence=fence(recipe_yaml, command or ""),
        command=command,
        commit=commit,
        environment=environment,
        versions=[f"{key} {value}" for key, value in environment.items() if key != "hardware"],
        num_processes=num_processes,
        tokens=_tokens_seen(metrics, known, step),
        rate=_median_of(metrics, "tokens_per_second"),
        mfu=_median_of(metrics, "mfu"),
        loss_curve=loss_curve,
        validations=validations[:1] + validations[1:][-1:] + _validations(metrics[-1:], "_ema"),
        published_loss=published_loss,
        averaged=averaged,
    )
    text = f"{str(card).rstrip()}\n"
    table = _benchmark_table(_benchmarks_of_run(() if averaged else own_metrics, known))
    return with_section(text, BENCHMARKS, table, before=VERIFICATION) if table else text


# --- Sections that are replaced -------------------------------------------------------------------


def completed(card: str, *, where: str, format: str, verification: Sequence[str]) -> str:
    """`card` with its sections on loading (from `where`: Hub id or path) and verification."""
    checked = "\n".join(f"- {line}" for line in verification)
    found = f"Before it was published, these were checked and found right:\n\n{checked}"
    return with_section(with_loading(card, where, format), VERIFICATION, found)


def with_loading(card: str, where: str, format: str, revision: str | None = None) -> str:
    """`card` with examples that load the model from `where`: Hub id or path; `revision` of it."""
    template = Template(HOW_TO_LOAD.read_text(encoding="utf-8"))
    quoted, model, download = json.dumps(where, ensure_ascii=False), shlex.quote(where), ""
    if revision is not None:  # `--model` means the main branch
        quoted += f", revision={json.dumps(revision, ensure_ascii=False)}"
        download = f"hf download {model} --revision {shlex.quote(revision)} --local-dir DIR && "
        model = "DIR"
    command = f"{download}gpt2repro export --model {model} --format gpt2 --output OUT"
    examples = template.render(
        quoted=quoted,
        command=code(command),
        fence=fence(quoted),
        native=format == "gpt2repro",
    )
    return with_section(card, LOADING, examples)


def with_provenance(card: str, record: Record | None) -> str:
    """`card` with what `provenance.json` says; without the section where there is none."""
    if record is None:
        span = section_span(card, PROVENANCE)
        return card[: span[0]] + card[span[1] :] if span else card
    return with_section(card, PROVENANCE, provenance_table(record), before=VERIFICATION)


def provenance_table(record: Record) -> str:
    """The facts of a record, as a card has them."""
    rows = [
        ("Step", f"{record.step}"),
        ("Tokens", f"{record.tokens}"),
        *((f"SHA-256 of `{name}`", f"`{sha256}`") for name, sha256 in record.weights.items()),
        ("Digest of all rows so far", f"`{record.rows_digest}`"),
        ("Commit", f"`{record.commit}`" if record.commit else "not known"),
        ("Checkpoint before", f"`{record.previous}`" if record.previous else "none"),
    ]
    table = markdown_table(("", ""), rows)
    return f"{table}\n\n`provenance.json` says the same; `gpt2repro verify` checks both."


def facts(card: str) -> list[tuple[str, str]]:
    """Names and values of the table on training, as plain text."""
    begin, end = section_span(card, TRAINING) or (0, 0)
    rows = re.findall(r"^\| (\w.*?) \| (.*) \|$", card[begin:end], re.M)
    return [(name, value.replace("`", "")) for name, value in rows]


def with_evaluation(card: str, evaluation: Mapping[str, Any], name: str) -> str:
    """`card` with table and metadata of `gpt2repro evaluate --output`, earlier ones replaced."""
    begin, end = section_span(card, BENCHMARKS) or (0, 0)
    earlier, results = card[begin:end], eval_results(evaluation)
    card = with_section(card, BENCHMARKS, _benchmark_table(evaluation), before=VERIFICATION)
    parsed = ModelCard(card)
    data: Any = parsed.data
    gone = {each.metric_name for each in results}
    gone |= {*re.findall(r"^\| (\S+) \|", earlier, re.M)}  # the table that is replaced
    kept = [each for each in data.eval_results or [] if each.metric_name not in gone]
    data.eval_results = kept + results or None
    data.model_name = data.model_name or name
    return str(parsed)


def read_card(card: Path) -> str:
    """Its text, none if there is none.

    Raises:
        UserError: it is no UTF-8.
    """
    try:
        return card.read_text(encoding="utf-8") if card.is_file() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{card}: it is no UTF-8 text: {error}") from None


def add_evaluation(card: Path, evaluation: Path, name: str) -> str | None:
    """Put what `evaluate --output` wrote of a model into the card of `name`; returns of which.

    Raises:
        UserError: when `evaluation` is another file, or the card's metadata cannot be read.
    """
    text = read_card(card)
    try:
        ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{card}: its metadata cannot be read: {reason}") from None
    try:
        results = read_json(evaluation)
        text = with_evaluation(text, results, name)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"--evaluation {evaluation}: not what `gpt2repro evaluate --output` writes"
        ) from None
    with atomic.new_file(card) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return results.get("model")


def is_provenance(card: str, record: Record) -> bool:
    """Whether its only section on provenance, which is no comment, begins with the record's."""
    begin, end = section_span(card, PROVENANCE) or (0, 0)
    section, above = card[begin:end], card[:begin]
    is_seen = above.rfind("<!--") <= above.rfind("-->")
    is_only = section_span(card[end:], PROVENANCE) is None
    right = f"## {PROVENANCE}\n\n{provenance_table(record)}"
    return is_seen and is_only and section.startswith(right)


# --- Data ---------------------------------------------------------------------------------------


def _linked(dataset: Mapping[str, Any]) -> str:
    name = dataset["name"]
    link = f"[{name}](https://huggingface.co/datasets/{name})" if is_on_hub(name) else name
    return f"{link} `{dataset['config']}`" if dataset["config"] else link


def _described(dataset: Mapping[str, Any], datasets: Sequence[Mapping[str, Any]]) -> str:
    """A dataset in the card's table, with its share of a mixture."""
    files, units = dataset["data_files"], dataset["num_validation_units"]
    share = dataset.get("weight", 1) / sum(each.get("weight", 1) for each in datasets)
    parts = [
        dataset["name"],
        f"weight {share:.3g}" if len(datasets) > 1 else None,
        dataset["config"],
        f"files {', '.join(files)}" if files else None,
        f"split {dataset['split']}",
        f"revision {dataset['revision']}" if dataset["revision"] else None,
        f"the first {units} row groups held out" if units else None,
        f"for {dataset['epochs']} epochs" if dataset.get("epochs") else None,
    ]
    return cell(", ".join(filter(None, parts)))


# --- What the run says ----------------------------------------------------------------------------


def _validations(metrics: Metrics, of: str = "") -> list[tuple[str, float, float | None]]:
    """Step, loss, and bits per byte where known: of the weights, or with "_ema" their average."""
    whose = ", average of the weights" if of else ""
    return [
        (f"step {line['step']:,}{whose}", line[f"val_loss{of}"], bits if is_number(bits) else None)
        for line in comparable(metrics)
        for bits in [line.get(f"val_bits_per_byte{of}")]
        if is_number(line.get(f"val_loss{of}"))
    ]


def _tokens_seen(metrics: Metrics, recipe: Mapping[str, Any], step: int | None) -> int | None:
    if step is not None:
        return Batches(recipe["batch_multiples"]).before(step) * recipe["batch_tokens"]
    return max((r["tokens"] for r in metrics if is_number(r.get("tokens"))), default=None)


def _median_of(metrics: Metrics, key: str) -> float | None:
    """The middle value of a column, which start-up and evaluation steps do not move."""
    values = [record[key] for record in metrics if is_number(record.get(key))]
    return statistics.median(values) if values else None


# --- Benchmarks -----------------------------------------------------------------------------------


def _benchmarks_of_run(metrics: Metrics, recipe: Mapping) -> dict[str, Any]:
    """What the run last scored, in the form of an evaluation."""
    last = next((line for line in reversed(metrics) if scored(line)), {})
    results = {key: {"value": last[key], "stderr": last[f"{key}_stderr"]} for key in scored(last)}
    return {"results": results, "settings": {"limit": recipe.get("eval_tasks_limit")}}


def _benchmark_table(evaluation: Mapping) -> str:
    """Ours, the baseline computed beside it, and what others published, each in a column."""
    ours = evaluation["results"]
    if not ours:
        return ""
    baseline = evaluation.get("baseline", {})
    published = evaluation.get("published_not_computed", {})
    header = ["", "this model"]
    header += [f"{baseline['model']}, computed here"] if baseline else []
    header += ["OpenAI's GPT-2, published"] if published else []
    rows = []
    for key in ours:
        row = [key, _estimate_text(ours[key])]
        row += [_estimate_text(baseline["results"].get(key))] if baseline else []
        row += [f"{published[key]['value']:g}" if key in published else ""] if published else []
        rows.append(row)
    sources = sorted({cell(each["source"]) for each in published.values()})
    note = f"Published figures were not computed here; they are from {'; '.join(sources)}."
    limit = evaluation.get("settings", {}).get("limit")
    short = f"Only the first {limit} rows of each task were scored." if limit else ""
    return "\n\n".join(
        filter(None, [markdown_table(header, rows), short, note if published else ""])
    )


def _estimate_text(estimate: Mapping | None) -> str:
    """`0.2955 ± 0.0046`; an empty cell where there is no figure."""
    if not estimate or estimate["value"] is None:
        return ""
    error = estimate.get("stderr")
    return f"{estimate['value']:.4f}" + (f" ± {error:.4f}" if error is not None else "")
