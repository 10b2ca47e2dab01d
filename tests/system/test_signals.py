"""Signals as requests, a second Ctrl-C, and what the kernel says when the launcher dies."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from gpt2repro.system import signals
from gpt2repro.system.signals import SIGNALS, StopRequest

SLEEP = "import time; print('ready', flush=True); time.sleep(60)"


@pytest.fixture
def stop():
    # What a process in a shell's foreground starts with; one in the background ignores Ctrl-C.
    usual = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    found = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield StopRequest(lambda mine: mine)
    for number, handler in found.items():
        signal.signal(number, handler)


def python(code: str, **environment: str) -> subprocess.Popen:
    """A process that runs `code` and has said "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_that_is_agreed_on_when_polled(stop, number):
    assert not stop.poll()
    signal.raise_signal(number)  # to this thread, so it is here when the call returns
    assert stop.signal == number and not stop.agreed
    assert stop.poll() and stop.agreed


def test_another_ranks_signal_is_mine_too():
    told = iter([False, True, False])
    request = StopRequest(lambda mine: next(told))
    try:
        assert [request.poll() for _ in range(4)] == [False, True, True, True]
        assert request.signal is None  # once agreed, nobody is asked any more
    finally:
        request.close()


def test_closing_gives_signals_back(stop):
    """And one that came too late to be polled is not lost."""
    assert signal.getsignal(signal.SIGINT) == stop.receive
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stop.close()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_closing_hears_what_slurms_launcher_was_deaf_to():
    """After the last step USR1 is to end a push, also where it was ignored when we began."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        StopRequest(bool).close()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_nohup_keeps_a_run_from_stopping_when_its_terminal_is_gone(stop):
    stop.close()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = StopRequest(bool)
    signal.raise_signal(signal.SIGHUP)
    assert request.signal is None
    request.close()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_second_ctrl_c_leaves_at_once():
    code = "from gpt2repro.system import signals; signals.StopRequest(bool);" + SLEEP
    process = python(code)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # the terminal's and the launcher's: one request
    process.send_signal(signal.SIGTERM)
    time.sleep(signals.SAME_REQUEST_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert process.communicate()[1] == (
        f"{signals.ANSWER[True].decode()}\nStopping at once; the last checkpoint stands.\n"
    )


# --- The launcher ---------------------------------------------------------------------------------

CHILD = "from gpt2repro.system import signals; signals.end_with_launcher();" + SLEEP
LAUNCHER = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print("ready", flush=True)
child.wait()
"""


def ends(process: psutil.Process, seconds: float) -> bool:
    """Whether `process` ends in time; nobody may be there to reap it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is Linux's")
@pytest.mark.parametrize("variable", signals.LAUNCHER_VARIABLES)
def test_a_process_ends_with_its_launcher(variable):
    launcher = python(LAUNCHER, **{variable: "no"})
    [child] = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    assert ends(child, 10)


def test_a_process_that_was_started_by_hand_outlives_its_shell(monkeypatch):
    for variable in signals.LAUNCHER_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    shell = python(LAUNCHER)
    [child] = psutil.Process(shell.pid).children()
    shell.kill()
    shell.wait()
    try:
        assert not ends(child, 0.5)
    finally:
        child.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is Linux's")
def test_a_launcher_that_died_before_the_kernel_was_asked():
    code = "from gpt2repro.system import signals as p; p.end_with_launcher(parent=p.PARENT + 1)"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert result.returncode == -signal.SIGTERM
