"""The tensors of a checkpoint: models, optimizers and random state, in Megatron's resharding format.

A checkpoint saved by one layout loads into another: Megatron's `dist_checkpointing` stores global tensors and each rank reads
the parts it needs. Random states belong to a layout and are restored only into the same one.
"""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from skyrl_mega.checkpoint import store
from skyrl_mega.checkpoint.files import stored_keys
from skyrl_mega.errors import CheckpointError
from skyrl_mega.types import TrainState

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from skyrl_mega.models.build import PolicyModel
    from skyrl_mega.parallel.topology import Topology


#: What only Muon keeps.
_MOMENTUM = "optimizer.state.momentum."

#: What a float32 master is called; the second by Megatron's optimizer that is not distributed, in older checkpoints.
_MASTER, _MASTER_OF_REPLICATED = "optimizer.state.param.", "optimizer.state.fp32_param."


#: Before the names of the critic's parts of the whole state. (Its tensors have names of their own: `Critic.checkpoint_prefix`.)
_CRITIC = "critic_"


class Checkpointed(Protocol):
    """What is saved: `training.Trainable`, as far as a checkpoint sees it. Every method: *all ranks*."""

    #: The layout it is cut by; a critic may have another one than the policy.
    topology: Topology

    def sharded_state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any], *, num_updates: int) -> None: ...


def save(
    run_dir: str,
    policy: Checkpointed,
    state: TrainState,
    topology: Topology,
    *,
    keep_last: int,
    critic: Checkpointed | None = None,
) -> Path:
    """Writes a complete checkpoint at once and returns its directory. All ranks call. Raises CheckpointError."""
    from skyrl_mega.checkpoint.saver import Checkpointer

    return Checkpointer(run_dir, topology, store.Retention(keep_last), asynchronous=False).save(policy, state, critic=critic)


