"""The import arrows: a star of leaves, no circles, no work at import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = {path.stem: path for path in sorted((ROOT / "gpt2repro").glob("*.py"))}
TOP_LEVEL = {
    name: ROOT / f"{name}.py" for name in ("configuration_gpt2repro", "modeling_gpt2repro")
}
FILES = PACKAGE | TOP_LEVEL | {"train_accelerate": ROOT / "train_accelerate.py"}

# Modules that know the recipe or put parts together. All others are leaves and take plain values.
HUBS = {"recipe", "parts", "run", "observation", "finish"}
USE_HUBS = HUBS | {"train_accelerate", "doctor", "stream_stats"}


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "gpt2repro":
            names |= {f"gpt2repro.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def arrows(path: Path) -> set[str]:
    """Which of our modules a file imports."""
    ours = {f"gpt2repro.{name}": name for name in PACKAGE} | {name: name for name in TOP_LEVEL}
    return {ours[name] for name in imported(path) & ours.keys()}


ARROWS = {name: arrows(path) for name, path in FILES.items()}


@pytest.mark.parametrize("name", sorted(FILES.keys() - USE_HUBS))
def test_leaves_know_no_recipe(name):
    assert not ARROWS[name] & HUBS


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_the_model_files_stand_alone(name):
    """They travel with every checkpoint, to places where nothing of ours is installed."""
    packages = {module.partition(".")[0] for module in imported(TOP_LEVEL[name])}
    packages -= set(sys.stdlib_module_names)
    # huggingface_hub is what transformers' own configurations are made with.
    assert packages <= {"torch", "transformers", "huggingface_hub", "configuration_gpt2repro"}


def test_there_are_no_circles():
    remaining = dict(ARROWS)
    while remaining:
        ends = {name for name in remaining if not remaining[name] & remaining.keys()}
        assert ends, f"a circle among {sorted(remaining)}"
        remaining = {name: remaining[name] for name in remaining.keys() - ends}


def test_nothing_is_called_utils():
    assert not [name for name in FILES if "util" in name or "helper" in name or "misc" in name]


def test_the_script_stays_short():
    assert len(FILES["train_accelerate"].read_text().splitlines()) < 200


@pytest.mark.parametrize("name", PACKAGE)
def test_modules_only_define(name):
    """No loops, no calls for their effect, save to register a definition with torch."""
    defining = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    for statement in ast.parse(PACKAGE[name].read_text()).body:
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_script = isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test)
        is_registration = isinstance(statement, ast.Expr) and ".register" in ast.unparse(statement)
        allowed = is_docstring or is_script or is_registration
        assert isinstance(statement, defining) or allowed, ast.unparse(statement)


def test_importing_everything_has_no_side_effects(tmp_path):
    """Nothing is said, written, connected, started or drawn."""
    code = f"""
import importlib, os, pathlib, random, signal, sys, threading
import accelerate, datasets, matplotlib.pyplot, torch, torch._inductor.codecache, transformers
ours = {str(ROOT)!r}
events = []
def audit(event, arguments):
    if event in ("socket.connect", "subprocess.Popen", "os.mkdir", "os.remove", "os.rename"):
        events.append((event, arguments))
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        events.append((event, arguments))
sys.dont_write_bytecode = True
def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    drawn = torch.get_rng_state().tolist(), random.getstate()
    torchs = torch.get_num_threads(), torch.get_default_dtype()
    return handlers, dict(os.environ), drawn, torchs, threading.active_count(), os.getcwd()
before = state()
sys.addaudithook(audit)
for name in {sorted(f"gpt2repro.{name}" for name in PACKAGE if name != "__main__")!r}:
    importlib.import_module(name)
import train_accelerate
assert not events, events
assert [a == b for a, b in zip(before, state())] == [True] * len(before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", ""), result.stderr
    assert not list(tmp_path.iterdir())
