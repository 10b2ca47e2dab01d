"""What the Hub's client lacks: limits, and errors that none takes for a file that is not there."""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import _http, httpx

from gpt2repro.system.diagnosis import (
    FEW_ATTEMPTS,
    Diagnosis,
    PassingFault,
    diagnose,
    in_a_line,
    passes,
    retry_after_seconds,
)

REQUEST_TIMEOUT_SECONDS = 20.0  # of our own requests without a byte: then they are tried again
LONGEST_SILENCE_SECONDS = 100.0  # of a request that sets no limit of its own
LEAST_BYTES_PER_SECOND = 10_000  # of a body, in every window of this many seconds spent on it:
SLOW_AFTER_SECONDS = 60.0
LARGEST_ANSWER_BYTES = 2**28  # of what is no file: the Hub's API, redirections, errors

Result = TypeVar("Result")


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


def _keep_token_at_home(request) -> None:
    """A request hook: who reads elsewhere goes without the token.

    Behind a mirror the next page of a listing may be a link to the Hub itself.
    """
    home, url = urlsplit(constants.ENDPOINT), request.url
    within = url.host.endswith(f".{home.hostname}")  # as `datasets` has a server there
    if request.method in ("GET", "HEAD") and not within and url.netloc.decode() != home.netloc:
        request.headers.pop("Authorization", None)


def _end_drops_and_floods(response) -> None:
    """A response hook: a body must come at some rate, and one that is no file must end.

    Only the time spent on waiting for the next bytes counts, not what their reader does with them.
    """
    is_api = str(response.request.url).startswith(f"{constants.ENDPOINT}/api/")
    is_file = response.status_code < 300 and not is_api
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


def _refuse_other_bytes(response) -> None:
    """A response hook: who asks for a part of a file gets that part.

    `HfFileSystem` takes for it whatever comes: the whole file, nothing, a page of a proxy's.
    """
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", response.request.headers.get("Range", ""))
    if not (asked and response.is_success and calls.under_way):
        return
    first, last = int(asked[1]), int(asked[2])
    said = response.headers.get("Content-Range", "")
    served = re.fullmatch(rf"bytes {first}-(\d+)/(\d+|\*)", said, re.IGNORECASE)
    whole = served and (int(served[1]) == last or served[2] == str(int(served[1]) + 1))
    if response.status_code != 206 or not whole:
        got = f"HTTP {response.status_code} {said}".rstrip()
        raise PassingFault(f"asked for bytes {first}-{last}, was served {got}")


class _Unread(threading.local):
    """Files of the Hub that this thread has asked for and did not get, by address, and why not."""

    files: dict[str, Exception] | None = None


_unread = _Unread()


def reading_all(call: Callable[[], Result]) -> Result:
    """`call()`; a file that it did not get is an error, whatever it has made of that.

    To `transformers` and `datasets` a file that is refused (by a proxy: 403, or a page of its own)
    or out of reach is one that does not exist. They go on: with other tokens, with older weights,
    without the settings for generation. Here only a 404 says that. What a library asks for in
    threads of its own is not seen.

    Raises:
        PassingFault: whatever was the matter with the first such file.
    """
    outer, unread = _unread.files, dict[str, Exception]()
    _unread.files = unread
    try:
        result = call()
    except Exception as error:
        if not unread or diagnose(error):
            raise
    finally:
        _unread.files = outer
    for address, problem in unread.items():
        verdict = diagnose(problem) or Diagnosis(in_a_line(problem), FEW_ATTEMPTS)
        said = f"{urlsplit(address).path}: {verdict.reason}"
        raise PassingFault(said, verdict.attempts, answered=verdict.answered) from problem
    return result


def _remember_unread(client) -> None:
    """Let `client` tell `reading_all` which files did not come."""
    send = client.send

    def watched(request, **options):
        address, files = str(request.url), _unread.files
        if files is None or "/resolve/" not in address:
            return send(request, **options)
        try:
            response = send(request, **options)
        except Exception as error:
            files[address] = error
            raise
        files.pop(address, None)
        if problem := _refusal(response):
            files[address] = PassingFault(problem, FEW_ATTEMPTS)
        return response

    client.send = watched


def _refusal(response) -> str:
    """What is wrong with the answer to who asks for a file; "" for the Hub's own, of any kind."""
    headers, status = response.headers, response.status_code
    if status >= 400:
        return "" if status == 404 else f"HTTP {status}"
    is_moved = headers.get("Location", "").startswith("/")  # a repository with another name
    has_tag = "X-Linked-ETag" in headers or "ETag" in headers
    if response.request.method == "HEAD" and not is_moved:
        return "" if has_tag and "X-Repo-Commit" in headers else "an answer that is not the Hub's"
    return ""


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
        client.event_hooks["request"] += [_end_silence, _keep_token_at_home]
        client.event_hooks["response"] += [
            _end_drops_and_floods,
            _raise_what_passes,
            _refuse_other_bytes,
        ]
        _remember_unread(client)
        return client


def prepare() -> None:
    """Limit all clients that `huggingface_hub` makes, and let `patiently` alone speak of retries.

    All, because it makes a new one after some errors, in the middle of a call.
    """
    with _client_lock:
        if not isinstance(_http._GLOBAL_CLIENT_FACTORY, _LimitedClients):
            set_client_factory(_LimitedClients(_http._GLOBAL_CLIENT_FACTORY))
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
