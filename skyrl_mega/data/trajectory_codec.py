"""Finished trajectory groups as bytes: compact, checksummed, and exactly what they were.

    "SMTG" | format version (1 byte) | XXH3-64 of the rest (8 bytes, big endian) | zstd frame of one msgpack object

The columns of all the group's trajectories lie end to end, each as one array of the narrowest type that holds its values
exactly: integers by their range, log-probabilities as float32 where each of them is a float32 bit for bit (as engines
give them), else as float64. So a decoded group trains exactly as the one that was encoded. Nothing is pickled: reading a damaged
or a foreign file runs no code. Fields that came later stand at the end and have a default: older groups lack them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import xxhash
import zstandard

from skyrl_mega.errors import DataError
from skyrl_mega.types import StopReason, Trajectory, TrajectoryGroup, Turn

MAGIC = b"SMTG"
FORMAT_VERSION = 1
_HEADER_BYTES = len(MAGIC) + 1 + 8
#: Level 1: log-probabilities hardly shrink at any level, and the other columns shrink well at this one.
_ZSTD_LEVEL = 1
_INTEGERS = ("<i1", "<i2", "<i4", "<i8")


class _Column(msgspec.Struct, array_like=True):
    """One array: numpy's name of its type, and its bytes."""

    dtype: str
    content: bytes


class _Rest(msgspec.Struct, array_like=True):
    """What a trajectory has besides its columns. `text` is UTF-8, lone surrogates included."""

    num_tokens: int
    turns: list[tuple[int, int, str, float]]
    reward: float
    terminated: bool
    truncated: bool
    metrics: dict[str, float]
    text: bytes
    reward_components: dict[str, float] = {}
    answer: bytes | None = None
    has_routing: bool = False


class _Group(msgspec.Struct, array_like=True):
    group_id: str
    prompt_id: str
    token_ids: _Column
    loss_mask: _Column
    rollout_logprobs: _Column
    policy_versions: _Column
    trajectories: list[_Rest]
    num_masked: int
    num_retries: int
    reward_errors: dict[str, int] = {}
    baseline_reward: float | None = None  #: absent in groups that were written before there was one
    routed_experts: _Column | None = None  #: of the trajectories that have routing
    routing_shape: tuple[int, int] = (0, 0)  #: layers, experts per token


@dataclass(frozen=True)
class EncodedGroup:
    """A group's bytes, and what was counted on the way.

    `tokens`: of all trajectories, prompts included; `response_tokens`: those the policy sampled; `longest_response`: most of
    them in one trajectory. The versions are those that sampled any token.
    """

    content: bytes
    tokens: int
    response_tokens: int
    longest_response: int
    min_policy_version: int
    max_policy_version: int


def encode_group(group: TrajectoryGroup) -> EncodedGroup:
    """Raises DataError for a group whose columns differ in length, that holds no sampled token, or other than plain values."""
    trajectories = group.trajectories
    lengths = [len(trajectory.token_ids) for trajectory in trajectories]
    columns = {
        "token_ids": _integers(t.token_ids for t in trajectories),
        "loss_mask": _integers(t.loss_mask for t in trajectories),
        "policy_versions": _integers(t.policy_versions for t in trajectories),
        "rollout_logprobs": _numbers((t.rollout_logprobs for t in trajectories), np.float64),
    }
    for name, values in columns.items():
        if [len(getattr(trajectory, name)) for trajectory in trajectories] != lengths:
            raise DataError(f"group {group.group_id!r}: {name} and token_ids must have equally many entries in each trajectory.")
        if len(values) != sum(lengths):
            raise DataError(f"group {group.group_id!r}: {name} holds {len(values)} values for {sum(lengths)} tokens.")
    routed = _routing(group)
    versions = columns["policy_versions"]
    sampled = versions >= 0
    if not sampled.any():
        raise DataError(f"group {group.group_id!r} has {sum(lengths)} tokens, and the policy sampled none of them.")
    try:
        packed = msgspec.msgpack.encode(
            _Group(
                group.group_id,
                group.prompt_id,
                _narrow(columns["token_ids"]),
                _narrow(columns["loss_mask"]),
                _exact_float(columns["rollout_logprobs"]),
                _narrow(versions),
                [_rest(trajectory) for trajectory in trajectories],
                group.num_masked,
                group.num_retries,
                dict(group.reward_errors),
                None if group.baseline_reward is None else float(group.baseline_reward),
                None if routed is None else _narrow(routed),
                (0, 0) if routed is None else (routed.shape[1], routed.shape[2]),
            )
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"group {group.group_id!r} holds other than plain values: {error}.") from error
    frame = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(packed)
    starts = np.cumsum([0, *lengths[:-1]])
    masks = columns["loss_mask"].astype(bool)
    responses = [int(np.count_nonzero(masks[start : start + length])) for start, length in zip(starts, lengths, strict=True)]
    return EncodedGroup(
        content=MAGIC + bytes([FORMAT_VERSION]) + xxhash.xxh3_64_digest(frame) + frame,
        tokens=sum(lengths),
        response_tokens=sum(responses),
        longest_response=max(responses),
        min_policy_version=int(versions[sampled].min()),
        max_policy_version=int(versions.max()),
    )


