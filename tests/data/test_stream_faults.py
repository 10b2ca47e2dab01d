"""The stream over a Hub that misbehaves: the same rows, bit by bit, or one clear line."""

import dataclasses
import io
import itertools
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub, Fault, impatient
from huggingface_hub import HfFileSystem
from tiny_corpus import ByteEncoder, documents, parquet_bytes, refusal
from tiny_streams import stream_of

from gpt2repro import UserError
from gpt2repro.data.corpora import corpus, parquet
from gpt2repro.data.opening import open_corpus
from gpt2repro.system import hub_client, patience
from gpt2repro.system.diagnosis import FEW_ATTEMPTS

NAME, CONFIG = "HuggingFaceFW/fineweb-edu", "sample-10BT"
CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# A card
"""
TEXTS = documents(400)
OPTIONS = {
    "sequence_length": 64,
    "rows_per_step": 8,
    "num_lanes": 4,
    "num_validation_units": 1,
    "seed": 1,
}
PARQUET = r"10BT/.*\.parquet$"


def repository_files() -> dict[str, bytes]:
    """FineWeb-Edu's layout: two configs, other columns before and after the text."""
    files = {"README.md": CARD, ".gitattributes": b""}
    for index in range(2):
        texts = TEXTS[200 * index : 200 * index + 200]
        filler = ["x" * 200 + str(number) for number in range(200)]
        content = io.BytesIO()
        table = pa.table({"id": filler, "text": texts})
        pq.write_table(table, content, row_group_size=20, write_page_checksum=True)
        files[f"sample/10BT/00{index}_00000.parquet"] = content.getvalue()
    files["data/CC-MAIN-2013-20/train-00000.parquet"] = parquet_bytes(["other"], 20)
    return files


@pytest.fixture
def hub(monkeypatch):
    impatient(monkeypatch)
    with FakeHub() as hub:
        hub.add("datasets", NAME, repository_files())
        hub.use_in_process(monkeypatch)
        yield hub


def open_fineweb(**options) -> corpus.Corpus:
    return open_corpus(NAME, config=CONFIG, **options)


def digests(num_steps: int = 30, source: corpus.Corpus | None = None, **options) -> list[int]:
    stream = stream_of(source or open_fineweb(), ByteEncoder(), **OPTIONS | options)
    try:
        return [next(stream).digest for _ in range(num_steps)]
    finally:
        stream.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The digests of the same files on disk: the Hub and a directory give the same rows."""
    directory = tmp_path_factory.mktemp("local")
    for path, content in repository_files().items():
        if re.search(PARQUET, path):
            (directory / path.rpartition("/")[2]).write_bytes(content)
    return digests(source=open_corpus(directory))


def test_the_hub_gives_the_rows_of_the_files(hub, expected):
    source = open_fineweb()
    assert source.num_units == 20
    assert source.read_unit(0) + source.read_unit(1) == TEXTS[:40]
    assert source.read_unit(19) == TEXTS[380:]
    assert digests(source=source) == expected


FAULTS = [
    *(f"status:{status}" for status in (500, 502, 503, 504, 429, 408)),
    "status:403",
    "reset",
    "short",
    "ignore_range",
    "flood",
    "hang",
    "flip",
    "zeros",
    "drops",
    "drops of headers",
]
FEW = {"status:403", *FAULTS[FAULTS.index("hang") :]}  # slow, or tried a few times only


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_while_streaming_change_no_row(hub, expected, kind, caplog):
    source = open_fineweb()
    times = 1 if kind in FEW else 6
    fault = Fault(kind, PARQUET, times=times, skip=3)
    hub.faults.append(fault)
    assert digests(source=source) == expected
    assert fault.num_hits == times
    lines = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) % 2 == 0 and 2 <= len(lines) <= 2 * times
    assert lines[-1].startswith("read ") and "back after" in lines[-1]


START_UP = {
    "revision": Fault("", rf"api/datasets/{NAME}$"),
    "builder": Fault("", rf"api/datasets/{NAME}/revision"),
    "script": Fault("", r"fineweb-edu\.py$", "HEAD"),
    "card": Fault("", r"README\.md$", "HEAD"),
    "card body": Fault("", r"README\.md$", "GET"),
    "tree": Fault("", r"api/datasets/.*/tree/.*10BT"),
    "footer": Fault("", PARQUET),
}


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        *itertools.product(START_UP, ["status:503", "status:429", "reset"]),
        # Elsewhere the Hub client's own limit of 10 s holds: the same path, only slower.
        *itertools.product(["revision", "tree", "footer"], ["hang", "drops", "zeros"]),
        ("footer", "drops of headers"),
        *itertools.product(["revision", "builder", "tree", "footer"], ["flood"]),
    ],
)
def test_faults_at_start_up_are_waited_out(hub, expected, call, kind):
    """Eight in a row, more than the Hub client endures by itself."""
    times = {"hang": 1, "drops": 1, "drops of headers": 1, "zeros": 2, "flood": 2}.get(kind, 8)
    fault = Fault(kind, START_UP[call].path, START_UP[call].method, times, retry_after="0")
    hub.faults.append(fault)
    assert digests(6) == expected[:6]
    assert fault.num_hits >= min(times, 6)


def test_all_faults_at_random_places_change_no_row(hub, expected):
    source = open_fineweb()
    hub.faults += [Fault(kind, PARQUET, skip=i // 2) for i, kind in enumerate(FAULTS[:11] * 2)]
    first = digests(13, source)
    assert first == expected[:13]
    stream = stream_of(source, ByteEncoder(), **OPTIONS)
    for _ in range(13):
        next(stream)
    state = stream.state_dict()
    stream.close()
    tail = []
    resumed = [stream_of(source, ByteEncoder(), **OPTIONS, rank=r, world_size=2) for r in (0, 1)]
    for stream in resumed:
        stream.load_state_dict(state)
    for _ in range(17):
        tail.append(sum(next(stream).digest for stream in resumed) % 2**64)
    for stream in resumed:
        stream.close()
    assert first + tail == expected
    assert sum(fault.num_hits for fault in hub.faults) > 10


def test_signed_links_are_followed_and_expired_ones_renewed(hub, expected):
    hub.signed_links = True
    hub.faults.append(Fault("status:403", "^/signed/", times=2, skip=5))
    assert digests() == expected
    assert hub.requests("^/signed/")


def test_links_that_the_storage_rejects_for_a_while_are_waited_out(hub, expected):
    """As the Hub's did on 13 July 2026: nobody had lost a right. What never worked is told soon."""
    hub.signed_links = True
    hub.faults.append(Fault("status:403", "^/signed/", times=20, skip=5))
    assert digests() == expected
    assert hub.faults[0].num_hits == 20
    parquet._served.clear()
    hub.faults = [Fault("status:403", "^/signed/", times=10**9)]
    with pytest.raises(UserError, match="403"):
        open_fineweb().read_unit(0)
    assert hub.faults[0].num_hits == FEW_ATTEMPTS


