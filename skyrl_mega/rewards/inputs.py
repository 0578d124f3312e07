"""What a reward function, a reward model or a judge is told of one finished trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skyrl_mega.types import StopReason


@dataclass(frozen=True)
class RewardInput:
    """One finished trajectory, in text, tokens and numbers.

    `messages`: all that was said, in order, as {"role", "content"}; the policy's turns are the assistant's, and an observation of
    raw text is a user's. `token_ids`: the whole trajectory's as sampled, of which the policy sampled `num_response_tokens`.
    `stop_reason`: why the last turn ended (`LENGTH`: at a token limit); `truncated`: a limit on turns or length ended the
    episode. `env_reward`: the environment's, unweighted; `metrics`: what it reported.
    """

    group_id: str
    prompt_id: str
    sample: int
    payload: Mapping[str, Any]
    messages: Sequence[Mapping[str, str]]
    token_ids: Sequence[int]
    num_response_tokens: int
    stop_reason: StopReason
    truncated: bool
    env_reward: float
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """All that was said before the policy's last turn: one message's text as it is, several with their roles."""
        before = self.messages[:-1]
        if len(before) == 1:
            return before[0]["content"]
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in before)

    @property
    def response(self) -> str:
        """The policy's last turn."""
        return self.messages[-1]["content"]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that the policy did not sample: the prompt's, and those of later observations."""
        return len(self.token_ids) - self.num_response_tokens

    @property
    def place(self) -> str:
        """Names the trajectory in messages."""
        return f"group {self.group_id!r}, sample {self.sample}"
