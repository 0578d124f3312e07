"""An environment that a random model is right about half of the time: the first character of the answer has an even code."""

from __future__ import annotations

from skyrl_mega.envs.base import Reply, TextEnvBase


class EvenEnv(TextEnvBase):
    """Reward 1 when the first character of the answer has an even code."""

    def __init__(self, level="", shots=0):
        """Takes and ignores the arithmetic options that recipe=tiny sets."""
        super().__init__()

    def pose(self, payload):
        return payload["text"]

    def respond(self, action):
        even = float(bool(action) and ord(action[0]) % 2 == 0)
        return Reply(reward=even, metrics={"accuracy": even})

    @classmethod
    def generate_payload(cls, index, seed, split, **options):
        return {"text": f"{split} {seed} number {index}: "}


def brevity(one):
    """A further term of the reward: less for longer answers."""
    return 1.0 / (1.0 + one.num_response_tokens)
