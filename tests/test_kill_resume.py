"""kill -9 while a checkpoint is written, and in the export: bitwise as undisturbed.

The benchmark of this name kills in every phase; its record is in benchmarks/results.
"""

import json
from pathlib import Path

import pytest

from gpt2repro.records import integrity

ROOT = Path(__file__).parent.parent


@pytest.fixture
def kill_resume(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import kill_resume

    return kill_resume


def test_a_kill_changes_nothing(kill_resume, tmp_path, monkeypatch):
    """The record has kills in the other phases too, `make sweep` kills of other loops."""
    monkeypatch.setattr(kill_resume, "PHASES", ("checkpoint",))
    # This seed aims at the beginning of a writing that takes milliseconds: late in it, a busy
    # machine would now and then be done before the kill.
    seed = 31
    assert kill_resume.planned(1, seed)[0].fraction < 0.05
    result = kill_resume.measure(1, seed, tmp_path, print)
    assert result["bitwise_equal"], result["differences"]
    [kill] = result["kills"]
    assert kill["hit"] and (kill["phase"], kill["resumed_from"]) == ("checkpoint", 0)


def test_a_difference_would_be_seen(kill_resume, tmp_path):
    """The comparison itself: two runs that differ in one number each."""
    runs = []
    for name, loss, weights, lane in (("a", 1.0, b"w", 0), ("b", 2.0, b"v", 1)):
        saved = tmp_path / name / "checkpoints" / "step_00000004"
        saved.mkdir(parents=True)
        state = json.dumps({"step": 4, "stream": {"version": 1, "lanes": [lane]}})
        files = {"state.json": state.encode(), "model.safetensors": weights}
        for file, content in files.items():
            (saved / file).write_bytes(content)
        integrity.mark(saved)
        (tmp_path / name / "final").mkdir()
        (tmp_path / name / "final" / "model.safetensors").write_bytes(weights)
        lines = [{"step": 0, "loss": 3.0}, {"step": 1, "loss": loss, "tokens_per_second": loss}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
        runs.append(tmp_path / name)
    assert kill_resume.differences(*runs, step=4) == {
        "checkpoint": ["model.safetensors"],
        "stream state": ["lanes"],
        "metrics": ["step 1"],
        "final": ["model.safetensors"],
    }
    same = kill_resume.differences(runs[0], runs[0], step=4)
    assert not any(same.values())


def test_the_record_says_twenty_kills_and_no_difference():
    record = json.loads((ROOT / "benchmarks" / "results" / "kill_resume.json").read_text())
    assert record["bitwise_equal"] and not any(record["differences"].values())
    assert record["num_kills"] == len(record["kills"]) == 20
    assert all(record["hits_by_phase"].values()) and record["environment"]["torch"]
