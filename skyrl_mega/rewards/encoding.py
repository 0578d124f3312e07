"""Trajectories as token sequences of a reward model."""

from __future__ import annotations

from typing import Any

from skyrl_mega.errors import RewardError
from skyrl_mega.rewards.inputs import RewardInput


class SequenceEncoder:
    """Token ids of a trajectory for the model whose tokenizer is `tokenizer`.

    Where that is the policy's (the same vocabulary and, for chats, the same template), the sampled ids go in as they are. Else
    the conversation is rendered through the model's own chat template; one without a template gets the texts end to end.
    """

    def __init__(self, tokenizer: Any, policy_tokenizer: Any, *, chat: bool) -> None:
        """`chat`: the policy's own prompts are rendered through its template (`env.chat_template`)."""
        self._tokenizer = tokenizer
        same_vocabulary = tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        same_template = not chat or tokenizer.chat_template == policy_tokenizer.chat_template
        self.passes_ids = same_vocabulary and same_template

    def __call__(self, one: RewardInput) -> list[int]:
        """Raises RewardError where the chat template refuses the conversation."""
        from jinja2.exceptions import TemplateError

        if self.passes_ids:
            return list(one.token_ids)
        if not self._tokenizer.chat_template:
            return list(self._tokenizer.encode("".join(message["content"] for message in one.messages)))
        messages = [dict(message) for message in one.messages]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise RewardError(f"the chat template of the reward model refuses the roles {roles}: {error}") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False))
