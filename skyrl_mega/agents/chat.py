"""Observations as token ids: raw text, or chat messages through the tokenizer's template.

Only new text is ever tokenised. In a later turn of a chat, the new text is what the template puts between the end of an
assistant's turn and the next one's beginning. It is found by rendering a fixed conversation whose assistant turn is a marker,
and taking what follows the marker; so the turns that were sampled are never rendered, and never tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from skyrl_mega.envs.spaces import is_chat
from skyrl_mega.errors import EnvError
from skyrl_mega.protocols import Tokenizer

Messages = list[dict[str, str]]

_MARKER = "assistant-turn-7f3a9c"
_BASE: Messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARKER}]


class ChatTokenizer(Tokenizer, Protocol):
    """A Hugging Face tokenizer with its chat template (None: it has none)."""

    chat_template: Any

    def apply_chat_template(self, conversation: Messages, *, tokenize: bool, add_generation_prompt: bool) -> Any: ...


class ObservationEncoder:
    """Token ids of the observations of one environment.

    With `chat_template`, messages are rendered through the tokenizer's template, and a plain text counts as one user message;
    without it, text is continued as it stands, with no special token added, and messages are an EnvError.
    """

    def __init__(self, tokenizer: Any, *, chat_template: bool) -> None:
        if chat_template and not tokenizer.chat_template:
            raise EnvError(
                "env.chat_template is true, but the model's tokenizer has no chat template. Set env.chat_template=false and "
                "use an environment whose observations are raw text, or add chat_template.jinja to model.path."
            )
        self._tokenizer: ChatTokenizer = tokenizer
        self._chat_template = chat_template

    def first(self, observation: Any) -> list[int]:
        """The prompt of an episode: the rendered conversation up to where the policy speaks, or the raw text."""
        messages = self._messages(observation)
        ids = self._encode(observation if messages is None else self._render(messages))
        if not ids:
            raise EnvError(
                "the first observation of an episode must not be empty: the policy needs at least one token to continue."
            )
        return ids

    def later(self, observation: Any, sampled: Sequence[int]) -> list[int]:
        """What stands between the turn that was just `sampled` and the next one.

        In a chat this begins with the template's end of an assistant turn; where the policy sampled that token itself, it
        is not put a second time.
        """
        messages = self._messages(observation)
        if messages is None:
            return self._encode(observation)
        ids = self._bridge(messages)
        return ids[1:] if ids and sampled and sampled[-1] == ids[0] else ids

    def end_of_turn(self) -> list[int]:
        """The token by which the template ends an assistant's turn, as a list; [] where it ends it with nothing."""
        return self._bridge(_BASE[:1])[:1]

    def _bridge(self, messages: Messages) -> list[int]:
        """What the template puts between an assistant's turn and the next one, `messages` in between."""
        before, marker, bridge = self._render([*_BASE, *messages]).partition(_MARKER)
        if not marker or _MARKER in bridge or not before:
            raise EnvError(
                "the tokenizer's chat template does not repeat an assistant's turn exactly once, so later turns can't be "
                "appended to it. Use an environment with one turn, or env.chat_template=false with raw text."
            )
        return self._encode(bridge)

    def _messages(self, observation: Any) -> Messages | None:
        """The observation as chat messages, or None where it is raw text. Raises EnvError for anything else."""
        if isinstance(observation, str):
            return [{"role": "user", "content": observation}] if self._chat_template else None
        if not is_chat(observation):
            raise EnvError(
                "an observation must be a text or a list of messages {'role': text, 'content': text}, but is "
                f"{str(observation)[:120]!r} ({type(observation).__name__})."
            )
        if not self._chat_template:
            raise EnvError(
                "the environment's observations are chat messages, but env.chat_template is false. "
                "Set env.chat_template=true, or the environment's option for raw text."
            )
        return observation

    def _render(self, messages: Messages) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise EnvError(f"the tokenizer's chat template refuses messages with the roles {roles}: {error}") from error

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))
