"""An adapter's weights outside of the model: whole tensors, merged weights, PEFT directories, checkpoints.

PEFT calls them `base_model.model.<module>.lora_A.weight` [R, inputs] and `...lora_B.weight` [outputs, R]; so they travel to
engines, and so they are stored on disk. A checkpoint holds them cut by layout, under names of their own.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from skyrl_mega.config.lora_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config
from skyrl_mega.errors import CheckpointError, ModelLoadError
from skyrl_mega.models.build import PolicyModel, build_model
from skyrl_mega.models.hf_io import SCORE, HFExporter, load_hf_weights
from skyrl_mega.models.lora import DEFAULT, Adapter, Adapters, leaf, scale_of
from skyrl_mega.parallel.topology import Topology

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from skyrl_mega.config.schema import Config

_PREFIX = "base_model.model."


def peft_names(projection: str) -> tuple[str, str]:
    """What PEFT calls A and B of a Hugging Face module."""
    return f"{_PREFIX}{projection}.lora_A.weight", f"{_PREFIX}{projection}.lora_B.weight"


@dataclass(frozen=True)
class Part:
    """A or B of one projection, on this rank: a view of the parameter. `split`: the axis that tensor ranks have parts of."""

    name: str
    value: torch.Tensor
    split: int | None
    is_expert: bool


def parts(adapters: Adapters, adapter: str) -> Iterator[Part]:
    """This rank's parts of an adapter, and of the head that is trained beside it, under PEFT's names."""
    for one in adapters.adapters(adapter):
        site = one.site
        for number, projection in enumerate(one.projections):
            name_a, name_b = peft_names(projection)
            a = one.A.detach()[number * one.rank : (number + 1) * one.rank]
            yield Part(name_a, a, 1 if site.split == "rows" else None, site.is_expert)
            yield Part(name_b, one.B[number].detach(), 0 if site.split == "columns" else None, site.is_expert)
    if adapters.head is not None:
        yield Part(_PREFIX + SCORE, adapters.head.detach(), None, is_expert=False)


class AdapterWeights:
    """Whole tensors of one adapter, and of the head that is trained beside it, under PEFT's names, from all ranks.

    *All ranks* make one and call its methods.
    """

    def __init__(self, adapters: Adapters, adapter: str) -> None:
        self._adapters, self._adapter = adapters, adapter
        self.topology = adapters.topology
        self._names = sorted(self.whole(), key=_natural)

    @property
    def scale(self) -> float:
        return scale_of(self._adapters.settings[self._adapter])

    def names(self) -> list[str]:
        """In the order of layers and names, A before B. No collective."""
        return self._names

    @torch.no_grad()
    def whole(self) -> dict[str, torch.Tensor]:
        """Every A and B of the model, on every rank's device. *All ranks.* Raises DeadlineError."""
        topology = self.topology
        with topology.deadline("gathering an adapter"):
            mine = list(parts(self._adapters, self._adapter))
            joined = _join_tensor_ranks(mine, topology)
            experts = {part.name: joined[part.name] for part in mine if part.is_expert}
            if topology.ep_size > 1:
                joined |= _exchange(experts, topology.ep_group, topology.device)
            if topology.pp_size > 1:
                joined = _exchange(joined, topology.pp_group, topology.device)
        return joined


class AdapterSource:
    """The adapter alone as a `WeightSource`, for engines that add it to their base: B comes with the scale in it."""

    def __init__(self, weights: AdapterWeights) -> None:
        self._weights = weights

    def fused_groups(self) -> Sequence[tuple[str, ...]]:
        """A and B of each projection."""
        names = self._weights.names()
        return list(zip(names[::2], names[1::2], strict=True))

    def iter_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """*All ranks, to the end.* See `HFExporter.iter_weights`."""
        whole = self._weights.whole()
        for name in self._weights.names():
            value = whole[name].float() * self._weights.scale if ".lora_B." in name else whole[name]
            yield name, value.to(dtype).contiguous()


class MergedExporter(HFExporter):
    """The model with an adapter merged into its weights, W + scale * B A, one tensor at a time; else as its base class."""

    def __init__(self, *args: Any, weights: AdapterWeights) -> None:
        super().__init__(*args)
        self._weights = weights

    def iter_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """See `HFExporter.iter_weights`. Summed in float32, rounded once."""
        whole = self._weights.whole()
        for name, value in super().iter_weights(torch.float32):
            name_a, name_b = peft_names(name.removesuffix(".weight"))
            if name_a in whole:
                value = torch.addmm(value, whole[name_b].float(), whole[name_a].float(), alpha=self._weights.scale)
            yield name, value.to(dtype).contiguous()


