"""README, CONTRIBUTING and docs/: blocks run, what they name exists, messages are the code's.

The shell and Python blocks of a page run in order, in a directory like a fresh clone in which the
demo has been trained, on a recipe small enough for a test. The commands of this project run in this
process, which has imported what they need; all others in bash. A block that cannot run here says
why in the line before it, `<!-- runs: hub|gpu|no (reason) -->`: then its commands are parsed. A
page's first line names the modules without which it is skipped, `<!-- needs: trl, peft -->`.
"""

import ast
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partialmethod
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from tiny_export import without_fresh_processes
from tiny_gpt2 import save_official, tiny_model, tiny_tokenizer
from tiny_run import reset_accelerate, write_inputs

import train_accelerate
from gpt2repro import recipe
from gpt2repro.__main__ import VERBS
from gpt2repro.commands import parser
from gpt2repro.plots import gallery
from gpt2repro.records.metrics import read_metrics
from gpt2repro.system import command_line
from gpt2repro.system.signals import SIGNALS
from gpt2repro.training import examination

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md"))),
    *(f"docs/use/{p.name}" for p in sorted(ROOT.glob("docs/use/*.md"))),
]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}

SHELLS = ("bash", "sh", "console")
NEEDS = re.compile(r"<!-- needs: (.+) -->")  # modules of the page's tool
REASON = re.compile(r"<!-- runs: (hub|gpu|no \(.+\))( \(.+\))? -->")
BLOCK = re.compile(
    r"^(?P<marker><!-- runs:[^\n]*-->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
# What is not ours and changes nothing that a test could see; everything else must be known.
OUTSIDERS = {"source", "tail", "hf", "cd", "git", "sha256sum"}
# Run where a block can, not parsed.
OTHER_TOOLS = {"lm_eval", "transformers", "vllm", "docker", "mlx_lm.generate"}


@dataclass(frozen=True)
class Block:
    where: str  # page:line
    language: str
    code: str
    marker: str

    @property
    def runs(self) -> bool:
        return not self.marker


def blocks(page: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(TEXT[page]):
        if match["language"] == "python" or match["language"] in SHELLS:
            line = TEXT[page].count("\n", 0, match.start()) + 1
            marker = (match["marker"] or "").strip()
            found.append(Block(f"{page}:{line}", match["language"], match["code"], marker))
    return found


def commands(block: Block) -> Iterator[str]:
    """The commands of a shell block: continued lines are joined, here-documents kept together."""
    lines = iter(block.code.splitlines())
    for line in lines:
        if block.language == "console" and not line.startswith("$ "):
            continue  # output
        command = line.removeprefix("$ ")
        while command.endswith("\\"):
            command = command[:-1] + next(lines).removeprefix("> ").strip()
        if heredoc := re.search(r"<<'?(\w+)'?", command):
            for line in lines:
                command += "\n" + line
                if line == heredoc[1]:
                    break
        if command.strip() and not command.lstrip().startswith("#"):
            yield command


# --- What a command means -------------------------------------------------------------------------


class Parsed(Exception):
    """Raised in place of the work, once the arguments are accepted."""


@contextmanager
def parsing_only(monkeypatch, module) -> Iterator[None]:
    def and_stop(parse: Callable) -> Callable:
        def parse_and_stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return parse_and_stop

    with monkeypatch.context() as patch:
        patch.setattr(parser.OneLineParser, "parse_args", and_stop(parser.OneLineParser.parse_args))
        if hasattr(module, "load_recipe"):
            patch.setattr(module, "load_recipe", and_stop(recipe.load_recipe))
        with pytest.raises(Parsed):
            yield


def call_verb(words: list[str], monkeypatch, run: bool) -> None:
    verb, *arguments = words
    assert verb in VERBS, verb
    module = import_module(f"gpt2repro.commands.{VERBS[verb][0]}")
    if run:
        assert command_line.run(f"gpt2repro {verb}", module.main, arguments) == 0
    else:
        with parsing_only(monkeypatch, module):
            module.main(arguments)


def call_script(script: str, arguments: list[str], monkeypatch, run: bool) -> None:
    """`train_accelerate.py`, an example or a benchmark."""
    assert (ROOT / script).is_file(), script
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    if script == "train_accelerate.py":
        train(arguments) if run else recipe.load_recipe(arguments)
    elif run:
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_path(str(ROOT / script))["parse"]()


def train(arguments: list[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert train_accelerate.main(arguments) == 0
    except SystemExit as leave:  # --help
        assert leave.code == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        reset_accelerate()


def call_launcher(words: list[str], monkeypatch, run: bool) -> None:
    """`accelerate launch ...`: its options are accelerate's own to parse."""
    options = launch_command_parser().parse_args(words)
    config = {"num_processes": options.num_processes or 1}
    if options.config_file:
        assert options.config_file.startswith("launch/"), options.config_file
        config |= yaml.safe_load((ROOT / options.config_file).read_text())
    assert not run or config["num_processes"] == 1, "several processes are launched elsewhere"
    call_script(options.training_script, options.training_script_args, monkeypatch, run)


def call_lm_eval(words: list[str], monkeypatch) -> None:
    """The harness, in this process, and without its own tasks: to list them takes it 15 seconds."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import TaskManager

    ours_alone = partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", ours_alone)
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
    cli_evaluate()


def call_make(words: list[str]) -> None:
    """The two commands of the README are what runs this test: the targets must be there."""
    makefile = (ROOT / "Makefile").read_text()
    for target in words:
        assert re.search(rf"^{target}:", makefile, re.M), target


def call(command: str, monkeypatch, run: bool) -> None:
    """Run `command`, or only check that it would be understood."""
    words = shlex.split(re.sub(r"\$\w+", "0", command.split("\n")[0]), comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, *rest = words
    if program == "make":
        call_make(rest)
    elif program == "gpt2repro":
        call_verb(rest, monkeypatch, run)
    elif words[:2] == ["accelerate", "launch"]:
        call_launcher(rest[1:], monkeypatch, run)
    elif program == "sbatch":
        place = rest.index("launch/slurm.sh")
        assert not run
        call_script("train_accelerate.py", rest[place + 1 :], monkeypatch, run=False)
    elif words[:2] == ["python", "llama.cpp/convert_hf_to_gguf.py"]:
        assert not run
    elif program == "python" and rest[0].endswith(".py"):
        call_script(rest[0], rest[1:], monkeypatch, run)
    elif words[:3] == ["python", "-m", "pytest"]:
        assert not run
        assert all((ROOT / word.split("::")[0]).exists() for word in rest if "tests/" in word)
    elif program == "lm_eval" and run:
        call_lm_eval(rest, monkeypatch)
    elif run and program not in OUTSIDERS:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        subprocess.run(["bash", "-ec", command], env=os.environ | {"PATH": path}, check=True)
    else:
        assert run or program in OUTSIDERS | OTHER_TOOLS, f"who is {program}?"


# --- The blocks -----------------------------------------------------------------------------------

SET_UP = [
    "accelerate launch --config_file launch/cpu.yaml train_accelerate.py --recipe demo",
    "python train_accelerate.py --recipe demo --exp_name demo-adamw --optimizer adamw"
    " --max_lr 1e-3",
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Iterator[Path]:
    """A directory like a clone, in which the demo has been trained in small."""
    inputs, clone = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("clone")
    for name in ("launch", "examples", "tests", "docs", "train_accelerate.py"):
        (clone / name).symlink_to(ROOT / name)
    (clone / "recipes").mkdir()
    for path in (ROOT / "recipes").glob("*.yaml"):
        (clone / "recipes" / path.name).write_text(path.read_text())
    demo = yaml.safe_load(write_inputs(inputs).read_text()) | {
        "exp_name": "demo",
        "sequence_length": 128,  # room for the pages' prompts
        "batch_tokens": 1024,
        "num_steps": 4,
        "save_every": 2,
        "optimizer": "muon",
        "sample_prompt": "This function returns",
    }
    (clone / "recipes" / "demo.yaml").write_text(yaml.safe_dump(demo))
    # Where a page says OpenAI's model, it gets a small one in OpenAI's layout.
    (clone / "openai-community").mkdir()
    official = save_official(tiny_model(n_positions=128), clone / "openai-community" / "gpt2")
    tiny_tokenizer().save_pretrained(official)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(clone)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(recipe, "recipes_directory", lambda: clone / "recipes")
        # Fresh processes have tests of their own, in test_export.py and test_train_accelerate.py.
        without_fresh_processes(patch)
        patch.setattr(examination, "STREAM_SECONDS", 0.1)
        patch.setattr(examination, "STEP_SECONDS", 0.1)
        # Each picture has tests of its own, in tests/plots.
        some = {name: gallery.MODEL_PICTURES[name] for name in ("logit_lens", "weights")}
        patch.setattr(gallery, "MODEL_PICTURES", some)
        for command in SET_UP:
            call(command, patch, run=True)
        yield clone
    for left in clone.glob("*.pid"):  # of a server whose page failed; a page that ends removes it
        os.kill(int(left.read_text()), signal.SIGTERM)


@pytest.fixture(scope="module")
def done() -> set[str]:
    """Commands that have run: what several pages say is run once."""
    return set(SET_UP)


def test_the_loop_is_as_long_as_the_readme_says():
    def num_lines(path: Path) -> int:
        return len(path.read_text(encoding="utf-8").splitlines())

    loop, step = (
        num_lines(ROOT / name) for name in ("train_accelerate.py", "gpt2repro/training/step.py")
    )
    in_all = round(sum(map(num_lines, ROOT.glob("gpt2repro/**/*.py"))), -3)
    said = f"| {loop} for the loop, {step} for a step, of {in_all:,} in all |"
    assert said in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_blocks_run(page, clone, done, monkeypatch):
    monkeypatch.chdir(clone)
    names: dict = {"__name__": "page"}
    if needs := NEEDS.match(TEXT[page]):
        for module in needs[1].split(", "):
            if find_spec(module) is None:
                pytest.skip(f"{module} is not installed")
    for block in blocks(page):
        print(block.where)
        if block.language == "python" and block.runs:
            exec(compile(block.code, block.where, "exec"), names)
        elif block.language == "python":
            compile(block.code, block.where, "exec")
        else:
            for command in commands(block):
                if command not in done:
                    call(command, monkeypatch, block.runs)
                if block.runs:
                    done.add(command)


def test_blocks_that_do_not_run_say_why():
    found = [block for page in PAGES for block in blocks(page)]
    for block in found:
        assert block.runs or REASON.fullmatch(block.marker), f"{block.where}: {block.marker}"
    assert sum(block.runs for block in found) > len(found) / 2


# --- What the pages name --------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    places = "docs|tests|launch|recipes|examples|gpt2repro|benchmarks"
    for name in re.findall(rf"(?<![\w/.-])(?:{places})/[\w/.-]+\.\w+", TEXT[page]):
        assert "NAME" in name or (ROOT / name).exists(), f"{page}: {name}"


def known_options(monkeypatch) -> set[str]:
    """Every option of the training script, the verbs and the launcher."""
    known = {"recipe", "help", *recipe.FIELDS}
    known |= {option.strip("-") for option in launch_command_parser()._option_string_actions}

    def remember(parser, *_):
        known.update(option.strip("-") for option in parser._option_string_actions)
        raise Parsed

    monkeypatch.setattr(parser.OneLineParser, "parse_known_args", remember)
    for module, _ in VERBS.values():
        with pytest.raises(Parsed):
            import_module(f"gpt2repro.commands.{module}").main([])
    return known


def test_options_in_the_text_exist(monkeypatch):
    known = known_options(monkeypatch)
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", TEXT[page])):
            program, _, rest = code.partition(" ")
            if program == "gpt2repro":
                assert rest.split()[0].rstrip(":") in {*VERBS, "VERB"}, f"{page}: {code}"
            if program.startswith("--") or program in ("gpt2repro", "accelerate", "python"):
                for option in re.findall(r"--([a-z][\w-]+)", code):
                    assert {option, option.replace("-", "_")} & known, f"{page}: {code}"


def test_every_metric_is_explained(clone):
    found = {key for line in read_metrics(clone / "runs/demo/metrics.jsonl") for key in line}
    assert [key for key in found if f"`{key}`" not in TEXT["docs/metrics.md"]] == []


def test_the_map_names_every_module():
    modules = {path.name for path in (ROOT / "gpt2repro").rglob("*.py")} - {"__init__.py"}
    assert [name for name in modules if name not in TEXT["CONTRIBUTING.md"]] == []


def test_every_recipe_is_described():
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"`{path.stem}`" in TEXT["docs/training.md"], path.name


# --- What is generated or quoted ------------------------------------------------------------------


def test_the_picture_of_the_stream_is_the_streams():
    picture = runpy.run_path(str(ROOT / "docs/draw_stream.py"))["picture"]()
    assert picture == (ROOT / "docs/stream.svg").read_text(encoding="utf-8")


def test_the_figures_of_benchmarks_are_those_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    summary = runpy.run_path(str(ROOT / "benchmarks/summary.py"))["summary"]()
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert page.endswith(f"\n\n{summary}\n")
    records = {path.name for path in (ROOT / "benchmarks/results").glob("*.json")}
    assert records == set(re.findall(r"\(results/(.+?)\)", summary))


def test_the_hours_on_cpus_are_those_of_the_record():
    record = (ROOT / "benchmarks/results/train_step_compiled_bf16.json").read_text(encoding="utf-8")
    rate = json.loads(record)["tokens_per_second"]["ours"]
    hours = round(1e10 / rate / 3600, -2)
    assert f"| {hours:,.0f} | extrapolated from {rate:.0f} tokens/s" in TEXT["README.md"]


def literals() -> Iterator[str]:
    """The string literals of the code; what an f-string fills in is `...`."""
    for path in [ROOT / "train_accelerate.py", *(ROOT / "gpt2repro").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                value = node.value
                yield value if isinstance(value, str) else value.decode("utf-8", "replace")


NOT_OURS = ("CUDA out of memory", "SignalException", "CalledProcessError")  # torch's, accelerate's


def test_messages_of_the_troubleshooting_page_are_the_codes():
    found = list(literals())
    for row in re.findall(r"^\| (`.+?`.*?) \|", TEXT["docs/troubleshooting.md"], re.M):
        message = re.match(r"`(.+?)`", row)[1]
        if message in NOT_OURS or re.fullmatch(r"\w+", message):  # a field of metrics.jsonl
            continue
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.S)
        assert any(pattern.search(literal) for literal in found), message
