"""Does the engine serve the weights that the policy has? Asked after a weight sync, answered by logprobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skyrl_mega.data.packing import balance_and_pack, unpack
from skyrl_mega.errors import NumericsError
from skyrl_mega.types import Metrics, TrainSample

if TYPE_CHECKING:
    from skyrl_mega.config.schema import Config, RolloutConfig
    from skyrl_mega.orchestration.rollout_host import RolloutHost
    from skyrl_mega.parallel.topology import Topology
    from skyrl_mega.training.policy import Policy
    from skyrl_mega.types import TrajectoryGroup

#: Mean |difference| accepted by default. Measured: about 1e-5 in float32; 0.01-0.05 where both sides compute in bfloat16;
#: 0.05-0.1 where the engine computes in 8 bits.
DEFAULT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "fp8": 0.3}
NUM_SEQUENCES = 8


def probe_engine(
    policy: Policy, rollout: RolloutHost | None, groups: list[TrajectoryGroup], config: Config, topology: Topology
) -> Metrics:
    """`probe/logprob_diff_mean` and `_max` over a few whole sequences, at temperature 1. All ranks call.

    Raises NumericsError if the mean is above `rollout.probe_tolerance`: then the sync did not deliver what the policy holds.
    """
    import torch

    from skyrl_mega.training.schedule import packing_multiples

    trajectories = [trajectory for group in groups for trajectory in group.trajectories][:: max(1, len(groups))][:NUM_SEQUENCES]
    scored = None
    if rollout is not None:
        scored = rollout.call("score", [list(t.token_ids) for t in trajectories], timeout_s=config.parallel.timeout_s)
    scored = topology.broadcast_object(scored, phase="probe")
    samples = [_all_tokens(index, t.token_ids) for index, t in enumerate(trajectories)]
    batch = balance_and_pack(
        samples,
        tokens_per_micro_batch=config.trainer.tokens_per_micro_batch,
        dp_rank=0,
        dp_size=1,
        skip_zero_advantage=False,
        **packing_multiples(config, topology),
    )
    computed = unpack(policy.compute_logprobs(batch, temperature=1.0), batch, samples)
    difference = torch.cat([(torch.tensor(a)[1:] - b[1:]).abs() for a, b in zip(scored, computed, strict=True)])
    mean, largest = float(difference.mean()), float(difference.max())
    tolerance = config.rollout.probe_tolerance or DEFAULT_TOLERANCE[_precision(config.rollout)]
    if not mean <= tolerance:
        raise NumericsError(
            f"after the weight sync, engine and policy logprobs differ by {mean:.2e} on average (largest {largest:.2e}), more "
            f"than rollout.probe_tolerance {tolerance:.0e}: the engine does not serve the policy's weights"
        )
    return {"probe/logprob_diff_mean": mean, "probe/logprob_diff_max": largest}


def _precision(rollout: RolloutConfig) -> str:
    return rollout.dtype if rollout.quantization == "none" else rollout.quantization


def _all_tokens(index: int, token_ids: list[int]) -> TrainSample:
    """A sample that asks for the logprob of every token but the first."""
    import torch

    length = len(token_ids)
    loss_mask = torch.ones(length, dtype=torch.bool)
    loss_mask[0] = False
    zeros = torch.zeros(length)
    return TrainSample(index, index, f"probe/{index}", torch.tensor(token_ids), loss_mask, zeros, 0.0, zeros)