def test_requests_and_bytes(hub):
    """Two requests a file at start, one a unit; of a unit nothing but its text travels."""
    source = open_fineweb()
    footers = hub.requests(PARQUET)
    assert len(footers) == 2 and all(request.status == 206 for request in footers)
    hub.log.clear()
    for unit in range(source.num_units):
        source.read_unit(unit)
    units = hub.requests(PARQUET)
    assert len(units) == source.num_units
    assert hub.num_bytes(PARQUET) == source.num_bytes.sum()


def test_one_footer_longer_than_the_guess_costs_a_second_request(hub, expected, monkeypatch):
    """It says how long the others may be."""
    monkeypatch.setattr(parquet, "FOOTER_GUESS_BYTES", 64)
    source = open_fineweb()
    assert len(hub.requests(PARQUET)) == 3
    assert digests(5, source) == expected[:5]


def test_an_ignored_range_is_hung_up_on_before_the_file_comes(hub):
    """A server that sends a file without an end where 1 kB was asked for."""
    source = open_fineweb()
    fault = Fault("flood", PARQUET, times=3, headers={"Content-Range": ""})
    hub.faults.append(fault)
    assert source.read_unit(0) == TEXTS[:20]
    assert fault.num_hits == 3 and hub.num_bytes_flooded < 2**26  # what sockets hold


def test_what_was_not_asked_for_is_not_held(hub, monkeypatch):
    """A server that goes on after the range, or after its listing, for ever."""
    monkeypatch.setattr(hub_client, "LARGEST_ANSWER_BYTES", 2**20)
    hub.faults.append(Fault("flood", r"/tree/", times=2))
    source = open_fineweb()
    hub.faults.append(Fault("flood", PARQUET, times=2))
    assert source.read_unit(0) == TEXTS[:20]
    assert hub.num_bytes_flooded < 2**26  # what sockets hold


# --- Answers that nobody foresaw ------------------------------------------------------------------

