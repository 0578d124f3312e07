"""Can this machine run the main job, and which backend will each part use? Small judgements over the facts of `machine.py`.

Each check is a function of the machine and (where settings were given) the configuration; it returns one row of the report.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from packaging.specifiers import SpecifierSet

from skyrl_mega.config.placement import resolve_placement
from skyrl_mega.config.schema import Config
from skyrl_mega.config.surroundings import TRACKER_PACKAGES, is_installed
from skyrl_mega.launch.machine import DISTRIBUTION, Gpu, Machine
from skyrl_mega.rewards.check import find_problem

_GIB = 2**30
#: Peak resident memory of the quickstart is about 7 GB.
_COMFORTABLE_MEMORY_BYTES = 8 * _GIB
_COMFORTABLE_DISK_BYTES = 5 * _GIB
_SET_UP_AGAIN = "Run `bash scripts/setup.sh`."


@dataclass(frozen=True)
class Check:
    """One row: `status` fail means that the main job can't run here; `remedy` is empty where there is nothing to
    do, or where `found` says it already."""

    section: Literal["machine", "software", "backends", "settings"]
    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


CheckFunction = Callable[[Machine, Config], Check]


def all_checks(machine: Machine, config: Config) -> list[Check]:
    """Every row of the report, in its order."""
    return [check(machine, config) for check in CHECKS]


# ---- machine --------------------------------------------------------------------------------------------------------------


def python(machine: Machine, config: Config) -> Check:
    if machine.requires_python and machine.python not in SpecifierSet(machine.requires_python):
        return Check(
            "machine", "python", "fail", machine.python, f"Use a Python {machine.requires_python} in a new virtual environment."
        )
    return Check("machine", "python", "ok", machine.python)


def cores(machine: Machine, config: Config) -> Check:
    found = f"{machine.cores}, load {machine.load:.1f}, {config.trainer.threads} thread(s) a process"
    if machine.load > machine.cores:
        return Check("machine", "cores", "warn", found, "The machine is busy: expect slow steps, and keep `trainer.threads=1`.")
    if config.trainer.threads > machine.cores:
        return Check("machine", "cores", "warn", found, f"Set `trainer.threads={machine.cores}` or less.")
    return Check("machine", "cores", "ok", found)


def memory(machine: Machine, config: Config) -> Check:
    found = f"{_gib(machine.memory_available_bytes)} free of {_gib(machine.memory_total_bytes)}"
    if machine.memory_available_bytes < _COMFORTABLE_MEMORY_BYTES:
        return Check("machine", "memory", "warn", found, "The quickstart needs about 7 GB; end other programs first.")
    return Check("machine", "memory", "ok", found)


def gpus(machine: Machine, config: Config) -> Check:
    if machine.has_cuda:
        return Check("machine", "gpus", "ok", _gpu_words(machine.torch.visible_gpus))
    if config.trainer.device == "cuda":
        return Check(
            "machine",
            "gpus",
            "fail",
            "none that torch can use, and trainer.device is cuda",
            "Set `trainer.device=auto`, or install torch for CUDA: `bash scripts/setup.sh` on the GPU machine.",
        )
    if machine.driver_gpus:
        return Check(
            "machine",
            "gpus",
            "warn",
            f"{_gpu_words(machine.driver_gpus)}, not visible to torch",
            f"To use them install torch and vLLM for CUDA. {_SET_UP_AGAIN}",
        )
    return Check("machine", "gpus", "ok", "none; everything runs on the CPU")


def shared_memory(machine: Machine, config: Config) -> Check:
    bucket_bytes = config.rollout.weight_bucket_mib * 2**20
    if machine.shm_free_bytes is None or machine.shm_total_bytes is None:
        return Check("machine", "/dev/shm", "fail", "absent", "Weights reach the engine through it: mount a tmpfs at /dev/shm.")
    found = f"{_gib(machine.shm_free_bytes)} free of {_gib(machine.shm_total_bytes)}"
    if machine.shm_free_bytes < bucket_bytes:
        fitting = machine.shm_free_bytes // 2**20 // 2
        return Check(
            "machine",
            "/dev/shm",
            "fail",
            f"{found}; a weight bucket takes {config.rollout.weight_bucket_mib} MiB",
            "Make it larger (containers: `--shm-size=2g`)"
            + (f", or set `rollout.weight_bucket_mib={fitting}`." if fitting else "."),
        )
    return Check("machine", "/dev/shm", "ok", found)


def disk(machine: Machine, config: Config) -> Check:
    found = f"{_gib(machine.disk_free_bytes)} free where {config.trainer.run_dir} lies"
    if machine.disk_free_bytes < _COMFORTABLE_DISK_BYTES:
        remedy = "Checkpoints may not fit: free some space, choose another `trainer.run_dir`, or `checkpoint.keep_last=1`."
        return Check("machine", "disk", "warn", found, remedy)
    return Check("machine", "disk", "ok", found)


def compilers(machine: Machine, config: Config) -> Check:
    found = ", ".join(f"{name} {version}" for name, version in machine.compilers.items())
    return Check("machine", "compilers", "ok", found or "none; only optional native kernels need one")


# ---- software -------------------------------------------------------------------------------------------------------------


def project(machine: Machine, config: Config) -> Check:
    if not machine.pins:
        return Check(
            "software",
            DISTRIBUTION,
            "fail",
            "not installed: the versions it needs are unknown",
            "Run `pip install -e .` in its root.",
        )
    return Check("software", DISTRIBUTION, "ok", machine.versions.get(DISTRIBUTION, "installed"))


def torch(machine: Machine, config: Config) -> Check:
    if machine.torch.error:
        return Check("software", "torch", "fail", f"can't be imported: {machine.torch.error}", _SET_UP_AGAIN)
    build = f"built for CUDA {machine.torch.cuda}" if machine.torch.cuda else "CPU build"
    return _versioned(machine, "torch", note=build)


def vllm(machine: Machine, config: Config) -> Check:
    name = machine.vllm_distribution
    if name is None:
        return Check("software", "vllm", "fail", "not installed", f"It samples the rollouts. {_SET_UP_AGAIN}")
    build = "CPU build" if machine.is_vllm_cpu_build else "CUDA build"
    found = f"{machine.versions[name]}, {build}"
    if machine.torch.cuda and machine.is_vllm_cpu_build:
        return Check(
            "software", "vllm", "fail", f"{found}, beside torch for CUDA", f"Install both for the same device. {_SET_UP_AGAIN}"
        )
    if "torch" in machine.versions and not machine.torch.error and not machine.torch.cuda and not machine.is_vllm_cpu_build:
        return Check(
            "software", "vllm", "fail", f"{found}, beside torch for CPU", f"Install both for the same device. {_SET_UP_AGAIN}"
        )
    pin = machine.pins.get("vllm")
    if pin and not pin.versions.contains(machine.versions[name], prereleases=True):
        return Check("software", "vllm", "fail", f"{found}; the project needs {pin.versions}", _SET_UP_AGAIN)
    return Check("software", "vllm", "ok", found)


def megatron_core(machine: Machine, config: Config) -> Check:
    return _versioned(machine, "megatron-core")


def transformers(machine: Machine, config: Config) -> Check:
    return _versioned(machine, "transformers")


def other_dependencies(machine: Machine, config: Config) -> Check:
    """The remaining hard dependencies in one row: only those that do not fit are named."""
    shown = {"torch", "megatron-core", "transformers"}
    names = [name for name, pin in machine.pins.items() if not pin.extra and name not in shown]
    wrong = [f"{name} ({row.found})" for name in names if (row := _versioned(machine, name)).status == "fail"]
    if wrong:
        return Check("software", "other", "fail", ", ".join(wrong), "Run `pip install -e .` in the project's root.")
    return Check("software", "other", "ok", f"{len(names)} further dependencies agree")


def accelerators(machine: Machine, config: Config) -> Check:
    """TransformerEngine, flash-attn and Triton: useful on CUDA, never needed on CPU."""
    parts = {"transformer-engine": "TransformerEngine", "flash-attn": "flash-attn", "triton": "Triton"}
    found = ", ".join(f"{words} {machine.versions.get(name, 'absent')}" for name, words in parts.items())
    if machine.has_cuda and not {"transformer-engine", "flash-attn"} & set(machine.versions):
        return Check(
            "software",
            "accelerators",
            "warn",
            found,
            "Attention will be slow: `pip install 'skyrl-mega[te]'` or `'skyrl-mega[flash]'`.",
        )
    return Check("software", "accelerators", "ok", found)


# ---- backends -------------------------------------------------------------------------------------------------------------


def device(machine: Machine, config: Config) -> Check:
    return Check("backends", "device", "ok", f"{_device(machine, config)} (trainer.device={config.trainer.device})")


def attention(machine: Machine, config: Config) -> Check:
    wanted, where = config.model.attention, _device(machine, config)
    problems = {"transformer_engine": "", "flash": "", "sdpa": ""}  # best first, as models.attention.choose_backend has it
    for name, distribution in (("transformer_engine", "transformer-engine"), ("flash", "flash-attn")):
        if where == "cpu":
            problems[name] = "it is for CUDA only"
        elif distribution not in machine.versions:
            problems[name] = "it is not installed"
    if config.model.dtype != "bfloat16":
        problems["flash"] = problems["flash"] or "it has no float32 kernels"
    best = next(name for name, problem in problems.items() if not problem)
    if wanted != "auto" and problems[wanted]:
        found = f"{wanted} was asked for; {problems[wanted]}"
        return Check("backends", "attention", "fail", found, f"Set `model.attention=auto` (it would choose {best}).")
    return Check("backends", "attention", "ok", _ATTENTION_WORDS[best if wanted == "auto" else wanted])


def rollout_engine(machine: Machine, config: Config) -> Check:
    name = machine.vllm_distribution
    if name is None:
        return Check("backends", "rollout engine", "fail", "none", f"Install vLLM. {_SET_UP_AGAIN}")
    engines = config.rollout.num_engines + len(config.rollout.external_urls)
    place = {
        "in_process": "in the trainer's process",
        "child_process": "in a child process",
        "ray": f"{engines} engine{'s' if engines != 1 else ''} on Ray",
    }[resolve_placement(config, int(os.environ.get("WORLD_SIZE", "1")))]
    return Check("backends", "rollout engine", "ok", f"vLLM {machine.versions[name]}, {config.rollout.dtype}, {place}")


def weight_transport(machine: Machine, config: Config) -> Check:
    asked = config.rollout.weight_transport
    if asked in ("nccl", "cuda_ipc") and _device(machine, config) != "cuda":
        return Check("backends", "weight transport", "fail", f"{asked}, which needs CUDA", "Set rollout.weight_transport=auto.")
    if asked not in ("auto", "shm"):
        return Check("backends", "weight transport", "ok", f"{asked}, buckets of {config.rollout.weight_bucket_mib} MiB")
    if machine.shm_free_bytes is None:
        return Check("backends", "weight transport", "fail", "none", "Mount a tmpfs at /dev/shm.")
    return Check(
        "backends", "weight transport", "ok", f"shared memory, buckets of {config.rollout.weight_bucket_mib} MiB in /dev/shm"
    )


def kernels(machine: Machine, config: Config) -> Check:
    """Which backend the LM-head operators will take: the same order as their `Operator.choose`."""
    where, wanted = _device(machine, config), config.model.kernels
    problems = {
        "cpu": "it is for CPU only" if where == "cuda" else machine.extensions.get("_C", "the extension _C was not looked for"),
        "triton": "it is for CUDA only" if where == "cpu" else "" if "triton" in machine.versions else "triton is not installed",
        "reference": "",
    }
    if wanted != "auto" and problems[wanted]:
        found = f"{wanted} was asked for; {problems[wanted]}"
        return Check("backends", "kernels", "fail", found, f"Set `model.kernels=auto`, or: {_SET_UP_AGAIN}")
    best = next(name for name, problem in problems.items() if not problem)
    chosen = best if wanted == "auto" else wanted
    words = {
        "cpu": f"C++ ({machine.cpu_isa})",
        "triton": "Triton",
        "reference": f"torch reference, {config.model.logprob_chunk_tokens} rows at once",
    }
    if chosen == "reference" and wanted == "auto":
        missing = problems["cpu" if where == "cpu" else "triton"]
        found = f"linear_logprobs: {words[chosen]}; {missing}"
        return Check("backends", "kernels", "warn", found, f"The LM head will be several times slower. {_SET_UP_AGAIN}")
    return Check("backends", "kernels", "ok", f"linear_logprobs: {words[chosen]}")


def extensions(machine: Machine, config: Config) -> Check:
    """The compiled modules, one row; an absent one says why. That nothing of it is needed here makes it no warning."""
    words = {"_C": "C++ for CPU", "_C_cuda": "CUDA C++"}
    parts = [f"{words[name]}: {reason or 'present'}" for name, reason in machine.extensions.items()]
    if machine.has_cuda and machine.extensions.get("_C_cuda"):
        return Check("software", "extensions", "warn", "; ".join(parts), f"Needs nvcc and torch for CUDA. {_SET_UP_AGAIN}")
    return Check("software", "extensions", "ok", "; ".join(parts) or "not looked for: torch can't be imported")


def trackers(machine: Machine, config: Config) -> Check:
    wanted = config.telemetry.trackers
    absent = [name for name in wanted if name not in TRACKER_PACKAGES or not is_installed(TRACKER_PACKAGES[name][0])]
    found = ", ".join(("metrics.jsonl", *wanted))
    if absent:
        commands = ", ".join(f"`pip install 'skyrl-mega{TRACKER_PACKAGES.get(name, ('', ''))[1]}'`" for name in absent)
        return Check(
            "backends", "trackers", "fail", f"{found}; not installed: {', '.join(absent)}", f"{commands}, or leave them out."
        )
    return Check("backends", "trackers", "ok", found)


def rewards(machine: Machine, config: Config) -> Check:
    """What a trajectory's reward is mixed from. Functions are imported, servers asked one short question."""
    reward = config.reward
    found = " + ".join((f"{reward.env_weight:g} env", *(f"{term.weight:g} {term.name} ({term.kind})" for term in reward.terms)))
    if problems := [problem for term in reward.terms if (problem := find_problem(term))]:
        return Check("backends", "rewards", "fail", " ".join((f"{found};", *problems)))
    return Check("backends", "rewards", "ok", found)


