"""Versions, hardware, commit and memory of this process."""

import subprocess
import sys
from importlib import metadata

from skyrl_mega.telemetry import resources
from skyrl_mega.telemetry.versions import collect_versions, git_commit, hardware


def test_versions_are_those_of_the_installed_packages():
    versions = collect_versions()
    assert versions["torch"] == metadata.version("torch")
    assert versions["megatron-core"] == metadata.version("megatron-core")
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert any(name.startswith("vllm") for name in versions)


def test_hardware_names_what_this_process_may_use():
    described = hardware()
    assert described["cpu_cores"] >= 1
    assert described["memory_bytes"] > 2**30
    assert described["cpu"]
    assert isinstance(described["gpus"], list)


def test_commit_names_a_checkout_and_marks_changes(tmp_path):
    def git(*command):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *command], check=True, capture_output=True)

    assert git_commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "m")
    commit = git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}+changes"


def test_peak_memory_sees_an_allocation_that_is_already_gone():
    program = (
        "from skyrl_mega.telemetry.resources import *\n"
        "before = rss_bytes()\n"
        "block = bytearray(b'x') * (100 * 2**20); del block\n"
        "print(peak_rss_bytes() - before, rss_bytes() - before)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60).stdout
    peak, now = map(int, output.split())
    assert 95 * 2**20 < peak < 150 * 2**20
    assert now < 50 * 2**20
    assert resources.peak_rss_children_bytes() > 95 * 2**20, "the child that just ended is counted"
    assert resources.peak_rss_bytes() >= resources.rss_bytes() // 2
