"""The product of the stages, and what to watch of it.

Shape letters: T packed tokens of one micro-batch, S its sequences.

Statistics of tokens are [T] and averaged like the loss. Statistics of sequences are averages over sequences: each adds up, over
micro-batches and ranks, to a sum over the sequences that were computed, to be divided by their number SEQUENCES. A sequence that
is spread over context ranks is counted by each for its share of the tokens. They need whole sequences: where the loss runs chunk
by chunk they are computed behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from skyrl_mega.algorithms.log_ratio import masked_log_ratio
from skyrl_mega.algorithms.off_policy.stages import BoundStage, StageInputs
from skyrl_mega.algorithms.sequences import Sequences

_PREFIX = "off_policy/"
#: Names of statistics that are averages over sequences begin with it.
SEQUENCE_PREFIX = "off_policy/sequence/"
#: How many sequences were computed.
SEQUENCES = "weight/sequences"

#: (mean w)^2 / mean w^2: the share of tokens (sequences) that would carry as much evidence if all had equal weights.
_EFFECTIVE_SHARES = {
    f"{prefix}{share}": (f"{prefix}{mean}", f"{prefix}{mean}_square")
    for prefix in (_PREFIX, SEQUENCE_PREFIX)
    for share, mean in (("effective_sample_share", "weight"), ("bounded_effective_sample_share", "bounded_weight"))
}


@dataclass(frozen=True)
class Correction:
    """weights_T: what each token's policy loss is multiplied by, 1 where loss_mask is False; no gradient.

    token_stats: [T], 0 where loss_mask is False. sequence_sums: scalars, this rank's share of the sums over sequences.
    """

    weights_T: torch.Tensor
    token_stats: dict[str, torch.Tensor]
    sequence_sums: dict[str, torch.Tensor] = field(default_factory=dict)


@torch.no_grad()
def off_policy_correction(
    policy_logprobs_T: torch.Tensor,
    rollout_logprobs_T: torch.Tensor,
    loss_mask_T: torch.Tensor,
    stages: Sequence[BoundStage],
    sequences: Sequences | None = None,
    staleness_T: torch.Tensor | None = None,
) -> Correction:
    """The stages' weights and statistics, from the policy's log-probabilities against the engine's.

    `off_policy/weight` is w per token, unbounded, `bounded_weight` the product of the stages; `<stage>_fraction` the share of
    tokens where a stage changed something. With `sequences` also `off_policy/sequence/*`: `weight` (the product of w over a
    sequence, within e^+-20), `bounded_weight` (the mean of its tokens'), and `masked_fraction`, sequences with no token left.
    Squares are for `effective_shares`.
    """
    log_ratio_T = masked_log_ratio(policy_logprobs_T, rollout_logprobs_T, loss_mask_T)
    inputs = StageInputs(log_ratio_T, loss_mask_T, sequences, staleness_T)
    raw_T = log_ratio_T.exp()
    total_T = torch.ones_like(raw_T)
    stats = {}
    for stage in stages:
        factor_T, changed_T = stage.apply(inputs)
        total_T = total_T * factor_T
        stats[f"{_PREFIX}{stage.name}_fraction"] = (changed_T & loss_mask_T).to(raw_T.dtype)
    total_T = total_T.to(raw_T.dtype)

    def of_loss_tokens(values_T: torch.Tensor) -> torch.Tensor:
        return torch.where(loss_mask_T, values_T, 0.0)

    stats |= {
        f"{_PREFIX}weight": of_loss_tokens(raw_T),
        f"{_PREFIX}weight_square": of_loss_tokens(raw_T.square()),
        f"{_PREFIX}bounded_weight": of_loss_tokens(total_T),
        f"{_PREFIX}bounded_weight_square": of_loss_tokens(total_T.square()),
    }
    sequence_sums = {} if sequences is None else _sequence_sums(inputs, total_T)
    return Correction(torch.where(loss_mask_T, total_T, 1.0), stats, sequence_sums)


def effective_shares(averages: Mapping[str, float]) -> dict[str, float]:
    """The same averages, those of squares replaced by effective shares."""
    shares = {}
    squares = set()
    for share, (mean, square) in _EFFECTIVE_SHARES.items():
        if square in averages:
            squares.add(square)
            shares[share] = averages[mean] ** 2 / averages[square] if averages[square] > 0 else 0.0
    return {name: value for name, value in averages.items() if name not in squares} | shares


def _sequence_sums(inputs: StageInputs, total_T: torch.Tensor) -> dict[str, torch.Tensor]:
    sequences, mask_T = inputs.whole_sequences, inputs.loss_mask
    counts_T = sequences.spread(sequences.sum(mask_T.double()))
    share_T = torch.where(mask_T, 1.0 / counts_T.clamp(min=1.0), 0.0)
    product_T = inputs.log_ratio_at("sequence").exp()
    bounded_T = sequences.spread(sequences.mean(total_T.double(), mask_T))
    is_masked_T = ~inputs.any_in_sequence(total_T != 0)
    sums = {
        "weight": product_T,
        "weight_square": product_T.square(),
        "bounded_weight": bounded_T,
        "bounded_weight_square": bounded_T.square(),
        "masked_fraction": is_masked_T.double(),
    }
    return {SEQUENCES: share_T.sum(), **{f"{SEQUENCE_PREFIX}{name}": (value_T * share_T).sum() for name, value_T in sums.items()}}
