"""Patience: what is tried again, what is not, for how long, and how little is said about it."""

import json
import logging
import re
import threading
from email.utils import formatdate
from time import perf_counter
from types import SimpleNamespace

import pyarrow as pa
import pytest
from huggingface_hub.utils import httpx

from gpt2repro import UserError
from gpt2repro.system import hub_client, patience
from gpt2repro.system.diagnosis import FEW_ATTEMPTS, PassingFault, diagnose
from gpt2repro.system.patience import patiently


class HttpError(Exception):
    """An HTTP error as huggingface_hub's and httpx's look: it carries the response."""

    def __init__(self, status, **headers):
        super().__init__(f"status {status}")
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.response = SimpleNamespace(status_code=status, headers=headers)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time that passes by sleeping only; the outages of a process that has never been answered."""
    now = SimpleNamespace(seconds=1000.0, naps=[])

    def sleep(seconds):
        now.seconds += seconds
        now.naps.append(seconds)

    monkeypatch.setattr(patience.time, "sleep", sleep)
    monkeypatch.setattr(patience.time, "monotonic", lambda: now.seconds)
    return now


def failing(*errors):
    """A call that raises `errors` one after the other, then returns 'done'."""
    remaining = list(errors)

    def call():
        if remaining:
            raise remaining.pop(0)
        return "done"

    return call


PASSING = [
    *(HttpError(status) for status in (408, 425, 429, 500, 502, 503, 504, 522)),
    ConnectionResetError("reset"),
    BrokenPipeError(),
    TimeoutError("slow"),
    ConnectionError("Couldn't reach 'a/b' on the Hub"),
    OSError(5, "Input/output error"),
    PassingFault("asked for 10 bytes, 5 came"),
]


def test_no_answer_at_all_is_none():
    """A name server that hangs makes no Hub: on such a machine a run ends in seconds."""
    with pytest.raises(PassingFault) as silence:
        patience._within(0.01, lambda: threading.Event().wait(0.3))
    assert not diagnose(silence.value).answered
    assert diagnose(PassingFault("asked for 10 bytes, 5 came")).answered


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_passing_faults_are_tried_again(error):
    assert patiently(failing(*[error] * 3), "read") == "done"


def test_errors_of_the_hub_client_are_understood():
    """Its HTTP library changed its name between the versions that are supported."""
    from huggingface_hub import errors

    http = __import__(errors.HTTPError.__module__.partition(".")[0])
    assert diagnose(http.ReadTimeout("slow")).answered
    assert diagnose(http.RemoteProtocolError("body ended early")).attempts is None
    assert not diagnose(http.ConnectError("Name or service not known")).answered
    assert not diagnose(http.ConnectTimeout("")).answered
    request = http.Request("GET", "http://hub/x")
    for status, attempts in ((503, None), (404, 0), (401, 0), (403, FEW_ATTEMPTS)):
        response = http.Response(status, request=request)
        error = errors.HfHubHTTPError("answer", response=response)
        assert diagnose(error).attempts == attempts
        wrapped = errors.LocalEntryNotFoundError("not in the cache")
        wrapped.__cause__ = error
        assert diagnose(wrapped).attempts == attempts
    expired = http.Response(401, request=request, headers={"X-Error-Message": "It is expired."})
    reason = diagnose(errors.HfHubHTTPError("answer", response=expired)).reason
    assert "refuses the token: It is expired; log in again" in reason and "HF_TOKEN" in reason
    lost = diagnose(errors.RepositoryNotFoundError("no such", response=expired)).reason
    assert "no such" in lost and "HF_TOKEN" not in lost
    gated = http.Response(403, request=request, headers={"X-Error-Code": "GatedRepo"})
    assert diagnose(errors.GatedRepoError("no", response=gated)).attempts == 0
    assert diagnose(errors.OfflineModeIsEnabled("offline")).attempts == 0


def test_what_passes_may_be_told_by_words_alone():
    limited = ConnectionError(XET.format("429 Too Many Requests"))
    assert patiently(failing(*[limited] * 3 * FEW_ATTEMPTS), "push") == "done"


@pytest.mark.parametrize("status", [400, 401, 404, 410, 416])
def test_what_time_does_not_mend_fails_at_once(status, clock):
    with pytest.raises(UserError, match=rf"^cannot read a\.parquet: HttpError: status {status}$"):
        patiently(failing(HttpError(status)), "read a.parquet")
    assert clock.naps == []


XET = f"Data processing error: {'CAS Client Error: ' * 20}HTTP status client error ({{}})"


@pytest.mark.parametrize(
    "error",
    [
        *(HttpError(403), pa.ArrowInvalid("bad page")),
        ConnectionError(XET.format("401 Unauthorized")),  # hf_xet's
    ],
    ids=repr,
)
def test_what_is_usually_final_is_tried_a_few_times(error):
    few = FEW_ATTEMPTS
    assert patiently(failing(*[error] * (few - 1)), "read") == "done"
    with pytest.raises(UserError, match="cannot read"):
        patiently(failing(*[error] * few), "read")
    outage = [HttpError(503)] * 15
    assert patiently(failing(*outage, error, *outage, error), "read") == "done"


def raised_by_answers():
    """What the Hub's client and ours raise at answers that nobody foresaw."""
    from huggingface_hub import errors

    http = __import__(errors.HTTPError.__module__.partition(".")[0])
    yield from (KeyError("size"), TypeError("list"), AttributeError("get"), AssertionError())
    yield json.JSONDecodeError("Expecting value", "<html>", 0)
    yield UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    yield from (http.TooManyRedirects("20"), http.InvalidURL("port"), http.DecodingError("gzip"))
    yield from (RuntimeError("closed"), OSError("Unexpected end of stream"), MemoryError())


