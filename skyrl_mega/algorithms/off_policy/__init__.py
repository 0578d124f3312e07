"""Importance weights for tokens that the policy of this step did not sample.

Three policies speak of a token. The *behaviour* policy sampled it: the engine, under the weights it then had and with its own
arithmetic (`rollout_logprobs`). The *proximal* policy is the trainer's before this step's first update (`old_logprobs`). The
*current* one is being updated (`logprobs`). PPO's clipping is about current against proximal: how far this step may go. It says
nothing of behaviour against proximal, which differ by staleness and by the engine's rounding. Decoupled PPO (arXiv:2505.24298)
keeps the two apart: each token's clipped loss is multiplied by

    w = proximal(token) / behaviour(token) = exp(old_logprobs - rollout_logprobs)

a constant of the step, through which no gradient flows. Over the engine's samples w is 1 in expectation, whatever the prefix, and
the weighted gradient is that of the proximal policy's own tokens, except that prefixes stay distributed as the engine sampled
them: the product of w over the whole sequence mends that too, at a variance that grows with its length. Single weights can be
large, so they are bounded, which trades variance for bias; or tokens and sequences that the two policies see too differently are
left out.

`algorithm.off_policy.stages` lists what is done, and a token's weight is the product of the stages' factors: at most one of them
is made of the ratio itself (`importance.py`), the others are masks (`masks.py`) or age (`staleness.py`). With
`algorithm.old_logprobs=rollout` the loss's own ratio is current / behaviour; then only the others make sense, and they compare
the current policy with the engine.

Masked tokens stay in the loss's normaliser: a step with many of them is a smaller step. docs/off_policy.md has the whole table.
"""

from skyrl_mega.algorithms.off_policy.stages import STAGES, BoundStage, StageInputs, bind_stages
from skyrl_mega.algorithms.off_policy.weights import Correction, off_policy_correction

__all__ = ["STAGES", "BoundStage", "Correction", "StageInputs", "bind_stages", "off_policy_correction"]
