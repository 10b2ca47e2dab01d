"""What an error says about another attempt: it passes, it is final, or nobody foresaw it.

By hand, because no library knows which is which: `huggingface_hub` gives one request 23 seconds in
all, `datasets` ends on a 503 at start-up, and a general retrier repeats what is final.
"""

import errno
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

FEW_ATTEMPTS = 4  # for what is usually final yet passes now and then: 403, what nobody foresaw
PASSING_STATUS = frozenset({408, 425, 429})  # and every 5xx
PASSING_ERRNO = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH}
    | {errno.ENOTCONN, errno.ESHUTDOWN}  # of a file system whose server is away
)


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


def retry_after_seconds(headers) -> float:
    """`Retry-After` (seconds or a date), or the reset time of the Hub's `RateLimit` header."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    if value:
        try:
            told = headers.get("Date")  # by the server's clock, which is not ours
            now = parsedate_to_datetime(told).timestamp() if told else time.time()
            return max(0.0, parsedate_to_datetime(value).timestamp() - now)
        except (ValueError, TypeError, OverflowError):
            return 0.0
    spent = re.search(r"\br=0\b.*?\bt=(\d+)", headers.get("RateLimit", ""))
    return float(spent.group(1)) if spent else 0.0


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def passes(status: int) -> bool:
    return status in PASSING_STATUS or status >= 500


def _diagnose_status(response, reason: str) -> Diagnosis | None:
    status = response.status_code
    if passes(status):
        asked = retry_after_seconds(response.headers)
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
    reason = in_a_line(error)
    if _is_a(error, "OfflineModeIsEnabled", "huggingface_hub"):
        return Diagnosis(f"{reason} (HF_HUB_OFFLINE is set)", 0, answered=False)
    if isinstance(error, PassingFault):
        return Diagnosis(str(error), error.attempts, error.answered)
    response = getattr(error, "response", None)
    if response is not None and hasattr(response, "status_code"):
        return _diagnose_status(response, reason)
    if _is_a(error, "UnsupportedProtocol", "httpx"):
        return Diagnosis(f"{reason} Is HF_ENDPOINT right?", 0)
    if _is_a(error, "LocalProtocolError", "httpx") and "header" in str(error):
        return Diagnosis("a header has characters that none may have: is HF_TOKEN right?", 0)
    if _is_a(error, "TransportError", "httpx") or _is_a(error, "ConnectionError", "requests"):
        names = ("ConnectError", "ConnectTimeout", "ProxyError")
        unreachable = any(_is_a(error, name, "") for name in names)
        return Diagnosis(reason, None, answered=not unreachable)
    if isinstance(error, ConnectionError | TimeoutError):
        # hf_xet has no answer to show, only its words: "HTTP status client error (401 ...".
        if status := re.search(r"client error \((4\d\d)", str(error)):
            return Diagnosis(reason, None if passes(int(status[1])) else FEW_ATTEMPTS)
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
