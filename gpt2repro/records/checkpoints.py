"""Training state on disk: saved atomically, found again, loaded, pruned.

A checkpoint is a directory `step_00000500/` that holds

    model.safetensors       parameters by their official names, fp32; `from_pretrained` reads it
    config.json             the architecture (and the code files that go with it)
    optimizer.safetensors   optimizer state by parameter name, and every rank's RNG state
    state.json              step, position of the data stream, what the run was made of
    COMPLETE                the marker: written last, lists size and SHA-256 of every other file

It is written under a temporary name beside its place, flushed to disk and renamed, so that a
directory with a matching marker is whole whatever happened meanwhile; integrity.py looks whether it
still is. Parameters are stored whole and by name: any number of processes, sharded or not, can read
them back. No file is a pickle. Rank 0 alone touches the disk.
"""

import contextlib
import copy
import itertools
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel

from gpt2repro import UserError
from gpt2repro.data.rows.lanes import Batches
from gpt2repro.records import integrity
from gpt2repro.records.provenance import Chain, Point, Record
from gpt2repro.system import atomic
from gpt2repro.system.ranks import agree_on, broadcast, gather, rank, reshard, whole, world_size

OURS = ".step_" + 8 * "[0-9]"  # what a checkpoint is on its way to or from its name


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


# --- Saving ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, in rank 0's main memory: training may go on meanwhile."""

    step: int
    config: PreTrainedConfig
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def take_snapshot(
    *, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]
) -> Snapshot:
    """Copy the state of training before `step`; every rank calls.

    Args:
        model: bare, DDP or FSDP2; its innermost module has `config.save_pretrained`.
        state: JSON values that the caller wants back from `state_of`; with a true `permanent` the
            checkpoint is never pruned.
    """
    weights = model_tensors(model)  # whose parameters are the optimizer's own from here on
    its_state = _host_copies(
        (f"{name}/{key}", value)
        for name, parameter in innermost(model).named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    )
    return Snapshot(
        step=step,
        config=copy.deepcopy(innermost(model).config),
        weights=weights,
        optimizer=its_state | _gather_rng_states(),
        state=state | {"step": step},
    )


def write(
    directory: Path, snapshot: Snapshot, *, keep_last: int, keep_permanent: bool = True
) -> Path:
    """Write `snapshot` under `directory` and return its path; rank 0 alone, in any thread.

    Then whole ones are removed, but for the newest `keep_last` and permanent ones.

    Raises:
        UserError: the disk is full or the directory cannot be written. Whatever lay in `directory`
            before is untouched.
    """
    path = checkpoint_path(directory, snapshot.step)
    try:
        scratch = atomic.partial(path)
        save_file(snapshot.weights, scratch / integrity.WEIGHTS, metadata={"format": "pt"})
        snapshot.config.save_pretrained(scratch)
        save_file(snapshot.optimizer, scratch / integrity.OPTIMIZER)
        (scratch / integrity.STATE).write_text(json.dumps(snapshot.state), encoding="utf-8")
        for file in (integrity.WEIGHTS, integrity.OPTIMIZER):
            atomic.let_umask_decide(scratch / file)
        commit(scratch, path)
    except (OSError, SafetensorError) as error:
        for left in directory.glob(f"{OURS}.partial"):
            shutil.rmtree(left, ignore_errors=True)
        raise UserError(
            f"checkpoint {path} could not be written ({error}); earlier ones are untouched. "
            "Free space, keep fewer (keep_last, keep_every), or set output_dir to another disk"
        ) from None
    with contextlib.suppress(OSError):  # it is there all the same
        _prune(directory, keep_last, keep_permanent)
    return path


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the whole parameters on rank 0's CPU by official name, a tied head's once.

    Every rank must call, as a sharded parameter is gathered from all of them; the others get {}.
    """
    reshard(model)
    return _host_copies(innermost(model).named_parameters())


def with_tied_head(weights: dict[str, Any]) -> dict[str, Any]:
    """What a strict loading asks for: a tied head, which `model_tensors` leaves out, is there."""
    embedding = "transformer.wte.weight"
    return {"lm_head.weight": weights[embedding]} | weights if embedding in weights else weights


def _host_copies(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole copies on rank 0's CPU; every rank must call.

    By hand, because torch's `get_optimizer_state_dict` fills an optimizer that has no state yet by
    taking a step, which Adam counts; and its loading wants the groups, which are the recipe's.
    """
    copies = {}
    for name, tensor in named:
        full = whole(tensor.detach())  # all ranks take part; none but the first keeps it
        if rank() == 0:
            copies[name] = _host_place(full).copy_(full, non_blocking=full.is_cuda)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copies