def check_encoded(content: bytes) -> str:
    """What is wrong with the bytes of a group, "" where nothing is; reads them once and decodes nothing."""
    if content[: len(MAGIC)] != MAGIC or len(content) <= _HEADER_BYTES:
        return f"{len(content)} bytes that are no encoded group"
    version = content[len(MAGIC)]
    if version != FORMAT_VERSION:
        return f"format version {version}, this program reads {FORMAT_VERSION}"
    stored, frame = content[len(MAGIC) + 1 : _HEADER_BYTES], memoryview(content)[_HEADER_BYTES:]
    found = xxhash.xxh3_64_digest(frame)
    return "" if found == stored else f"its checksum is {found.hex()}, and {stored.hex()} was written"


def decode_group(content: bytes) -> TrajectoryGroup:
    """The group as it was encoded; its sequences are lists. Raises DataError where `check_encoded` finds anything."""
    if problem := check_encoded(content):
        raise DataError(f"an encoded group can't be read: {problem}.")
    group = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(content[_HEADER_BYTES:]), type=_Group)
    tokens, masks, logprobs, versions = (
        np.frombuffer(column.content, dtype=column.dtype).tolist()
        for column in (group.token_ids, group.loss_mask, group.rollout_logprobs, group.policy_versions)
    )
    routed, num_routed = _read_routing(group), 0
    trajectories = []
    start = 0
    for rest in group.trajectories:
        part = slice(start, start + rest.num_tokens)
        start = part.stop
        routed_experts = routed[num_routed : num_routed + rest.num_tokens] if rest.has_routing else None
        num_routed += rest.num_tokens if rest.has_routing else 0
        trajectories.append(
            Trajectory(
                token_ids=tokens[part],
                loss_mask=masks[part],
                rollout_logprobs=logprobs[part],
                policy_versions=versions[part],
                turns=tuple(Turn(first, end, StopReason(reason), reward) for first, end, reason, reward in rest.turns),
                reward=rest.reward,
                terminated=rest.terminated,
                truncated=rest.truncated,
                metrics=rest.metrics,
                text=rest.text.decode("utf-8", "surrogatepass"),
                reward_components=rest.reward_components,
                answer=None if rest.answer is None else rest.answer.decode("utf-8", "surrogatepass"),
                routed_experts=routed_experts,
            )
        )
    return TrajectoryGroup(
        group.group_id,
        group.prompt_id,
        tuple(trajectories),
        num_masked=group.num_masked,
        num_retries=group.num_retries,
        reward_errors=group.reward_errors,
        baseline_reward=group.baseline_reward,
    )


def _rest(trajectory: Trajectory) -> _Rest:
    return _Rest(
        len(trajectory.token_ids),
        [(turn.start, turn.end, turn.stop_reason.value, float(turn.reward)) for turn in trajectory.turns],
        float(trajectory.reward),
        bool(trajectory.terminated),
        bool(trajectory.truncated),
        {name: float(value) for name, value in trajectory.metrics.items()},
        trajectory.text.encode("utf-8", "surrogatepass"),
        {name: float(value) for name, value in trajectory.reward_components.items()},
        None if trajectory.answer is None else trajectory.answer.encode("utf-8", "surrogatepass"),
        trajectory.routed_experts is not None,
    )


def _routing(group: TrajectoryGroup) -> np.ndarray | None:
    """The experts of the trajectories that have them, end to end; None where none has."""
    lengths = [len(t.token_ids) for t in group.trajectories if t.routed_experts is not None]
    rows = [t.routed_experts for t in group.trajectories if t.routed_experts is not None]
    if not rows:
        return None
    if [part.shape for part in rows] != [(length, *rows[0].shape[1:]) for length in lengths] or rows[0].ndim != 3:
        raise DataError(
            f"group {group.group_id!r}: routed_experts must be [tokens, layers, experts per token] in each trajectory, but are "
            f"{[part.shape for part in rows]} for {lengths} tokens."
        )
    return np.concatenate(rows)


def _read_routing(group: _Group) -> np.ndarray:
    column = group.routed_experts
    if column is None:
        return np.empty((0, 0, 0), dtype=np.int16)
    return np.frombuffer(column.content, dtype=column.dtype).astype(np.int16).reshape(-1, *group.routing_shape)


def _integers(sequences: Iterable[Any]) -> np.ndarray:
    return _numbers(sequences, np.int64)


def _numbers(sequences: Iterable[Any], dtype: Any) -> np.ndarray:
    return np.fromiter(chain.from_iterable(sequences), dtype=dtype)


def _narrow(values: np.ndarray) -> _Column:
    """The values in the narrowest integer type that holds them all."""
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    dtype = next(name for name in _INTEGERS if np.iinfo(name).min <= low and high <= np.iinfo(name).max)
    return _Column(dtype, values.astype(dtype).tobytes())


def _exact_float(values: np.ndarray) -> _Column:
    """As float32 where that loses no bit, not even the sign of a zero; else as float64."""
    with np.errstate(over="ignore"):
        single = values.astype("<f4")
    is_exact = np.array_equal(single.astype("<f8").view(np.int64), values.view(np.int64))
    return _Column("<f4", single.tobytes()) if is_exact else _Column("<f8", values.astype("<f8").tobytes())
