"""Freed memory is kept until it is released: a tensor finds the place of one that is gone."""

import platform
import subprocess
import sys

SCRIPT = """
import resource
import torch
from gpt2repro import cpu_memory

def faults_of_a_tensor(mebibytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(mebibytes * 2**20 // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
plain = faults_of_a_tensor(16)
kept = cpu_memory.keep_freed_memory()
faults_of_a_tensor(24)
print(plain, faults_of_a_tensor(16), kept)
faults_of_a_tensor(64)
print(faults_of_a_tensor(64))
print(cpu_memory.release_freed_memory(), faults_of_a_tensor(16))
"""


def test_a_tensor_finds_the_memory_of_a_larger_one():
    # In a process of its own: the setting stays for as long as a process lives.
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain, after, kept, huge, released, after_release = done.stdout.split()
    assert kept == released == str(platform.libc_ver()[0] == "glibc")
    if kept == "True":
        # Pages of 4 KiB to 16 KiB; a block beyond the limit leaves no gap behind.
        assert int(plain) > 1000 and int(after) < 100 and int(huge) >= 4000
        assert int(after_release) > 1000
