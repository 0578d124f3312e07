"""Does a layout compute what one process computes? A few updates in any layout, reported in terms that no layout changes.

Used by `skyrl-mega verify-layout` and by the layout matrix of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from skyrl_mega.orchestration.assemble import shares_prompts
from skyrl_mega.orchestration.comparison import Comparison
from skyrl_mega.orchestration.loop import pack
from skyrl_mega.orchestration.step_recorder import gather_rows
from skyrl_mega.orchestration.teacher import wants_topk
from skyrl_mega.types import Metrics, TrainSample

if TYPE_CHECKING:
    from skyrl_mega.config.schema import Config
    from skyrl_mega.parallel.topology import Topology


#: Far above the rounding noise of a gradient's entries, far below the entries that matter.
COMPARED_EPS = 1e-4


@dataclass(frozen=True)
class LayoutTolerance:
    """Largest differences that another order of summation explains, in float32.

    `loss` and `logprob` absolute, `grad_norm` relative. `weight` is the largest and `weight_mean` the mean difference of a
    tensor's entries after the updates, in learning rates. They hold for an `optimizer.eps` of COMPARED_EPS: with a small one
    AdamW's first updates take the sign of every gradient, also of those that are nothing but noise around zero.
    """

    loss: float = 1e-5
    logprob: float = 1e-4
    grad_norm: float = 1e-4
    weight: float = 0.05
    weight_mean: float = 1e-3


@dataclass(frozen=True)
class LayoutResult:
    """What some updates computed: per update the logprobs before it (token-aligned rows by sample) and its metrics; then the
    weights under their Hugging Face names (float32; empty on ranks other than 0)."""

    logprobs: list[dict[int, torch.Tensor]]
    metrics: list[Metrics]
    weights: dict[str, torch.Tensor]


def run_updates(config: Config, topology: Topology, updates: Sequence[list[TrainSample]]) -> LayoutResult:
    """The updates from the weights of `config.model.path`. *All ranks.*"""
    from skyrl_mega.training.policy import Policy
    from skyrl_mega.training.reference import forward_topk

    policy = Policy.from_hf(config, topology)
    logprobs, metrics = [], []
    for samples in updates:
        batch = pack(config, topology, samples, share_prompts=shares_prompts(config, policy))
        held = {index for micro_batch in batch.micro_batches for index in micro_batch.sample_index.tolist()}
        computed = [sample for sample in samples if sample.sample_index in held]
        values = policy.compute_logprobs(batch)
        if config.algorithm.kl.coef > 0.0:
            for micro_batch, values_T in zip(batch.micro_batches, values, strict=True):
                micro_batch.ref_logprobs = 0.9 * values_T  # any reference will do, if it is the same one everywhere
        if wants_topk(config.algorithm):
            k = max(config.teacher.topk, 1)
            found = forward_topk(policy.chunks, batch, config, topology, k, vocab_size=policy.vocab_size)
            for micro_batch, (ids_TK, logprobs_TK) in zip(batch.micro_batches, found, strict=True):
                # Any teacher will do: here one that likes the policy's tokens in the opposite order.
                micro_batch.teacher_topk_ids, micro_batch.teacher_topk_logprobs = ids_TK, logprobs_TK.flip(-1)
        logprobs.append(gather_rows(values, batch, computed, topology))
        metrics.append(policy.train_step(batch))
    weights = {name: value.clone() for name, value in policy.iter_weights(torch.float32) if topology.is_main}
    return LayoutResult(logprobs, metrics, weights)


def compare_results(
    expected: LayoutResult, got: LayoutResult, lr: float, allowed: LayoutTolerance = LayoutTolerance()
) -> Iterator[Comparison]:
    """One line per update and quantity, then the tensor that differs most. `lr`: the updates' learning rate."""
    updates = zip(expected.metrics, got.metrics, expected.logprobs, got.logprobs, strict=True)
    for number, (metrics, new_metrics, rows, new_rows) in enumerate(updates, start=1):
        for name, tolerance in (("loss/total", allowed.loss), ("policy/entropy", allowed.logprob)):
            if name in metrics:
                before, after = metrics[name], new_metrics[name]
                yield Comparison(f"{name} of update {number}", before, after, _distance(before, after), tolerance)
        before, after = metrics["update/grad_norm"], new_metrics["update/grad_norm"]
        difference = _distance(before, after) / max(abs(before), 1e-30)
        yield Comparison(f"gradient norm of update {number} (relative)", before, after, difference, allowed.grad_norm)
        yield _worst_entry(f"logprobs before update {number}", rows, new_rows, allowed.logprob)
    yield _worst_entry("weights after the updates", expected.weights, got.weights, allowed.weight * lr)
    yield _worst_mean("mean weight difference", expected.weights, got.weights, allowed.weight_mean * lr)


def _distance(before: float, after: float) -> float:
    difference = abs(before - after)
    return difference if math.isfinite(difference) else math.inf


def _worst_entry(what: str, expected: Mapping, got: Mapping, tolerance: float) -> Comparison:
    """The entry that differs most over all tensors; a missing or misshapen tensor differs infinitely."""
    worst = Comparison(what, 0.0, 0.0, 0.0, tolerance)
    for key in sorted(expected.keys() | got.keys()):
        if key not in expected or key not in got or expected[key].shape != got[key].shape:
            return Comparison(f"{what}: {key} is absent or has another shape", math.nan, math.nan, math.inf, tolerance)
        difference = torch.nan_to_num((expected[key] - got[key]).abs().flatten(), nan=math.inf)
        if difference.numel() and float(difference.max()) > worst.difference:
            at = int(difference.argmax())
            before, after = float(expected[key].flatten()[at]), float(got[key].flatten()[at])
            place = f"sample {key}" if isinstance(key, int) else key
            worst = Comparison(f"{what} (most: {place})", before, after, float(difference[at]), tolerance)
    return worst


def _worst_mean(what: str, expected: Mapping, got: Mapping, tolerance: float) -> Comparison:
    means = {key: float((expected[key] - got[key]).abs().mean()) for key in expected if key in got}
    key = max(means, key=lambda name: means[name], default="")
    return Comparison(f"{what} (most: {key})", 0.0, 0.0, means.get(key, 0.0), tolerance)
