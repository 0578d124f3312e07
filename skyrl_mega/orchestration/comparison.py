"""What differs between a recorded update and its replay, and where the first number is that is not finite.

Everything here looks at token-aligned rows by sample, which no layout changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from skyrl_mega.algorithms.kl import KL_ESTIMATORS
from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES, LossInputs
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega.types import Metrics

if TYPE_CHECKING:
    from skyrl_mega.checkpoint.steps import Rows, UpdateInputs
    from skyrl_mega.config.schema import Config


@dataclass(frozen=True)
class Tolerance:
    """Largest differences that a change of layout, device or dtype explains: of one token's logprob and of a statistic (both
    absolute below 1, relative above), and of the gradient norm (relative)."""

    logprob: float
    statistic: float
    grad_norm: float


#: By model.dtype; where record and replay differ in dtype, the coarser one's.
TOLERANCES = {"float32": Tolerance(1e-4, 1e-4, 1e-3), "bfloat16": Tolerance(0.25, 0.05, 0.1)}

GRAD_NORM = "update/grad_norm"
_STATISTICS = ("loss/", "policy/", "mismatch/", "off_policy/")


@dataclass(frozen=True)
class Comparison:
    """One line of the table. `difference` is 0 where both are the same, NaN included, and infinite where only one is finite."""

    name: str
    recorded: float
    replayed: float
    difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class WorstToken:
    """The token whose logprobs differ most; `position` counts from the start of its sample, prompt included."""

    sample_index: int
    group_id: str
    position: int
    token_id: int
    recorded: float
    replayed: float


@dataclass(frozen=True)
class NonFinite:
    """The first number that is NaN or infinite: `what` it is, and where it was computed in this layout."""

    what: str
    value: float
    sample_index: int
    group_id: str
    position: int
    token_id: int
    micro_batch: int
    dp_rank: int


# ---- comparing ------------------------------------------------------------------------------------------------------------


def _difference(recorded: float, replayed: float, *, scale: float) -> float:
    if recorded == replayed or (math.isnan(recorded) and math.isnan(replayed)):
        return 0.0
    difference = abs(recorded - replayed) / scale
    return difference if math.isfinite(difference) else math.inf


def compare_metrics(recorded: Metrics, replayed: Metrics, allowed: Tolerance) -> Iterator[Comparison]:
    for name, before in recorded.items():
        if name not in replayed or not (name == GRAD_NORM or name.startswith(_STATISTICS)):
            continue
        now = replayed[name]
        if name == GRAD_NORM:
            scale = max(abs(before), abs(now), 1e-12)
            yield Comparison(name, before, now, _difference(before, now, scale=scale), allowed.grad_norm)
        else:
            tolerance = allowed.logprob if name == "mismatch/abs_logprob_diff_max" else allowed.statistic
            yield Comparison(name, before, now, _difference(before, now, scale=max(1.0, abs(before))), tolerance)


def _differences(recorded: torch.Tensor, replayed: torch.Tensor) -> torch.Tensor:
    """By token, absolute below 1 and relative above, with `Comparison`'s meaning of 0 and infinity."""
    same = (recorded == replayed) | (recorded.isnan() & replayed.isnan())
    scaled = (recorded - replayed).abs() / recorded.abs().clamp(min=1.0)
    return torch.where(same, 0.0, scaled).nan_to_num(nan=math.inf, posinf=math.inf)


def compare_logprobs(recorded: Rows, replayed: Rows, allowed: Tolerance) -> Iterator[Comparison]:
    """One line for all tokens: the means beside each other, the largest difference of one token."""
    common = [index for index in recorded if index in replayed]
    if common:
        before, now = (torch.cat([rows[index] for index in common]) for rows in (recorded, replayed))
        spoken = (before != 0) | (now != 0)  # 0 stands where nothing was sampled
        means = (float(values[spoken].mean()) for values in (before, now)) if bool(spoken.any()) else (0.0, 0.0)
        yield Comparison("logprobs", *means, float(_differences(before, now).max()), allowed.logprob)


def worst_token(inputs: UpdateInputs, replayed: Rows) -> WorstToken | None:
    worst, largest = None, 0.0
    for sample in inputs.samples:
        before, now = inputs.logprobs.get(sample.sample_index), replayed.get(sample.sample_index)
        if before is None or now is None:
            continue
        differences = _differences(before, now)
        at = int(differences.argmax())
        if float(differences[at]) > largest:
            largest = float(differences[at])
            place = (sample.sample_index, sample.group_id, at, int(sample.token_ids[at]))
            worst = WorstToken(*place, float(before[at]), float(now[at]))
    return worst


# ---- NaN and infinity -----------------------------------------------------------------------------------------------------


def first_non_finite(
    config: Config, inputs: UpdateInputs, logprobs: Rows, places: Mapping[int, tuple[int, int]]
) -> NonFinite | None:
    """By micro-batch, rank and sample; of one token the inputs are looked at before what is computed from them."""
    for sample in sorted((s for s in inputs.samples if s.sample_index in logprobs), key=lambda s: places[s.sample_index]):
        index, found = sample.sample_index, []
        for what, values in _numbers(config, inputs, logprobs, index).items():
            bad = (~values.isfinite() & sample.loss_mask).nonzero()
            if len(bad):
                found.append((int(bad[0]), what, float(values[bad[0]])))
        if found:
            position, what, value = min(found, key=lambda item: item[0])
            micro_batch, dp_rank = places[index]
            token_id = int(sample.token_ids[position])
            return NonFinite(what, value, index, sample.group_id, position, token_id, micro_batch, dp_rank)
    return None


def _numbers(config: Config, inputs: UpdateInputs, logprobs: Rows, index: int) -> dict[str, torch.Tensor]:
    """Everything that has a number per token of the sample, inputs first; entropy has no part in it."""
    sample = next(sample for sample in inputs.samples if sample.sample_index == index)
    assert sample.advantages is not None  # recorded with them
    given = {
        "advantage": sample.advantages,
        "rollout logprob": sample.rollout_logprobs,
        **({"old logprob": inputs.old_logprobs[index]} if inputs.old_logprobs is not None else {}),
        **({"reference logprob": inputs.ref_logprobs[index]} if inputs.ref_logprobs is not None else {}),
    }
    now = logprobs[index]
    loss_inputs = LossInputs(
        logprobs=now,
        old_logprobs=given.get("old logprob", now),
        rollout_logprobs=sample.rollout_logprobs,
        advantages=sample.advantages,
        loss_mask=sample.loss_mask,
        ref_logprobs=given.get("reference logprob"),
        sequences=Sequences.packed(torch.tensor([0, sample.num_tokens])),
        marked=None if sample.marked is None else sample.marked > 0,
    )
    computed = {"logprob": now}
    entry = POLICY_LOSSES.find(config.algorithm.policy_loss)
    if not entry.traits["needs"]:
        computed["policy loss"] = entry.bind(config.algorithm.loss_options, "algorithm.loss_options")(loss_inputs)[0]
    if config.algorithm.kl.coef > 0.0 and "reference logprob" in given:
        estimator = KL_ESTIMATORS[config.algorithm.kl.estimator]
        computed["KL term"] = estimator(now, given["reference logprob"], sample.loss_mask)
    return given | computed
