"""`evaluate --certify`: is the yardstick straight? OpenAI's models against their published CORE."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from gpt2repro import UserError
from gpt2repro.evaluation.published import PUBLISHED
from gpt2repro.system.text import printable

TOLERANCE = 0.003  # of a published figure, within which ours is called the same


def check_alone(arguments: Namespace) -> None:
    """Refuse what has no meaning beside --certify, and name the models that there are."""
    for name in ("model", "baseline", "tasks", "preset", "limit", "max_length", "controls", "rows"):
        if getattr(arguments, name):
            raise UserError(f"--{name}: --certify scores whole models of its own, on CORE alone")
    known = [name for name in PUBLISHED if "core" in PUBLISHED[name]]
    arguments.models = arguments.models or [f"openai-community/{name}" for name in known]
    for name in arguments.models:
        if Path(name).name not in known:
            raise UserError(f"--models: {name}: published are {', '.join(known)}")


def certify(arguments: Namespace, device: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    """0 if the CORE of every model is the published one, within TOLERANCE, else 1; the figures."""
    import sys

    import torch

    from gpt2repro.commands.scored_model import load_for_scoring, score_all
    from gpt2repro.evaluation.core import open_core, read_bundle
    from gpt2repro.evaluation.tables import notes, number
    from gpt2repro.system import ranks

    read_bundle(arguments.core_dir)  # before gigabytes of weights
    found: dict[str, dict[str, Any]] = {}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=arguments.autocast)
    for name in arguments.models:
        loaded = load_for_scoring(name, "--models", arguments)
        loaded.model.to(device)
        max_length = loaded.max_length
        task = open_core(arguments.core_dir, "core", loaded.tokenizer, max_length=max_length)
        with autocast:
            [result] = score_all(loaded, [task], arguments.batch_size)
        ours, published = result.estimates["core"], PUBLISHED[Path(name).name]["core"][0]
        same = abs(ours.value - published) <= TOLERANCE
        found[name] = {"value": number(ours.value), "stderr": number(ours.stderr)}
        found[name] |= {"published": published, "certified": same}
        if ranks.rank() == 0:
            print(printable("\n".join(notes(name, [result]))), file=sys.stderr)
            verdict = f"within {TOLERANCE}" if same else f"NOT within {TOLERANCE}"
            figure = f"core {ours.value:.4f} ± {ours.stderr:.4f}, published {published:.4f}"
            print(printable(f"{name}: {figure}: {verdict}"), flush=True)
    return (0 if all(each["certified"] for each in found.values()) else 1), found