def load(path: Path, policy: Checkpointed, topology: Topology, *, critic: Checkpointed | None = None) -> TrainState:
    """Restores models, optimizers and (for the same layout) random state from `path`; returns the run's state. All ranks call.

    Raises CheckpointError where it can't be read, or was saved with a critic and the run has none, or the other way round.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    state, saved_layout = store.read_state(path)
    require_critic(path, state, has_critic=critic is not None)
    same_layout = {"context": 1, **saved_layout} == layout(topology)
    try:
        wanted = sharded_state(policy, topology, with_rng=same_layout) | critic_state(critic)
        stored = stored_keys(path)
        _require_same_optimizer(path, stored, wanted)
        require_same_adapter(path, stored, wanted["model"])
        _adapt_to(stored, wanted)
        # Apart, because a master may be read from the same stored tensor as the weight.
        optimizers = {name: wanted.pop(name) for name in list(wanted) if name.endswith("optimizer_state")}
        dist_checkpointing.load(optimizers, str(path))
        loaded = dist_checkpointing.load(wanted, str(path))
    except (CheckpointingException, CheckpointException, OSError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"checkpoint {path} can't be loaded: {error}. Remove it to use an older one.") from error
    policy.load_state(loaded, num_updates=state.num_optimizer_steps)
    if critic is not None:
        assert state.num_critic_updates is not None  # require_critic has seen it
        critic.load_state({"model": loaded[f"{_CRITIC}model"]}, num_updates=state.num_critic_updates)
    if same_layout:
        _set_rng_state(loaded["rng"])
    return state


def require_critic(path: Path, state: TrainState, *, has_critic: bool) -> None:
    """Raises CheckpointError unless the checkpoint holds a critic exactly where the run has one."""
    saved_with_critic = state.num_critic_updates is not None
    if saved_with_critic and not has_critic:
        raise CheckpointError(
            f"{path} was saved with a critic and this run has none: its `algorithm.advantage` needs no values. Set it as it was "
            "(gae), or begin anew in another trainer.run_dir with `model.path` at an export of this checkpoint."
        )
    if has_critic and not saved_with_critic:
        raise CheckpointError(
            f"{path} was saved without a critic and this run has one: its `algorithm.advantage` needs values. Set it as it was, "
            "or begin anew in another trainer.run_dir with `model.path` at an export of this checkpoint."
        )


def load_model(path: Path, chunks: Sequence[PolicyModel]) -> None:
    """Restores only the model's weights, or the adapter beside them (for export and evaluation). All ranks call.

    Raises CheckpointError.
    """
    from megatron.core import dist_checkpointing

    from skyrl_mega.models import build, lora_weights

    store.require_whole(path)
    adapters = chunks[0].adapters
    wanted = build.sharded_state(chunks) if adapters is None else lora_weights.sharded_state(adapters, adapters.active)
    require_same_adapter(path, stored_keys(path), wanted)
    loaded = dist_checkpointing.load({"model": wanted}, str(path))["model"]
    if adapters is None:
        build.load_state(chunks, loaded)
    else:
        lora_weights.load_state(adapters, adapters.active, loaded)


def require_same_adapter(path: Path, stored: Collection[str], model: dict[str, Any]) -> None:
    """Raises CheckpointError unless the checkpoint holds what the run trains: a whole model, or this adapter of this base.

    `stored`: the checkpoint's names; `model`: the sharded state that is wanted. *All ranks.*
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    wanted = [part for part in model.values() if isinstance(part, ShardedObject) and part.key.startswith("lora.")]
    if bool(wanted) != any(name.startswith("lora.") for name in stored):
        raise CheckpointError(
            f"{path} was saved by a run that trained {'the whole model' if wanted else 'a LoRA adapter'}, and this one trains "
            f"{'a LoRA adapter' if wanted else 'the whole model'}: set `lora.rank` as it was, or begin anew in another "
            "trainer.run_dir with `model.path` at an export of this checkpoint."
        )
    for part in wanted:
        loaded = dist_checkpointing.load({"about": replace(part, data=None)}, str(path))["about"]
        changed = {key: (value, part.data[key]) for key, value in loaded.items() if value != part.data[key]}
        if changed:
            listed = ", ".join(f"{key} was {before!r} and is {now!r}" for key, (before, now) in changed.items())
            raise CheckpointError(
                f"{path} holds an adapter for another base or of another kind: {listed}. Set `model.path` and the `lora` section "
                "as they were."
            )


def layout(topology: Topology) -> dict[str, int]:
    """The sizes that random states depend on."""
    return {"tensor": topology.tp_size, "pipeline": topology.pp_size, "data": topology.dp_size, "context": topology.cp_size}


def sharded_state(policy: Checkpointed, topology: Topology, *, with_rng: bool = True) -> dict[str, Any]:
    """All of the policy and its rank that a checkpoint holds, as Megatron's sharded state; tensors are not copied."""
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


def critic_state(critic: Checkpointed | None) -> dict[str, Any]:
    """Likewise of the critic; {} without one. Its names are beside the policy's."""
    return {f"{_CRITIC}{name}": part for name, part in critic.sharded_state().items()} if critic is not None else {}


def _require_same_optimizer(path: Path, stored: set[str], wanted: dict[str, Any]) -> None:
    """Raises CheckpointError where the checkpoint has Muon's momentum and the run has none, or the other way round."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    entries = (entry for name, part in wanted.items() if name.endswith("optimizer_state") for entry in nested_values(part))
    now = {entry.key for entry in entries}
    for is_critic, setting in ((False, "optimizer.name"), (True, "critic.optimizer.name")):
        had, has = (
            any(key.startswith(_MOMENTUM) and key.startswith(f"{_MOMENTUM}critic.") == is_critic for key in keys)
            for keys in (stored, now)
        )
        if had != has:
            was, asked = ("muon", "adamw") if had else ("adamw", "muon")
            raise CheckpointError(
                f"{path} was saved with `{setting}={was}`, and this run asks for {asked}: neither can go on with the other's"
                f" moments. Set `{setting}={was}`, or begin anew in another trainer.run_dir with `model.path` at an export of it."
            )


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
