"""metrics.jsonl: valid lines, there at once, and cut back to where a run goes on."""

import json
import math

from gpt2repro.records.metrics import MetricsLog, read_metrics, rewind_metrics


def test_lines_are_valid_json_and_there_at_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 0, "loss": float("nan"), "grad_norm": math.inf, "rows_digest": "00"})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 0, "loss": None, "grad_norm": None, "rows_digest": "00"}
    log.close()


def test_going_back_cuts_later_lines_and_torn_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert rewind_metrics(path, 0) == [] and path.read_text() == ""
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(6)) + '{"step": 6, "lo')
    assert [line["step"] for line in read_metrics(path)] == [*range(6)]
    assert [line["step"] for line in rewind_metrics(path, 4)] == [0, 1, 2, 3]
    assert path.read_text().count("\n") == 4
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert read_metrics(tmp_path / "nowhere.jsonl") == []
