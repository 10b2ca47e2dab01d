"""The house: rooms, the arrows between them, and that nothing happens at import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL = {"configuration_gpt2repro", "modeling_gpt2repro"}
# The rooms within a room may import what lies below them and nothing else of that room.
ROOMS_OF_DATA = ["tokens", "corpora", "rows"]
# What each room may import besides itself and `gpt2repro`, which is the version and `UserError`.
MAY_IMPORT: dict[str, set[str]] = {
    "system": set(),
    "recipe_fields": {"data"},
    "recipe": {"system", "data", "recipe_fields"},
    "model": set(),
    "data": {"system"},
    "speed": {"model"},
    "records": {"system", "data", "model"},
    "evaluation": {"system", "data", "model", "speed"},  # data says how a text begins
    "plots": {"system", "records", "evaluation"},
    "publishing": {"system", "data", "records", "model"},
}
MAY_IMPORT["training"] = {*MAY_IMPORT}
MAY_IMPORT["commands"] = {*MAY_IMPORT}
MAY_IMPORT["__main__"] = {"system", "commands"}
MAY_IMPORT["train_accelerate"] = {*MAY_IMPORT} - {"__main__"}

PACKAGE = sorted(ROOT.glob("gpt2repro/**/*.py"))
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*PACKAGE, *(ROOT / f"{name}.py" for name in sorted(MODEL | {"train_accelerate"}))]
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def room_of(name: str) -> str:
    if name in MODEL:
        return "model"
    return name.removeprefix("gpt2repro.").partition(".")[0]


def imported(tree: ast.AST) -> set[str]:
    """Names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in inner if name in FILES} or {node.module}
    return names


# file -> which of our files it imports; the package itself, which holds `UserError`, is left out.
ARROWS = {name: (imported(tree) & FILES.keys()) - {"gpt2repro"} for name, tree in TREES.items()}


def floors(arrows: dict[str, set[str]]) -> dict[str, int]:
    """Each node's level: 1 imports none of the others, n + 1 something on level n."""
    levels: dict[str, int] = {}
    while len(levels) < len(arrows):
        found = {
            name: 1 + max((levels[other] for other in others), default=0)
            for name, others in arrows.items()
            if name not in levels and others <= levels.keys()
        }
        assert found, f"a circle among {sorted(arrows.keys() - levels.keys())}"
        levels |= found
    return levels


# --- Arrows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"gpt2repro"}))
def test_arrows_go_one_way(name):
    room = room_of(name)
    rooms = {room_of(other) for other in ARROWS[name]} - {room}
    assert rooms <= MAY_IMPORT[room], rooms - MAY_IMPORT[room]


def test_there_are_no_circles_and_few_levels():
    """Neither between files nor between rooms."""
    floors(ARROWS)
    rooms: dict[str, set[str]] = {room_of(name): set() for name in ARROWS if name != "gpt2repro"}
    for name, others in ARROWS.items():
        if name != "gpt2repro":
            rooms[room_of(name)] |= {room_of(other) for other in others} - {room_of(name)}
    assert max(floors(rooms).values()) <= 9


@pytest.mark.parametrize("floor", range(len(ROOMS_OF_DATA)))
def test_data_goes_from_texts_to_rows(floor):
    below = tuple(f"gpt2repro.data.{room}." for room in ROOMS_OF_DATA[: floor + 1])
    for name in [name for name in FILES if name.startswith(below[-1])]:
        within = {other for other in ARROWS[name] if room_of(other) == "data"}
        assert all(other.startswith(below) for other in within), (name, within)


def users_of(package: str) -> set[str]:
    return {
        room_of(name)
        for name, tree in TREES.items()
        if any(module.partition(".")[0] == package for module in imported(tree))
    }


def test_what_belongs_to_one_room_stays_there():
    assert users_of("argparse") == {"commands"}
    assert users_of("matplotlib") == {"plots"}
    light = {"data.dataset", "data.rows.lanes", "system.command_line"}  # no torch behind them
    fields, recipe = "gpt2repro.recipe_fields", "gpt2repro.recipe"
    assert ARROWS[recipe] | ARROWS[fields] <= {fields, *(f"gpt2repro.{name}" for name in light)}
    users = {room_of(name) for name, arrows in ARROWS.items() if arrows & {fields, recipe}}
    assert users <= {"recipe", "training", "commands", "train_accelerate"}


@pytest.mark.parametrize("name", sorted(MODEL))
def test_the_model_files_stand_alone(name):
    """They travel with every checkpoint, to places where nothing of ours is installed."""
    packages = {module.partition(".")[0] for module in imported(TREES[name])}
    # huggingface_hub is what transformers' own configurations are made with.
    theirs = {"torch", "transformers", "huggingface_hub"}
    assert packages <= theirs | {"math", "functools", "configuration_gpt2repro"}


