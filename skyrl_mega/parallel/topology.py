"""Where this process stands among the trainer's ranks, and the few collectives that are not Megatron's own.

Ranks are started by torchrun (or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); a plain process
without them is world size 1. Tensors of the model travel over gloo on CPU and NCCL on CUDA; objects, barriers and metrics always
travel over gloo, on CPU tensors.

Every wait has a deadline (`parallel.timeout_s`). A wait that runs past it, or that loses its peer, is a DeadlineError that
names the phase, the step, and the ranks that are dead or elsewhere, and since when (`parallel.watchdog` knows). All other ranks
end too: by the same error, or by their watchdog.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from skyrl_mega.config.schema import ParallelConfig
from skyrl_mega.errors import ConfigError, DeadlineError
from skyrl_mega.parallel.device import install_megatron_cpu_shim
from skyrl_mega.parallel.layout_state import LayoutState
from skyrl_mega.parallel.watchdog import Watchdog, start_watchdog

_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

#: What gloo, NCCL and the rendezvous store say when a peer is late or gone.
_LATE_OR_GONE = (
    "timed out",
    "timeout",
    "failed to pass monitoredbarrier",
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
)


@dataclass(frozen=True)
class Topology:
    """This rank's place: sizes and ranks by axis, and the process groups behind them.

    `tp_group`, `dp_group`, `pp_group`, `cp_group` carry device tensors. `dp_cp_group` spans data and context parallelism (the
    ranks that hold the same weights, experts aside). `control_group` is gloo over all ranks: objects and barriers.

    Experts are laid over the same ranks a second time: `ep_size` ranks share the experts of a layer, each expert is split over
    `etp_size` ranks, and what remains of a stage's ranks holds copies. `ep_group` is this rank's expert-parallel group.
    """

    rank: int
    world_size: int
    device: torch.device
    timeout_s: float
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    etp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    control_group: dist.ProcessGroup
    #: None in a world of one, which waits for nobody.
    watchdog: Watchdog | None = None
    #: Megatron-Core's globals of this layout.
    layout_state: LayoutState = field(default_factory=LayoutState, repr=False)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone talks to engines, environments and files."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True on the ranks of the last pipeline stage, which alone have logits and losses."""
        return self.pp_rank == self.pp_size - 1

    def in_force(self) -> contextlib.AbstractContextManager[None]:
        """Megatron-Core's globals are those of this layout inside the block: a process may have models in several."""
        return self.layout_state.in_force()

    def lay_out(self, parallel: ParallelConfig, *, seed: int) -> Topology:
        """The same ranks in another layout, `parallel`, with groups of their own. *All ranks.* Gone with this one's `destroy`.

        Raises ConfigError where the sizes do not divide the world. Megatron-Core's globals stay those of the layout in force.
        """
        _require_sizes_fit(parallel, self.world_size, self.device)
        state = LayoutState()
        with self.deadline("a second layout"), state.founded():
            return _build_groups(parallel, self.device, seed, self.control_group, self.watchdog, state)

    def enter(self, phase: str, step: int, has_deadline: bool = True) -> None:
        """Says, to any rank that should come to wait for this one, what it is doing from now on.

        Without `has_deadline` the phase may last longer than `timeout_s` without progress.
        """
        if self.watchdog is not None:
            self.watchdog.enter(phase, step, has_deadline=has_deadline)

    def progress(self) -> None:
        """Says that this rank goes on: for long phases, so that they are not taken for a hang."""
        if self.watchdog is not None:
            self.watchdog.progress()

    @contextlib.contextmanager
    def deadline(self, phase: str, step: int | None = None) -> Iterator[None]:
        """Turns a collective's timeout or lost peer inside the block into a DeadlineError that names phase, step and rank."""
        self.progress()
        try:
            yield
            self.progress()
        except RuntimeError as error:
            if not _is_late(error):
                raise
            message = self._late_message(phase, step, error)
            if self.watchdog is not None:
                self.watchdog.give_up(message)
            raise DeadlineError(message) from error

    def barrier(self, phase: str, step: int | None = None) -> None:
        """Waits for every rank. *All ranks.* Raises DeadlineError; on rank 0 it names the ranks that did not come."""
        with self.deadline(phase, step):
            dist.monitored_barrier(self.control_group, timeout=timedelta(seconds=self.timeout_s), wait_all_ranks=True)

    def broadcast_object(self, obj: Any, phase: str, step: int | None = None) -> Any:
        """Rank 0's object, on every rank (`obj` of other ranks is ignored). *All ranks.*

        The object must pickle. Raises DeadlineError.
        """
        box = [obj if self.is_main else None]
        with self.deadline(phase, step):
            dist.broadcast_object_list(box, src=0, group=self.control_group, device=torch.device("cpu"))
        return box[0]

    def gather_objects(self, obj: Any, phase: str, step: int | None = None) -> list[Any]:
        """Every rank's object, in the order of the ranks, on every rank. *All ranks.* They must pickle. Raises DeadlineError."""
        objects: list[Any] = [None] * self.world_size
        with self.deadline(phase, step):
            dist.all_gather_object(objects, obj, group=self.control_group)
        return objects

    def from_last_stage(self, obj: Any, phase: str) -> Any:
        """The object of this pipeline's last stage, on all its stages (`obj` of the others is ignored). *All ranks.*

        The object must pickle; tensors in it lie on CPU. Raises DeadlineError.
        """
        if self.pp_size == 1:
            return obj
        box = [obj if self.is_last_stage else None]
        with self.deadline(phase):
            last = dist.get_global_rank(self.pp_group, self.pp_size - 1)
            dist.broadcast_object_list(box, src=last, group=self.pp_group, device=torch.device("cpu"))
        return box[0]

    def gather_context(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of all context-parallel ranks end to end. *All context ranks, same shape.* Raises DeadlineError."""
        gathered = values.new_empty(self.cp_size * values.size(0), *values.shape[1:])
        with self.deadline("context"):
            dist.all_gather_into_tensor(gathered, values.contiguous(), group=self.cp_group)
        return gathered

    def sum_over_context(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of the context ranks' values, differentiable: gradients are summed over the ranks too. *All context ranks.*"""
        if self.cp_size == 1:
            return values
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(values, group=self.cp_group)

    def all_reduce_metrics(
        self, metrics: Mapping[str, float], op: Literal["sum", "mean", "max", "min"] = "sum", phase: str = "metrics"
    ) -> dict[str, float]:
        """The numbers reduced over data- and context-parallel ranks (tensor ranks hold copies). *All ranks, same keys.*

        float64 on CPU. Raises DeadlineError.
        """
        names = sorted(metrics)
        values = torch.tensor([float(metrics[name]) for name in names], dtype=torch.float64)
        with self.deadline(phase):
            dist.all_reduce(values, op=_REDUCE_OPS[op], group=self.dp_cp_group)
        if op == "mean":
            values /= self.dp_size * self.cp_size
        return dict(zip(names, values.tolist(), strict=True))

    def sum_over_ranks(self, values: torch.Tensor, phase: str) -> torch.Tensor:
        """The CPU tensors of all ranks added up, in place; returns `values`. *All ranks, same shape.* Raises DeadlineError."""
        with self.deadline(phase):
            dist.all_reduce(values, group=self.control_group)
        return values

    def destroy(self) -> None:
        """Leaves all process groups. The process can call `init_topology` again."""
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        if self.watchdog is not None:
            self.watchdog.close()
        get_cuda_rng_tracker().reset()
        parallel_state.destroy_model_parallel()
        LayoutState.forget()
        dist.destroy_process_group()

    def _late_message(self, phase: str, step: int | None, error: RuntimeError) -> str:
        step = self.watchdog.step if step is None and self.watchdog is not None else step
        at = f"phase {phase!r}" + ("" if step is None else f", step {step}")
        first_line = str(error).strip().splitlines()[0]
        missing = f" {self.watchdog.missing()}" if self.watchdog is not None else ""
        return (
            f"Rank {self.rank} of {self.world_size} waited in {at} longer than `parallel.timeout_s` ({self.timeout_s:g} s), or "
            f"lost its peer: {first_line}.{missing} Look at the log of the missing rank; raise parallel.timeout_s if it is only "
            "slow."
        )


def init_topology(parallel: ParallelConfig, device: torch.device, *, seed: int) -> Topology:
    """Joins the process groups and returns this rank's place among them. *All ranks.* Once per process, until `Topology.destroy`.

    Reads torchrun's environment; without WORLD_SIZE it is a world of one, with a store in memory. Sets torch's and Megatron's
    seeds. Raises ConfigError where the sizes do not divide the world, DeadlineError where ranks do not join in time.
    """
    if dist.is_initialized():
        raise ConfigError(
            "Process groups exist already in this process; call destroy() on the first Topology before init_topology."
        )
    world_size, rank = _world()
    _require_sizes_fit(parallel, world_size, device)
    timeout = timedelta(seconds=parallel.timeout_s)
    if device.type == "cuda":
        # Megatron overlaps reductions with matmuls by the order in which kernels were queued: one hardware queue keeps that
        # order.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(device)
    install_megatron_cpu_shim()
    _join(world_size, rank, device, timeout)
    control_group = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo", timeout=timeout)
    watchdog = start_watchdog(rank, world_size, parallel.timeout_s) if world_size > 1 else None
    state = LayoutState()
    state.stay_in_force()
    return _build_groups(parallel, device, seed, control_group, watchdog, state)


def _require_sizes_fit(parallel: ParallelConfig, world_size: int, device: torch.device) -> None:
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_ranks:
        raise ConfigError(
            f"The world size ({world_size}) must be a multiple of tensor x pipeline x context parallel size "
            f"({parallel.tensor} x {parallel.pipeline} x {parallel.context} = {model_ranks}); start a "
            f"multiple of {model_ranks} ranks."
        )
    expert_ranks = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if world_size % expert_ranks:
        raise ConfigError(
            f"The world size ({world_size}) must be a multiple of expert x expert tensor x pipeline parallel size "
            f"({parallel.expert} x {parallel.expert_tensor} x {parallel.pipeline} = {expert_ranks}); start a multiple of "
            f"{expert_ranks} ranks."
        )
    if device.type == "cpu" and parallel.expert_tensor > 1:
        raise ConfigError(
            f"`parallel.expert_tensor` ({parallel.expert_tensor}) must be 1 on CPU: gloo can't gather the uneven numbers of "
            "tokens that the shards of an expert get. Set parallel.expert_tensor=1 and raise parallel.expert."
        )


def _world() -> tuple[int, int]:
    """(world size, rank) from the environment; a world of one where no launcher set it."""
    if "WORLD_SIZE" not in os.environ:
        return 1, 0
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    world_size = int(os.environ["WORLD_SIZE"])
    if missing and world_size > 1:
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set; start the ranks with torchrun, "
            "or unset WORLD_SIZE to run one process."
        )
    return world_size, int(os.environ.get("RANK", "0"))


