"""Whatever a Hub answers: the right text, or one line, and soon.

"Soon" is what the limits of patience.py add up to, which are fractions of seconds here.
"""

import io
import itertools
import json
import time
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub, Fault, NoSleep
from hypothesis import given
from hypothesis import strategies as st
from tiny_corpus import documents, joined

from gpt2repro import UserError
from gpt2repro.data.opening import open_corpus
from gpt2repro.system import hub_client, patience

TEXTS = documents(40)


def files() -> dict[str, bytes]:
    """A data set whose bits may flip on their way: pages have checksums."""
    content = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), content, row_group_size=20, write_page_checksum=True)
    return {"README.md": b"# A card\n", "data/train-00000.parquet": content.getvalue()}


LIMITS = {
    "GIVE_UP_AFTER_SECONDS": 0.2,
    "FIRST_DELAY_SECONDS": 0.01,
    "LONGEST_DELAY_SECONDS": 0.02,
    "LONGEST_SILENCE_SECONDS": 0.1,
    "REQUEST_TIMEOUT_SECONDS": 0.1,
    "SLOW_AFTER_SECONDS": 0.2,
    "LONGEST_QUESTION_SECONDS": 0.4,
    "LARGEST_ANSWER_BYTES": 2**20,
}
# Each of a dozen requests may use up its patience, and some the Hub client's own limit of 10 s.
DEADLINE_SECONDS = 60.0

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def hub():
    with pytest.MonkeyPatch.context() as monkeypatch, FakeHub() as hub:
        for name, value in LIMITS.items():
            monkeypatch.setattr(patience if hasattr(patience, name) else hub_client, name, value)
        monkeypatch.setattr("huggingface_hub.utils._http.time", NoSleep)
        monkeypatch.setattr("huggingface_hub.file_download.time", NoSleep)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
        hub.use_in_process(monkeypatch)
        yield hub


REQUESTS = (
    r"^/api/datasets/[^/]+/[^/]+$",
    r"/revision/",
    r"/tree/",
    r"/tree/.*/data$",
    r"README\.md$",
    r"\.parquet$",
    r"",
)
KINDS = ("", "reset", "short", "ignore_range", "flip", "zeros", "drops", "hang")
STATUSES = (200, 200, 200, 201, 204, 206, 300, 301, 302, 304, 307, 308, 400, 403, 404, 416, 429)
NAMES = st.sampled_from(
    ["sha", "id", "siblings", "rfilename", "path", "size", "type", "oid", "lfs", "lastModified"]
) | st.sampled_from(["createdAt", "tags", "cardData", "gated", "securityFileStatus", "config"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2**70) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {"path": st.just("data/train-00000.parquet")},
    optional={
        "type": st.sampled_from(["file", "directory", None]),
        "oid": st.just("0" * 40),
        "size": st.integers(-5, 2**65) | st.none() | st.text(max_size=3),
        "lfs": JSON,
        "lastCommit": JSON,
    },
)
BODIES = st.one_of(
    st.binary(max_size=30),
    st.just(b"<!DOCTYPE html><html><body>Sign in to this network</body></html>"),
    (JSON | st.lists(ENTRY, max_size=2)).map(lambda content: json.dumps(content).encode()),
    st.fixed_dictionaries({"sha": JSON, "id": JSON, "lastModified": JSON}).map(
        lambda content: json.dumps(content).encode()
    ),
)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Retry-After": st.sampled_from(["0", "3600", "9" * 40, "-1", "²", "soon", "1.5"]),
        "RateLimit": st.sampled_from(['"api";r=0;t=99999', '"api";r=x', ";;;"]),
        "Location": st.sampled_from(["", "?", "/", "http://[", "//", "file:///etc", "a b", "²"]),
        "Content-Encoding": st.sampled_from(["gzip", "identity", "br", "²"]),
        "Content-Range": st.sampled_from(["", "bytes 0-1/2", "bytes */5", "lines 1-2/3"]),
        "Content-Type": st.sampled_from(["text/html", "application/json; charset=²", ""]),
        "X-Error-Code": st.sampled_from(["RepoNotFound", "GatedRepo", "EntryNotFound", "?"]),
        "Link": st.sampled_from(['<?cursor=x>; rel="next"', "<>; rel=next", "<"]),
        "ETag": st.sampled_from(["", '"', "W/²"]),
        "X-Repo-Commit": st.sampled_from(["", "0" * 40, "../.."]),
    },
)
METHODS = st.sampled_from(["GET", "HEAD", "GET|HEAD|POST"])
TIMES = st.sampled_from([1, 2, 5, 10**9])
FAULTS = st.one_of(
    st.builds(
        Fault,
        kind=st.sampled_from(("answer",) * 12 + KINDS),
        path=st.sampled_from(REQUESTS),
        method=METHODS,
        times=TIMES,
        skip=st.integers(0, 2),
        headers=HEADERS,
        answer=st.tuples(st.sampled_from(STATUSES) | st.integers(200, 599), BODIES),
    ),
    # Of a file that the Hub's client downloads by itself there is no limit but the disk.
    st.builds(Fault, kind=st.just("flood"), path=st.sampled_from(REQUESTS[:4]), times=TIMES),
)


@given(faults=st.lists(FAULTS, min_size=1, max_size=2))
def test_any_answer_gives_the_text_or_one_line(hub, faults):
    name = f"someone/texts-{next(NUMBERS)}"
    hub.add("datasets", name, files())
    hub.faults[:] = faults
    began = time.monotonic()
    try:
        with patch.object(patience, "_outages", patience._Outages()):
            assert joined(open_corpus(name)) == TEXTS
    except UserError as error:
        assert "\n" not in str(error).strip()
    finally:
        hub.faults.clear()
    assert time.monotonic() - began < DEADLINE_SECONDS
