"""What every text environment here is built on: a gymnasium environment that poses one payload and answers turns.

A subclass writes two methods, `pose` and `respond`, and, if it can make its own tasks, the classmethod `generate_payload`.
Everything else (gymnasium's signatures, spaces, seeding, the rule that an ended episode takes no more steps) is here.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import gymnasium

from skyrl_mega.envs.spaces import AnyText, ChatMessages
from skyrl_mega.errors import EnvError

#: Text to continue as it stands, or chat messages.
Observation = str | list[dict[str, str]]
Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Reply:
    """How the environment answers one turn of the policy.

    `metrics` are numbers to average over trajectories; a trajectory that never reports a name counts as 0 in its mean.
    `answer`: what was graded, in a form in which equal answers are equal texts (majority votes count them); None: there is none.
    `observation` is None once the episode has ended; while it goes on, it is what the policy reads next.
    """

    reward: float
    terminated: bool = True
    truncated: bool = False
    observation: Observation | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    answer: str | None = None


def stable_hash(*parts: Any) -> int:
    """64 bits that depend on the parts' text only: the same in every process, on every machine and Python version."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" or nothing, then the known names: the tail of an error message."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]!r}? " if close else ". ") + f"Known: {', '.join(names) or 'none'}."


class TextEnvBase(gymnasium.Env[Observation, str]):
    """One episode at a time; the action is the text of the policy's turn.

    `reset(options={"payload": ...})` poses that payload. Without one, an environment that generates draws a training
    payload from its gymnasium random stream, so that `reset(seed=...)` works as gymnasium users expect.

    Subclasses call `super().__init__(chat=..., **options)`: `chat` says whether observations are messages; `options` are
    the ones that `generate_payload` shall get when `reset` has to draw a payload.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (gymnasium declares it so)

    def __init__(self, *, chat: bool = False, **options: Any) -> None:
        self.observation_space = ChatMessages() if chat else AnyText()
        self.action_space = AnyText()
        self._chat = chat
        self._options = options
        self._running = False

    # -- what a subclass writes ----------------------------------------------------------------------------------------

    def pose(self, payload: Mapping[str, Any]) -> Observation:
        """The first observation of an episode about `payload`; keeps what `respond` needs."""
        raise NotImplementedError(f"{type(self).__name__} must define pose(payload)")

    def respond(self, action: str) -> Reply:
        """The environment's answer to the policy's turn."""
        raise NotImplementedError(f"{type(self).__name__} must define respond(action)")

    @classmethod
    def generate_payload(cls, index: int, seed: int, split: Split, **options: Any) -> dict[str, Any]:
        """The payload number `index` (0, 1, ...) of a split: a pure function of its arguments, JSON-serialisable.

        No payload of "eval" may ever be a payload of "train", for any seeds. Raises EnvError where an environment has no
        generator, or has fewer than index + 1 payloads in the split.
        """
        raise EnvError(
            f"{cls.__name__} can't generate prompts: its tasks are rows of a file. "
            "Set data.source to jsonl, parquet or hf_dataset and data.path to the file."
        )

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raises EnvError if an option is not a keyword of the constructor (naming the nearest), or a required one is missing."""
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return
        known = {parameter.name for parameter in parameters}
        for option in options:
            if option not in known:
                raise EnvError(f"{cls.__name__} has no option {option!r}{nearest(option, known)}")
        missing = [
            p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and p.name not in options
        ]
        if missing:
            raise EnvError(f"{cls.__name__} needs the option {missing[0]!r}; set env.options.{missing[0]}.")

    @classmethod
    def check_payload(cls, payload: Mapping[str, Any]) -> None:
        """Raises EnvError if `pose` could not pose `payload`; files are checked row by row before a run starts."""

    @classmethod
    def payload_key(cls, payload: Mapping[str, Any]) -> str:
        """A short text that is equal exactly for equal tasks. Held-out rows are chosen, and kept out, by it."""
        canonical = json.dumps(payload, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()

    # -- gymnasium -----------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """(first observation, {}). Raises EnvError for a payload that can't be posed, or none where none can be drawn."""
        super().reset(seed=seed)
        self._running = False
        unknown = set(options or ()) - {"payload"}
        if unknown:
            raise EnvError(f"reset options of a text environment are 'payload' alone, but got {sorted(unknown)}.")
        payload = options.get("payload") if options else None
        if payload is None:
            index = int(self.np_random.integers(2**31))
            payload = self.generate_payload(index, 0, "train", **self._options)
        self.check_payload(payload)
        observation = self.pose(payload)
        self._running = True
        return observation, {}

    def step(self, action: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """(observation, reward, terminated, truncated, {"metrics": ...}), and "answer" beside it if there is one.

        Raises EnvError if no episode is running.
        """
        if not self._running:
            raise EnvError(f"{type(self).__name__}.step was called while no episode runs; call reset first.")
        reply = self.respond(action)
        ended = reply.terminated or reply.truncated
        if not ended and reply.observation is None:
            raise EnvError(
                f"{type(self).__name__}.respond returned no observation for an episode that goes on; "
                "give Reply(observation=...), or end the episode."
            )
        self._running = not ended
        nothing: Observation = [] if self._chat else ""
        observation = nothing if reply.observation is None else reply.observation
        said = {} if reply.answer is None else {"answer": reply.answer}
        return observation, float(reply.reward), reply.terminated, reply.truncated, {"metrics": dict(reply.metrics), **said}