CHECKS: tuple[CheckFunction, ...] = (
    *(python, cores, memory, gpus, shared_memory, disk, compilers),
    *(project, torch, vllm, megatron_core, transformers, other_dependencies, accelerators, extensions),
    *(device, attention, rollout_engine, weight_transport, kernels, rewards, trackers),
)

_ATTENTION_WORDS = {
    "sdpa": "torch SDPA, over sequences of similar length",
    "flash": "flash-attn, variable length",
    "transformer_engine": "TransformerEngine",
}


def _device(machine: Machine, config: Config) -> str:
    return ("cuda" if machine.has_cuda else "cpu") if config.trainer.device == "auto" else config.trainer.device


def _versioned(machine: Machine, name: str, note: str = "") -> Check:
    """A row for a distribution that the project's own metadata pins."""
    version, pin = machine.versions.get(name), machine.pins.get(name)
    if version is None:
        return Check("software", name, "fail", "not installed", _SET_UP_AGAIN)
    found = f"{version}, {note}" if note else version
    if pin and not pin.versions.contains(version, prereleases=True):
        return Check("software", name, "fail", f"{found}; the project needs {pin.versions}", _SET_UP_AGAIN)
    return Check("software", name, "ok", found)


def _gpu_words(cards: tuple[Gpu, ...]) -> str:
    names = {card: cards.count(card) for card in cards}
    return ", ".join(f"{count} x {card.name} ({_gib(card.memory_bytes)})" for card, count in names.items())


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.1f} GiB"
