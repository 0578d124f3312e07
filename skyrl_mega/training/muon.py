"""Muon: momentum whose every matrix is replaced by the nearest one with equal singular values (Jordan 2024, arXiv:2502.16982).

For a weight matrix W [A, B] of the layers, with gradient G and momentum buffer M:

    M <- mu M + G
    O  = NewtonSchulz(mu M + G, or M without Nesterov's step)         about U V^T of the singular value decomposition U S V^T
    W <- W - lr (s O + weight_decay W)                                s: `rms` 0.2 sqrt(max(A, B)), as large as AdamW's updates
                                                                         (arXiv:2502.16982, eq. 4), `spectral` sqrt(max(1, A / B))

Newton-Schulz: X / |X|, then `steps` times X <- a X + b (X X^T) X + c (X X^T)^2 X with (a, b, c) = (3.4445, -4.7750, 2.0315). This
brings every singular value near 1 (to within 0.7 .. 1.2), in float32.

A matrix is what the model multiplies with, not what Megatron stores: the fused `linear_qkv` is three (its rows lie in groups of
heads), the gated `linear_fc1` two. What tensor-parallel ranks share is gathered, so that a layout changes nothing; each rank then
does the whole of the work and keeps its part. Embeddings, LM head, routers, norms and biases are AdamW's, in the same optimizer.

Megatron-Core 0.16 has a Muon of its own over the package emerging-optimizers, which is neither needed nor used here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

    from skyrl_mega.config.schema import MuonConfig
    from skyrl_mega.models.build import PolicyModel

COEFFICIENTS = (3.4445, -4.7750, 2.0315)

#: A stored parameter (local) as its matrices; and those as the parameter again.
Split = Callable[[torch.Tensor], list[torch.Tensor]]
Merge = Callable[[Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """How a stored parameter is made of matrices, and along which of their axes the ranks of `group` share them (None: not)."""

    split: Split
    merge: Merge
    shared_axis: int | None = None
    group: Any = None


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the groups with `use_muon`, AdamW for the others; one state and one list of groups, as Megatron wants them.

    `layouts` has an entry for every parameter of a Muon group.
    """

    def __init__(
        self, groups: list[dict[str, Any]], adamw: dict[str, Any], muon: MuonConfig, layouts: dict[torch.Tensor, Layout]
    ) -> None:
        super().__init__(groups, {**adamw, "use_muon": False, "fused": True})
        self._settings, self._layouts = muon, layouts
        adamw_groups = [group for group in self.param_groups if not group["use_muon"]]
        self._adamw = torch.optim.AdamW(adamw_groups, **adamw, fused=True) if adamw_groups else None
        if self._adamw is not None:
            self._adamw.param_groups, self._adamw.state = adamw_groups, self.state
        for group in self.param_groups:
            for parameter in group["params"]:
                moments = ("momentum",) if group["use_muon"] else ("exp_avg", "exp_avg_sq")
                # Where the parameter is: the fused kernels of AdamW count on the device.
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device)}
                self.state[parameter] |= {name: torch.zeros_like(parameter) for name in moments}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. *All tensor-parallel ranks.*"""
        assert closure is None, "Megatron gives none"
        if self._adamw is not None:
            self._adamw.step()
        for group in self.param_groups:
            if group["use_muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, lr=group["lr"], weight_decay=group["weight_decay"])

    def _update(self, parameter: torch.Tensor, *, lr: float, weight_decay: float) -> None:
        settings, state, layout = self._settings, self.state[parameter], self._layouts[parameter]
        state["step"] += 1
        momentum = state["momentum"].mul_(settings.momentum).add_(parameter.grad)
        direction = parameter.grad + settings.momentum * momentum if settings.nesterov else momentum
        parts = [orthogonal_part(part, layout, settings) for part in layout.split(direction)]
        parameter.mul_(1.0 - lr * weight_decay).add_(layout.merge(parts), alpha=-lr)


def orthogonal_part(part: torch.Tensor, layout: Layout, settings: MuonConfig) -> torch.Tensor:
    """This rank's part of the scaled, orthogonalised matrix of which it holds `part`. *All ranks of `layout.group`.*"""
    axis = layout.shared_axis
    if axis is None or layout.group is None or dist.get_world_size(layout.group) == 1:
        return scale(part.shape, settings.scale) * newton_schulz(part, settings.steps)
    size, rank = dist.get_world_size(layout.group), dist.get_rank(layout.group)
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=layout.group)
    whole = torch.cat(parts, dim=axis)
    return (scale(whole.shape, settings.scale) * newton_schulz(whole, settings.steps)).chunk(size, dim=axis)[rank]


