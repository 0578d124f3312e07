"""Low-rank adapters (LoRA, arXiv:2106.09685) beside the frozen projections of a policy: y = W x + scale * B (A x).

A Megatron layer may hold several Hugging Face projections (`linear_qkv`: q, k, v; `linear_fc1`: gate, up). Each of them has an A
and a B of its own, as in PEFT, so that import and export are exact; the A's are stacked into one parameter, for one product.

Several named adapters may lie beside one model: each has its own parameters (and, in a `Trainable` of its own, its own gradient
buffers and optimizer). One at a time is on; the others, and the base weights, want no gradient. With none on the model is the
base itself, which is the reference of a KL term.

Where the parts lie, over tensor ranks:

- A layer split by output columns: A whole on every rank, B split like the weight. What is gathered (sequence parallelism), or
  whose gradient is summed, is A x, R numbers a token. So without sequence parallelism A's gradient comes out whole on every rank;
  with it each rank has seen its own tokens, and Megatron adds the gradients up (`sequence_parallel`).
- A layer split by input rows: A split like the weight, B whole. A x is summed (or reduce-scattered) before B.
- A layer that every rank holds whole (the projections down to the latents of multi-latent attention): so are A and B, and of
  their gradients holds what holds of the weight's: whole on every rank, or under sequence parallelism parts that are added up.
- Experts: they are whole on their ranks here, and so are their adapters.

A begins as in PEFT: uniform in +-1/sqrt(inputs), by a stream of its own for each projection, so that no layout changes it; B
begins at zero.

Shape letters: T tokens, R rank, P projections of a layer that have an adapter, I inputs and O outputs of a projection,
on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from skyrl_mega.data.hashing import stable_hash
from skyrl_mega.errors import BackendUnavailableError, ConfigError
from skyrl_mega.models.build import EXPERTS
from skyrl_mega.models.elementwise import rms_norm
from skyrl_mega.models.hf_io import fingerprint
from skyrl_mega.models.latent_attention import ReplicatedLinear
from skyrl_mega.models.layers import LayerNormColumnParallelLinear
from skyrl_mega.models.weight_map import hf_names
from skyrl_mega.parallel.topology import Topology

if TYPE_CHECKING:
    from skyrl_mega.config.schema import AdapterConfig
    from skyrl_mega.models.build import PolicyModel

#: What `lora.targets` calls every projection that can have an adapter.
ALL = "all"
#: The adapter of a run that trains one.
DEFAULT = "default"


@dataclass(frozen=True)
class Site:
    """A Megatron layer that can have adapters, on this rank.

    `projections`: the Hugging Face modules it holds, in the order of its output. That consists of `num_groups` groups, each with
    `widths` columns of each projection. `num_inputs`: of the whole layer.
    """

    module: torch.nn.Module
    projections: tuple[str, ...]
    split: Literal["columns", "rows", "none"]
    num_groups: int
    widths: tuple[int, ...]
    num_inputs: int
    is_expert: bool


class Adapter(torch.nn.Module):
    """One adapter of one layer: A [P * R, I], and B [O, R] of each projection that has one (None for the others)."""

    def __init__(
        self, site: Site, projections: frozenset[str], settings: AdapterConfig, topology: Topology, name: str, seed: int
    ):
        super().__init__()
        self.site, self.rank = site, settings.rank
        self.projections = [projection for projection in site.projections if projection in projections]
        self.scale = scale_of(settings)
        weight: torch.Tensor = site.module.weight  # type: ignore[assignment]
        placed = {"dtype": weight.dtype, "device": weight.device}
        num_inputs = site.num_inputs // (topology.tp_size if site.split == "rows" else 1)
        first = topology.tp_rank * num_inputs if site.split == "rows" else 0
        rows = [_first_a(self.rank, site.num_inputs, seed, name, p)[:, first : first + num_inputs] for p in self.projections]
        self.A = torch.nn.Parameter(torch.cat(rows).to(**placed))
        self.B = torch.nn.ParameterList(
            torch.nn.Parameter(torch.zeros(site.num_groups * width, self.rank, **placed))
            for projection, width in zip(site.projections, site.widths, strict=True)
            if projection in projections
        )
        _mark(self.A, site, is_split=site.split == "rows")
        for b in self.B:
            _mark(b, site, is_split=site.split == "columns")

    def forward(self, x: torch.Tensor, *, sequence_parallel: bool) -> torch.Tensor:
        """scale * B (A x), in the order of the layer's output. x [..., I]: what the layer's weight is multiplied with."""
        low = F.linear(x, self.A)
        if self.site.split == "columns":
            low = gather_from_sequence_parallel_region(low) if sequence_parallel else copy_to_tensor_model_parallel_region(low)
        elif self.site.split == "rows":
            reduce = reduce_scatter_to_sequence_parallel_region if sequence_parallel else reduce_from_tensor_model_parallel_region
            low = reduce(low)
        # R numbers a token: scaled here it costs least.
        pieces = iter(zip((low * self.scale).split(self.rank, dim=-1), self.B, strict=True))
        outputs = []
        for projection, width in zip(self.site.projections, self.site.widths, strict=True):
            shape = (*low.shape[:-1], self.site.num_groups, width)
            if projection not in self.projections:
                outputs.append(low.new_zeros(()).expand(shape))
                continue
            low_of_one, b = next(pieces)
            outputs.append(F.linear(low_of_one, b).view(shape))
        return (torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]).flatten(-2)


class AdaptedBy(torch.nn.ModuleDict):
    """The adapters of one layer, by name; registered in the layer as `lora`."""

    active: str | None = None
    sequence_parallel: bool = False

    def add_to(self, output: tuple[torch.Tensor, Any], x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The layer's output (and its bias) with what the active adapter adds."""
        if self.active is None or self.active not in self:
            return output
        return output[0] + self[self.active](x, sequence_parallel=self.sequence_parallel), output[1]