def _join(world_size: int, rank: int, device: torch.device, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    where = {"device_id": device} if device.type == "cuda" else {}
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, **where)
        return
    try:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, **where)
    except RuntimeError as error:
        if not _is_late(error):
            raise
        raise DeadlineError(
            f"Rank {rank} of {world_size} waited longer than `parallel.timeout_s` ({timeout.total_seconds():g} s) for all "
            f"ranks to join at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}; check that every rank was started and "
            "reaches that address."
        ) from error


def _build_groups(
    parallel: ParallelConfig,
    device: torch.device,
    seed: int,
    control_group: dist.ProcessGroup,
    watchdog: Watchdog | None,
    layout_state: LayoutState,
) -> Topology:
    """Initialises Megatron-Core for the layout, and the seeds of torch and Megatron."""
    from megatron.core import parallel_state as state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=parallel.timeout_s / 60,  # a timedelta is made of it: fractions are fine
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        timeout_s=parallel.timeout_s,
        tp_rank=state.get_tensor_model_parallel_rank(),
        tp_size=state.get_tensor_model_parallel_world_size(),
        pp_rank=state.get_pipeline_model_parallel_rank(),
        pp_size=state.get_pipeline_model_parallel_world_size(),
        cp_rank=state.get_context_parallel_rank(),
        cp_size=state.get_context_parallel_world_size(),
        dp_rank=state.get_data_parallel_rank(),
        dp_size=state.get_data_parallel_world_size(),
        ep_rank=state.get_expert_model_parallel_rank(),
        ep_size=state.get_expert_model_parallel_world_size(),
        etp_size=state.get_expert_tensor_parallel_world_size(),
        tp_group=state.get_tensor_model_parallel_group(),
        pp_group=state.get_pipeline_model_parallel_group(),
        cp_group=state.get_context_parallel_group(),
        dp_group=state.get_data_parallel_group(),
        dp_cp_group=state.get_data_parallel_group(with_context_parallel=True),
        ep_group=state.get_expert_model_parallel_group(),
        control_group=control_group,
        watchdog=watchdog,
        layout_state=layout_state,
    )


def _is_late(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in _LATE_OR_GONE)
