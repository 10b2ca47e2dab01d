"""The last words of a rank: what is said, by whom, and the status it leaves with."""

import errno
import signal
import sys
import traceback
from unittest import mock

import pytest
import torch
from tiny_run import without_a_compiler

from gpt2repro import UserError
from gpt2repro.system import command_line, failure, ranks

CLOSED = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[10.0.0.7]:28076. This is typically caused by a remote worker crashing."
)
RESET = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.7]:20865: "
    "Connection reset by peer. This is typically caused by a remote worker hanging."
)


class Left(Exception):
    """In place of the end of the process."""


@pytest.fixture
def leave(monkeypatch, capsys):
    """`leave(error, rank, is_first)` -> exit status and what was said."""
    statuses: list[int] = []

    def end(status: int) -> None:
        statuses.append(status)
        raise Left

    monkeypatch.setattr(failure.os, "_exit", end)
    monkeypatch.setattr(signal, "alarm", mock.Mock())
    monkeypatch.setattr(command_line.time, "sleep", mock.Mock())
    monkeypatch.setattr(ranks, "world_size", lambda: 8)

    def leave(error: BaseException, rank: int = 0, is_first: bool = True) -> tuple[int, str]:
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        monkeypatch.setattr(failure, "_is_first", lambda: is_first)
        with pytest.raises(Left):
            failure.leave_at_once("prog", error)
        return statuses[-1], capsys.readouterr().err

    return leave


def test_a_bug_has_its_traceback_and_the_next_one_a_line(leave):
    status, said = leave(ZeroDivisionError("oh"), rank=3)
    assert status == 1 and "ZeroDivisionError: oh\n" in said
    assert said.endswith(
        "prog: rank 3 of 8 failed: its error is above. The run stops. What was saved is safe: the "
        "same command goes on from the last checkpoint.\n"
    )
    status, said = leave(ZeroDivisionError("oh"), rank=4, is_first=False)
    assert (status, said) == (1, "prog: rank 4 of 8 failed too: ZeroDivisionError: oh\n")


NCCL = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting"
PIPE = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:555] Write error: Broken pipe"


@pytest.mark.parametrize("text", [CLOSED, RESET, NCCL, PIPE])
def test_a_lost_peer_is_told_of_only_if_that_one_said_nothing(leave, text):
    status, said = leave(RuntimeError(text), rank=2)
    assert status == 1 and said.count("\n") == 1 and failure.GOES_ON in said
    assert said.startswith("prog: rank 2 of 8 lost another (")
    assert leave(RuntimeError(text), rank=5, is_first=False) == (1, "")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB, other allocations: 0)."),
    ],
)
def test_want_of_memory_names_what_to_change(leave, error):
    status, said = leave(error, rank=1)
    assert status == 1 and "rank 1 of 8 ran out of memory" in said
    for field in ("micro_batch_size", "auto", "gradient_checkpointing", "sequence_length"):
        assert field in said


def test_a_process_alone_is_told_too_below_its_traceback():
    error = torch.OutOfMemoryError("CUDA out of memory.")
    failure.advise(error)
    said = "".join(traceback.format_exception(error))
    assert said.endswith(f" ran out of memory. {failure.OUT_OF_MEMORY} {failure.GOES_ON}\n")
    error = ZeroDivisionError()
    failure.advise(error)
    assert not hasattr(error, "__notes__")


def test_a_compiler_that_is_not_there_is_told_with_what_to_do(leave):
    with pytest.raises(Exception, match="no-such-compiler") as caught, without_a_compiler():
        torch.compile(lambda x: x + 1)(torch.zeros(3))
    _, said = leave(caught.value)
    assert f"rank 0 of 8 could not compile the model. {failure.NO_COMPILER}" in said
    wrapped = type(caught.value)(torch.OutOfMemoryError("CUDA out of memory."), None)
    assert "rank 0 of 8 ran out of memory. " in leave(wrapped)[1]


@pytest.mark.parametrize("error", [UserError("no such file"), OSError(errno.ENOSPC, "full")])
def test_a_mistake_is_one_line_with_the_rank_that_made_it_alone(leave, monkeypatch, error):
    status, said = leave(error)
    assert status == 2 and said.startswith(f"prog: error: {error}") and said.count("\n") == 1
    assert not command_line.time.sleep.called
    monkeypatch.setenv("RANK", "1")
    status, said = leave(error, rank=1)
    assert status == 2 and said.endswith(" (rank 1 of 8 alone)\n")
    assert command_line.time.sleep.called, "rank 0 speaks first"
    assert leave(error, rank=1, is_first=False) == (2, "")


def test_ctrl_c_has_no_traceback(leave):
    assert leave(KeyboardInterrupt()) == (130, "prog: interrupted\n")


def test_it_cannot_take_long(leave, monkeypatch):
    """Whatever hangs; and a closed screen keeps nobody."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", mock.Mock(flush=mock.Mock(side_effect=BrokenPipeError)))
        assert "failed: its error is above" in leave(ZeroDivisionError())[1]
    signal.alarm.assert_called_with(failure.LAST_WORDS_SECONDS)


def test_without_a_store_each_speaks(monkeypatch):
    world = mock.Mock()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setattr(failure.dist, "group", mock.Mock(WORLD=world))
    world.get_group_store().add.side_effect = [1, 2, RuntimeError("Connection reset by peer")]
    assert [failure._is_first() for _ in range(3)] == [True, False, True]
    # A store may outlive a start that failed.
    world.get_group_store().add.assert_called_with("failures of start 2", 1)