HTML = b"<!DOCTYPE html><html><body>Sign in to the network of this hotel</body></html>"
OTHER_ANSWERS = {
    "html": Fault("answer", answer=(200, HTML)),
    "list": Fault("answer", answer=(200, b"[]")),
    "object": Fault("answer", answer=(200, b"{}")),
    "null": Fault("answer", answer=(200, b"null")),
    "numbers": Fault("answer", answer=(200, b"[1, 2]")),
    "no json": Fault("answer", answer=(200, b'[{"path": "a')),
    "no text": Fault("answer", answer=(200, b"\xff\xfe\x00")),
    "204": Fault("answer", answer=(204, b"")),
    "redirects": Fault("answer", answer=(302, b""), headers={"Location": "?again"}),
    "redirected to no address": Fault(
        "answer", answer=(302, b""), headers={"Location": "http://["}
    ),
    "gzip that is none": Fault("", headers={"Content-Encoding": "gzip"}),
    "wait for ever": Fault("status:429", headers={"Retry-After": "9" * 30}),
    "wait squared": Fault("status:429", headers={"Retry-After": "²"}),
}
LISTINGS = {
    "no size": lambda entries: [entry.pop("size") for entry in entries],
    "less than nothing": lambda entries: [entry.update(size=-1) for entry in entries],
    "a size in words": lambda entries: [entry.update(size="large") for entry in entries],
    "other files": lambda entries: [entry.update(path="a/b") for entry in entries],
    "no files": lambda entries: entries.clear(),
}
RANGES = {
    "another range": lambda first, last: {"Content-Range": "bytes 5-9/100"},
    "another end": lambda first, last: {"Content-Range": f"bytes {first}-{last + 1}/*"},
    "another total": lambda first, last: {"Content-Range": f"bytes {first}-{last}/{last + 7}"},
    "no range": lambda first, last: {"Content-Range": ""},
    "gzip": lambda first, last: {"Content-Encoding": "gzip"},
}


PLACES = {"revision": 0, "tree": 1, "footer": 0}  # requests that pass: `datasets` lists it first


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("answer", OTHER_ANSWERS)
def test_an_answer_that_nobody_foresaw_is_asked_for_again(hub, monkeypatch, answer, place):
    other, waits = OTHER_ANSWERS[answer], answer == "wait for ever"
    fault = dataclasses.replace(other, path=START_UP[place].path, skip=PLACES[place])
    fault.times = 1 if waits else 2
    hub.faults.append(fault)
    if waits:  # until patience ends, and then once more
        monkeypatch.setattr(patience, "GIVE_UP_AFTER_SECONDS", 0.3)
    assert open_fineweb().read_unit(19) == TEXTS[380:]
    assert fault.num_hits == fault.times
    monkeypatch.setattr(patience, "GIVE_UP_AFTER_SECONDS", 0.3)
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)  # no table of units is kept
    fault.times = 10**9  # `datasets` has kept its listing
    began = time.monotonic()
    refusal(NAME, config=CONFIG)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("change", LISTINGS)
def test_a_listing_without_sizes_is_asked_for_again(hub, change):
    entries = [
        {"type": "file", "oid": "0" * 40, "path": path, "size": len(content)}
        for path, content in repository_files().items()
        if re.search(PARQUET, path)
    ]
    LISTINGS[change](entries)
    wrong = Fault("answer", r"/tree/.*10BT$", skip=1, times=2)  # `datasets` lists it first
    wrong.answer = (200, json.dumps(entries).encode())
    hub.faults.append(wrong)
    assert open_fineweb().read_unit(0) == TEXTS[:20]
    assert wrong.num_hits == 2
    wrong.times = 10**9  # `datasets` has kept its listing
    assert re.match(r"cannot list the files of .*\(dataset_name\): ", refusal(NAME, config=CONFIG))


@pytest.mark.parametrize("answer", RANGES)
def test_a_range_that_was_not_asked_for_is_asked_for_again(hub, answer):
    source = open_fineweb()
    start = int(source._units[0]["start"])
    headers = RANGES[answer](start, start + int(source.num_bytes[0]) - 1)
    hub.faults.append(Fault("", PARQUET, times=3, headers=headers))
    assert source.read_unit(0) == TEXTS[:20]
    assert hub.faults[0].num_hits == 3


def test_bits_that_flip_on_the_disk_of_the_hub_are_told_in_one_line(hub):
    source = open_fineweb()
    hub.faults.append(Fault("flip", PARQUET, times=10**9))
    with pytest.raises(UserError, match=r"^cannot read row group 0 of .*\(dataset_name\).*CRC.*$"):
        source.read_unit(0)
    assert hub.faults[0].num_hits == FEW_ATTEMPTS


# --- final ----------------------------------------------------------------------------------------


