"""A pool that is closed: nobody waits for a call under way, however many there are."""

import threading
import time

import pytest

from gpt2repro.system.threads import DaemonPool, PoolClosed


def test_closing_waits_for_all_threads_together():
    all_busy, release, pool = threading.Barrier(6), threading.Event(), DaemonPool(5, "busy")

    def be_busy() -> None:
        all_busy.wait(30)
        release.wait(30)

    calls = [pool.submit(be_busy) for _ in range(6)]
    all_busy.wait(30)
    began = time.monotonic()
    pool.close(timeout_seconds=0.4)
    assert 0.3 < time.monotonic() - began < 1.2  # five times 0.4 would be 2
    release.set()
    for call in calls:
        with pytest.raises(PoolClosed):
            call.result()
