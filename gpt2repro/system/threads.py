"""A few daemon threads that serve calls in order.

An executor of the standard library joins its threads when the interpreter exits. One that waits out
an outage of the network would keep a crashed or interrupted process alive for half an hour.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

Result = TypeVar("Result")


class PoolClosed(Exception):
    """The call was pending when the pool was closed, or came after."""


class StillRunning(Exception):
    """A call did not end in its time, and was left to itself."""


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """`call()` in a thread of its own, which is left to itself when time is up.

    Raises:
        StillRunning: it is; what `call` raises, a TimeoutError as well, comes as it is.
    """
    pool = DaemonPool(1, "call")
    future = pool.submit(call)
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():
            raise
        raise StillRunning from None
    finally:
        pool.close(0)


class DaemonPool:
    """Like `concurrent.futures.ThreadPoolExecutor`, of daemon threads."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._pending: set[Future] = set()
        self._lock = threading.RLock()  # its owner may be collected, and close it, within it
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future:
        future: Future = Future()
        with self._lock:
            self._pending.add(future)
            if self._closed:  # perhaps only just now
                raise PoolClosed
        self._calls.put((future, call, arguments))
        return future

    def map(self, call: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """`[call(item) for item in items]`, several at a time; the first error is raised."""
        futures = [self.submit(call, item) for item in items]
        return [future.result() for future in futures]

    def _serve(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call, arguments = item
            try:
                if not future.done():
                    future.set_result(call(*arguments))
            except InvalidStateError:
                pass  # closed meanwhile
            except BaseException as error:
                with contextlib.suppress(InvalidStateError):
                    future.set_exception(error)
            with self._lock:
                self._pending.discard(future)
            del item, future, call, arguments  # or an idle thread would keep a result alive

    def close(self, timeout_seconds: float = 1.0) -> None:
        """Fail what is pending and end the threads; not waiting long for a call under way."""
        with self._lock:
            self._closed = True
            pending, self._pending = self._pending, set()
        for future in pending:
            try:
                future.set_exception(PoolClosed())
            except InvalidStateError:
                continue
        for _ in self._threads:
            self._calls.put(None)
        until = time.monotonic() + timeout_seconds
        for thread in self._threads:
            if thread is not threading.current_thread():  # garbage is collected anywhere
                thread.join(max(0.0, until - time.monotonic()))
