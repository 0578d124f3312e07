"""From a packed micro-batch to per-token logprobs: hidden states, then the LM head without its [T, V] logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from skyrl_mega.models.build import output_weight, unwrap, vocab_range
from skyrl_mega.types import MicroBatch
from skyrl_mega_kernels.linear_logprobs import LogprobsOutput, linear_logprobs
from skyrl_mega_kernels.linear_policy_loss import ChunkLoss, LinearPolicyLossOutput, linear_policy_loss
from skyrl_mega_kernels.topk_logprobs import logprobs_at, topk_logprobs, truncation_floor

if TYPE_CHECKING:
    from skyrl_mega.config.schema import Config
    from skyrl_mega.parallel.topology import Topology


def head_logprobs(
    hidden_TH: torch.Tensor,
    model: torch.nn.Module,
    micro_batch: MicroBatch,
    config: Config,
    topology: Topology,
    *,
    temperature: float | None = None,
    return_entropy: bool = False,
) -> LogprobsOutput:
    """Log-probabilities [T] float32 (and entropies) of the labels, 0 where loss_mask is False; all tensor ranks call.

    Without a `temperature` they are those that the rollout's sampler draws from: its temperature, its top-k and top-p. `model`
    is the module that owns the LM head, wrapped or not.
    """
    settings = _head_settings(hidden_TH, model, micro_batch, config, topology, temperature)
    return linear_logprobs(hidden_TH, output_weight(model), micro_batch.labels, return_entropy=return_entropy, **settings)


def head_logprobs_at(
    hidden_TH: torch.Tensor,
    model: torch.nn.Module,
    micro_batch: MicroBatch,
    config: Config,
    topology: Topology,
    ids_TK: torch.Tensor,
) -> torch.Tensor:
    """Log-probabilities float32 [T, K] of the tokens `ids_TK` (int64, -1 for none: -inf), over the whole vocabulary at the
    rollout's temperature; all tensor ranks call. Differentiable."""
    settings = _head_settings(hidden_TH, model, micro_batch, config, topology, config.rollout.temperature)
    del settings["floor"]
    return logprobs_at(hidden_TH, output_weight(model), ids_TK, **settings).logprobs


def head_topk(
    hidden_TH: torch.Tensor, model: torch.nn.Module, micro_batch: MicroBatch, config: Config, topology: Topology, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64 [T, K], log-probabilities float32 [T, K]) of the K likeliest tokens, likewise."""
    settings = _head_settings(hidden_TH, model, micro_batch, config, topology, config.rollout.temperature)
    del settings["floor"]
    output = topk_logprobs(hidden_TH, output_weight(model), k, **settings)
    return output.ids, output.logprobs


def head_loss(
    hidden_TH: torch.Tensor,
    model: torch.nn.Module,
    micro_batch: MicroBatch,
    config: Config,
    topology: Topology,
    loss_fn: ChunkLoss,
) -> LinearPolicyLossOutput:
    """The summed `loss_fn` over chunks of the tokens that count, with entropies, for what the rollout's sampler draws from.

    All tensor ranks call; see `linear_policy_loss`.
    """
    settings = _head_settings(hidden_TH, model, micro_batch, config, topology, None)
    return linear_policy_loss(hidden_TH, output_weight(model), micro_batch.labels, loss_fn, return_entropy=True, **settings)


def _head_settings(
    hidden_TH: torch.Tensor,
    model: torch.nn.Module,
    micro_batch: MicroBatch,
    config: Config,
    topology: Topology,
    temperature: float | None,
) -> dict[str, Any]:
    """What every LM-head operator is told; `temperature` None: the rollout's sampler, truncation included."""
    start, _ = vocab_range(model)
    place: dict[str, Any] = {
        "temperature": config.rollout.temperature if temperature is None else temperature,
        "loss_mask": micro_batch.loss_mask,
        "vocab_start": start,
        "vocab_size": unwrap(model).vocab_size,
        "tp_group": topology.tp_group if topology.tp_size > 1 else None,
        "logit_softcap": unwrap(model).architecture.logits_softcap,
    }
    floor = None
    top_k, top_p = config.rollout.top_k, config.rollout.top_p
    if temperature is None and (top_k > 0 or top_p < 1):
        # The ratio matches the sampler only over the tokens that the sampler could draw.
        floor = truncation_floor(hidden_TH, output_weight(model), top_k=top_k, top_p=top_p, **place)
    return {**place, "floor": floor, "chunk_tokens": config.model.logprob_chunk_tokens, "backend": config.model.kernels}
