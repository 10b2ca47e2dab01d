"""One page of HTML: its parts, its size, that a browser shows it and that no request leaves it."""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from markupsafe import escape
from matplotlib import image
from tiny_checkpoint import save_checkpoint
from tiny_language_models import random_gpt2, tiny_tokenizer
from tiny_metrics import run_metrics

from gpt2repro import UserError
from gpt2repro.commands import plots
from gpt2repro.plots import gallery, page
from gpt2repro.plots.style import BLUE
from gpt2repro.recipe import load_recipe

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MOST_BYTES = 2_000_000


@contextmanager
def listening() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine, and the paths that were asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose samples and name would be code, were they not text."""
    run = tmp_path_factory.mktemp("runs") / "demo"
    random_gpt2(positions=32).save_pretrained(run / "final")
    tiny_tokenizer().save_pretrained(run / "final")
    metrics = run_metrics()
    metrics[10] |= {"hellaswag/acc": 0.25, "hellaswag/acc_stderr": 0.01}
    metrics[20] |= {"core": 0.125, "core_stderr": 0.02}
    metrics[20]["sample"] = "</pre><script>document.title = 'foreign'</script>"
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    recipe = load_recipe(["--recipe", "gpt2", "--dataset_name", "/home/me/secret/corpus"])
    recipe = recipe.model_dump() | {"exp_name": "a <b>name</b>"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert plots.main([str(run), "--html"]) == 0
    return run


@pytest.fixture(scope="module")
def text(run) -> str:
    return (run / "plots" / "page.html").read_text(encoding="utf-8")


def test_all_parts_are_in_it(run, text):
    for part in ("curves", "evaluations", "samples", "inside", "neighbours"):
        assert f'<h2 id="{part}">' in text
    for name in ("attention_maps", "logit_lens", "gradient_norms"):
        assert re.search(rf'<h3 id="{name}">.+</h3><img src="data:image/webp;base64,', text)
    assert "Validation loss 8.00 → 4.07 nats per token in 40 steps" in text
    assert "0.2500 ± 0.0100" in text and "8.0000" in text
    assert "<th>core</th>" in text and "0.1250 ± 0.0200" in text
    assert len(text.encode()) < MOST_BYTES


def test_under_the_pointer_is_what_the_line_is(text):
    for name in ("training", "gradient norm", "tokens per second"):
        assert f'"{name}, moving average"' in text and f'"{name}, each logged step"' in text
    assert '"learning rate"' in text and "learning rate, moving" not in text


def test_what_others_wrote_is_text(text):
    assert str(escape("</pre><script>document.title = 'foreign'</script>")) in text
    assert "<b>name</b>" not in text and "a &lt;b&gt;name&lt;/b&gt;" in text


def test_facts_are_the_cards(run, text, tmp_path):
    """Of a run without a card, those of the card that it would get, without paths."""
    assert "<th>Data</th><td>corpus, split train" in text and "secret" not in text
    card = "# x\n\n## Training\n\n| | |\n| --- | --- |\n| Batch | `4,096` tokens |\n\n## More\n"
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "README.md").write_text(card)
    for file in ("metrics.jsonl", "final/config.json"):
        (tmp_path / file).touch()
    assert plots._facts([], plots._model_of(str(tmp_path))) == [("Batch", "4,096 tokens")]
    # Made longer, it has a newer model, of which that card says nothing.
    (tmp_path / "FINISHED").write_text("4\n")
    save_checkpoint(tmp_path / "checkpoints", 8)
    assert plots._facts([], plots._model_of(str(tmp_path))) == []


def test_where_it_went_on_and_what_it_is_compared_with(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    recipe = load_recipe(["--recipe", "gpt2"]).model_dump()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launches = [json.dumps({"step": step, "date": "2026"}) + "\n" for step in (0, 20, 30)]
    (tmp_path / "launches.jsonl").write_text("".join(launches))
    assert plots.main([str(tmp_path), "--html"]) == 0
    text = (tmp_path / "plots" / "page.html").read_text(encoding="utf-8")
    upright = re.findall(r'"name":"Span".{0,80}?"location":(\d+).{0,20}?"dimension":"height"', text)
    assert {*upright} >= {"81920", "122880"} and '"resumed"' in text and "OpenAI GPT-2 124M" in text


def test_a_model_alone_and_two_runs(run, tmp_path, monkeypatch):
    weights = {"weights": gallery.MODEL_PICTURES["weights"]}
    monkeypatch.setattr(gallery, "MODEL_PICTURES", weights)  # one is enough
    assert plots.main([str(run / "final"), "--html", "--output", str(tmp_path / "model")]) == 0
    alone = (tmp_path / "model" / "page.html").read_text(encoding="utf-8")
    assert 'id="inside"' in alone and 'id="curves"' not in alone
    both = [str(run), "--compare", str(run), "--html", "--output", str(tmp_path / "both")]
    assert plots.main(both) == 0
    together = (tmp_path / "both" / "page.html").read_text(encoding="utf-8")
    assert 'id="curves"' in together and 'id="inside"' not in together


def test_a_long_curve_keeps_its_ends_and_its_spike():
    x, y = np.arange(19073.0), np.linspace(8, 3, 19073)
    y[7001] = 50
    few_x, few_y = page.thinned(x, y)
    assert len(few_x) <= page.MOST_POINTS and (np.diff(few_x) > 0).all()
    assert few_y.max() == 50 and few_x[few_y.argmax()] == 7001
    assert few_x[0] == 0 and few_x[-1] == 19072
    assert page.thinned(x[:10], y[:10])[1] == pytest.approx(y[:10])


def test_without_bokeh_a_line_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gpt2repro.plots.page", None)
    with pytest.raises(UserError, match=r"--html needs .*pip install bokeh"):
        plots.main([str(run), "--html"])


def browse(path: Path, directory: Path) -> tuple[np.ndarray, str]:
    """The pixels (height, width, 4) that Chromium shows of a page, and what it complains of."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += [f"--user-data-dir={directory / 'profile'}", "--window-size=1000,2500"]
    options += ["--enable-logging=stderr", "--virtual-time-budget=10000"]
    shot = directory / "page.png"
    told = subprocess.run(
        [str(CHROMIUM), *options, f"--screenshot={shot}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return image.imread(shot), "\n".join(
        re.findall(r"CONSOLE(?!.*setting log level).*", told.stderr)
    )


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_it_and_asks_nobody(run, text, tmp_path):
    pixels, complaints = browse(run / "plots" / "page.html", tmp_path)
    assert complaints == ""
    blue = np.array([int(BLUE[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    of_curves = (np.abs(pixels[..., :3] - blue) < 0.02).all(axis=-1)
    assert of_curves.sum() > 2000, "lines of the curves, in their colour"
    with listening() as (url, asked):
        foreign = f'<img src="{url}/picture"><script>fetch("{url}/script")</script>'
        guarded, bare = tmp_path / "guarded.html", tmp_path / "bare.html"
        guarded.write_text(text.replace("<h1>", f"{foreign}<h1>"), encoding="utf-8")
        bare.write_text(f"<!doctype html><body>{foreign}", encoding="utf-8")
        assert "violates" in browse(guarded, tmp_path)[1] and asked == []
        browse(bare, tmp_path)
        assert {"/picture", "/script"} <= set(asked), "it would have been seen"
