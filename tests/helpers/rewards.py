"""What the tests of rewards share: inputs, groups, a tiny reward model, and servers that answer as vLLM and OpenAI's do."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from helpers.tiny import make_tokenizer
from skyrl_mega.rewards.inputs import RewardInput
from skyrl_mega.types import StopReason, Trajectory, TrajectoryGroup, Turn

TOKENIZER = make_tokenizer()


def reward_input(response="42", *, sample=0, prompt="6 x 7 =", payload=None, **changes) -> RewardInput:
    """The input of a single turn of raw text."""
    ids = TOKENIZER.encode(prompt + response, add_special_tokens=False)
    fields = dict(
        group_id="g",
        prompt_id="p",
        sample=sample,
        payload={"answer": "42"} if payload is None else payload,
        messages=[{"role": "user", "content": prompt}, {"role": "assistant", "content": response}],
        token_ids=ids,
        num_response_tokens=len(TOKENIZER.encode(response, add_special_tokens=False)),
        stop_reason=StopReason.STOP,
        truncated=False,
        env_reward=0.0,
    )
    return RewardInput(**{**fields, **changes})


def group_of(*rewards: float) -> TrajectoryGroup:
    """A group whose trajectories have one turn, and these rewards of their environment."""
    return TrajectoryGroup("g", "p", tuple(trajectory(reward) for reward in rewards))


def trajectory(*turn_rewards: float) -> Trajectory:
    turns = tuple(Turn(1, 2, StopReason.STOP, reward) for reward in turn_rewards)
    return Trajectory([1, 2], [0, 1], [0.0, -1.0], [-1, 0], turns, sum(turn_rewards), True, False)


def write_reward_model(path: Path, *, num_labels=1, pad_token_id: int | None = 0, max_position_embeddings=512) -> Path:
    """A random 2-layer Llama with a score head, and the byte tokenizer of `helpers.tiny`."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=max_position_embeddings,
        num_labels=num_labels,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=pad_token_id,
    )
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.08)
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


class JsonServer:
    """An ASGI server: `answer(path, body)` gives (status, JSON) or (status, JSON, headers). What it was asked is in `calls`."""

    def __init__(self, answer, *, delay_s=0.0):
        self._answer, self._delay_s = answer, delay_s
        self.calls: list[tuple[str, dict]] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.most_running = 0
        self.cancelled = 0

    async def __call__(self, scope, receive, send):
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.headers.append({key.decode().lower(): value.decode() for key, value in scope["headers"]})
        call = scope["path"], json.loads(body or "{}")
        self.calls.append(call)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self._delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        status, content, *headers = self._answer(*call)
        head = [(b"content-type", b"application/json"), *(headers[0] if headers else [])]
        await send({"type": "http.response.start", "status": status, "headers": head})
        text = content if isinstance(content, str) else json.dumps(content)
        await send({"type": "http.response.body", "body": text.encode()})


def chat_answer(text: str | None) -> tuple[int, dict]:
    """What an OpenAI-compatible endpoint answers."""
    return 200, {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "judge",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
