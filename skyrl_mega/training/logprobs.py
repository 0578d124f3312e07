"""From a packed micro-batch to per-token logprobs: hidden states, then the LM head without its [T, V] logits."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch

from skyrl_mega.types import MicroBatch
from skyrl_mega_kernels.linear_logprobs import LinearLogprobsOutput, linear_logprobs

if TYPE_CHECKING:
    from skyrl_mega.config.schema import Config
    from skyrl_mega.parallel.topology import Topology


def to_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The same micro-batch with its tensors on `device`."""
    tensors = {f.name: getattr(micro_batch, f.name) for f in fields(micro_batch)}
    moved = {name: t.to(device, non_blocking=True) for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    return replace(micro_batch, **moved)


def head_logprobs(
    hidden_TH: torch.Tensor,
    model: torch.nn.Module,
    micro_batch: MicroBatch,
    config: Config,
    topology: Topology,
    *,
    temperature: float,
    return_entropy: bool = False,
) -> LinearLogprobsOutput:
    """Log-probabilities [T] float32 (and entropies) of the labels, 0 where loss_mask is False; all tensor ranks call.

    `model` is the module that owns the LM head, wrapped or not.
    """
    from skyrl_mega.models.build import output_weight, unwrap, vocab_range

    start, _ = vocab_range(model)
    return linear_logprobs(
        hidden_TH,
        output_weight(model),
        micro_batch.labels,
        temperature=temperature,
        loss_mask=micro_batch.loss_mask,
        vocab_start=start,
        vocab_size=unwrap(model).vocab_size,
        tp_group=topology.tp_group if topology.tp_size > 1 else None,
        return_entropy=return_entropy,
        chunk_tokens=config.model.logprob_chunk_tokens,
    )
