"""Bad inputs end to end: one clear line, exit status 2, no traceback, nothing half-made.

Each case is what someone might type, and a part of the answer that tells them what to mend. They
run in this process, for speed, through the same `command_line.run` as the script's last line; a few
are launched for real at the end.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import datasets
import huggingface_hub
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType, compare_versions
from fake_hub import FakeHub
from tiny_corpus import documents, parquet_bytes
from tiny_run import reset_accelerate, train, write_inputs
from transformers import BertConfig, BertModel

import train_accelerate
from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.data.tokens.bpe import train_bpe
from gpt2repro.publishing import upload
from gpt2repro.records import run_directory
from gpt2repro.system import command_line, patience
from gpt2repro.training import finish
from modeling_gpt2repro import GPT2ReproForCausalLM

ROOT = Path(__file__).parent.parent
TEXTS = documents(240, max_words=40)
PREFIX = "train_accelerate.py: error: "


@dataclass(frozen=True)
class Place:
    """Where a case finds its inputs (shared, read-only) and may write."""

    inputs: Path
    scratch: Path

    @property
    def output(self) -> Path:
        return self.scratch / "run"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """The tiny run's inputs, an unfinished run on them, and things that are wrong in many ways."""
    directory = tmp_path_factory.mktemp("inputs")
    recipe = write_inputs(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "finish", lambda run: 0)
        assert train(recipe, directory / "a_run", "--num_steps", "4") == 0

    def dataset(name: str, content: bytes, file: str = "0.parquet") -> None:
        (directory / name).mkdir()
        (directory / name / file).write_bytes(content)

    whole = (directory / "corpus" / "0.parquet").read_bytes()
    dataset("other_corpus", parquet_bytes(documents(240, seed=1), 30))
    dataset("no_rows", parquet_bytes([], 30))
    dataset("only_nulls", parquet_bytes([None] * 240, 30))
    dataset("truncated", whole[:-100])
    dataset("damaged", whole[:200] + b"\xff" * 2000 + whole[2200:])
    dataset("not_parquet", b"text\n" * 100)
    dataset("pictures", b"\x89PNG", "0.xyz")
    (directory / "empty").mkdir()
    (directory / "notes.docx").write_text("a file of another kind")
    train_bpe(TEXTS, 350).save_pretrained(directory / "large_tokenizer")
    (directory / "empty_tokenizer").mkdir()
    (directory / "torn_tokenizer").mkdir()
    (directory / "torn_tokenizer" / "tokenizer.json").write_text('{"version": "1.0", "mod')

    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 300}
    GPT2ReproForCausalLM(GPT2ReproConfig(**shape)).save_pretrained(directory / "short_model")
    shutil.copytree(directory / "short_model", directory / "torn_model")
    os.truncate(directory / "torn_model" / "model.safetensors", 5000)
    shutil.copytree(directory / "short_model", directory / "no_weights")
    (directory / "no_weights" / "model.safetensors").unlink()
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=300, intermediate_size=16, **bert)).save_pretrained(
        directory / "bert"
    )
    (directory / "words.jsonl").write_text('{"ctx": "A man", "endings": "none"}\nno json\n')
    return directory


@pytest.fixture
def place(inputs, tmp_path, monkeypatch) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finish, "finish", lambda run: 0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(patience, "OFFLINE_AFTER_SECONDS", 0)
    monkeypatch.setattr(upload, "get_token", lambda: None)
    return Place(inputs, tmp_path)


