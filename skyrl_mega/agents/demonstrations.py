"""Responses to imitate, as training samples: tokens as an episode would have them, and a loss mask on the responses.

A row is {"prompt": text or messages, "response": text} or {"messages": [...]}, whose assistant turns are the responses. Prompts
are encoded as observations are (`chat.ObservationEncoder`), each response by itself, as if the policy had sampled it, and what
lies between two turns as in a conversation with an environment: the tokens that are imitated are those of a rollout.

A response ends as a turn ends: in a chat with the token by which the template ends an assistant's turn; in raw text with one of
`rollout.stop`, where the response brings it along, and else with the tokenizer's end of text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from skyrl_mega.agents.chat import ObservationEncoder
from skyrl_mega.envs.spaces import is_chat
from skyrl_mega.errors import DataError, EnvError
from skyrl_mega.types import TrainSample


class DemonstrationEncoder:
    """Rows to samples. `chat_template` and `stop` as in `env` and `rollout` of the configuration."""

    def __init__(self, tokenizer: Any, *, chat_template: bool, stop: Sequence[str], max_tokens: int) -> None:
        """Raises EnvError for a chat template that is asked for and absent."""
        self._tokenizer = tokenizer
        self._encoder = ObservationEncoder(tokenizer, chat_template=chat_template)
        self._chat_template = chat_template
        self._stop = tuple(stop)
        self._max_tokens = max_tokens

    def sample(self, row: Mapping[str, Any], where: str, index: int) -> TrainSample:
        """The sample of a row, with advantages of 1 on its responses. `where` is for errors, `index` numbers it in its batch.

        Raises DataError for a row that is neither kind, has no response, or is longer than `max_tokens`.
        """
        try:
            token_ids, loss_mask = self._tokens(row, where)
        except EnvError as error:
            raise DataError(f"{where}: {error}") from error
        if len(token_ids) > self._max_tokens:
            raise DataError(
                f"{where} has {len(token_ids)} tokens, more than rollout.max_model_len ({self._max_tokens}). Shorten it, or"
                " raise the setting."
            )
        mask = torch.tensor(loss_mask)
        return TrainSample(
            sample_index=index,
            group_index=index,
            group_id=where,
            token_ids=torch.tensor(token_ids, dtype=torch.int64),
            loss_mask=mask,
            rollout_logprobs=torch.zeros(len(token_ids)),
            reward=0.0,
            advantages=mask.float(),
        )

    def _tokens(self, row: Mapping[str, Any], where: str) -> tuple[list[int], list[bool]]:
        token_ids: list[int] = []
        loss_mask: list[bool] = []
        response: list[int] = []
        for observation, text in _turns(row, where):
            seen = self._encoder.later(observation, response) if token_ids else self._encoder.first(observation)
            response = self._response(text)
            token_ids += [*seen, *response]
            loss_mask += [False] * len(seen) + [True] * len(response)
        return token_ids, loss_mask

    def _response(self, text: str) -> list[int]:
        ids = list(self._tokenizer.encode(text, add_special_tokens=False))
        if self._chat_template:
            end = self._encoder.end_of_turn()
        else:
            end = [] if self._stop and text.endswith(self._stop) else [self._tokenizer.eos_token_id]
        return ids if end and ids[-len(end) :] == end else ids + end


def _turns(row: Mapping[str, Any], where: str) -> list[tuple[Any, str]]:
    """(observation, response) of each assistant turn."""
    if isinstance(row.get("response"), str) and (isinstance(row.get("prompt"), str) or is_chat(row.get("prompt"))):
        return [(row["prompt"], row["response"])]
    messages = row.get("messages")
    if not is_chat(messages) or not messages:
        raise DataError(
            f'{where} must be {{"prompt": text or messages, "response": text}} or {{"messages": [{{"role", "content"}}, ...]}}; '
            f"it has the keys {', '.join(sorted(row)) or '(none)'}."
        )
    turns: list[tuple[Any, str]] = []
    observation: list[dict[str, str]] = []
    for message in messages:
        if message["role"] != "assistant":
            observation.append(message)
        elif not observation:
            raise DataError(f"{where}: an assistant's message must answer another's; message {len(turns)} answers none.")
        else:
            turns.append((observation, message["content"]))
            observation = []
    if observation or not turns:
        raise DataError(f"{where}: the last message must be the assistant's, which is trained.")
    return turns
