"""Patience with the network: a passing fault costs time, never a row and never a run.

Hours into a run the Hub answers 502, a connection is reset, a body stops short. `patiently` calls
again, with exponential backoff and jitter, for half an hour. What time cannot mend (a name that
does not exist, a missing permission) is a `UserError` at once. An answer that nobody foresaw (HTML,
a key that lacks) is doubtful: tried a few times, then told. A Hub that has not answered a single
time since the process began is not an outage but a machine without a network: that fails in
seconds. No answer is waited for without end: silence, drops, floods and naps have limits.

By hand, because no library knows which of these is which: `huggingface_hub` gives one request 23
seconds in all, `datasets` ends on a 503 at start-up, and a general retrier repeats what is final.
"""

import errno
import logging
import random
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import set_client_factory
from huggingface_hub.utils import _http, httpx

from gpt2repro import UserError
from gpt2repro.system.text import printable
from gpt2repro.system.threads import DaemonPool

logger = logging.getLogger(__name__)

GIVE_UP_AFTER_SECONDS = 1800
OFFLINE_AFTER_SECONDS = 20  # nothing has answered since the process began
FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 60.0
FEW_ATTEMPTS = 4  # for what is usually final yet passes now and then: 403, what nobody foresaw

PASSING_STATUS = frozenset({408, 425, 429})  # and every 5xx
PASSING_ERRNO = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH}
)

REQUEST_TIMEOUT_SECONDS = 20.0  # of our own requests without a byte: then they are tried again
LONGEST_SILENCE_SECONDS = 100.0  # of a request that sets no limit of its own
LEAST_BYTES_PER_SECOND = 10_000  # of a body, in every window of this many seconds spent on it:
SLOW_AFTER_SECONDS = 60.0
LONGEST_QUESTION_SECONDS = 600.0  # a question and its answer of some pages, all in all
LARGEST_ANSWER_BYTES = 2**28  # of what is no file: the Hub's API, redirections, errors

Result = TypeVar("Result")


class PassingFault(Exception):
    """An answer that is wrong in a way that another attempt mends: short body, ignored range."""

    def __init__(self, reason: str, attempts: int | None = None, *, answered: bool = True) -> None:
        super().__init__(reason)
        self.attempts, self.answered = attempts, answered  # as of a `Diagnosis`


@dataclass(frozen=True)
class Diagnosis:
    """What an exception says about the next attempt.

    `attempts`: at which such fault of a call to stop (None: when time is up; 0: at once).
    `answered`: some server was reached. `retry_after`: the seconds that it asked for.
    """

    reason: str
    attempts: int | None
    answered: bool = True
    retry_after: float = 0.0


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what it was raised from, the outermost first: libraries wrap network errors.

    Without an explicit cause only an OSError counts as a wrapper of what was being handled: a
    KeyError raised while a 404 was being handled is a bug, not a 404.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        handled = current.__context__ if isinstance(current, OSError) else None
        current = current.__cause__ or handled


def _is_a(error: BaseException, name: str, package: str) -> bool:
    """Whether a class `name` of `package` is a base: without importing httpx or its successor."""
    return any(
        base.__name__ == name and base.__module__.startswith(package)
        for base in type(error).__mro__
    )