class Adapters:
    """The adapters beside a model's chunks, on this rank. *All ranks* make one; from then on the base weights are frozen."""

    def __init__(self, chunks: Sequence[PolicyModel], path: str, topology: Topology) -> None:
        """`path` is the directory the model was built from. Raises ConfigError for a layer whose layout is not known."""
        self.topology = topology
        #: Tells the base's weights from others, for checkpoints: they hold the adapter alone.
        self.base = fingerprint(path)
        self.settings: dict[str, AdapterConfig] = {}
        self.sites: list[Site] = []
        self._parameters: dict[str, list[torch.nn.Parameter]] = {}
        self._active: str | None = None
        self._experts_are_grouped = False
        #: A value model's head is new: it is trained beside the adapter, and kept with it.
        self.has_head = not chunks[0].has_lm_head
        self.head: torch.nn.Parameter | None = None  #: on the last pipeline stage
        for chunk, names in zip(chunks, hf_names(chunks, topology), strict=True):
            chunk.requires_grad_(False)
            chunk.adapters = self
            if chunk.pre_process:
                # Recomputed layers get a gradient only if their input wants one.
                chunk.embedding.register_forward_hook(_want_gradient)
            modules = dict(chunk.named_modules())
            for name, tensors in names.items():
                layer, _, kind = name.rpartition(".")
                self._experts_are_grouped |= EXPERTS in name and kind != "weight"
                if kind == "weight" and (site := _site(modules[layer], layer, tensors, chunk, topology)) is not None:
                    self.sites.append(site)
        if self.has_head and chunks[-1].post_process:
            self.head = chunks[-1].output_layer.weight
            self.head.requires_grad_(True)

    def add(self, name: str, settings: AdapterConfig, *, seed: int) -> None:
        """Puts a new adapter beside the model and switches it on. *All ranks.*

        Raises ConfigError for a name that is taken and targets that are not there, BackendUnavailableError for experts that can't
        have adapters here.
        """
        if name in self.settings or not name or "." in name:
            raise ConfigError(
                f"an adapter's name must be new and without dots; {name!r} is not (there are {list(self.settings)})."
            )
        self._check_targets(settings)
        parameters: list[torch.nn.Parameter] = []
        for site in self.sites:
            if site.is_expert and not settings.experts:
                continue
            wanted = frozenset(p for p in site.projections if _is_target(p, settings.targets))
            if wanted:
                adapter = Adapter(site, wanted, settings, self.topology, name, seed)
                self._adapted(site)[name] = adapter
                parameters += adapter.parameters()
        self.settings[name], self._parameters[name] = settings, parameters
        self.switch(name)

    def _check_targets(self, settings: AdapterConfig) -> None:
        if settings.experts and self._experts_are_grouped:
            raise BackendUnavailableError(
                "`lora.experts` needs experts that are layers of their own; TransformerEngine's grouped matrix products run here,"
                " to which no adapter can be added. Set lora.experts=false."
            )
        known = {leaf(p) for site in self.sites for p in site.projections if settings.experts or not site.is_expert}
        everywhere = self.topology.gather_objects(known, phase="adapters")
        known = set().union(*everywhere)
        unknown = [target for target in settings.targets if target != ALL and target not in known]
        if unknown or not known:
            raise ConfigError(
                f"`lora.targets` must name projections of the model ({', '.join(sorted(known))}) or be [{ALL}]; it has no "
                f"{', '.join(unknown)}."
            )

    def _adapted(self, site: Site) -> AdaptedBy:
        """The adapters of a layer; the first time, the layer learns to ask them."""
        found = getattr(site.module, "lora", None)
        if found is None:
            found = AdaptedBy()
            found.sequence_parallel = bool(getattr(site.module, "sequence_parallel", False)) and self.topology.tp_size > 1
            site.module.lora = found
            if not isinstance(site.module, LayerNormColumnParallelLinear | ReplicatedLinear):  # which ask by themselves
                site.module.register_forward_hook(_ask_adapters)
        return found

    def adapters(self, name: str) -> Iterator[Adapter]:
        """The adapter's layers on this rank, in the model's order."""
        for site in self.sites:
            if name in (found := getattr(site.module, "lora", None) or {}):
                yield found[name]

    @property
    def active(self) -> str | None:
        """Which adapter is on."""
        return self._active

    def switch(self, name: str | None) -> None:
        """Turns `name` on (None: the base alone), and what was on off. Only the active adapter's parameters want gradients."""
        if name is not None and name not in self.settings:
            raise ConfigError(f"there is no adapter {name!r}; there are {list(self.settings)}.")
        for site in self.sites:
            if (found := getattr(site.module, "lora", None)) is not None:
                found.active = name
        for other, parameters in self._parameters.items():
            for parameter in parameters:
                parameter.requires_grad_(other == name)
        self._active = name

    @contextmanager
    def on(self, name: str | None) -> Iterator[None]:
        """Inside the block `name` is on (None: the base alone); afterwards what was on before."""
        before = self._active
        if before == name:
            yield
            return
        self.switch(name)
        try:
            yield
        finally:
            self.switch(before)


