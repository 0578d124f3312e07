"""The tensors of a checkpoint: model, optimizer and random state, in Megatron's resharding format.

A checkpoint saved by one layout loads into another: Megatron's `dist_checkpointing` stores global tensors and each rank reads
the parts it needs. Random states belong to a layout and are restored only into the same one.
"""

from __future__ import annotations

import ctypes
import random
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from skyrl_mega.checkpoint import store
from skyrl_mega.errors import CheckpointError
from skyrl_mega.types import TrainState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skyrl_mega.models.build import PolicyModel
    from skyrl_mega.parallel.topology import Topology


class Checkpointed(Protocol):
    """What is saved: `training.Policy`, as far as a checkpoint sees it. Every method: *all ranks*."""

    def sharded_state(self, *, loading: bool) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any], *, num_updates: int) -> None: ...


def save(run_dir: str, policy: Checkpointed, state: TrainState, topology: Topology, *, keep_last: int) -> Path:
    """Writes a complete checkpoint and returns its directory. All ranks call; nothing counts until the final rename."""
    from megatron.core import dist_checkpointing

    temporary = topology.broadcast_object(
        store.begin(run_dir, state.step) if topology.rank == 0 else None, phase="checkpoint/begin"
    )
    _tie_writer_to_this_process()
    dist_checkpointing.save(_sharded_state(policy, topology, loading=False), str(temporary), _save_strategy())
    topology.barrier("checkpoint/written")
    final = store.commit(temporary, state, layout(topology), keep_last) if topology.rank == 0 else None
    return topology.broadcast_object(final, phase="checkpoint/commit")


def load(path: Path, policy: Checkpointed, topology: Topology) -> TrainState:
    """Restores model, optimizer and (for the same layout) random state from `path`; returns the run's state. All ranks call."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    state, saved_layout = store.read_state(path)
    same_layout = saved_layout == layout(topology)
    wanted = _sharded_state(policy, topology, loading=True, with_rng=same_layout)
    try:
        loaded = dist_checkpointing.load(wanted, str(path))
    except (CheckpointingException, OSError) as error:
        raise CheckpointError(f"checkpoint {path} can't be loaded: {error}. Remove it to use an older one.") from error
    policy.load_state(loaded, num_updates=state.num_optimizer_steps)
    if same_layout:
        _set_rng_state(loaded["rng"])
    return state


def load_model(path: Path, chunks: Sequence[PolicyModel]) -> None:
    """Restores only the model's weights (for export and evaluation). All ranks call."""
    from megatron.core import dist_checkpointing

    from skyrl_mega.models.build import load_state, sharded_state

    store.read_state(path)
    loaded = dist_checkpointing.load({"model": sharded_state(chunks)}, str(path))
    load_state(chunks, loaded["model"])


def layout(topology: Topology) -> dict[str, int]:
    """The sizes that random states depend on."""
    return {"tensor": topology.tp_size, "pipeline": topology.pp_size, "data": topology.dp_size}


def _sharded_state(policy: Checkpointed, topology: Topology, *, loading: bool, with_rng: bool = True) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = policy.sharded_state(loading=loading)
    if with_rng:
        state["rng"] = ShardedObject(
            "rng",
            _rng_state(),
            (topology.pp_size, topology.tp_size, topology.dp_size),
            (topology.pp_rank, topology.tp_rank, topology.dp_rank),
            replica_id=0,
        )
    return state


def _save_strategy() -> Any:
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy("torch_dist"), group, True)


def _tie_writer_to_this_process() -> None:
    """Makes the process that holds the writer's queue end with this one.

    Megatron starts it at the first save and never ends it itself: a rank that is killed would leave it behind for good, with
    the rank's output open, so that whoever reads that waits forever.
    """
    import multiprocessing
    from multiprocessing.managers import SyncManager

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()


def end_with_parent() -> None:
    """Called in a child process: it is killed when its parent ends, however that ends (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _rng_state() -> dict[str, Any]:
    import numpy
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    import numpy
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])
