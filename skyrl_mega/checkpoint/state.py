"""The tensors of a checkpoint: model, optimizer and random state, in Megatron's resharding format.

A checkpoint saved by one layout loads into another: Megatron's `dist_checkpointing` stores global tensors and each rank reads
the parts it needs. Random states belong to a layout and are restored only into the same one.
"""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from skyrl_mega.checkpoint import store
from skyrl_mega.checkpoint.files import stored_keys
from skyrl_mega.errors import CheckpointError
from skyrl_mega.types import TrainState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skyrl_mega.models.build import PolicyModel
    from skyrl_mega.parallel.topology import Topology


#: What a float32 master is called; the second by Megatron's optimizer that is not distributed, in older checkpoints.
_MASTER, _MASTER_OF_REPLICATED = "optimizer.state.param.", "optimizer.state.fp32_param."


class Checkpointed(Protocol):
    """What is saved: `training.Policy`, as far as a checkpoint sees it. Every method: *all ranks*."""

    def sharded_state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any], *, num_updates: int) -> None: ...


def save(run_dir: str, policy: Checkpointed, state: TrainState, topology: Topology, *, keep_last: int) -> Path:
    """Writes a complete checkpoint at once and returns its directory. All ranks call. Raises CheckpointError."""
    from skyrl_mega.checkpoint.saver import Checkpointer

    return Checkpointer(run_dir, topology, store.Retention(keep_last), asynchronous=False).save(policy, state)


def load(path: Path, policy: Checkpointed, topology: Topology) -> TrainState:
    """Restores model, optimizer and (for the same layout) random state from `path`; returns the run's state. All ranks call."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    state, saved_layout = store.read_state(path)
    same_layout = {"context": 1, **saved_layout} == layout(topology)
    try:
        wanted = sharded_state(policy, topology, with_rng=same_layout)
        _adapt_to(stored_keys(path), wanted)
        # Apart, because a master may be read from the same stored tensor as the weight.
        dist_checkpointing.load({"optimizer_state": wanted.pop("optimizer_state")}, str(path))
        loaded = dist_checkpointing.load(wanted, str(path))
    except (CheckpointingException, CheckpointException, OSError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"checkpoint {path} can't be loaded: {error}. Remove it to use an older one.") from error
    policy.load_state(loaded, num_updates=state.num_optimizer_steps)
    if same_layout:
        _set_rng_state(loaded["rng"])
    return state


def load_model(path: Path, chunks: Sequence[PolicyModel]) -> None:
    """Restores only the model's weights (for export and evaluation). All ranks call. Raises CheckpointError."""
    from megatron.core import dist_checkpointing

    from skyrl_mega.models.build import load_state, sharded_state

    store.require_whole(path)
    loaded = dist_checkpointing.load({"model": sharded_state(chunks)}, str(path))
    load_state(chunks, loaded["model"])


def layout(topology: Topology) -> dict[str, int]:
    """The sizes that random states depend on."""
    return {"tensor": topology.tp_size, "pipeline": topology.pp_size, "data": topology.dp_size, "context": topology.cp_size}


def sharded_state(policy: Checkpointed, topology: Topology, *, with_rng: bool = True) -> dict[str, Any]:
    """Everything that a checkpoint holds in tensors and objects, as Megatron's sharded state; tensors are not copied."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = policy.sharded_state()
    if with_rng:
        group = topology.dp_cp_group
        state["rng"] = ShardedObject(
            "rng",
            _rng_state(),
            (topology.pp_size, topology.tp_size, group.size()),
            (topology.pp_rank, topology.tp_rank, group.rank()),
            replica_id=0,
        )
    return state


def _adapt_to(stored: set[str], wanted: dict[str, Any]) -> None:
    """Names float32 weights by what the checkpoint calls them: the precision of a run may change between its parts.

    A float32 model is its own master and has no `optimizer.state.param`; a bfloat16 model has. So a master is read from the
    model's tensor where there is no stored master, and a float32 weight from the stored master where there is one.
    """
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for entry in nested_values(wanted):
        if not isinstance(entry, (ShardedTensor, ShardedTensorFactory)) or entry.data.dtype != torch.float32:
            continue
        name = entry.key.removeprefix(_MASTER)
        masters = [key for key in (_MASTER + name, _MASTER_OF_REPLICATED + name) if key in stored]
        if entry.key.startswith(_MASTER) or not entry.key.startswith("optimizer."):
            entry.key = masters[0] if masters else name


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