def test_what_does_not_exist_fails_at_once_by_name(hub):
    assert re.search("dataset_name: no dataset 'a/b'", refusal("a/b"))
    assert "dataset_revision: " in refusal(NAME, revision="v9")
    assert re.search(
        "dataset_config: .*'sample-9T'.*sample-10BT", refusal(NAME, config="sample-9T")
    )
    assert re.search("dataset_split: .*'test'; it has: train", refusal(NAME, split="test"))
    message = refusal(NAME, config=CONFIG, text_column="txt")
    assert re.search("text_column: .*'txt'; columns of text: id, text", message)
    assert "data_files: " in refusal(NAME, data_files="nothing/*.parquet")
    hub.repositories["datasets", NAME].gated = True
    assert re.search("dataset_name: .* gated.*HF_TOKEN", refusal(NAME))


def test_a_file_that_disappears_is_final(hub):
    source = open_fineweb()
    hub.faults.append(Fault("status:404", PARQUET, times=10**9))
    with pytest.raises(UserError, match=r"cannot read .*10BT.*404"):
        digests(source=source)
    assert len(hub.requests(PARQUET)) <= 2 + 4  # each reader thread asked once


def test_a_long_outage_gives_up_in_one_line(hub, monkeypatch):
    source = open_fineweb()
    monkeypatch.setattr(patience, "GIVE_UP_AFTER_SECONDS", 0.5)
    hub.faults.append(Fault("status:503", PARQUET, times=10**9))
    with pytest.raises(UserError, match=r"cannot read .*: gave up after \d s \(HTTP 503\)"):
        digests(source=source)


# --- revisions and caches -------------------------------------------------------------------------


def test_the_revision_is_pinned_at_start(hub, expected):
    source = open_fineweb()
    repository = hub.repositories["datasets", NAME]
    then = repository.refs["main"]
    changed = repository_files()
    changed["sample/10BT/000_00000.parquet"] = parquet_bytes(TEXTS[::-1][:200], 20)
    now = repository.commit(changed)
    assert source.identity["revision"] == then
    assert digests(source=source) == expected
    moved = open_fineweb()
    assert moved.identity["revision"] == now
    assert moved.identity["files"] != source.identity["files"]
    assert digests(source=moved) != expected
    assert digests(source=open_fineweb(revision=then)) == expected
    state = stream_of(source, ByteEncoder(), **OPTIONS).state_dict()
    with pytest.raises(UserError, match=f"dataset_revision was '{then}' .* is '{now}'"):
        stream_of(moved, ByteEncoder(), **OPTIONS).load_state_dict(state)


def change_under_its_commit(hub: FakeHub) -> None:
    """Letters of the first file: no length, no place, no name."""
    repository = hub.repositories["datasets", NAME]
    [files] = repository.commits.values()
    path = "sample/10BT/000_00000.parquet"
    files[path] = files[path].replace(b"<0>", b"<O>")
    assert files != repository_files()


@pytest.mark.parametrize("signed_links", [True, False])
def test_what_changes_under_its_commit_while_it_is_read_is_refused_at_once(hub, signed_links):
    hub.signed_links = signed_links
    source = open_fineweb()
    change_under_its_commit(hub)
    hub.log.clear()
    line = r"^dataset_revision: .*/000_00000\.parquet changed under its commit .*listed as [^\n]*$"
    with pytest.raises(UserError, match=line):
        source.read_unit(0)
    assert len(hub.requests(PARQUET)) == 1
    assert source.read_unit(19) == TEXTS[380:]


def test_what_changed_under_its_commit_is_refused_at_resume(hub):
    then = open_fineweb()
    state = stream_of(then, ByteEncoder(), **OPTIONS).state_dict()
    change_under_its_commit(hub)
    now = open_fineweb()
    assert {key for key in now.identity if now.identity[key] != then.identity[key]} == {"content"}
    stream = stream_of(now, ByteEncoder(), **OPTIONS)
    with pytest.raises(UserError, match=r"^cannot resume the data stream: the hash of what .*$"):
        stream.load_state_dict(state)


OTHER_TAGS = ("", "0" * 64, 'W/"%s"' % ("0" * 64), '"%s"' % ("0" * 32), f'"{"0" * 62}-2"')


@pytest.mark.parametrize("tag", OTHER_TAGS)
def test_tags_that_are_no_hash_of_the_listings_kind_say_nothing(hub, expected, tag):
    """A mirror's, and any at all of the storage that the Hub redirects to."""
    hub.signed_links = len(tag) == 64
    hub.faults.append(Fault("", "^/signed/|10BT", times=10**9, headers={"ETag": tag}))
    assert digests(5) == expected[:5]


