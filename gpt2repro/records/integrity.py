"""Whether a checkpoint is what was saved: all of it is looked at before a run goes on from it.

Its marker lists every file's size and SHA-256, so a byte that changed on the disk is found. What
the files say is checked as well, since a marker proves only what was written.
"""

import json
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2repro.data.rows.stream import SavedStream
from gpt2repro.records.incidents import MAX_IN_A_ROW
from gpt2repro.records.provenance import Chain
from gpt2repro.system import atomic
from gpt2repro.system.text import wrong_fields

MARKER = "COMPLETE"
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
NAME = re.compile(r"step_(\d{8})")  # a checkpoint of that step
FILES = (WEIGHTS, "config.json", OPTIMIZER, STATE)


class SavedFile(BaseModel):
    """A file as the marker lists it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    size: int
    sha256: str


class Marker(RootModel):
    root: dict[str, SavedFile]


class SavedState(BaseModel):
    """What of state.json a run relies on; a caller of `take_snapshot` may keep more in it."""

    model_config = ConfigDict(strict=True)

    step: int = Field(ge=0)
    recipe: dict[str, Any] = {}
    num_epochs: int | None = None
    world_size: int = Field(1, ge=1)
    fitted_to: str | None = None
    metrics_lines: int = Field(0, ge=0)
    permanent: bool = False
    commit: str | None = None
    chain: Chain | None = None
    stream: SavedStream | None = None

    @model_validator(mode="after")
    def _chain_is_of_this_step(self) -> "SavedState":
        if self.chain is not None and self.chain.step != self.step:
            raise ValueError(f"the chain is at step {self.chain.step}")
        return self


def mark(directory: Path) -> None:
    """Write the marker of what `directory` holds now."""
    files = {
        file.name: {"size": file.stat().st_size, "sha256": atomic.sha256(file)}
        for file in sorted(directory.iterdir())
    }
    (directory / MARKER).write_text(json.dumps(files), encoding="utf-8")


def is_whole(path: Path) -> bool:
    """Whether the marker is there and every file has its size. Quick, for what we have written."""
    try:
        files = read_marker(path)
        return all((path / name).stat().st_size == file.size for name, file in files.items())
    except (OSError, ValueError):
        return False


def find_problem(path: Path) -> str | None:
    """Why no run can go on from the checkpoint `path`, in a few words; None if one can.

    Reads all of it, about as long as loading it takes.

    Raises:
        OSError: it cannot be read now, which says nothing about what was saved.
    """
    try:
        files = read_marker(path)
    except FileNotFoundError:
        return f"it has no {MARKER} marker"
    except (IsADirectoryError, NotADirectoryError, ValueError):
        return f"its {MARKER} marker is damaged"
    try:
        for name in sorted({*files, *FILES}):
            if problem := _problem_of_file(path / name, files.get(name)):
                return problem
        state = read_saved_state(path)
        if (named := NAME.fullmatch(path.name)) and int(named[1]) != state.step:
            return f"it is one of step {state.step}"
        return _problem_of_tensors(path, state)
    except ValidationError as error:
        return f"{STATE}: {wrong_fields(error, 1)}"
    except (FileNotFoundError, SafetensorError) as error:  # the former goes while it is looked at
        return f"it cannot be read: {error}"


def read_saved_state(path: Path) -> SavedState:
    return SavedState.model_validate_json((path / STATE).read_bytes())


def read_marker(path: Path) -> dict[str, SavedFile]:
    return Marker.model_validate_json((path / MARKER).read_bytes()).root


def _problem_of_file(path: Path, listed: SavedFile | None) -> str | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        found = None
    if listed is None or found is None or not stat.S_ISREG(found.st_mode):
        return f"it lacks {path.name}"
    if found.st_size != listed.size:
        return f"{path.name} has another size than the marker lists"
    if atomic.sha256(path) != listed.sha256:
        return f"{path.name} was changed or damaged after it was saved"
    return None


def _problem_of_tensors(path: Path, state: SavedState) -> str | None:
    """Numbers that are none, and optimizer state that is lacking or somebody else's."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in _tensors(path / WEIGHTS):
        shapes[name] = tuple(tensor.shape)
        if not tensor.isfinite().all():
            return f"{name} holds values that are not finite"
    keys: dict[str, set[str]] = {name: set() for name in shapes}
    generators = set()
    for name, tensor in _tensors(path / OPTIMIZER):
        if name.startswith("rng."):
            generators.add(name)
            continue
        parameter, _, key = name.rpartition("/")
        shape = shapes.get(parameter)
        if shape is None or not _is_of(tuple(tensor.shape), shape):
            return f"optimizer state {name} belongs to no parameter of the model"
        if not tensor.isfinite().all():
            return f"optimizer state {name} holds values that are not finite"
        keys[parameter].add(key)
    # Before the first update there is none; so many in a row that are skipped end a run.
    lacking = [name for name, its in keys.items() if any(its < others for others in keys.values())]
    if state.step > MAX_IN_A_ROW and not any(keys.values()):
        lacking = sorted(keys)
    if lacking:
        return f"optimizer state of {lacking[0]} is lacking"
    if any(f"rng.{rank}.cpu" not in generators for rank in range(state.world_size)):
        return "a random number generator's state is lacking"
    return None


def _is_of(state: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether state is a parameter's: a count, or of its shape, with 1 where it is a mean."""
    pairs = zip(state, shape, strict=False)
    return not state or (len(state) == len(shape) and all(own in (1, of) for own, of in pairs))


def _tensors(path: Path) -> Iterable[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)