def test_nothing_is_called_utils():
    words = ("util", "helper", "misc", "common")
    assert not [name for name in FILES if any(word in name for word in words)]


LARGE = {"torch", "transformers", "datasets", "accelerate", "numpy", "matplotlib"}
LARGE |= {"huggingface_hub", "tokenizers"}


@pytest.mark.parametrize("name", sorted(n for n in FILES if n.startswith("gpt2repro.commands.")))
def test_a_verb_reads_its_arguments_before_anything_large_is_imported(name):
    """Nothing large at the top of a command, nor of what it imports there."""

    def at_the_top(name: str) -> set[str]:
        body = [n for n in TREES[name].body if isinstance(n, ast.Import | ast.ImportFrom)]
        return imported(ast.Module(body, []))

    seen, todo = set(), {name}
    while todo:
        each = todo.pop()
        seen.add(each)
        modules = at_the_top(each)
        assert not LARGE & {module.partition(".")[0] for module in modules}, each
        todo |= (modules & FILES.keys()) - seen


# --- Processes and foreign code -------------------------------------------------------------------


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("name", FILES)
def test_a_process_is_told_what_processes_environment_names(name):
    """Nothing is started with all of our environment, in which tokens are, nor with our input."""
    for call in calls(TREES[name]):
        function = ast.unparse(call.func)
        elsewhere = re.fullmatch(r"os\.(system|popen|(exec|spawn|posix_spawn)\w*)", function)
        assert not elsewhere, function
        if function.startswith("subprocess."):
            assert {"env", "stdin"} <= {each.arg for each in call.keywords}, ast.unparse(call)
            assert "processes.environment(" in FILES[name].read_text(encoding="utf-8")


# What loads code if it is allowed to, and asks on standard input if it was not told.
ASKS = re.compile(
    r"(?!GenerationConfig)\w.*\.(from_pretrained|from_config)|(transformers\.)?pipeline"
)
OURS = [
    *FILES.values(),
    *(p for d in ("benchmarks", "examples", "docs") for p in ROOT.glob(f"{d}/*.py")),
]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_whether_foreign_code_is_trusted_is_always_said(path):
    """Else a prompt that is read from standard input would answer the question."""
    for call in calls(ast.parse(path.read_text(encoding="utf-8"))):
        if ASKS.fullmatch(ast.unparse(call.func)):
            told = {each.arg for each in call.keywords}
            passed_on = ast.unparse(call.func).startswith("super()") and None in told
            assert passed_on or "trust_remote_code" in told, ast.unparse(call)


def test_training_alone_outlives_whoever_reads_its_output():
    """`train_accelerate.py | head` goes on; a verb ends."""
    lasting = {
        path.name
        for path in OURS
        for call in calls(ast.parse(path.read_text(encoding="utf-8")))
        if "outlives_readers=True" in map(ast.unparse, call.keywords)
    }
    assert lasting == {"train_accelerate.py"}


# --- Size -----------------------------------------------------------------------------------------

# Flat records whose fields are the user's: every one is a line of a YAML or JSON file.
FLAT = {"Recipe", "GPT2ReproConfig"}


def test_files_that_are_read_first_stay_short():
    def lines(name: str) -> int:
        return len(FILES[name].read_text(encoding="utf-8").splitlines())

    assert lines("train_accelerate") < 150
    assert lines("modeling_gpt2repro") <= 450


@pytest.mark.parametrize("name", FILES)
def test_functions_fit_on_a_screen_and_classes_in_a_head(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
        if isinstance(node, ast.ClassDef) and node.name not in FLAT:
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
            assert len(fields) <= 10, f"{node.name} has {len(fields)} fields"


# --- At import ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FILES.keys() - MODEL))
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
    for statement in TREES[name].body:
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        condition = ast.unparse(statement.test) if isinstance(statement, ast.If) else ""
        is_script = "__main__" in condition or condition == "TYPE_CHECKING"
        is_registration = isinstance(statement, ast.Expr) and ".register" in ast.unparse(statement)
        allowed = is_docstring or is_script or is_registration
        assert isinstance(statement, defining) or allowed, ast.unparse(statement)


def test_importing_everything_has_no_side_effects(tmp_path):
    """Nothing is said, written, connected, started or drawn."""
    code = f"""
import importlib, os, pathlib, random, signal, sys, threading
import accelerate, datasets, matplotlib.pyplot, torch, torch._inductor.codecache, transformers
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
for name in {sorted(FILES.keys() - {"gpt2repro.__main__"})!r}:
    importlib.import_module(name)
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
