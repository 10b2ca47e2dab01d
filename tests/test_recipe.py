"""Recipes: layers, types, batch arithmetic; a bad input is one line that names the knob."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gpt2repro import UserError
from gpt2repro.recipe import (
    accumulation_steps,
    differences,
    find_recipe,
    load_recipe,
    read_recipe,
    recipes_directory,
    refuse_changes,
)
from gpt2repro.recipe_fields import FIELDS, Recipe

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path.stem for path in recipes_directory().glob("*.yaml"))


def test_the_reproduction_states_every_field():
    assert read_recipe(find_recipe("gpt2")).keys() == FIELDS.keys()


def test_without_arguments_it_is_build_nanogpt_on_fineweb_edu():
    recipe = load_recipe([])
    assert recipe.exp_name == "gpt2" and recipe.model_size == "gpt2"
    assert (recipe.dataset_name, recipe.dataset_config) == (
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
    )
    assert recipe.tokenizer_name == "openai-community/gpt2"
    assert (recipe.batch_tokens, recipe.num_steps, recipe.warmup_steps) == (524_288, 19_073, 715)
    assert (recipe.max_lr, recipe.min_lr, recipe.weight_decay) == (6e-4, 6e-5, 0.1)
    assert recipe.rows_per_step == 512


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid_and_can_be_named_three_ways(name):
    recipe = load_recipe(["--recipe", name])
    assert recipe.exp_name == name
    assert load_recipe(["--recipe", f"{name}.yaml"]) == recipe
    assert load_recipe(["--recipe", f"recipes/{name}.yaml"]) == recipe


def test_layers_override_each_other(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("max_lr: 1e-3\nseed: 5\n")
    recipe = load_recipe(["--recipe", str(path), "--seed", "6"])
    assert (recipe.max_lr, recipe.seed, recipe.min_lr) == (1e-3, 6, 6e-5)
    assert recipe.exp_name == "mine" and str(recipe.run_dir) == "runs/mine"


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--micro_batch_size", "8"], "micro_batch_size", 8),
        (["--micro-batch-size", "8"], "micro_batch_size", 8),
        (["--micro-batch-size=8"], "micro_batch_size", 8),
        (["--micro_batch_size", "auto"], "micro_batch_size", "auto"),
        (["--compile"], "compile", True),
        (["--compile", "false"], "compile", False),
        (["--compile=no"], "compile", False),
        (["--max_lr", "1e-3"], "max_lr", 1e-3),
        (["--num_steps", "1e3"], "num_steps", 1000),
        (["--mixed_precision", "no"], "mixed_precision", "no"),
        (["--dataset_config", "null"], "dataset_config", None),
        (["--exp_name", "2024"], "exp_name", "2024"),
        (["--data_files", "a.parquet,b.parquet"], "data_files", ["a.parquet", "b.parquet"]),
        (["--data_files", "[a.parquet]"], "data_files", ["a.parquet"]),
        (["--eval_tasks", "hellaswag"], "eval_tasks", ["hellaswag"]),
        (["--eval_tasks", "[]"], "eval_tasks", []),
        (["--sample_prompt", "yes: no"], "sample_prompt", "yes: no"),
        (["--n_layer", "2"], "n_layer", 2),
        (["--keep_steps", "0,1,1000"], "keep_steps", [0, 1, 1000]),
        (["--keep_steps", "7"], "keep_steps", [7]),
        (["--num_steps", "0300"], "num_steps", 300),  # as in step_00000300; YAML 1.1 has 192
        (["--keep_steps", "[0100, 010]"], "keep_steps", [100, 10]),
        (["--keep_steps", "log"], "keep_steps", "log"),
    ],
)
def test_spellings_on_the_command_line(argv, field, value):
    assert getattr(load_recipe(argv), field) == value


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("", []),
        ("--keep_every 9", [9, 18, 27]),
        ("--keep_steps 0,3,3,99", [0, 3]),
        ("--keep_steps 0,9,10 --keep_every 9", [0, 9, 10, 18, 27]),
        ("--keep_steps log", [0, 1, 2, 4, 8, 16]),
        ("--keep_steps log --keep_every 8", [0, 1, 2, 4, 8, 16, 24]),
        ("--keep_steps log --keep_every 9", [0, 1, 2, 4, 8, 9, 18, 27]),
    ],
)
def test_which_checkpoints_are_permanent(options, steps):
    recipe = load_recipe(options.split())
    assert [step for step in range(31) if recipe.keeps(step)] == steps
    assert recipe.num_kept(30) == len(steps)
    assert recipe.num_kept(10**9) <= 2 + 31 + 10**9 // 8  # at once


def test_a_place_whose_name_is_no_text_is_refused_at_once(tmp_path, monkeypatch):
    odd = tmp_path / os.fsdecode(b"lat\xfcn")
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(UserError, match=r"output_dir: .* is no UTF-8 name"):
        load_recipe(["--recipe", "demo"])
    assert load_recipe(["--recipe", "demo", "--output_dir", str(tmp_path)]).output_dir


def test_epochs_and_steps_replace_each_other(tmp_path):
    assert load_recipe(["--num_epochs", "2"]).num_steps is None
    path = tmp_path / "epochs.yaml"
    path.write_text("num_epochs: 2\n")
    assert load_recipe(["--recipe", str(path)]).num_steps is None
    recipe = load_recipe(["--recipe", str(path), "--num_steps", "7"])
    assert (recipe.num_steps, recipe.num_epochs) == (7, None)


def test_another_run_of_a_saved_recipe_has_a_place_of_its_own(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("exp_name: first\noutput_dir: /runs/first\n")
    saved = ["--recipe", str(path)]
    assert load_recipe(saved).run_dir == Path("/runs/first")
    assert load_recipe([*saved, "--exp_name", "second"]).run_dir == Path("runs/second")
    both = ["--exp_name", "second", "--output_dir", "/elsewhere"]
    assert load_recipe([*saved, *both]).run_dir == Path("/elsewhere")
    path.write_text("seed: 1\n")  # its file's name is its own
    assert load_recipe(saved).run_dir == Path("runs/recipe")
    assert load_recipe([*saved, "--output_dir", "/elsewhere"]).run_dir == Path("/elsewhere")


def test_weights_bring_their_own_architecture():
    assert load_recipe(["--recipe", "demo"]).n_layer == 3
    assert load_recipe(["--recipe", "demo", "--init_from", "x"]).n_layer is None
    assert load_recipe(["--init_from", "x", "--n_layer", "4"]).n_layer == 4


def test_what_is_held_out_is_said_in_units_or_as_a_share(tmp_path):
    recipe = load_recipe(["--validation_fraction", "0.05"])
    assert (recipe.num_validation_units, recipe.validation_fraction) == (None, 0.05)
    path = tmp_path / "share.yaml"
    path.write_text("validation_fraction: 0.05\n")
    recipe = load_recipe(["--recipe", str(path), "--num_validation_units", "0"])
    assert (recipe.num_validation_units, recipe.validation_fraction) == (0, None)
    recipe = load_recipe(["--num_validation_units", "null"])
    assert recipe.num_validation_units is recipe.validation_fraction is None


def test_what_belongs_to_a_dataset_goes_with_it(tmp_path):
    def of_data(*argv: str) -> tuple:
        recipe = load_recipe([*argv])
        return recipe.dataset_config, recipe.dataset_revision, recipe.num_validation_units

    assert of_data() == ("sample-10BT", None, 100)
    assert of_data("--dataset_name", "HuggingFaceFW/fineweb-edu") == ("sample-10BT", None, 100)
    assert of_data("--dataset_name", "./texts") == (None, None, None)
    assert of_data("--recipe", "demo", "--dataset_name", "./texts") == (None, None, None)
    said = ["--dataset_config", "en", "--num_validation_units", "7"]
    assert of_data("--dataset_name", "./texts", *said) == ("en", None, 7)
    path = tmp_path / "mine.yaml"
    path.write_text("dataset_name: texts\nvalidation_fraction: 0.1\ndataset_revision: v2\n")
    assert of_data("--recipe", str(path)) == (None, "v2", None)
    recipe = load_recipe(["--recipe", str(path), "--dataset_name", "others"])
    assert (recipe.dataset_revision, recipe.validation_fraction) == (None, 0.1)


def test_a_saved_recipe_reads_back(tmp_path):
    recipe = load_recipe(["--recipe", "demo", "--max_lr", "1e-5"])
    (tmp_path / "recipe.yaml").write_text(recipe.as_yaml())
    assert load_recipe(["--recipe", str(tmp_path / "recipe.yaml")]) == recipe
    assert [*yaml.safe_load((tmp_path / "recipe.yaml").read_text())] == [*FIELDS]


PUSH = ["--push_to_hub", "--hub_model_id", "me/x"]
BAD_ARGUMENTS = [
    (["--nmu_steps", "3"], "--nmu_steps: no such field; did you mean num_steps"),
    (["--zzz", "3"], "--zzz: no such field; `train_accelerate.py --help` lists them"),
    (["3"], "unexpected argument '3'"),
    (["--data_files", "a.txt", "b.txt"], "several data_files take commas"),
    (["--seed"], "--seed needs a value: a whole number, at least 0"),
    (["--recipe"], "--recipe needs a value"),
    (["--seed", "1", "--seed", "2"], "--seed is given twice"),
    (["--seed", "-1"], "--seed: -1 is not allowed; it takes a whole number, at least 0"),
    (["--seed", "1.5"], "--seed: 1.5 is not allowed"),
    (["--seed", "true"], "--seed: True is not allowed"),
    (["--max_lr", "0"], "--max_lr: 0 is not allowed; it takes a number, above 0"),
    (["--max_lr", "fast"], "--max_lr: 'fast' is not allowed"),
    (["--max_lr", ".nan"], "--max_lr: nan is not allowed"),
    (["--max_lr", ".inf"], "--max_lr: inf is not allowed"),
    (["--num_steps", "0"], "--num_steps: 0 is not allowed"),
    (["--num_steps", "100000000"], "--num_steps: 100000000 is not allowed"),  # nine digits
    (["--micro_batch_size", "big"], "it takes a whole number or auto, at least 1"),
    (["--compile", "perhaps"], "--compile: 'perhaps' is not allowed; it takes true or false"),
    (["--optimizer", "sgd"], "it takes adamw or muon"),
    (["--schedule", "step"], "it takes cosine or linear or wsd or power"),
    (["--cooldown_fraction", "1.5"], "--cooldown_fraction: 1.5 is not allowed; it takes a number,"),
    (["--matrix_cooldown_fraction", "0.5"], "is for schedule: wsd and power; set it to null"),
    (["--embedding_lr_scale", "0"], "--embedding_lr_scale: 0 is not allowed"),
    (["--embedding_weight_decay", "-1"], "it takes null or a number, at least 0 and at most 1000"),
    (["--embedding_second_moment", "none"], "it takes element or row or factored"),
    (["--cautious_weight_decay", "2"], "it takes true or false"),
    (["--muon_normalize"], "muon_normalize needs optimizer muon"),
    (["--optimizer", "muon", "--matrix_lr_scale", "2"], "muon's matrices have muon_lr"),
    (["--model_size", "gpt3"], "it takes gpt2 or gpt2-medium or gpt2-large or gpt2-xl"),
    (["--mixed_precision", "fp16"], "it takes no or bf16"),
    (["--dropout", "1"], "--dropout: 1 is not allowed"),
    (["--adam_beta2", "1"], "--adam_beta2: 1 is not allowed"),
    (["--report_to", "excel"], "--report_to: 'excel' is not allowed"),
    (["--dataset_name", ""], "--dataset_name: '' is not allowed"),
    (["--dataset_name="], "--dataset_name: '' is not allowed"),
    (["--keep_last", "0"], "--keep_last: 0 is not allowed"),
    (["--keep_steps", "1,x"], "it takes null or a list of whole numbers or log"),
    (["--keep_steps", "-1"], "--keep_steps: -1 is not allowed"),
    (["--batch_tokens", "1000"], "the nearest that fits is 1024"),
    (["--num_lanes", "7"], "num_lanes 7 does not divide the 512 rows of a step"),
    (["--min_lr", "1"], "min_lr 1 is above max_lr 0.0006"),
    (["--num_steps", "9", "--num_epochs", "1"], "set exactly one of num_steps and num_epochs"),
    (
        ["--num_validation_units", "1", "--validation_fraction", "0.1"],
        "set one of num_validation_units and validation_fraction, not both",
    ),
    (["--validation_fraction", "0.6"], "it takes null or a number, above 0 and at most 0.5"),
    (["--document", "page"], "it takes null or file or line"),
    (["--num_steps", "null"], "set exactly one of num_steps and num_epochs"),
    (["--push_to_hub"], "push_to_hub needs hub_model_id"),
    (
        [*PUSH, "--hub_state", "--hub_strategy", "final"],
        "hub_state goes with checkpoints: set hub_strategy to permanent or all",
    ),
    (
        [*PUSH, "--hub_strategy", "permanent"],
        "hub_strategy permanent: say which with keep_every or keep_steps",
    ),
    (["--mixed_precision", "no", "--bf16_residual"], "bf16_residual needs mixed_precision bf16"),
    (["--mixed_precision", "no", "--fp8_head"], "fp8_head needs mixed_precision bf16"),
    (["--compile", "false", "--max_autotune"], "it needs compile"),
    (
        ["--attn_implementation", "sdpa_flash_3", "--mixed_precision", "no"],
        "attn_implementation sdpa_flash_3 needs mixed_precision bf16",
    ),
    (
        ["--attn_implementation", "sdpa_flash_4", "--dropout", "0.1"],
        "attn_implementation sdpa_flash_4 knows no dropout: set it to 0",
    ),
    (
        ["--attn_implementation", "flash_attention_3", "--dropout", "0.1"],
        "attn_implementation flash_attention_3 knows no dropout: set it to 0",
    ),
    (["--muon_heads"], "muon_heads needs optimizer muon"),
    (
        ["--batch_tokens", str(2**60)],
        "1152921504606846976 is not allowed; it takes a whole number, at",
    ),
    (
        ["--seed", "1e30"],
        "--seed: '1e30' is not allowed; it takes a whole number, at least 0 and at mo",
    ),
    (["--seed", "²"], "--seed: '²' is not allowed"),
    (["--seed", "9" * 5000], "--seed: '999999999999...9999999999999' is not allowed"),
    (["--seed", "0x" + "f" * 5000], "--seed: so large a number is not allowed"),
    (["--num_steps", ".inf"], "--num_steps: inf is not allowed"),
    (["--warmup_steps", "[" * 20_000], "--warmup_steps: '[[[[[[[[[[[[...[[[[[[[[[[[[[' is not"),
    (["--keep_last", "!!timestamp x"], "--keep_last: '!!timestamp x' is not allowed"),
    (["--n_layer", "1000000000"], "--n_layer: 1000000000 is not allowed"),
    (["--micro_batch_size", "1e30"], "at least 1 and at most 1e+09"),
    (
        ["--batch_tokens", "1e9", "--sequence_length", "1", "--num_lanes", "7"],
        "num_lanes 7 does not",
    ),
    (["--exp_name", "a" * 300], "aaaaa' is not allowed (too long for a file's name)"),
    (["--exp_name", "a\0b"], r"--exp_name: 'a\x00b' is not allowed"),
    (["--exp_name", ".."], "must be a plain name"),
    (
        ["--output_dir", "a/" * 3000],
        "--output_dir: 'a/a/a/a/a/a/.../a/a/a/a/a/a/' is not allowed (too",
    ),
    (
        ["--data_files", f"a,{'b' * 300}"],
        "--data_files: 'a,bbbbbbbbbb...bbbbbbbbbbbbb' is not allowed (too long",
    ),
    (
        ["--hellaswag_file", "a" * 300],
        "--hellaswag_file: 'aaaaaaaaaaaa...aaaaaaaaaaaaa' is not allowed",
    ),
    (["--sample_prompt", "\udcff"], r"--sample_prompt: '\udcff' is not allowed"),
    (["--" + "z" * 10**6, "1"], "zzzz': no such field"),
    (["x" * 10**6], "unexpected argument 'xxxxxxxxxxxx...xxxxxxxxxxxxx'"),
    (
        ["--recipe", "a" * 300],
        "--recipe 'aaaaaaaaaaaa...aaaaaaaaaaaaa': too long for a file's name",
    ),
    (["--recipe", "a\0b"], "--recipe 'a\\x00b': "),
    (["--exp_name", "../up"], "must be a plain name; use output_dir for a path"),
    (["--recipe", "gtp2"], "--recipe gtp2: no such file"),
    (["--recipe", "/no/such.yaml"], "no such file"),
]

BAD_FILES = [
    ("max_lrr: 1\n", "max_lrr: no such field; did you mean max_lr"),
    ("max_lr: big\n", "max_lr: 'big' is not allowed; it takes a number, above 0"),
    ("num_steps: [1]\n", "num_steps: [1] is not allowed"),
    ("- 1\n", "a recipe is a mapping of fields to values, not a list"),
    ("a: [\n", "not valid YAML"),
    ("1: 2\n", "1: no such field"),
    (b"\xff\xfe\x00", "cannot be read"),
    ("max_lr: 1.0e-3".encode("utf-16"), "cannot be read"),
    ("", "is empty"),
    ("# nothing yet\n---\n", "is empty"),
    ("max_lr: 1.0e-3\nseed: 1\nmax_lr: 2.0e-3\n", "max_lr is given twice"),
    ("seed: " + "[" * 20_000, "not valid YAML"),
    ("seed: !!int abc\n", "not valid YAML"),
    ("seed: !!bool maybe\n", "not valid YAML"),
    ("seed: !!timestamp x\n", "not valid YAML"),
    ("exp_name: 2024-13-45\n", "not valid YAML: month"),
    (
        "exp_name: 2024-12-24\n",
        "exp_name: datetime.date(2024, 12, 24) is not allowed; it takes null",
    ),
    ("exp_name: !!binary aGk=\n", "exp_name: b'hi' is not allowed"),
    ("seed: !!set {1, 2}\n", "seed: {1, 2} is not allowed"),
    ("seed: !recipe 1\n", "not valid YAML"),
    ("seed: .nan\nnum_steps: .inf\n", "num_steps: inf is not allowed"),
    ("a: 1\n" + "".join(f"k{n}: 1\n" for n in range(20_000)), "a: no such field"),
    ("#" * 2**20, "more than 262,144 bytes"),
    # Each line is ten of the one before: a message would be gigabytes, a merge key needs them too.
    (
        "a: &a0 [x]\n"
        + "".join(f"b{n}: &a{n + 1} [{f'*a{n},' * 10}]\n" for n in range(9))
        + "seed: *a9",
        "",
    ),
    (
        "a: &a0 {x: 1}\n"
        + "".join(f"b{n}: &a{n + 1} {{<<: [{f'*a{n},' * 10}]}}\n" for n in range(9)),
        "",
    ),
]


@pytest.mark.parametrize(("argv", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_one_line(argv, message):
    with pytest.raises(UserError) as error:
        load_recipe(argv)
    assert message in str(error.value)


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_bad_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        load_recipe(["--recipe", str(path)])
    assert message in str(error.value) and "bad.yaml" in str(error.value)
    assert len(str(error.value)) < 2000


def test_what_is_larger_than_any_recipe_is_not_read(tmp_path):
    (tmp_path / "huge.yaml").touch()
    os.truncate(tmp_path / "huge.yaml", 2**40)  # a hole: a terabyte that takes no room
    with pytest.raises(UserError, match=r"huge\.yaml: more than 262,144 bytes"):
        load_recipe(["--recipe", str(tmp_path / "huge.yaml")])


def test_only_files_are_recipes(tmp_path):
    """A pipe without a writer would be waited for, a device never end."""
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in (tmp_path, tmp_path / "pipe.yaml", "/dev/zero"):
        with pytest.raises(UserError, match="no such file"):
            load_recipe(["--recipe", str(name)])


def test_a_byte_order_mark_and_an_alias_are_understood(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbfmax_lr: &lr 1.0e-3\nmuon_lr: *lr\n")
    recipe = load_recipe(["--recipe", str(path)])
    assert recipe.max_lr == recipe.muon_lr == 1e-3


def test_the_name_of_a_recipe_file_that_no_text_can_hold(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.yaml")
    path.write_text("seed: 1\n")
    with pytest.raises(UserError, match="exp_name"):
        load_recipe(["--recipe", str(path)])
    assert load_recipe(["--recipe", str(path), "--exp_name", "mine"]).seed == 1


def test_a_prompt_with_a_line_end_of_unicode_is_saved_as_it_is(tmp_path):
    recipe = load_recipe(["--sample_prompt", "one\u2028two\x85three é"])
    (tmp_path / "recipe.yaml").write_text(recipe.as_yaml(), encoding="utf-8")
    assert load_recipe(["--recipe", str(tmp_path / "recipe.yaml")]) == recipe


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as leave:
        load_recipe(["--help"])
    assert leave.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}\n" in shown for name in FIELDS)
    assert max(map(len, shown.splitlines())) < 80
    values = " ".join(shown.split())
    for value in (
        "[0.1; demo 0.1]",
        "[19073; demo 300]",
        "[null; demo null]",
        "[true; demo false]",
    ):
        assert value in values
    headings = [line for line in shown.splitlines() if line[:1].isupper()]
    shipped = find_recipe("gpt2").read_text().split("\n\n", 1)[1]
    named = [line[2:].partition(":")[0] for line in shipped.splitlines() if line[:2] == "# "]
    assert [*dict.fromkeys(headings)][-8:] == [name for name in named if name in headings]
    assert shown.index("The usual ones") < shown.index("--max_lr") < shown.index("The run")


def test_habits_of_other_scripts_are_understood_or_answered_together():
    recipe = load_recipe(["--exp-name", "mine", "--epochs", "10", "--batch-size", "32"])
    assert (recipe.exp_name, recipe.num_epochs, recipe.num_steps) == ("mine", 10, None)
    assert recipe.micro_batch_size == 32
    with pytest.raises(UserError) as error:
        load_recipe(["--lr", "3e-4", "--output", "there", "--epochs", "2"])
    assert "--lr: here it is max_lr" in str(error.value)
    assert "--output: here it is output_dir" in str(error.value)
    with pytest.raises(UserError, match="--num_epochs is given twice"):
        load_recipe(["--epochs", "2", "--num_epochs", "2"])


def test_accumulation_follows_from_the_batch():
    recipe = load_recipe([])
    assert accumulation_steps(recipe, world_size=1, micro_batch_size=64) == 8
    assert accumulation_steps(recipe, world_size=8, micro_batch_size=64) == 1
    with pytest.raises(UserError, match=r"these would: 1, 2, 4, 8, 16, 32, 64, 128, 256"):
        accumulation_steps(recipe, world_size=2, micro_batch_size=48)
    with pytest.raises(UserError, match=r"num_lanes 64 is not divisible by the 3 processes"):
        accumulation_steps(recipe, world_size=3, micro_batch_size=1)


def test_what_may_change_within_a_run():
    recipe = load_recipe([])
    saved = recipe.model_dump() | {"max_lr": 1e-3, "exp_name": "other"}
    refuse_changes(recipe, saved)
    assert differences(recipe, saved) == [("max_lr", 1e-3, 6e-4)]
    with pytest.raises(UserError, match="n_layer is None but the checkpoint was made with 3"):
        refuse_changes(recipe, saved | {"n_layer": 3})
    by_rows = load_recipe(["--embedding_second_moment", "row"])
    with pytest.raises(UserError, match=r"embedding_second_moment is row but .* with element"):
        refuse_changes(by_rows, saved)
    refuse_changes(by_rows, {})


# Each decides what a checkpoint holds or what its steps are; of some, shapes would not tell.
FIXED = "model_size n_layer n_head n_embd sequence_length batch_tokens batch_multiples optimizer"
FIXED += " embedding_second_moment muon_normalize"


@pytest.mark.parametrize("field", FIXED.split())
def test_what_weights_and_state_depend_on_may_not_change(field):
    recipe = load_recipe([])
    with pytest.raises(UserError, match=f"^{field} is .* but the checkpoint was made with other"):
        refuse_changes(recipe, recipe.model_dump() | {field: "other"})


def test_every_field_says_what_it_means():
    for name, field in Recipe.model_fields.items():
        assert len(field.description) > 10, name


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UserError) as error:
        load_recipe(["--nmu_steps", "3", "--zzz", "4", "--max_lr", "big", "--seed", "7"])
    said = str(error.value)
    assert all(
        part in said for part in ("--nmu_steps: no such", "--zzz: no such", "--max_lr: 'big'")
    )
    assert "seed" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--hellaswag_file", "--hellaswag_file needs a value: null or text"),
        ("--eval-every x", "--eval_every: 'x' is not allowed; it takes a whole number"),
    ],
)
def test_a_message_names_the_field_as_the_user_spelled_it(words, said):
    with pytest.raises(UserError) as error:
        load_recipe(words.split())
    assert said in str(error.value)


def test_a_length_of_null_replaces_nothing(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text('num_epochs: "null"\n')
    assert load_recipe(["--recipe", str(path)]).num_steps == 19073


def test_a_typo_is_answered_before_anything_large_is_imported():
    command = [sys.executable, "-X", "importtime", "train_accelerate.py", "--num_stpes", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    *imports, said = done.stderr.splitlines()
    assert said.startswith("train_accelerate.py: error: --num_stpes: no such field; did you mean")
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports}
    assert "pydantic" in modules  # the list is what it should be
    large = {"torch", "transformers", "datasets", "accelerate", "numpy", "huggingface_hub"}
    assert not large & modules