def files(directory: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def answer(argv: list[str], capsys) -> str:
    """What the script says to `argv`, which it must refuse in one line and with status 2."""
    capsys.readouterr()
    try:
        status = command_line.run("train_accelerate.py", train_accelerate.main, argv)
    finally:
        reset_accelerate()
    shown = capsys.readouterr()
    assert status == 2, shown.err
    *before, said = shown.err.strip().split("\n")
    assert not any(line.strip() for line in before), shown.err
    assert not shown.out.strip(), shown.out
    assert said.startswith(PREFIX), said
    return said.removeprefix(PREFIX)


def assert_refused(place: Place, capsys, options: list[str], *parts: str) -> None:
    before, there_before = files(place.scratch), place.output.exists()
    argv = ["--recipe", str(place.inputs / "recipe.yaml"), "--output_dir", str(place.output)]
    given = {word for word in options if word.startswith("--")}
    defaults = [
        word
        for name, value in zip(argv[::2], argv[1::2], strict=True)
        if name not in given
        for word in (name, value)
    ]
    said = answer([*defaults, *(word.format(**vars(place)) for word in options)], capsys)
    print(said)  # `pytest -s` shows them all
    for part in parts:
        assert part in said, said
    assert len(said) < 450, said
    assert files(place.scratch) == before
    assert place.output.exists() == there_before


# What is typed after `--recipe tiny --output_dir run`, and parts of the answer.
SCORED = "--eval_tasks hellaswag_completion"
OPTIONS: dict[str, tuple[str, ...]] = {
    # the command line and the recipe
    "--nmu_steps 3": ("--nmu_steps: no such field", "num_steps"),
    "--max_lr fast": ("--max_lr: 'fast' is not allowed", "a number, above 0"),
    "--recipe {inputs}/nowhere.yaml": ("no such file", "demo"),
    "--recipe {inputs}": ("no such file",),
    "--recipe {inputs}/notes.docx": ("a recipe is a mapping", "notes.docx"),
    f"--exp_name {'a' * 300}": ("--exp_name: 'aaa", "too long for a file's name"),
    f"--output_dir {{inputs}}/{'a' * 300}": ("--output_dir: '", "too long for a file's name"),
    f"--dataset_name {'a' * 300}": ("--dataset_name: 'aaa", "too long for a file's name"),
    "--exp_name a\0b": ("--exp_name: 'a\\x00b' is not allowed",),
    "--seed 1e30": ("--seed: '1e30' is not allowed", "a whole number, at least 0"),
    "--seed -5": ("--seed: -5 is not allowed",),
    # the batch and the model
    "--batch_tokens 1152921504606846976": ("--batch_tokens: 1152921504606846976 is not allowed",),
    "--n_layer 1000 --n_embd 100000 --n_head 1000": ("n_layer 1000", "GiB of weights do not fit"),
    "--batch_tokens 100": ("batch_tokens 100", "the nearest that fits is 96"),
    "--micro_batch_size 3": ("micro_batch_size 3", "these would: 1, 2, 4, 8"),
    "--num_lanes 3": ("num_lanes 3", "these would: 1, 2, 4"),
    "--n_head 3": ("n_embd", "n_head"),
    "--num_steps 9 --num_epochs 1": ("set exactly one of num_steps and num_epochs",),
    "--num_epochs 1 --batch_tokens 262144": ("num_epochs", "lower batch_tokens"),
    "--attn_implementation flash_attention_2": ("needs mixed_precision bf16",),
    "--attn_implementation flash_attention_2 --mixed_precision bf16": (
        "attn_implementation flash_attention_2: ",
    ),
    # the data
    "--text_column content": ("text_column", "'content'", "columns of text: text"),
    "--dataset_name {inputs}/nowhere": ("dataset_name", "nowhere"),
    "--dataset_name ./corpus": ("dataset_name", "./corpus"),
    "--dataset_name {inputs}/empty": ("dataset_name", "no data files"),
    "--dataset_name {inputs}/pictures": ("dataset_name", "pictures"),
    "--dataset_name {inputs}/notes.docx": ("dataset_name", ".parquet, .jsonl"),
    "--dataset_name {inputs}/no_rows": ("no documents",),
    "--dataset_name {inputs}/only_nulls": ("text_column", "no text"),
    "--dataset_name {inputs}/truncated": ("dataset_name", "0.parquet"),
    "--dataset_name {inputs}/not_parquet": ("dataset_name", "no parquet file"),
    "--dataset_name {inputs}/damaged": ("dataset_name", "0.parquet"),
    "--dataset_split test": ("dataset_split", "'test'", "train"),
    "--data_files nothing*.parquet": ("data_files",),
    "--dataset_name json": ("data_files",),
    "--document line": ("document: line", "null"),
    "--num_validation_units 8": ("num_validation_units", "none to train on"),
    "--num_validation_units 99": ("num_validation_units", "none to train on"),
    "--num_lanes 256 --batch_tokens 8192": ("num_lanes", "documents to train on"),
    "--sequence_length 4096 --batch_tokens 32768": ("num_validation_units", "one row"),
    "--token_cache_dir {inputs}/notes.docx": ("token_cache_dir",),
    # the tokenizer
    "--tokenizer_name {inputs}/empty_tokenizer": ("tokenizer_name", "holds no tokenizer"),
    "--tokenizer_name {inputs}/torn_tokenizer": ("tokenizer_name",),
    "--tokenizer_name {inputs}/nowhere": ("tokenizer_name", "neither a local directory"),
    "--tokenizer_name {inputs}/notes.docx": ("tokenizer_name",),
    # weights to start from
    "--init_from {inputs}/nowhere": ("init_from", "nowhere"),
    "--init_from {inputs}/bert": ("init_from", "bert"),
    "--init_from {inputs}/torn_model": ("init_from", "torn_model"),
    "--init_from {inputs}/short_model --n_layer 7": ("n_layer 7: init_from has", "leave it out"),
    "--attn_implementation flex_attention": ("no CPU or Mac trains by it", "sdpa"),
    "--init_from {inputs}/no_weights": ("init_from", "no_weights"),
    "--init_from {inputs}/empty": ("init_from", "config.json"),
    "--init_from {inputs}/short_model": ("sequence_length 32", "16 positions of init_from"),
    "--init_from {inputs}/short_model --sequence_length 16 --tokenizer_name "
    "{inputs}/large_tokenizer": ("350 tokens", "init_from only 300"),
    # where the run is written
    "--output_dir {inputs}/notes.docx": ("output_dir", "is a file"),
    "--output_dir {inputs}/notes.docx/run": ("output_dir", "cannot be written"),
    "--output_dir /proc/run": ("output_dir", "cannot be written"),
    "--output_dir {inputs}/corpus": ("output_dir", "something else"),
    # going on
    "--resume {inputs}/nowhere": ("--resume", "no such checkpoint"),
    "--resume {inputs}/a_run": ("--resume", "a run's are in its checkpoints/"),
    "--resume {inputs}/a_run/checkpoints/step_00000004 --n_embd 64": ("n_embd is 64", "with 32"),
    "--resume {inputs}/a_run/checkpoints/step_00000004 --seed 2": ("seed was 1337",),
    "--resume {inputs}/a_run/checkpoints/step_00000004 --num_lanes 8": ("num_lanes was 4",),
    "--resume {inputs}/a_run/checkpoints/step_00000004 --dataset_name {inputs}/other_corpus": (
        "the digest of the data files",
    ),
    "--resume {inputs}/a_run/checkpoints/step_00000004 --tokenizer_name {inputs}/large_tokenizer": (
        "tokenizer_name",
    ),
    "--resume {inputs}/a_run/checkpoints/step_00000004 --num_steps 3": ("num_steps 3", "4"),
    "--resume never --output_dir {inputs}/a_run": ("--resume never", "exp_name"),
    # what a run shows and publishes
    "--report_to trackio": ("report_to trackio", "pip install trackio"),
    f"{SCORED} --hellaswag_file {{inputs}}/nowhere.jsonl": ("hellaswag_file",),
    f"{SCORED} --hellaswag_file {{inputs}}/words.jsonl": ("hellaswag", "row 1"),
    SCORED: ("hellaswag_file",),
    "--push_to_hub": ("push_to_hub needs hub_model_id",),
    "--push_to_hub --hub_model_id mine": ("hub_model_id mine", "user/name"),
    "--push_to_hub --hub_model_id me/mine": ("hub_model_id me/mine", "HF_TOKEN"),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_one_line_says_what_to_mend(options, place, capsys):
    parts = [part.format(**vars(place)) for part in OPTIONS[options]]
    assert_refused(place, capsys, options.split(), *parts)


# --- Runs and checkpoints in a bad state ----------------------------------------------------------


def copy_of_the_run(place: Place) -> Path:
    return shutil.copytree(place.inputs / "a_run", place.output)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda path: (path / "COMPLETE").unlink(), "no complete checkpoint"),
        (lambda path: overwrite(path / "model.safetensors"), "was changed or damaged"),
    ],
    ids=["no marker", "garbage tensors"],
)
def test_a_damaged_checkpoint_named_by_path(damage: Callable, part: str, place, capsys):
    path = place.scratch / "step_00000004"
    shutil.copytree(place.inputs / "a_run" / "checkpoints" / path.name, path)
    damage(path)
    assert_refused(place, capsys, ["--resume", str(path)], "--resume", path.name, part)