def _host_place(tensor: Tensor) -> Tensor:
    """Pinned for what is on a GPU: copied as fast as the bus is. torch keeps it for the next time.

    Where the system has none to pin, ordinary memory does.
    """
    with contextlib.suppress(RuntimeError):
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def commit(scratch: Path, path: Path) -> None:
    """Mark `scratch` complete, flush it to disk and give it its final name."""
    integrity.mark(scratch)
    atomic.move_into_place(scratch, path)


def _prune(directory: Path, keep_last: int, keep_permanent: bool) -> None:
    """Remove what killed writers left, and whole checkpoints that are not to be kept.

    A copy that somebody keeps under a name of its own, `step_00000500.best`, stays.
    """
    whole_ones = [path for path in _in_order(directory) if integrity.is_whole(path)]
    old = [path for path in whole_ones[:-keep_last] if not (keep_permanent and _is_permanent(path))]
    for path in old:  # under a name that the next one removes: killed here, nothing is left
        with contextlib.suppress(OSError):
            path.rename(path.with_name(f".{path.name}.old"))
    for path in directory.glob(f"{OURS}.*"):
        shutil.rmtree(path, ignore_errors=True)


def _is_permanent(path: Path) -> bool:
    """As it was saved, whatever the recipe says by now; one that cannot be read is for a person."""
    try:
        return bool(state_of(path).get("permanent"))
    except (ValueError, AttributeError):
        return True


def put_back(directory: Path) -> None:
    """What was to be replaced by the same step, if a kill came before that had its name."""
    for path in directory.glob(f"{OURS}.previous"):
        place = directory / path.name.removeprefix(".").removesuffix(".previous")
        if not place.exists():
            path.rename(place)


def permanent_ones(directory: Path) -> list[tuple[int, Path]]:
    """Step and directory of the whole permanent checkpoints, the oldest first."""
    found = [path for path in _in_order(directory) if integrity.is_whole(path)]
    return [(int(path.name[5:]), path) for path in found if _is_permanent(path)]


def _in_order(directory: Path) -> list[Path]:
    """The checkpoints under names of ours, whole or not, the oldest first."""
    paths = sorted(directory.glob("step_*"))
    return [path for path in paths if integrity.NAME.fullmatch(path.name)]


def newer(directory: Path, step: int) -> list[Path]:
    """What is of a later step."""
    name = checkpoint_path(directory, step).name
    return [path for path in _in_order(directory) if path.name > name]


def supersede(directory: Path, step: int) -> None:
    """Set aside what is newer than `step`: a run that goes back there starts another line."""
    for path in newer(directory, step):
        aside = directory / "superseded"
        aside.mkdir(exist_ok=True)
        # Of an earlier line there may be one: step_00000500, then step_00000500.2, ...
        names = (f"{path.name}.{n}" if n > 1 else path.name for n in itertools.count(1))
        path.rename(next(aside / name for name in names if not (aside / name).exists()))


# --- Finding --------------------------------------------------------------------------------------


