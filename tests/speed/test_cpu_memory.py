"""Freed memory is kept: a tensor finds the place of one before."""

import platform
import subprocess
import sys

import pytest

from gpt2repro.speed import cpu_memory

SCRIPT = """
import resource
import torch
from gpt2repro.speed import cpu_memory

def faults_of_a_tensor(mebibytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(mebibytes * 2**20 // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
print(faults_of_a_tensor(24))
assert cpu_memory.keep_freed_memory()
print(faults_of_a_tensor(24), faults_of_a_tensor(16))
print(faults_of_a_tensor(64), faults_of_a_tensor(64))
assert cpu_memory.keep_freed_memory()
print(faults_of_a_tensor(24), faults_of_a_tensor(16))
"""
# A tensor of 16 MiB has 1,024 to 4,096 pages, of 16 to 4 KiB.
ALL_NEW, FOUND = 1000, 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_a_tensor_finds_the_memory_of_a_larger_one():
    # In a process of its own: the setting stays for as long as a process lives.
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    new, kept, beyond_the_limit, kept_again = (
        [int(faults) for faults in line.split()] for line in done.stdout.splitlines()
    )
    assert new[0] > ALL_NEW
    assert kept[0] > ALL_NEW and kept[1] < FOUND
    assert min(beyond_the_limit) >= 4 * ALL_NEW
    assert kept_again[0] > ALL_NEW and kept_again[1] < FOUND


def test_without_glibc_nothing_is_set(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert cpu_memory.keep_freed_memory() is False