def overwrite(file: Path) -> None:
    file.write_bytes(b"\x80" * file.stat().st_size)


def test_a_run_that_another_process_writes(place, capsys, monkeypatch):
    monkeypatch.setattr(run_directory, "PATIENCE_SECONDS", 0.0)
    run = copy_of_the_run(place)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(place, capsys, [], str(run), "another process", "exp_name")


def test_a_run_of_another_model(place, capsys):
    copy_of_the_run(place)
    assert_refused(place, capsys, ["--n_layer", "3"], "n_layer is 3", "made with 2", "exp_name")


def test_a_tracker_without_a_login(place, capsys, monkeypatch):
    """What is known only once the run has begun leaves a run, and the same command goes on."""

    def refuse(*_, **__):
        raise RuntimeError("api_key not configured\n(no-tty)")

    # As if its package were installed; the check itself is the run's.
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    argv = ["--recipe", str(place.inputs / "recipe.yaml"), "--output_dir", str(place.output)]
    status = command_line.run(
        "train_accelerate.py", train_accelerate.main, [*argv, "--report_to", "wandb"]
    )
    reset_accelerate()
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1
    assert "report_to wandb: api_key not configured (no-tty); or set it to none" in said
    assert train(Path(argv[1]), place.output, "--num_steps", "1") == 0