def find_latest(directory: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint under `directory` that a run can go on from.

    Also the newer ones that none can, each with the reason.

    Raises:
        UserError: one cannot be read now. To pass over it would be to set aside what is whole.
    """
    broken: dict[Path, str] = {}
    for path in reversed(_in_order(directory)):
        try:
            problem = integrity.find_problem(path)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error}. It may be whole: nothing was changed; make it "
                "readable, or move it away to go on without it"
            ) from None
        if problem is None:
            return path, broken
        broken[path] = problem
    return None, broken


def state_of(path: Path) -> dict[str, Any]:
    """What `take_snapshot` was given, with `step`, of a checkpoint that `find_latest` has found."""
    return json.loads((path / integrity.STATE).read_bytes())


def read_state(path: Path, option: str = "--resume") -> dict[str, Any]:
    """`state_of` a checkpoint that a user names with `option`.

    Raises:
        UserError: there is no checkpoint at `path` that a run can go on from.
    """
    if not path.is_dir():
        raise UserError(f"{option} {path}: no such checkpoint directory")
    try:
        problem = integrity.find_problem(path)
    except OSError as error:
        raise UserError(f"{option} {path} cannot be read: {error}") from None
    if problem:
        newest = ", and --resume auto takes the newest valid one" if option == "--resume" else ""
        raise UserError(
            f"{option} {path}: no complete checkpoint: {problem}; a run's are in its checkpoints/"
            f"{newest}"
        )
    return state_of(path)


# --- The chain ------------------------------------------------------------------------------------


def record_of(path: Path) -> Record | None:
    """What the checkpoint's provenance is published as; None for one without a chain."""
    state = integrity.read_saved_state(path)
    if state.chain is None:
        return None
    batches = Batches(state.recipe["batch_multiples"]).before(state.step)
    return state.chain.record(
        permanent=state.permanent,
        tokens=batches * state.recipe["batch_tokens"],
        weights={integrity.WEIGHTS: integrity.read_marker(path)[integrity.WEIGHTS].sha256},
        commit=state.commit,
    )


def chain_after(path: Path | None, *, is_own: bool, again: bool = False) -> Chain:
    """The chain as it goes on from the checkpoint `path`, or as it begins without one.

    From one of another run, which is not `is_own`, another chain begins, of all the rows so far.
    One that is to be written `again` has the same record then, and is linked when it is.
    """
    if path is None:
        return Chain()
    state = integrity.read_saved_state(path)
    chain = state.chain or Chain(begin=Point(step=state.step))
    if not again:
        chain.link(record_of(path))
    if not is_own:
        chain.begin_here()
        chain.previous = None
    return chain


# --- Loading --------------------------------------------------------------------------------------


def load(path: Path, *, model: nn.Module, optimizer: Optimizer) -> None:
    """Put the checkpoint's tensors into `model` and `optimizer`; every rank calls, rank 0 reads.

    Raises:
        UserError: a file cannot be read, or holds another architecture or optimizer.
    """
    weights: dict[str, Any] = {}
    rest: dict[str, Tensor] = {}
    problem = None
    if rank() == 0:
        try:
            weights = load_file(path / integrity.WEIGHTS)
            rest = load_file(path / integrity.OPTIMIZER)
            problem = _mismatch(weights, innermost(model))
        except (OSError, SafetensorError) as error:
            problem = f"cannot be read: {error}"
    agree_on(problem and f"--resume {path}: {problem}")

    parameters = dict(innermost(model).named_parameters())
    states = {name: each.shape for name, each in rest.items() if not name.startswith("rng.")}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world_size() > 1)
    set_model_state_dict(model, with_tied_head(weights), options=options)
    with torch.no_grad():
        optimizer.state.clear()
        for name, shape in broadcast(states).items():
            parameter, key = parameters[name.rsplit("/", 1)[0]], name.rsplit("/", 1)[1]
            # A count and means over rows or columns are whole on every rank; the rest is sharded.
            other = torch.empty(shape, device=parameter.device)
            like = parameter if shape == parameter.shape else other
            optimizer.state[parameter][key] = _fill(torch.zeros_like(like), rest.get(name))
    _restore_rng_state({name: rest[name] for name in rest.keys() - states.keys()})


def _fill(target: Tensor, source: Tensor | None) -> Tensor:
    """Copy rank 0's whole `source` into every rank's `target`, sharded or not; return it."""
    full = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    if source is not None:
        full.copy_(source)
    if world_size() > 1:
        dist.broadcast(full, src=0)
    if isinstance(target, DTensor):
        full = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
    return target.copy_(full)


def _mismatch(tensors: dict[str, Tensor], model: nn.Module) -> str | None:
    """What keeps `tensors` from being this model's parameters, or None."""
    expected = {name: p.shape for name, p in model.named_parameters()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            place = "the model" if name in expected else "the checkpoint"
            return f"another architecture: {name} is only in {place}"
        if tensors[name].shape != expected[name]:
            ours, theirs = tuple(expected[name]), tuple(tensors[name].shape)
            return (
                f"another architecture: {name} is {theirs} in the checkpoint, {ours} in the model"
            )
    return None


# --- Ranks ----------------------------------------------------------------------------------------


def innermost(model: nn.Module) -> PreTrainedModel:
    """The model inside a DDP wrapper; FSDP2 and in-place compilation do not wrap."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def get_random_state() -> dict[str, Tensor]:
    """Of this process's generators; a GPU's only where it is in use, for asking would open it."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """What `get_random_state` gave; a generator that it lacks, or that is not in use, stays."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def _gather_rng_states() -> dict[str, Tensor]:
    """Every rank's random number generator states by names like `rng.3.cuda`."""
    return {
        f"rng.{r}.{kind}": state
        for r, each in enumerate(gather(get_random_state()))
        for kind, state in each.items()
    }


def _restore_rng_state(rng: dict[str, Tensor]) -> None:
    """Restore this rank's generators; ranks that the saving run did not have keep their own."""
    own = f"rng.{rank()}."
    states = broadcast(rng).items()
    set_random_state({n.removeprefix(own): each for n, each in states if n.startswith(own)})