def test_what_the_storage_calls_its_tag_is_no_hash_of_ours(hub, expected):
    """Where the Hub does not say its own before it redirects, as a mirror may not."""
    hub.signed_links = True
    hub.faults.append(Fault("", "10BT", times=10**9, headers={"X-Linked-ETag": ""}))
    hub.faults.append(Fault("", "^/signed/", times=10**9, headers={"ETag": '"%s"' % ("0" * 64)}))
    assert digests(5) == expected[:5]


def test_a_parquet_copy_by_its_slashed_revision(hub, expected):
    repository = hub.repositories["datasets", NAME]
    repository.commit(repository_files(), "refs/convert/parquet")
    source = open_fineweb(revision="refs/convert/parquet")
    assert source.identity["revision"] == repository.refs["refs/convert/parquet"]
    assert digests(5, source) == expected[:5]


def test_the_token_cache_rides_out_an_outage(hub, expected, tmp_path):
    source = open_fineweb()
    digests(source=source, token_cache_dir=tmp_path, num_steps=130)  # more than an epoch
    hub.log.clear()
    hub.faults.append(Fault("status:404", PARQUET, times=10**9))
    assert digests(source=source, token_cache_dir=tmp_path) == expected
    assert not hub.requests(PARQUET)


def test_hub_data_that_is_no_parquet_is_streamed_a_file_a_unit(hub):
    files = {
        f"data/train-{index}.jsonl": "".join(
            json.dumps({"text": text, "id": index}) + "\n" for text in TEXTS[20 * index :][:20]
        ).encode()
        for index in range(6)
    }
    hub.add("datasets", "someone/lines", files)
    source = open_corpus("someone/lines")
    assert source.num_units == 6
    assert source.read_unit(3) == TEXTS[60:80]
    first = digests(5, source)
    hub.faults.append(Fault("status:503", r"\.jsonl$", times=8))
    assert digests(5, open_corpus("someone/lines")) == first


def test_what_the_hub_has_made_of_a_dataset_is_told(hub, caplog):
    """Its own copies in parquet: all configurations, each perhaps cut at 5 GB."""
    hub.add("datasets", "someone/many", {"many.py": b"import datasets"})
    names = ["en/partial-train/0000.parquet", "fr/train/0000.parquet"]
    copies = {name: parquet_bytes([name], 1) for name in names}
    hub.repositories["datasets", "someone/many"].commit(copies, "refs/convert/parquet")
    assert "is a script, which `datasets` runs no longer" in refusal("someone/many")
    assert open_corpus("someone/many", revision="refs/convert/parquet").num_units == 2
    assert "2 configurations (en, fr), and all are read as one: data_files 'en/" in caplog.text
    assert "has the first 5 GB alone of some (en/partial-train/0000.parquet)" in caplog.text
    assert "anew now and then, without its history" in caplog.text
    gone = refusal("someone/many", revision="f" * 40)
    assert gone.endswith("(any more: its history was rewritten?)")


@pytest.mark.parametrize("status", [429, 503])
def test_an_outage_is_no_file_that_is_not_there(hub, status):
    """What the client says of one, `datasets` takes for that; other ranks ask for themselves."""
    texts = {f"data/{name}.jsonl": f'{{"text": "{name}"}}\n'.encode() for name in "ab"}
    hub.add("datasets", "someone/lines", texts)
    outage = Fault(f"status:{status}", "/(tree|paths-info)/", "GET|POST", times=12)
    hub.faults.append(outage)
    source = open_corpus("someone/lines", data_files="data/b.jsonl")
    assert outage.num_hits == 12
    elsewhere = pickle.loads(pickle.dumps(source))
    HfFileSystem.clear_instance_cache()  # as in another process
    outage.num_hits = 0
    assert elsewhere.read_unit(0) == ["b"]
    assert outage.num_hits == 12


IN_ANOTHER_PROCESS = f"""
from datasets import load_dataset
theirs = load_dataset({NAME!r}, {CONFIG!r}, split="train", streaming=True)
texts = [row["text"] for row in theirs]
from gpt2repro.data.opening import open_corpus
ours = open_corpus({NAME!r}, config={CONFIG!r})
read = [text for unit in range(ours.num_units) for text in ours.read_unit(unit)]
print(texts == read, len(texts))
"""


def test_by_environment_alone_and_equal_to_load_dataset(hub):
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        env=os.environ | hub.env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.split() == ["True", "400"], done.stderr[-2000:]
