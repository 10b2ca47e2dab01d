"""Any damage to what a run reads back is found, and costs nothing but what was damaged."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoint import save_checkpoint

from gpt2repro import UserError
from gpt2repro.publishing import contents
from gpt2repro.records import checkpoints, integrity, run_directory
from gpt2repro.records.metrics import MetricsLog, read_lines, rewind_metrics


@st.composite
def damages(draw) -> tuple[str, float, bytes]:
    """A kind of damage, where it is (0: at the beginning, 1: at the end), and with what."""
    kind = draw(st.sampled_from(["flip", "overwrite", "insert", "cut", "zeros", "empty"]))
    return kind, draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=40))


def damaged(content: bytes, damage: tuple[str, float, bytes]) -> bytes:
    kind, where, what = damage
    at = int(where * len(content))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ (1 << what[0] % 8)]) + content[at + 1 :]
    if kind == "overwrite":
        return content[:at] + what + content[at + len(what) :]
    if kind == "insert":
        return content[:at] + what + content[at:]
    if kind == "zeros":  # what a file system leaves of a tail that it had not written
        return content[:at] + b"\0" * (len(content) - at)
    return content[:at] if kind == "cut" else b""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints before steps 10 and 20 of the smallest GPT-2."""
    directory = tmp_path_factory.mktemp("checkpoints")
    stream = {"version": 2, "identity": {}, "step": 3, "lanes": [[[0, 0, 0, 0]]]}
    for step in (10, 20):
        save_checkpoint(directory, step, stream=stream)
    return directory


@given(file=st.sampled_from([*integrity.FILES, integrity.MARKER]), damage=damages())
def test_a_damaged_checkpoint_is_never_gone_on_from(saved, file, damage):
    newest, before = saved / "step_00000020", saved / "step_00000010"
    content = (newest / file).read_bytes()
    state = checkpoints.read_state(newest)
    (newest / file).write_bytes(damaged(content, damage))
    try:
        found, broken = checkpoints.find_latest(saved)
        if found == newest:  # a marker spelled otherwise: a space more, a digit of an ignored name
            assert file == integrity.MARKER or damaged(content, damage) == content
            assert checkpoints.read_state(newest) == state
        else:
            assert found == before and [*broken] == [newest] and "\n" not in broken[newest]
            with pytest.raises(UserError, match="no complete checkpoint"):
                checkpoints.read_state(newest)
    finally:
        (newest / file).write_bytes(content)


@given(num_lines=st.integers(1, 30), damage=damages(), step=st.integers(0, 30))
def test_damaged_metrics_keep_every_line_that_was_not_touched(
    tmp_path_factory, num_lines, damage, step
):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    log = MetricsLog(path)
    for number in range(num_lines):
        log.write({"step": number, "loss": number / 7, "rows_digest": f"{number:016x}"})
    log.close()
    lines = path.read_bytes().splitlines()
    path.write_bytes(damaged(path.read_bytes(), damage))
    untouched = {line for line in path.read_bytes().split(b"\n") if line in lines}
    records, bad = read_lines(path)
    assert {json.dumps(record).encode() for record in records} >= untouched
    assert len(records) + len(bad) <= path.read_bytes().count(b"\n") + 1
    kept = rewind_metrics(path, step)
    assert kept == [record for record in records if record["step"] < step]
    assert read_lines(path) == (kept, [])


RECIPE = "exp_name: a\ntokenizer_name: gpt2\nmax_lr: 0.0006\neval_tasks:\n- hellaswag\n"


@given(damage=damages())
def test_a_damaged_recipe_is_a_mapping_or_one_line(tmp_path_factory, damage):
    run = tmp_path_factory.mktemp("run")
    (run / "recipe.yaml").write_bytes(damaged(RECIPE.encode(), damage))
    try:
        assert isinstance(run_directory.saved_recipe(run), dict)
    except UserError as error:
        assert "recipe.yaml cannot be read" in str(error) and "\n" not in str(error)


@given(file=st.sampled_from(["model.safetensors", "config.json"]), damage=damages())
def test_a_damaged_export_does_not_pass(saved, tmp_path_factory, file, damage):
    export = tmp_path_factory.mktemp("export")
    for name in ("model.safetensors", "config.json"):
        shutil.copy(saved / "step_00000010" / name, export)
    contents.write_sums(export)
    contents.check_sums(export)
    content = (export / file).read_bytes()
    (export / file).write_bytes(damaged(content, damage))
    if (export / file).read_bytes() != content:
        with pytest.raises(UserError, match=f"{file} was changed or damaged after the export"):
            contents.check_sums(export)
