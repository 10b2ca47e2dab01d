"""The Hub's token goes to the Hub: not where it sends us for the bytes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gpt2repro.data.corpora.parquet import HubSource


@contextmanager
def server(answer) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Its address, and the headers of the requests that it got."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            status, headers, body = answer()
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", seen
    finally:
        http.shutdown()
        http.server_close()


def test_a_redirect_to_another_host_takes_the_token_away(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    served = {"Content-Range": "bytes 0-3/4"}
    with (
        server(lambda: (206, served, b"PAR1")) as (storage, at_storage),
        server(lambda: (302, {"Location": f"{storage}/file"}, b"")) as (hub, at_hub),
    ):
        monkeypatch.setattr(constants, "ENDPOINT", hub)
        template = hub + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        source = HubSource("a.parquet", "someone/texts", "main", 4)
        assert source.read(0, 4) == b"PAR1"
    assert at_hub[0]["authorization"] == "Bearer hf_secret"
    assert "hf_secret" not in str(at_storage)