def test_a_directory_of_somebody_else(place, capsys):
    place.output.mkdir()
    (place.output / "thesis.tex").write_text("years of work")
    assert_refused(place, capsys, [], "output_dir", "something else")


# --- The Hub --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("--dataset_name someone/nothing", ("dataset_name", "someone/nothing")),
        ("--dataset_name someone/texts --dataset_revision v9", ("dataset_revision", "'v9'")),
        ("--dataset_name someone/texts --dataset_config small", ("dataset_config", "small")),
        ("--dataset_name someone/gated", ("dataset_name", "HF_TOKEN")),
        ("--tokenizer_name someone/nothing", ("tokenizer_name", "someone/nothing")),
        ("--init_from someone/nothing", ("init_from", "someone/nothing")),
    ],
)
def test_what_the_hub_does_not_have(options, parts, place, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with FakeHub() as hub:
        hub.use_in_process(monkeypatch)
        card = b"---\nconfigs:\n- config_name: all\n  data_files: 0.parquet\n---\n"
        texts = {"README.md": card, "0.parquet": parquet_bytes(TEXTS, 30)}
        hub.add("datasets", "someone/texts", texts)
        hub.add("datasets", "someone/gated", texts).gated = True
        assert_refused(place, capsys, options.split(), *parts)


@pytest.mark.sweep
def test_a_machine_without_a_network(inputs, tmp_path):
    """For real, with nothing but the defaults: quick, and it names the way out."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment |= {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    result = launched([], tmp_path, environment)
    assert "cannot be reached" in result and "--recipe recipes/demo.yaml" in result


# --- The environment ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        pytest.param(
            {"WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "none"},  # "" asks for the CPU
            "2 processes were launched but each sees only itself",
            marks=pytest.mark.skipif(
                compare_versions("accelerate", "<", "1.13"), reason="it looks for the other process"
            ),
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "first"}, "LOCAL_RANK"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"},
            "MASTER_ADDR",
        ),
        ({"ACCELERATE_DYNAMO_BACKEND": "inductor"}, "the launcher's dynamo_backend: leave it out"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),  # mostly for want of it
    ],
)
def test_wrong_environment_variables(variables, part, place, capsys):
    with mock.patch.dict(os.environ, variables):  # accelerate writes to the environment too
        assert_refused(place, capsys, [], part)


def launched(argv: list[str], directory: Path, environment: dict[str, str]) -> str:
    """What the script in a process of its own says before it leaves with status 2."""
    script = str(ROOT / "train_accelerate.py")
    result = subprocess.run(
        [sys.executable, script, *argv],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    *_, said = result.stderr.strip().split("\n")
    assert result.returncode == 2 and said.startswith(PREFIX), result.stderr
    assert "Traceback" not in result.stderr and not (directory / "runs").exists()
    return said


def test_the_script_itself(inputs, tmp_path):
    argv = ["--recipe", str(inputs / "recipe.yaml"), "--text_column", "content"]
    assert "text_column" in launched(argv, tmp_path, os.environ | {"OMP_NUM_THREADS": "1"})
