"""All rules of `skyrl-mega train`, in the order in which they are checked and listed."""

from __future__ import annotations

from skyrl_mega.config.algorithm_rules import ALGORITHM_COMBINATIONS
from skyrl_mega.config.combinations import COMBINATIONS
from skyrl_mega.config.critic_rules import CRITIC_COMBINATIONS
from skyrl_mega.config.evaluation_rules import EVALUATION_COMBINATIONS
from skyrl_mega.config.expert_rules import EXPERT_COMBINATIONS, EXPERT_LAYOUT
from skyrl_mega.config.layout_rules import LAYOUT_COMBINATIONS
from skyrl_mega.config.lora_rules import LORA_COMBINATIONS, LORA_SURROUNDINGS
from skyrl_mega.config.optimizer_rules import OPTIMIZER_COMBINATIONS
from skyrl_mega.config.reward_rules import REWARD_COMBINATIONS, REWARD_SURROUNDINGS
from skyrl_mega.config.rule import Rule
from skyrl_mega.config.surroundings import SURROUNDINGS

#: Of the settings alone, the model's shape and the number of processes.
ALL_COMBINATIONS: tuple[Rule, ...] = (
    *LAYOUT_COMBINATIONS,
    *COMBINATIONS,
    *CRITIC_COMBINATIONS,
    *OPTIMIZER_COMBINATIONS,
    *EXPERT_LAYOUT,
    *EXPERT_COMBINATIONS,
    *LORA_COMBINATIONS,
    *EVALUATION_COMBINATIONS,
    *ALGORITHM_COMBINATIONS,
    *REWARD_COMBINATIONS,
)
#: Of files and of what is installed.
ALL_SURROUNDINGS: tuple[Rule, ...] = (*SURROUNDINGS, *LORA_SURROUNDINGS, *REWARD_SURROUNDINGS)