@pytest.mark.parametrize("error", [*raised_by_answers()], ids=repr)
def test_what_nobody_foresaw_is_doubtful_and_then_one_line(error):
    few = FEW_ATTEMPTS
    assert patiently(failing(*[error] * (few - 1)), "read") == "done"
    with pytest.raises(UserError) as raised:
        patiently(failing(*[error] * few), "read")
    told = r"cannot read: {}: [^\n]*, raised at test_patience\.py:\d+"
    assert re.fullmatch(told.format(type(error).__name__), str(raised.value))
    assert raised.value.__cause__ is error  # a bug of ours can be found


def test_what_is_about_arguments_or_about_local_files_passes_through_untouched(clock):
    for error in (ValueError("no config"), FileNotFoundError("no file")):
        with pytest.raises(type(error)):
            patiently(failing(error), "read")
        with pytest.raises(UserError, match="cannot read"):
            patiently(failing(*[error] * 4), "read", passes_on=False)
    clock.naps.clear()
    with pytest.raises(KeyError):
        patiently(failing(KeyError("typo")), "read", reaches_hub=False)
    with pytest.raises(UserError, match="mine"):
        patiently(failing(UserError("mine")), "read")
    assert clock.naps == []


def test_gives_up_after_half_an_hour(clock):
    with pytest.raises(UserError, match=r"^cannot read: gave up after 1800 s \(HTTP 503\)$"):
        patiently(failing(*[HttpError(503)] * 10_000), "read")
    assert sum(clock.naps) == pytest.approx(1800)  # and then once more
    assert max(clock.naps) <= patience.LONGEST_DELAY_SECONDS
    assert len(clock.naps) < 100


def test_an_outage_of_a_known_hub_is_waited_out_for_half_an_hour(clock):
    patiently(lambda: "answer", "read")
    with pytest.raises(UserError, match=r"gave up after 1[78]"):
        patiently(failing(*[ConnectionError("Couldn't reach")] * 10_000), "read")


def test_a_machine_without_a_network_learns_it_in_seconds(clock):
    with pytest.raises(UserError, match=r"the Hub cannot be reached .*; try the demo$"):
        patiently(failing(*[ConnectionError("no")] * 99), "open", if_unreachable="; try the demo")
    assert patience.OFFLINE_AFTER_SECONDS <= sum(clock.naps) <= 1.3 * patience.OFFLINE_AFTER_SECONDS


def test_a_success_that_a_cache_may_have_given_proves_no_network():
    patiently(lambda: "from the cache", "load", reaches_hub=False)
    with pytest.raises(UserError, match="cannot be reached"):
        patiently(failing(*[ConnectionError("no")] * 99), "open")


def test_a_hub_that_answers_503_from_the_start_is_waited_for(clock):
    assert patiently(failing(*[HttpError(503)] * 30), "open") == "done"
    assert sum(clock.naps) > 600


def test_retry_after_is_honoured(clock):
    patiently(failing(HttpError(429, Retry_After="77")), "read")
    assert 77 < clock.naps[0] <= 1.1 * 77
    patiently(failing(HttpError(429, RateLimit='"api";r=0;t=55')), "read")
    assert 55 < clock.naps[1] <= 1.1 * 55
    in_ten_minutes = formatdate(patience.time.time() + 600, usegmt=True)
    patiently(failing(HttpError(503, Retry_After=in_ten_minutes)), "read")
    assert 590 <= clock.naps[2] <= 1.1 * 601
    fast = {"Date": formatdate(9e9, usegmt=True), "Retry_After": formatdate(9e9 + 50, usegmt=True)}
    patiently(failing(HttpError(503, **fast)), "read")
    assert 50 <= clock.naps[3] <= 1.1 * 50, "by the server's clock"


