"""Limits of the Hub's client, which has none: silence, drops and floods end a request."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub import set_client_factory
from huggingface_hub.utils import _http, httpx

from gpt2repro.system.diagnosis import PassingFault, passes, retry_after_seconds

REQUEST_TIMEOUT_SECONDS = 20.0  # of our own requests without a byte: then they are tried again
LONGEST_SILENCE_SECONDS = 100.0  # of a request that sets no limit of its own
LEAST_BYTES_PER_SECOND = 10_000  # of a body, in every window of this many seconds spent on it:
SLOW_AFTER_SECONDS = 60.0
LARGEST_ANSWER_BYTES = 2**28  # of what is no file: the Hub's API, redirections, errors


def longest_seconds(num_bytes: int) -> float:
    """How long a body of so many bytes may take to come."""
    return SLOW_AFTER_SECONDS + num_bytes / LEAST_BYTES_PER_SECOND


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
    if not passes(response.status_code) or not calls.under_way:
        return
    response.read()  # for the next request to have the connection
    kind = httpx.TransportError if retry_after_seconds(response.headers) else httpx.ReadError
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


calls = _Calls()


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


def prepare() -> None:
    """Limit all clients that `huggingface_hub` makes, and let `patiently` alone speak of retries.

    All, because it makes a new one after some errors, in the middle of a call.
    """
    with _client_lock:
        if not isinstance(_http._GLOBAL_CLIENT_FACTORY, _LimitedClients):
            set_client_factory(_LimitedClients(_http._GLOBAL_CLIENT_FACTORY))
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