def newton_schulz(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """A matrix [A, B] with the singular vectors of `matrix` and singular values near 1 (0 stays 0); in its dtype."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def scale(shape: torch.Size, kind: str) -> float:
    """The factor of an orthogonalised [A, B] matrix; see the module's text."""
    rows, columns = shape
    return 0.2 * math.sqrt(max(rows, columns)) if kind == "rms" else math.sqrt(max(1.0, rows / columns))


def use_muon(optimizer: MegatronOptimizer, chunks: Sequence[PolicyModel], adamw: dict[str, Any], settings: MuonConfig) -> None:
    """Puts Muon into the place of AdamW in Megatron's `optimizer`, for the matrices of the layers of `chunks`. *All ranks.*

    `optimizer` is not the distributed one, and no update has been made. `adamw`: keyword arguments of torch's.
    """
    layouts: dict[torch.Tensor, Layout] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if is_matrix(name, parameter):
                # The master of a bfloat16 weight is what the optimizer updates.
                layouts[getattr(parameter, "main_param", parameter)] = _layout_of(name, parameter, chunk)
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:
            continue
        groups = []
        for group in part.optimizer.param_groups:
            for by_muon in (True, False):
                held = [parameter for parameter in group["params"] if (parameter in layouts) == by_muon]
                if held:
                    groups.append({**group, "params": held, "use_muon": by_muon})
        part.optimizer = MuonWithAdamW(groups, adamw, settings, layouts)


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon updates the parameter: a matrix of the layers, which neither a router nor a gate with one row is."""
    return parameter.ndim == 2 and min(parameter.shape) > 1 and name.startswith("decoder.layers.") and ".router." not in name


def _layout_of(name: str, parameter: torch.Tensor, chunk: PolicyModel) -> Layout:
    from megatron.core import parallel_state

    # Routed experts are marked as split also where each is whole on its rank: their group has one rank then.
    is_expert = ".experts." in name and ".shared_experts." not in name
    group = parallel_state.get_expert_tensor_parallel_group() if is_expert else parallel_state.get_tensor_model_parallel_group()
    axis = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
    shared = {"shared_axis": axis if axis >= 0 else None, "group": group}
    config = chunk.config
    if name.endswith("linear_qkv.weight"):
        queries = config.num_attention_heads // config.num_query_groups * config.kv_channels
        return Layout(*_heads(queries, config.kv_channels), **shared)
    if "linear_fc1" in name and config.gated_linear_unit:
        return Layout(lambda stored: list(stored.chunk(2)), torch.cat, **shared)
    return Layout(lambda stored: [stored], lambda parts: parts[0], **shared)


def _heads(queries: int, head_dim: int) -> tuple[Split, Merge]:
    """Rows in groups, each of `queries` rows of queries, then those of one head of keys, and of one of values."""
    sizes = [queries, head_dim, head_dim]

    def split(stored: torch.Tensor) -> list[torch.Tensor]:
        grouped = stored.view(-1, sum(sizes), stored.size(1))
        return [part.reshape(-1, stored.size(1)) for part in grouped.split(sizes, dim=1)]

    def merge(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        columns = parts[0].size(1)
        grouped = [part.reshape(-1, size, columns) for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(grouped, dim=1).reshape(-1, columns)

    return split, merge