def test_retry_after_longer_than_patience_is_the_last_nap(clock):
    """It used to be the reason to give up at once."""
    patiently(failing(HttpError(429, Retry_After="3600")), "read")
    assert clock.naps == [1800]
    with pytest.raises(UserError, match="gave up after 1800 s"):
        patiently(failing(*[HttpError(429, Retry_After="9" * 400)] * 2), "read")


def test_ranks_do_not_come_back_at_the_same_moment(clock):
    for _ in range(8):
        patiently(failing(HttpError(429, Retry_After="1")), "read")
    assert len(set(clock.naps)) == 8 and min(clock.naps) >= 1 and max(clock.naps) <= 2
    clock.naps.clear()
    for _ in range(8):
        patiently(failing(HttpError(503)), "read")
    assert len(set(clock.naps)) == 8 and min(clock.naps) >= 0.5 and max(clock.naps) <= 1


@pytest.mark.parametrize(
    "garbage", ["soon", "²", "-5", "1e3", "", "nan", "Sat, 99 Foo 99999 99:99:99 GMT", "0x10"]
)
def test_retry_after_that_is_no_time_is_ignored(clock, garbage):
    patiently(failing(HttpError(503, Retry_After=garbage)), "read")
    assert clock.naps[0] <= 1


# --- Limits ---------------------------------------------------------------------------------------


def test_an_attempt_that_does_not_end_is_left_to_itself(monkeypatch):
    never, attempts = threading.Event(), []

    def call():
        attempts.append(1)
        return "done" if len(attempts) > 2 else never.wait(60)

    began = perf_counter()
    assert patiently(call, "read", attempt_seconds=0.05) == "done"
    assert perf_counter() - began < 10 and len(attempts) == 3
    never.set()
    with pytest.raises(KeyError):
        patiently(failing(KeyError("a")), "read", attempt_seconds=5, reaches_hub=False)
    assert patiently(failing(TimeoutError("its own")), "read", attempt_seconds=5) == "done"


def test_a_client_made_in_mid_call_has_limits_too():
    """The Hub's client makes another after a connection failed, within its own attempts."""
    from huggingface_hub import close_session, get_session

    def call():
        close_session()
        return get_session().event_hooks

    hooks = patiently(call, "read")
    assert hub_client._end_silence in hooks["request"]
    assert hub_client._end_drops_and_floods in hooks["response"]
    assert patiently(call, "read") == hooks  # once each


@pytest.mark.parametrize(
    ("method", "url", "goes_along"),
    [
        ("GET", "https://huggingface.co/api/models/me/m/tree/main", True),
        ("GET", "https://datasets-server.huggingface.co/info", True),
        ("GET", "https://mirror.example/api/models/me/m/tree/main?cursor=a", False),
        ("HEAD", "https://huggingface.co.example/me/m", False),
        ("POST", "https://lfs.example/verify", True),  # the protocol of uploads wants it
    ],
)
def test_the_token_does_not_go_to_other_hosts(monkeypatch, method, url, goes_along):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    request = httpx.Request(method, url, headers={"Authorization": "Bearer hf_secret"})
    hub_client._keep_token_at_home(request)
    assert ("Authorization" in request.headers) is goes_along


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (httpx.UnsupportedProtocol("Request URL is missing"), r"missing Is HF_ENDPOINT right\?"),
        (httpx.LocalProtocolError("Illegal header value b'Bearer hf_secret'"), "HF_TOKEN right"),
    ],
)
def test_what_is_wrong_with_the_settings_is_final_and_no_secret_is_told(clock, error, said):
    with pytest.raises(UserError, match=said) as refused:
        patiently(failing(error), "read")
    assert not clock.naps and "hf_secret" not in str(refused.value)


def test_one_line_when_an_outage_begins_and_one_when_it_ends(caplog):
    caplog.set_level(logging.INFO)
    patiently(failing(*[HttpError(502)] * 8), "read unit 7")
    first, last = [record.message for record in caplog.records]
    assert first == "cannot read unit 7 for now (HTTP 502); trying again"
    assert last.startswith("read unit 7: back after ") and last.endswith("(8 attempts failed)")


def test_an_outage_that_many_threads_meet_is_one_outage(caplog):
    barrier = threading.Barrier(4)

    def call(remaining):
        def attempt():
            if remaining:
                error = remaining.pop()
                if len(remaining) == 2:
                    barrier.wait(10)  # all four are in the outage before any leaves it
                raise error
            return "done"

        return attempt

    threads = [
        threading.Thread(target=patiently, args=(call([HttpError(503)] * 4), f"read {index}"))
        for index in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caplog.records) == 2


def test_nothing_is_said_when_nothing_happens(caplog):
    patiently(lambda: "done", "read")
    assert not caplog.records