def _retry_after_seconds(headers) -> float:
    """`Retry-After` (seconds or a date), or the reset time of the Hub's `RateLimit` header."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    if value:
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            return 0.0
    spent = re.search(r"\br=0\b.*?\bt=(\d+)", headers.get("RateLimit", ""))
    return float(spent.group(1)) if spent else 0.0


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _passes(status: int) -> bool:
    return status in PASSING_STATUS or status >= 500


def _diagnose_status(response, reason: str) -> Diagnosis | None:
    status = response.status_code
    if _passes(status):
        asked = _retry_after_seconds(response.headers)
        return Diagnosis(f"HTTP {status}", None, retry_after=asked)
    if status == 403 and "GatedRepo" not in response.headers.get("X-Error-Code", ""):
        return Diagnosis(reason, FEW_ATTEMPTS)  # a signed link expires between resolve and read
    if status == 401 and reason.startswith("HfHubHTTPError"):  # else a repository is not found
        said = response.headers.get("X-Error-Message", "HTTP 401").rstrip(".")
        advice = "log in again (`hf auth login`), or unset HF_TOKEN for what is public"
        return Diagnosis(f"the Hub refuses the token: {said}; {advice}", 0)
    return Diagnosis(reason, 0) if status >= 400 else None


def _diagnose_one(error: BaseException) -> Diagnosis | None:
    """The verdict on one exception of the chain; None if it says nothing about the network."""
    reason = _in_a_line(error)
    if _is_a(error, "OfflineModeIsEnabled", "huggingface_hub"):
        return Diagnosis(f"{reason} (HF_HUB_OFFLINE is set)", 0)
    if isinstance(error, PassingFault):
        return Diagnosis(str(error), error.attempts, error.answered)
    response = getattr(error, "response", None)
    if response is not None and hasattr(response, "status_code"):
        return _diagnose_status(response, reason)
    if _is_a(error, "TransportError", "httpx") or _is_a(error, "ConnectionError", "requests"):
        names = ("ConnectError", "ConnectTimeout", "ProxyError")
        unreachable = any(_is_a(error, name, "") for name in names)
        return Diagnosis(reason, None, answered=not unreachable)
    if isinstance(error, ConnectionError | TimeoutError):
        # `datasets` raises a bare ConnectionError when the Hub does not answer at all.
        reset = isinstance(error, ConnectionResetError | ConnectionAbortedError | BrokenPipeError)
        return Diagnosis(reason, None, answered=reset)
    if isinstance(error, OSError) and error.errno in PASSING_ERRNO:
        return Diagnosis(reason, None, answered=False)
    return None


def diagnose(error: Exception) -> Diagnosis | None:
    """The verdict on an exception and its causes; None for one that nobody foresaw.

    A cause that carries an HTTP answer or a transport error outranks the wrapper around it.
    """
    verdicts = [verdict for cause in _causes(error) if (verdict := _diagnose_one(cause))]
    if not verdicts:
        return None
    return next((verdict for verdict in verdicts if verdict.answered), verdicts[-1])


class _Outages:
    """One line when an outage begins and one when it ends, however many threads run into it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_waiting = 0
        self._num_failures = 0
        self._began = 0.0
        self.hub_answered = False  # at least once since the process began

    def fault(self, what: str, reason: str, first: bool) -> None:
        with self._lock:
            self._num_failures += 1
            if first:
                self._num_waiting += 1
                if self._num_waiting == 1:
                    self._began, self._num_failures = time.monotonic(), 1
                    logger.warning("cannot %s for now (%s); trying again", what, printable(reason))

    def over(self, what: str, *, recovered: bool) -> None:
        with self._lock:
            self._num_waiting -= 1
            if self._num_waiting == 0:
                lost = time.monotonic() - self._began
                word = "back" if recovered else "gave up"
                logger.warning(
                    "%s: %s after %.1f s (%d attempts failed)", what, word, lost, self._num_failures
                )


_outages = _Outages()


def _end_silence(request) -> None:
    """A request hook: no request may wait for ever, as some of the Hub client's listings would."""
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        step: LONGEST_SILENCE_SECONDS if limits.get(step) is None else limits[step]
        for step in ("connect", "read", "write", "pool")
    }


def _end_drops_and_floods(response) -> None:
    """A response hook: a body must come at some rate, and one that is no file must end.

    Only the time spent on waiting for the next bytes counts, not what their reader does with them.
    """
    is_file = response.status_code < 300 and not response.request.url.path.startswith("/api/")
    raw = response.iter_raw

    def iter_raw(chunk_size: int | None = None) -> Iterator[bytes]:
        parts = raw(chunk_size)
        num_bytes = in_window = 0
        waited = 0.0
        while True:
            began = time.monotonic()
            part = next(parts, None)
            waited += time.monotonic() - began
            if part is None:
                return
            num_bytes += len(part)
            in_window += len(part)
            if num_bytes > LARGEST_ANSWER_BYTES and not is_file:
                raise PassingFault(f"an answer of more than {LARGEST_ANSWER_BYTES:,} bytes")
            if waited > SLOW_AFTER_SECONDS:
                if in_window < waited * LEAST_BYTES_PER_SECOND:
                    raise PassingFault(f"only {in_window:,} bytes came in {waited:.0f} s")
                waited, in_window = 0.0, 0
            yield part

    response.iter_raw = iter_raw  # what all the ways to read a body go through


def _raise_what_passes(response) -> None:
    """A response hook: an answer that passes is an error of the network, and not the client's own.

    That one is an `OSError`, which `transformers` and `datasets` take for a file that is not there:
    a tokenizer without its vocabulary, a dataset without its files, and no word. This one none of
    them knows. The client makes its few attempts all the same; but not where it is told when to
    come back, which it would obey in silence, for hours: that waiting is for `patiently`.

    Only while a call of `patiently` is under way, in whatever threads it has: the client is that of
    the whole process, and who else uses it counts on its own errors.
    """
    if not _passes(response.status_code) or not _calls.under_way:
        return
    response.read()  # for the next request to have the connection
    kind = httpx.TransportError if _retry_after_seconds(response.headers) else httpx.ReadError
    error: Any = kind(f"HTTP {response.status_code}", request=response.request)
    error.response = response
    raise error


class _Calls:
    """How many calls of `patiently` are under way; waits between attempts do not count."""

    def __init__(self) -> None:
        self._lock, self.under_way = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self.under_way += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self.under_way -= 1


_calls = _Calls()


_client_lock = threading.Lock()


@dataclass(frozen=True)
class _LimitedClients:
    """Makes the clients that `make` would make, with limits: the Hub's client has none."""

    make: Callable[[], Any]

    def __call__(self) -> Any:
        client = self.make()
        client.event_hooks["request"].append(_end_silence)
        client.event_hooks["response"] += [_end_drops_and_floods, _raise_what_passes]
        return client


