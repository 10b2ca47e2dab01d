"""What a result says of its machine, its command and its commit."""

import os
import subprocess
import sys

import psutil
import pytest
import torch

from gpt2repro.system import machine


@pytest.mark.parametrize(
    ("flags", "suffix"),
    [
        ("fpu avx2", ""),
        ("fpu avx2 avx512_bf16", " with bfloat16"),
        ("amx_tile amx_bf16", " with bfloat16"),
    ],
)
def test_a_processor_is_named_with_what_it_can_do(monkeypatch, flags, suffix):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    core = {"model name": "Some CPU", "flags": flags}
    monkeypatch.setattr(machine, "_first_core", lambda: core)
    capability = torch.backends.cpu.get_cpu_capability()
    assert machine.hardware().endswith(f" cores of Some CPU ({capability}{suffix})")


def test_a_run_on_the_processor_does_not_name_an_idle_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert machine.describe("cpu")["hardware"].endswith(")")
    assert machine.hardware() == machine.describe("cuda")["hardware"] == "1 x Some GPU"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as torchrun and accelerate set it
    assert machine.hardware() == "2 x Some GPU"


def test_a_run_on_a_macs_gpu_names_no_processor():
    assert machine.hardware("mps").startswith("the GPU (MPS) of ")


def test_where_the_kernel_says_nothing_there_is_still_a_name(monkeypatch):
    monkeypatch.setattr(machine, "_first_core", dict)
    assert machine._processor()
    assert machine._vector_instructions() == torch.backends.cpu.get_cpu_capability()


# --- Command and commit ---------------------------------------------------------------------------

ARGUMENTS = ["--recipe", "demo", "--sample_prompt", "It's $5"]
SHOWN = """train_accelerate.py --recipe demo --sample_prompt 'It'"'"'s $5'"""


@pytest.mark.parametrize(
    ("parent", "shown"),
    [
        (
            ["/venv/bin/python3", "/venv/bin/accelerate", "launch", "--config_file", "cpu.yaml"],
            "accelerate launch --config_file cpu.yaml",
        ),
        (["python", "-m", "accelerate.commands.launch"], "python -m accelerate.commands.launch"),
        (["/bin/python", "-u", "/bin/accelerate-launch", "--cpu"], "accelerate-launch --cpu"),
        (["/bin/python", "/bin/torchrun", "--nproc_per_node=2"], "torchrun --nproc_per_node=2"),
        (["python", "-m", "torch.distributed.run"], "python -m torch.distributed.run"),
        (["bash", "train.sh"], "python"),
        (["python", "/bin/accelerate", "config"], "python"),
        ([], "python"),
    ],
)
def test_the_command_has_its_launchers_options(monkeypatch, parent, shown):
    class Parent:
        def __init__(self, pid):
            assert pid == os.getppid()

        def cmdline(self):
            return [*parent, "train_accelerate.py", *ARGUMENTS] if parent else []

    monkeypatch.setattr(psutil, "Process", Parent)
    assert machine.launch_command(ARGUMENTS) == f"{shown} {SHOWN}"


def test_a_launcher_that_is_gone_or_hidden_gives_the_plain_command(monkeypatch):
    for problem in (psutil.NoSuchProcess(1), psutil.AccessDenied(1), PermissionError()):

        def gone(pid, problem=problem):
            raise problem

        monkeypatch.setattr(psutil, "Process", gone)
        assert machine.launch_command(ARGUMENTS) == f"python {SHOWN}"


def test_a_real_parent(tmp_path):
    launcher = tmp_path / "torchrun"
    launcher.write_text("import subprocess, sys; subprocess.run([sys.executable, *sys.argv[2:]])")
    script = tmp_path / "train_accelerate.py"
    script.write_text(
        "import sys; from gpt2repro.system import machine; "
        "print(machine.launch_command(sys.argv[1:]))"
    )
    command = [sys.executable, launcher, "--standalone", script, *ARGUMENTS]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown == f"torchrun --standalone {tmp_path}/{SHOWN}\n"


def test_the_commit_is_the_packages_own(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        who = ("-c", "user.name=me", "-c", "user.email=me@example.com")
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    file = tmp_path / "gpt2repro" / "system" / "machine.py"
    file.parent.mkdir(parents=True)
    (tmp_path / "gpt2repro" / "__init__.py").write_text("")
    file.write_text("")
    monkeypatch.setattr(machine, "__file__", str(file))
    assert machine.code_commit() is None  # no checkout
    (tmp_path / "other").write_text("")
    git("init", "--quiet")
    git("add", "other")
    assert machine.code_commit() is None  # one of something else, and without a commit
    git("commit", "--quiet", "--message", "other")
    assert machine.code_commit() is None  # installed within somebody's project
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    git("tag", "--annotate", "v1", "--message", "v1")
    commit = git("rev-parse", "HEAD")
    assert machine.code_commit() == commit and len(commit) == 40
    (tmp_path / "runs").write_text("untracked")
    assert machine.code_commit() == commit
    file.write_text("changed")
    assert machine.code_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.code_commit() is None  # no git


def test_a_containers_memory_is_what_its_group_allows(tmp_path, monkeypatch):
    total = psutil.virtual_memory().total
    groups = tmp_path / "cgroup"
    job = groups / "slurm" / "job_1" / "step_0"
    job.mkdir(parents=True)
    (tmp_path / "own").write_text("1:cpu:/\n0::/slurm/job_1/step_0\n")
    monkeypatch.setattr(machine, "CONTROL_GROUPS", groups)
    monkeypatch.setattr(machine, "OWN_GROUP", tmp_path / "own")
    assert machine.main_memory() == total  # no limits, or another kind of groups
    for place, limit in ((job, "max"), (job.parent, "4096"), (groups, "8192")):
        (place / "memory.max").write_text(f"{limit}\n")
    assert machine.main_memory() == 4096
    for place in (job.parent, groups):  # more than there is
        (place / "memory.max").write_text(str(2 * total))
    assert machine.main_memory() == total


def test_limits_of_version_1_of_control_groups_and_quotas_of_cores(tmp_path, monkeypatch):
    job = tmp_path / "memory" / "docker" / "abc"
    job.mkdir(parents=True)
    (tmp_path / "own").write_text("9:memory:/docker/abc\n3:cpu,cpuacct:/\n0::/user.slice\n")
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert machine.num_cores() == 64
    (job / "memory.limit_in_bytes").write_text("8192\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine.main_memory() == 8192
    (tmp_path / "user.slice").mkdir()
    (tmp_path / "user.slice" / "cpu.max").write_text("max 100000\n")
    assert machine.num_cores() == 64
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert machine.num_cores() == 3
    (tmp_path / "cpu").mkdir()
    for name, number in (("quota", "-1"), ("period", "100000")):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(f"{number}\n")
    assert machine.num_cores() == 3
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("200000\n")
    assert machine.num_cores() == 2
