"""What does a checkpoint cost the training: seconds, seconds of standstill, and memory?

SmolLM2-135M in bfloat16 with float32 masters and both moments: 1.9 GB on one rank. The limit is `write_limit`: as many bytes
written to a file and made durable. `megatron` is how this library saved before (Megatron's `fully_reshardable` gather and its
writer processes; CPU and memory of those come on top of what is measured here, which is this process). `in_place` and `beside`
are this library's own, without and with `checkpoint.asynchronous`, until the checkpoint counts; `stall` is the part of `beside`
for which the training stands still, after the first save, whose copy also touches new memory (`first_stall`). `step` and
`step_beside_save` are one training step alone and while a save is written by another thread; the second ends with the step.

    python scripts/bench/checkpoint_save.py --json docs/benchmarks/checkpoint_save.json

The model comes from .cache/models/SmolLM2-135M-Instruct, or from the directory that SKYRL_MEGA_BENCH_MODEL names.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skyrl_mega.telemetry.bench import Variant, bench_main

ROOT = Path(__file__).resolve().parents[2]
MODEL = os.environ.get("SKYRL_MEGA_BENCH_MODEL", str(ROOT / ".cache/models/SmolLM2-135M-Instruct"))
GIGABYTES = 1.8847
TOKENS_PER_STEP = 2048


def scratch() -> Path:
    """A directory that is gone when the process ends."""
    import atexit

    path = Path(tempfile.mkdtemp(prefix="checkpoint-bench-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def make_policy() -> Any:
    import torch

    from skyrl_mega.config.load import load_config
    from skyrl_mega.parallel.topology import init_topology
    from skyrl_mega.training.policy import Policy

    torch.set_num_threads(1)
    config = load_config(["recipe=quickstart", f"model.path={MODEL}", "precision=bfloat16"])
    return Policy.from_hf(config, init_topology(config.parallel, torch.device("cpu"), seed=0))


def states():
    from skyrl_mega.types import TrainState

    step = 0
    while True:
        step += 1
        yield TrainState(step, step, {}, num_trained_groups=0, num_optimizer_steps=0)


def checkpointer(policy: Any, *, asynchronous: bool):
    from skyrl_mega.checkpoint import store
    from skyrl_mega.checkpoint.saver import Checkpointer

    return Checkpointer(str(scratch()), policy.topology, store.Retention(1), asynchronous=asynchronous)


def write_limit() -> Callable[[], None]:
    import torch

    values, path = torch.ones(int(GIGABYTES * 1e9), dtype=torch.uint8).numpy(), scratch() / "bytes"

    def write() -> None:
        path.unlink(missing_ok=True)
        with open(path, "wb", buffering=0) as file:
            for start in range(0, len(values), 2**24):
                file.write(values[start : start + 2**24])
            os.fsync(file.fileno())

    return write


def megatron() -> Callable[[], None]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    from skyrl_mega.models.build import sharded_state

    policy, parent = make_policy(), scratch()
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}

    def save() -> None:
        directory = parent / "step"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        model = sharded_state(policy.chunks)
        optimizer = policy.optimizer.sharded_state_dict(model, is_loading=False, metadata=metadata)
        strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy("torch_dist"), policy.topology.dp_cp_group, True
        )
        dist_checkpointing.save({"model": model, "optimizer": optimizer}, str(directory), strategy)

    return save


def whole_save(asynchronous: bool) -> Callable[[], None]:
    policy, state = make_policy(), states()
    saver = checkpointer(policy, asynchronous=asynchronous)

    def save() -> None:
        saver.save(policy, next(state))
        saver.finish()

    return save


def in_place() -> Callable[[], None]:
    return whole_save(False)


def beside() -> Callable[[], None]:
    return whole_save(True)


def copy_to_host(first: bool) -> Callable[[], None]:
    from skyrl_mega.checkpoint.pieces import HostCopy, pieces_to_write
    from skyrl_mega.checkpoint.state import sharded_state

    policy = make_policy()
    kept = HostCopy()

    def copy() -> None:
        memory = HostCopy() if first else kept
        memory.of(pieces_to_write(sharded_state(policy, policy.topology)))

    return copy


def first_stall() -> Callable[[], None]:
    return copy_to_host(first=True)


def stall() -> Callable[[], None]:
    return copy_to_host(first=False)


def saved(policy: Any) -> Path:
    return checkpointer(policy, asynchronous=False).save(policy, next(states()))


def verify() -> Callable[[], None]:
    from skyrl_mega.checkpoint import store

    path = saved(make_policy())

    def check() -> None:
        store.require_whole(path, "checksums")

    return check


def load() -> Callable[[], None]:
    from skyrl_mega.checkpoint import state

    policy = make_policy()
    path = saved(policy)

    def read() -> None:
        state.load(path, policy, policy.topology)

    return read


def train_step(beside_save: bool) -> Callable[[], None]:
    import torch

    from skyrl_mega.data.packing import balance_and_pack
    from skyrl_mega.types import TrainSample

    policy, state = make_policy(), states()
    saver = checkpointer(policy, asynchronous=True)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(TOKENS_PER_STEP // 256):
        token_ids = torch.randint(5, 49000, (256,), generator=generator)
        ones = torch.ones(256, dtype=torch.bool)
        samples.append(TrainSample(index, index, str(index), token_ids, ones, torch.zeros(256), 1.0, torch.randn(256)))
    batch = balance_and_pack(samples, tokens_per_micro_batch=1024, dp_rank=0, dp_size=1, skip_zero_advantage=False)

    def step() -> None:
        if beside_save:
            saver.save(policy, next(state))
        policy.train_step(batch)

    return step


def step() -> Callable[[], None]:
    return train_step(beside_save=False)


def step_beside_save() -> Callable[[], None]:
    return train_step(beside_save=True)


def variants() -> list[Variant]:
    saves = ("write_limit", "megatron", "in_place", "beside", "first_stall", "stall", "verify", "load")
    limits = {name: None if name == "write_limit" else "write_limit" for name in saves}
    measured = [Variant(name, f"{__file__}:{name}", {}, work=GIGABYTES, limit_from=limit) for name, limit in limits.items()]
    return [*measured, *(Variant(name, f"{__file__}:{name}", {}) for name in ("step", "step_beside_save"))]


if __name__ == "__main__":
    if not Path(MODEL).is_dir():
        sys.exit(f"no model at {MODEL}; run scripts/quickstart.sh once, or set SKYRL_MEGA_BENCH_MODEL")
    bench_main("checkpoint_save", variants(), rate_unit="GB/s", clock="wall", description=__doc__)
