"""Policy losses, per token; one file per family."""

from skyrl_mega.algorithms.policy_losses.inputs import POLICY_LOSSES, LossInputs, LossOutput, PolicyLoss
from skyrl_mega.algorithms.policy_losses.marks import mark_tokens

__all__ = ["POLICY_LOSSES", "LossInputs", "LossOutput", "PolicyLoss", "mark_tokens"]