def scale_of(settings: AdapterConfig) -> float:
    """What B A is multiplied with: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
    return settings.alpha / (math.sqrt(settings.rank) if settings.use_rslora else settings.rank)


def leaf(module: str) -> str:
    """The last part of a module's name, which `lora.targets` goes by."""
    return module.rpartition(".")[2]


def _is_target(projection: str, targets: Sequence[str]) -> bool:
    return ALL in targets or leaf(projection) in targets


#: How the decoder's projections are split over tensor ranks; experts are not.
_SPLITS: dict[str, Literal["columns", "rows", "none"]] = {
    **dict.fromkeys(("linear_qkv", "linear_fc1", "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj"), "columns"),
    **dict.fromkeys(("linear_proj", "linear_fc2"), "rows"),
    **dict.fromkeys(("linear_q_down_proj", "linear_kv_down_proj"), "none"),
}


def _site(module: torch.nn.Module, name: str, tensors: Sequence[str], chunk: PolicyModel, topology: Topology) -> Site | None:
    """The layer `name`, if it is one of the decoder's projections; `tensors` are what its weight is called by Hugging Face."""
    which = name.rpartition(".")[2]
    if not name.startswith("decoder.layers.") or which not in _SPLITS:
        return None
    is_expert = EXPERTS in f"{name}."
    projections = tuple(tensor.removesuffix(".weight") for tensor in tensors)
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    rows, columns = weight.shape
    num_groups, widths = 1, (rows // len(projections),) * len(projections)
    if which == "linear_qkv" and len(projections) == 3:
        a = chunk.architecture
        num_groups = a.num_kv_heads // topology.tp_size
        widths = (a.num_heads // a.num_kv_heads * a.head_dim, a.head_dim, a.head_dim)
    if num_groups * sum(widths) != rows or (is_expert and topology.etp_size > 1):
        why = "is split over `parallel.expert_tensor`" if is_expert else f"has {rows} rows on this rank, of an unknown layout"
        raise ConfigError(f"LoRA can't adapt {', '.join(projections)}: {name} {why}. Leave the `lora` section out.")
    split = "none" if is_expert else _SPLITS[which]
    num_inputs = columns * (topology.tp_size if split == "rows" else 1)
    return Site(module, projections, split, num_groups, widths, num_inputs, is_expert)


def _first_a(rank: int, num_inputs: int, seed: int, adapter: str, projection: str) -> torch.Tensor:
    """float32 [R, inputs of the whole layer]."""
    generator = torch.Generator().manual_seed(stable_hash("lora", seed, adapter, projection) % 2**63)
    bound = 1 / math.sqrt(num_inputs)
    return torch.empty(rank, num_inputs).uniform_(-bound, bound, generator=generator)


def _mark(parameter: torch.nn.Parameter, site: Site, *, is_split: bool) -> None:
    """What Megatron's gradient norm and its sums over ranks go by; see `build.build_model`."""
    parameter.tensor_model_parallel = is_split or site.is_expert
    parameter.partition_dim = -1
    parameter.partition_stride = 1
    if site.is_expert:
        parameter.allreduce = False
    else:
        # What every rank holds whole meets, under sequence parallelism, this rank's tokens alone: its gradient is a part.
        parameter.sequence_parallel = not is_split


def _ask_adapters(module: torch.nn.Module, arguments: tuple, output: tuple) -> tuple:
    """A forward hook; for a layer of TransformerEngine that has a norm inside, the norm is computed once more."""
    x = arguments[0]
    if (norm := getattr(module, "layer_norm_weight", None)) is not None:
        x = rms_norm(x, norm, module.eps, unit_offset=getattr(module, "zero_centered_gamma", False))
    return module.lora.add_to(output, x)


def _want_gradient(module: torch.nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output
