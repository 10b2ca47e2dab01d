"""Patience with the network: a passing fault costs time, never a row and never a run.

Hours into a run the Hub answers 502, a connection is reset, a body stops short. `patiently` calls
again, with exponential backoff and jitter, for half an hour. What time cannot mend (a name that
does not exist, a missing permission) is a `UserError` at once. An answer that nobody foresaw (HTML,
a key that lacks) is doubtful: tried a few times, then told. A Hub that has not answered a single
time since the process began is not an outage but a machine without a network: that fails in
seconds. No answer is waited for without end: silence, drops, floods and naps have limits.
"""

import logging
import random
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from gpt2repro import UserError
from gpt2repro.system import hub_client, threads
from gpt2repro.system.diagnosis import FEW_ATTEMPTS, Diagnosis, PassingFault, diagnose, in_a_line

logger = logging.getLogger(__name__)

GIVE_UP_AFTER_SECONDS = 1800
OFFLINE_AFTER_SECONDS = 20  # nothing has answered since the process began
FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 60.0
LONGEST_QUESTION_SECONDS = 600.0  # a question and its answer of some pages, all in all

Result = TypeVar("Result")


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
                    logger.warning("cannot %s for now (%s); trying again", what, reason)

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


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """`call()`, for so long.

    The client's limits hold between two bytes and in a body. Nothing else ends the rest: a name
    server that hangs, a server that sends its headers in drops.
    """
    try:
        return threads.within(seconds, call)
    except threads.StillRunning:
        raise PassingFault(f"no answer within {seconds:.0f} s", answered=False) from None


def _attempt(call: Callable[[], Result], attempt_seconds: float | None) -> Result:
    hub_client.prepare()
    with hub_client.calls:
        read = partial(hub_client.reading_all, call)
        return read() if attempt_seconds is None else _within(attempt_seconds, read)


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
    return Diagnosis(f"{in_a_line(error)}, raised at {where}", FEW_ATTEMPTS)


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