def _join_tensor_ranks(mine: Sequence[Part], topology: Topology) -> dict[str, torch.Tensor]:
    """Parts that tensor ranks have of a tensor, put together: one exchange for all of them."""
    joined = {part.name: part.value for part in mine}
    split = [part for part in mine if part.split is not None]
    if topology.tp_size == 1 or not split:
        return joined
    flat = torch.cat([part.value.reshape(-1) for part in split])
    gathered = [torch.empty_like(flat) for _ in range(topology.tp_size)]
    dist.all_gather(gathered, flat, group=topology.tp_group)
    sizes = [part.value.numel() for part in split]
    for part, *pieces in zip(split, *(one.split(sizes) for one in gathered), strict=True):
        assert part.split is not None
        joined[part.name] = torch.cat([piece.view(part.value.shape) for piece in pieces], dim=part.split)
    return joined


def _exchange(mine: Mapping[str, torch.Tensor], group: dist.ProcessGroup, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of all ranks of a group, on each of them. Names of different ranks differ, or mean the same tensor."""
    headers: list[list[tuple[str, torch.Size, torch.dtype]]] = [[] for _ in range(group.size())]
    dist.all_gather_object(headers, [(name, value.shape, value.dtype) for name, value in mine.items()], group=group)
    everything: dict[str, torch.Tensor] = {}
    for rank, header in enumerate(headers):
        if not header:
            continue
        sizes = [shape.numel() for _, shape, _ in header]
        if rank == group.rank():
            flat = torch.cat([value.reshape(-1) for value in mine.values()])
        else:
            flat = torch.empty(sum(sizes), dtype=header[0][2], device=device)
        dist.broadcast(flat, dist.get_global_rank(group, rank), group=group)
        everything |= {name: piece.view(shape) for (name, shape, _), piece in zip(header, flat.split(sizes), strict=True)}
    return everything


def _natural(name: str) -> list[Any]:
    """A key that puts layer 10 behind layer 9."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


# ---- PEFT directories -------------------------------------------------------------------------------------------------------


def save_adapter(weights: AdapterWeights, base: str, out_dir: str | Path) -> None:
    """Writes the adapter as a directory that PEFT and vLLM load. *All ranks*; rank 0 writes.

    `base` is the directory of the model it belongs to. Replaces a directory of that name, at once. Raises CheckpointError, on
    every rank, if it can't be written.
    """
    whole = weights.whole()
    failure = ""
    if weights.topology.is_main:
        try:
            _write({name: whole[name].cpu().contiguous().clone() for name in weights.names()}, weights, base, Path(out_dir))
        except (OSError, SafetensorError) as error:
            failure = f"The adapter could not be written to {out_dir}: {error}. Free space or choose another directory."
    failure = weights.topology.broadcast_object(failure, "saving the adapter")
    if failure:
        raise CheckpointError(failure)


def _write(tensors: dict[str, torch.Tensor], weights: AdapterWeights, base: str, target: Path) -> None:
    settings = weights._adapters.settings[weights._adapter]
    modules = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors if ".lora_" in name}
    has_head = weights._adapters.has_head
    described = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if has_head else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "use_rslora": settings.use_rslora,
        # By their last parts, which PEFT looks for everywhere; by full names where experts that have them too are left out.
        "target_modules": sorted({leaf(module) for module in modules} if settings.experts else modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": [SCORE.removesuffix(".weight")] if has_head else None,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        save_file(tensors, scratch / WEIGHTS_FILE, metadata={"format": "pt"})
        (scratch / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
        scratch.chmod(0o755)
        (scratch / WEIGHTS_FILE).chmod(0o644)
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_adapter(adapters: Adapters, adapter: str, path: str | Path) -> None:
    """Fills an adapter with the tensors of a PEFT directory. *All ranks*, each reads it.

    Raises ModelLoadError, on every rank, if it holds other projections, or of other shapes, than the adapter has.
    """
    settings = adapters.settings[adapter]
    read_adapter_config(Path(path)).require(settings)
    try:
        stored = load_file(Path(path) / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"`lora.path`: {Path(path) / WEIGHTS_FILE} can't be read: {error}.") from error
    expected = AdapterWeights(adapters, adapter).names()
    if set(expected) != set(stored):
        missing, extra = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
        raise ModelLoadError(
            f"`lora.path` ({path}) and `lora.targets` must name the same projections. Missing in the file: {_some(missing)}; "
            f"only there: {_some(extra)}. Set lora.targets (and lora.experts) to what the adapter was trained with."
        )
    topology = adapters.topology
    for part in parts(adapters, adapter):
        whole = stored[part.name]
        ranks = topology.tp_size if part.split is not None else 1
        shape = list(part.value.shape)
        if part.split is not None:
            shape[part.split] *= ranks
        if list(whole.shape) != shape:
            raise ModelLoadError(f"`lora.path` ({path}): {part.name} is {list(whole.shape)}, the model needs {shape}.")
        mine = whole if part.split is None else whole.chunk(ranks, dim=part.split)[topology.tp_rank]
        part.value.copy_(mine)


def _some(names: Sequence[str]) -> str:
    return ", ".join(itertools.islice(names, 3)) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


# ---- checkpoints ------------------------------------------------------------------------------------------------------------


def sharded_state(adapters: Adapters, adapter: str, *, prefix: str = "") -> dict[str, Any]:
    """The adapter's parameters as a Megatron dist checkpoint holds them, independent of the layout. *All ranks.*

    With an object that says which base they belong to.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    topology, about = adapters.topology, f"{prefix}lora.{adapter}.about"
    copy = (topology.pp_rank, topology.tp_rank, topology.dp_cp_group.rank())
    state: dict[str, Any] = {about: ShardedObject(about, _about(adapters, adapter), (1,), (0,), replica_id=copy)}
    for one in adapters.adapters(adapter):
        stem = f"{prefix}lora.{adapter}.{'+'.join(one.projections)}"
        state[f"{stem}.A"] = _sharded(f"{stem}.A", one.A, one, 1 if one.site.split == "rows" else None, adapters.topology)
        for projection, b in zip(one.projections, one.B, strict=True):
            key = f"{prefix}lora.{adapter}.{projection}.B"
            state[key] = _sharded(key, b, one, 0 if one.site.split == "columns" else None, adapters.topology)
    if adapters.head is not None:
        key = f"{prefix}lora.{adapter}.{SCORE}"
        state[key] = _placed(key, adapters.head, (0, topology.tp_rank, topology.dp_cp_group.rank()))
    return state


def _about(adapters: Adapters, adapter: str) -> dict[str, Any]:
    """Plain values that must be the same where an adapter is loaded again."""
    settings = adapters.settings[adapter]
    return {
        "base": adapters.base,
        "rank": settings.rank,
        "alpha": settings.alpha,
        "use_rslora": settings.use_rslora,
        "targets": list(settings.targets),
        "experts": settings.experts,
    }


def _sharded(key: str, parameter: torch.Tensor, one: Adapter, split: int | None, topology: Topology) -> ShardedTensor:
    from megatron.core import parallel_state

    if one.site.is_expert:
        copy = (0, 0, parallel_state.get_expert_data_parallel_rank())
    else:
        copy = (0, topology.tp_rank if split is None else 0, topology.dp_cp_group.rank())
    cut = [] if split is None else [(split, topology.tp_rank, topology.tp_size)]
    return _placed(key, parameter, copy, *cut)


def _placed(key: str, parameter: torch.Tensor, copy: tuple[int, int, int], *cut: tuple[int, int, int]) -> ShardedTensor:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    made = ShardedTensor.from_rank_offsets(key, parameter.detach(), *cut, replica_id=copy)
    # The parameter itself: the optimizer's state finds its place by it.
    return replace(made, data=parameter)


def load_state(adapters: Adapters, adapter: str, state: Mapping[str, torch.Tensor], *, prefix: str = "") -> None:
    """Restores what `sharded_state` described, once it is loaded."""
    with torch.no_grad():
        for key, described in sharded_state(adapters, adapter, prefix=prefix).items():
            if isinstance(described.data, torch.Tensor):
                described.data.copy_(state[key])


# ---- a model with the adapter of the configuration -------------------------------------------------------------------------


def build_to_load(config: Config, topology: Topology, model_class: type[PolicyModel] = PolicyModel) -> list[PolicyModel]:
    """A model that `checkpoint.state.load_model` fills: without weights, or the base with an adapter beside it. *All ranks.*"""
    chunks = build_model(config, topology, model_class)
    if config.lora.rank > 0:
        load_hf_weights(chunks, config.model.path, topology)
        Adapters(chunks, config.model.path, topology).add(DEFAULT, config.lora, seed=config.trainer.seed)
    return chunks


def make_exporter(chunks: Sequence[PolicyModel], topology: Topology) -> HFExporter:
    """The weights of the model as it is now, the adapter that is on merged. *All ranks.*"""
    adapters = chunks[0].adapters
    if adapters is None or adapters.active is None:
        return HFExporter(chunks, topology)
    return MergedExporter(chunks, topology, weights=AdapterWeights(adapters, adapters.active))
