"""What a stage of the off-policy correction is given and what it returns; the registry of stages; from a configuration to stages.

Shape letters: T packed tokens of one micro-batch, S its sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from skyrl_mega.algorithms.log_ratio import MAX_ABS_LOG_RATIO
from skyrl_mega.algorithms.registry import Entry, Registry
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega.errors import ConfigError


@dataclass(frozen=True)
class StageInputs:
    """What a stage may look at.

    log_ratio_T float [T]: policy less engine log-probability, within +-20, 0 where loss_mask is False. `sequences` is there for
    stages that are not token-separable; staleness float [T], weight versions since a token was sampled, where the samples carry
    it.
    """

    log_ratio_T: torch.Tensor
    loss_mask: torch.Tensor
    sequences: Sequences | None = None
    staleness: torch.Tensor | None = None

    @property
    def whole_sequences(self) -> Sequences:
        """`sequences`. Raises ConfigError where the loss runs chunk by chunk."""
        if self.sequences is None:
            raise ConfigError(
                "a stage of `algorithm.off_policy.stages` looks at whole sequences and was given chunks of tokens: register it"
                " with token_separable=False."
            )
        return self.sequences

    def log_ratio_at(self, level: str) -> torch.Tensor:
        """[T]: the log-ratio that each token is judged by.

        `token`: its own. `sequence`: the sum over its sequence's trained tokens, within +-20: the log of the product of ratios.
        `geometric`: their mean, the log of the geometric mean. Sums are float64, so that no order of adding up moves a sequence
        over a bound. Raises ConfigError for another level.
        """
        if level == "token":
            return self.log_ratio_T
        if level == "sequence":
            sums_S = self.whole_sequences.sum(self.log_ratio_T.double())
            return self.whole_sequences.spread(sums_S.clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO))
        if level == "geometric":
            return self.whole_sequences.spread(self.whole_sequences.mean(self.log_ratio_T.double(), self.loss_mask))
        raise ConfigError(f"the `level` of an off-policy stage must be token, sequence or geometric; got {level!r}.")

    def any_in_sequence(self, is_so_T: torch.Tensor) -> torch.Tensor:
        """bool [T]: whether it is so for any trained token of the token's sequence."""
        counts_S = self.whole_sequences.sum((is_so_T & self.loss_mask).double())
        return self.whole_sequences.spread(counts_S) > 0


#: A stage maps StageInputs (and its options) to (factor_T, where it changed something: bool [T]).
Stage = Callable[..., tuple[torch.Tensor, torch.Tensor]]

_HERE = "skyrl_mega.algorithms.off_policy"

#: Names in `algorithm.off_policy.stages`. Traits: `weighs`, the factor is made of the ratio; `token_separable`, a token's factor
#: depends on that token only (stages with an option `level`: while that is "token").
STAGES: Registry[Stage] = Registry(
    "algorithm.off_policy.stages",
    {
        "truncated_is": f"{_HERE}.importance",
        "masked_is": f"{_HERE}.importance",
        "icepop": f"{_HERE}.importance",
        "token_mask": f"{_HERE}.masks",
        "sequence_mask": f"{_HERE}.masks",
        "geometric_mask": f"{_HERE}.masks",
        "outlier_mask": f"{_HERE}.masks",
        "divergence_mask": f"{_HERE}.masks",
        "staleness_decay": f"{_HERE}.staleness",
    },
    {"weighs": False, "token_separable": True},
)


@dataclass(frozen=True)
class BoundStage:
    """A stage with its options; `name` is that of its statistics: a stage of one's own goes without its file."""

    name: str
    apply: Callable[[StageInputs], tuple[torch.Tensor, torch.Tensor]]
    weighs: bool
    token_separable: bool


def bind_stages(stages: Sequence[Mapping[str, Any]]) -> list[BoundStage]:
    """The stages of `algorithm.off_policy.stages`: mappings of `name` and options.

    Each is tried on one token, so that options out of range are found here and not in the first step. Raises ConfigError for a
    stage without a name, unknown names, options or values, and for two stages that weigh by the ratio.
    """
    bound = [_bind(stage, f"algorithm.off_policy.stages[{number}]") for number, stage in enumerate(stages)]
    weighing = [stage.name for stage in bound if stage.weighs]
    if len(weighing) > 1:
        raise ConfigError(f"`algorithm.off_policy.stages` weighs by the ratio more than once ({', '.join(weighing)}); keep one.")
    if len({stage.name for stage in bound}) < len(bound):
        raise ConfigError(f"`algorithm.off_policy.stages` names a stage twice: {', '.join(s.name for s in bound)}; keep one.")
    return bound


def _bind(stage: Mapping[str, Any], setting: str) -> BoundStage:
    options = dict(stage)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"`{setting}` needs a `name`, as in `{{name: truncated_is, cap: 2.0}}`; got {dict(stage)}.")
    entry = STAGES.find(name)
    separable = bool(entry.traits["token_separable"]) and _level(entry, options) == "token"
    apply = entry.bind(options, setting)
    one_S = Sequences(torch.zeros(1, dtype=torch.int64), 1)
    apply(StageInputs(torch.zeros(1), torch.ones(1, dtype=torch.bool), None if separable else one_S, torch.zeros(1)))
    return BoundStage(entry.name.rpartition(":")[2], apply, bool(entry.traits["weighs"]), separable)


def _level(entry: Entry[Stage], options: Mapping[str, Any]) -> Any:
    """The stage's `level`; "token" for stages without one."""
    parameter = inspect.signature(entry.function).parameters.get("level")
    return options.get("level", "token" if parameter is None else parameter.default)


def check_bounds(stage: str, *, low: float | None = None, high: float | None = None, high_name: str = "high") -> None:
    """Raises ConfigError unless 0 <= low < high: bounds of a ratio or of a divergence, neither of which is ever negative."""
    if high is not None and not high > 0:
        raise ConfigError(f"`{high_name}` of the off-policy stage {stage} must be above 0; got {high}.")
    if low is not None and high is not None and not 0 <= low < high:
        raise ConfigError(f"`low` of the off-policy stage {stage} must lie in [0, `{high_name}` = {high}); got {low}.")