def _prepare_hub_client() -> None:
    """Limit all clients that `huggingface_hub` makes, and let `patiently` alone speak of retries.

    All, because it makes a new one after some errors, in the middle of a call.
    """
    with _client_lock:
        if not isinstance(_http._GLOBAL_CLIENT_FACTORY, _LimitedClients):
            set_client_factory(_LimitedClients(_http._GLOBAL_CLIENT_FACTORY))
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """`call()` in a thread of its own, which is left to itself when time is up.

    The limits above hold between two bytes and in a body. Nothing else ends the rest: a name server
    that hangs, a server that sends its headers in drops.
    """
    pool = DaemonPool(1, "attempt")
    future = pool.submit(call)
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():
            raise
        raise PassingFault(f"no answer within {seconds:.0f} s", answered=False) from None
    finally:
        pool.close(0)


def _attempt(call: Callable[[], Result], attempt_seconds: float | None) -> Result:
    _prepare_hub_client()
    with _calls:
        return call() if attempt_seconds is None else _within(attempt_seconds, call)


def _delay_seconds(attempt: int, retry_after: float) -> float:
    """Exponential backoff; with jitter, so that the ranks of a run do not knock all at once."""
    longest = LONGEST_DELAY_SECONDS if _outages.hub_answered else OFFLINE_AFTER_SECONDS / 4
    backoff = min(longest, FIRST_DELAY_SECONDS * 2 ** min(attempt, 16))
    if retry_after:
        retry_after += random.uniform(0, max(FIRST_DELAY_SECONDS, retry_after / 10))
    return max(retry_after, backoff * random.uniform(0.5, 1.0))


def _unforeseen(error: Exception, passes_on: bool) -> Diagnosis | None:
    """Doubtful: garbage of a server's or a bug of ours, and the line says where to look."""
    if passes_on and (isinstance(error, FileNotFoundError) or type(error) is ValueError):
        return None
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return Diagnosis(f"{_in_a_line(error)}, raised at {where}", FEW_ATTEMPTS)


def _why_stop(
    verdict: Diagnosis, num_doubtful: int, waited: float, limit: float, if_unreachable: str
) -> str:
    """Why there is no further attempt; "" if there is one."""
    if verdict.attempts is not None and num_doubtful >= verdict.attempts:
        return verdict.reason
    if not _outages.hub_answered and waited >= OFFLINE_AFTER_SECONDS:
        return f"the Hub cannot be reached ({verdict.reason}){if_unreachable}"
    return f"gave up after {waited:.0f} s ({verdict.reason})" if waited >= limit else ""


def patiently(
    call: Callable[[], Result],
    what: str,
    *,
    give_up_after_seconds: float | None = None,
    attempt_seconds: float | None = None,
    if_unreachable: str = "",
    reaches_hub: bool = True,
    passes_on: bool = True,
) -> Result:
    """`call()`, repeated through passing faults: the network's, HTTP 408/429/5xx, short bodies.

    `call` must be repeatable. `what` completes "cannot ...": "read unit 7 of data.parquet".
    `attempt_seconds` ends an attempt; without it one may take any time while its bodies come.
    `if_unreachable` is advice for a machine without a network, appended to that error.
    `reaches_hub=False` is for calls that can succeed from a local cache: they prove nothing, and
    what has nothing to do with the network passes through untouched.

    Whatever else a call that reaches the Hub raises is doubtful, for any answer may be garbage.
    With `passes_on`, what libraries raise about arguments (`FileNotFoundError`, and `ValueError`
    itself but no parser's) passes through, for callers that say it better. What a call knows to be
    final it raises as `UserError`.

    Raises:
        UserError: at once for what time does not mend (401, 404, gated), after `FEW_ATTEMPTS` for
            what is doubtful, after `OFFLINE_AFTER_SECONDS` if no server has ever answered, and
            otherwise after `give_up_after_seconds` (half an hour).
    """
    limit = GIVE_UP_AFTER_SECONDS if give_up_after_seconds is None else give_up_after_seconds
    began = time.monotonic()
    num_failures = num_doubtful = 0
    recovered = False
    try:
        while True:
            try:
                result = _attempt(call, attempt_seconds)
                recovered = True
                _outages.hub_answered |= reaches_hub
                return result
            except UserError:
                raise
            except Exception as error:
                verdict = diagnose(error)
                if verdict is None and reaches_hub:
                    verdict = _unforeseen(error, passes_on)
                if verdict is None:
                    raise
                _outages.hub_answered |= verdict.answered
                num_doubtful += verdict.attempts is not None
                waited = time.monotonic() - began
                if stop := _why_stop(verdict, num_doubtful, waited, limit, if_unreachable):
                    raise UserError(f"cannot {what}: {stop}") from error
                delay = min(_delay_seconds(num_failures, verdict.retry_after), limit - waited)
                _outages.fault(what, verdict.reason, first=num_failures == 0)
                num_failures += 1
            time.sleep(delay)
    finally:
        if num_failures:
            _outages.over(what, recovered=recovered)
