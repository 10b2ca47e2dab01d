"""`evaluate --certify`: is the yardstick straight? OpenAI's models against their published CORE."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2repro import UserError
from gpt2repro.evaluation.published import PUBLISHED
from gpt2repro.system.text import printable

if TYPE_CHECKING:
    from gpt2repro.evaluation.tables import Table

TOLERANCE = 0.003  # of a published figure, within which ours is called the same


def check_models(arguments: Namespace) -> None:
    """Name the models that there are, if none was; refuse others."""
    known = [name for name in PUBLISHED if "core" in PUBLISHED[name]]
    arguments.models = arguments.models or [f"openai-community/{name}" for name in known]
    for name in arguments.models:
        if Path(name).name not in known:
            raise UserError(f"--models: {name}: published are {', '.join(known)}")


def certify(arguments: Namespace, device: Any) -> tuple["Table", dict[str, dict[str, Any]]]:
    """The CORE of every model beside the published one, and whether they are within TOLERANCE."""
    import sys

    import torch

    from gpt2repro.commands.scored_model import load_for_scoring, score_all
    from gpt2repro.evaluation.core import open_core, read_bundle
    from gpt2repro.evaluation.row_scores import Difference
    from gpt2repro.evaluation.tables import Table, notes, plain
    from gpt2repro.system import ranks

    read_bundle(arguments.core_dir)  # before gigabytes of weights
    estimates, differences, published, content = {}, {}, {}, {}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=arguments.autocast)
    for name in arguments.models:
        loaded = load_for_scoring(name, "--models", arguments)
        loaded.model.to(device)
        max_length = loaded.max_length
        task = open_core(arguments.core_dir, "core", loaded.tokenizer, max_length=max_length)
        with autocast:
            [result] = score_all(loaded, [task], arguments.batch_size)
        ours, there = result.estimates["core"], PUBLISHED[Path(name).name]["core"]
        off, figure = ours.value - there[0], f"{name}/core"
        same = abs(off) <= TOLERANCE
        estimates[figure], published[figure] = ours, there
        differences[figure] = Difference(off, ours.stderr, paired=True)
        content[name] = plain({"core": ours})["core"] | {"published": there[0], "certified": same}
        if ranks.rank() == 0:
            print(printable("\n".join(notes(name, [result]))), file=sys.stderr)
            verdict = f"within {TOLERANCE}" if same else f"NOT within {TOLERANCE}"
            text = f"core {ours.value:.4f} ± {ours.stderr:.4f}, published {there[0]:.4f}"
            print(printable(f"{name}: {text}: {verdict}"), flush=True)
    return Table(["computed"], [estimates], differences, published), content
