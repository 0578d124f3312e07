"""The optimizer's state as parts of whole tensors, so that any layout can load what any other saved.

A rank of the distributed optimizer holds, of each parameter, one run of elements: masters and moments are flat, and cut
wherever the gradient buffer is cut. A checkpoint stores tensors by their place in the whole model. A run of elements of a
row-major block is a few boxes: the end of its first row, whole rows, the beginning of its last (in d dimensions at most
2d - 1), and boxes are what a Megatron checkpoint can hold and cut anew. So nothing is gathered and nothing is copied: a box is
a view of the optimizer's own memory, written from there and, on loading, read straight into it.

Names are those that Megatron's `fully_reshardable` format gives: `optimizer.state.{param,exp_avg,exp_avg_sq}.<parameter>`. A
parameter that is its own master (float32) has no `param`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from skyrl_mega.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.optimizer import MegatronOptimizer

#: Kept once for all parameters (the number of updates), not as a tensor of each.
_COUNTER = "step"


@dataclass(frozen=True)
class Run:
    """This rank's state of the elements [start, end) of a model parameter, counted in its local, row-major order.

    `state`: name -> flat tensor of end - start elements, sharing memory with the optimizer. `copy`: which of several copies of
    this state it is, where data-parallel peers hold other elements; None: every peer has a copy, as it has of the parameter.
    """

    parameter: torch.Tensor
    start: int
    end: int
    state: Mapping[str, torch.Tensor]
    copy: int | None


def sharded_tensors(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> list[ShardedTensor]:
    """Masters and moments of this rank as Megatron's ShardedTensors, whose data are views of the optimizer's memory.

    model_state: the sharded state of all the model's parameters. *Any rank, no collective.* Raises CheckpointError for a
    parameter that the model's state does not place.
    """
    places = _places(model_state)
    return [tensor for part in optimizer.chained_optimizers for run in _runs(part) for tensor in _boxes_of(run, places)]


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, sizes) of the boxes that the row-major elements [start, end) of a block of `shape` are made of, in order."""
    if end <= start:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = start // row, (end - 1) // row
    if start == first * row and end == (last + 1) * row:
        yield (first, *(0 for _ in shape[1:])), (last + 1 - first, *shape[1:])
    elif first == last:
        for offset, sizes in boxes(shape[1:], start - first * row, end - first * row):
            yield (first, *offset), (1, *sizes)
    else:
        after_first = (first + 1) * row if start % row else start
        before_last = last * row if end % row else end
        yield from boxes(shape, start, after_first)
        yield from boxes(shape, after_first, before_last)
        yield from boxes(shape, before_last, end)


def _boxes_of(run: Run, places: Mapping[torch.Tensor, list[ShardedTensor]]) -> Iterator[ShardedTensor]:
    if run.parameter not in places:
        raise CheckpointError(
            f"a parameter of shape {tuple(run.parameter.shape)} has optimizer state but no place in the model's sharded state; "
            "`sharded_state_dict` of the module that owns it must name it."
        )
    for block in places[run.parameter]:
        begin = _position(block, run.parameter)
        low, high = max(run.start, begin), min(run.end, begin + block.data.numel())
        replica_id = block.replica_id if run.copy is None else (*block.replica_id[:2], run.copy)
        for offset, sizes in boxes(block.local_shape, low - begin, high - begin):
            length = math.prod(sizes)
            for name, values in run.state.items():
                yield _box(block, offset, sizes, name, values[low - run.start : low - run.start + length], replica_id)
            low += length


def _box(
    block: ShardedTensor,
    offset: tuple[int, ...],
    sizes: tuple[int, ...],
    name: str,
    values: torch.Tensor,
    replica_id: tuple[int, ...],
) -> ShardedTensor:
    """The box at `offset` of the model tensor's `block`, for the state `name`; axes that Megatron prepends become real ones."""
    axes = block.prepend_axis_num
    shape = (*(1 for _ in range(axes)), *sizes)
    inside = (*(0 for _ in range(axes)), *offset)
    return replace(
        block,
        key=f"optimizer.state.{name}.{block.key}",
        data=values.view(shape),
        dtype=values.dtype,
        local_shape=shape,
        global_offset=tuple(outer + inner for outer, inner in zip(block.global_offset, inside, strict=True)),
        axis_fragmentations=None,  # boxes are no regular grid
        prepend_axis_num=0,
        replica_id=replica_id,
    )


def _places(model_state: dict[str, Any]) -> dict[torch.Tensor, list[ShardedTensor]]:
    """Where the elements of each parameter lie in the whole model: one block, or several (gate and up are stored apart)."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    places: dict[torch.Tensor, list[ShardedTensor]] = {}
    for entry in nested_values(model_state):
        if isinstance(entry, ShardedTensorFactory):
            places[entry.data] = list(nested_values(entry.build()))
        elif isinstance(entry, ShardedTensor):
            places[entry.data] = [entry]
    return places


def _position(block: ShardedTensor, parameter: torch.Tensor) -> int:
    """The first element of `block` in its parameter's row-major order. Raises CheckpointError where it is no such run."""
    data = block.data
    position, rest = divmod(data.data_ptr() - parameter.data_ptr(), parameter.element_size())
    fits = 0 <= position <= parameter.numel() - data.numel()
    if rest or not fits or not data.is_contiguous() or not parameter.is_contiguous():
        raise CheckpointError(
            f"{block.key} is stored in an order that is not the parameter's own, so its optimizer state has no place; "
            "its sharded state must be cut along the first axis."
        )
    return position


def _runs(part: MegatronOptimizer) -> Iterator[Run]:
    """The runs of elements whose state one of Megatron's optimizers holds on this rank."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    if isinstance(part, DistributedOptimizer):
        for by_dtype in part.gbuf_ranges:
            for buckets in by_dtype.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        state = part._get_main_param_and_optimizer_states(parameter)
                        held = ranges["param"]
                        yield Run(
                            parameter, held.start, held.end, _tensors(state, parameter), part.distributed_optimizer_instance_id
                        )
        return
    pairs = [(parameter, parameter) for group in part.param_groups for parameter in group["params"]]
    if isinstance(part, Float16OptimizerWithFloat16Params):
        sixteen = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        pairs = [pair for model, main in sixteen for pair in zip(model, main, strict=True)]
        pairs += [(parameter, parameter) for group in part.fp32_from_fp32_groups for parameter in group]
    for parameter, main in pairs:
        state = {"param": main, **part.optimizer.state[main]}
        yield Run(parameter, 0, parameter.numel(), _tensors(state, parameter), copy=None)


def _tensors(state: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state that is stored: flat, without the counter, and without a master that is the parameter itself."""
    is_own_master = state["param"].dtype == parameter.dtype
    return {
        name: values.detach().view(-1)
        for name, values in state.items()
        if name != _COUNTER and not (name == "param" and is_own_master)
    }
