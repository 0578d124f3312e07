"""The parameters of this rank by their names in the whole model, and how Hugging Face tensors lie in them.

The tables of `families` say which tensors a parameter holds; this module says which of those parameters this rank holds, and
which part of each. It moves no data between ranks (`hf_io` does).

Local tensors are a rank's parts of a parameter's Hugging Face tensors: rows or columns of each, all contiguous in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from skyrl_mega.errors import ModelLoadError
from skyrl_mega.models.build import PolicyModel
from skyrl_mega.models.families import Split, Weight, body_weights, model_weights
from skyrl_mega.models.value import VALUE_HEAD
from skyrl_mega.parallel.topology import Topology

#: A parameter that Megatron's last of several stages holds beside the first stage's: a tied head.
TIED_COPY = "output_layer.weight"
#: In the names of the parameters of low-rank adapters, and of no other.
LORA = ".lora."
#: Experts without TransformerEngine are modules of their own; with it they are numbered parameters.
_LOCAL_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def table_of(model: PolicyModel) -> list[Weight]:
    """The table of the whole model: all but the head of a ValueModel, which no family knows."""
    return (model_weights if model.has_lm_head else body_weights)(model.architecture)


def name_in_whole_model(name: str, model: PolicyModel, topology: Topology) -> str:
    """The tables' name of the parameter `name` of this rank's chunk: layers and experts are numbered in the whole model."""
    if layer := _LAYER.match(name):
        number = model.decoder.layers[int(layer[1])].layer_number - 1
        name = f"decoder.layers.{number}.{name[layer.end() :]}"
    experts = model.architecture.experts
    if experts is None:
        return name
    first = topology.ep_rank * (experts.count // topology.ep_size)
    name = _LOCAL_EXPERT.sub(lambda match: f".experts.{first + int(match[1])}.", name)
    return _GROUPED_EXPERT.sub(lambda match: f".experts.{first + int(match[3])}.{match[1]}.{match[2]}", name)


def hf_names(chunks: Sequence[PolicyModel], topology: Topology) -> list[dict[str, list[str]]]:
    """For each chunk: the name of every base parameter on this rank -> the Hugging Face tensors that it holds, in order."""
    table = {weight.parameter: list(weight.tensors) for weight in table_of(chunks[0])}

    def of_chunk(chunk: PolicyModel) -> Iterator[tuple[str, list[str]]]:
        for name, _ in chunk.named_parameters():
            if (tensors := table.get(name_in_whole_model(name, chunk, topology))) is not None:
                yield name, tensors

    return [dict(of_chunk(chunk)) for chunk in chunks]


def held_parameters(chunks: Sequence[PolicyModel], topology: Topology) -> dict[str, torch.Tensor]:
    """The table's parameters that this rank holds, by name; a tied head's copy on the last stage is not one of them.

    Raises ModelLoadError with the names of parameters that the table does not know.
    """
    known = {weight.parameter for weight in table_of(chunks[0])}
    held = {
        name_in_whole_model(name, chunk, topology): tensor
        for chunk in chunks
        for name, tensor in (*chunk.named_parameters(), *_buffers(chunk, topology, known))
        if (chunk.has_lm_head or name != VALUE_HEAD) and LORA not in name
    }
    if chunks[0].architecture.tied:
        held.pop(TIED_COPY, None)
    if unknown := [name for name in held if name not in known]:
        raise ModelLoadError(
            f"The table of the family {chunks[0].architecture.family} has no row for these parameters of the model: "
            f"{', '.join(unknown)}; add them there."
        )
    return held


def _buffers(chunk: PolicyModel, topology: Topology, known: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The chunk's buffers that the table knows (a router's bias is one)."""
    return ((name, buffer) for name, buffer in chunk.named_buffers() if name_in_whole_model(name, chunk, topology) in known)


def tied_copy(chunks: Sequence[PolicyModel]) -> torch.Tensor | None:
    """This rank's copy of the embedding as a head, where a tied model's last stage has one of its own."""
    last = chunks[-1]
    if last.has_lm_head and last.post_process and not last.pre_process and last.architecture.tied:
        return last.output_layer.weight
    return None


def tensor_rank(weight: Weight, topology: Topology) -> tuple[int, int]:
    """(this rank's place, ranks) among those over which the parameter is cut."""
    if weight.expert is None:
        return topology.tp_rank, topology.tp_size
    return dist.get_rank(expert_tensor_group()), topology.etp_size


def expert_tensor_group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    return parallel_state.get_expert_tensor_parallel_group()


def read_local(weight: Weight, read: Callable[[str, tuple[slice, ...]], torch.Tensor], rank: int, ranks: int) -> torch.Tensor:
    """The parameter as rank `rank` of `ranks` holds it; `read(name, slices)` gives a part of a tensor."""
    locals_: list[torch.Tensor] = []
    for name, shape in weight.tensors.items():
        if weight.split is Split.WHOLE:
            part = read(name, (slice(None),) * len(shape))
        elif weight.split is Split.COLUMNS:
            part = read(name, (slice(None), _part(shape[1], rank, ranks)))
        else:
            part = read(name, (_part(shape[0], rank, ranks), *(slice(None),) * (len(shape) - 1)))
        if weight.split is Split.VOCABULARY:
            rows = -(-shape[0] // ranks)
            part = torch.cat([part, part.new_zeros(rows - part.size(0), *shape[1:])])
        locals_.append(part)
    if len(locals_) == 1:
        return locals_[0]
    groups = _local_groups(weight, ranks)
    return torch.cat([local.unflatten(0, (groups, -1)) for local in locals_], dim=1).flatten(0, 1)


def to_tensors(weight: Weight, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The full Hugging Face tensors of a parameter, from all ranks' parts of it in the ranks' order."""
    if weight.split is Split.WHOLE:
        return [parts[0]]
    shapes = list(weight.tensors.values())
    if weight.split is Split.COLUMNS:
        return [_joined(parts, 1)]
    if weight.split is Split.VOCABULARY:
        return [_joined(parts, 0)[: shapes[0][0]]]
    groups = _local_groups(weight, len(parts))
    sizes = [shape[0] // len(parts) // groups for shape in shapes]
    local_tensors = [part.unflatten(0, (groups, -1)).split(sizes, dim=1) for part in parts]
    return [_joined([local.flatten(0, 1) for local in one], 0) for one in zip(*local_tensors, strict=True)]


def _joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _local_groups(weight: Weight, ranks: int) -> int:
    return max(1, weight.groups // ranks)


def _part(size: int, rank: int, ranks: int) -> slice:
    """The rank's share of `size` rows or columns; the last ranks' is smaller where they don't divide."""
    share = -(-size // ranks)
    return slice(min(size, rank * share), min(size, (rank + 1) * share))
